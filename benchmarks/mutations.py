"""Does a test fail when the trainer is wrong? Breaks a copy of it, one place at a time, and runs the tests named here.

    python benchmarks/mutations.py --out benchmarks/results/mutations.json

Each mutation is a mistake that trains without an error: its tests pass on the code as it is, and must fail on the
mutant. Exits 1 where one survives, or where its place is no longer in the code. Every mutant is a process of its own,
in a copy of the packages and the tests; the checkout is not touched.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One mistake: what stands in a file of `trainer/olatrain`, what in its place, and who must notice."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


E2E = ("tests/parity/test_e2e.py",)
MUTATIONS = (
    Mutation(
        "mask: items without a target are counted", "losses.py",
        "\n    return Sum(torch.where(valid, per_item, 0.0).sum(), valid.sum())",
        "\n    return Sum(per_item.sum(), valid.sum())",
        ("tests/unit/test_losses.py", "-k", "masked"),
    ),
    Mutation(
        "order of teachers: sorted by name", "convert.py",
        'teachers = tuple(str(settings["aux_mode"]).split("-"))',
        'teachers = tuple(sorted(str(settings["aux_mode"]).split("-")))',
        E2E,
    ),
    Mutation(
        "layer off by one", "student.py",
        "module = self.norm if last else self.layers[layer - 1]",
        "module = self.norm if last else self.layers[max(layer - 2, 0)]",
        E2E,
    ),
    Mutation(
        "missing gather: negatives of its own rank alone", "parallel.py",
        'size = {"world": world,', 'size = 1 or {"world": world,',
        ("tests/e2e/test_train.py", "-k", "two_ranks_then_one"),
    ),
    Mutation(
        "text leak: predictors told to stop at the prompt read the answer", "tokens.py",
        '        if mode == "all":\n', '        if mode != "image":\n',
        ("tests/unit/test_predictors.py", "-k", "only_what_the_context_allows"),
    ),
    Mutation(
        "latents in place of means: the first of each group", "student.py",
        "-1, vectors.shape[1]).mean(dim=1))", "-1, vectors.shape[1])[:, 0])",
        E2E,
    ),
    Mutation(
        "positions shifted by one token", "predictors.py",
        "return states[items.sample.unsqueeze(1), places]", "return states[items.sample.unsqueeze(1), places - 1]",
        E2E,
    ),
    Mutation(
        "empty passes left out: a rank without samples does not join a split model", "step.py",
        "more = ranks.most(len(micros)) - len(micros) if is_sharded(learner.student.model) else 0", "more = 0",
        ("tests/e2e/test_stages.py", "-k", "split_language_model and lora1"),
    ),
    Mutation(
        "gradient accumulation: every micro-batch is compared with the first one's targets", "step.py",
        "        first += len(micro.items)\n", "",
        ("tests/e2e/test_stages.py", "-k", "accumulated"),
    ),
    Mutation(
        "feed: every micro-batch gets the first one's features", "step.py",
        "found.part(first, len(micro.items))", "found.part(0, len(micro.items))",
        ("tests/e2e/test_feed.py", "-k", "stand_behind"),
    ),
    Mutation(
        "ConvNeXT: layer norms with transformers' epsilon", "convnext.py",
        "THEIR_EPSILON = 1e-6", "THEIR_EPSILON = 1e-5",
        ("tests/parity/test_import_convnext.py", "-k", "timm_does"),
    ),
)  # fmt: skip


def copy_into(folder: Path) -> None:
    """Copy what the tests need."""
    for name in ("schemas", "pipeline", "trainer", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, tests: tuple[str, ...]) -> dict[str, Any]:
    """Run pytest in a copy: whether it failed, in which tests, and the last thing it said about why."""
    paths = os.pathsep.join(str(folder / name) for name in ("schemas", "pipeline", "trainer"))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failed = re.findall(r"^FAILED (\S+)", done.stdout, flags=re.MULTILINE)
    reasons = re.findall(r"^E +(\S.*)$", done.stdout, flags=re.MULTILINE)
    if done.returncode not in (0, 1):
        sys.exit(f"pytest could not run {tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {
        "passed": done.returncode == 0,
        "failed": sorted({name.partition("[")[0] for name in failed}),
        "reason": reasons[0][:200] if reasons else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def try_one(mutation: Mutation, scratch: Path) -> dict[str, Any]:
    """Break a fresh copy and run its tests."""
    folder = scratch / "mutant"
    copy_into(folder)
    path = folder / "trainer/olatrain" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.before) != 1:
        sys.exit(f"{mutation.name}: its place stands {text.count(mutation.before)} times in {mutation.file}")
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    found = run_tests(folder, mutation.tests)
    shutil.rmtree(folder)
    return {"mutation": mutation.name, "file": mutation.file, "tests": " ".join(mutation.tests), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="mutations whose name holds this")
    given = parser.parse_args()
    chosen = [one for one in MUTATIONS if given.only is None or given.only in one.name]
    results = []
    with tempfile.TemporaryDirectory(prefix="ola-mutations-") as scratch:
        whole = Path(scratch) / "whole"
        copy_into(whole)
        baseline = {tests: run_tests(whole, tests) for tests in dict.fromkeys(one.tests for one in chosen)}
        broken = [" ".join(tests) for tests, found in baseline.items() if not found["passed"]]
        if broken:
            sys.exit(f"these fail without any mutation: {broken}")
        for mutation in chosen:
            found = try_one(mutation, Path(scratch))
            results.append(found)
            print("SURVIVES" if found["passed"] else "fails", mutation.name, found["failed"], found["reason"])
    if given.out is not None:
        report = {
            "question": "does a test fail when the trainer is wrong?",
            "baseline": "every test named passes on the code as it is",
            "mutations": [{k: v for k, v in one.items() if k != "passed"} for one in results],
            "survived": [one["mutation"] for one in results if one["passed"]],
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers")},
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        }
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if any(one["passed"] for one in results) else 0)


if __name__ == "__main__":
    main()
