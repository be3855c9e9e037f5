"""How much a student could answer of depth questions, were it to read all that its tower, or the teacher, holds.

A ridge regression reads which of two things is closer from the difference of what is stored about the places where
they show, which a student has to find first: so it says what there is to be learnt, not what can be learnt. Weights
are fitted on the questions to train on, their penalty chosen there by cross-validation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import trivial
from scenes import Picture, Scene, Split, make_scene, render
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_PENALTIES = (1.0, 10.0, 100.0, 1000.0)
_FOLDS = 5
_QUESTION = "Which is closer ?"


@dataclass(frozen=True)
class _Asked:
    """A question of depth: `answer` is the place of the closer thing."""

    key: str
    choices: tuple[str, ...]
    answer: int


def measure(world: Path, vision: Path, store: Path, budget: int) -> dict[str, float]:
    """Return shares of right answers on the questions of depth of `bench/`, by what they are read from.

    `store` holds the teacher's features of all pictures that are asked about.
    """
    rows = [json.loads(line) for line in (world / "bench" / "test_3d.jsonl").read_text(encoding="utf-8").splitlines()]
    unseen = [
        _Asked(row["filename"], tuple(row["choices"]), "AB".index(row["answer"][1]))
        for row in rows
        if row["question"] == _QUESTION
    ]
    lines = (world / f"questions-{budget}.jsonl").read_text(encoding="utf-8").splitlines()
    seen = [
        _Asked(one["image"], tuple(choices), answer)
        for one in map(json.loads, lines)
        for text, choices, answer in trivial.asked(one)
        if text == _QUESTION
    ]
    if not seen or not unseen:
        return {}
    read = _Reader(vision, store)
    x, unseen_x = ([read(one) for one in part] for part in (seen, unseen))
    y, unseen_y = (np.array([1.0 if one.answer == 0 else -1.0 for one in part]) for part in (seen, unseen))
    return {
        name: round(
            _right(np.stack([one[name] for one in x]), y, np.stack([one[name] for one in unseen_x]), unseen_y), 4
        )
        for name in x[0]
    }


class _Reader:
    """What is known about the places of two things: first minus second."""

    def __init__(self, vision: Path, store: Path) -> None:
        tower: Any = CLIPVisionModel.from_pretrained(vision)
        self._tower = tower.eval()
        self._processor = CLIPImageProcessorPil.from_pretrained(vision)
        opened = FeatureStore.open(str(store))
        self._features = FeatureReader(opened, "depth")
        self._rows = {sample.key: sample.row for sample in opened.samples()}

    def __call__(self, asked: _Asked) -> dict[str, np.ndarray]:
        split, number = asked.key.removesuffix(".png").split("/")
        scene = make_scene(cast("Split", split), int(number))
        picture = render(scene)
        pixels = self._processor(images=picture.image(), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = self._tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        teacher = np.asarray(self._features.feature(self._rows[asked.key]), dtype=np.float64)
        known = {
            "the student's tower": states.numpy().astype(np.float64),
            "the teacher's features": teacher.reshape(-1, teacher.shape[-1]),
        }
        first, second = (_place(scene, picture, name, len(states)) for name in asked.choices)
        return {
            **{name: (first.cells - second.cells) @ values for name, values in known.items()},
            "foot, size and area": first.plane - second.plane,
        }


@dataclass(frozen=True)
class _Place:
    """Where a thing shows: `cells` (N,) its share of each cell of a square grid, sum 1; `plane` foot, size, area."""

    cells: np.ndarray
    plane: np.ndarray


def _place(scene: Scene, picture: Picture, name: str, cells: int) -> _Place:
    number = next(n for n, thing in enumerate(scene.things) if thing.name == name)
    thing, shows = scene.things[number], picture.segments == 2 + number
    side = round(cells**0.5)
    rows, columns = (np.arange(size) * side // size for size in shows.shape)
    counted = np.bincount((rows[:, None] * side + columns[None])[shows], minlength=cells).astype(np.float64)
    return _Place(counted / counted.sum(), np.array([thing.foot, thing.size, float(shows.mean())]))


def _right(x: np.ndarray, y: np.ndarray, unseen: np.ndarray, right: np.ndarray) -> float:
    """Return the share of `unseen` (M, C) whose sign is that of `right` (M,), by a regression of y (N,) on x (N, C)."""
    scale = x.std(axis=0) + 1e-9
    x, unseen = x / scale, unseen / scale
    folds = np.arange(len(x)) % _FOLDS

    def held_out(penalty: float) -> float:
        return sum(
            int(
                (
                    (x[folds == fold] @ _ridge(x[folds != fold], y[folds != fold], penalty) > 0)
                    == (y[folds == fold] > 0)
                ).sum()
            )
            for fold in range(_FOLDS)
        )

    weights = _ridge(x, y, max(_PENALTIES, key=held_out))
    return float(((unseen @ weights > 0) == (right > 0)).mean())


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    found: np.ndarray = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return found
