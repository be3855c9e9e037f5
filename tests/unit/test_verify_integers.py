"""`verify` and `forget` on stores of integers, which have two files per shard: both are checked, both are blanked."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from pipeline_support import digests
from store_support import DOCS, decoding, fill_shard, images, record

from olapipe.forget import forget
from olapipe.progress import LineReporter
from olapipe.verify import Problem, verify
from olaschema.errors import OlaError
from olaschema.manifest import ChannelStatistics, Precision
from olaschema.place import LocalPlace
from olaschema.precision import Stored
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore

TIERS: tuple[Precision, ...] = ("int8", "int4")
CHANNELS = 67
ROW = 5
"""The image that is forgotten, in shard 1, which holds rows 4 to 7; row 6 has a feature of nothing but zeros."""


@pytest.fixture(scope="module", params=TIERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map and a vector in shards of four, row 1 failed, the last row absent; sealed as `extract` does."""
    root = tmp_path_factory.mktemp("v") / "s"
    store = FeatureStore.create(root, rows_per_shard=4)
    store.add_generation(images(7))
    rng = np.random.default_rng(0)
    for name, grid in (("depth", (2, 2)), ("gen", None)):
        told = record(request.param, teacher=name, grid=grid, channels=CHANNELS)
        store.put_teacher(told)
        for shard, count in ((0, 4), (1, 3)):
            features = rng.normal(size=(count, *told.fingerprint.shape)).astype(np.float32)
            if shard == 1:
                features[2] = 0
            fill_shard(store, told, shard, features, failed=(1,) if shard == 0 else ())
    seal(store, store.teachers())
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "s")


def _problems(root: Path) -> list[Problem]:
    return verify(str(root), LineReporter(io.StringIO())).problems


def _arrays(root: Path, teacher: str) -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open_group(root, mode="r")[teacher].arrays()}


def _decoded(root: Path, teacher: str) -> np.ndarray:
    """By the line in the docs."""
    precision = FeatureStore.open(root).teacher(teacher).precision
    return decoding(DOCS, precision)(channels=CHANNELS, **_arrays(root, teacher))


def test_an_intact_store_has_no_problem(root: Path) -> None:
    found = verify(str(root), LineReporter(io.StringIO()))
    assert (found.problems, found.notes) == ([], [])
    assert (found.shards, found.rows) == (4, 16)


