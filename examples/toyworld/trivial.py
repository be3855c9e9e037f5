"""How far one gets without depth: rules about the picture's plane, names alone, both together, and colours that fade.

What has to be learnt is learnt from the questions to train on. What is known of things is the truth about the picture's
plane, which a student would have to see first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from language import LETTERS
from readout import OddFunctions, Reading
from scenes import COLOURS, HAZE, SHAPES, Picture, Scene, Split, Thing, make_scene, render

NAMES = "names alone"
PLANE = "the picture's plane and names"
FADED = "the cue itself: less faded"
CLOSER = "Which is closer"
NEARER = "Which is nearer to the "
_WORDS = [*COLOURS, *SHAPES]


@dataclass(frozen=True)
class Asked:
    """A question about a picture; `answer` is the place of the right choice."""

    key: str
    text: str
    choices: tuple[str, ...]
    answer: int


def rules(conversations: Iterable[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return shares of right answers over a bench's `rows`, which are questions of one kind, by rule.

    Those that the rows tell of; where one of two things is asked for by its distance, names, and the plane with names,
    as learnt from the `conversations` to train on; and in questions of depth which thing is less faded.
    """
    found = by_rule(rows)
    unseen = of_bench(rows)
    begins = next((text for text in (CLOSER, NEARER) if unseen and unseen[0].text.startswith(text)), None)
    if begins is None:
        return found
    if seen := [one for talk in conversations for one in of_conversation(talk) if one.text.startswith(begins)]:
        found |= {NAMES: names_alone(seen, unseen), PLANE: plane_and_names(seen, unseen)}
    return found | ({FADED: less_faded(unseen)} if begins == CLOSER else {})


def by_rule(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return each rule's share of right answers over a bench's questions of one kind; none where they have no rule."""
    told: dict[str, list[bool]] = {}
    for row in rows:
        for name, right in row["rules"].items():
            told.setdefault(name, []).append(right)
    return {name: float(np.mean(found)) for name, found in told.items()}


def names_alone(seen: Sequence[Asked], unseen: Sequence[Asked]) -> float:
    """Return the share of right answers to `unseen` from the names of two things, as learnt from `seen`."""
    return Reading(_names(seen), firsts(seen)).right(_names(unseen), firsts(unseen))


def plane_and_names(seen: Sequence[Asked], unseen: Sequence[Asked]) -> float:
    """Return the share of right answers to `unseen` from what the picture's plane and names tell, learnt from `seen`.

    Of a thing it is known where its foot stands, its size, the share of the picture that it shows, and its name; where
    it is asked what is nearer to a third, how far it is from that in the plane, and how much it differs in size.
    """
    known = _plane(seen)
    odd = OddFunctions(*known)
    reading = Reading(np.hstack([odd(*known), _names(seen)]), firsts(seen))
    return reading.right(np.hstack([odd(*_plane(unseen)), _names(unseen)]), firsts(unseen))


def less_faded(unseen: Sequence[Asked]) -> float:
    """Return the share of right answers of who says that the less faded of two things is closer, and learns nothing."""
    veils = np.array([[drawn(one.key)[name].veil for name in one.choices] for one in unseen])
    return float(((veils[:, 0] < veils[:, 1]) == firsts(unseen)).mean())


def of_conversation(conversation: Mapping[str, Any]) -> Iterator[Asked]:
    """Yield the questions of a conversation."""
    turns = conversation["conversations"]
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        prompt = question["value"].removeprefix("<image>\n").splitlines()[0]
        text, *choices = re.split(r"\s*\([A-D]\) ", prompt)
        yield Asked(conversation["image"], text, tuple(choices), LETTERS.index(answer["value"]))


def of_bench(rows: Iterable[Mapping[str, Any]]) -> list[Asked]:
    """Return the questions of a bench's rows."""
    return [
        Asked(row["filename"], row["question"], tuple(row["choices"]), LETTERS.index(row["answer"][1])) for row in rows
    ]


def firsts(questions: Iterable[Asked]) -> np.ndarray:
    """(N,) bool: whether the first choice is right."""
    return np.array([one.answer == 0 for one in questions])


@dataclass(frozen=True)
class Drawn:
    """A thing as its picture shows it: `shown` is its share of the picture, `veil` that of haze in its colour."""

    thing: Thing
    shown: float
    veil: float


def scene_of(key: str) -> Scene:
    """Return the scene that a picture shows, by its key."""
    split, _, number = key.removesuffix(".png").rpartition("/")
    return make_scene(cast("Split", split), int(number))


@cache
def drawn(key: str) -> dict[str, Drawn]:
    """Return the things of a picture by their names."""
    scene = scene_of(key)
    return as_drawn(scene, render(scene))


def as_drawn(scene: Scene, picture: Picture) -> dict[str, Drawn]:
    """Return the things of a picture by their names; those that another hides are left out."""
    found = {}
    for number, thing in enumerate(scene.things):
        shows = picture.segments == 2 + number
        if shows.any():
            colour = picture.rgb[shows].mean(axis=0)
            found[thing.name] = Drawn(thing, float(shows.mean()), _veil(colour, thing.colour))
    return found


def _veil(colour: np.ndarray, name: str) -> float:
    """Return how much haze a colour (3,) has: it is a sum of haze and of the named colour, which shade may darken."""
    parts = np.stack([np.array(COLOURS[name], dtype=np.float64), HAZE], axis=1)
    return float(np.linalg.lstsq(parts, colour, rcond=None)[0][1])


def _plane(questions: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """(N, Q) each: what is known of the first and of the second choice without depth or colours."""
    both = [[_known(one, name) for name in one.choices] for one in questions]
    first, second = np.array(both).transpose(1, 0, 2)
    return first, second


def _known(one: Asked, name: str) -> list[float]:
    found = _numbers(drawn(one.key)[name])
    if one.text.startswith(NEARER):
        third = drawn(one.key)[one.text.removeprefix(NEARER).removesuffix(" ?")]
        apart = np.abs(np.array(found) - _numbers(third))
        found += [*apart, float(np.hypot(apart[0], apart[3]))]
    return found


def _numbers(one: Drawn) -> list[float]:
    return [one.thing.foot, float(np.log(one.thing.size)), float(np.log(one.shown)), one.thing.x]


def _names(questions: Sequence[Asked]) -> np.ndarray:
    """(N, 10): which colour and shape the first choice has, minus those of the second."""
    found = np.zeros((len(questions), len(_WORDS)))
    for row, one in enumerate(questions):
        for sign, choice in zip((1, -1), one.choices, strict=True):
            for word in choice.split():
                found[row, _WORDS.index(word)] += sign
    return found
