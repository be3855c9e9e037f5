"""What is said about the toy world: captions, questions with exact answers, scenes written out as words.

Everything follows from a scene and its picture. Five kinds of question, named as in CV-Bench where it has them:

- `relation`: is one thing left or right of another?
- `count`: how many things are there?
- `depth`: which of two things is closer to the camera?
- `distance`: which of two things is nearer to a third, in space?
- `colour`: what colour is the thing of that shape? A negative control: no depth is needed to answer.

Every question offers choices by letter. Which letter is right is balanced within a kind (`Balance`), so that whoever
always says the same is right once in as many times as there are choices. Things that hardly show are not spoken of.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scenes import COLOURS, FAR, NEAR, SHAPES, Picture, Scene, Thing

Kind = Literal["relation", "count", "depth", "distance", "colour"]

KINDS: tuple[Kind, ...] = ("relation", "count", "depth", "distance", "colour")
LETTERS = "ABCD"
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
"""Follows each question, as in CV-Bench."""
DESCRIBE = "Describe the image."
DESCRIBE_DEPTH = "Describe the image with distances."
DESCRIBE_COLUMN = "Describe the image with columns."
LEVELS = 8
"""Words for distances: `at-0` is the nearest eighth of the log distance, `at-7` the farthest."""
CELLS = 6
"""A scene is written out in as many rows and columns."""
COUNTS = (2, 3, 4, 5)

_SEEN = 0.005
"""Least share of the picture that a thing must show to be spoken of."""
_HORIZON = 0.38
_APART = 0.18
"""Two things are left and right of each other if their middles are so many widths of the picture apart."""
_CLOSER = 1.35
"""Least ratio of two distances that are asked about."""
_NEARER = 1.8
"""The same of two distances to a third thing."""


@dataclass(frozen=True)
class Question:
    """A question with its choices; `answer` is the place of the right one."""

    kind: Kind
    text: str
    choices: tuple[str, ...]
    answer: int
    rules: tuple[tuple[str, bool], ...] = ()
    """What can be told from the picture's plane alone, by name, and whether it leads to the right choice."""

    @property
    def prompt(self) -> str:
        """The question and its choices by letter, without the suffix."""
        listed = " ".join(f"({LETTERS[place]}) {choice}" for place, choice in enumerate(self.choices))
        return f"{self.text} {listed}"

    @property
    def letter(self) -> str:
        """The right choice's letter."""
        return LETTERS[self.answer]


class Balance:
    """Keeps right letters even within a kind: says where the right choice goes, or that a question is one too many.

    No other kind is asked more often than depth.
    """

    def __init__(self, *, slack: int = 1) -> None:
        self._slack = slack
        self._seen: dict[Kind, Counter[int]] = {kind: Counter() for kind in KINDS}

    def place(self, kind: Kind, choices: int) -> int:
        """Return the letter that was right least often so far."""
        return min(range(choices), key=lambda place: self._seen[kind][place])

    def admits(self, question: Question) -> bool:
        """Whether its like is not ahead of the others by more than the slack; if so it is counted."""
        seen = self._seen[question.kind]
        if question.kind != "depth" and seen.total() - self._seen["depth"].total() >= self._slack:
            return False
        if seen[question.answer] - min(seen[place] for place in range(len(question.choices))) >= self._slack:
            return False
        seen[question.answer] += 1
        return True


def level(distance: float) -> int:
    """Return which word of `LEVELS` a distance in metres has."""
    share = math.log(distance / NEAR) / math.log(FAR / NEAR)
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def position(thing: Thing) -> np.ndarray:
    """Return where a thing stands in space, in metres: to the right, down from the horizon, away from the camera.

    The camera's picture is one metre wide and high at a distance of one metre.
    """
    return thing.distance * np.array([thing.x - 0.5, thing.foot - _HORIZON, 1.0])


def shown(scene: Scene, picture: Picture) -> list[Thing]:
    """Return the things that show enough to be spoken of, from far to near."""
    return [
        thing for number, thing in enumerate(scene.things) if float((picture.segments == 2 + number).mean()) >= _SEEN
    ]


def caption(scene: Scene, picture: Picture, *, distances: bool = False) -> str:
    """Name what shows, from left to right; with `distances` each with the word for its distance."""
    things = sorted(shown(scene, picture), key=lambda thing: thing.x)
    return " ; ".join(f"{t.name} at-{level(t.distance)}" if distances else t.name for t in things) + " ."


def columns(scene: Scene, picture: Picture) -> str:
    """Name what shows, from left to right, each with the word for the column of cells that its middle stands in."""
    things = sorted(shown(scene, picture), key=lambda thing: thing.x)
    return " ; ".join(f"{t.name} in-{min(CELLS - 1, max(0, int(t.x * CELLS)))}" for t in things) + " ."