def test_a_flipped_bit_in_any_file_of_any_array_is_found_in_that_file(root: Path) -> None:
    rng = random.Random(3)
    for teacher in ("depth", "gen"):
        files = sorted(path for path in (root / teacher).rglob("*") if path.is_file())
        # two shards of two arrays, of three for the map, with a document each, and that of the teacher
        assert len(files) == {"depth": 10, "gen": 7}[teacher]
        for file in files:
            original = file.read_bytes()
            for _ in range(8):
                damaged = bytearray(original)
                damaged[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
                file.write_bytes(damaged)
                found = {problem.file: problem for problem in _problems(root)}
                name = str(file.relative_to(root))
                assert name in found
                if "/c/" in name:
                    wanted = ("shard", teacher, int(name.split("/")[3]))
                    assert (found[name].mending, found[name].teacher, found[name].shard) == wanted
                    with pytest.raises(OlaError):
                        _read_all(root, teacher)
                elif name.count("/") == 2:
                    assert found[name].mending == "document"
            file.write_bytes(original)
    assert _problems(root) == []


def _read_all(root: Path, teacher: str) -> None:
    reader = FeatureReader(FeatureStore.open(root), teacher)
    for row in (0, 2, 3, 4, 5, 6):
        reader.read(row)


@pytest.mark.parametrize(("array", "places"), [("scale", (2, 1, 0, 1)), ("offset", (2, 5))])
def test_a_nan_in_a_row_with_a_feature_is_found_in_the_array_that_holds_it(
    root: Path, array: str, places: tuple[int, ...]
) -> None:
    store = FeatureStore.open(root)
    receipt = store.receipt("depth", 0)
    assert receipt is not None
    arrays = {name: array[:4] for name, array in _arrays(root, "depth").items()}
    arrays[array][places] = np.nan
    statistics = ChannelStatistics.from_json(receipt.statistics, CHANNELS)
    told = store.teacher("depth")
    store.commit_shard(told, 0, Stored(**arrays), list(receipt.rows), statistics, receipt.execution, replace=True)
    found = [(problem.file, problem.rows) for problem in _problems(root) if "NaN" in problem.text]
    assert found == [(f"depth/{array}/c/0" + "/0" * (len(places) - 1), (2,))]


def test_an_array_that_the_precision_does_not_have_is_a_stray(tmp_path: Path, root: Path) -> None:
    store = FeatureStore.create(tmp_path / "f", rows_per_shard=4)
    store.add_generation(images(4))
    told = record("float16", grid=(2, 2), channels=CHANNELS)
    store.put_teacher(told)
    fill_shard(store, told, 0, np.ones((4, 2, 2, CHANNELS), np.float32))
    seal(store, store.teachers())
    assert _problems(tmp_path / "f") == []
    shutil.copytree(root / "depth/scale", tmp_path / "f/depth/scale")
    strays = {problem.file for problem in _problems(tmp_path / "f")}
    assert strays == {f"depth/scale/{name}" for name in ("zarr.json", "c/0/0/0/0", "c/1/0/0/0")}


def test_forget_blanks_the_row_in_all_arrays_and_no_other(root: Path) -> None:
    before = {name: (_arrays(root, name), _decoded(root, name)) for name in ("depth", "gen")}
    forget(FeatureStore.open(root), "0005.jpg")
    for name, (arrays, features) in before.items():
        now = _arrays(root, name)
        beside = {"depth": {"scale", "offset"}, "gen": {"scale"}}[name]
        assert now.keys() == {"values", *beside}
        assert (arrays["values"][ROW] != 0).any()
        assert (now["values"][ROW] == 0).all()
        for array in beside:
            assert np.isfinite(arrays[array][ROW]).all() and np.isnan(now[array][ROW]).all()
        for array in now:
            np.testing.assert_array_equal(np.delete(now[array], ROW, 0), np.delete(arrays[array], ROW, 0))
        store = FeatureStore.open(root)
        receipt = store.receipt(name, 1)
        assert receipt is not None
        assert (receipt.rows[1].reason, receipt.revision, len(receipt.files)) == ("forgotten", 1, len(now))
        kept = features[[4, 6]].reshape(-1, CHANNELS).astype(np.float64)
        told = ChannelStatistics.from_json(receipt.statistics, CHANNELS)
        assert told.count == len(kept)
        np.testing.assert_allclose(told.mean, kept.mean(axis=0), rtol=1e-12, atol=1e-12)
    assert _problems(root) == []


class _Killed(Exception):
    pass


@pytest.mark.parametrize("call", range(1, 11))
def test_an_interrupted_forget_shows_no_zeros_and_is_finished_by_a_rerun(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Publishes: manifest, part, generation; scale, values and receipt of either teacher; manifest."""
    undisturbed = shutil.copytree(root, tmp_path / "undisturbed")
    forget(FeatureStore.open(undisturbed), "0005.jpg")
    original, calls = LocalPlace.publish, []

    def stopping(place: LocalPlace, name: str, data: bytes) -> None:
        calls.append(name)
        if len(calls) == call:
            raise _Killed
        original(place, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalPlace, "publish", stopping)
        with pytest.raises(_Killed):
            forget(FeatureStore.open(root), "0005.jpg")
    for name in ("depth", "gen"):
        assert (np.isnan(_decoded(root, name)[ROW]).all()) or _decoded(root, name)[ROW].any(axis=-1).all()
    forget(FeatureStore.open(root), "0005.jpg")
    assert digests(root) == digests(undisturbed)
    assert _problems(root) == []
