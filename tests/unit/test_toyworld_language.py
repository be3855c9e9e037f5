"""What is said about the toy world, held against the truth of its scenes computed here from pixels and numbers."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toyworld_support import load, on_the_path

__all__ = ["on_the_path"]


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Any, Any]]:
    scenes = load("scenes")
    made = [scenes.make_scene("haze-test", index) for index in range(500)]
    return [(scene, scenes.render(scene)) for scene in made]


@pytest.fixture(scope="module")
def asked(drawn: list[tuple[Any, Any]]) -> list[tuple[Any, Any, Any]]:
    language = load("language")
    rng, balance = np.random.default_rng(3), language.Balance()
    return [(s, p, q) for s, p in drawn for q in language.questions(s, p, rng, balance)]


def things_by_name(scene: Any, picture: Any) -> dict[str, dict[str, Any]]:
    """Of each thing what the pixels say: the distance drawn, how much shows; and where the scene puts it."""
    found = {}
    for number, thing in enumerate(scene.things):
        mask = picture.segments == 2 + number
        found[f"{thing.colour} {thing.shape}"] = {
            "distance": float(np.median(picture.distance[mask])) if mask.any() else None,
            "share": mask.sum() / mask.size,
            "x": thing.x,
            "foot": thing.foot,
            "colour": thing.colour,
            "shape": thing.shape,
        }
    return found


def test_right_answers_follow_from_pixels(asked: list[tuple[Any, Any, Any]]) -> None:
    kinds = Counter()
    for scene, picture, question in asked:
        kinds[question.kind] += 1
        world = things_by_name(scene, picture)
        right = question.choices["ABCD".index(question.letter)]
        wrong = [choice for choice in question.choices if choice != right]
        if question.kind == "depth":
            assert world[right]["distance"] * 1.35 <= world[wrong[0]]["distance"] * (1 + 1e-6)
        elif question.kind == "relation":
            subject, other = re.findall(r"the (\w+ \w+)", question.text)
            assert (right == "left") == (world[subject]["x"] < world[other]["x"])
        elif question.kind == "count":
            # what can be counted in the picture: segments that are no sky and no ground
            assert int(right) == len(set(np.unique(picture.segments)) - {0, 1})
        elif question.kind == "colour":
            shape = question.text.split()[-2]
            of_shape = [thing["colour"] for thing in world.values() if thing["shape"] == shape]
            assert of_shape == [right]
            assert wrong[0] in {thing["colour"] for thing in world.values()}
        else:
            middle = world[re.findall(r"the (\w+ \w+)", question.text)[0]]

            def place(thing: dict[str, Any]) -> tuple[float, float, float]:
                z = thing["distance"]
                return (thing["x"] - 0.5) * z, (thing["foot"] - 0.38) * z, z

            def apart(name: str, middle: dict[str, Any] = middle, world: dict[str, Any] = world) -> float:
                return sum((a - b) ** 2 for a, b in zip(place(world[name]), place(middle), strict=True)) ** 0.5

            assert apart(right) * 1.8 <= apart(wrong[0]) * (1 + 1e-5)
        for choice in question.choices:  # nothing is asked about what hardly shows
            assert choice not in world or world[choice]["share"] >= 0.005
    assert set(kinds) == {"relation", "count", "depth", "distance", "colour"}
    assert min(kinds.values()) >= 40


def test_letters_are_balanced_within_each_kind(asked: list[tuple[Any, Any, Any]]) -> None:
    letters: dict[str, Counter[str]] = defaultdict(Counter)
    choices: dict[str, set[int]] = defaultdict(set)
    for _, _, question in asked:
        letters[question.kind][question.letter] += 1
        choices[question.kind].add(len(question.choices))
    for kind, found in letters.items():
        assert choices[kind] == {4 if kind == "count" else 2}
        assert len(found) == max(choices[kind])
        assert max(found.values()) - min(found.values()) <= 1


def test_what_the_plane_of_the_picture_shows_does_not_answer_questions_of_depth(
    asked: list[tuple[Any, Any, Any]],
) -> None:
    right: Counter[str] = Counter()
    depths = [one for one in asked if one[2].kind == "depth"]
    for scene, picture, question in depths:
        world = things_by_name(scene, picture)
        for rule in ("share", "foot"):
            right[rule] += "AB"[int(np.argmax([world[name][rule] for name in question.choices]))] == question.letter
        assert dict(question.rules)["lower in the picture"] == (right["foot"] > right["before"])
        right["before"] = right["foot"]
    assert len(depths) > 300
    assert abs(right["share"] / len(depths) - 0.5) < 0.1
    assert abs(right["foot"] / len(depths) - 0.5) < 0.1
    kinds = Counter(question.kind for _, _, question in asked)
    assert max(kinds.values()) <= kinds["depth"] + 1
    per_picture = Counter((scene.key, question.kind) for scene, _, question in asked)
    assert max(per_picture.values()) == 1


def test_depth_is_asked_of_where_one_cue_is_and_not_where_the_plainest_answers() -> None:
    language, scenes = load("language"), load("scenes")
    asked = {}
    for split in ("train", "haze", "contact-test"):
        rng, balance, found = np.random.default_rng(3), language.Balance(), []
        for index in range(60):
            scene = scenes.make_scene(split, index)
            questions = language.questions(scene, scenes.render(scene), rng, balance)
            found += [question for question in questions if question.kind == "depth"]
        asked[split] = found
    assert not asked["train"]
    assert len(asked["haze"]) > 40
    assert all(dict(question.rules)["lower in the picture"] for question in asked["contact-test"])


def test_words_about_a_scene_say_what_shows_and_no_more(drawn: list[tuple[Any, Any]]) -> None:
    language = load("language")
    known = set(language.vocabulary())
    for scene, picture in drawn[:160]:
        world = {name: t for name, t in things_by_name(scene, picture).items() if t["share"] >= 0.005}
        said = language.caption(scene, picture).removesuffix(" .")
        assert [name for name in said.split(" ; ") if name] == sorted(world, key=lambda name: world[name]["x"])
        assert not re.search(r"\d|near|far|clos", said)  # a caption tells no distance
        words = language.written(scene, picture).split()
        assert set(words) <= known
        places, cells = words[::2], words[1::2]
        numbers = [int(place[3]) * 6 + int(place[1]) for place in places]
        assert numbers == sorted(set(numbers))
        assert all(re.fullmatch(r"x[0-5]y[0-5]", place) for place in places)
        shown = {tuple(word.rsplit("-", 1)) for word in cells}
        for name, thing in world.items():  # where most of a thing is, there it is named
            column = int(6 * thing["x"])
            assert any(abs(int(p[1]) - column) <= 1 for p, c in zip(places, cells, strict=True)
                       if c.rsplit("-", 1)[0] == name.replace(" ", "-"))  # fmt: skip
        entries = [entry for entry in language.columns(scene, picture).removesuffix(" .").split(" ; ") if entry]
        told = dict(entry.rsplit(" in-", 1) for entry in entries)
        assert told == {name: str(min(5, int(6 * thing["x"]))) for name, thing in world.items()}
        level = {name: min(7, int(8 * np.log(t["distance"]) / np.log(8.0))) for name, t in world.items()}
        assert shown == {(name.replace(" ", "-"), str(level[name])) for name in world}


def test_the_data_sets_hold_what_is_asked_and_share_no_scene(tmp_path: Path) -> None:
    corpus, scenes = load("corpus"), load("scenes")
    corpus.write(tmp_path, corpus.Size(captions=12, tests=60, ood=12))
    for budget in (20, 7):
        corpus.write_questions(tmp_path, budget)
    corpus.write_pictures(tmp_path, 7)

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    small, large = lines("questions-7.jsonl"), lines("questions-20.jsonl")
    count = [sum(len(row["conversations"]) for row in rows) // 2 for rows in (small, large)]
    assert count == [7, 20]
    for row, same in zip(small, large, strict=False):
        assert row["conversations"] == same["conversations"][: len(row["conversations"])]
        assert [turn["value"].count("<image>") for turn in row["conversations"][::2]] == [
            1, *[0] * (len(row["conversations"]) // 2 - 1)
        ]  # fmt: skip
    captioned = {row["image"] for row in lines("captions.jsonl")}
    trained = {row["image"] for row in large}
    tested = {row["filename"] for name in ("test_2d", "test_3d") for row in lines(f"bench/{name}.jsonl")}
    other = {row["filename"] for row in lines("bench-ood/test_3d.jsonl")}
    sets = (captioned, trained, tested, other)
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert {key.split("/")[0] for key in tested} == {"haze-test"}
    assert {key.split("/")[0] for key in other} == {"contact-test"}
    assert Counter(key.split("/")[0] for key in captioned) == {"haze": 6, "train": 6}
    named = {row["image"] for row in lines("all.jsonl")}
    assert named == captioned | {row["image"] for row in small} | tested | other
    for key in captioned | trained | tested | other:
        split, number = key.removesuffix(".png").split("/")
        drawn = np.asarray(scenes.Image.open(tmp_path / "images" / key))
        assert (drawn == scenes.render(scenes.make_scene(split, int(number))).rgb).all()


def test_another_drawing_of_the_world_shares_no_scene_and_asks_otherwise(tmp_path: Path) -> None:
    corpus, scenes = load("corpus"), load("scenes")
    keys: list[set[str]] = []
    asked: list[list[str]] = []
    for draw in (0, 1):
        out = tmp_path / str(draw)
        corpus.write(out, corpus.Size(captions=12, tests=60, ood=12), draw=draw)
        corpus.write_questions(out, 20, draw=draw)
        corpus.write_pictures(out, 20, draw=draw)
        keys.append({json.loads(line)["image"] for line in (out / "all.jsonl").read_text().splitlines()})
        lines = (out / "bench" / "test_3d.jsonl").read_text().splitlines()
        asked.append([json.loads(line)["question"] for line in lines])
    assert not keys[0] & keys[1]
    assert asked[0] != asked[1]
    assert {int(key.removesuffix(".png").split("/")[1]) // scenes.DRAW for key in keys[1]} == {1}
    things = [{scenes.make_scene(*_place(key)).things for key in own} for own in keys]
    assert not things[0] & things[1]


def _place(key: str) -> tuple[str, int]:
    split, number = key.removesuffix(".png").split("/")
    return split, int(number)


def test_the_second_experiments_captions_are_not_what_its_teacher_was_trained_on() -> None:
    fitting, scenes, evidence = load("fitting"), load("scenes"), load("evidence")
    scores = json.loads((evidence.HERE / "teachers-again" / "scores.json").read_text(encoding="utf-8"))
    draw = int(scores["depth"]["training"].rpartition("draw ")[2])
    trained = range(draw * scenes.DRAW, draw * scenes.DRAW + fitting.POOL)
    form = evidence.PLAN["forms"]["confirmation"]
    captioned = range(form["draw"] * scenes.DRAW, form["draw"] * scenes.DRAW + evidence.PLAN["size"]["captions"] // 2)
    assert draw > 0
    assert not set(trained) & set(captioned)
    batch, _ = fitting.batch_of("train", fitting.POOL - 1, 2, 8, draw=draw)
    first = scenes.render(scenes.make_scene("train", trained[0]))
    assert batch[1].segments.tolist() == fitting.nearest(first.segments, 8).astype("uint8").tolist()


def test_the_bench_is_read_as_cv_bench(tmp_path: Path) -> None:
    from olatrain.cvbench import read_questions

    corpus = load("corpus")
    corpus.write(tmp_path, corpus.Size(captions=2, tests=60, ood=1))
    found = list(read_questions(tmp_path / "bench"))
    assert {question.task for question in found} >= {"Depth", "Relation"}
    assert all(question.image.startswith(b"\x89PNG") for question in found)


def test_the_tokenizer_knows_every_word(asked: list[tuple[Any, Any, Any]]) -> None:
    language, student = load("language"), load("student")
    tokenizer = student.make_tokenizer()
    scene, picture, question = asked[0]
    text = f"USER: {language.written(scene, picture)} .\n{question.prompt}{language.SUFFIX} ASSISTANT: A</s>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("red disc red-disc-3 disc")["input_ids"] == [
        tokenizer.convert_tokens_to_ids(word) for word in ("red disc", "red-disc-3", "disc")
    ]
    assert tokenizer(language.SUFFIX.strip())["input_ids"] == [tokenizer.convert_tokens_to_ids(language.SUFFIX.strip())]


def test_varied_texts_keep_the_right_answer_and_their_hints_are_true() -> None:
    student, language = load("student"), load("language")
    scene = "x0y2 red-disc-1 x4y3 blue-cross-6 x5y3 blue-cross-6"
    right = {"depth": "red disc", "relation": "left"}
    turns = [
        ("depth", f"Scene : {scene} .\nWhich is closer ? (A) red disc (B) blue cross{language.SUFFIX}", "A"),
        ("count", f"How many things are there ? (A) 2 (B) 3 (C) 4 (D) 5{language.SUFFIX}", "A"),
        ("caption", language.DESCRIBE, "red disc ; blue cross ."),
        ("relation", f"Where is the red disc compared to the blue cross ? (A) left (B) right{language.SUFFIX}", "A"),
    ]
    rng = np.random.default_rng(3)
    seen: dict[str, set[str]] = defaultdict(set)
    for _ in range(60):
        changed = student.varied(turns, rng)
        assert changed[1:3] == turns[1:3]
        assert changed[0][1].startswith(f"Scene : {scene} .\n")
        for kind, text, answer in (changed[0], changed[3]):
            plain = re.sub(r" (at|in)-\d", "", text)
            choices = re.search(r"\(A\) (.+) \(B\) (.+)\n", plain)
            assert choices
            assert choices["AB".index(answer) + 1] == right[kind]
            question = text.split(" .\n")[-1]
            hints = re.findall(r"(red disc|blue cross) ((?:at|in)-\d)", question)
            truth = (
                {"red disc": "at-1", "blue cross": "at-6"}
                if kind == "depth"
                else {"red disc": "in-0", "blue cross": "in-4"}
            )
            assert all(truth[name] == hint for name, hint in hints)
            seen[kind].add(f"{answer}{len(hints)}")
    assert seen == {kind: {f"{letter}{count}" for letter in "AB" for count in range(3)} for kind in right}
