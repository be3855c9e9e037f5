"""The toy world's experiment in miniature: an arm and a student of part (a), from pictures to answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_support import olapipe, ray_session
from toyworld_support import TOYWORLD, load, on_the_path

from olaschema.config import load_config
from olatrain.compose import compose
from olatrain.config import TrainConfig
from olatrain.learner import load_student
from olatrain.parallel import Ranks
from olatrain.setup import set_up

__all__ = ["on_the_path", "ray_session"]

BUDGET = 24
SIZE = {
    "captions": 12, "tests": 40, "ood": 20, "pretrain_steps": 2, "pretrain_batch": 4, "tune_epochs": 1, "tune_batch": 4,
    "probe_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    evidence, corpus, features = load("evidence"), load("corpus"), load("features")
    work = tmp_path_factory.mktemp("toyworld")
    world = work / "world"
    corpus.write(world, corpus.Size(*(SIZE[name] for name in ("captions", "tests", "ood"))))
    corpus.write_questions(world, BUDGET)
    corpus.write_pictures(world, BUDGET)
    corpus.write_held_out(world, 3)
    for pictures, store, teacher in (
        ("captions", "depth", "depth"),
        ("all", "all", "depth"),
        ("all", "map", "depth-map"),
    ):
        done = olapipe(
            "extract", world / f"{pictures}.jsonl", "--images", world / "images", "--out", work / f"{store}.zarr",
            "--teacher", teacher, "--checkpoint", f"{teacher}={TOYWORLD / 'teachers' / 'depth'}",
            "--set", f"options.{teacher}.grid={features.GRID}", "--set", f"options.{teacher}.grid_resize=area",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    return evidence.Workplace(work, TOYWORLD / "student", SIZE)


def test_an_arm_answers_every_question_and_is_not_run_again(workplace: Any, tmp_path: Path) -> None:
    evidence = load("evidence")
    task = evidence.Task("embedding", 0, (BUDGET,))
    rows = workplace.rows(task)
    asked = workplace.laboratory().asked(BUDGET)
    assert asked["test"]["depth"]["rules"].keys() == {
        "lower in the picture", "larger in the picture", "names alone", "the picture's plane and names",
        "the cue itself: less faded",
    }  # fmt: skip
    assert rows[0]["progress"].keys() == {"text", "depth.2", "depth.3"}
    assert rows[0]["tune_text"] > 0
    assert asked["test"]["relation"]["rules"] == {}
    assert {(row["split"], row["kind"]): len(row["right"]) for row in rows} == {
        (split, kind): len(about["images"]) for split, kinds in asked.items() for kind, about in kinds.items()
    }
    assert workplace.missing([task], tmp_path) == [task]
    evidence.append(tmp_path / evidence.RUNS, rows)
    assert workplace.missing([task], tmp_path) == []
    other = evidence.Workplace(workplace.work, workplace.student, SIZE | {"tune_lr": 0.5})
    assert other.missing([task], tmp_path) == [task], "with other settings it is another run"


def test_what_there_is_to_be_read_of_depth_is_measured(workplace: Any) -> None:
    work = workplace.work
    stores = {"the teacher's features": work / "all.zarr", "what the teacher answers": work / "map.zarr"}
    room = load("headroom").measure(work / "world", workplace.student / "vision", stores, BUDGET)
    assert room.keys() == {
        name + way
        for name in ("the student's tower", *stores, "the cells' mean colours")
        for way in ("", ", by named colour")
    }  # fmt: skip
    scored = load("trivial").of_bench(
        json.loads(line)
        for line in (work / "world" / "bench-ood" / "test_3d.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert any(one.text == "Which is closer ?" for one in scored)
    assert all(shares.keys() == {"test", "ood"} for shares in room.values())
    assert all(0 <= share <= 1 for shares in room.values() for share in shares.values())


def test_the_teacher_in_the_step_makes_what_the_store_holds(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOYWORLD.parents[1] / "benchmarks"))
    cost = load("train_step")
    options = argparse.Namespace(
        toyworld=workplace.work, root=tmp_path, way="batched", batch=4, steps=1, device="cpu", workers=0, threads=1
    )
    setting = cost.prepare_toyworld(tmp_path, options)
    (tmp_path / cost.SETTING).write_text(json.dumps(dataclasses.asdict(setting)), encoding="utf-8")
    taken = cost.measure(options)
    assert len(taken["seconds"]) == 1
    assert taken["seconds"][0] > 0
    config = load_config(TrainConfig, flags={
        **setting.common, **setting.supervised, "out": tmp_path / "other", "steps": 1, "batch": 4, "workers": 0,
        "precision": "float32", "device": "cpu",
    })  # fmt: skip
    batches, targets = cost.ways(options, set_up(config, Ranks(0, 1, torch.device("cpu"))), setting)
    batch = next(batches)
    stored, made = batch.features["depth"].values.float(), targets(batch).features["depth"].values
    assert made.shape == stored.shape
    assert float((made - stored).norm() / stored.norm()) < 2**-10
    assert float((made.flip(0) - stored).norm() / stored.norm()) > 2**-4, "images differ by more than that"


def test_some_captions_tell_distances_and_the_others_of_the_same_pictures_do_not(workplace: Any) -> None:
    world, arms = workplace.work / "world", load("arms")

    def told(lines: list[str]) -> list[bool]:
        return [" at-" in line for line in lines]

    plain, some, every = (arms.captioned(world, "captions.jsonl", told).splitlines() for told in (0, 4, 99))
    assert [json.loads(line)["image"] for line in some] == [json.loads(line)["image"] for line in plain]
    assert told(plain) == [False] * len(plain)
    assert told(every) == [True] * len(plain)
    assert told(some) == [True] * 4 + [False] * (len(plain) - 4)


def test_a_student_of_part_a_is_probed_at_each_layer_and_asked(workplace: Any, tmp_path: Path) -> None:
    evidence = load("evidence")
    tower = workplace.work / "towers" / "64-60"  # a trained one, in the place of one that would take minutes
    shutil.copytree(TOYWORLD / "student" / "vision", tower)
    scores = {"depth R² (centred)": 0.5}
    (tower / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    parts = load("student")
    world = parts.make_world(parts.LEARNT, parts.FIRST, 16, seed=1)
    torch.save([vars(world), vars(world)], tower.parent / "worlds.pt")
    task = evidence.Task("64-60-6", 0, (BUDGET,), student=True)
    (row,) = workplace.rows(task)
    assert sorted(row["probe"]) == ["1", "2", "3", "4"]
    assert all(value < 1 for value in row["probe"].values())
    assert sorted(row["depth"]) == ["0", "1", "2", "3", "4"]
    assert all(0.3 < value < 1 for value in row["depth"].values()), "read from the very scenes it was fitted on"
    assert row["tower"] == scores
    assert row["text"] > 0
    assert {"test depth", "test colour", "ood depth"} <= set(row["right"])
    evidence.append(tmp_path / evidence.STUDENTS, [row])
    assert workplace.missing([task], tmp_path) == []


def test_states_of_an_image_are_those_of_its_tokens(workplace: Any, tmp_path: Path) -> None:
    student = tmp_path / "student"
    compose(
        TOYWORLD / "student" / "llm", TOYWORLD / "student" / "vision", student, teachers=("depth",),
        tokens_per_teacher=2, view="squash", seed=0,
    )  # fmt: skip
    parts, representations = load("student"), load("representations")
    pixels = parts.make_world(parts.LEARNT, parts.FIRST, 3, seed=1).pixels
    found = representations.image_states(student, pixels)
    model = load_student(student, dtype=torch.float32)
    with torch.no_grad():
        given = model.get_image_features(pixel_values=pixels).pooler_output
    assert len(found) == 1 + model.config.text_config.num_hidden_layers
    assert [tuple(states.shape) for states in found] == [(3, 36, model.config.text_config.hidden_size)] * len(found)
    torch.testing.assert_close(found[0], torch.stack(list(given)))
    assert float((found[4] - found[0]).abs().mean()) > 0.01
