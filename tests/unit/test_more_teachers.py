"""The further teachers against forward passes of transformers and diffusers alone (`plain_teachers.py`)."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from plain_teachers import (
    BOUND,
    DIGEST,
    OTHER_DIGEST,
    crop,
    expected,
    grid,
    normalise,
    picture_bytes,
    plain_convnext,
    plain_registers,
    relative,
    squash,
)
from safetensors.torch import load_file, save_file
from tiny_teachers import (
    CLIP,
    HALF,
    IMAGENET,
    MAKERS,
    SMALL,
    make_convnext,
    make_dinov2_with_registers,
    make_sd,
    save,
    square,
    write_json,
)
from transformers.utils import logging as transformers_logging

from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olapipe.teachers.depth_map import centred
from olapipe.teachers.pixels import OwnPreprocessor
from olaschema.errors import TeacherError
from olaschema.images import DecodedImage, decode_image

HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
needs_diffusers = pytest.mark.skipif(not HAS_DIFFUSERS, reason="the extra `diffusion` is not installed")
NAMES = sorted(MAKERS)
DIFFUSION = [pytest.param("sd-unet", marks=needs_diffusers), pytest.param("sd-vae", marks=needs_diffusers)]
LICENCES = {
    "dinov2": "Apache-2.0", "dinov3": "DINOv3 License", "siglip": "Apache-2.0", "clip": "MIT", "sam": "Apache-2.0",
    "internvit": "MIT", "hf": "apache-2.0", "sd-vae": "MIT", "sd-unet": "CreativeML Open RAIL-M",
    "depth-map": "CC-BY-NC-4.0",
}  # fmt: skip
DIGESTS = [DIGEST, OTHER_DIGEST, DIGEST[::-1]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: make(root / f"{name}-tiny") for name, make in MAKERS.items()}
    made["dinov2_with_registers"] = make_dinov2_with_registers(root / "registers")
    made["convnext"] = make_convnext(root / "convnext")
    if HAS_DIFFUSERS:
        made["sd-vae"] = made["sd-unet"] = make_sd(root / "sd-tiny")
    return made


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers_logging.disable_progress_bar()


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a checkpoint to a place where it may be damaged."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / f"copy-{name}"))


def make_image(seed: int, size: tuple[int, int] = (90, 70), *, orientation: int = 1) -> DecodedImage:
    return decode_image(picture_bytes(seed, size, orientation=orientation), name=f"picture {seed}")


def load(name: str, folder: Path, *, compute_dtype: Any = "float32", compiled: bool = False, **options: Any) -> Teacher:
    if name.startswith("sd-"):
        options = {"image_size": 32, **options}
    settings = TeacherSettings(str(folder), compute_dtype=compute_dtype, compile=compiled, options=options)
    return registry.load(name, settings)


def encode(teacher: Teacher, *images: DecodedImage, digests: list[str] = DIGESTS) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([teacher.preprocessor(image) for image in images]))
    return teacher.encode_images(pixels, digests[: len(images)])


@pytest.mark.parametrize("name", [*NAMES, *DIFFUSION])
def test_equals_an_independent_forward_pass(name: str, folders: dict[str, Path]) -> None:
    image = make_image(5, orientation=6)  # stored lying on its side
    teacher = load(name, folders[name])
    actual = encode(teacher, image)
    assert actual.dtype == torch.float32
    assert actual.shape == (1, *teacher.fingerprint.shape)
    assert teacher.licence == LICENCES[name]
    assert relative(actual, expected(name, folders[name], image.rgb.transpose(Image.Transpose.ROTATE_270))) <= BOUND
    # the same pass on the picture as stored differs by far
    assert relative(actual, expected(name, folders[name], image.rgb)) > 100 * BOUND


@torch.no_grad()
def test_register_tokens_are_dropped(folders: dict[str, Path]) -> None:
    image, folder = make_image(6), folders["dinov2_with_registers"]
    want = plain_registers(folder, image.rgb)
    assert relative(encode(load("dinov2", folder), image), want) <= BOUND
    assert relative(encode(load("hf", folder, licence="MIT"), image), want) <= BOUND


@torch.no_grad()
def test_hf_takes_convolutional_models(folders: dict[str, Path]) -> None:
    image, folder = make_image(6), folders["convnext"]
    teacher = load("hf", folder, licence="MIT")
    assert teacher.fingerprint.model_class == "ConvNextModel"
    assert relative(encode(teacher, image), plain_convnext(folder, image.rgb)) <= BOUND
    with pytest.raises(TeacherError, match=r"final norm is not for the 16 channels of block 1"):
        load("hf", folder, licence="MIT", taps="1")
    assert load("hf", folder, licence="MIT", taps="1", norm="none").fingerprint.shape == (8, 8, 16)
    with pytest.raises(TeacherError, match="maps of different shapes"):
        load("hf", folder, licence="MIT", taps="1,2", norm="none")


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip", "clip", "internvit"])
def test_hf_is_the_named_teacher_with_its_settings(name: str, folders: dict[str, Path]) -> None:
    named = load(name, folders[name])
    taps, norm = ("-2" if name == "clip" else "-1"), ("none" if name in ("clip", "internvit") else "final")
    generic = load("hf", folders[name], licence="MIT", taps=taps, norm=norm)
    assert generic.fingerprint.model_copy(update={"teacher": name}) == named.fingerprint
    assert torch.equal(encode(generic, make_image(1)), encode(named, make_image(1)))


@torch.no_grad()
def test_clip_tower_of_a_llava(folders: dict[str, Path], tmp_path: Path) -> None:
    vision = transformers.CLIPVisionModel.from_pretrained(folders["clip"])
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=vision.config, text_config={"model_type": "llama", "vocab_size": 8, **text}, image_token_id=7
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.save_pretrained(tmp_path)
    shutil.copy(folders["clip"] / "preprocessor_config.json", tmp_path)
    student, tower = load("clip", tmp_path), load("clip", folders["clip"])
    assert torch.equal(encode(student, make_image(1)), encode(tower, make_image(1)))
    assert student.fingerprint == tower.fingerprint  # however the file around the tower spells its names


# ---- taps, pooling, norm, size, view


def hidden(name: str, folder: Path, pixels: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    """Return the final norm and the patch tokens after every block, by transformers' own recording."""
    if name == "dinov2":
        model = transformers.Dinov2Backbone.from_pretrained(
            folder, out_indices=[1, 2, 3, 4], apply_layernorm=False, reshape_hidden_states=False
        ).eval()
        return model.layernorm, [tokens[:, 1:] for tokens in model(pixels).feature_maps]
    model = transformers.SiglipModel.from_pretrained(folder).eval().vision_model
    return model.post_layernorm, list(model(pixels, output_hidden_states=True).hidden_states[1:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_taps_pooling_and_norm(name: str, folders: dict[str, Path]) -> None:
    teacher = load(name, folders[name])
    pixels = torch.from_numpy(teacher.preprocessor(make_image(8)))[None]
    norm, blocks = hidden(name, folders[name], pixels)
    assert len(blocks) == 4
    cases: list[tuple[dict[str, Any], tuple[int, ...], str, torch.Tensor]] = [
        ({"taps": "0"}, (0,), "last", norm(blocks[0])),
        ({"taps": "0", "norm": "none"}, (0,), "last", blocks[0]),
        ({"taps": "1,-1"}, (1, 3), "mean", (norm(blocks[1]) + norm(blocks[3])) / 2),
        ({"taps": "1,2", "norm": "none"}, (1, 2), "mean", (blocks[1] + blocks[2]) / 2),
        ({"taps": "1,-1", "pooling": "last"}, (3,), "last", norm(blocks[3])),
        ({"taps": "0,2", "pooling": "concat"}, (0, 2), "concat", torch.cat((norm(blocks[0]), norm(blocks[2])), -1)),
    ]
    seen = set()
    for options, taps, pooling, want in cases:
        varied = load(name, folders[name], **options)
        assert (varied.fingerprint.taps, varied.fingerprint.pooling) == (taps, pooling)
        assert relative(encode(varied, make_image(8)), grid(want)) <= BOUND
        seen.add(varied.fingerprint.digest())
    assert len(seen) == len(cases)


def test_one_tap_has_one_fingerprint(folders: dict[str, Path]) -> None:
    default = load("dinov2", folders["dinov2"]).fingerprint
    for options in ({"taps": "3"}, {"taps": -1}, {"pooling": "last"}, {"pooling": "concat"}, {"view": "own"}):
        assert load("dinov2", folders["dinov2"], **options).fingerprint == default


@pytest.mark.parametrize("taps", ["4", "-5", "2,1", "1,1", "0,-4"])
def test_impossible_taps(taps: str, folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match=rf"(?s)taps={taps} .*4 blocks: 0 to 3"):
        load("dinov2", folders["dinov2"], taps=taps)


def test_malformed_options(folders: dict[str, Path]) -> None:
    for wrong in ({"taps": "1;2"}, {"taps": ""}, {"image_size": "big"}, {"view": "pad"}, {"grid": "0"}, {"grid": "4x"}):
        with pytest.raises(TeacherError, match="is not possible"):
            load("dinov2", folders["dinov2"], **wrong)
    with pytest.raises(TeacherError, match="no option 'taps'"):
        load("sam", folders["sam"], taps="1")


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "dinov2", "dinov3", "siglip"])
def test_another_image_size_and_view(name: str, folders: dict[str, Path]) -> None:
    image = make_image(3)
    patch = 16 if name in ("dinov3", "siglip") else 14
    side = patch * 6
    values = {"clip": CLIP, "siglip": HALF}.get(name, IMAGENET)
    resample = Image.Resampling.BILINEAR if patch == 16 else Image.Resampling.BICUBIC
    teacher = load(name, folders[name], view="squash", image_size=side)
    pixels = normalise(squash(image.rgb, side, resample), values)
    assert relative(torch.from_numpy(teacher.preprocessor(image))[None], pixels) <= 1e-6
    if name == "clip":
        model: Any = transformers.CLIPVisionModel.from_pretrained(folders[name]).eval()
        out = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2][:, 1:]
    elif name == "siglip":
        model = transformers.SiglipVisionModel.from_pretrained(folders[name]).eval()
        out = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    else:
        kind, first = {"dinov2": (transformers.Dinov2Model, 1), "dinov3": (transformers.DINOv3ViTModel, 5)}[name]
        out = kind.from_pretrained(folders[name]).eval()(pixels).last_hidden_state[:, first:]
    assert teacher.fingerprint.grid == (6, 6)
    assert relative(encode(teacher, image), grid(out)) <= BOUND
    with pytest.raises(TeacherError, match=r"not a whole number of patches|does not take images"):
        load(name, folders[name], view="squash", image_size=side + 1)


