"""CV-Bench (Tong et al., Cambrian-1, arXiv 2406.16860): its questions from a local copy, and its scores.

The published layout: `test*.parquet` with the images inside, or `test*.jsonl` with `img/`. The benchmark's score is
½ · [½ · (ADE20K + COCO) + Omni3D], each the accuracy over the questions of that source: sources are averaged within
2D and within 3D, and the two then. A copy with other sources is averaged in the same way, and the result says so.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olaschema.errors import CorpusError, ImageError
from olaschema.files import read_regular
from olaschema.keys import normalise_key

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
"""Follows the prompt, as in the benchmark's own evaluation."""
SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}
"""The published ones, by type."""
_FIELDS = ("type", "task", "question", "choices", "answer", "prompt", "source")
_REMEDY = "Give a folder that holds CV-Bench as published: test_2d.parquet, test_3d.parquet, or test_*.jsonl and img/."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One question with one image."""

    name: str
    """File and place in it, for messages and results."""
    kind: str
    """`2D` or `3D`."""
    task: str
    source: str
    """The data set that its image is of."""
    prompt: str
    """Question and choices, as published."""
    choices: tuple[str, ...]
    answer: str
    """The right choice's letter."""
    image: bytes


def read_questions(folder: Path) -> Iterator[Question]:
    """Yield every question, file by file; raises CorpusError naming file and place of what is not as published."""
    tables, lists = sorted(folder.glob("test*.parquet")), sorted(folder.glob("test*.jsonl"))
    if not tables and not lists:
        raise CorpusError(f"{folder} holds no test*.parquet and no test*.jsonl", _REMEDY)
    # both forms hold the same questions
    for path in tables or lists:
        rows = _parquet(path) if tables else _jsonl(path)
        for place, row in enumerate(rows):
            yield _question(row, f"{path.name}:{place}", folder)


def parse_letter(text: str, choices: Sequence[str]) -> str | None:
    """Read the chosen letter from an answer: `(A)`, `A`, `A.`, `A: …`, `The answer is (B).`, or a choice's own words.

    None where the answer names no choice, or more than one.
    """
    letters = _LETTERS[: len(choices)]
    stripped = text.strip()
    found = re.match(rf"\(?([{letters}])(?:[).:,]|$)", stripped)
    if found:
        # `(A) 2 (B) 3` and `A or B` repeat the choices, they do not choose
        rest = re.findall(rf"\(([{letters}])\)|(?:^|[\s,])([{letters}])(?:[).:,]|$)", stripped[found.end() :])
        others = {one or other for one, other in rest} - {found[1]}
        return None if others else str(found[1])
    marked = set(re.findall(rf"\(([{letters}])\)", stripped))
    if not marked:  # a small letter that stands alone, or `answer is a lamp` would be one
        small = f"[{letters.lower()}](?=[).:,]|$)"
        named = rf"(?i:(?:answer|option|choice)(?: is)?:? +)([{letters}]\b|{small})"
        marked = {letter.upper() for letter in re.findall(named, stripped)}
    if len(marked) == 1:
        return str(marked.pop())
    spoken = [letter for letter, choice in zip(letters, choices, strict=True) if _says(stripped, choice)]
    return spoken[0] if len(spoken) == 1 and not marked else None


def _says(text: str, choice: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, flags=re.IGNORECASE) is not None


@dataclass(frozen=True)
class Answer:
    """What became of a question."""

    question: Question
    said: str
    """What was generated, or the letter of the likeliest choice."""
    chosen: str | None

    @property
    def right(self) -> bool:
        """Whether the right letter was chosen; no letter is wrong."""
        return self.chosen == self.question.answer


