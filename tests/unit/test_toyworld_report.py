"""The page of the toy world's results, from rows whose outcome is known."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toyworld_support import TOYWORLD, load, on_the_path

__all__ = ["on_the_path"]

QUESTIONS = 120
FAMILIES = ("gates", "controls", "layers", "precision")
SHARES = {"none": 0.5, "tokens": 0.5, "shuffled": 0.5, "random": 0.55, "embedding": 0.8, "int8": 0.8, "layers-1": 0.6}


def digits(share: float, rng: np.random.Generator) -> str:
    return "".join(str(int(value)) for value in rng.random(QUESTIONS) < share)


def write_rows(folder: Path, shares: dict[str, float], *, seeds: int = 10, first: int = 0) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "arm": arm, "seed": seed, "budget": 3000, "split": split, "kind": "depth", "right": digits(share, rng),
            "config": "same", "bench": "these", "pretrain_seconds": 20.0, "tune_seconds": 30.0,
            "versions": {"torch": "2"}, "date": "2026-11-29",
        }
        for arm, share in shares.items() for seed in range(first, first + seeds) for split in ("test", "ood")
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


def plan_with(out: Path, families: dict[str, str]) -> Path:
    plan = json.loads((TOYWORLD / "plan.json").read_text(encoding="utf-8"))
    out.write_text(json.dumps(plan | {"families": families}), encoding="utf-8")
    return out


def page(results: Path, out: Path) -> str:
    plan = plan_with(out / "plan.json", {name: f"what {name} are" for name in FAMILIES})
    load("report").write(results, out / "results.md", plan)
    return (out / "results.md").read_text(encoding="utf-8")


def test_the_verdict_follows_from_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "good", SHARES)
    text = page(tmp_path / "good", tmp_path)
    assert "**Success** as it was fixed" in text
    assert "| `random` | +" in text
    assert (tmp_path / "images" / "results.png").is_file()
    write_rows(tmp_path / "worse", {**SHARES, "embedding": 0.2})
    text = page(tmp_path / "worse", tmp_path)
    assert "**No success** as it was fixed: the interval against `tokens`, `shuffled`, `random` lies below 0." in text
    assert "The criterion that was fixed beforehand is not met" in text
    write_rows(tmp_path / "equal", {**SHARES, "embedding": 0.5, "random": 0.5})
    assert "**No success** as it was fixed: the interval against `tokens`" in page(tmp_path / "equal", tmp_path)
    write_rows(tmp_path / "as-random", {**SHARES, "random": 0.8})
    text = page(tmp_path / "as-random", tmp_path)
    assert "the interval against `tokens`, `shuffled` lies above 0; the interval against `random` holds 0." in text
    assert "does **not** show that what the teacher learnt is what helps" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `random` − `shuffled` |")]
    assert 20 < float(row.split(" | ")[1].split()[0]) < 40
    write_rows(tmp_path / "few", SHARES, seeds=4)
    text = page(tmp_path / "few", tmp_path)
    assert "**No verdict yet**: it takes 5 paired seeds of all arms, and there are 4." in text
    assert "**Nothing is decided yet**" in text
    assert "| rule: names alone | | 61.2 | 61.2 |" in text


def test_the_second_experiment_has_its_own_rows_and_verdict(tmp_path: Path) -> None:
    first = tmp_path / "results"
    write_rows(first, {**SHARES, "map": 0.85})
    assert "second experiment" not in page(first, tmp_path)
    shares = {"tokens": 0.5, "map": 0.8, "map-shuffled": 0.5, "map-untrained-each": 0.55, "cells": 0.6}
    write_rows(first / "confirmation", {**shares, "embedding": 0.4}, first=10)
    text = page(first, tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("**A second experiment asked")]
    assert "its criterion is met.**" in line
    told = dict(re.findall(r"\(`([a-z-]+)`\) \+([0-9.]+) points", line))
    assert list(told) == ["tokens", "map-shuffled", "map-untrained-each", "cells"]
    assert all(10 < float(value) < 45 for value in told.values())
    assert 30 < float(line.split("described, not tested): +")[1].split()[0]) < 50
    (bullet,) = [row for row in text.splitlines() if row.startswith("- **Try the depth map")]
    assert len(re.findall(r"\+[0-9.]+ points \([^)]*\) over `", bullet.split("Asked once more")[1])) == 4
    part = text.split("## A second experiment")[1].split("\n## ")[0]
    assert "**Success** as it was fixed: all 4 intervals lie above 0." in part
    assert "42 of 42 runs are there" in part
    assert "| `cells` | +" in part and " | 7 | " in part.split("| `cells` | +")[1].splitlines()[0], (
        "other seeds do not count"
    )
    (row,) = [row for row in part.splitlines() if row.startswith("| `embedding` | +")]
    assert 30 < float(row.split(" | ")[1].split()[0]) < 50
    assert (tmp_path / "images" / "confirmation.png").is_file()
    write_rows(first / "confirmation", {**shares, "cells": 0.8}, first=10)
    text = page(first, tmp_path)
    assert "its criterion is not met.**" in text
    assert "`map-untrained-each` lies above 0; the interval against `cells` holds 0." in text
    write_rows(first / "confirmation", shares, first=13)
    text = page(first, tmp_path)
    assert "**A second experiment asked" not in text, "four seeds decide nothing"
    assert "**No verdict yet**: it takes 5 paired seeds of all arms, and there are 4." in text


def test_it_is_said_whether_an_effect_could_be_seen_and_what_is_missing(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", {**SHARES, "oracle": 0.9}, seeds=4)
    text = page(tmp_path / "results", tmp_path)
    part = text.split("## Could it see an effect?")[1].split("##")[0]
    (row,) = [line for line in part.splitlines() if line.startswith("| `oracle` |")]
    assert row.split(" | ")[1] == "4"
    assert float(row.split(" | ")[3]) > 20
    assert float(row.split(" | ")[5].strip(" |")) < 0.01
    assert "| `feed` | 0 | | | | |" in part
    assert "`feed` 3" in text.split("## What was fixed")[0]
    assert "`none` 1" in text.split("## What was fixed")[0]
    (row,) = [line for line in text.split("## The endpoint")[1].splitlines() if line.startswith("| `tokens` | +")][:1]
    assert row.endswith(" | 4 | – |"), "the spread of four seeds says little of how many are needed"


def test_the_summary_says_which_other_targets_help(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", {**SHARES, "own": 0.3, "cells": 0.8})
    text = page(tmp_path / "results", tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("Other targets, over task tokens without")]
    told = {part.split(": ")[-2].split(", ")[0]: part.split(": ")[-1] for part in line.split("; ")}
    assert list(told) == ["the picture's own colours", "features of the student's own tower"]
    cells, own = told.values()
    assert 15 < float(cells.split()[0]) < 45
    assert -35 < float(own.split()[0]) < -5
    assert own.endswith(", 10 seeds.")
    assert "over the untrained one's" not in text
    helps = "one trained network's answer helps more than one untrained network's"
    for share, said in ((0.3, helps), (0.8, "neither does it show")):
        write_rows(tmp_path / "results", {**SHARES, "map": 0.8, "map-untrained": share})
        text = page(tmp_path / "results", tmp_path)
        (line,) = [line for line in text.splitlines() if line.startswith("Other targets, over task tokens without")]
        assert line.endswith(f"(10 seeds): so in this form {said}.")


def test_seeds_count_that_all_arms_of_the_endpoint_have_and_that_one_machine_made(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES, seeds=8)
    path = tmp_path / "results" / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if (row["arm"], row["seed"]) != ("random", 2)]
    for row in rows:
        row["machine"] = "other" if (row["arm"], row["seed"]) == ("shuffled", 5) else "one"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = page(tmp_path / "results", tmp_path).split("## The endpoint")[1].split("\n## ")[0]
    for other in ("tokens", "shuffled", "random"):
        (row,) = [line for line in part.splitlines() if line.startswith(f"| `{other}` |")]
        assert row.split(" | ")[4] == "6"


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
    (noise,) = [
        line for line in precision.splitlines() if line.startswith("**A seed fixes a run only to the last bit**")
    ]
    told = [float(part) for part in re.findall(r"[+-]\d+\.\d", noise)]
    rows = load("recorded").load(tmp_path / "results").right
    right = [rows[arm, 3000, "test", "depth"] for arm in ("int8", "embedding")]
    assert told == [
        pytest.approx(100 * (one.count("1") - right[1][seed].count("1")) / len(one), abs=0.06)
        for seed, one in sorted(right[0].items())
    ]
    assert re.search(r"Different from the published choice after correction: `layers-1` \(-\d+\.\d points\)\.", layers)
    assert "Different from float16 after correction: " in precision
    assert "Minus task tokens without a loss, described and not tested: int8 " in precision
    assert "Minus task tokens without a loss, described and not tested: blocks (1,) " in layers
    (tmp_path / "results" / "stores.json").write_text(json.dumps({"int8": {"bytes": 4321, "r2": 0.98}}))
    assert "A seed fixes a run" not in page(tmp_path / "results", tmp_path), "that is another target"
    assert "layers-1" not in text.split("## The endpoint")[1].split("## Layers")[0]


def estimate(rows: Path, arm: str, other: str) -> Any:
    return load("recorded").load(rows).difference(arm, other, 3000, "test", "depth")


def test_p_values_are_corrected_within_their_family_and_for_all_of_it(tmp_path: Path) -> None:
    # of controls two of six were run, of layers one of four, of precisions one of three, of gates both
    shares = {"none": 0.54, "tokens": 0.5, "embedding": 0.57, "layers-1": 0.5, "int8": 0.5, "feed": 0.58, "oracle": 0.9}
    write_rows(tmp_path / "results", {name: shares[name] for name in shares if name != "oracle"})
    text = page(tmp_path / "results", tmp_path)
    parts = {
        name: text.split(f"## {name}")[1].split("\n## ")[0] for name in ("Could", "Controls", "Layers", "Precision")
    }

    def p(part: str, row: str) -> float:
        (line,) = [line for line in parts[part].splitlines() if line.startswith(f"| {row} |")]
        return next(
            float(cell) for cell in line.strip(" |").split(" | ") if cell.startswith(("0.", "1.")) and len(cell) == 5
        )

    rows = tmp_path / "results"
    assert 0.001 < 6 * estimate(rows, "embedding", "none").p < 1
    both = sorted([estimate(rows, "embedding", "none").p, estimate(rows, "embedding", "feed").p])
    assert p("Controls", "`none`") == pytest.approx(min(1, 6 * both[0]), abs=6e-4)
    assert p("Controls", "`feed`") == pytest.approx(min(1, max(6 * both[0], 5 * both[1])), abs=6e-4)
    assert p("Could", "`feed`") == pytest.approx(min(1, 2 * estimate(rows, "feed", "none").p), abs=6e-4)
    assert p("Layers", "(1,)") == pytest.approx(min(1, 4 * estimate(rows, "layers-1", "embedding").p), abs=6e-4)
    assert p("Precision", "int8") == pytest.approx(min(1, 3 * estimate(rows, "int8", "embedding").p), abs=6e-4)
    assert (
        "| `longer` | no task tokens, one and a half times the steps of pretraining | – | – | – | fewer than 2 |"
        in text
    )
    rest = text.split("## The rest")[1].split("\n## ")[0]
    assert "p, corrected" not in rest
    assert "| `embedding` | `tokens` | 3000 | depth |" not in rest, "that is the endpoint"
    assert "| `embedding` | `tokens` | 3000 | depth (ood) |" in rest
    assert "| `none` | `tokens` | 3000 | depth |" in rest
    assert "(two at least): 5 differences, described and not tested" in rest
    assert "**Rows are not to be compared with each other**" in text.split("## Accuracy after 3000")[1]
    fixed = text.split("## What was fixed")[1].split("\n## ")[0]
    assert "gates – what gates are; controls – what controls are" in fixed
    assert "arxiv.org/abs/0712.1111" in fixed


def test_families_that_are_not_those_corrected_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES, seeds=2)
    plan = plan_with(tmp_path / "plan.json", {"gates": "", "layers": "", "kinds": ""})
    with pytest.raises(ValueError, match="change `families` in plan"):
        load("report").write(tmp_path / "results", tmp_path / "results.md", plan)


def test_what_the_losses_ended_at_is_shown_beside_the_trivial_baseline(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", {"none": 0.5, "embedding": 0.6, "tokens": 0.5}, seeds=3)
    assert "No run has kept what its losses ended at yet." in page(tmp_path / "results", tmp_path)
    path = tmp_path / "results" / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        seed = row["seed"]
        if row["arm"] == "none":
            row |= {"progress": {"text": 1.0 + seed}, "tune_text": 0.5}
        elif row["arm"] == "embedding" and seed > 0:  # the first is an older row
            row |= {"progress": {"text": 1.1, "depth.3": 0.2 * seed, "depth.2": -0.1}, "tune_text": 0.25 * seed}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(tmp_path / "results", tmp_path)
    part = text.split("## Did the losses do anything?")[1].split("\n## ")[0]
    assert text.index("## The endpoint") < text.index("## Did the losses") < text.index("## Could it see")
    assert "0 is the mean map of the arm's own targets, the trivial baseline" in part
    table = [line for line in part.splitlines() if line.startswith("| `")]
    assert table == [
        "| `none` | 3 | 2.000 | – | 0.500 |",
        "| `embedding` | 2 | 1.100 | depth 2: -0.100, depth 3: 0.300 | 0.375 |",
    ]


def test_two_seeds_have_no_interval(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", {"none": 0.3, "tokens": 0.5, "embedding": 0.8}, seeds=2)
    part = page(tmp_path / "results", tmp_path).split("## Controls")[1].split("\n## ")[0]
    (row,) = [line for line in part.splitlines() if line.startswith("| `none` |")]
    assert row.endswith(" | 2 seeds: none | – | 2 |")
    write_rows(tmp_path / "results", {"none": 0.3, "tokens": 0.5, "embedding": 0.8}, seeds=3)
    part = page(tmp_path / "results", tmp_path).split("## Controls")[1].split("\n## ")[0]
    (row,) = [line for line in part.splitlines() if line.startswith("| `none` |")]
    assert "none |" not in row.split("|", 3)[3] and row.endswith(" | 3 |")


def test_what_can_be_read_stands_beside_chance_by_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES, seeds=2)
    assert "linear regression" not in page(tmp_path / "results", tmp_path)
    path = tmp_path / "results" / "headroom.json"
    path.write_text("{}")
    assert "linear regression" not in page(tmp_path / "results", tmp_path)
    path.write_text(json.dumps({"the tower": {"test": 0.7512, "ood": 0.61}, "foot": {"test": 0.5}}))
    part = page(tmp_path / "results", tmp_path).split("## Could it see")[1].split("\n## ")[0]
    assert "| chance | 50 | 50 |\n| the tower | 75.1 | 61.0 |\n| foot | 50.0 | – |\n" in part
    assert "nor a bound on it" in part


def _students(folder: Path, *, within: float, by_telling: float) -> list[dict[str, Any]]:
    """18 students of 6 towers: answers and probes rise with the tower by `within`, and with what captions tell."""
    rng = np.random.default_rng(1)
    rows = [
        {
            "width": 32, "tower_steps": 60 + tower, "told": told, "text": 0.3,
            "probe": {"1": 0.0, "2": 0.05 * tower + 0.2 * by_telling * level},
            "depth": {"0": -1.0, "1": 0.9 - 0.05 * tower},
            "tower": {"depth R² (centred)": -tower, "names AP": 0.5, "names AP by chance": 0.1},
            "right": {"test depth": digits(0.4 + 0.02 * within * tower + 0.12 * by_telling * level, rng),
                      "ood depth": digits(0.5, rng), "test colour": digits(0.9 - 0.03 * tower, rng)},
            "bench": "these",
        }
        for tower in range(6) for level, told in enumerate((0, 1000, 3000))
    ]  # fmt: skip
    (folder / "students.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_students_are_correlated_among_those_told_alike_and_few_are_not(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_rows(results, SHARES)
    (results / "questions.json").write_text(json.dumps(_asked_with_colours(results)))
    rows = _students(results, within=2, by_telling=1)
    (results / "students.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert "Not enough was run yet: 3 students" in page(results, tmp_path)
    _students(results, within=2, by_telling=1)
    part = page(results, tmp_path).split("## (a)")[1]
    assert "**Among students that are told alike, those from which a depth probe reads more" in part
    assert "draws of 6 towers are too narrow" in part
    (row,) = [line for line in part.splitlines() if line.startswith("| depth |")]
    cells = row.strip("| ").split(" | ")
    # kind, chance, range, then of each measure: correlation, interval, p, given the loss
    assert float(cells[3]) > 0.7 and float(cells[5]) < 0.05, "of 720 orders of six towers"
    assert cells[6] == "–", "the text losses are all equal: nothing is left to take out"
    assert float(cells[7]) < -0.7, "the ridge was made to fall where answers rise"
    (unlike,) = [line for line in part.splitlines() if line.startswith("| depth (ood) |")]
    assert float(unlike.strip("| ").split(" | ")[5]) > 0.05
    (contrast,) = [line for line in part.splitlines() if line.startswith("It was expected to go with depth more")]
    assert float(contrast.split("features – colour ")[1].split(";")[0]) > 1.2
    (changes,) = [line for line in part.splitlines() if line.startswith("From the fewest to the most telling")]
    assert "probe of the depth teacher's features, R² +0.40 (up in 6 of 6 towers)" in changes
    assert "depth read by a ridge, R² +0.00 (up in 0 of 6 towers)" in changes
    matrix = {line.split(" | ")[0]: line.split(" | ")[2] for line in part.splitlines() if "of its tower" in line}
    assert matrix.keys() == {"| depth R² (centred) of its tower", "| names AP of its tower"}
    assert float(matrix["| depth R² (centred) of its tower"]) < -0.7
    assert matrix["| names AP of its tower"] == "–"
    assert (tmp_path / "images" / "students.png").is_file()


def test_what_captions_tell_makes_no_correlation_by_itself(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_rows(results, SHARES)
    (results / "questions.json").write_text(json.dumps(_asked_with_colours(results)))
    _students(results, within=0, by_telling=1)
    whole = page(results, tmp_path)
    part = whole.split("## (a)")[1]
    said = "**It is not shown that, among students told alike, a better depth probe goes with more right answers"
    assert said in part
    assert said in whole.split("## The endpoint")[0], "a reader who stops there is told"
    assert "Nor that how well its tower itself holds depth does (ρ = " in part
    (rival,) = [line for line in part.splitlines() if line.startswith("| probe of the depth teacher's features | ")][:1]
    over_all, with_told, given_told, _ = map(float, rival.strip("| ").split(" | ")[1:])
    assert over_all > 0.6 and with_told > 0.6
    assert abs(given_told) < 0.45


def test_rows_made_again_are_counted_and_compared(tmp_path: Path) -> None:
    write_rows(tmp_path / "results", SHARES)
    path = tmp_path / "results" / "runs.jsonl"
    first, second, *_ = path.read_text().splitlines()
    other = json.loads(second)
    other["right"] = other["right"][::-1]
    (tmp_path / "results" / "repeated.jsonl").write_text(f"{first}\n{json.dumps(other)}\n")
    text = page(tmp_path / "results", tmp_path)
    assert "2 rows (an arm and a seed or a student, a kind of question; several to a run) were made a second" in text
    assert "in 1 of them every question was answered as before" in text
    assert path.read_text().count("\n") == 10 * 2 * len(SHARES)
    student = {
        "width": 32, "tower_steps": 60, "told": 3, "text": 0.3, "probe": {"1": 0.5}, "config": "this",
        "depth": {"0": 0.5},
        "right": {"test depth": "1100", "test colour": "0101"}, "bench": json.loads(first)["bench"],
    }  # fmt: skip
    (tmp_path / "results" / "students.jsonl").write_text(json.dumps(student) + "\n")
    again = [student | {"right": student["right"] | {"test colour": "1101"}}, student | {"config": "that"}]
    (tmp_path / "results" / "repeated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    text = page(tmp_path / "results", tmp_path)
    assert "2 rows (an arm and a seed or a student, a kind of question; several to a run)" in text
    assert "in 1 of them every question" in text


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
    assert "Not enough was run yet: a difference takes two paired seeds of all arms, and there are 0." in text
    assert "Run never" in text


def test_the_plan_names_arms_and_students_that_there_are() -> None:
    evidence, arms, representations = load("evidence"), load("arms"), load("representations")
    plan = evidence.PLAN
    for form in plan["forms"].values():
        assert {name for part in form["arms"] for name in part["arms"]} <= set(arms.ARMS)
    assert sorted(plan["families"]) == sorted(FAMILIES)
    full = plan["forms"]["full"]
    second = plan["confirmation"]
    parts = plan["forms"]["confirmation"]["arms"]
    assert {part["seeds"] for part in parts} == {second["seeds"]}
    both = [*full["arms"], *parts]
    assert {name for part in both for name in part["arms"]} == set(arms.ARMS)
    assert set(parts[0]["arms"]) == {second["endpoint"]["arm"], *second["endpoint"]["against"]}
    assert full["students"] == len(plan["students"]) == len(set(plan["students"]))
    made = [representations.variant(name) for name in plan["students"]]
    assert {len({getattr(one, name) for one in made}) for name in ("width", "tower_steps", "told")} == {3}


def test_targets_of_all_kinds_stand_beside_each_other(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_rows(results, {**SHARES, "map": 0.75, "cells": 0.5})
    assert "## Which targets help?" not in page(results, tmp_path)
    told = {"channels": 16.0, "beyond": 0.11, "loss": 0.049, "alike": 0.89}
    (results / "spread.json").write_text(json.dumps({"map": told, "own": told}))
    (results / "headroom.json").write_text(json.dumps({"what the teacher answers": {"test": 0.7597, "ood": 0.1}}))
    part = page(results, tmp_path).split("## Which targets help?")[1].split("\n## ")[0]
    (row,) = [line for line in part.splitlines() if line.startswith("| `map` |")]
    assert row.startswith("| `map` | 16 | linear | 0.11 | 0.049 | 0.89 | 76.0 | +")
    assert row.endswith(" | 10 |")
    assert "| `own` | 16 | layer norm | 0.11 | 0.049 | 0.89 | – | – | fewer than 2 |" in part
    (paired,) = [line for line in part.splitlines() if line.startswith("Paired with each other")]
    assert 10 < float(paired.split("`map` minus `cells` ")[1].split(" ")[0]) < 40
    assert "p corrected for these 4," in paired


def test_what_of_a_target_is_about_its_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = load("spread")
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(1, 4, 4, 2)), rng.normal(size=(400, 4, 4, 2))
    maps = shared + 0.5 * own

    class Reader:
        def __init__(self, store: object, teacher: str) -> None: ...

        def feature(self, row: int) -> Any:
            return maps[row]

    class Store:
        @classmethod
        def open(cls, url: str) -> Store:
            return cls()

        def samples(self) -> Any:
            return (types.SimpleNamespace(row=row) for row in range(len(maps)))

    monkeypatch.setattr(spread, "FeatureReader", Reader)
    monkeypatch.setattr(spread, "FeatureStore", Store)
    found = spread.measure(tmp_path, "depth")
    ratio = 0.25 / (0.25 + shared.var(axis=(0, 1, 2)))
    assert found["channels"] == 2
    assert found["beyond"] == pytest.approx(ratio.mean(), rel=0.05)
    assert found["alike"] == pytest.approx(1 - ratio.mean(), abs=0.1)
    assert 0 < found["loss"] < found["beyond"] / 2


def test_budgets_stand_beside_each_other_over_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_rows(results, SHARES)
    assert "## Fine-tuning budgets" not in page(results, tmp_path), "there is one"
    rows = [json.loads(line) for line in (results / "runs.jsonl").read_text().splitlines()]
    more = [row | {"budget": 1000} for row in rows if row["arm"] in ("tokens", "embedding") and row["seed"] == 3]
    (results / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    part = page(results, tmp_path).split("## Fine-tuning budgets")[1].split("\n## ")[0]
    few, many = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith(("| 1000", "| 3000"))]
    of_seed = {row["arm"]: row["right"] for row in more if row["split"] == "test"}
    shares = [100 * of_seed[arm].count("1") / len(of_seed[arm]) for arm in ("tokens", "embedding")]
    assert [float(cell) for cell in few[1:3]] == pytest.approx(shares, abs=0.06)
    assert few[4:] == ["one seed: none", "1"]
    assert many[5] == "10" and " to " in many[4]
