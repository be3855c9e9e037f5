"""How much a student could answer of depth questions, were it to read all that its tower, or a teacher, holds.

A ridge regression reads which of two things is closer from what is stored about the places where they show, the first
minus the second. A student has to find these first: so it says what there is to be learnt, not what can be learnt.
Weights are fitted on the questions to train on. Read `by named colour` they are others for each colour that is asked
about: how much a colour has faded shows only to who knows what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trivial
from readout import Reading
from scenes import COLOURS, Picture, Scene, render
from transformers import CLIPImageProcessorPil, CLIPVisionModel
from trivial import Asked, firsts

from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

TOWER, COLOURS_SEEN = "the student's tower", "the cells' mean colours"
BY_COLOUR = "{}, by named colour"
_BENCHES = {"test": "bench", "ood": "bench-ood"}
_BATCH = 128

_Things = dict[tuple[str, str], np.ndarray]
"""By picture and name of a thing."""


def measure(world: Path, vision: Path, stores: Mapping[str, Path], budget: int) -> dict[str, dict[str, float]]:
    """Return shares of right answers on questions of depth, by what they are read from and by split.

    `stores` hold, under the name that is told, one teacher's features of all pictures that are asked about. Beside
    them and the tower stand the mean colours of a map's cells, which nobody had to learn. A split without such
    questions is left out; where there are none to train on, nothing is returned.
    """
    seen = [
        one for line in _lines(world / f"questions-{budget}.jsonl")
        for one in trivial.of_conversation(line) if _is_depth(one)
    ]  # fmt: skip
    benches = {
        split: [one for one in trivial.of_bench(_lines(world / folder / "test_3d.jsonl")) if _is_depth(one)]
        for split, folder in _BENCHES.items()
    }
    benches = {split: asked for split, asked in benches.items() if asked}
    if not seen or not benches:
        return {}
    pictures = sorted({one.key for asked in (seen, *benches.values()) for one in asked})
    found: dict[str, dict[str, float]] = {}
    for name, things in _read(pictures, vision, stores).items():
        for title, differences in ((name, _differences), (BY_COLOUR.format(name), _by_colour)):
            reading = Reading(differences(seen, things), firsts(seen))
            found[title] = {
                split: round(reading.right(differences(asked, things), firsts(asked)), 4)
                for split, asked in benches.items()
            }
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _is_depth(one: Asked) -> bool:
    return one.text.startswith(trivial.CLOSER)


def _read(keys: Sequence[str], vision: Path, stores: Mapping[str, Path]) -> dict[str, _Things]:
    """Return what tower, teachers and pixels hold at the places of the pictures' things."""
    found: dict[str, _Things] = {name: {} for name in (TOWER, *stores, COLOURS_SEEN)}
    opened = {name: FeatureStore.open(str(store)) for name, store in stores.items()}
    readers = {name: FeatureReader(store, *store.teachers()) for name, store in opened.items()}
    rows = {name: {sample.key: sample.row for sample in store.samples()} for name, store in opened.items()}
    tower: Any = CLIPVisionModel.from_pretrained(vision)
    tower.eval()
    processor = CLIPImageProcessorPil.from_pretrained(vision)
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        scenes = [trivial.scene_of(key) for key in batch]
        pictures = [render(scene) for scene in scenes]
        pixels = processor(images=[picture.image() for picture in pictures], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        for key, scene, picture, own in zip(batch, scenes, pictures, states.double().numpy(), strict=True):
            known = {TOWER: own, COLOURS_SEEN: _mean_colours(picture, len(own))}
            for name, reader in readers.items():
                stored = np.asarray(reader.feature(rows[name][key]), dtype=np.float64)
                known[name] = stored.reshape(-1, stored.shape[-1])
            for name, values in known.items():
                for thing, cells in _places(scene, picture, len(values)).items():
                    found[name][key, thing] = cells @ values
    return found


def _cells(picture: Picture, cells: int) -> np.ndarray:
    """(H, W): which cell of a square grid each pixel lies in."""
    side = round(cells**0.5)
    rows, columns = (np.arange(size) * side // size for size in picture.segments.shape)
    found: np.ndarray = rows[:, None] * side + columns
    return found


def _mean_colours(picture: Picture, cells: int) -> np.ndarray:
    """(N, 3): of each cell of a square grid."""
    where = _cells(picture, cells).ravel()
    sums = np.stack([np.bincount(where, picture.rgb[..., c].ravel(), cells) for c in range(3)], axis=1)
    means: np.ndarray = sums / np.bincount(where, minlength=cells)[:, None]
    return means


def _places(scene: Scene, picture: Picture, cells: int) -> dict[str, np.ndarray]:
    """Return where things show, by their names: (N,) the share of each cell of a square grid, sum 1."""
    kinds = 2 + len(scene.things)
    where = _cells(picture, cells) * kinds + picture.segments
    counted = np.bincount(where.ravel(), minlength=cells * kinds).reshape(cells, kinds)[:, 2:].T
    return {thing.name: own / own.sum() for thing, own in zip(scene.things, counted, strict=True) if own.any()}


def _differences(questions: Sequence[Asked], things: _Things) -> np.ndarray:
    """(N, C): what is known of the first choice minus what is known of the second."""
    first, second = (np.stack([things[one.key, one.choices[place]] for one in questions]) for place in (0, 1))
    difference: np.ndarray = first - second
    return difference


def _by_colour(questions: Sequence[Asked], things: _Things) -> np.ndarray:
    """(N, colours × (C + 1)): the same, of each colour apart, with what it is where all else is 0."""
    colours = list(COLOURS)
    width = len(next(iter(things.values()))) + 1
    found = np.zeros((len(questions), len(colours), width))
    for row, one in enumerate(questions):
        for sign, name in zip((1, -1), one.choices, strict=True):
            found[row, colours.index(name.split()[0])] += sign * np.append(things[one.key, name], 1.0)
    return found.reshape(len(questions), -1)
