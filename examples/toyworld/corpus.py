"""The toy world as data sets: pictures, LLaVA-style conversations, and questions to score in CV-Bench's layout.

Pictures of captions, of questions to train on and of questions to be scored are different scenes, and so are those
whose next-token loss is compared between students. Captions are of the splits `haze` and `train`, half and half, so
that the teacher's features of pictures with every cue are among the targets; questions to train on are of `haze`,
those to be scored of `haze-test` (here `test`) and of `contact-test` (here `ood`), a cue that no question to train on
was about.
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
from scenes import DRAW, Picture, Scene, Split, make_scene, render

FIRST_CAPTIONED, FIRST_SCORED, FIRST_ASKED, FIRST_HELD_OUT = 0, 50_000, 100_000, 150_000
"""Scenes of a drawing. The first of the splits that are scored are those that settings were chosen by."""
CAPTIONED: tuple[Split, Split] = ("haze", "train")
ASKED: Split = "haze"
SCORED: tuple[Split, Split] = ("haze-test", "contact-test")


@dataclass(frozen=True)
class Size:
    """How much of the world is drawn."""

    captions: int
    """Pictures to pretrain on."""
    tests: int
    """Scenes drawn for questions to be scored on, of all kinds."""
    ood: int
    """The same with contact as the only cue, depth questions alone."""


def write(out: Path, size: Size, *, draw: int = 0) -> None:
    """Write `images/`, `captions.jsonl`, `captions-oracle.jsonl`, `bench/` and `bench-ood/`.

    Another `draw` is the same world in other scenes, with other questions about them.
    The pictures to be scored on lie in `images/` too: a student that is fed features needs some of them.
    """
    images = out / "images"
    captions, oracle = [], []
    first = FIRST_CAPTIONED + draw * DRAW
    for pair in zip(*(_drawn(split, first, size.captions // 2) for split in CAPTIONED), strict=True):
        for scene, picture in pair:  # the two kinds in turns: the first so many captions hold as many of both
            if language.shown(scene, picture):
                _save(picture, images / scene.key)
                captions.append(language.caption_conversation(scene, picture))
                oracle.append(language.caption_conversation(scene, picture, distances=True))
    _write_lines(out / "captions.jsonl", captions)
    _write_lines(out / "captions-oracle.jsonl", oracle)
    _write_bench(out / "bench", SCORED[0], size.tests, language.KINDS, number=2, draw=draw)
    _write_bench(out / "bench-ood", SCORED[1], size.ood, ("depth",), number=3, draw=draw)
    for bench, split in zip(("bench", "bench-ood"), SCORED, strict=True):
        shutil.copytree(out / bench / "img" / split, images / split)


def write_questions(out: Path, budget: int, *, draw: int = 0) -> Path:
    """Write `questions-N.jsonl` of so many questions, unless it is there, and the pictures that are missing.

    A smaller set is the beginning of a larger one.
    """
    path = out / f"questions-{budget}.jsonl"
    if path.is_file():
        return path
    asked, left = [], budget
    for scene, picture, found in _questions(ASKED, FIRST_ASKED, None, number=1, draw=draw):
        if not (out / "images" / scene.key).is_file():
            _save(picture, out / "images" / scene.key)
        asked.append(language.question_conversation(scene, found[:left]))
        left -= len(found)
        if left <= 0:
            break
    _write_lines(path, asked)
    return path


def write_held_out(out: Path, count: int, *, draw: int = 0) -> Path:
    """Write `held-out.jsonl` about so many other pictures, what stands in which column, unless it is there."""
    path = out / "held-out.jsonl"
    if not path.is_file():
        found = []
        for scene, picture in _drawn(ASKED, FIRST_HELD_OUT + draw * DRAW, count):
            if language.shown(scene, picture):
                _save(picture, out / "images" / scene.key)
                found.append(language.column_conversation(scene, picture))
        _write_lines(path, found)
    return path


def write_pictures(out: Path, budget: int, *, draw: int = 0) -> Path:
    """Write `all.jsonl`, which names the pictures of captions, of `budget` questions and to be scored on."""
    path = out / "all.jsonl"
    texts = [out / "captions.jsonl", write_questions(out, budget, draw=draw)]
    keys = [json.loads(line)["image"] for text in texts for line in text.read_text(encoding="utf-8").splitlines()]
    for split in SCORED:
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
    split: Split, first: int, count: int | None, *, number: int, draw: int
) -> Iterator[tuple[Scene, Picture, list[language.Question]]]:
    rng = np.random.default_rng(number + 100 * draw)
    balance = language.Balance()
    for scene, picture in _drawn(split, first + draw * DRAW, count):
        found = language.questions(scene, picture, rng, balance)
        if found:
            yield scene, picture, found


def _write_bench(
    out: Path, split: Split, count: int, kinds: Sequence[language.Kind], *, number: int, draw: int
) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"2D": [], "3D": []}
    (out / "img" / split).mkdir(parents=True)
    for scene, picture, found in _questions(split, FIRST_SCORED, count, number=number, draw=draw):
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
