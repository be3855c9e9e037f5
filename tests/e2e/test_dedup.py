"""`dedup`: equal images share a row, every key still has its feature, and sorting stays within its memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from pipeline_support import digests, olapipe
from store_support import fill_shard, record

from olapipe import dedup as dedup_module
from olapipe import forget as forget_module
from olapipe.dedup import shared_rows
from olapipe.progress import make_reporter
from olapipe.sorting import ExternalSort
from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError
from olaschema.keys import tombstone
from olaschema.layout import receipt_file
from olaschema.manifest import SampleRow
from olaschema.place import LocalPlace
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore

# the image under each key; rows 1, 4, 6 and 9 are one image, 2 and 3 another
IMAGES = [0, 1, 2, 2, 1, 5, 1, 7, 8, 1]
FAILED = 7


def _digest(image: int) -> str:
    return f"{image + 1:064x}"


@pytest.fixture(params=["float16", "int8"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    store.add_generation(SampleRow(row=0, key=f"{i}.jpg", uri=f"{i}.jpg", size=9) for i in range(10))
    rng = np.random.default_rng(0)
    for name, grid in (("depth", (3, 3)), ("gen", None)):
        told = record(request.param, teacher=name, grid=grid, channels=70)
        store.put_teacher(told)
        for shard in range(3):
            rows = list(range(shard * 4, min(shard * 4 + 4, 10)))
            features = rng.normal(size=(len(rows), *told.fingerprint.shape)).astype(np.float32)
            failed = tuple(i for i, row in enumerate(rows) if row == FAILED)
            fill_shard(store, told, shard, features, failed=failed, seen=[_digest(IMAGES[row]) for row in rows])
    seal(store, store.teachers())
    return tmp_path / "s"


def _bits(root: Path, teacher: str) -> dict[str, bytes | None]:
    store = FeatureStore.open(root)
    reader = FeatureReader(store, teacher)
    found: dict[str, bytes | None] = {}
    for sample in store.samples():
        status = reader.status(sample.row)
        ok = status is not None and status.status == "ok"
        found[sample.key] = b"".join(a.tobytes() for a in reader.read(sample.row).arrays.values()) if ok else None
    return found


def _sharing(root: Path, teacher: str = "depth") -> dict[int, int]:
    store = FeatureStore.open(root)
    rows = [row for shard in range(3) for row in (store.receipt(teacher, shard) or pytest.fail()).rows]
    return {place: row.same_as for place, row in enumerate(rows) if row.same_as is not None}


def test_equal_images_share_the_first_row(root: Path) -> None:
    before = {name: _bits(root, name) for name in ("depth", "gen")}
    plan = {name: digest for name, digest in digests(root).items() if name.startswith("samples")}
    size = sum(path.stat().st_size for path in root.glob("*/*/c/**/*") if path.is_file())
    result = olapipe("dedup", root)
    assert result.exit_code == 0, result.output
    assert "depth: 4 rows share another one" in result.stdout
    assert _sharing(root) == _sharing(root, "gen") == {3: 2, 4: 1, 6: 1, 9: 1}
    for name, found in before.items():
        after = _bits(root, name)
        assert after == {key: found[f"{IMAGES.index(IMAGES[i])}.jpg"] if i != FAILED else None
                         for i, key in enumerate(found)}  # fmt: skip
        group = zarr.open_group(root, mode="r")[name]
        floats = group["scale" if "scale" in group else "values"][:].astype(np.float32)
        blank = [row for row in range(12) if np.isnan(floats[row]).all()]
        assert blank == [3, 4, 6, 7, 9, 10, 11]
    assert sum(path.stat().st_size for path in root.glob("*/*/c/**/*") if path.is_file()) < size
    assert {name: digest for name, digest in digests(root).items() if name.startswith("samples")} == plan
    assert olapipe("verify", root).exit_code == 0
    done = digests(root)
    again = olapipe("dedup", root)
    assert "depth: 0 rows share another one (4 did before)" in again.stdout
    assert digests(root) == done


class _Killed(Exception):
    pass


def _stop_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    original, calls = LocalPlace.publish, []

    def stopping(place: LocalPlace, name: str, data: bytes) -> None:
        calls.append(name)
        if len(calls) == call:
            raise _Killed
        original(place, name, data)

    monkeypatch.setattr(LocalPlace, "publish", stopping)


@pytest.mark.parametrize("root", ["int8"], indirect=True)
def test_interrupted_at_any_write_a_rerun_finishes_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before every write once, each time going on from what the last one left."""
    whole = root.parent / "whole"
    import shutil

    shutil.copytree(root, whole)
    assert olapipe("dedup", whole).exit_code == 0
    shutil.copytree(whole, root.parent / "forgotten")
    assert olapipe("forget", root.parent / "forgotten", "1.jpg", "--yes").exit_code == 0
    for undisturbed, run in (
        (whole, lambda: dedup_module.dedup(FeatureStore.open(root), make_reporter())),
        (root.parent / "forgotten", lambda: forget_module.forget(FeatureStore.open(root), "1.jpg")),
    ):
        stops = 0
        for call in (3, 1, 2, 4, 3, 5, 2):
            with monkeypatch.context() as patch:
                _stop_at(patch, call)
                try:
                    run()
                except _Killed:
                    stops += 1
        assert stops >= 4
        run()
        assert digests(root) == digests(undisturbed)
        assert olapipe("verify", root).exit_code == 0


