"""The command of the toy world's experiment: what it leaves behind, and what it does not do twice."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from toyworld_support import TOYWORLD, load, on_the_path

__all__ = ["on_the_path"]

_POOL = """
import concurrent.futures, multiprocessing, os, sys, time
sys.path.insert(0, {toyworld!r})
import evidence

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=evidence._end_with, initargs=(os.getpid(),)
    ) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


_FOLLOWED = """
import sys
sys.path.insert(0, {toyworld!r})
import features

features.follow([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"])
"""


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_runs_end_with_the_command_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(_POOL.format(toyworld=str(TOYWORLD)))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.kill()
    deadline = time.monotonic() + 20
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(child)


def test_an_extraction_ends_with_the_command_that_is_told_to_end(tmp_path: Path) -> None:
    script = tmp_path / "followed.py"
    script.write_text(_FOLLOWED.format(toyworld=str(TOYWORLD)))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.terminate()
        assert "the same command goes on" in parent.stderr.read()
    assert parent.returncode == 1
    assert not _alive(child)


def test_stores_are_measured_once(tmp_path: Path, monkeypatch: Any) -> None:
    evidence = load("evidence")
    measured: list[dict[str, Any]] = []

    def stored(work: Path, known: dict[str, Any]) -> dict[str, Any]:
        measured.append(dict(known))
        return {} if known else {"float16": {"bytes": 4321, "r2": 1.0}}

    monkeypatch.setattr(evidence, "_stored", stored)
    results = tmp_path / "results"
    results.mkdir()
    (results / evidence.STORES).write_text(json.dumps({"int8": {"bytes": 1, "r2": 0.5}}))
    work = tmp_path / "work"
    work.mkdir()
    for _ in range(2):
        evidence.measure_stores(work, tmp_path / "vision", results, {})
    assert measured == [{}, {"float16": {"bytes": 4321, "r2": 1.0}}]
    told = json.loads((results / evidence.STORES).read_text())
    assert told == {"int8": {"bytes": 1, "r2": 0.5}, "float16": {"bytes": 4321, "r2": 1.0}}, (
        "what others measured stays"
    )
    assert not os.path.exists(results / evidence.HEADROOM), "without a store of all pictures there is none"


def test_every_store_of_unlike_targets_is_described_once(tmp_path: Path, monkeypatch: Any) -> None:
    evidence, spread = load("evidence"), load("spread")
    names = ("map", "map-all", "map-untrained", "map-untrained-10", "map-untrained-10-all", "map-untrained-11", "int8")
    for name in names:
        (tmp_path / f"{name}.done").touch()
    monkeypatch.setattr(spread, "measure", lambda store, teacher: {"store": store.name, "of": teacher})
    found = evidence._spread(tmp_path, {"map-untrained": {}})
    assert found == {
        name: {"store": f"{name}.zarr", "of": "depthmap"} for name in ("map", "map-untrained-10", "map-untrained-11")
    }


def test_a_form_of_another_drawing_has_its_own_folders_and_teachers(tmp_path: Path) -> None:
    evidence = load("evidence")
    asked = {"work": tmp_path / "work", "results": tmp_path / "results"}
    own = evidence._own_place(argparse.Namespace(form="confirmation", teachers=None, **asked))
    assert own.draw > 0
    assert (own.work, own.results) == (tmp_path / "work" / "confirmation", tmp_path / "results" / "confirmation")
    first = evidence._own_place(argparse.Namespace(form="full", teachers=None, **asked))
    assert (first.work, first.results, first.draw) == (asked["work"], asked["results"], 0)
    weights = [path / "depth" / "model.safetensors" for path in (own.teachers, first.teachers)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    given = evidence._own_place(argparse.Namespace(form="confirmation", teachers=tmp_path, **asked))
    assert given.teachers == tmp_path