def test_views(folders: dict[str, Path]) -> None:
    image = make_image(3)
    views = {}
    for view in ("own", "squash", "crop"):
        teacher = load("dinov2", folders["dinov2"], view=view)
        record = teacher.fingerprint.preprocessing
        views[view] = (record.view.kind, record.view.fraction)
        picture = {
            "own": crop(image.rgb, 64, 56), "crop": crop(image.rgb, 56, 56),
            "squash": squash(image.rgb, 56, Image.Resampling.BICUBIC),
        }[view]  # fmt: skip
        np.testing.assert_allclose(teacher.preprocessor(image), normalise(picture, IMAGENET)[0], atol=1e-6)
    assert views == {"own": ("crop", 56 / 64), "squash": ("squash", 1.0), "crop": ("crop", 1.0)}
    larger = load("dinov2", folders["dinov2"], image_size=112).fingerprint.preprocessing
    assert larger.view.fraction == 56 / 64  # the checkpoint's own geometry, twice as large
    assert larger.steps[-3].values == {"height": 112, "width": 112}


RELOADED: list[tuple[str, dict[str, Any]]] = [
    ("dinov2", {}), ("dinov2", {"taps": "0,-1", "pooling": "concat", "norm": "none", "exif": False}),
    ("dinov2", {"image_size": 112}), ("dinov3", {"image_size": 96, "view": "crop"}), ("clip", {"view": "squash"}),
    ("clip", {"grid": "2x3", "grid_resize": "bilinear", "l2_norm": True, "channel_order": "bgr"}), ("sam", {}),
    ("siglip", {"taps": "1"}), ("internvit", {"grid": 2, "grid_resize": "area"}), ("hf", {"norm": "none"}),
    ("depth-map", {"parts": 2, "scale": "image", "position_interpolation": "scale", "exif": False}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), RELOADED)
