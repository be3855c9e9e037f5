from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# the launcher as a process of its own, over ranks that are a line of Python
LAUNCHER = "import sys; from olatrain.launch import launch; sys.exit(launch({ranks}, [sys.executable, '-c', {code!r}]))"
PRELUDE = "import os, sys, time, signal, pathlib\nrank = os.environ['RANK']\n"


def launch(code: str, folder: Path, *, ranks: int = 2) -> subprocess.Popen[str]:
    script = LAUNCHER.format(ranks=ranks, code=PRELUDE + code)
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )  # fmt: skip


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 30
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_are_told_who_they_are_and_only_the_first_is_heard(tmp_path: Path) -> None:
    code = (
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS')\n"
        "pathlib.Path(rank).write_text(' '.join(os.environ[n] for n in names))\nprint('hello from', rank)\n"
        "sys.stderr.write('a warning\\n')"
    )
    out, err = launch(code, tmp_path, ranks=3).communicate(timeout=30)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == [f"{r} {r} 3 127.0.0.1 {threads}" for r in range(3)]
    assert out == "hello from 0\n"
    assert err == "a warning\n"


def test_one_failing_rank_ends_all_and_its_error_is_shown_once(tmp_path: Path) -> None:
    code = (
        "pathlib.Path('up' + rank).touch()\n"
        "if rank == '1':\n"
        "    while not pathlib.Path('up0').exists(): time.sleep(0.01)\n"
        "    sys.stderr.write('error: the disk is full\\n'); sys.exit(2)\n"
        "sys.stderr.write('Traceback: the peer is gone\\n'); sys.stderr.flush()\ntime.sleep(60)"
    )
    process = launch(code, tmp_path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err == "error: the disk is full\n"


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    process = launch("if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)", tmp_path)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 137
    assert "rank 1 was ended by signal 9" in err


def test_sigterm_reaches_every_rank(tmp_path: Path) -> None:
    code = (
        "def stop(*_):\n    pathlib.Path('stopped' + rank).touch()\n"
        "    sys.stderr.write('error: stopped\\n')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path('up' + rank).touch(); time.sleep(60)"
    )
    process = launch(code, tmp_path)
    wait_for(tmp_path, "up0", "up1")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "error: stopped\n"
    wait_for(tmp_path, "stopped0", "stopped1")


def test_ranks_end_with_a_launcher_that_was_killed(tmp_path: Path) -> None:
    code = (
        "from olatrain.launch import end_with_parent\nend_with_parent()\n"
        "pathlib.Path('pid' + rank).write_text(str(os.getpid())); pathlib.Path('up' + rank).touch(); time.sleep(60)"
    )
    process = launch(code, tmp_path)
    wait_for(tmp_path, "up0", "up1")
    process.kill()
    process.wait(30)
    # the ranks held its output open: that it ends shows that they are gone
    process.communicate(timeout=30)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def zombie(pid: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
