"""Images that kill the process, teachers that run out of memory, too many failures, signals: on a real cluster."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from cluster_support import Nodes, control, finish, nodes, start
from pipeline_support import digests, image_bytes, olapipe, write_images

__all__ = ["nodes"]


def _failures(out: Path) -> dict[str, str]:
    found = json.loads(olapipe("inspect", out, "--json").stdout)["teachers"]["faulty"]
    return {failure["key"]: failure["reason"] for failure in found["failures"]}


def test_images_that_kill_a_worker_or_break_the_teacher_are_recorded_and_all_others_finish(
    nodes: Nodes, tmp_path: Path
) -> None:
    corpus, out = tmp_path / "c", tmp_path / "s"
    write_images(corpus, *(f"{index:02d}.png" for index in range(16)))
    (corpus / "05.png").write_bytes(image_bytes(50, (41, 20)))
    digest = {name: hashlib.sha256((corpus / name).read_bytes()).hexdigest() for name in ("05.png", "09.png", "13.png")}
    broken = {"segv_width": 41, "segv": [digest["09.png"]], "raises": [digest["13.png"]]}
    settings = ("--shard-size", 8, "--batch-size", 4, "--workers", 2)
    process = start(nodes, corpus, out, control(tmp_path / "faulty", **broken), *settings)
    output = finish(process)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert _failures(out) == {"05.png": "crashed", "09.png": "crashed", "13.png": "teacher-failed"}
    values = zarr.open_group(out, mode="r")["faulty/values"]
    filled = [row for row in range(16) if not np.isnan(np.asarray(values[row], dtype=np.float32)).any()]
    assert filled == [row for row in range(16) if row not in (5, 9, 13)]

    # the images are innocent once the teacher is mended
    process = start(nodes, corpus, out, control(tmp_path / "mended" / "faulty"), *settings, "--retry-failed")
    output = finish(process)
    assert process.returncode == 0, output
    assert _failures(out) == {}


def test_a_batch_that_does_not_fit_is_halved_and_named(nodes: Nodes, tmp_path: Path) -> None:
    corpus, out = tmp_path / "c", tmp_path / "s"
    write_images(corpus, *(f"{index:02d}.png" for index in range(10)))
    checkpoint = control(tmp_path / "faulty", fits=3, batch_sensitive=True)
    process = start(nodes, corpus, out, checkpoint, "--shard-size", 8, "--batch-size", 8, "--precision", "float32")
    output = finish(process)
    assert process.returncode == 0, output
    assert "faulty: the batch did not fit the device in 1 shards (0)" in output and "--batch-size 2" in output
    values: Any = zarr.open_group(out, mode="r")["faulty/values"]
    assert [int(values[row][0, 0, 3]) for row in range(10)] == [2] * 10
    shown = json.loads(olapipe("inspect", out, "--json").stdout)["teachers"]["faulty"]
    assert shown["batch_sizes"] == {"2": 1, "8": 1}


def test_too_many_failures_stop_the_job_and_signals_finish_what_is_in_flight(nodes: Nodes, tmp_path: Path) -> None:
    corpus, out = tmp_path / "c", tmp_path / "s"
    write_images(corpus, *(f"{index:02d}.png" for index in range(30)))
    for index in (0, 2, 3, 5):
        (corpus / f"{index:02d}.png").write_bytes(b"broken")
    settings = ("--shard-size", 1, "--batch-size", 1, "--workers", 1)
    checkpoint = control(tmp_path / "faulty", wait=0.2)
    process = start(nodes, corpus, out, checkpoint, *settings, "--max-failures", "10%")
    output = finish(process)
    assert process.returncode == 3, output
    assert "--max-failures 10%" in output and "not-an-image: 4" in output
    done = len(list((out / "receipts" / "faulty").iterdir()))
    assert 6 <= done <= 9

    process = start(nodes, corpus, out, checkpoint, *settings)
    while len(list((out / "receipts" / "faulty").iterdir())) < done + 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 143, output
    assert "what is in flight is finished first" in output and "Run the same command again to go on" in output
    assert "SIGTERM received" not in output and "Traceback" not in output
    last = [json.loads(line) for line in (out / "_log" / "timings.jsonl").read_text().splitlines()]
    assert len(last) == len(list((out / "receipts" / "faulty").iterdir())) < 30
    notes = json.loads(olapipe("status", out, "--json").stdout)
    assert [note["state"] for note in notes["jobs"]] == ["stopped by SIGTERM", "stopped by --max-failures"]

    process = start(nodes, corpus, out, control(tmp_path / "fast" / "faulty"), *settings)
    assert finish(process) and process.returncode == 0
    whole = tmp_path / "whole"
    process = start(nodes, corpus, whole, control(tmp_path / "fast" / "faulty"), *settings)
    assert finish(process) and process.returncode == 0
    assert digests(out) == digests(whole)


def test_a_thousand_images_with_five_percent_bad_ones_of_every_kind(nodes: Nodes, tmp_path: Path) -> None:
    corpus, out = tmp_path / "c", tmp_path / "s"
    write_images(corpus, *(f"{index:04d}.png" for index in range(1000)), size=(12, 9))
    expected: dict[str, str] = {}
    reasons = ["empty", "not-an-image", "truncated", "too-large", "missing"] * 9
    for index, reason in enumerate(reasons):
        name = f"{index * 21:04d}.png"
        path = corpus / name
        data = path.read_bytes()
        path.unlink()
        if reason == "missing":
            path.symlink_to("nowhere.png")
        else:
            path.write_bytes(
                {
                    "empty": b"",
                    "not-an-image": b"text",
                    "truncated": data[:60],
                    "too-large": image_bytes(0, (1100, 1000)),
                }[reason]
            )
        expected[name] = reason
    for index in range(5):
        (corpus / os.fsdecode(b"caf\xe9-%d.png" % index)).write_bytes(image_bytes(index, (12, 9)))
        expected[f"./caf\\xe9-{index}.png"] = "bad-name"
    assert len(expected) == 50
    process = start(nodes, corpus, out, control(tmp_path / "faulty"), "--shard-size", 64, "--max-megapixels", 1)
    output = finish(process)
    assert process.returncode == 0, output
    assert _failures(out) == expected
    shown = json.loads(olapipe("inspect", out, "--json").stdout)["teachers"]["faulty"]
    assert shown["images"] == {"planned": 1005, "ok": 955, "failed": 50, "waiting": 0}
