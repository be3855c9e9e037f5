"""The page of the toy world's results, from rows whose outcome is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from toyworld_support import load, on_the_path

__all__ = ["on_the_path"]

QUESTIONS = 120
SHARES = {"none": 0.5, "tokens": 0.5, "shuffled": 0.5, "random": 0.55, "embedding": 0.8, "int8": 0.8, "layers-1": 0.6}


def digits(share: float, rng: np.random.Generator) -> str:
    return "".join(str(int(value)) for value in rng.random(QUESTIONS) < share)


def write_rows(folder: Path, shares: dict[str, float], *, seeds: int = 10) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "arm": arm, "seed": seed, "budget": 3000, "split": split, "kind": "depth", "right": digits(share, rng),
            "config": "same", "bench": "these", "pretrain_seconds": 20.0, "tune_seconds": 30.0,
            "versions": {"torch": "2"}, "date": "2026-11-29",
        }
        for arm, share in shares.items() for seed in range(seeds) for split in ("test", "ood")
    ]  # fmt: skip
    images = [f"{n // 2}.png" for n in range(QUESTIONS)]
    asked = {"depth": {"images": images, "chance": 0.5, "rules": {"names alone": 0.612}}}
    folder.mkdir(exist_ok=True)
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "questions.json").write_text(json.dumps({"test": asked, "ood": asked}))


def _asked_with_colours(folder: Path) -> dict[str, Any]:
    asked: dict[str, Any] = json.loads((folder / "questions.json").read_text())
    asked["test"]["colour"] = asked["test"]["depth"] | {"rules": {}}
    return asked


def page(results: Path, out: Path) -> str:
    load("report").write(results, out / "results.md")
    return (out / "results.md").read_text(encoding="utf-8")


def test_the_verdict_follows_from_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "good", SHARES)
    text = page(tmp_path / "good", tmp_path)
    assert "**Success** as it was fixed" in text
    assert "| `random` | +" in text
    assert (tmp_path / "images" / "results.png").is_file()
    write_rows(tmp_path / "worse", {**SHARES, "embedding": 0.2})
    assert "**No success**: the embedding losses are worse than" in page(tmp_path / "worse", tmp_path)
    write_rows(tmp_path / "equal", {**SHARES, "embedding": 0.5})
    assert "**No success**: the interval against `tokens`" in page(tmp_path / "equal", tmp_path)
    write_rows(tmp_path / "few", SHARES, seeds=9)
    text = page(tmp_path / "few", tmp_path)
    assert "**No verdict yet**: it takes 10 paired seeds of all arms, and there are 9." in text
    assert "| rule: names alone | | 61.2 | 61.2 |" in text


def test_it_is_said_whether_an_effect_could_be_seen_and_what_is_missing(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", {**SHARES, "oracle": 0.9}, seeds=4)
    text = page(tmp_path / "results", tmp_path)
    part = text.split("## Could it see an effect?")[1].split("##")[0]
    (row,) = [line for line in part.splitlines() if line.startswith("| `oracle` |")]
    assert row.split(" | ")[1] == "4"
    assert float(row.split(" | ")[3]) > 20
    assert float(row.split(" | ")[5].strip(" |")) < 0.001
    assert "| `feed` | 0 | | | | |" in part
    assert "`feed` 5" in text.split("## What was fixed")[0]
    assert "`oracle` 1" in text.split("## What was fixed")[0]


def test_rows_about_other_questions_are_not_paired(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES)
    path = tmp_path / "results" / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["arm"] == "tokens":
            row["bench"] = "others"
    path.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["arm"] != "tokens")))
    text = page(tmp_path / "results", tmp_path)
    assert "| `embedding` | `tokens`" not in text
    assert "20 rows of earlier settings" in text


def test_arms_of_other_layers_and_precisions_have_their_own_tables(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES)
    (tmp_path / "results" / "stores.json").write_text(json.dumps({"int8": {"bytes": 4321, "r2": 0.99987}}))
    text = page(tmp_path / "results", tmp_path)
    layers, precision = text.split("## Layers")[1].split("## Precision")
    (row,) = [line for line in layers.splitlines() if line.startswith("| (1,) |")]
    assert row.split(" | ")[1] == "10"
    assert float(row.split(" | ")[3].split()[0]) < -10  # points below the published choice
    (row,) = [line for line in precision.splitlines() if line.startswith("| int8 |")]
    assert row.startswith("| int8 | 4321 | 0.99987 | 10 | ")
    assert "layers-1" not in text.split("## The endpoint")[1].split("## Layers")[0]


def test_students_are_correlated_and_few_are_not(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES)
    rng = np.random.default_rng(1)
    rows = [
        {
            "width": 32, "tower_steps": 60 + n // 2, "pictures": 300 + n % 2, "text": 0.3,
            "probe": {"1": 0.0, "2": 0.05 * n}, "tower": {"depth R²": -n, "names AP": 0.5, "names AP by chance": 0.1},
            "right": {"test depth": digits(0.5 + 0.04 * n, rng), "ood depth": digits(0.5, rng),
                      "test colour": digits(0.9 - 0.04 * n, rng)},
            "bench": "these",
        }
        for n in range(12)
    ]  # fmt: skip
    path = tmp_path / "results" / "students.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (tmp_path / "results" / "questions.json").write_text(json.dumps(_asked_with_colours(tmp_path / "results")))
    assert "Not enough was run yet: 3 students" in page(tmp_path / "results", tmp_path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = page(tmp_path / "results", tmp_path).split("## (a)")[1]
    (row,) = [line for line in part.splitlines() if line.startswith("| depth |")]
    assert float(row.split(" | ")[3]) > 0.9
    contrast = [line for line in part.splitlines() if line.startswith("The depth probe's correlation with depth")]
    assert float(contrast[0].split(": ")[1].split(" ")[0]) > 1.5
    assert row.endswith("| – | – |"), "the text losses are all equal: nothing is left to take out"
    matrix = {line.split(" | ")[0]: line.split(" | ")[2] for line in part.splitlines() if "of its tower" in line}
    assert matrix.keys() == {"| depth R² of its tower", "| names AP of its tower"}
    assert float(matrix["| depth R² of its tower"]) < -0.9
    assert matrix["| names AP of its tower"] == "–"
    assert (tmp_path / "images" / "students.png").is_file()


def test_rows_made_again_are_counted_and_compared(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES)
    path = tmp_path / "results" / "runs.jsonl"
    first, second, *_ = path.read_text().splitlines()
    other = json.loads(second)
    other["right"] = other["right"][::-1]
    (tmp_path / "results" / "repeated.jsonl").write_text(f"{first}\n{json.dumps(other)}\n")
    text = page(tmp_path / "results", tmp_path)
    assert "2 rows (an arm, a seed, a kind of question) were made a second time from nothing" in text
    assert "in 1 of them every question was answered as before" in text
    assert path.read_text().count("\n") == 10 * 2 * len(SHARES)


def test_the_cost_stands_over_next_tokens_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES, seeds=2)
    path = tmp_path / "results" / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["pretrain_seconds"] += 25.0 if row["arm"] == "embedding" else 0.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seconds = {"text": 2.0, "streamed": 3.0, "batched": 5.0, "one_by_one": 7.0}
    cost = {
        "date": "2026-11-29", "settings": {"batch": 32, "device": "cpu"}, "conditions": {"said": "nothing else"},
        "ways": {way: {"seconds": value, "peak_gib": 1.0} for way, value in seconds.items()},
    }  # fmt: skip
    (tmp_path / "results" / "cost.json").write_text(json.dumps(cost))
    part = page(tmp_path / "results", tmp_path).split("## Cost")[1].split("\n## ")[0]
    assert "2026-11-29, batch 32, cpu; nothing else" in part
    assert "| embedding losses, features from the store | 3.00 | 1.50 | 1.00 |" in part
    assert "| embedding losses, teachers in the step, batched | 5.00 | 2.50 | 1.00 |" in part
    assert "| `embedding` | 2 | 45 | 30 | 1.50 |" in part


def test_a_page_without_results_says_so(tmp_path: Path) -> None:
    text = page(tmp_path / "nothing", tmp_path)
    assert "Not enough was run yet: a difference takes two paired seeds, and there are 0." in text
    assert "Run never" in text


def test_the_plan_names_arms_and_students_that_there_are() -> None:
    evidence, arms, representations = load("evidence"), load("arms"), load("representations")
    plan = evidence.PLAN
    for form in plan["forms"].values():
        assert {name for part in form["arms"] for name in part["arms"]} <= set(arms.ARMS)
    full = plan["forms"]["full"]
    assert {name for part in full["arms"] for name in part["arms"]} == set(arms.ARMS)
    assert full["students"] == len(plan["students"]) == len(set(plan["students"]))
    made = [representations.variant(name) for name in plan["students"]]
    assert {len({getattr(one, name) for one in made}) for name in ("width", "tower_steps", "pictures")} == {3}
