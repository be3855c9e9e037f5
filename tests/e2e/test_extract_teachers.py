"""Every teacher through `olapipe extract`, read back by plain zarr."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from pipeline_support import GOLDEN, olapipe, ray_session
from plain_teachers import PLAIN, PUBLISHED, picture_bytes, plain_unet
from tiny_teachers import MAKERS, make_sd

__all__ = ["ray_session"]
DIFFUSION = ["sd-unet", "sd-vae"] if importlib.util.find_spec("diffusers") else []
TEACHERS = [*sorted(PUBLISHED), *sorted(MAKERS), *DIFFUSION]
FILES = {"a.png": picture_bytes(1), "b.png": picture_bytes(2, (64, 80))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: make(root / f"{name}-tiny") for name, make in MAKERS.items()}
    made |= {name: GOLDEN / name for name in PUBLISHED}
    return made | (dict.fromkeys(DIFFUSION, make_sd(root / "sd-tiny")) if DIFFUSION else {})


@pytest.fixture(scope="module")
def store(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> zarr.Group:
    corpus = tmp_path_factory.mktemp("corpus")
    for name, data in FILES.items():
        (corpus / name).write_bytes(data)
    out = corpus.parent / "features.zarr"
    arguments: list[object] = ["extract", corpus, "--out", out, "--precision", "float32", "--shard-size", "2"]
    for name in TEACHERS:
        arguments += ["--teacher", name, "--checkpoint", f"{name}={folders[name]}"]
        if name in DIFFUSION:
            arguments += ["--set", f"options.{name}.image_size=32"]
    done = olapipe(*arguments)
    assert done.exit_code == 0, done.output
    return zarr.open_group(out, mode="r")


@torch.no_grad()
@pytest.mark.parametrize("name", TEACHERS)
def test_stored_features_are_those_of_the_model(name: str, store: zarr.Group, folders: dict[str, Path]) -> None:
    stored = store[f"{name}/values"]
    for row, data in enumerate(FILES.values()):
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        if name == "sd-unet":
            want = plain_unet(folders[name], picture, digest=hashlib.sha256(data).hexdigest())
        else:
            want = (PUBLISHED | PLAIN)[name](folders[name], picture)
        actual = np.asarray(stored[row])
        assert actual.shape == tuple(want.shape[1:])
        assert np.linalg.norm(actual - want[0].numpy()) <= 1e-5 * float(want.norm())
    record = store[name].attrs["ola"]
    assert record["licence"]
    assert record["source"] == folders[name].name
