"""Stable Diffusion's autoencoder and U-Net: noise, parts that count, and pipelines that cannot be used."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_teachers import BOUND, DIGEST, OTHER_DIGEST, picture_bytes, plain_noise, plain_unet, relative
from safetensors.torch import load_file, save_file
from tiny_teachers import make_sd

from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.errors import TeacherError
from olaschema.images import DecodedImage, decode_image

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="the extra `diffusion` is not installed"
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sd(tmp_path_factory.mktemp("checkpoints") / "sd-tiny")


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copy the pipeline to a place where it may be damaged."""
    return lambda: Path(shutil.copytree(pipeline, tmp_path / "copy"))


def make_image(seed: int) -> DecodedImage:
    return decode_image(picture_bytes(seed), name=f"picture {seed}")


def load(name: str, folder: Path, **options: Any) -> Teacher:
    return registry.load(name, TeacherSettings(str(folder), options={"image_size": 32, **options}))


def encode(teacher: Teacher, image: DecodedImage, digest: str = DIGEST) -> torch.Tensor:
    return teacher.encode_images(torch.from_numpy(teacher.preprocessor(image))[None], [digest])


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@needs_diffusers
@torch.no_grad()
def test_unet_timestep_and_noise(pipeline: Path) -> None:
    image = make_image(7)
    default, early = load("sd-unet", pipeline), load("sd-unet", pipeline, timestep=20)
    assert default.fingerprint.options["timestep"] == 261
    assert relative(encode(early, image), plain_unet(pipeline, image.rgb, step=20)) <= BOUND
    assert early.fingerprint != default.fingerprint
    other = encode(default, image, digest=OTHER_DIGEST)
    assert relative(other, plain_unet(pipeline, image.rgb, digest=OTHER_DIGEST)) <= BOUND
    assert relative(other, encode(default, image)) > 100 * BOUND
    with pytest.raises(TeacherError, match="timestep=1000 is beyond its 1000 steps"):
        load("sd-unet", pipeline, timestep=1000)


@needs_diffusers
def test_unet_needs_one_digest_per_image(pipeline: Path) -> None:
    teacher = load("sd-unet", pipeline)
    pixels = torch.zeros(2, 3, 32, 32)
    with pytest.raises(TeacherError, match=r"(?s)none were given.*encode_images"):
        teacher.encode(pixels)
    with pytest.raises(TeacherError, match="2 images were given with 1 digests"):
        teacher.encode_images(pixels, [DIGEST])
    with pytest.raises(TeacherError, match=r"'cat\.jpg' is no SHA-256"):
        teacher.encode_images(pixels, [DIGEST, "cat.jpg"])


def test_noise_is_normal_and_pinned() -> None:
    from olapipe.teachers.diffusion_models import noise_from_digest

    noise = noise_from_digest("sd-unet", DIGEST, (4, 100, 101))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((np.abs(noise) < 1).mean() - math.erf(1 / math.sqrt(2))) < 0.01
    np.testing.assert_allclose(noise[None], plain_noise(DIGEST, (4, 100, 101)), rtol=1e-5, atol=1e-6)
    # the words of Philox themselves: this test fails if another numpy gives others
    words = np.random.Philox(key=int("ab" * 16, 16)).random_raw(2)
    assert words.tolist() == [3472172743307080021, 14871519000270313745]


@needs_diffusers
@pytest.mark.parametrize("name", ["sd-vae", "sd-unet"])
def test_sd_weights_that_count(name: str, pipeline: Path, copy: Callable[[], Path]) -> None:
    before = load(name, pipeline).fingerprint.weights
    path = "diffusion_pytorch_model.safetensors"
    cases = [("vae", path, "encoder.conv_in.bias", True), ("vae", path, "decoder.conv_in.bias", False)]
    if name == "sd-unet":
        cases += [
            ("unet", path, "mid_block.resnets.0.conv1.bias", True), ("unet", path, "conv_out.bias", False),
            ("text_encoder", "model.safetensors", "final_layer_norm.bias", True),
        ]  # fmt: skip
    for part, file, tensor, counts in cases:
        folder = copy()
        tensors = load_file(folder / part / file)
        (key,) = [key for key in tensors if key.endswith(tensor)]
        tensors[key][0] += 0.5
        save_file(tensors, folder / part / file, metadata={"format": "pt"})
        after = load(name, folder)
        assert (after.fingerprint.weights != before) is counts, tensor
        same = torch.equal(encode(after, make_image(1)), encode(load(name, pipeline), make_image(1)))
        assert same is not counts, tensor
        shutil.rmtree(folder)


@needs_diffusers
def test_old_attention_names_and_a_lone_autoencoder(pipeline: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline / "vae", tmp_path / "sd-vae-ft"))
    path = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    new, old_names = load("sd-vae", pipeline), load("sd-vae", folder)
    assert torch.equal(encode(old_names, make_image(1)), encode(new, make_image(1)))


SD_DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: edit(f / "unet" / "config.json", _class_name="SD3Transformer2DModel"), "expected UNet2DConditionModel"),
    (lambda f: edit(f / "unet" / "config.json", addition_embed_type="text", addition_embed_type_num_heads=4),
     "missing|needs more than a prompt"),
    (lambda f: edit(f / "unet" / "config.json", in_channels=9), "of another shape"),
    (lambda f: edit(f / "scheduler" / "scheduler_config.json", beta_schedule="squaredcos_cap_v2"), "squaredcos"),
    (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json is missing"),
    (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "tokenizer/ has no merges.txt"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    (lambda f: edit(f / "text_encoder" / "config.json", model_type="t5"), "'t5'.*expected 'clip_text_model'"),
]  # fmt: skip


@needs_diffusers
@pytest.mark.parametrize(("damage", "message"), SD_DAMAGES)
def test_an_unusable_pipeline(damage: Callable[[Path], object], message: str, copy: Callable[[], Path]) -> None:
    folder = copy()
    damage(folder)
    with pytest.raises(TeacherError, match=message) as caught:
        load("sd-unet", folder)
    assert caught.value.remedy


@needs_diffusers
def test_an_image_size_that_cannot_be_halved(pipeline: Path) -> None:
    with pytest.raises(TeacherError, match=r"(?s)36 × 36 cannot be halved 3 times.*multiple of 8"):
        load("sd-unet", pipeline, image_size=36)


@pytest.mark.parametrize("name", ["sd-vae", "sd-unet"])
def test_without_diffusers(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(TeacherError, match=r"(?s)needs diffusers.*ola-distill\[diffusion\]"):
        load(name, tmp_path)
