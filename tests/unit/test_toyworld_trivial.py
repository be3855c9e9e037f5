"""Rules, names and regressions of the toy world, on questions whose answers follow from something known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from toyworld_support import load, on_the_path

__all__ = ["on_the_path"]

DEPTH, DISTANCE = "Which is closer ?", "Which is nearer to the {} ?"


def conversation(*asked: tuple[str, str, str], key: str = "train/000000.png", text: str = DEPTH) -> dict[str, Any]:
    turns = []
    for first, second, letter in asked:
        question = f"{text} (A) {first} (B) {second}\nAnswer with the option's letter"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": letter}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"image": key, "conversations": turns}


def row(
    first: str, second: str, letter: str, key: str = "test/000000.png", text: str = DEPTH, **rules: bool
) -> dict[str, Any]:
    return {
        "filename": key, "question": text, "choices": [first, second], "answer": f"({letter})", "rules": rules,
    }  # fmt: skip


def asked_by(answer: Callable[..., bool], numbers: range, things: int) -> list[tuple[str, str, str, str, str]]:
    """First, second, letter, key and text of a question about each picture: `answer` says whether of its things the
    first is right."""
    scenes, trivial = load("scenes"), load("trivial")
    found = []
    for number in numbers:
        scene = scenes.make_scene("train", number)
        shown = [one for one in trivial.drawn(scene.key).values() if one.shown > 0.005]
        if len(shown) < things:
            continue
        chosen = [shown[n] for n in np.random.default_rng(number).permutation(len(shown))[:things]]
        first, second, *third = (one.thing.name for one in chosen)
        text = DISTANCE.format(third[0]) if third else DEPTH
        found.append((first, second, "A" if answer(*chosen) else "B", scene.key, text))
    return found


def answered(rule: Callable[..., bool], things: int = 2) -> dict[str, float]:
    """Shares of right answers of the learnt rules, where the truth is `rule`."""
    seen = [conversation((a, b, c), key=key, text=text) for a, b, c, key, text in asked_by(rule, range(500), things)]
    rows = [row(*told) for told in asked_by(rule, range(1000, 1500), things)]
    found: dict[str, float] = load("trivial").rules(seen, rows)
    return found


def test_rules_are_shares_of_right_answers() -> None:
    rows = [row("red disc", "blue disc", "A", lower=right) for right in (True, False, True, True)]
    assert load("trivial").by_rule(rows) == {"lower": 0.75}
    assert load("trivial").by_rule([row("red disc", "blue disc", "A")]) == {}
    other = [row("left", "right", "A", text="Where is the red disc compared to the blue disc ?", lower=True)]
    seen = [conversation(("red disc", "blue cross", "A"))]
    assert load("trivial").rules(seen, other) == {"lower": 1.0}, "of another kind nothing is learnt"


def test_names_answer_where_they_tell_and_only_there() -> None:
    trivial = load("trivial")
    told = [conversation(("red disc", "blue cross", "A"), ("blue disc", "red square", "B")) for _ in range(5)]
    seen = [one for talk in told for one in trivial.of_conversation(talk)]
    assert seen[1] == trivial.Asked("train/000000.png", DEPTH, ("blue disc", "red square"), 1)
    rows = [row("red cross", "blue disc", "A"), row("blue square", "red disc", "B"), row("blue disc", "red disc", "A")]
    assert trivial.names_alone(seen, trivial.of_bench(rows)) == pytest.approx(2 / 3)
    both = conversation(("red disc", "blue disc", "A"), ("blue disc", "red disc", "B"))
    rows = [row("blue disc", "red disc", "B"), row("red cross", "blue cross", "A")]
    assert trivial.names_alone(list(trivial.of_conversation(both)) * 5, trivial.of_bench(rows)) == 1


def test_a_reading_finds_what_is_there_and_no_more() -> None:
    readout = load("readout")
    rng = np.random.default_rng(0)
    for count, wide in ((300, 8), (150, 200)):  # more columns than questions too
        x, unseen = rng.normal(size=(count, wide)), rng.normal(size=(400, wide))
        x[:, 3], unseen[:, 3] = 9 * x[:, 3], 9 * unseen[:, 3]
        found = readout.Reading(x, x[:, 3] > 0).right(unseen, unseen[:, 3] > 0)
        assert found > (0.95 if wide == 8 else 0.6)
        unknown, others = rng.random(count) > 0.5, rng.random(400) > 0.5
        assert 0.4 < readout.Reading(x, unknown).right(unseen, others) < 0.6
    assert readout.Reading(np.ones((1, 2)), np.array([True])).right(np.ones((1, 2)), np.array([True])) in (0, 1)


def test_weights_are_those_of_a_ridge_regression() -> None:
    readout = load("readout")
    rng = np.random.default_rng(1)
    for shape in ((30, 7), (7, 30)):
        x, y = rng.normal(size=shape), rng.normal(size=shape[0])
        for penalty, found in zip(readout._PENALTIES, readout._ridge(x, y).T, strict=True):
            assert found == pytest.approx(np.linalg.solve(x.T @ x + penalty * np.eye(shape[1]), x.T @ y))


def test_a_penalty_is_one_that_answers_held_out_questions() -> None:
    readout = load("readout")
    rng = np.random.default_rng(2)
    x, unseen = rng.normal(size=(100, 95)), rng.normal(size=(2000, 95))
    truth = np.ones(95)
    noisy = x @ truth + 8 * rng.normal(size=100) > 0
    found = readout.Reading(x, noisy)
    weak = readout._ridge(x, np.where(noisy, 1.0, -1.0))[:, 0]
    assert found.right(unseen, unseen @ truth > 0) > float(((unseen @ weak > 0) == (unseen @ truth > 0)).mean()) + 0.05


def test_odd_functions_change_sign_where_two_things_are_swapped() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 50, 3))
    odd = load("readout").OddFunctions(first, second)
    assert odd(first, second) == pytest.approx(-odd(second, first))
    assert np.linalg.matrix_rank(odd(first, second)) == 50


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (lambda a, b: (a[:, 0] > b[:, 0]) == (np.abs(a[:, 0] - b[:, 0]) > np.log(1.34)), 0.965),
        (lambda a, b: np.abs(a[:, 1] - 0.05) < np.abs(b[:, 1] - 0.05), 0.88),
        (lambda a, b: (a[:, 0] > b[:, 0]) == (np.abs(a[:, 1] - b[:, 1]) > 0.5), 0.8),
    ],
    ids=["larger if much, else smaller", "near a certain height", "by another's difference"],
)
def test_odd_functions_tell_rules_that_differences_do_not(rule: Callable[..., np.ndarray], least: float) -> None:
    readout = load("readout")
    rng = np.random.default_rng(0)
    first, second = 0.4 * rng.normal(size=(2, 600, 4))
    others, other_seconds = 0.4 * rng.normal(size=(2, 2000, 4))
    odd = readout.OddFunctions(first, second)
    reading = readout.Reading(odd(first, second), rule(first, second))
    truth = rule(others, other_seconds)
    assert reading.right(odd(others, other_seconds), truth) > least
    plain = readout.Reading(first - second, rule(first, second))
    assert plain.right(others - other_seconds, truth) < 0.7


def test_the_plane_answers_where_it_tells_and_only_there() -> None:
    def much_larger_or_smaller(a: Any, b: Any) -> bool:
        ratio = a.thing.size / b.thing.size
        return bool((ratio > 1) == (max(ratio, 1 / ratio) > 1.34))

    found = answered(much_larger_or_smaller)
    assert found["the picture's plane and names"] > 0.85
    assert found["names alone"] < 0.65
    found = answered(lambda a, b: bool((a.thing.x + b.thing.x) * 1e4 % 2 > 1))
    assert 0.4 < found["the picture's plane and names"] < 0.6


def test_the_plane_is_known_relative_to_the_third_thing() -> None:
    def more_alike(a: Any, b: Any, third: Any) -> bool:
        return bool(abs(np.log(a.thing.size / third.thing.size)) < abs(np.log(b.thing.size / third.thing.size)))

    def nearer(a: Any, b: Any, third: Any) -> bool:
        apart = [np.hypot(one.thing.x - third.thing.x, one.thing.foot - third.thing.foot) for one in (a, b)]
        return bool(apart[0] < apart[1])

    for rule in (more_alike, nearer):
        found = answered(rule, things=3)
        assert found.keys() == {"names alone", "the picture's plane and names"}
        assert found["the picture's plane and names"] > 0.9


def test_the_less_faded_is_closer_where_haze_tells_and_only_there() -> None:
    trivial = load("trivial")
    told = asked_by(lambda a, b: a.thing.distance < b.thing.distance, range(600), 2)
    hazy = ["haze" in trivial.scene_of(key).cues for _, _, _, key, _ in told]
    shares = [
        trivial.rules([], [row(*one) for one, has in zip(told, hazy, strict=True) if has == with_haze])
        for with_haze in (True, False)
    ]
    assert [share.keys() for share in shares] == [{"the cue itself: less faded"}] * 2
    assert shares[0]["the cue itself: less faded"] > 0.98
    assert 0.35 < shares[1]["the cue itself: less faded"] < 0.65


def test_a_thing_is_where_its_pixels_are() -> None:
    headroom, scenes = load("headroom"), load("scenes")
    scene = scenes.make_scene("test", 3)
    picture = scenes.render(scene)
    places = headroom._places(scene, picture, 36)
    for number, thing in enumerate(scene.things):
        shows = picture.segments == 2 + number
        cells = places[thing.name]
        assert cells.sum() == pytest.approx(1)
        # the middle of the cells that it covers is the middle of its pixels, to half a cell
        middle = [(np.argwhere(shows)[:, axis].mean() + 0.5) / shows.shape[axis] for axis in (0, 1)]
        found = [(cells @ (np.arange(36) // 6) + 0.5) / 6, (cells @ (np.arange(36) % 6) + 0.5) / 6]
        assert found == pytest.approx(middle, abs=1 / 12)


def test_cells_have_the_mean_colour_of_their_pixels() -> None:
    headroom, scenes = load("headroom"), load("scenes")
    picture = scenes.render(scenes.make_scene("test", 3))
    height, width = picture.rgb.shape[:2]
    means = headroom._mean_colours(picture, 36)
    assert means.shape == (36, 3)
    for cell in (0, 8, 35):
        rows = [y for y in range(height) if y * 6 // height == cell // 6]
        columns = [x for x in range(width) if x * 6 // width == cell % 6]
        assert means[cell] == pytest.approx(picture.rgb[rows][:, columns].reshape(-1, 3).mean(axis=0))


def test_by_colour_a_value_is_read_from_what_that_colour_makes_of_it() -> None:
    headroom, readout, trivial = load("headroom"), load("readout"), load("trivial")
    rng = np.random.default_rng(0)
    makes = {"red": (1.0, 0.0), "blue": (-1.0, 0.5), "white": (0.3, -0.4)}  # slope and value at distance 0
    things, asked = {}, []
    for number in range(600):
        names, near = [f"{colour} disc" for colour in rng.permutation(list(makes))[:2]], rng.random(2)
        for name, distance in zip(names, near, strict=True):
            slope, start = makes[name.split()[0]]
            things[str(number), name] = np.array([slope * distance + start, rng.normal()])
        asked.append(trivial.Asked(str(number), "Which is closer ?", tuple(names), int(near.argmin())))
    truth = trivial.firsts(asked)
    right = {}
    for differences in (headroom._differences, headroom._by_colour):
        x = differences(asked, things)
        right[differences.__name__] = readout.Reading(x[:300], truth[:300]).right(x[300:], truth[300:])
    assert right["_by_colour"] > 0.95
    assert right["_differences"] < 0.85
