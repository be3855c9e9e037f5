"""Rules, names and regressions of the toy world, on questions whose answers follow from something known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toyworld_support import load, on_the_path

__all__ = ["on_the_path"]


def conversation(*asked: tuple[str, str, str]) -> dict[str, Any]:
    turns = []
    for first, second, letter in asked:
        text = f"Which is closer ? (A) {first} (B) {second}\nAnswer with the option's letter"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": letter}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"image": "train/000000.png", "conversations": turns}


def row(first: str, second: str, letter: str, **rules: bool) -> dict[str, Any]:
    return {"choices": [first, second], "answer": f"({letter})", "rules": rules}


def test_rules_are_shares_of_right_answers() -> None:
    rows = [row("red disc", "blue disc", "A", lower=right) for right in (True, False, True, True)]
    assert load("trivial").by_rule(rows) == {"lower": 0.75}
    assert load("trivial").by_rule([row("red disc", "blue disc", "A")]) == {}


def test_names_answer_where_they_tell_and_only_there() -> None:
    trivial = load("trivial")
    told = [conversation(("red disc", "blue cross", "A"), ("blue disc", "red square", "B")) for _ in range(5)]
    rows = [row("red cross", "blue disc", "A"), row("blue square", "red disc", "B"), row("blue disc", "red disc", "A")]
    assert trivial.names_alone(told, rows, "Which is closer") == pytest.approx(2 / 3)
    assert trivial.names_alone(told, rows, "Which is nearer") is None
    assert list(trivial.asked(told[0]))[1] == ("Which is closer ?", ["blue disc", "red square"], 1)


def test_a_regression_finds_what_is_there_and_no_more() -> None:
    headroom = load("headroom")
    rng = np.random.default_rng(0)
    x, unseen = rng.normal(size=(300, 8)), rng.normal(size=(400, 8))
    assert headroom._right(x, np.sign(x[:, 3]), unseen, np.sign(unseen[:, 3])) > 0.95
    unknown, others = np.sign(rng.normal(size=300)), np.sign(rng.normal(size=400))
    assert 0.4 < headroom._right(x, unknown, unseen, others) < 0.6


def test_a_thing_is_where_its_pixels_are() -> None:
    headroom, scenes = load("headroom"), load("scenes")
    scene = scenes.make_scene("test", 3)
    picture = scenes.render(scene)
    for number, thing in enumerate(scene.things):
        shows = picture.segments == 2 + number
        found = headroom._place(scene, picture, thing.name, 36)
        assert found.cells.sum() == pytest.approx(1)
        # the middle of the cells that it covers is the middle of its pixels, to half a cell
        middle = [(np.argwhere(shows)[:, axis].mean() + 0.5) / shows.shape[axis] for axis in (0, 1)]
        cells = [(found.cells @ (np.arange(36) // 6) + 0.5) / 6, (found.cells @ (np.arange(36) % 6) + 0.5) / 6]
        assert cells == pytest.approx(middle, abs=1 / 12)
        assert found.plane == pytest.approx([thing.foot, thing.size, shows.mean()])
