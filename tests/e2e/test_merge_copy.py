"""`merge` and `copy`: what comes out holds every feature bit for bit, verified, whenever it was interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from pipeline_support import digests, olapipe, start_olapipe
from store_support import fill_shard, record

from olapipe import merge as merge_module
from olaschema.keys import tombstone
from olaschema.manifest import SampleRow
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore


def _store(
    root: Path,
    keys: list[str],
    *,
    rows: int = 4,
    precision: str = "float16",
    teachers: tuple[str, ...] = ("depth",),
    failed: tuple[str, ...] = (),
    seed: int = 0,
    digest: str = "",
    **changes: object,
) -> FeatureStore:
    """A finished store whose image under a key has the digest of that key, and features of its own."""
    store = FeatureStore.create(root, rows_per_shard=rows)
    store.add_generation(SampleRow(row=0, key=key, uri=key, size=len(key)) for key in keys)
    rng = np.random.default_rng(seed)
    for name in teachers:
        told = record(precision, teacher=name, channels=70, **changes)  # type: ignore[arg-type]
        store.put_teacher(told)
        for shard in range(store.shard_count()):
            names = [sample.key for sample in store.shard_samples(shard)]
            features = rng.normal(size=(len(names), *told.fingerprint.shape)).astype(np.float32)
            seen = [f"{digest}{key}".encode().hex().ljust(64, "0")[:64] for key in names]
            fill_shard(
                store, told, shard, features, failed=tuple(i for i, n in enumerate(names) if n in failed), seen=seen
            )
    seal(store, store.teachers())
    return store


def _features(store: FeatureStore, teacher: str = "depth") -> dict[str, dict[str, bytes] | str | None]:
    """By key the stored bytes, or why there are none."""
    reader = FeatureReader(store, teacher)
    found: dict[str, dict[str, bytes] | str | None] = {}
    for sample in store.samples():
        status = reader.status(sample.row)
        if status is None or status.status != "ok":
            found[sample.key] = None if status is None else status.reason
        else:
            found[sample.key] = {name: array.tobytes() for name, array in reader.read(sample.row).arrays.items()}
    return found


def _keys(first: int, last: int) -> list[str]:
    return [f"{i:03d}.jpg" for i in range(first, last)]


@pytest.mark.parametrize("precision", ["float16", "int4"])
@pytest.mark.parametrize(("first", "rows"), [(10, 4), (7, 4), (8, 3)], ids=["disjoint", "overlap", "other shards"])
def test_a_merge_has_every_feature_bit_for_bit(tmp_path: Path, precision: str, first: int, rows: int) -> None:
    a = _store(tmp_path / "a", _keys(0, 10), precision=precision, failed=("001.jpg",))
    b = _store(tmp_path / "b", _keys(first, 19), precision=precision, rows=rows, seed=1, failed=("015.jpg",))
    before = digests(tmp_path / "a") | digests(tmp_path / "b")
    result = olapipe("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "a") | digests(tmp_path / "b") == before
    c = FeatureStore.open(tmp_path / "c")
    assert [sample.key for sample in c.samples()] == _keys(0, 19)
    assert _features(c) == _features(b) | _features(a)
    assert ("3 shards as they were" in result.stdout) == (first != 10 or rows != 4)
    verified = olapipe("verify", tmp_path / "c", "--json")
    assert json.loads(verified.stdout)["problems"] == json.loads(verified.stdout)["notes"] == []
    # and plain zarr reads the same, NaN where there is nothing
    group = zarr.open_group(tmp_path / "c", mode="r")["depth"]
    for sample in c.samples():
        bits = _features(c)[sample.key]
        if isinstance(bits, dict):
            assert {name: array[sample.row].tobytes() for name, array in group.arrays()} == bits


def test_a_taken_and_a_rebuilt_shard_differ_in_nothing_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = _store(tmp_path / "a", _keys(0, 7), precision="int8")
    b = _store(tmp_path / "b", _keys(7, 16), precision="int8", seed=1)
    assert olapipe("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "taken").exit_code == 0
    monkeypatch.setattr(merge_module._Teacher, "_take", lambda *_: False)
    assert olapipe("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "rebuilt").exit_code == 0
    taken, rebuilt = digests(tmp_path / "taken"), digests(tmp_path / "rebuilt")
    # statistics of the rebuilt ones are those of the stored values
    assert {name for name in taken if taken[name] != rebuilt[name]} == {
        "manifest.json", *(f"receipts/depth/{i:05d}.json" for i in range(5))
    }  # fmt: skip
    assert taken.keys() == rebuilt.keys()
    assert _features(FeatureStore.open(tmp_path / "rebuilt")) == _features(a) | _features(b)


def test_a_feature_in_the_wrong_row_is_found_though_the_store_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _store(tmp_path / "a", _keys(0, 6))
    _store(tmp_path / "b", _keys(5, 10), seed=1)
    right = merge_module._Teacher._rebuild
    monkeypatch.setattr(
        merge_module._Teacher, "_rebuild", lambda self, shard, rows, told: right(self, shard, rows[::-1], told)
    )
    result = olapipe("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert result.exit_code == 1
    assert "of depth is not that of its source" in result.stderr
    assert not (tmp_path / "c" / "zarr.json").exists()


def test_teachers_of_both_and_a_feature_that_only_the_second_has(tmp_path: Path) -> None:
    a = _store(tmp_path / "a", _keys(0, 8), failed=("002.jpg",))
    b = _store(tmp_path / "b", _keys(2, 10), teachers=("depth", "seg"), seed=1)
    result = olapipe("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    c = FeatureStore.open(tmp_path / "c")
    expected = _features(b) | _features(a)
    expected["002.jpg"] = _features(b)["002.jpg"]
    assert _features(c) == expected
    # rows 0 and 1 have no seg, so their shard is not extracted: said, not invented
    assert "seg: 2 features are left out" in result.stdout
    seg, theirs = _features(c, "seg"), _features(b, "seg")
    assert [key for key in seg if seg[key] is None] == _keys(0, 4)
    assert all(seg[key] == theirs[key] for key in _keys(4, 10))


def test_conflicts_are_refused_by_name(tmp_path: Path) -> None:
    _store(tmp_path / "a", _keys(0, 5))
    for name, more, words in (
        ("other", {"digest": "x"}, "003.jpg is one image in"),
        ("tier", {"precision": "int8"}, "float16, and as int8"),
        ("meaning", {"weights": "v"}, "weights"),
    ):
        _store(tmp_path / name, _keys(3, 7), **more)  # type: ignore[arg-type]
        result = olapipe("merge", tmp_path / "a", tmp_path / name, "--out", tmp_path / "out")
        assert result.exit_code == 1
        assert words in result.stderr
        assert not (tmp_path / "out" / "zarr.json").exists()
    assert olapipe("merge", tmp_path / "a", "--out", tmp_path / "out").exit_code == 2
    _store(tmp_path / "new", _keys(0, 5), precision="int8")
    _store(tmp_path / "old", _keys(5, 7), precision="int8", centred=False)
    result = olapipe("merge", tmp_path / "new", tmp_path / "old", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "not in all with offsets" in result.stderr


def test_shards_of_another_zstd_level_are_compressed_again(tmp_path: Path) -> None:
    """So the bytes of the result are those that a repair would write."""
    _store(tmp_path / "old", _keys(0, 4), zstd_level=3)
    _store(tmp_path / "new", _keys(4, 8), zstd_level=1, seed=1)
    result = olapipe("merge", tmp_path / "old", tmp_path / "new", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 shards as they were, 1 put together" in result.output
    target = FeatureStore.open(tmp_path / "out")
    assert target.teacher("depth").zstd_level == 3
    assert olapipe("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("forgetful", ["a", "b"])
def test_what_one_has_forgotten_the_merge_has(tmp_path: Path, forgetful: str) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        _store(tmp_path / name, _keys(0, 6), seed=seed)
    assert olapipe("forget", tmp_path / forgetful, "003.jpg", "--yes").exit_code == 0
    result = olapipe("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c")
    assert result.exit_code == 0, result.output
    found = _features(FeatureStore.open(tmp_path / "c"))
    assert found[tombstone("003.jpg")] == "forgotten"
    assert "003.jpg" not in found and len(found) == 6
    assert olapipe("verify", tmp_path / "c").exit_code == 0


def test_a_damaged_source_makes_no_store(tmp_path: Path) -> None:
    _store(tmp_path / "a", _keys(0, 6))
    _store(tmp_path / "b", _keys(6, 9), seed=1)
    path = tmp_path / "a/depth/values/c/1/0/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for arguments in (("copy", tmp_path / "a"), ("merge", tmp_path / "a", tmp_path / "b", "--out")):
        result = olapipe(*arguments, tmp_path / "out")
        assert result.exit_code == 1
        assert "depth/values/c/1/0/0/0" in result.stderr
        assert not (tmp_path / "out" / "zarr.json").exists()
        shutil.rmtree(tmp_path / "out")


def test_a_copy_is_the_same_bytes_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    _store(tmp_path / "a", _keys(0, 9), precision="int4", teachers=("depth", "seg"))
    result = olapipe("copy", tmp_path / "a", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "c") == digests(tmp_path / "a")
    again = olapipe("copy", tmp_path / "a", tmp_path / "c")
    assert again.exit_code == 0 and "of them were there already" in again.stdout
    assert olapipe("forget", tmp_path / "c", "001.jpg", "--yes").exit_code == 0
    changed = digests(tmp_path / "c")
    assert olapipe("copy", tmp_path / "a", tmp_path / "c").exit_code == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    assert olapipe("copy", tmp_path / "a", tmp_path / "full").exit_code == 1
    assert olapipe("merge", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "full").exit_code == 1
    assert digests(tmp_path / "c") == changed
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


@pytest.mark.parametrize("command", ["merge", "copy"])
def test_killed_and_run_again_it_is_what_an_undisturbed_run_gives(tmp_path: Path, command: str) -> None:
    _store(tmp_path / "a", _keys(0, 99), rows=2, grid=None)
    _store(tmp_path / "b", _keys(75, 150), rows=2, grid=None, seed=1)
    sources = [tmp_path / "a", tmp_path / "b", "--out"] if command == "merge" else [tmp_path / "a"]
    assert olapipe(command, *sources, tmp_path / "whole").exit_code == 0
    out = tmp_path / "killed"
    receipts = out / "receipts/depth"
    stopped = 0
    for wanted in (1, 20):
        process = start_olapipe(command, *sources, out)
        try:
            while process.poll() is None and not (receipts.is_dir() and len(os.listdir(receipts)) >= wanted):
                time.sleep(0.002)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        finally:
            process.communicate(timeout=300)
        if process.returncode == -signal.SIGKILL and not (out / "zarr.json").exists():
            stopped += 1
            assert olapipe("inspect", out).exit_code == 1, "no store before it is complete"
    assert stopped, "the command was never stopped halfway"
    result = subprocess.run(
        [*start_arguments(command), *map(str, sources), str(out)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert digests(out) == digests(tmp_path / "whole")


def start_arguments(command: str) -> list[str]:
    import sys

    return [sys.executable, "-m", "olapipe", command]
