"""`make evidence`: the toy world's experiment, from the pictures to `docs/results.md`.

    python examples/toyworld/evidence.py WORK --teachers DIR --student DIR [--seeds 0,1,2] [--arms …] [--budgets …]
    python examples/toyworld/evidence.py WORK --report

Rows are added to `examples/toyworld/results/runs.jsonl`, one for each (arm, seed, budget, kind of question); what is
there with the same settings is not run again, so several sessions add up. What is compared with what was fixed
beforehand, in `plan.json`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runs.jsonl"
PLAN = json.loads((HERE / "plan.json").read_text(encoding="utf-8"))
GRID = 12
"""Cells of the stored maps, averaged from 24: a quarter of the work of the predictors."""


def main() -> int:
    """Prepare, run what is missing, report; return the exit status."""
    parser = argparse.ArgumentParser(description="The toy world's experiment.")
    parser.add_argument("work", type=Path, help="folder for pictures, features and runs")
    parser.add_argument("--teachers", type=Path, default=HERE / "teachers", help="folder that holds depth/")
    parser.add_argument("--student", type=Path, default=HERE / "student", help="folder that holds vision/ and llm/")
    parser.add_argument("--arms", default="none,tokens,embedding,shuffled,random", help="names, by commas")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, by commas, or FIRST-LAST")
    parser.add_argument("--budgets", default=str(PLAN["endpoint"]["budget"]), help="numbers of questions, by commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that rows are added to")
    parser.add_argument("--size", type=json.loads, default={}, help="JSON over the plan's size and recipe, for trials")
    parser.add_argument("--prepare", action="store_true", help="pictures and features only")
    parser.add_argument("--report", action="store_true", help="write docs/results.md from what is there, run nothing")
    options = parser.parse_args()
    if not options.report:
        prepare(options.work, options.teachers, options.student, options.size, options.arms.split(","))
    if not options.report and not options.prepare:
        run(options)
    if not options.prepare:
        import report

        report.write(options.results, HERE.parents[1] / "docs" / "results.md")
    return 0


def _given(kind: Any, defaults: dict[str, Any], over: dict[str, Any]) -> Any:
    names = {each.name for each in fields(kind)}
    values = {**defaults, **{name: value for name, value in over.items() if name in names}}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def prepare(work: Path, teachers: Path, student: Path, over: dict[str, Any], arms: Sequence[str]) -> None:
    """Draw the world and extract the features that the arms need, unless that is done; extraction resumes by itself."""
    import corpus
    from arms import ARMS

    size = _given(corpus.Size, PLAN["size"], over)
    world = work / "world"
    if not world.is_dir():
        drawn = work / "world.part"
        shutil.rmtree(drawn, ignore_errors=True)
        corpus.write(drawn, size)
        drawn.rename(world)
    stores = {ARMS[name].store for name in arms}
    if "depth.zarr" in stores:
        extract(world, work / "depth.zarr", "depth", teachers / "depth", f"grid={GRID}", "grid_resize=area")
    if "random.zarr" in stores:
        untrained = work / "random-teacher"
        if not untrained.is_dir():
            _untrained_depth(untrained, teachers / "depth")
        extract(world, work / "random.zarr", "depth", untrained, f"grid={GRID}", "grid_resize=area")
    if "own.zarr" in stores:
        extract(world, work / "own.zarr", "clip", student / "vision", f"grid={GRID}", "grid_resize=bilinear")


def _untrained_depth(out: Path, trained: Path) -> None:
    import torch
    from teacher_depth import depth_config
    from transformers import DepthAnythingForDepthEstimation

    torch.manual_seed(77)
    DepthAnythingForDepthEstimation(depth_config()).save_pretrained(out)
    shutil.copy(trained / "preprocessor_config.json", out)


def extract(world: Path, store: Path, teacher: str, checkpoint: Path, *options: str) -> None:
    """Run `olapipe extract` over the captioned pictures; does nothing where the store is whole."""
    done = store.with_suffix(".done")
    if done.is_file():
        return
    command = ["extract", str(world / "captions.jsonl"), "--images", str(world / "images"), "--out", str(store)]
    command += ["--teacher", teacher, "--checkpoint", f"{teacher}={checkpoint}", "--workers", "1"]
    for option in options:
        command += ["--set", f"options.{teacher}.{option}"]
    print("$ olapipe", *command, flush=True)
    subprocess.run([sys.executable, "-m", "olapipe", *command], check=True)
    done.touch()


def run(options: argparse.Namespace) -> None:
    """Run what the results lack: seed by seed, all arms of one before the next."""
    from arms import ARMS, Laboratory, Recipe

    recipe = _given(Recipe, PLAN["recipe"], options.size)
    laboratory = Laboratory(options.work, options.student / "vision", options.student / "llm", recipe)
    budgets = [int(part) for part in options.budgets.split(",")]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    questions = json.dumps(laboratory.asked(), indent=0, sort_keys=True)
    options.results.with_name("questions.json").write_text(questions + "\n", encoding="utf-8")
    for seed in _numbers(options.seeds):
        for name in options.arms.split(","):
            arm = ARMS[name]
            known = {(row["arm"], row["seed"], row["budget"], row["config"]) for row in read(options.results)}
            missing = [b for b in budgets if (name, seed, b, laboratory.digest(arm, b)) not in known]
            if missing:
                rows = list(laboratory.run(arm, seed, missing))
                append(options.results, rows)
                print(summary(rows), flush=True)


def _numbers(text: str) -> list[int]:
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file; none where it is not there yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows in one write under a lock: two processes may work at one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line about an arm that was just run."""
    first = rows[0]
    shares = [
        f"{row['kind']} ({row['split']}) {100 * row['right'].count('1') / len(row['right']):.1f}"
        for row in rows
        if row["budget"] == first["budget"]
    ]
    took = f"{first['pretrain_seconds']:.0f} + {first['tune_seconds']:.0f} s"
    return f"{first['arm']}, seed {first['seed']}, {first['budget']} questions: {', '.join(shares)} ({took})"


if __name__ == "__main__":
    sys.exit(main())
