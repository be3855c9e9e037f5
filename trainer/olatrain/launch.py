"""Starting N ranks on this machine: one process each, one error shown if one fails, none left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO

_POLL_S = 0.05
# how long ranks may take to notice that one of them is gone, before they are ended
_GRACE_S = 2.0
SUPERVISED = "OLATRAIN_SUPERVISED"


def under_launcher() -> bool:
    """Whether torchrun, or `launch`, started this process as a rank."""
    return "RANK" in os.environ


def launch(nproc: int, command: Sequence[str]) -> int:
    """Run `command` as `nproc` ranks, told apart by torchrun's variables, and return the exit code of the run.

    SIGTERM and Ctrl-C reach every rank, which save and exit. If a rank fails, the others are ended and its error
    output is shown, once. The ranks end when this process does, however it ends.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="olatrain-") as scratch:
        errors = [open(f"{scratch}/{rank}", "w+b") for rank in range(nproc)]  # noqa: SIM115
        ranks = [_start(rank, nproc, port, command, errors[rank]) for rank in range(nproc)]
        previous = {
            number: signal.signal(number, _forward(ranks, number)) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            failed = _wait(ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                rank.wait()
                if rank.stdin is not None:
                    rank.stdin.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
            texts = [_text(file) for file in errors]
    shown = _culprit(failed, texts) if failed else 0
    sys.stderr.write(texts[shown])
    if not failed:
        return 0
    code = ranks[shown].returncode
    if code < 0:
        sys.stderr.write(f"error: rank {shown} was ended by signal {-code}\nRun the same command again to go on.\n")
    return code if code > 0 else 128 - code


def end_with_parent() -> None:
    """In a rank: exit as soon as the process that launched it is gone, even by SIGKILL."""
    if os.environ.get(SUPERVISED):
        threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    while os.read(0, 1):  # nothing is ever written: the pipe ends with its writer
        pass
    os._exit(1)


def _start(rank: int, world: int, port: int, command: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // world))
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        SUPERVISED: "1",
    }
    return subprocess.Popen(
        list(command),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=errors,
        # Ctrl-C is passed on by us: a terminal's own would end the ranks twice
        start_new_session=True,
    )


def _forward(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> Callable[[int, FrameType | None], None]:
    def forward(_number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    return forward


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all have ended, or some time after one has failed; return those that failed unasked, in order."""
    failed: list[int] = []
    deadline = None
    while True:
        codes = [rank.poll() for rank in ranks]
        failed += [place for place, code in enumerate(codes) if code and place not in failed]
        if None not in codes:
            return failed
        if deadline is None and failed:
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return failed
        time.sleep(_POLL_S)


def _culprit(failed: Sequence[int], texts: Sequence[str]) -> int:
    """The rank to report: the first that named its error, else the first to fail; others complain that it is gone."""
    named = [place for place in failed if "error: " in texts[place] and "Traceback" not in texts[place]]
    return (named or failed)[0]


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode(errors="replace")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
