"""The teachers of the toy world's controls: mean colours of cells, and the depth teacher's answer alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toyworld_support import TOYWORLD, load, on_the_path
from transformers import DepthAnythingForDepthEstimation

from olapipe.teachers.base import TeacherSettings
from olaschema.errors import TeacherError
from olaschema.images import decode_image

__all__ = ["on_the_path"]


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOYWORLD / "targets"))
    yield load("toyworld_targets")
    sys.modules.pop("toyworld_targets")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def encoded(teacher: Any, picture: Path) -> np.ndarray:
    decoded = decode_image(picture.read_bytes(), name="a", max_pixels=10**6)
    found: np.ndarray = teacher.encode(torch.from_numpy(teacher.preprocessor(decoded))[None]).numpy()[0]
    assert found.shape == teacher.fingerprint.shape
    return found


def test_cells_are_mean_colours(targets: Any, picture: Path) -> None:
    found = encoded(targets.CELLS.load(TeacherSettings()), picture)
    colours = np.asarray(Image.open(picture)) / 255
    for row, column, part in ((0, 0, 0), (2, 5, 7), (5, 3, 12)):
        top, left = 16 * row + 4 * (part // 4), 16 * column + 4 * (part % 4)
        expected = colours[top : top + 4, left : left + 4].mean((0, 1))
        np.testing.assert_allclose(found[row, column, 3 * part : 3 * part + 3], expected, atol=1e-6)


def test_the_depth_map_is_what_the_teacher_answers(targets: Any, picture: Path) -> None:
    folder = TOYWORLD / "teachers" / "depth"
    found = encoded(targets.DEPTH_MAP.load(TeacherSettings(checkpoint=str(folder))), picture)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    colours = np.asarray(Image.open(picture)) / 255
    pixels = (colours - processor["image_mean"]) / processor["image_std"]
    model = DepthAnythingForDepthEstimation.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        answer = model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()).predicted_depth[0].numpy()
    means = answer.reshape(24, 4, 24, 4).mean((1, 3))
    np.testing.assert_allclose(found[4, 1].reshape(4, 4), means[16:20, 4:8], rtol=1e-4, atol=1e-5)
    assert found.std() > 0.01, "it answers more than one number"


def test_a_depth_map_wants_a_checkpoint(targets: Any) -> None:
    with pytest.raises(TeacherError, match="--checkpoint depthmap="):
        targets.DEPTH_MAP.load(TeacherSettings())


def test_they_are_installed_into_a_folder_of_their_own_once(tmp_path: Path) -> None:
    features = load("features")
    into = features.install(TOYWORLD / "targets", tmp_path / "targets")
    (points,) = into.glob("*.dist-info/entry_points.txt")
    assert "cells = toyworld_targets:CELLS" in points.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["targets"]
    assert not list((TOYWORLD / "targets").glob("*.egg-info"))
    before = points.stat().st_mtime_ns
    features.install(TOYWORLD / "targets", tmp_path / "targets")
    assert points.stat().st_mtime_ns == before


def test_a_teacher_that_was_never_trained_answers_unlike_things_of_unlike_pictures(
    targets: Any, tmp_path: Path
) -> None:
    load("features").write_untrained_answer(tmp_path / "untrained", 77)
    teacher = targets.DEPTH_MAP.load(TeacherSettings(checkpoint=str(tmp_path / "untrained")))
    rng = np.random.default_rng(0)
    answers = []
    for name in "ab":
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / f"{name}.png")
        answers.append(encoded(teacher, tmp_path / f"{name}.png").astype(np.float16).astype(np.float64))
    first, second = answers
    assert first.std() > 1e-3
    assert np.abs(first - second).mean() > 0.2 * first.std()
