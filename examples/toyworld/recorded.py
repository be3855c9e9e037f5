"""What the files of results hold: rows by place, the questions they are about, and estimates from them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from significance import Estimate, crossed, digits

Place = tuple[str, int, str, str]
"""Arm, budget, split, kind."""


@dataclass(frozen=True)
class Results:
    """The rows in use."""

    right: dict[Place, dict[int, str]]
    """By place and seed: a digit for each question."""
    machine: dict[tuple[str, int, int], str | None]
    """By arm, budget and seed: the kind of processor that made the run, where it was kept."""
    images: dict[tuple[str, str], np.ndarray]
    """By split and kind: which picture each question is about."""
    chance: dict[tuple[str, str], float]
    rules: dict[tuple[str, str], dict[str, float]]
    """By split and kind: the share of right answers by a rule that does not look for what is asked."""
    versions: list[str]
    dates: list[str]
    left_out: int
    """Rows of other settings than the newest of their arm and budget, or about other questions than the newest."""
    stored: dict[str, dict[str, float]]
    """By store: bytes an image, and centred R² of what is read from it with float16."""
    students: list[dict[str, Any]]
    """Rows of part (a)."""
    headroom: dict[str, dict[str, float]]
    """What a regression reads of depth from the places of two things: shares by what it reads from, and by split."""
    spread: dict[str, dict[str, float]]
    """By arm: how much of its targets is about the image (`spread.measure`)."""
    ended: dict[tuple[str, int], dict[int, dict[str, float]]]
    """By arm and budget, by seed, where it was kept: what pretraining ended at (`text`, the next-token loss; `depth.2`,
    the centred R² of the depth predictions at block 2), and `tune_text`, the next-token loss of fine-tuning."""
    seconds: dict[str, list[tuple[float, float]]]
    """By arm, of its runs with the fewest questions: seconds of pretraining and of fine-tuning."""
    cost: dict[str, Any]
    """What `benchmarks/train_step.py --toyworld` measured."""
    repeated: list[bool]
    """Of rows, and of a student's kinds of question, that were made a second time from nothing: whether every question
    was answered as before."""

    def seeds(self, arms: Sequence[str], budget: int, split: str, kind: str) -> list[int]:
        """Seeds that all these arms have, made on one kind of machine: answers follow the features' last bits."""
        found = [set(self.right.get((arm, budget, split, kind), {})) for arm in arms]
        return sorted(
            seed
            for seed in set.intersection(*found)
            if len({self.machine.get((arm, budget, seed)) for arm in arms}) == 1
        )

    def values(self, arm: str, budget: int, split: str, kind: str, seeds: Sequence[int]) -> np.ndarray:
        """(S, Q) of 0 and 1."""
        return digits([self.right[arm, budget, split, kind][seed] for seed in seeds])

    def accuracy(self, arm: str, budget: int, split: str, kind: str) -> Estimate | None:
        """Estimate an arm's accuracy over all its seeds."""
        seeds = self.seeds([arm], budget, split, kind)
        if not seeds:
            return None
        return crossed(self.values(arm, budget, split, kind, seeds), self.images[split, kind])

    def difference(
        self, arm: str, other: str, budget: int, split: str, kind: str, *, seeds: Sequence[int] | None = None
    ) -> Estimate | None:
        """Estimate the paired difference of two arms over the seeds that both have; None with fewer than two.

        `seeds` are those that count, of these.
        """
        both = self.seeds([arm, other], budget, split, kind)
        seeds = both if seeds is None else [seed for seed in both if seed in seeds]
        if len(seeds) < 2:
            return None
        apart = self.values(arm, budget, split, kind, seeds) - self.values(other, budget, split, kind, seeds)
        return crossed(apart, self.images[split, kind])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def record(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def load(folder: Path, *, seeds: Sequence[int] | None = None) -> Results:
    """Read rows (of `seeds` alone, if given) and questions; of an arm and budget the settings of the last row count."""
    rows = [row for row in _rows(folder / "runs.jsonl") if seeds is None or row["seed"] in seeds]
    asked = record(folder / "questions.json")
    newest = {(row["arm"], row["budget"]): row["config"] for row in rows}
    bench = rows[-1]["bench"] if rows else None
    used = [row for row in rows if newest[row["arm"], row["budget"]] == row["config"] and row["bench"] == bench]
    right: dict[Place, dict[int, str]] = defaultdict(dict)
    for row in used:
        right[row["arm"], row["budget"], row["split"], row["kind"]][row["seed"]] = row["right"]
    students = {(row["width"], row["tower_steps"], row["told"]): row for row in _rows(folder / "students.jsonl")}
    return Results(
        right=dict(right),
        machine={(row["arm"], row["budget"], row["seed"]): row.get("machine") for row in used},
        images={(s, k): np.asarray(v["images"]) for s, kinds in asked.items() for k, v in kinds.items()},
        chance={(s, k): v["chance"] for s, kinds in asked.items() for k, v in kinds.items()},
        rules={(s, k): v["rules"] for s, kinds in asked.items() for k, v in kinds.items()},
        versions=sorted({", ".join(f"{n} {v}" for n, v in row["versions"].items()) for row in used}),
        dates=sorted({row["date"] for row in used}),
        left_out=len(rows) - len(used),
        stored=record(folder / "stores.json"),
        headroom=record(folder / "headroom.json"),
        spread=record(folder / "spread.json"),
        cost=record(folder / "cost.json"),
        seconds=_seconds(used),
        ended=_ended(used),
        students=[row for row in students.values() if bench is None or row["bench"] == bench],
        repeated=list(_repeated(_rows(folder / "repeated.jsonl"), right, newest, students)),
    )


def _repeated(
    rows: Sequence[Mapping[str, Any]],
    right: Mapping[Place, Mapping[int, str]],
    newest: Mapping[tuple[str, int], str],
    students: Mapping[tuple[int, int, int], Mapping[str, Any]],
) -> Iterator[bool]:
    for row in rows:
        if "arm" not in row:
            before = students.get((row["width"], row["tower_steps"], row["told"]))
            if before is not None and before["config"] == row["config"]:
                yield from (before["right"][place] == digits for place, digits in row["right"].items())
        elif newest.get((row["arm"], row["budget"])) == row["config"]:
            yield right[row["arm"], row["budget"], row["split"], row["kind"]].get(row["seed"]) == row["right"]


def _ended(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[int, dict[str, float]]]:
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        if "progress" in row:
            tuned = {"tune_text": row["tune_text"]} if "tune_text" in row else {}
            found[row["arm"], row["budget"]][row["seed"]] = row["progress"] | tuned
    return dict(found)


def _seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    fewest = min((row["budget"] for row in rows), default=0)
    runs = {
        (row["arm"], row["seed"]): (row["pretrain_seconds"], row["tune_seconds"])
        for row in rows
        if row["budget"] == fewest
    }
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (arm, _), took in runs.items():
        found[arm].append(took)
    return dict(found)


def best_probe(row: Mapping[str, Any]) -> float:
    """Return the centred R² of a student's best layer."""
    return float(max(row["probe"].values()))


def best_depth(row: Mapping[str, Any]) -> float:
    """Return the centred R² of depth as a ridge reads it from a student's best layer."""
    return float(max(row["depth"].values()))


def share(text: str) -> float:
    """Return the share of right answers of a row's digits."""
    return text.count("1") / len(text)


def order(place: tuple[str, str]) -> tuple[bool, str]:
    """Return what columns of (split, kind) are sorted by."""
    return place[0] != "test", place[1]


def title(place: tuple[str, str]) -> str:
    """Name a column of (split, kind)."""
    split, kind = place
    return kind if split == "test" else f"{kind} ({split})"
