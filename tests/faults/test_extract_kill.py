"""Kill anything at any moment and rerun: the store is the one of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_support import depth_arguments, digests, olapipe, ray_session, start_olapipe, write_images
from worker_support import own_workers

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]

COUNT = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder, *(f"{index:02d}.png" for index in range(COUNT)), size=(60, 45))
    (folder / "03.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "s"
    assert olapipe(*_arguments(corpus, out)).exit_code == 0
    return digests(out)


def _arguments(corpus: Path, out: Path, workers: int = 1) -> list[str]:
    return depth_arguments(corpus, out, "--shard-size", 1, "--batch-size", 2, "--workers", workers)


def _receipts(out: Path) -> int:
    return len(list((out / "receipts" / "depth").glob("*.json")))


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the command does not get on"
        time.sleep(0.005)


def _kill(process: subprocess.Popen[str], number: signal.Signals) -> str:
    os.killpg(process.pid, number)
    return process.communicate(timeout=300)[0]


def test_sigkill_and_sigint_at_random_moments_change_no_byte(
    corpus: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    # counted in finished shards, so that a fast machine is stopped halfway too, then a random moment of a shard
    moments = [(random.randint(1, 12), random.uniform(0, 0.03)), (random.randint(1, 6), random.uniform(0, 0.03))]
    out = tmp_path / "s"

    process = start_olapipe(*_arguments(corpus, out, 2))
    _wait_until(lambda: _receipts(out) >= moments[0][0], process)
    time.sleep(moments[0][1])
    _kill(process, signal.SIGKILL)
    assert _receipts(out) < COUNT, "it was stopped halfway"
    workers = {json.loads(line)["pid"] for line in (out / "_log" / "timings.jsonl").read_text().splitlines()}
    _wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    first = _receipts(out)
    # what a writer that was killed in the middle of a file leaves behind
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = out / "_log" / "tmp" / f"{os.uname().nodename}-{dead.pid}-{'0' * 16}"
    stale.write_bytes(b"half a shard")

    process = start_olapipe(*_arguments(corpus, out, 2))
    _wait_until(lambda: _receipts(out) >= first + moments[1][0], process)
    time.sleep(moments[1][1])
    output = _kill(process, signal.SIGINT)
    assert process.returncode == 130, output
    assert "Run the same command again to go on" in output
    assert "Traceback" not in output
    assert not stale.exists()

    result = olapipe(*_arguments(corpus, out, 2))
    assert result.exit_code == 0, result.output
    assert f"depth: {COUNT}/{COUNT} images" in result.output and "Traceback" not in result.output
    assert digests(out) == undisturbed, f"stopped {moments} (receipts, seconds) after the start"
    assert list((out / "_log" / "tmp").iterdir()) == []


def test_a_worker_that_dies_is_replaced_and_its_shard_done_again(
    corpus: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    log = out / "_log" / "timings.jsonl"
    killed: list[int] = []

    def kill_the_first_worker() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if log.exists() and log.read_text().endswith("\n"):
                killed.append(json.loads(log.read_text().splitlines()[0])["pid"])
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_the_first_worker)
    thread.start()
    with own_workers():
        result = olapipe(*_arguments(corpus, out))
    thread.join()
    assert killed
    assert result.exit_code == 0, result.output
    assert digests(out) == undisturbed
    pids = {json.loads(line)["pid"] for line in log.read_text().splitlines()}
    assert len(pids) == 2
