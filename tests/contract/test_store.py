"""The store through its own code and through plain zarr: both must tell the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from store_support import DOCS, EXECUTION, decoding, fill_shard, images, make_store, record

from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError, FingerprintError, StoreError
from olaschema.layout import chunk_rows, receipt_file, shard_file
from olaschema.manifest import ChannelStatistics, Precision, RowReceipt
from olaschema.precision import Stored, encode
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

TIERS = pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])


def _files(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.relative_to(root).parts[0] != "_log"
    }


def _through_zarr(root: Path, teacher: str = "depth") -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open_group(root, mode="r")[teacher].arrays()}


def _decoded(arrays: dict[str, np.ndarray], channels: int) -> np.ndarray:
    """By the line that the docs give for the precision, told by the dtype."""
    dtype = str(arrays["values"].dtype)
    return decoding(DOCS, {"uint8": "int4"}.get(dtype, dtype))(channels=channels, **arrays)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.sampled_from([None, (1, 1), (3, 2), (24, 24)]),
    channels=st.sampled_from([1, 5, 64, 129]),
    rows=st.sampled_from([1, 3, 8]),
    count=st.integers(1, 17),
    precision=st.sampled_from(["float16", "float32", "int8", "int4"]),
)
def test_our_reader_and_plain_zarr_agree(
    tmp_path_factory: pytest.TempPathFactory,
    grid: tuple[int, int] | None,
    channels: int,
    rows: int,
    count: int,
    precision: Precision,
) -> None:
    root = tmp_path_factory.mktemp("store") / "s"
    _, _, features = make_store(
        root, count=count, rows_per_shard=rows, precision=precision, grid=grid, channels=channels
    )
    through_zarr = _through_zarr(root)
    np.testing.assert_array_equal(_decoded(through_zarr, channels), features)
    reader = FeatureReader(FeatureStore.open(root), "depth")
    for row in range(count):
        stored = reader.read(row).arrays
        assert stored.keys() == through_zarr.keys()
        for name, array in stored.items():
            assert array.dtype == through_zarr[name].dtype
            np.testing.assert_array_equal(array, through_zarr[name][row])
        np.testing.assert_array_equal(reader.feature(row), features[row])
    assert np.isnan(features[count:]).all()


@TIERS
def test_rows_without_a_feature_are_nan_to_zarr_and_refused_by_us(tmp_path: Path, precision: Precision) -> None:
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    store.add_generation(images(6))
    teacher = record(precision)
    store.put_teacher(teacher)
    fill_shard(store, teacher, 0, np.ones((4, 3, 3, 5), np.float32), failed=(2,))
    array = _decoded(_through_zarr(tmp_path / "s"), 5)
    assert array.shape == (8, 3, 3, 5)
    assert np.isfinite(array[[0, 1, 3]]).all()
    assert np.isnan(array[2]).all()  # failed
    assert np.isnan(array[4:]).all()  # shard not written yet
    reader = FeatureReader(store, "depth")
    assert reader.status(2) == RowReceipt(status="failed", reason="truncated", detail="cut short")
    assert reader.status(4) is None
    for row in (2, 4):
        with pytest.raises(StoreError, match=f"row {row} has no depth feature"):
            reader.read(row)


@TIERS
def test_growth_starts_at_a_shard_boundary_and_rewrites_nothing(tmp_path: Path, precision: Precision) -> None:
    root = tmp_path / "s"
    store, teacher, _ = make_store(root, count=6, precision=precision)
    arrays = ["offset", "scale", "values"] if precision.startswith("int") else ["values"]
    before = _files(root)
    store.add_generation(images(3, start=6))
    store.put_teacher(teacher)
    fill_shard(store, teacher, 2, np.ones((3, 3, 3, 5), np.float32))
    after = _files(root)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"depth/{name}/zarr.json" for name in arrays}  # their shapes
    shapes = {name: zarr.open_group(root, mode="r")[f"depth/{name}"].shape[:3] for name in arrays}
    assert shapes == {name: (12, 5) if name == "offset" else (12, 3, 3) for name in arrays}
    assert [row.row for row in store.samples()] == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert [row.key for row in store.shard_samples(2)] == ["0006.jpg", "0007.jpg", "0008.jpg"]
    assert [row.row for row in store.shard_samples(1)] == [4, 5]


def test_plans_larger_than_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olaschema.store._PART_ROWS", 10)
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    store.add_generation(images(19))
    assert len(store.generations()[0].parts) == 3  # 8 rows each
    assert [r.key for r in store.samples()] == [f"{i:04d}.jpg" for i in range(19)]
    assert [[r.row for r in store.shard_samples(s)] for s in range(5)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18],
    ]  # fmt: skip
    with pytest.raises(StoreError, match="no shard 5"):
        store.shard_samples(5)


def test_the_same_plan_is_the_same_bytes_and_an_interrupted_longer_one_leaves_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        FeatureStore.create(tmp_path / name, rows_per_shard=4)
    (tmp_path / "b/samples").mkdir()
    (tmp_path / "b/samples/0000-00007.parquet").write_bytes(b"left by a run that was killed")
    for name in ("a", "b"):
        FeatureStore.open(tmp_path / name).add_generation(images(9))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_an_empty_plan_adds_no_generation(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s")
    assert store.add_generation([]) is None
    assert store.shard_count() == 0


def test_a_late_writer_changes_nothing(tmp_path: Path) -> None:
    store, teacher, _ = make_store(tmp_path / "s")
    before = _files(tmp_path / "s")
    first = store.receipt("depth", 0)
    late = np.zeros((4, 3, 3, 5), np.float16)
    rows = [RowReceipt(status="ok", sha256="f" * 64, width=1, height=1)] * 4
    returned = store.commit_shard(teacher, 0, Stored(late), rows, ChannelStatistics(5), EXECUTION)
    assert returned == first
    assert _files(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("precision", "array"), [("float16", "values"), ("int8", "values"), ("int8", "scale"), ("int4", "scale")]
)
def test_arrays_without_a_receipt_are_adopted_or_replaced(tmp_path: Path, precision: Precision, array: str) -> None:
    """Killed between two files of a shard, or within one, and run again: the bytes of an undisturbed run."""
    root = tmp_path / "s"
    make_store(root, precision=precision)
    before = _files(root)
    path = root / shard_file("depth", 1, 4, array)
    for damage in (b"", path.read_bytes()[:50] + b"?", None):
        (root / "receipts/depth/00001.json").unlink()
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        store = FeatureStore.open(root)
        rng = np.random.default_rng(0)
        rng.normal(size=(4, 3, 3, 5))
        fill_shard(store, record(precision), 1, rng.normal(size=(2, 3, 3, 5)).astype(np.float32))
        assert _files(root) == before


def test_another_meaning_precision_or_shard_size_is_refused(tmp_path: Path) -> None:
    store, _, _ = make_store(tmp_path / "s")
    with pytest.raises(FingerprintError, match="weights"):
        store.put_teacher(record(weights="other"))
    with pytest.raises(StoreError, match="stored as float16, float32 was asked for"):
        store.put_teacher(record("float32"))
    with pytest.raises(StoreError, match="stored as float16, int4 was asked for"):
        store.put_teacher(record("int4"))
    with pytest.raises(StoreError, match="--shard-size 4"):
        FeatureStore.open(tmp_path / "s").create(tmp_path / "s", rows_per_shard=8)


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such feature store"):
        FeatureStore.open(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(StoreError, match=r"zarr\.json is missing"):
        FeatureStore.open(tmp_path / "other")
    zarr.create_group(tmp_path / "plain")
    with pytest.raises(StoreError, match="not a feature store of ours"):
        FeatureStore.open(tmp_path / "plain")
    (tmp_path / "other" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="not a feature store"):
        FeatureStore.create(tmp_path / "other")
    store, _, _ = make_store(tmp_path / "s")
    with pytest.raises(StoreError, match="It holds: depth"):
        store.teacher("seg")
    document = json.loads((tmp_path / "s/zarr.json").read_text())
    document["attributes"]["ola"]["format"] = 99
    (tmp_path / "s/zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match="format version 99"):
        FeatureStore.open(tmp_path / "s")


def test_statistics_are_merged_over_shards(tmp_path: Path) -> None:
    store, _, values = make_store(tmp_path / "s", precision="float32")
    ok = values[:6].reshape(-1, 5).astype(np.float64)
    stats = store.statistics("depth")
    np.testing.assert_allclose(stats.mean, ok.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(stats.variance, ok.var(axis=0), rtol=1e-9)


@pytest.mark.parametrize(
    ("precision", "array"),
    [("float16", "values"), ("int8", "values"), ("int8", "scale"), ("int4", "scale"), ("int8", "offset")],
)
def test_every_flipped_bit_that_a_read_uses_is_found(tmp_path: Path, precision: Precision, array: str) -> None:
    store, _, _ = make_store(tmp_path / "s", channels=64, grid=(8, 8), precision=precision)
    path = store.root / shard_file("depth", 0, 2 if array == "offset" else 4, array)
    original = path.read_bytes()
    rng = np.random.default_rng(1)
    for offset in rng.integers(0, len(original), 150):
        damaged = bytearray(original)
        damaged[offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DamagedStoreError, match=rf"depth/{array}/c/0"):
            [FeatureReader(store, "depth").read(row) for row in range(4)]
    for length in (0, 1, 100, len(original) - 1):
        path.write_bytes(original[:length])
        with pytest.raises(DamagedStoreError, match="bytes, its receipt promises"):
            FeatureReader(store, "depth").read(0)
    path.unlink()
    with pytest.raises(DamagedStoreError, match="cannot be read"):
        FeatureReader(store, "depth").read(0)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_receipt_promises_all_files(tmp_path: Path, precision: Precision) -> None:
    store, _, _ = make_store(tmp_path / "s", precision=precision)
    receipt = store.receipt("depth", 1)
    assert receipt is not None
    assert list(receipt.files) == ["depth/offset/c/1/0", "depth/scale/c/1/0/0/0", "depth/values/c/1/0/0/0"]
    for name, file in receipt.files.items():
        data = (store.root / name).read_bytes()
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_arrays_of_another_precision_are_never_converted(tmp_path: Path) -> None:
    store, teacher, _ = make_store(tmp_path / "s", precision="int8")
    rows = [RowReceipt(status="ok", sha256="f" * 64, width=1, height=1)] * 4
    features = np.ones((4, 3, 3, 5), np.float32)
    for wrong in (
        Stored(features),
        encode(features, "int8"),  # without offsets, as earlier versions stored it
        encode(features, "int4", centred=True),
        encode(features[..., :4], "int8", centred=True),
    ):
        with pytest.raises(StoreError, match="cannot be stored as int8"):
            store.commit_shard(teacher, 0, wrong, rows, ChannelStatistics(5), EXECUTION, replace=True)


def test_metadata_that_is_damaged_is_named(tmp_path: Path) -> None:
    store, _, _ = make_store(tmp_path / "s")
    receipt = store.root / "receipts/depth/00000.json"
    for text in ("{", "[]", '{"teacher": "depth"}'):
        receipt.write_text(text)
        with pytest.raises(DamagedStoreError, match=r"00000\.json"):
            store.receipt("depth", 0)
    (store.root / "receipts/depth/notes.json").write_text("{}")
    assert store.committed("depth") == [0, 1], "what is no receipt is reported by verify, and read by nobody"
    (store.root / "samples/0000-00000.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DamagedStoreError, match="0000-00000"):
        list(store.samples())


@given(st.integers(1, 1 << 22), st.integers(1, 600))
def test_inner_chunks_divide_the_shard_and_stay_small(row_bytes: int, rows: int) -> None:
    n = chunk_rows(row_bytes, rows)
    assert rows % n == 0
    assert n == 1 or n * row_bytes <= 1 << 20


@pytest.mark.parametrize("frame", ["shorter", "longer", "without its size", "no frame"])
def test_a_chunk_of_another_size_is_damage_though_its_checksum_is_right(tmp_path: Path, frame: str) -> None:
    store, _, _ = make_store(tmp_path / "s", channels=64, grid=(8, 8), precision="int8")
    path = store.root / shard_file("depth", 0, 4, "values")
    original = path.read_bytes()
    size = 4 * 8 * 8 * 64
    # a frame of one raw block, whose header leaves the size of the content out (RFC 8878)
    raw_block = b"\x28\xb5\x2f\xfd\x00\x58" + (size << 3 | 1).to_bytes(3, "little") + bytes(size)
    data = {
        "shorter": bytes(Zstd(level=3).encode(bytes(size - 1))),
        "longer": bytes(Zstd(level=3).encode(bytes(size + 1))),
        "without its size": raw_block,
        "no frame": b"x" * 20,
    }[frame]
    chunk = data + google_crc32c.value(data).to_bytes(4, "little")
    index = np.array([0, len(chunk)], "<u8").tobytes()
    index += google_crc32c.value(index).to_bytes(4, "little")
    whole = chunk.ljust(len(original) - len(index), b"\0") + index
    path.write_bytes(whole)
    receipt = store.receipt("depth", 0)
    assert receipt is not None
    name = shard_file("depth", 0, 4, "values")
    files = receipt.files | {name: receipt.files[name].model_copy(update={"bytes": len(whole)})}
    store.place.publish(receipt_file("depth", 0), sealed(receipt.model_copy(update={"files": files})))
    with pytest.raises(DamagedStoreError, match=rf"depth/values/c/0.*row 0 does not decompress to {size} bytes"):
        FeatureReader(store, "depth").read(0)