def test_a_fingerprint_tells_the_options(name: str, options: dict[str, Any], folders: dict[str, Path]) -> None:
    first = load(name, folders[name], **options).fingerprint
    again = load(name, folders[name], **registry.available()[name].options_of(first)).fingerprint
    assert again == first


# ---- preprocessing


@pytest.mark.parametrize("name", NAMES)
def test_who_preprocesses(name: str, folders: dict[str, Path]) -> None:
    record = load(name, folders[name]).fingerprint.preprocessing
    assert record.backend == "pil"
    assert record.processor == {
        "dinov2": "BitImageProcessorPil", "dinov3": "olapipe", "siglip": "SiglipImageProcessorPil",
        "clip": "CLIPImageProcessorPil", "sam": "olapipe", "internvit": "GotOcr2ImageProcessorPil",
        "hf": "ViTImageProcessorPil", "depth-map": "DPTImageProcessorPil",
    }[name]  # fmt: skip
    bgr = load(name, folders[name], channel_order="bgr").preprocessor
    flipped = DecodedImage(Image.merge("RGB", make_image(1).rgb.split()[::-1]), 1)
    assert np.array_equal(bgr(make_image(1)), load(name, folders[name]).preprocessor(flipped))


@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip", "internvit", "hf"])
@pytest.mark.parametrize("size", [(90, 70), (33, 120), (56, 56), (5, 3)])
def test_our_steps_are_those_of_the_pil_processors(name: str, size: tuple[int, int], folders: dict[str, Path]) -> None:
    theirs: Any = load(name, folders[name]).preprocessor
    given = {name: getattr(theirs, name) for name in ("arguments", "squash", "channel_order", "exif")}
    ours = OwnPreprocessor(module="", processor="olapipe", **given)
    np.testing.assert_allclose(ours(make_image(2, size)), theirs(make_image(2, size)), rtol=1e-5, atol=1e-6)
    assert ours.record.steps == theirs.record.steps