def test_the_features_go_with_the_last_key(root: Path) -> None:
    assert olapipe("dedup", root).exit_code == 0
    bits = {name: _bits(root, name)["1.jpg"] for name in ("depth", "gen")}
    keys = ["4.jpg", "1.jpg", "9.jpg", "6.jpg"]  # one that shares, the row itself, the heir's heir, the last
    for gone, key in enumerate(keys, start=1):
        result = olapipe("forget", root, key, "--yes")
        assert result.exit_code == 0, result.output
        for name, before in bits.items():
            found = _bits(root, name)
            assert found[tombstone(key)] is None and key not in found
            assert all(found[left] == before for left in keys[gone:])
        if gone < len(keys):
            assert "the same image is still in the store as" in result.stdout
        assert olapipe("verify", root).exit_code == 0
    text = b"".join(path.read_bytes() for path in root.rglob("*.json") if "_log" not in path.parts)
    assert _digest(1).encode() not in text
    assert _sharing(root) == {3: 2}


def test_verify_and_readers_find_a_row_that_shares_another_image(root: Path) -> None:
    assert olapipe("dedup", root).exit_code == 0
    store = FeatureStore.open(root)
    receipt = store.receipt("depth", 1)
    assert receipt is not None
    for wrong in (5, 6, 3, 7, 400):
        rows = list(receipt.rows)
        rows[0] = rows[0].model_copy(update={"same_as": wrong})
        store.place.publish(receipt_file("depth", 1), sealed(receipt.model_copy(update={"rows": tuple(rows)})))
        result = olapipe("verify", root)
        assert result.exit_code == 1
        assert f"row 4 shares row {wrong}, which has no feature of the same image" in result.stdout
        with pytest.raises(DamagedStoreError, match=f"row 4 of depth shares row {wrong}"):
            FeatureReader(store, "depth").read(4)


def test_new_images_share_old_rows_and_a_merge_keeps_the_sharing(root: Path, tmp_path: Path) -> None:
    assert olapipe("dedup", root).exit_code == 0
    result = olapipe("copy", root, tmp_path / "copy")
    assert result.exit_code == 0, result.output
    other = FeatureStore.create(tmp_path / "other", rows_per_shard=4)
    other.add_generation(SampleRow(row=0, key=f"{i}.png", uri=f"{i}.png", size=9) for i in range(2))
    for name in ("depth", "gen"):
        told = FeatureStore.open(root).teacher(name)
        other.put_teacher(told)
        features = np.random.default_rng(1).normal(size=(2, *told.fingerprint.shape)).astype(np.float32)
        fill_shard(other, told, 0, features, seen=[_digest(1), _digest(99)])
    seal(other, other.teachers())
    for first, second, expected in (
        (root, other.url, {3: 2, 4: 1, 6: 1, 9: 1}),
        (other.url, root, {4 + 3: 4 + 2, 4 + 4: 4 + 1, 4 + 6: 4 + 1, 4 + 9: 4 + 1}),
    ):
        out = tmp_path / f"merged-{min(expected)}"
        result = olapipe("merge", first, second, "--out", out)
        assert result.exit_code == 0, result.output
        store = FeatureStore.open(out)
        rows = [row for s in range(4) for row in (store.receipt("depth", s) or pytest.fail()).rows]
        assert {place: row.same_as for place, row in enumerate(rows) if row.same_as is not None} == expected
        assert _bits(out, "depth") == _bits(root, "depth") | _bits(Path(other.url), "depth")
        assert olapipe("dedup", out).exit_code == 0
        assert olapipe("verify", out).exit_code == 0


def test_sorting_outside_memory_is_sorting(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for count, width, memory in ((0, 5, 100), (7, 3, 1000), (5000, 5, 3000), (5000, 2, 600), (300, 9, 1)):
        folder = tmp_path / f"{count}-{width}"
        folder.mkdir()
        data = rng.integers(0, 4, size=(count, width), dtype=np.uint8)  # with zeros at either end, and repeats
        sorter = ExternalSort(folder, width, memory=memory)
        for part in np.array_split(data, 11):
            sorter.add(part)
        blocks = list(sorter.blocks())
        found = [bytes(row) for block in blocks for row in block]
        assert found == sorted(bytes(row) for row in data)


def _listing(rows: int, images: int) -> Iterator[np.ndarray]:
    """Records of `rows` rows whose images are drawn from `images`; one image is in every tenth row."""
    rng = np.random.default_rng(0)
    names = rng.integers(0, 256, size=(images, 32), dtype=np.uint8)
    for first in range(0, rows, 5000):
        place = np.arange(first, min(first + 5000, rows))
        image = rng.integers(1, images, size=len(place)) * (place % 10 != 0)
        out = np.zeros((len(place), 41), np.uint8)
        out[:, :32] = names[image]
        out[:, 33:] = place.astype(">i8").view(np.uint8).reshape(-1, 8)
        yield out


def test_a_large_listing_stays_within_its_memory_and_has_the_right_pairs(tmp_path: Path) -> None:
    rows, memory = 300_000, 3 << 20  # 12 MB of records
    expected: dict[bytes, int] = {}
    pairs: dict[int, int] = {}
    for block in _listing(rows, 25_000):
        for record_bytes in block:
            name, row = bytes(record_bytes[:32]), int.from_bytes(bytes(record_bytes[33:]))
            if expected.setdefault(name, row) != row:
                pairs[row] = expected[name]
    del expected
    tracemalloc.start()
    try:
        count, wrong, last = 0, 0, -1
        for found in shared_rows(_listing(rows, 25_000), tmp_path, memory):
            for row, target in found.tolist():
                wrong += pairs[row] != target or row <= last
                last = row
            count += len(found)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, wrong) == (len(pairs), 0)
    # the listing itself holds 0.8 MB of names, and pairs are plain numbers of one block at a time
    assert peak < 2.5 * memory, peak
