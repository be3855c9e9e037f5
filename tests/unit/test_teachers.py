"""Teachers against independent forward passes, and everything a checkpoint can be wrong in."""

from __future__ import annotations

import functools
import hashlib
import io
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
from PIL import Image
from plain_teachers import PUBLISHED
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.utils import logging as transformers_logging

from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.errors import ImageError, TeacherError
from olaschema.images import DecodedImage, decode_image
from olaschema.manifest import Step

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
BOUND = 1e-5
"""Stated bound, relative L2, float32 on CPU: against another implementation, and batch 1 against batch N."""


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _randomise(model: torch.nn.Module) -> None:
    """Replace zeros and ones by values that matter: a swapped or dropped tensor must show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def make_depth(folder: Path, *, blocks: int = 4, width: int = 32, heads: int = 2) -> Path:
    torch.manual_seed(1)
    backbone = Dinov2Config(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, image_size=518, patch_size=14,
        out_indices=[blocks * i // 4 for i in (1, 2, 3, 4)], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=width, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    _randomise(model)
    model.save_pretrained(folder)
    # as published: sizes for depth maps, which the target does not use
    size = {"height": 518, "width": 518}
    extra = {"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    _write_json(folder / "preprocessor_config.json", IMAGENET | extra | {"size": size, "resample": 3})
    return folder


def make_seg(folder: Path) -> Path:
    torch.manual_seed(2)
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=5, image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=swin, conv_dim=32, mask_dim=32, hidden_dim=32, num_attention_heads=2, dim_feedforward=16,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_queries=4, text_encoder_width=16,
        text_encoder_num_layers=1, text_encoder_vocab_size=32, text_encoder_context_length=8,
        text_encoder_n_ctx=4, task_seq_len=8, query_dec_layers=1,
    )  # fmt: skip
    model = OneFormerForUniversalSegmentation(config)
    _randomise(model)
    model.save_pretrained(folder)
    extra = {
        "image_processor_type": "OneFormerImageProcessor", "resample": 2, "class_info_file": "coco_panoptic.json",
        "repo_path": "shi-labs/oneformer_demo", "size": {"shortest_edge": 800, "longest_edge": 1333},
    }  # fmt: skip
    _write_json(folder / "preprocessor_config.json", IMAGENET | extra)
    return folder


def make_gen(folder: Path) -> Path:
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=224,
        patch_size=14, projection_dim=24, hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    _randomise(model)
    model.save_pretrained(folder / "image_encoder")
    # the older spelling, as in the published unCLIP repository
    extra = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", CLIP | extra)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {"depth": make_depth, "seg": make_seg, "gen": make_gen}
NAMES = sorted(MAKERS)
WEIGHTS = {"depth": "model.safetensors", "seg": "model.safetensors", "gen": "image_encoder/model.safetensors"}
CONFIG = {"depth": "config.json", "seg": "config.json", "gen": "image_encoder/config.json"}
PROCESSOR = {
    "depth": "preprocessor_config.json",
    "seg": "preprocessor_config.json",
    "gen": "feature_extractor/preprocessor_config.json",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    transformers_logging.disable_progress_bar()
    made = {name: make(root / f"{name}-tiny") for name, make in MAKERS.items()}
    transformers_logging.enable_progress_bar()
    return made


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a checkpoint to a place where it may be damaged."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / f"copy-{name}"))


def make_image(seed: int, size: tuple[int, int] = (70, 50), *, orientation: int = 1) -> DecodedImage:
    """A smooth coloured picture, different in each channel, stored as PNG with an EXIF orientation."""
    values = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", exif=exif)
    return decode_image(buffer.getvalue(), name=f"picture {seed}")


def load(name: str, folder: Path | str, preset: Any = "default", **settings: Any) -> Teacher:
    return registry.load(name, TeacherSettings(str(folder), preset=preset, **settings))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def normalise(picture: Image.Image, values: dict[str, list[float]]) -> torch.Tensor:
    pixels = (np.asarray(picture, dtype=np.float64) / 255 - values["image_mean"]) / values["image_std"]
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def encode(teacher: Teacher, *images: DecodedImage) -> torch.Tensor:
    return teacher.encode(torch.from_numpy(np.stack([teacher.preprocessor(image) for image in images])))


@pytest.mark.parametrize("name", NAMES)
def test_default_preset_equals_an_independent_forward_pass(name: str, folders: dict[str, Path]) -> None:
    image = make_image(5, orientation=6)  # stored lying on its side
    upright = image.rgb.transpose(Image.Transpose.ROTATE_270)
    teacher = load(name, folders[name])
    actual = encode(teacher, image)
    assert actual.dtype == torch.float32
    assert actual.shape == (1, *teacher.fingerprint.shape)
    transformers_logging.disable_progress_bar()
    assert relative(actual, PUBLISHED[name](folders[name], upright)) <= BOUND
    # the same pass on the picture as stored differs by far, so orientation is seen by this test
    assert relative(actual, PUBLISHED[name](folders[name], image.rgb)) > 100 * BOUND
    transformers_logging.enable_progress_bar()


@pytest.mark.parametrize("name", NAMES)
def test_ola_vlm_preset_ignores_exif_and_swaps_depth_channels(name: str, folders: dict[str, Path]) -> None:
    stored, turned = make_image(5), make_image(5, orientation=6)
    teacher = load(name, folders[name], "ola-vlm")
    assert np.array_equal(teacher.preprocessor(stored), teacher.preprocessor(turned))
    record = teacher.fingerprint.preprocessing
    assert (record.exif, record.channel_order) == (False, "bgr" if name == "depth" else "rgb")
    flipped = Image.merge("RGB", stored.rgb.split()[::-1])
    as_rgb = load(name, folders[name], "ola-vlm", options={"channel_order": "rgb"})
    as_bgr = load(name, folders[name], "ola-vlm", options={"channel_order": "bgr"})
    assert np.array_equal(as_bgr.preprocessor(stored), as_rgb.preprocessor(DecodedImage(flipped, 1)))
    assert as_rgb.fingerprint != as_bgr.fingerprint


def test_depth_options_are_in_the_fingerprint(folders: dict[str, Path]) -> None:
    default = load("depth", folders["depth"]).fingerprint
    assert (default.taps, default.pooling) == ((0, 1, 2, 3), "mean")
    assert default.options["position_interpolation"] == "size"
    last = load("depth", folders["depth"], options={"pooling": "last"}).fingerprint
    assert (last.taps, last.pooling) == ((3,), "last")
    published = load("depth", folders["depth"], "ola-vlm").fingerprint
    assert published.options["position_interpolation"] == "scale"
    assert len({f.digest() for f in (default, last, published)}) == 3
    assert default.weights == last.weights == published.weights


def test_depth_pooling_last_is_the_last_tap(folders: dict[str, Path]) -> None:
    image = make_image(9)
    transformers_logging.disable_progress_bar()
    backbone = DepthAnythingForDepthEstimation.from_pretrained(folders["depth"]).eval().backbone
    transformers_logging.enable_progress_bar()
    teacher = load("depth", folders["depth"], options={"pooling": "last"})
    pixels = torch.from_numpy(teacher.preprocessor(image))[None]
    with torch.no_grad():
        expected = backbone(pixels).feature_maps[-1][:, 1:].reshape(1, 24, 24, -1)
    assert relative(teacher.encode(pixels), expected) <= BOUND


# ---- preprocessing


def replay(steps: tuple[Step, ...], image: DecodedImage) -> np.ndarray:
    """Do what a record says, with Pillow and numpy alone."""
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    assert steps[0].name == "orient"
    picture = image.oriented(exif=bool(steps[0].values["exif"]))
    pixels = None
    for step in steps[1:]:
        given: dict[str, Any] = step.values
        if step.name == "channels":
            if given["order"] == "bgr":
                picture = Image.merge("RGB", picture.split()[::-1])
        elif step.name == "resize":
            if "height" in given:
                size = (given["width"], given["height"])
            else:
                short = min(picture.size)
                goal = given["shortest_edge"]
                size = tuple(int(goal * side / short) for side in picture.size)
                assert max(size) <= given.get("longest_edge", max(size))
            picture = picture.resize(size, filters[given["filter"]])
        elif step.name == "centre_crop":
            left, top = (picture.width - given["width"]) // 2, (picture.height - given["height"]) // 2
            picture = picture.crop((left, top, left + given["width"], top + given["height"]))
        elif step.name == "rescale":
            pixels = np.asarray(picture, dtype=np.float64) * given["factor"]
        elif step.name == "normalise":
            assert pixels is not None
            pixels = (pixels - given["mean"]) / given["std"]
        else:
            raise AssertionError(step.name)
    assert pixels is not None
    return pixels.transpose(2, 0, 1).astype(np.float32)


@pytest.mark.parametrize("preset", ["default", "ola-vlm"])
@pytest.mark.parametrize("name", NAMES)
def test_the_record_alone_reproduces_the_pixels(name: str, preset: str, folders: dict[str, Path]) -> None:
    teacher = load(name, folders[name], preset)
    record = teacher.fingerprint.preprocessing
    assert record == teacher.preprocessor.record
    assert (record.backend, record.processor[-3:]) == ("pil", "Pil")
    for image in (make_image(11, (91, 64), orientation=8), make_image(12, (3, 5)), make_image(13, (500, 1))):
        actual = teacher.preprocessor(image)
        assert actual.dtype == np.float32
        assert actual.shape == (3, *teacher.preprocessor.output_size)
        np.testing.assert_allclose(actual, replay(record.steps, image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("depth", "squash"), ("seg", "squash"), ("gen", "crop")])
def test_view(name: str, kind: str, folders: dict[str, Path]) -> None:
    view = load(name, folders[name]).fingerprint.preprocessing.view
    assert (view.kind, view.fraction) == (kind, 1.0)


def test_a_crop_smaller_than_the_resized_image_is_in_the_view(copy: Callable[[str], Path]) -> None:
    folder = copy("gen")
    config = json.loads((folder / PROCESSOR["gen"]).read_text()) | {"size": {"shortest_edge": 256}}
    _write_json(folder / PROCESSOR["gen"], config)
    assert load("gen", folder).fingerprint.preprocessing.view.fraction == 224 / 256


@pytest.mark.parametrize("name", NAMES)
def test_preprocessor_is_pickled_without_the_model(name: str, folders: dict[str, Path]) -> None:
    teacher = load(name, folders[name])
    image = make_image(3, orientation=3)
    before = teacher.preprocessor(image)  # so that whatever is built lazily has been built
    data = pickle.dumps(teacher.preprocessor)
    assert len(data) < 4000
    again = pickle.loads(data)  # noqa: S301
    assert again.record == teacher.preprocessor.record
    assert np.array_equal(again(image), before)


def test_an_image_too_elongated_to_resize_is_refused(folders: dict[str, Path]) -> None:
    preprocessor = load("gen", folders["gen"]).preprocessor
    assert preprocessor(make_image(1, (1000, 1))).shape == (3, 224, 224)
    with pytest.raises(ImageError, match="3000 × 1") as caught:
        preprocessor(make_image(1, (3000, 1)))
    assert caught.value.reason == "too-large"


# ---- arithmetic


@pytest.mark.parametrize("name", NAMES)
def test_batch_one_and_batch_many_agree(name: str, folders: dict[str, Path]) -> None:
    images = [make_image(seed) for seed in range(3)]
    teacher = load(name, folders[name])
    together = encode(teacher, *images)
    for index, image in enumerate(images):
        assert relative(together[index : index + 1], encode(teacher, image)) <= BOUND
    assert relative(together[:1], together[1:2]) > 100 * BOUND  # the images do differ


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_and_comes_out_as_float32(name: str, folders: dict[str, Path]) -> None:
    image = make_image(4)
    exact, rounded = load(name, folders[name]), load(name, folders[name], compute_dtype="bfloat16")
    actual, expected = encode(rounded, image), encode(exact, image)
    assert actual.dtype == torch.float32
    assert 1e-4 < relative(actual, expected) < 5e-2
    assert rounded.fingerprint.compute_dtype == "bfloat16"
    assert rounded.fingerprint != exact.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_compiled_forward_pass_agrees(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, but run without generating code, which takes half a minute on a CPU."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    images = [make_image(seed) for seed in range(3)]
    plain, compiled = load(name, folders[name]), load(name, folders[name], compile=True)
    for count in (2, 3, 2):
        assert relative(encode(compiled, *images[:count]), encode(plain, *images[:count])) <= BOUND
    assert len(graphs) == 1  # no graph break, and no graph of its own for another batch size


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_sdpa_and_gradients_are_off(name: str, folders: dict[str, Path]) -> None:
    teacher = load(name, folders[name])
    models = [m for m in teacher._module.modules() if hasattr(m, "config")]  # type: ignore[attr-defined]
    assert models
    assert all(model.config._attn_implementation == "sdpa" for model in models)
    assert not any(p.requires_grad for p in teacher._module.parameters())  # type: ignore[attr-defined]
    assert not encode(teacher, make_image(1)).requires_grad


def test_pixels_of_another_size_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match=r"\(1, 3, 224, 224\), expected \(batch, 3, 336, 336\)"):
        load("depth", folders["depth"]).encode(torch.zeros(1, 3, 224, 224))


def test_a_device_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match="device nonsense"):
        load("gen", folders["gen"], device="nonsense")


# ---- weights digest and source


def _digest_by_hand(folder: Path, name: str) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(folder / WEIGHTS[name]).items()):
        if name == "depth" and (not key.startswith("backbone.") or "mask_token" in key):
            continue
        if name == "seg":
            if not key.startswith("model.pixel_level_module.encoder.") or key.endswith("position_index"):
                continue
            if "swin.layernorm" in key or ("hidden_states_norms" in key and "stage4" not in key):
                continue
        digest.update(json.dumps([key, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_weights_digest_is_what_it_says(name: str, folders: dict[str, Path], copy: Callable[[str], Path]) -> None:
    original, copied = load(name, folders[name]), load(name, copy(name))
    assert original.fingerprint.weights == _digest_by_hand(folders[name], name)
    assert original.fingerprint == copied.fingerprint
    assert (original.source, copied.source) == (f"{name}-tiny", f"copy-{name}")


CHANGES = [
    ("depth", "backbone.encoder.layer.2.norm1.bias", True),
    ("depth", "head.conv1.weight", False),
    ("seg", "model.pixel_level_module.encoder.hidden_states_norms.stage4.weight", True),
    ("seg", "model.pixel_level_module.encoder.hidden_states_norms.stage1.weight", False),
    ("gen", "visual_projection.weight", True),
]


@pytest.mark.parametrize(("name", "tensor", "counts"), CHANGES)
def test_digest_changes_with_a_weight_that_counts(
    name: str, tensor: str, counts: bool, folders: dict[str, Path], copy: Callable[[str], Path]
) -> None:
    folder = copy(name)
    tensors = load_file(folder / WEIGHTS[name])
    tensors[tensor].view(-1)[0] += 0.5
    save_file(tensors, folder / WEIGHTS[name], metadata={"format": "pt"})
    before, after = load(name, folders[name]), load(name, folder)
    assert (before.fingerprint.weights != after.fingerprint.weights) is counts
    image = make_image(1)
    assert torch.equal(encode(before, image), encode(after, image)) is not counts


# ---- checkpoints that cannot be used


def _edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


BLOCK = {
    "depth": "backbone.layernorm.weight",
    "seg": "model.pixel_level_module.encoder.hidden_states_norms.stage4.bias",
    "gen": "vision_model.post_layernorm.bias",
}


def _llama(folder: Path, name: str) -> None:
    _write_json(folder / CONFIG[name], {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


DAMAGES: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "a llama": (_llama, "of type 'llama' .LlamaForCausalLM., expected"),
    "no config": (lambda f, n: (f / CONFIG[n]).unlink(), "config.json is missing; the folder holds"),
    "config is no JSON": (lambda f, n: (f / CONFIG[n]).write_text("{"), "config.json is not a JSON object"),
    "config is a list": (lambda f, n: (f / CONFIG[n]).write_text("[]"), "config.json is not a JSON object"),
    "no weights": (lambda f, n: (f / WEIGHTS[n]).unlink(), "no weights"),
    "truncated weights": (
        lambda f, n: (f / WEIGHTS[n]).write_bytes((f / WEIGHTS[n]).read_bytes()[:-100]),
        "cannot be read as weights",
    ),
    "a Git LFS pointer": (
        lambda f, n: (f / WEIGHTS[n]).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "a tensor missing": (
        lambda f, n: _edit_weights(f / WEIGHTS[n], lambda t: t.pop(BLOCK[n])),
        "tensors 1 missing .*layernorm|tensors 1 missing .*stage4",
    ),
    "a tensor of another shape": (
        lambda f, n: _edit_weights(f / WEIGHTS[n], lambda t: t.update({BLOCK[n]: torch.zeros(5)})),
        "1 of another shape",
    ),
    "no processor": (lambda f, n: (f / PROCESSOR[n]).unlink(), r"has no \S*preprocessor_config\.json"),
    "another processor": (
        lambda f, n: _edit_json(f / PROCESSOR[n], image_processor_type="BitImageProcessor"),
        "is for BitImageProcessor, expected",
    ),
    "a processor of words": (
        lambda f, n: _edit_json(f / PROCESSOR[n], image_mean="grey"), "settings are not usable"
    ),
    "a processor of one channel": (
        lambda f, n: _edit_json(f / PROCESSOR[n], image_mean=[0.5]), "need three values each"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_an_unusable_checkpoint_is_one_clear_error(name: str, damage: str, copy: Callable[[str], Path]) -> None:
    folder = copy(name)
    damaging, message = DAMAGES[damage]
    damaging(folder, name)
    with pytest.raises(TeacherError, match=message) as caught:
        load(name, folder)
    assert name in caught.value.problem
    assert folder.name in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_the_checkpoint_of_another_teacher_is_refused(name: str, other: str, folders: dict[str, Path]) -> None:
    if name != other:
        with pytest.raises(TeacherError, match=r"expected|missing"):
            load(name, folders[other])


def test_weights_with_more_blocks_than_the_config_says_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("gen")
    _edit_json(folder / CONFIG["gen"], num_hidden_layers=2)
    with pytest.raises(TeacherError, match=r"unexpected .*layers\.2\."):
        load("gen", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "differ in size"),
        ({"do_resize": False}, "do_resize is off"),
        ({"crop_size": 256}, "larger than size"),
        ({"crop_size": {"height": 224, "width": 112}}, "only a centred square"),
        ({"size": {"shortest_edge": 336}, "crop_size": 336}, "the encoder takes 224"),
    ],
)
def test_views_that_cannot_be_described_are_refused(
    change: dict[str, Any], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("gen")
    _edit_json(folder / PROCESSOR["gen"], **change)
    with pytest.raises(TeacherError, match=message):
        load("gen", folder)


def test_a_oneformer_with_another_backbone_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("seg")
    _edit_json(folder / "config.json", backbone_config={"model_type": "dinat"})
    with pytest.raises(TeacherError, match="'dinat', expected 'swin'"):
        load("seg", folder)


def test_an_index_that_leaves_the_folder_is_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("depth")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    _write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}})
    with pytest.raises(TeacherError, match="which is not in the folder"):
        load("depth", folder)


def test_sharded_and_bin_weights_load_the_same(copy: Callable[[str], Path], folders: dict[str, Path]) -> None:
    folder = copy("depth")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / part)
    index = {"weight_map": {name: part for part, own in parts.items() for name in own}}
    _write_json(folder / "model.safetensors.index.json", index)
    expected = load("depth", folders["depth"]).fingerprint
    assert load("depth", folder).fingerprint == expected
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TeacherError, match="model-00002-of-00002"):
        load("depth", folder)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load("depth", folder).fingerprint == expected


# ---- the original naming of Depth Anything V2


def to_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write the Hugging Face names back into those of `depth_anything_v2_vit*.pth`."""
    simple = {
        "embeddings.cls_token": "cls_token", "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "layernorm.weight": "norm.weight", "layernorm.bias": "norm.bias",
    }  # fmt: skip
    inner = {
        "attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "norm1": "norm1", "norm2": "norm2",
    }  # fmt: skip
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    result = {"depth_head.scratch.output_conv1.weight": torch.zeros(3)}
    result |= {f"pretrained.{new}": backbone[old] for old, new in simple.items() if old in backbone}
    for block in range(len([key for key in backbone if key.endswith("layer_scale1.lambda1")])):
        old, new = f"encoder.layer.{block}.", f"pretrained.blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [backbone[f"{old}attention.attention.{p}.{kind}"] for p in ("query", "key", "value")]
            result[f"{new}attn.qkv.{kind}"] = torch.cat(parts)
            result |= {f"{new}{b}.{kind}": backbone[f"{old}{a}.{kind}"] for a, b in inner.items()}
        for scale in (1, 2):
            result[f"{new}ls{scale}.gamma"] = backbone[f"{old}layer_scale{scale}.lambda1"]
    return result


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the block count and head width of the published ViT-S, so that no config is needed."""
    transformers_logging.disable_progress_bar()
    folder = make_depth(tmp_path_factory.mktemp("small") / "twin", blocks=12, width=128, heads=2)
    transformers_logging.enable_progress_bar()
    _edit_json(
        folder / "config.json",
        backbone_config=json.loads((folder / "config.json").read_text())["backbone_config"]
        | {"out_indices": [3, 6, 9, 12], "out_features": ["stage3", "stage6", "stage9", "stage12"]},
    )
    return folder


@pytest.mark.parametrize("preset", ["default", "ola-vlm"])
@pytest.mark.parametrize("as_file", [True, False])
def test_original_naming_is_the_same_teacher(preset: str, as_file: bool, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "original" / "depth_anything_v2_vits.pth"
    path.parent.mkdir()
    torch.save(to_original(load_file(small / "model.safetensors")), path)
    twin, original = load("depth", small, preset), load("depth", path if as_file else path.parent, preset)
    assert original.fingerprint == twin.fingerprint
    assert original.fingerprint.taps == (2, 5, 8, 11)
    assert original.source == ("depth_anything_v2_vits.pth" if as_file else "original")
    image = make_image(2)
    assert torch.equal(encode(original, image), encode(twin, image))


def test_original_naming_with_a_config_beside_it(copy: Callable[[str], Path], folders: dict[str, Path]) -> None:
    folder = copy("depth")  # 4 blocks of width 32: only its config says how it is built
    tensors = to_original(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "depth_anything_v2_vits.pth")
    assert load("depth", folder).fingerprint == load("depth", folders["depth"]).fingerprint
    (folder / "config.json").unlink()
    with pytest.raises(TeacherError, match="4 blocks of width 32"):
        load("depth", folder)


def test_unusable_original_files(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "depth_anything_v2_vitl.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(TeacherError, match=r"no tensor pretrained\.pos_embed"):
        load("depth", path)
    torch.save({"callable": Path}, path)  # a file that would import something when unpickled
    text = tmp_path / "pointer.pth"
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    for unreadable in (path, text):
        with pytest.raises(TeacherError, match="cannot be read as weights") as caught:
            load("depth", unreadable)
        assert "weights only" not in str(caught.value).lower().replace("_", " ")  # torch advises to switch it off
    text.unlink()
    tensors = to_original(load_file(small / "model.safetensors"))
    tensors.pop("pretrained.blocks.3.ls1.gamma")
    torch.save(tensors, path)
    with pytest.raises(TeacherError, match="1 missing"):
        load("depth", path)
    shutil.copy(path, tmp_path / "second.pth")
    with pytest.raises(TeacherError, match=r"several \.pth files") as caught:
        load("depth", tmp_path)
    assert caught.value.remedy.endswith(f"--checkpoint depth={path}")


# ---- no hub, no noise


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("the test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMES)
def test_local_files_need_no_hub_and_make_no_noise(
    name: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    level = transformers_logging.get_verbosity()
    encode(load(name, folders[name]), make_image(1))
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.usefixtures("no_network")
def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in NAMES:
        with pytest.raises(TeacherError, match="cannot be fetched") as caught:
            registry.load(name, TeacherSettings())
        assert registry.available()[name].published in caught.value.problem
        assert f"--checkpoint {name}=FOLDER" in caught.value.remedy
    for wrong in ("no-such-folder", "a--b/c..d", "/no/such/folder", "~no-such-user/folder"):
        with pytest.raises(TeacherError, match=r"no folder|no hub id|user who does not exist"):
            load("depth", wrong)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMES)
def test_a_hub_id_fetched_earlier_needs_no_network(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(folders[name], cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    teacher = load(name, "someone/tiny")
    assert teacher.source == "someone/tiny"
    assert teacher.fingerprint == load(name, folders[name]).fingerprint
    (cached / "snapshots" / revision / WEIGHTS[name]).unlink()  # a copy that is not complete
    with pytest.raises(TeacherError):
        load(name, "someone/tiny")


# ---- registry and options


def test_registry_imports_no_torch() -> None:
    code = (
        "import sys, olapipe.teachers.registry as r; r.available();"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_registry_lists_the_published_teachers() -> None:
    listed = {i.name: (i.published, i.licence, i.grid, i.channels) for i in registry.available().values()}
    expected = {
        "depth": ("depth-anything/Depth-Anything-V2-Large-hf", "CC-BY-NC-4.0", (24, 24), 1024),
        "seg": ("shi-labs/oneformer_coco_swin_large", "MIT", (24, 24), 1536),
        "gen": ("stabilityai/stable-diffusion-2-1-unclip", "CreativeML Open RAIL++-M", None, 1024),
    }
    assert {name: listed[name] for name in expected} == expected


def test_an_unknown_teacher_is_named_with_what_exists() -> None:
    with pytest.raises(TeacherError, match=r"(?s)no teacher 'dept'.*Did you mean 'depth'\?.*depth,.* gen,.* seg,"):
        registry.load("dept", TeacherSettings())


def test_options_are_checked(folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match=r"(?s)no option 'poolin'.*Did you mean 'pooling'"):
        load("depth", folders["depth"], options={"poolin": "last"})
    with pytest.raises(TeacherError, match=r"(?s)pooling=max is not possible.*one of: mean, last"):
        load("depth", folders["depth"], options={"pooling": "max"})
    with pytest.raises(TeacherError, match="no option 'pooling'"):
        load("gen", folders["gen"], options={"pooling": "last"})
    with pytest.raises(TeacherError, match="no preset 'olavlm'"):
        load("gen", folders["gen"], "olavlm")
    off = load("gen", folders["gen"], options={"exif": "false"})
    assert off.fingerprint.preprocessing.exif is False