@pytest.mark.parametrize("name", ["dinov3", "dinov2"])
def test_preprocessor_is_pickled(name: str, folders: dict[str, Path]) -> None:
    preprocessor = load(name, folders[name]).preprocessor
    before = preprocessor(make_image(1))
    again = pickle.loads(pickle.dumps(preprocessor))  # noqa: S301
    assert np.array_equal(again(make_image(1)), before)
    assert again.record == preprocessor.record


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


PROCESSORS: list[tuple[dict[str, Any], str]] = [
    ({"image_processor_type": "ConvNextImageProcessor"}, "ConvNextImageProcessorPil has steps of its own"),
    ({"do_pad": True}, "asks for do_pad, which is not supported"),
    ({"image_processor_type": "Tokenizer"}, "is for Tokenizer, which is no image processor"),
    ({"image_processor_type": "DINOv3ViTImageProcessor", "resample": None}, "leaves resample to the defaults"),
    ({"size": {"shortest_edge": 48}}, "images would differ in size"),
]


@pytest.mark.parametrize(("change", "message"), PROCESSORS)
def test_a_preprocessing_that_cannot_be_recorded_is_refused(
    change: dict[str, Any], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("hf")
    edit(folder / "preprocessor_config.json", **change)
    with pytest.raises(TeacherError, match=message) as caught:
        load("hf", folder)
    assert caught.value.remedy


# ---- arithmetic


@pytest.mark.parametrize("name", [*NAMES, *DIFFUSION])
def test_batch_one_and_batch_many_agree(name: str, folders: dict[str, Path]) -> None:
    images = [make_image(seed) for seed in range(3)]
    teacher = load(name, folders[name])
    together = encode(teacher, *images)
    for index, image in enumerate(images):
        alone = encode(teacher, image, digests=DIGESTS[index:])
        assert relative(together[index : index + 1], alone) <= BOUND
    assert relative(together[:1], together[1:2]) > 100 * BOUND


@pytest.mark.parametrize("name", [*NAMES, *DIFFUSION])
def test_bfloat16_is_close_and_comes_out_as_float32(name: str, folders: dict[str, Path]) -> None:
    exact, rounded = load(name, folders[name]), load(name, folders[name], compute_dtype="bfloat16")
    actual = encode(rounded, make_image(4))
    assert actual.dtype == torch.float32
    assert 1e-4 < relative(actual, encode(exact, make_image(4))) < 1e-1
    assert rounded.fingerprint.compute_dtype == "bfloat16"


# torch imports a deprecated part of itself when it first compiles
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_taps_agree(folders: dict[str, Path]) -> None:
    images = [make_image(seed) for seed in range(3)]
    plain, compiled = (load("clip", folders["clip"], taps="0,2", compiled=each) for each in (False, True))
    for count in (2, 3):
        assert relative(encode(compiled, *images[:count]), encode(plain, *images[:count])) <= BOUND


# ---- weights


def change(folder: Path, name: str, by: float = 0.5) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert name in tensors, sorted(tensors)
    tensors[name].view(-1)[0] += by
    save_file(tensors, path, metadata={"format": "pt"})


CHANGES = [
    ("clip", "vision_model.encoder.layers.2.mlp.fc1.bias", True),
    ("clip", "vision_model.encoder.layers.3.mlp.fc1.bias", False),  # after the tap
    ("clip", "vision_model.post_layernorm.bias", False),
    ("clip", "text_model.final_layer_norm.bias", False),
    ("dinov2", "embeddings.mask_token", False),
    ("dinov2", "layernorm.bias", True),
    ("dinov3", "layer.3.norm1.bias", True),
    ("dinov3", "embeddings.mask_token", False),
    ("siglip", "vision_model.head.layernorm.bias", False),
    ("siglip", "vision_model.post_layernorm.bias", True),
    ("internvit", "language_model.model.norm.weight", False),
    ("sam", "vision_encoder.neck.layer_norm2.bias", True),
    ("sam", "mask_decoder.iou_token.weight", False),
    ("hf", "classifier.bias", False),
    ("hf", "vit.encoder.layer.0.output.dense.bias", True),
]


@pytest.mark.parametrize(("name", "tensor", "counts"), CHANGES)
def test_digest_changes_with_a_weight_that_counts(
    name: str, tensor: str, counts: bool, folders: dict[str, Path], copy: Callable[[str], Path]
) -> None:
    folder = copy(name)
    change(folder, tensor)
    before, after = load(name, folders[name]), load(name, folder)
    assert (before.fingerprint.weights != after.fingerprint.weights) is counts
    assert torch.equal(encode(before, make_image(1)), encode(after, make_image(1))) is not counts


def test_the_final_norm_counts_only_where_it_is_applied(folders: dict[str, Path], copy: Callable[[str], Path]) -> None:
    folder = copy("dinov2")
    change(folder, "layernorm.bias")
    before, after = (load("dinov2", each, norm="none") for each in (folders["dinov2"], folder))
    assert before.fingerprint == after.fingerprint
    assert torch.equal(encode(before, make_image(1)), encode(after, make_image(1)))


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def fewer_blocks(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    inner = next((config[part] for part in ("vision_config", "backbone_config") if part in config), config)
    inner["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))


A_TENSOR = {
    "clip": "vision_model.encoder.layers.1.mlp.fc1.bias", "dinov2": "layernorm.bias", "dinov3": "norm.bias",
    "siglip": "vision_model.encoder.layers.1.mlp.fc1.bias", "sam": "vision_encoder.neck.conv1.weight",
    "internvit": "vision_tower.encoder.layer.0.lambda_1", "hf": "vit.layernorm.bias",
    "depth-map": "neck.convs.1.weight",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_unusable_checkpoint_is_one_clear_error(name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    damages: list[tuple[str, Callable[[Path], object], str]] = [
        ("tensor", remove(A_TENSOR[name]), "1 missing"),
        ("blocks", fewer_blocks, r"unexpected \(.*\.\d\.|stage4"),
        ("weights", lambda f: (f / "model.safetensors").unlink(), "no weights"),
        ("config", lambda f: (f / "config.json").unlink(), "config.json is missing"),
        ("processor", lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        ("type", lambda f: edit(f / "config.json", model_type="nonsense", vision_config=None), "'nonsense'"),
    ]
    whole = copy(name)
    for label, damage, message in damages:
        folder = Path(shutil.copytree(whole, tmp_path / label))
        damage(folder)
        with pytest.raises(TeacherError, match=message) as caught:
            load(name, folder)
        assert caught.value.problem.startswith(f"{name}: ")
        assert caught.value.remedy


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hf"])
@pytest.mark.parametrize("other", NAMES)
def test_the_checkpoint_of_another_teacher_is_refused(name: str, other: str, folders: dict[str, Path]) -> None:
    if name != other:
        with pytest.raises(TeacherError, match=r"holds a model of type .*expected"):
            load(name, folders[other])


def test_a_llava_with_another_tower_is_refused(tmp_path: Path) -> None:
    tower = {"model_type": "siglip_vision_model"}
    write_json(tmp_path / "config.json", {"model_type": "llava", "vision_config": tower})
    with pytest.raises(TeacherError, match=r"tower is of type 'siglip_vision_model', expected 'clip_vision_model'"):
        load("clip", tmp_path)


# ---- hf: licence, and models it cannot tap


def test_hf_needs_a_checkpoint_and_its_licence(copy: Callable[[str], Path]) -> None:
    with pytest.raises(TeacherError, match=r"(?s)no checkpoint of its own.*--checkpoint hf="):
        registry.load("hf", TeacherSettings())
    folder = copy("hf")
    assert load("hf", folder, licence="My Own 1.0").licence == "My Own 1.0"
    card = folder / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: odd-licence\n---\n")
    assert load("hf", folder).licence == "odd-licence"
    for text, message in (("# No head\n", "states no licence"), ("---\n: [\n---\n", "not YAML")):
        card.write_text(text)
        with pytest.raises(TeacherError, match=message):
            load("hf", folder)
    card.unlink()
    with pytest.raises(TeacherError, match=r"(?s)no README.md states its licence.*licence=NAME"):
        load("hf", folder)


def test_hf_refuses_what_it_cannot_tap(folders: dict[str, Path], tmp_path: Path) -> None:
    processor = {"image_processor_type": "ViTImageProcessor", "resample": 2, "size": square(64)} | IMAGENET
    sam = shutil.copytree(folders["sam"], tmp_path / "sam")
    write_json(sam / "preprocessor_config.json", processor)
    with pytest.raises(TeacherError, match="not known to come first"):
        load("hf", sam, licence="MIT", norm="none")
    with pytest.raises(TeacherError, match="has no final norm"):
        load("hf", sam, licence="MIT")
    config = transformers.BertConfig(**SMALL, vocab_size=32)
    bert = save(transformers.BertModel(config), tmp_path / "bert", processor)
    with pytest.raises(TeacherError, match=r"has no final norm|does not take images"):
        load("hf", bert, licence="MIT")
    with pytest.raises(TeacherError, match="does not take images"):
        load("hf", bert, licence="MIT", norm="none")


def test_no_other_teacher_imports_diffusers(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from olapipe.teachers import registry; from olapipe.teachers.base import TeacherSettings;"
        f"registry.load('dinov2', TeacherSettings({str(folders['dinov2'])!r}));"
        "print([m for m in sys.modules if m.split('.')[0] in ('diffusers', 'ray', 'olatrain')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*NAMES, *DIFFUSION])
def test_local_files_need_no_hub_and_make_no_noise(
    name: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("the test has no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for owner, method in (
        (socket.socket, "connect"), (socket.socket, "connect_ex"),
        (socket, "create_connection"), (socket, "getaddrinfo"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, method, refuse)
    encode(load(name, folders[name]), make_image(1))
    assert capfd.readouterr() == ("", "")


# ---- the depth map


def means_of(answer: np.ndarray, parts: int) -> np.ndarray:
    """(336, 336) to (24, 24, parts²), for parts that divide a patch of 14 pixels."""
    side = 14 // parts
    means = answer.reshape(24, parts, side, 24, parts, side).mean((2, 5))
    return means.transpose(0, 2, 1, 3).reshape(24, 24, parts**2)


@pytest.mark.parametrize(("parts", "scale"), [(1, "model"), (2, "model"), (2, "image")])
def test_means_of_the_depth_map(parts: int, scale: str, folders: dict[str, Path]) -> None:
    image = make_image(4)
    model = transformers.DepthAnythingForDepthEstimation.from_pretrained(folders["depth-map"]).eval()
    pixels = normalise(image.rgb.resize((336, 336), Image.Resampling.BICUBIC), IMAGENET)
    with torch.no_grad():
        answer = model(pixels).predicted_depth[0].double().numpy()
    if scale == "image":
        answer = answer - np.sort(answer.ravel())[(answer.size - 1) // 2]
        answer = answer / np.abs(answer).mean()
    teacher = load("depth-map", folders["depth-map"], parts=parts, scale=scale)
    actual = encode(teacher, image)
    assert actual.shape[1:] == teacher.fingerprint.shape == (24, 24, parts**2)
    assert relative(actual, torch.from_numpy(means_of(answer, parts)).float()[None]) <= 10 * BOUND


def test_a_map_centred_by_image_forgets_scale_and_shift() -> None:
    maps = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(centred(7 * maps + 3), centred(maps))
    assert torch.equal(centred(torch.full((1, 4, 4), 5.0)), torch.zeros(1, 4, 4))


def test_what_changes_a_depth_map_is_in_its_fingerprint(copy: Callable[[str], Path]) -> None:
    whole = copy("depth-map")
    first = load("depth-map", whole).fingerprint
    assert first.taps == (0, 1, 2, 3)
    changes: list[dict[str, Any]] = [
        {"depth_estimation_type": "metric", "max_depth": 20}, {"max_depth": 2}, {"head_in_index": 2},
    ]  # fmt: skip
    seen = {first.digest()}
    for change in changes:
        kept = (whole / "config.json").read_text()
        edit(whole / "config.json", **change)
        seen.add(load("depth-map", whole).fingerprint.digest())
        (whole / "config.json").write_text(kept)
    assert len(seen) == 1 + len(changes)
    edit(whole / "config.json", max_depth=None)  # as relative models may be written
    assert load("depth-map", whole).fingerprint == first
