"""Stores written by earlier versions stay readable for ever: through plain zarr and the docs alone, and through us."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from store_support import DOCS, decoding, fixture_features

from olaschema.manifest import Precision
from olaschema.precision import is_centred
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

FIXTURES = Path(__file__).parents[1] / "fixtures"
STORES: dict[str, Precision] = {f"store_v1/{precision}": precision for precision in get_args(Precision)}
STORES |= {"store_v1_centred/int8": "int8", "store_v1_centred/int4": "int4"}  # maps with offsets
SHAPES = {"depth": (2, 3, 67), "gen": (67,)}
ROWS = [0, 1, 3, 4, 5]
TIERS = pytest.mark.parametrize(("folder", "precision"), STORES.items(), ids=STORES)


def bounds(feature: np.ndarray, precision: Precision, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Largest error of each element by the docs, `(..., 67)`."""
    exact = feature.astype(np.float64)
    if "offset" in arrays:
        apart = bounds(exact - arrays["offset"].astype(np.float64), precision, {})
        return apart + 2.0**-24 * (np.abs(exact) + apart)
    if precision == "float32":
        return np.zeros_like(exact)
    if precision == "float16":
        return np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)
    out = np.empty_like(exact)
    for part in (slice(0, 64), slice(64, 67)):
        largest = np.abs(exact[..., part]).max(axis=-1, keepdims=True)
        out[..., part] = largest / {"int8": 254, "int4": 14}[precision] * (1 + 2.0**-9) + 2.0**-25
    return out


def line(precision: Precision, teacher: str) -> Callable[..., np.ndarray]:
    """The decoding in the docs, with the teacher's basis where the precision has one."""
    basis = FIXTURES / "store_v1" / "klt" / "bases" / f"{teacher}.npy" if precision == "klt" else None
    return partial(decoding(DOCS, precision), basis=basis)


def require_near(found: np.ndarray, expected: np.ndarray, precision: Precision, arrays: dict[str, np.ndarray]) -> None:
    error = np.abs(found.astype(np.float64) - expected)
    if precision == "klt":  # bounded as a whole; the mean map of the fixture is of normal numbers
        steps = np.repeat(arrays["scale"].astype(np.float64), 64, axis=-1)[..., :67]
        lengths = 2 * np.linalg.norm(expected) + 10 * np.sqrt(expected.size)
        assert np.linalg.norm(error) <= np.linalg.norm(steps) / 2 * (1 + 2.0**-8) + 2.0**-16 * lengths
        assert np.linalg.norm(error) < 0.02 * np.linalg.norm(expected)
        return
    assert (error <= bounds(expected, precision, arrays)).all()


@TIERS
def test_plain_zarr_and_the_line_in_the_docs_read_them(folder: str, precision: Precision) -> None:
    group = zarr.open_group(FIXTURES / folder, mode="r")
    planned = pq.read_table(FIXTURES / folder / "samples" / "0000-00000.parquet").to_pylist()
    assert [(sample["row"], sample["key"]) for sample in planned] == [(row, f"{row:04d}.jpg") for row in range(6)]
    for teacher, shape in SHAPES.items():
        channels = group[teacher].attrs["ola"]["fingerprint"]["channels"]
        arrays = {name: array[:] for name, array in group[teacher].arrays()}
        decode = line(precision, teacher)
        whole = decode(channels=channels, **arrays)
        assert whole.dtype == np.float32
        assert whole.shape == (8, *shape)
        for row in range(8):
            # the same line for one row and for all of them
            one = decode(channels=channels, **{name: array[row] for name, array in arrays.items()})
            np.testing.assert_array_equal(one, whole[row])
            if row not in ROWS:
                assert np.isnan(one).all()
                continue
            require_near(one, fixture_features(row, shape), precision, {k: array[row] for k, array in arrays.items()})


@TIERS
def test_tensorstore_reads_the_same(folder: str, precision: Precision) -> None:
    group = zarr.open_group(FIXTURES / folder, mode="r")
    for teacher, shape in SHAPES.items():
        arrays = {}
        for name, array in group[teacher].arrays():
            path = FIXTURES / folder / teacher / name
            opened = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}).result()
            arrays[name] = np.asarray(opened.read().result())
            assert arrays[name].dtype == array.dtype
            assert arrays[name].tobytes() == array[:].tobytes()
        whole = line(precision, teacher)(channels=67, **arrays)
        for row in range(8):
            if row not in ROWS:
                assert np.isnan(whole[row]).all()
                continue
            rows = {name: array[row] for name, array in arrays.items()}
            require_near(whole[row], fixture_features(row, shape), precision, rows)


@TIERS
def test_we_read_them(folder: str, precision: Precision) -> None:
    store = FeatureStore.open(FIXTURES / folder)
    group = zarr.open_group(FIXTURES / folder, mode="r")
    for teacher, shape in SHAPES.items():
        reader = FeatureReader(store, teacher)
        assert reader.record.precision == precision
        assert reader.record.centred == (folder.startswith("store_v1_centred") and teacher == "depth")
        assert ("offset" in reader.read(0).arrays) == reader.record.centred
        assert [row for row in range(8) if (s := reader.status(row)) is not None and s.status == "ok"] == ROWS
        for row in ROWS:
            arrays = {name: array[row] for name, array in group[teacher].arrays()}
            assert reader.read(row).arrays.keys() == arrays.keys()
            for name, array in reader.read(row).arrays.items():
                assert array.tobytes() == arrays[name].tobytes()
            expected = line(precision, teacher)(channels=67, **arrays)
            assert reader.feature(row).dtype == np.float32
            assert reader.feature(row).shape == shape
            np.testing.assert_array_equal(reader.feature(row), expected)


@TIERS
def test_they_can_be_extended(folder: str, precision: Precision, tmp_path: Path) -> None:
    """What this version writes of the same teacher is the metadata that is there: nothing is rewritten."""
    root = shutil.copytree(FIXTURES / folder, tmp_path / "s")
    store = FeatureStore.open(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for teacher, shape in SHAPES.items():
        present = store.teacher(teacher)
        store.put_teacher(present)
        # what a new store would be, whichever this one is: it keeps its own form
        store.put_teacher(present.model_copy(update={"centred": is_centred(shape, precision), "zstd_level": 9}))
        assert store.teacher(teacher).zstd_level == 3
    assert {path: path.read_bytes() for path in before} == before
    assert store.add_generation(sample for sample in store.samples() if sample.row < 3) is not None
    store.put_teacher(store.teacher("depth"))
    changed = {str(path.relative_to(root)) for path, data in before.items() if path.read_bytes() != data}
    assert changed == {f"depth/{name}/zarr.json" for name, _ in zarr.open_group(root, mode="r")["depth"].arrays()}


def test_the_docs_name_every_precision() -> None:
    table = [line.split("|")[1].split()[0].strip("`") for line in DOCS.splitlines() if line.startswith("| `")]
    assert set(get_args(Precision)) <= set(table)
