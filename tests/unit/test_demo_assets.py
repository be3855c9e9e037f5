"""The demo's photographs, scenes, teachers and student: the same bytes each time, an honest split, real layouts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPTokenizer,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DepthAnythingForDepthEstimation,
    DPTImageProcessorPil,
    LlamaForCausalLM,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessorPil,
    OneFormerProcessor,
    Phi3ForCausalLM,
)

from olaschema.errors import CorpusError

EXAMPLES = Path(__file__).parents[2] / "examples"
DEMO = EXAMPLES / "demo"
TOYWORLD = EXAMPLES / "toyworld"
TEACHERS = TOYWORLD / "teachers"


def _load(name: str, folder: Path = DEMO) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photographs() -> Iterator[ModuleType]:
    yield _load("photographs")
    sys.modules.pop("photographs", None)


@pytest.fixture(scope="module")
def checkpoints(photographs: ModuleType) -> Iterator[ModuleType]:
    yield _load("checkpoints")
    sys.modules.pop("checkpoints", None)


@pytest.fixture(scope="module")
def scenes() -> Iterator[ModuleType]:
    yield _load("scenes", TOYWORLD)
    sys.modules.pop("scenes", None)


@pytest.fixture(scope="module")
def corpus(photographs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    photographs.write_corpus(out)
    return out


@pytest.fixture(scope="module")
def built(checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints")
    _build_all(checkpoints, out)
    return out


def _build_all(checkpoints: ModuleType, out: Path) -> None:
    checkpoints.build_vision(out / "vision")
    checkpoints.build_llm(out / "llama")
    checkpoints.build_llm(out / "phi3", "phi3")


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _open(model_class: Any, folder: Path) -> Any:
    return model_class.from_pretrained(folder).eval()


def _samples(corpus: Path, name: str) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = json.loads((corpus / f"{name}.json").read_text(encoding="utf-8"))
    return samples


def test_the_corpus_is_the_same_bytes_each_time(photographs: ModuleType, corpus: Path, tmp_path: Path) -> None:
    photographs.write_corpus(tmp_path)
    assert _digests(tmp_path) == _digests(corpus)


def test_sixty_four_pictures_of_varied_shape_with_eight_colour_photographs(corpus: Path) -> None:
    sizes, coloured = {}, set()
    for path in (corpus / "images").iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
            pixels = np.asarray(image.convert("RGB")).astype(int)
        if (np.ptp(pixels, axis=2) > 16).mean() > 0.01 and "-crop" not in path.stem:
            coloured.add(path.stem)
    assert len(sizes) == 64
    assert len(coloured) >= 8
    ratios = [width / height for width, height in sizes.values()]
    assert min(ratios) < 0.6 and max(ratios) > 1.7 and any(ratio == 1 for ratio in ratios)
    assert max(max(size) for size in sizes.values()) <= 640


def test_a_small_photograph_and_its_crops_keep_the_pixels_of_the_wheel(corpus: Path) -> None:
    folder = Path(skimage.__file__).parent / "data"
    with Image.open(folder / "chelsea.png") as image:
        original = np.asarray(image)
    with Image.open(corpus / "images" / "chelsea.png") as image:
        assert np.array_equal(np.asarray(image), original)
    crops = sorted((corpus / "images").glob("chelsea-crop*.png"))
    assert len(crops) == 5
    for path in crops:
        with Image.open(path) as image:
            crop = np.asarray(image)
        assert crop.size < original.size
        corner = (original == crop[0, 0]).all(axis=2)
        places = np.argwhere(corner[: original.shape[0] - crop.shape[0] + 1, : original.shape[1] - crop.shape[1] + 1])
        assert any(np.array_equal(original[y : y + crop.shape[0], x : x + crop.shape[1]], crop) for y, x in places)


def test_every_picture_has_one_caption_in_llava_form(corpus: Path) -> None:
    samples = _samples(corpus, "conversations")
    images = [sample["image"] for sample in samples if "image" in sample]
    assert sorted(images) == sorted(path.name for path in (corpus / "images").iterdir())
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        human, answer = sample["conversations"]
        assert (human["from"], answer["from"]) == ("human", "gpt")
        assert human["value"].startswith("<image>\n") == ("image" in sample)
        assert answer["value"].endswith(".") and len(answer["value"]) > 20
    assert sum("image" not in sample for sample in samples) == 3


def test_a_crops_caption_says_which_part_it_shows(photographs: ModuleType, corpus: Path) -> None:
    cat = next(entry for entry in photographs.read_catalogue() if entry.name == "chelsea")
    for box, part in (
        ((0, 0, 40, 40), "upper left part"),
        ((60, 60, 100, 100), "lower right part"),
        ((30, 30, 70, 70), "middle"),
        ((30, 0, 70, 40), "upper part"),
        ((0, 30, 40, 70), "left part"),
    ):
        assert photographs._crop_caption(cat, (100, 100), box).startswith(f"The {part} of a close view of a tabby cat:")
    whole = {entry.caption for entry in photographs.read_catalogue()}
    for sample in _samples(corpus, "conversations"):
        if "image" in sample:
            caption = sample["conversations"][1]["value"]
            assert (caption in whole) == ("-crop" not in sample["id"])


def test_train_and_heldout_share_no_photograph_and_make_up_the_whole(photographs: ModuleType, corpus: Path) -> None:
    train, heldout = _samples(corpus, "train"), _samples(corpus, "heldout")
    assert train + heldout == _samples(corpus, "conversations")
    scenes = {entry.name: entry.scene for entry in photographs.read_catalogue()}
    sides = [
        {scenes[s["image"].removesuffix(".png").split("-crop")[0]] for s in part if "image" in s}
        for part in (train, heldout)
    ]
    assert sides[1] == {"chelsea", "coffee"}
    assert not sides[0] & sides[1]
    # the two views of the stereo pair show the same motorcycle
    assert scenes["motorcycle-left"] == scenes["motorcycle-right"]
    assert all(any("image" not in sample for sample in part) for part in (train, heldout))


def test_a_photograph_the_wheel_lacks_is_named(photographs: ModuleType) -> None:
    missing = photographs.Photograph("x", "absent.png", True, False, "x", "", "", "", "", "")
    with pytest.raises(CorpusError, match=r"skimage/data/absent\.png"):
        photographs.open_photograph(missing)


def test_the_photographs_command_reports_an_output_it_cannot_write(
    photographs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert photographs.main([str(tmp_path / "file" / "out")]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_checkpoints_are_the_same_bytes_each_time(checkpoints: ModuleType, built: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)  # the builders' weights must not depend on the caller's generator
    state = torch.random.get_rng_state()
    _build_all(checkpoints, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert _digests(tmp_path) == _digests(built)


@pytest.mark.parametrize(
    ("folder", "model_class"),
    [
        ("vision", CLIPVisionModel),
        ("llama", LlamaForCausalLM),
        ("phi3", Phi3ForCausalLM),
    ],
)
def test_every_checkpoint_loads_with_its_class_and_no_key_left_over(built: Path, folder: str, model_class: Any) -> None:
    _opens_whole(model_class, built / folder)


@pytest.mark.parametrize(
    ("folder", "model_class"),
    [
        ("depth", DepthAnythingForDepthEstimation),
        ("seg", OneFormerForUniversalSegmentation),
        ("gen/image_encoder", CLIPVisionModelWithProjection),
    ],
)
def test_every_trained_teacher_loads_with_its_class_in_float32(folder: str, model_class: Any) -> None:
    """They are kept in float16, half the size."""
    model = _opens_whole(model_class, TEACHERS / folder)
    # OneFormer's loss has a scale of its own, which transformers makes in float64
    used = {p.dtype for name, p in model.named_parameters() if not name.startswith("criterion.")}
    assert used == {torch.float32}


def _opens_whole(model_class: Any, folder: Path) -> Any:
    model, report = model_class.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert type(model) is model_class
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def test_trained_teachers_are_small_and_scored_beside_a_baseline() -> None:
    scores = json.loads((TEACHERS / "scores.json").read_text(encoding="utf-8"))
    assert set(scores) == {"depth", "seg", "gen"}
    for name, entry in scores.items():
        weights = [path.stat().st_size for path in (TEACHERS / name).rglob("*.safetensors")]
        assert sum(weights) == entry["bytes of weights"]
        assert max(weights) < 5_000_000
        assert entry["licence"] and entry["date"] and entry["versions"]["torch"]
    depth = scores["depth"]["scores"]
    assert depth["test R²"] > max(0.9, depth["test R² of the mean map"])
    assert depth["test R² on things"] > 0.8 > depth["test R² on things of the mean map"]
    assert scores["gen"]["scores"]["test R²"] > scores["gen"]["scores"]["test R² of the mean thumbnail"]
    assert (
        scores["seg"]["scores"]["test mIoU"] > scores["seg"]["scores"]["test mIoU of the most frequent class by place"]
    )


def test_the_depth_teacher_tells_near_things_from_far_ones(scenes: ModuleType) -> None:
    """On scenes it was not trained on, by transformers alone: Pearson's correlation over the things' pixels."""
    model = _open(DepthAnythingForDepthEstimation, TEACHERS / "depth")
    processor = DPTImageProcessorPil.from_pretrained(TEACHERS / "depth")
    found, truth = [], []
    for index in range(5000, 5012):
        picture = scenes.render(scenes.make_scene("test", index))
        with torch.inference_mode():
            depth = model(processor(picture.image(), return_tensors="pt")["pixel_values"]).predicted_depth
        sized = torch.nn.functional.interpolate(depth[None], picture.rgb.shape[:2], mode="bilinear")[0, 0].numpy()
        found.append(sized[picture.segments > 1])
        truth.append(1 / picture.distance[picture.segments > 1])
    assert np.corrcoef(np.concatenate(found), np.concatenate(truth))[0, 1] > 0.85


def test_scenes_of_the_demo_are_the_same_bytes_each_time_and_name_what_they_show(
    scenes: ModuleType, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        done = subprocess.run(
            [sys.executable, TOYWORLD / "pictures.py", tmp_path / name, "--train", "3", "--heldout", "2"], check=False
        )
        assert done.returncode == 0
    assert _digests(tmp_path / "first") == _digests(tmp_path / "second")
    samples = _samples(tmp_path / "first", "scenes-heldout")
    assert [sample["image"] for sample in samples] == ["scenes/test-000.png", "scenes/test-001.png"]
    assert len(_samples(tmp_path / "first", "scenes-train")) == 3
    for index, sample in enumerate(samples):
        with Image.open(tmp_path / "first" / "images" / sample["image"]) as image:
            assert np.array_equal(np.asarray(image), scenes.render(scenes.make_scene("test", index)).rgb)
        said = sample["conversations"][1]["value"]
        near_first = sorted(scenes.make_scene("test", index).things, key=lambda thing: thing.distance)
        places = [said.index(f"a {thing.colour} {thing.shape}") for thing in near_first]
        assert places == sorted(places)


def test_image_processors_read_their_files(built: Path) -> None:
    image = Image.new("RGB", (300, 200), (200, 30, 30))
    clip = CLIPImageProcessorPil.from_pretrained(built / "vision")
    assert clip(image, return_tensors="np")["pixel_values"].shape == (1, 3, 336, 336)
    gen = CLIPImageProcessorPil.from_pretrained(TEACHERS / "gen" / "feature_extractor")
    assert gen(image, return_tensors="np")["pixel_values"].shape == (1, 3, 96, 96)
    depth = DPTImageProcessorPil.from_pretrained(TEACHERS / "depth")
    assert depth(image, return_tensors="np")["pixel_values"].shape == (1, 3, 96, 96)
    for folder, name in (
        (built / "vision", "CLIPImageProcessor"),
        (TEACHERS / "gen" / "feature_extractor", "CLIPImageProcessor"),
        (TEACHERS / "depth", "DPTImageProcessor"),
        (TEACHERS / "seg", "OneFormerImageProcessor"),
    ):
        config = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        assert config["image_processor_type"] == name


def test_the_segmenter_runs_whole_from_its_folder() -> None:
    folder = TEACHERS / "seg"
    images = OneFormerImageProcessorPil.from_pretrained(
        folder, repo_path=str(folder), size={"height": 192, "width": 192}
    )
    processor = OneFormerProcessor(images, CLIPTokenizer.from_pretrained(folder))
    inputs = processor(Image.new("RGB", (64, 64), (9, 99, 9)), task_inputs=["panoptic"], return_tensors="pt")
    model = _open(OneFormerForUniversalSegmentation, folder)
    with torch.inference_mode():
        out = model(pixel_values=inputs["pixel_values"], task_inputs=inputs["task_inputs"])
        taps = model.model.pixel_level_module.encoder(torch.zeros(1, 3, 192, 192)).feature_maps
    assert out.class_queries_logits.shape == (1, 14, 7)  # six classes and "no object"
    assert [tuple(tap.shape[1:]) for tap in taps] == [(16, 48, 48), (32, 24, 24), (64, 12, 12), (128, 6, 6)]


def test_the_tower_tells_images_apart(built: Path, corpus: Path) -> None:
    """At least a fifth of the energy of its features lies in what differs from the mean map over images."""
    pixels = []
    for name in ("astronaut", "chelsea", "rocket", "tissue", "moon", "retina"):
        with Image.open(corpus / "images" / f"{name}.png") as image:
            square = image.convert("RGB").resize((336, 336))
        pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1)
    with torch.inference_mode():
        tower = _open(CLIPVisionModel, built / "vision")(torch.stack(pixels), output_hidden_states=True)
    values = tower.hidden_states[-2][:, 1:]
    assert values.shape == (6, 576, 48)
    share = (values - values.mean(0)).square().sum() / values.square().sum()
    assert 0.2 < share.item() < 1


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_tokenizer_encodes_any_text_and_its_ids_fit_the_model(built: Path, family: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / family)
    text = "A tabby cat, naïve 日本語 🙂\n\t<image>"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    config = json.loads((built / family / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(tokenizer)
    assert config["pad_token_id"] == tokenizer.pad_token_id is not None
    assert config["eos_token_id"] == tokenizer.eos_token_id != tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "llama",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("phi3", "<|user|>\nHello?<|end|>\n<|assistant|>\n"),
    ],
)
def test_the_chat_template_marks_turns(built: Path, family: str, expected: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / family)
    turns = [{"role": "user", "content": "Hello?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    answered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "Yes."}], tokenize=False)
    assert isinstance(answered, str)
    assert answered.startswith(expected + "Yes.<|")


def test_the_checkpoints_command_builds_the_family_asked_for(
    checkpoints: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.main([str(tmp_path), "--llm", "phi3"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"vision", "llm"}
    assert json.loads((tmp_path / "llm" / "config.json").read_text(encoding="utf-8"))["model_type"] == "phi3"
    assert str(tmp_path / "vision") in capsys.readouterr().out
