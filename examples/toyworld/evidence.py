"""`make evidence`: the toy world's experiment, from the pictures to `docs/results.md`.

    python examples/toyworld/evidence.py WORK [--form quick|full|confirmation] [--jobs N]
    python examples/toyworld/evidence.py WORK --arms tokens,embedding --seeds 0-4 --budgets 1000 --students 0
    python examples/toyworld/evidence.py WORK --again
    python examples/toyworld/evidence.py WORK --report

Rows are added to files in `examples/toyworld/results/`, one for each (arm, seed, budget, kind of question) and one for
each student of part (a); what is there with the same settings is not run again, so several sessions add up. What is
run in which form, and what is compared with what, was fixed beforehand in `plan.json`. The form `confirmation` is an
experiment of its own: another drawing of the world, other teachers, and a folder of its own for the rows. With
`--again` everything that is asked for is run, into a file beside these, and the page says how many answers came out as
before.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
RUNS, STUDENTS, REPEATED = "runs.jsonl", "students.jsonl", "repeated.jsonl"
QUESTIONS, STORES, HEADROOM, SPREAD = "questions.json", "stores.json", "headroom.json", "spread.json"
PLAN = json.loads((HERE / "plan.json").read_text(encoding="utf-8"))
UNLIKE_TARGETS = ("embedding", "random", "own", "cells", "map", "map-untrained", "map-untrained-each")
"""Arms whose targets are of unlike kinds."""
HELD_OUT = 200
"""Pictures on which students of part (a) are compared by their next-token loss."""


def main() -> int:
    """Prepare, run what is missing, report; return the exit status."""
    parser = argparse.ArgumentParser(description="The toy world's experiment.")
    parser.add_argument("work", type=Path, help="folder for pictures, features and runs")
    parser.add_argument("--teachers", type=Path, help="folder that holds depth/; the form's own by default")
    parser.add_argument("--student", type=Path, default=HERE / "student", help="folder that holds vision/ and llm/")
    parser.add_argument("--form", default="quick", choices=sorted(PLAN["forms"]), help="which runs of the plan")
    parser.add_argument("--arms", help="these arms alone: names, by commas")
    parser.add_argument("--seeds", default="0", help="with --arms: numbers, by commas, or FIRST-LAST")
    parser.add_argument("--budgets", default=str(PLAN["endpoint"]["budget"]), help="with --arms: numbers of questions")
    parser.add_argument("--students", type=int, help="how many students of part (a), in the plan's order")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a core each")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of files that rows are added to")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "results.md", help="the report")
    parser.add_argument("--size", type=json.loads, default={}, help="JSON over the plan's size and recipe, for trials")
    parser.add_argument("--again", action="store_true", help="make all runs, those that are there once more to compare")
    parser.add_argument("--report", action="store_true", help="write the report from what is there, run nothing")
    options = parser.parse_args()
    if options.size and options.results == HERE / "results":
        parser.error("--size is for trials: give them a --results and an --out of their own")
    failed = [] if options.report else run(_own_place(options))
    import report

    report.write(options.results, options.out)
    if failed:
        print(f"error: {len(failed)} runs failed; the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def _own_place(options: argparse.Namespace) -> argparse.Namespace:
    """Give a form of another drawing of the world folders of its own, in those that were asked for."""
    form = PLAN["forms"][options.form]
    own = argparse.Namespace(**vars(options))
    own.draw = form.get("draw", 0)
    own.teachers = options.teachers or HERE / form.get("teachers", "teachers")
    own.read_from = form.get("read_from", {})
    if own.draw:
        own.work, own.results = options.work / options.form, options.results / options.form
    return own


@dataclass(frozen=True)
class Task:
    """One run: an arm with a seed at some budgets, or a student of part (a)."""

    name: str
    seed: int
    budgets: tuple[int, ...]
    student: bool = False


def tasks(options: argparse.Namespace) -> list[Task]:
    """List what is asked for, in the order of the plan."""
    from arms import numbers

    form = PLAN["forms"][options.form]
    sets = form["arms"]
    if options.arms is not None:
        sets = [{"arms": options.arms.split(","), "seeds": options.seeds, "budgets": numbers(options.budgets)}]
    found = [
        Task(name, seed, tuple(chosen["budgets"]))
        for chosen in sets
        for seed in numbers(chosen["seeds"])
        for name in chosen["arms"]
    ]
    count = form["students"] if options.students is None and options.arms is None else options.students or 0
    names = [PLAN["students"][number * len(PLAN["students"]) // count] for number in range(count)]
    return found + [Task(name, 0, (PLAN["endpoint"]["budget"],), student=True) for name in names]


def _given(kind: Any, defaults: dict[str, Any], over: dict[str, Any]) -> Any:
    names = {each.name for each in fields(kind)}
    values = {**defaults, **{name: value for name, value in over.items() if name in names}}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def prepare(options: argparse.Namespace, wanted: Sequence[Task]) -> None:
    """Draw the world and extract the features that the runs need, unless that is done; extraction resumes by itself."""
    import corpus
    from arms import ARMS
    from features import READ_FROM, Stores

    work, draw = options.work, options.draw
    world = work / "world"
    if not world.is_dir():
        drawn = work / "world.part"
        shutil.rmtree(drawn, ignore_errors=True)
        corpus.write(drawn, _given(corpus.Size, PLAN["size"], options.size), draw=draw)
        drawn.rename(world)
    budgets = {budget for task in wanted for budget in task.budgets}
    for budget in sorted(budgets | {PLAN["endpoint"]["budget"]}):
        corpus.write_questions(world, budget, draw=draw)
    if any(task.student for task in wanted):
        corpus.write_held_out(world, HELD_OUT, draw=draw)
    stores = {ARMS[task.name].store_of(task.seed) for task in wanted if not task.student}
    made = Stores(work, options.teachers, options.student, options.jobs, draw)
    for store in sorted(store for store in stores if store not in (None, "all.zarr")):
        made.make(store)
    needed = "all.zarr" in stores or any(task.student for task in wanted)
    if read_from := options.read_from or (READ_FROM if needed else {}):
        corpus.write_pictures(world, PLAN["endpoint"]["budget"], draw=draw)
        for store in read_from.values():
            made.make(store, pictures="all.jsonl")


def run(options: argparse.Namespace) -> list[str]:
    """Run what the results lack, some at a time, in the plan's order; say what failed."""
    wanted = tasks(options)
    prepare(options, wanted)
    options.results.mkdir(parents=True, exist_ok=True)
    workplace = Workplace(options.work, options.student, options.size)
    asked = workplace.laboratory().asked(PLAN["endpoint"]["budget"])
    questions = json.dumps(asked, indent=0, sort_keys=True)
    (options.results / QUESTIONS).write_text(questions + "\n", encoding="utf-8")
    measure_stores(options.work, options.student / "vision", options.results, options.read_from)
    missing = workplace.missing(wanted, options.results)
    fresh, todo = set(missing), list(wanted) if options.again else missing
    print(f"{len(wanted)} runs asked for, {len(todo)} to be done", flush=True)
    failed: list[str] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        pending = {pool.submit(workplace.rows, task): task for task in todo}
        for done in concurrent.futures.as_completed(pending):
            task = pending[done]
            if (error := done.exception()) is not None:
                failed.append(f"{task.name}, seed {task.seed}: {type(error).__name__}: {error}")
                print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
                continue
            rows = done.result()
            name = STUDENTS if task.student else RUNS
            append(options.results / (name if task in fresh else REPEATED), rows)
            print(_summary(task, rows), flush=True)
    return failed


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed command would leave runs that nobody reads, on all cores."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure_stores(work: Path, vision: Path, results: Path, read_from: Mapping[str, str]) -> None:
    """Write what features in each form keep, and what the tower and the teacher hold of depth.

    A store is measured once: figures stay beside the stores in `work`. `read_from` names stores that depth is read
    from, where those are not the usual ones.
    """
    from features import READ_FROM, of_all
    from recorded import record

    for name, measure in ((STORES, _stored), (SPREAD, _spread)):
        if measured := _once(work / name, lambda kept, measure=measure: kept | measure(work, kept)):  # type: ignore[misc]
            known = record(results / name)  # what others measured stays
            (results / name).write_text(json.dumps(known | measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    stores = {name: work / of_all(store) for name, store in (read_from or READ_FROM).items()}
    if all(store.with_suffix(".done").is_file() for store in stores.values()):
        import headroom

        budget = PLAN["endpoint"]["budget"]
        room = _once(work / HEADROOM, lambda kept: kept or headroom.measure(work / "world", vision, stores, budget))
        (results / HEADROOM).write_text(json.dumps(room, indent=1) + "\n", encoding="utf-8")


def _once(path: Path, measure: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return what `measure` makes of what the file holds, and keep that in it."""
    from recorded import record

    found = measure(record(path))
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def _spread(work: Path, known: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Say of the targets of each arm of other targets, where they are and not `known`, how much is about the image."""
    import spread
    from arms import ARMS

    found: dict[str, dict[str, float]] = {}
    for arm in (ARMS[name] for name in UNLIKE_TARGETS):
        store = Path(str(arm.store))
        before, each, _ = store.stem.partition("{seed}")
        for done in sorted(work.glob(f"{before}*.done" if each else f"{store.stem}.done")):
            name = done.stem if each else arm.name
            if name not in known and (not each or done.stem.removeprefix(before).isdigit()):
                found[name] = spread.measure(done.with_suffix(".zarr"), arm.teachers[0])
    return found


def _stored(work: Path, known: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Say of the stores that are not `known` how many bytes an image takes, and how near they are to float16's.

    `r2` is centred: 0 is the mean over images, 1 the very features.
    """
    import numpy as np
    from arms import PRECISIONS

    from olaschema.reader import FeatureReader
    from olaschema.store import FeatureStore

    reference = work / "depth.zarr"
    if not reference.is_dir():
        return {}
    truth = FeatureReader(FeatureStore.open(str(reference)), "depth")
    pictures = len((work / "world" / "captions.jsonl").read_text(encoding="utf-8").splitlines())
    found = {}
    for name in ("float16", *PRECISIONS):
        path = reference if name == "float16" else work / f"{name}.zarr"
        if name in known or not path.is_dir():
            continue
        reader = FeatureReader(FeatureStore.open(str(path)), "depth")
        chosen = range(0, pictures, 19)
        one, other = (np.stack([np.asarray(r.feature(n), dtype=np.float64) for n in chosen]) for r in (reader, truth))
        r2 = 1 - ((one - other) ** 2).sum() / ((other - other.mean(axis=0)) ** 2).sum()
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and "_log" not in file.parts)
        found[name] = {"bytes": round(size / pictures), "r2": round(float(r2), 6)}
    return found


@dataclass(frozen=True)
class Workplace:
    """Where runs are made; pickled for the processes that make them."""

    work: Path
    student: Path
    over: dict[str, Any]

    def laboratory(self, tower: Path | None = None) -> Any:
        """Return a laboratory with the shipped tower, or another."""
        from arms import Laboratory, Recipe

        recipe = _given(Recipe, PLAN["recipe"], self.over)
        return Laboratory(self.work, tower or self.student / "vision", self.student / "llm", recipe)

    def missing(self, wanted: Sequence[Task], results: Path) -> list[Task]:
        """Return what is left of tasks: those, and those budgets, whose rows are not there."""
        from arms import ARMS
        from representations import digest, variant

        laboratory = self.laboratory()
        students = {row["config"] for row in read(results / STUDENTS)}
        known = {(row["arm"], row["seed"], row["budget"], row["config"]) for row in read(results / RUNS)}

        def there(task: Task, budget: int) -> bool:
            if task.student:
                return digest(laboratory, variant(task.name), budget) in students
            return (task.name, task.seed, budget, laboratory.digest(ARMS[task.name], budget)) in known

        left = [replace(task, budgets=tuple(b for b in task.budgets if not there(task, b))) for task in wanted]
        return [task for task in left if task.budgets]

    def rows(self, task: Task) -> list[dict[str, Any]]:
        """Do a task, on one core."""
        import torch
        from arms import ARMS
        from representations import measure, variant

        torch.set_num_threads(1)
        if task.student:
            towers = self.work / "towers"
            return [measure(self.laboratory, towers, variant(task.name), task.seed, task.budgets[0])]
        return list(self.laboratory().run(ARMS[task.name], task.seed, list(task.budgets)))


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


def _summary(task: Task, rows: Sequence[dict[str, Any]]) -> str:
    """One line about a run that is done."""
    if task.student:
        found = rows[0]["right"]
        best = max(rows[0]["probe"].values())
        head = f"student {task.name}: probe R² {best:.3f}"
    else:
        first = rows[0]
        found = {f"{row['split']} {row['kind']}": row["right"] for row in rows if row["budget"] == first["budget"]}
        took = f"{first['pretrain_seconds']:.0f} + {first['tune_seconds']:.0f} s"
        head = f"{task.name}, seed {task.seed}, {first['budget']} questions ({took})"
    return f"{head}: " + ", ".join(f"{k} {100 * v.count('1') / len(v):.1f}" for k, v in found.items())


if __name__ == "__main__":
    sys.exit(main())
