"""Kill a packing at any moment and rerun: the set is the one of an undisturbed run, whichever command writes it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_support import depth_arguments, digests, olapipe, ray_session, start_olapipe, write_images
from trainer_support import conversation, make_images, make_store, write_json

__all__ = ["ray_session"]


def killed_after(process: subprocess.Popen[str], out: Path, tars: int, finished: Callable[[], bool]) -> None:
    """Kill a whole process group at a random moment after so many tars are committed, before the set is finished."""
    deadline = time.monotonic() + 300
    while len(list(out.glob("0*.json"))) < tars:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the command does not get on"
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.01))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert not finished(), "it was stopped halfway"


def test_sigkill_while_packing(tmp_path: Path) -> None:
    count = 60
    keys = make_images(tmp_path / "images", count)
    make_store(tmp_path / "s", tmp_path / "images", keys, rows_per_shard=1)
    write_json(tmp_path / "c.json", [conversation(key, f"about {key}") for key in keys])
    about = ("--conversations", tmp_path / "c.json", "--images", tmp_path / "images", "--out")
    assert olapipe("pack", tmp_path / "s", *about, tmp_path / "whole").exit_code == 0
    out = tmp_path / "p"
    for tars in (random.randint(1, 10), random.randint(20, 30)):
        process = start_olapipe("pack", tmp_path / "s", *about, out)
        killed_after(process, out, tars, (out / "packed.json").exists)
    kept = len(list(out.glob("0*.json")))
    done = olapipe("pack", tmp_path / "s", *about, out)
    assert done.exit_code == 0, done.output
    assert f"{count - kept} of them written now" in done.output
    assert digests(out) == digests(tmp_path / "whole")
    assert not list((out / "_log/tmp").iterdir())


@pytest.mark.usefixtures("ray_session")
def test_sigkill_while_extracting_into_tars(tmp_path: Path) -> None:
    write_images(tmp_path / "images", *(f"{index:02d}.png" for index in range(16)), size=(60, 45))
    settings = ("--shard-size", 1, "--batch-size", 1)
    assert olapipe(*depth_arguments(tmp_path / "images", tmp_path / "s", *settings, "--workers", 1)).exit_code == 0
    assert olapipe("pack", tmp_path / "s", "--images", tmp_path / "images", "--out", tmp_path / "whole").exit_code == 0
    out = tmp_path / "p"
    arguments = depth_arguments(tmp_path / "images", out, *settings, "--format", "webdataset", "--workers", 2)
    killed_after(start_olapipe(*arguments), out, random.randint(1, 6), (out / "packed.json").exists)
    done = olapipe(*arguments)
    assert done.exit_code == 0, done.output
    assert digests(out) == digests(tmp_path / "whole")
    assert not list((out / "_log/store").glob("depth/*/c/*"))
