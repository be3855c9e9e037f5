"""How far one gets without looking for what is asked: rules about the picture's plane, and names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from language import LETTERS
from scenes import COLOURS, SHAPES

NAMES = "names alone"
_WORDS = [*COLOURS, *SHAPES]
_RIDGE = 1.0


def by_rule(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return each rule's share of right answers over a bench's questions of one kind; none where they have no rule."""
    told: dict[str, list[bool]] = {}
    for row in rows:
        for name, right in row["rules"].items():
            told.setdefault(name, []).append(right)
    return {name: float(np.mean(found)) for name, found in told.items()}


def names_alone(
    conversations: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], text: str
) -> float | None:
    """Return the share of right answers from the names of two things, by least squares over questions to train on.

    `text` is how the question begins, in the conversations and in the bench's `rows`. None where there are none.
    """
    learnt = [found for one in conversations for found in asked(one) if found[0].startswith(text)]
    if not learnt or not rows:
        return None
    x = np.stack([_names(choices) for _, choices, _ in learnt])
    y = np.array([1.0 if answer == 0 else -1.0 for _, _, answer in learnt])
    weights = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y)
    guessed = [float(_names(row["choices"]) @ weights) > 0 for row in rows]
    return float(np.mean([guess == (row["answer"] == "(A)") for guess, row in zip(guessed, rows, strict=True)]))


def asked(conversation: Mapping[str, Any]) -> Iterator[tuple[str, list[str], int]]:
    """Yield the questions of a conversation: text, choices, place of the right one."""
    turns = conversation["conversations"]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt = question["value"].removeprefix("<image>\n").splitlines()[0]
        choices = re.split(r"\s*\([A-D]\) ", prompt)
        yield choices[0], choices[1:], LETTERS.index(answer["value"])


def _names(choices: Sequence[str]) -> np.ndarray:
    """(10,): which colour and shape the first choice has, minus those of the second."""
    found = np.zeros(len(_WORDS))
    for sign, choice in zip((1, -1), choices, strict=True):
        for word in choice.split():
            found[_WORDS.index(word)] += sign
    return found