def written(scene: Scene, picture: Picture) -> str:
    """Write a scene out in `CELLS` × `CELLS` cells, row by row: of each that holds a thing its place, and the thing.

    A place is its column and row, `x0y0` the first; a thing is its name with the word for its distance. A cell holds
    the thing that covers most of it if that is two fifths of the cell or more; each thing that shows has at least the
    cell that it covers most.
    """
    height, width = picture.segments.shape
    rows = (np.arange(height) * CELLS // height)[:, None]
    columns = (np.arange(width) * CELLS // width)[None, :]
    cells = (rows * CELLS + columns).ravel()
    kinds = 2 + len(scene.things)
    counted = np.bincount(cells * kinds + picture.segments.ravel(), minlength=CELLS * CELLS * kinds)
    cover = counted.reshape(CELLS * CELLS, kinds).astype(np.float64)
    cover /= cover.sum(axis=1, keepdims=True)
    names = np.full(CELLS * CELLS, -1)
    things = cover[:, 2:]
    if things.shape[1]:
        names = np.where(things.max(axis=1) >= 0.4, things.argmax(axis=1), -1)
    visible = shown(scene, picture)
    order = sorted(range(len(scene.things)), key=lambda n: float(things[:, n].sum()))
    taken: set[int] = set()
    for number in order:  # those that show least choose first
        if scene.things[number] in visible:
            best = next(cell for cell in np.argsort(-things[:, number], kind="stable") if int(cell) not in taken)
            taken.add(int(best))
            names[best] = number
    found = [(cell, scene.things[int(name)]) for cell, name in enumerate(names) if name >= 0]
    return " ".join(
        f"{place(cell % CELLS, cell // CELLS)} {thing.colour}-{thing.shape}-{level(thing.distance)}"
        for cell, thing in found
        if thing in visible
    )


def place(column: int, row: int) -> str:
    """Return the word for a cell's place."""
    return f"x{column}y{row}"


def parts(word: str) -> tuple[str, ...]:
    """Return what a word is made of: `red-cross-3` of `red`, `cross` and `at-3`, `x1y2` of `x1` and `y2`."""
    first, *others = word.replace(" ", "-").split("-")
    if first in COLOURS and others:
        return (first, others[0], *(f"at-{number}" for number in others[1:]))
    found = re.fullmatch(r"(x\d+)(y\d+)", word)
    return found.groups() if found else (word,)


def vocabulary() -> list[str]:
    """Return every word that scenes, captions and questions are written with."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    cells = [f"{colour}-{shape}-{n}" for colour in COLOURS for shape in SHAPES for n in range(LEVELS)]
    sentences = [
        "Where is the compared to the ? left right", "How many things are there ?", "Which is closer ?",
        "Which is nearer to the ?", "What colour is the ?", DESCRIBE, DESCRIBE_DEPTH, DESCRIBE_COLUMN,
        "Scene : ( ) ; .", "USER ASSISTANT", *(f"({letter})" for letter in LETTERS), *LETTERS, *map(str, COUNTS),
    ]  # fmt: skip
    loose = [word for text in sentences for word in text.replace(".", " . ").split()]
    distances = [*(f"at-{n}" for n in range(LEVELS)), *(f"in-{n}" for n in range(CELLS))]
    places = [place(column, row) for row in range(CELLS) for column in range(CELLS)]
    whole = [SUFFIX.strip(), *names, *cells, *places, *distances, *COLOURS, *SHAPES, *loose]
    return list(dict.fromkeys(whole))


def questions(scene: Scene, picture: Picture, rng: np.random.Generator, balance: Balance) -> list[Question]:
    """Ask what a scene allows, at most one question of each kind, in random order."""
    things = shown(scene, picture)
    asked: list[Question] = []
    pairs = [(a, b) for n, a in enumerate(things) for b in things[n + 1 :]]
    rng.shuffle(pairs)
    makers: list[Iterator[Question]] = [
        _relations(pairs, balance), _counts(scene, things), _depths(scene, pairs, balance),
        _colours(scene, things, rng, balance), _distances(things, rng, balance),
    ]  # fmt: skip
    for maker in makers:
        admitted = next((question for question in maker if balance.admits(question)), None)
        if admitted is not None:
            asked.append(admitted)
    order = rng.permutation(len(asked))
    return [asked[int(place)] for place in order]


def _relations(pairs: Sequence[tuple[Thing, Thing]], balance: Balance) -> Iterator[Question]:
    for a, b in pairs:
        if abs(a.x - b.x) < _APART:
            continue
        place = balance.place("relation", 2)
        left, right = (a, b) if a.x < b.x else (b, a)
        subject, other = (left, right) if place == 0 else (right, left)
        text = f"Where is the {subject.name} compared to the {other.name} ?"
        yield Question("relation", text, ("left", "right"), place)


def _counts(scene: Scene, things: Sequence[Thing]) -> Iterator[Question]:
    # a thing that hardly shows might be counted or not: only scenes without one are asked about
    if len(things) == len(scene.things) and len(things) in COUNTS:
        yield Question("count", "How many things are there ?", tuple(map(str, COUNTS)), COUNTS.index(len(things)))


def _depths(scene: Scene, pairs: Sequence[tuple[Thing, Thing]], balance: Balance) -> Iterator[Question]:
    if len(scene.cues) != 1:
        return  # with several, the plainest answers: what is larger, or what stands lower
    for a, b in pairs:
        near, far = (a, b) if a.distance < b.distance else (b, a)
        if far.distance < _CLOSER * near.distance or level(far.distance) == level(near.distance):
            continue
        place = balance.place("depth", 2)
        rules = (("lower in the picture", near.foot > far.foot), ("larger in the picture", near.size > far.size))
        yield Question("depth", "Which is closer ?", _placed(near.name, far.name, place), place, rules)


def _distances(things: Sequence[Thing], rng: np.random.Generator, balance: Balance) -> Iterator[Question]:
    for number in rng.permutation(len(things)):
        middle = things[int(number)]
        others = [thing for thing in things if thing is not middle]
        rng.shuffle(others)
        for a, b in zip(others[::2], others[1::2], strict=False):
            apart = [float(np.linalg.norm(position(thing) - position(middle))) for thing in (a, b)]
            near, far = (a, b) if apart[0] < apart[1] else (b, a)
            if max(apart) < _NEARER * min(apart):
                continue
            place = balance.place("distance", 2)
            text = f"Which is nearer to the {middle.name} ?"
            flat = [math.hypot(thing.x - middle.x, thing.foot - middle.foot) for thing in (near, far)]
            rules = (("nearer in the picture", flat[0] < flat[1]),)
            yield Question("distance", text, _placed(near.name, far.name, place), place, rules)


def _colours(scene: Scene, things: Sequence[Thing], rng: np.random.Generator, balance: Balance) -> Iterator[Question]:
    shapes = Counter(thing.shape for thing in scene.things)  # a thing that hardly shows makes it ambiguous too
    for number in rng.permutation(len(things)):
        thing = things[int(number)]
        others = sorted({other.colour for other in things} - {thing.colour})
        if shapes[thing.shape] != 1 or not others:
            continue
        # the wrong colour is in the picture too: seeing colours alone does not tell
        wrong = others[int(rng.integers(len(others)))]
        place = balance.place("colour", 2)
        yield Question("colour", f"What colour is the {thing.shape} ?", _placed(thing.colour, wrong, place), place)


def _placed(right: str, wrong: str, place: int) -> tuple[str, str]:
    return (right, wrong) if place == 0 else (wrong, right)


def caption_conversation(scene: Scene, picture: Picture, *, distances: bool = False) -> dict[str, Any]:
    """Return a LLaVA-style conversation that names what shows, and then says in which column."""
    return {
        "id": scene.key,
        "image": scene.key,
        "conversations": [
            {"from": "human", "value": f"<image>\n{DESCRIBE_DEPTH if distances else DESCRIBE}"},
            {"from": "gpt", "value": caption(scene, picture, distances=distances)},
            {"from": "human", "value": DESCRIBE_COLUMN},
            {"from": "gpt", "value": columns(scene, picture)},
        ],
    }


def column_conversation(scene: Scene, picture: Picture) -> dict[str, Any]:
    """Return a conversation that says what stands in which column, and nothing else."""
    turns = [
        {"from": "human", "value": f"<image>\n{DESCRIBE_COLUMN}"},
        {"from": "gpt", "value": columns(scene, picture)},
    ]
    return {"id": scene.key, "image": scene.key, "conversations": turns}


def question_conversation(scene: Scene, asked: Sequence[Question]) -> dict[str, Any]:
    """Return a LLaVA-style conversation of questions about one picture; the picture comes with the first."""
    turns: list[dict[str, str]] = []
    for number, question in enumerate(asked):
        mark = "" if number else "<image>\n"
        turns.append({"from": "human", "value": f"{mark}{question.prompt}{SUFFIX}"})
        turns.append({"from": "gpt", "value": question.letter})
    return {"id": scene.key, "image": scene.key, "conversations": turns}


_TASKS: dict[Kind, tuple[str, str, str]] = {
    "relation": ("2D", "Relation", "ADE20K"),
    "count": ("2D", "Count", "ADE20K"),
    "colour": ("2D", "Colour", "COCO"),
    "depth": ("3D", "Depth", "Omni3D"),
    "distance": ("3D", "Distance", "Omni3D"),
}


def bench_row(scene: Scene, question: Question) -> dict[str, Any]:
    """Return a question as a line of CV-Bench's `test.jsonl`, its picture under `img/`.

    CV-Bench knows three sources; the kinds that it lacks, and ours, stand under the names of these.
    """
    kind, task, source = _TASKS[question.kind]
    return {
        "type": kind, "task": task, "source": source, "filename": scene.key, "question": question.text,
        "choices": list(question.choices), "answer": f"({question.letter})", "prompt": question.prompt,
        "rules": dict(question.rules),
    }  # fmt: skip
