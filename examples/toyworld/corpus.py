"""The toy world as data sets: pictures, LLaVA-style conversations, and questions to score in CV-Bench's layout.

Pictures of captions, of questions to train on and of questions to be scored are different scenes: the first two of
the split `train`, the last of `test` and of `ood`, in which the apparent size tells no distance.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language
import numpy as np
from scenes import Picture, Scene, Split, make_scene, render

FIRST_CAPTIONED, FIRST_ASKED = 0, 100_000


@dataclass(frozen=True)
class Size:
    """How much of the world is drawn."""

    captions: int
    """Pictures to pretrain on."""
    tests: int
    """Scenes drawn for questions to be scored on, of all kinds; few of them allow one of depth."""
    ood: int
    """The same without the cue of size, depth questions alone."""


def write(out: Path, size: Size, *, seed: int = 0) -> None:
    """Write `images/`, `captions.jsonl`, `captions-oracle.jsonl`, `bench/` and `bench-ood/`.

    The pictures to be scored on lie in `images/` too: a student that is fed features needs some of them.
    """
    images = out / "images"
    captions, oracle = [], []
    for scene, picture in _drawn("train", FIRST_CAPTIONED, size.captions):
        if language.shown(scene, picture):
            _save(picture, images / scene.key)
            captions.append(language.caption_conversation(scene, picture))
            oracle.append(language.caption_conversation(scene, picture, distances=True))
    _write_lines(out / "captions.jsonl", captions)
    _write_lines(out / "captions-oracle.jsonl", oracle)
    _write_bench(out / "bench", "test", size.tests, language.KINDS, seed=seed + 2)
    _write_bench(out / "bench-ood", "ood", size.ood, ("depth",), seed=seed + 3)
    for bench, split in (("bench", "test"), ("bench-ood", "ood")):
        shutil.copytree(out / bench / "img" / split, images / split)


def write_questions(out: Path, budget: int, *, seed: int = 0) -> Path:
    """Write `questions-N.jsonl` of so many questions, unless it is there, and the pictures that are missing.

    A smaller set is the beginning of a larger one.
    """
    path = out / f"questions-{budget}.jsonl"
    if path.is_file():
        return path
    asked, left = [], budget
    for scene, picture, found in _questions("train", FIRST_ASKED, None, seed=seed + 1):
        if not (out / "images" / scene.key).is_file():
            _save(picture, out / "images" / scene.key)
        asked.append(language.question_conversation(scene, found[:left]))
        left -= len(found)
        if left <= 0:
            break
    _write_lines(path, asked)
    return path


def write_pictures(out: Path, budget: int) -> Path:
    """Write `all.jsonl`, which names the pictures of captions, of `budget` questions and to be scored on."""
    path = out / "all.jsonl"
    texts = [out / "captions.jsonl", write_questions(out, budget)]
    keys = [json.loads(line)["image"] for text in texts for line in text.read_text(encoding="utf-8").splitlines()]
    for split in ("test", "ood"):
        keys += [f"{split}/{found.name}" for found in sorted((out / "images" / split).iterdir())]
    _write_lines(path, [{"image": key, "conversations": []} for key in keys])
    return path


def _drawn(split: Split, first: int, count: int | None) -> Iterator[tuple[Scene, Picture]]:
    index = first
    while count is None or index < first + count:
        scene = make_scene(split, index)
        yield scene, render(scene)
        index += 1


def _questions(
    split: Split, first: int, count: int | None, *, seed: int
) -> Iterator[tuple[Scene, Picture, list[language.Question]]]:
    rng = np.random.default_rng(seed)
    balance = language.Balance()
    for scene, picture in _drawn(split, first, count):
        found = language.questions(scene, picture, rng, balance)
        if found:
            yield scene, picture, found


def _write_bench(out: Path, split: Split, count: int, kinds: Sequence[language.Kind], *, seed: int) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"2D": [], "3D": []}
    (out / "img" / split).mkdir(parents=True)
    for scene, picture, found in _questions(split, 0, count, seed=seed):
        chosen = [question for question in found if question.kind in kinds]
        if chosen:
            _save(picture, out / "img" / scene.key)
        for question in chosen:
            row = language.bench_row(scene, question)
            rows[row["type"]].append(row)
    for kind, found_rows in rows.items():
        if found_rows:
            _write_lines(out / f"test_{kind.lower()}.jsonl", found_rows)


def _save(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.image().save(path)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
