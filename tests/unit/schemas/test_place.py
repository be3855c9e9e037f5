from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olaschema.errors import StoreError
from olaschema.place import LocalPlace, open_place


def test_publish_replaces_whole_files_and_leaves_no_scratch(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path / "s")
    place.publish("a/b.bin", b"one")
    place.publish("a/b.bin", b"two")
    assert place.read("a/b.bin") == b"two"
    assert place.names("_log/tmp") == []


@pytest.mark.parametrize("name", ["a/b.bin", "b.bin"])
def test_what_cannot_be_written_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"file.*cannot be written") as caught:
        LocalPlace(tmp_path / "file" / "store").publish(name, b"x")
    assert "--out" in caught.value.remedy


def test_buckets_are_refused_with_a_word() -> None:
    with pytest.raises(StoreError, match="s3://bucket/x"):
        open_place("s3://bucket/x")


_WRITER = """
import sys
from olaschema.place import LocalPlace
place = LocalPlace(sys.argv[1])
data = [bytes([i]) * 3_000_000 for i in (1, 2)]
print("ready", flush=True)
while True:
    for block in data:
        place.publish("x.bin", block)
"""


def test_a_killed_writer_leaves_the_old_file_or_the_new_and_scratch_is_swept(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    seen = set()
    left_behind = 0
    for delay in (0.03, 0.05, 0.07, 0.09, 0.11, 0.13):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        if place.exists("x.bin"):
            data = place.read("x.bin")
            assert len(data) == 3_000_000
            assert len(set(data)) == 1
            seen.add(data[0])
        left_behind += len(place.names("_log/tmp"))
        place.sweep()
        assert place.names("_log/tmp") == []
    assert seen
    assert left_behind, "no kill fell inside a write: lengthen the block"


def test_sweep_keeps_the_scratch_of_the_living(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    scratch = place._scratch_file()
    scratch.write_bytes(b"in progress")
    place.sweep()
    assert scratch.exists()


def _hold(root: str, held: multiprocessing.synchronize.Event, release: multiprocessing.synchronize.Event) -> None:
    with LocalPlace(root).lock("depth-00000"):
        held.set()
        release.wait(20)


def test_a_lock_excludes_other_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), held, release))
    process.start()
    assert held.wait(20)
    waiter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from olaschema.place import LocalPlace\nwith LocalPlace({str(tmp_path)!r}).lock('depth-00000'): pass",
        ],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(1.5)
    release.set()
    assert waiter.wait(20) == 0
    process.join(20)
    process.close()