def score(answers: Sequence[Answer], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Accuracies with 95 % bootstrap intervals, beside chance (1 / choices, averaged the same way).

    `overall`, `2D`, `3D`, `averaged`, `sources` and `tasks`. 2D and 3D average the sources that their questions are of,
    `averaged` names these, overall averages 2D and 3D and is None without one of them. Questions are drawn anew within
    their source (within their task for a task's interval), percentiles 2.5 and 97.5.
    """
    rng = np.random.default_rng(seed)
    by_source: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        by_source.setdefault((answer.question.kind, answer.question.source), []).append(answer)
    groups = {place: _Group(by_source[place], resamples, rng) for place in sorted(by_source)}
    kinds = Counter(source for _, source in groups)
    tasks = {}
    for name in sorted({a.question.task for a in answers}):
        tasks[name] = _Group([a for a in answers if a.question.task == name], resamples, rng)
    two, three = (_average([group for (kind, _), group in groups.items() if kind == wanted]) for wanted in SOURCES)
    overall = _average([two, three]) if two and three else None
    return {
        "questions": len(answers),
        "unreadable": sum(answer.chosen is None for answer in answers),
        "overall": overall.report() if overall else None,
        "2D": two.report() if two else None,
        "3D": three.report() if three else None,
        "averaged": {wanted: [source for kind, source in groups if kind == wanted] for wanted in SOURCES},
        "sources": {
            source if kinds[source] == 1 else f"{source} {kind}": g.report() for (kind, source), g in groups.items()
        },
        "tasks": {name: group.report() for name, group in tasks.items()},
    }


class _Group:
    """Right answers of some questions, their chance level, and draws of the accuracy."""

    def __init__(self, answers: Sequence[Answer], resamples: int, rng: np.random.Generator) -> None:
        right = np.asarray([answer.right for answer in answers], dtype=np.float64)
        self.count = len(right)
        self.accuracy = float(right.mean()) if self.count else float("nan")
        self.chance = float(np.mean([1 / len(a.question.choices) for a in answers])) if self.count else float("nan")
        # of n draws with replacement from k right ones, the number right is binomial
        drawn = rng.binomial(self.count, self.accuracy if self.count else 0.0, resamples)
        self.draws: np.ndarray = drawn / max(self.count, 1)

    def report(self) -> dict[str, Any]:
        interval = [float(bound) for bound in np.percentile(self.draws, [2.5, 97.5])]
        return {"accuracy": self.accuracy, "interval": interval, "chance": self.chance, "questions": self.count}


def _average(groups: Sequence[_Group]) -> _Group | None:
    if not groups:
        return None
    made = _Group((), 0, np.random.default_rng(0))
    made.count = sum(group.count for group in groups)
    made.accuracy = float(np.mean([group.accuracy for group in groups]))
    made.chance = float(np.mean([group.chance for group in groups]))
    made.draws = np.mean([group.draws for group in groups], axis=0)
    return made


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise CorpusError(f"{path} cannot be read: {error}", _REMEDY) from error


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read: {error}", _REMEDY) from error


def _question(row: Mapping[str, Any], name: str, folder: Path) -> Question:
    missing = [field for field in _FIELDS if not isinstance(row, Mapping) or row.get(field) is None]
    if missing:
        raise CorpusError(f"{folder.name}/{name} has no {', '.join(missing)}", _REMEDY)
    if not isinstance(row["choices"], list):
        raise CorpusError(f"{folder.name}/{name}: its choices are no list but {row['choices']!r}", _REMEDY)
    choices = tuple(str(choice) for choice in row["choices"])
    answer = str(row["answer"]).strip().strip("()").upper()
    if not 2 <= len(choices) <= len(_LETTERS) or answer not in _LETTERS[: len(choices)] or len(answer) != 1:
        raise CorpusError(f"{folder.name}/{name}: {len(choices)} choices and the answer {row['answer']!r}", _REMEDY)
    if row["type"] not in SOURCES:
        raise CorpusError(f"{folder.name}/{name}: type {row['type']!r} is none of {', '.join(SOURCES)}", _REMEDY)
    image = row.get("image")
    data = image.get("bytes") if isinstance(image, Mapping) else None
    if not isinstance(data, bytes):  # JSON can hold none
        data = _file(row, name, folder)
    return Question(
        name, str(row["type"]), str(row["task"]), str(row["source"]), str(row["prompt"]), choices, answer, data
    )


def _file(row: Mapping[str, Any], name: str, folder: Path) -> bytes:
    try:
        return read_regular(folder / "img" / normalise_key(str(row.get("filename") or "")))
    except ImageError as error:
        raise CorpusError(f"{folder.name}/{name}: its image cannot be read: {error.problem}", _REMEDY) from error
