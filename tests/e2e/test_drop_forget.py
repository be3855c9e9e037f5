"""`drop` and `forget`: what is deleted is gone from the bytes, and does not come back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from pipeline_support import DEPTH, depth_arguments, digests, olapipe, ray_session, write_images
from store_support import fill_shard, record

from olapipe import drop as drop_module
from olapipe import forget as forget_module
from olaschema.errors import StoreError
from olaschema.keys import tombstone
from olaschema.place import LocalPlace
from olaschema.reader import FeatureReader
from olaschema.seal import MANIFEST, seal, unseal
from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]

KEY = "sub/secret-name.png"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder, "a.png", "b.png", "c.png", "d.png", KEY, size=(60, 45))
    return folder


@pytest.fixture(scope="module")
def extracted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`depth` by the command, and beside it a teacher of one vector per image."""
    out = tmp_path_factory.mktemp("one") / "s"
    result = olapipe(*depth_arguments(corpus, out, "--shard-size", 3, "--batch-size", 2, "--workers", 1))
    assert result.exit_code == 0, result.output
    store = FeatureStore.open(out)
    told = record("float32", teacher="vector", grid=None, channels=6)
    unseal(store, ["vector"])
    store.put_teacher(told)
    rng = np.random.default_rng(0)
    for shard, count in ((0, 3), (1, 2)):
        seen = [hashlib.sha256((corpus / sample.key).read_bytes()).hexdigest() for sample in store.shard_samples(shard)]
        fill_shard(store, told, shard, rng.normal(size=(count, 6)).astype(np.float32), seen=seen)
    seal(store, store.teachers())
    return out


@pytest.fixture
def store(extracted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(extracted, tmp_path / "s")


def _row(store: Path, key: str) -> int:
    return next(sample.row for sample in FeatureStore.open(store).samples() if sample.key == key)


def test_drop_deletes_one_teacher_and_nothing_else(store: Path) -> None:
    before = digests(store)
    result = olapipe("drop", store, "--teacher", "depth", "--yes")
    assert result.exit_code == 0, result.output
    after = digests(store)
    gone = before.keys() - after.keys()
    assert gone == {name for name in before if name.startswith(("depth/", "receipts/depth/"))}
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}
    assert not (store / "_log/withdrawn").exists()
    assert olapipe("verify", store).exit_code == 0
    again = olapipe("drop", store, "--teacher", "depth", "--yes")
    assert again.exit_code == 1
    assert "It holds: vector" in again.stderr


def test_drop_asks_and_without_a_terminal_wants_yes(store: Path) -> None:
    before = digests(store)
    result = olapipe("drop", store, "--teacher", "depth")
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert olapipe("forget", store, KEY).exit_code == 2
    assert digests(store) == before


class _Killed(Exception):
    pass


def _stop_at(monkeypatch: pytest.MonkeyPatch, target: object, name: str, call: int, file: str = "") -> None:
    """Raise _Killed at the given call, counted from 1, of a method, which is not carried out; or of those of a file."""
    original = getattr(target, name)
    calls = []

    def stopping(*arguments: object, **more: object) -> object:
        if not file or file in arguments:
            calls.append(1)
            if len(calls) == call:
                raise _Killed
        return original(*arguments, **more)

    monkeypatch.setattr(target, name, stopping)


@pytest.mark.parametrize(
    ("name", "call"),
    [("withdraw", 1), ("withdraw", 2), ("clear_withdrawn", 1), ("publish", 1), ("publish", 2)],
)
def test_an_interrupted_drop_is_finished_by_a_rerun(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    undisturbed = shutil.copytree(store, tmp_path / "undisturbed")
    assert olapipe("drop", undisturbed, "--teacher", "depth", "--yes").exit_code == 0
    with monkeypatch.context() as patch:
        # leases are published as well: the list of documents is what is meant
        _stop_at(patch, LocalPlace, name, call, MANIFEST if name == "publish" else "")
        with pytest.raises(_Killed):
            drop_module.drop(FeatureStore.open(store), "depth")
    result = olapipe("drop", store, "--teacher", "depth", "--yes")
    assert digests(store) == digests(undisturbed)
    assert result.exit_code == (1 if (name, call) == ("publish", 2) else 0), "all but the list was done before"
    assert olapipe("verify", store, "--json").exit_code == 0


def test_whoever_reads_a_dropped_teacher_is_told(store: Path) -> None:
    opened = FeatureStore.open(store)
    reader = FeatureReader(opened, "depth")
    reader.read(0)
    assert olapipe("drop", store, "--teacher", "depth", "--yes").exit_code == 0
    for row in (0, 4):  # a shard that is open already, and one that is not
        with pytest.raises(StoreError, match="the teacher depth was dropped from the store while it was being read"):
            reader.read(row)
    with pytest.raises(StoreError, match="dropped"):
        reader.status(4)
    with pytest.raises(StoreError, match="It holds: vector"):
        FeatureReader(opened, "depth")


def test_a_dropped_teacher_can_be_extracted_again(store: Path, extracted: Path, corpus: Path) -> None:
    assert olapipe("drop", store, "--teacher", "depth", "--yes").exit_code == 0
    result = olapipe(*depth_arguments(corpus, store, "--batch-size", 2, "--workers", 1))
    assert result.exit_code == 0, result.output
    assert digests(store) == digests(extracted)


def test_a_forgotten_image_is_gone_from_every_byte(store: Path, corpus: Path) -> None:
    row = _row(store, KEY)
    before = {name: zarr.open_group(store, mode="r")[f"{name}/values"][:] for name in ("depth", "vector")}
    files = digests(store)
    image = FeatureStore.open(store).receipt("depth", row // 3)
    assert image is not None
    digest = image.rows[row % 3].sha256
    assert digest is not None
    result = olapipe("forget", store, KEY, "--yes")
    assert result.exit_code == 0, result.output
    for name, values in before.items():
        now = zarr.open_group(store, mode="r")[f"{name}/values"][:]
        assert np.isnan(now[row]).all()
        assert np.isfinite(values[row]).all()
        np.testing.assert_array_equal(np.delete(now, row, axis=0), np.delete(values, row, axis=0))
        receipt = FeatureStore.open(store).receipt(name, row // 3)
        assert receipt is not None
        forgotten = receipt.rows[row % 3]
        assert (forgotten.status, forgotten.reason, forgotten.sha256, forgotten.width) == (
            "failed", "forgotten", None, None,
        )  # fmt: skip
        assert receipt.revision == 1
        told = FeatureStore.open(store).statistics(name)
        kept = np.delete(values, row, axis=0)
        kept = kept[np.isfinite(kept).reshape(len(kept), -1).all(axis=1)].astype(np.float64)
        kept = kept.reshape(-1, kept.shape[-1])
        assert told.count == len(kept)
        np.testing.assert_allclose(told.mean, kept.mean(axis=0), rtol=1e-3, atol=1e-3)
    for file in store.rglob("*"):
        if file.is_file() and "_log" not in file.parts:
            assert b"secret-name" not in file.read_bytes(), file
            assert digest.encode() not in file.read_bytes(), file
    keys = [entry["key"] for part in (store / "samples").glob("*.parquet") for entry in pq.read_table(part).to_pylist()]
    assert len(keys) == 5 and tombstone(KEY) in keys and KEY not in keys
    changed = {name for name in files if digests(store).get(name) != files[name]}
    assert changed == {
        "manifest.json", "samples/0000.json", "samples/0000-00000.parquet",
        "receipts/depth/00001.json", "receipts/vector/00001.json", "depth/values/c/1/0/0/0", "vector/values/c/1/0",
    }  # fmt: skip
    assert olapipe("verify", store, "--json").exit_code == 0


def test_extract_does_not_bring_it_back(store: Path, corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    assert olapipe("forget", store, KEY, "--yes").exit_code == 0
    before = digests(store)
    for more in ((), ("--retry-failed",)):
        result = olapipe(*depth_arguments(folder, store, "--batch-size", 2, *more))
        assert result.exit_code == 0, result.output
        assert "nothing to extract" in result.stderr
        assert digests(store) == before
    write_images(folder, "new.png", size=(50, 40))
    result = olapipe(*depth_arguments(folder, store, "--batch-size", 2, "--workers", 1))
    assert result.exit_code == 0, result.output
    assert "new: 1" in result.stderr
    assert [sample.key for sample in FeatureStore.open(store).samples()][5:] == ["new.png"]
    shown = olapipe("inspect", store, KEY)
    assert "forgotten" in shown.stdout


def test_repair_leaves_it_forgotten(store: Path, corpus: Path) -> None:
    assert olapipe("forget", store, KEY, "--yes").exit_code == 0
    before = digests(store)
    (store / "depth/values/c/1/0/0/0").write_bytes(b"x")
    arguments = ["--repair", "--images", corpus, "--checkpoint", f"depth={DEPTH}", "--device", "cpu", "--workers", 1]
    result = olapipe("verify", store, *arguments)
    assert result.exit_code == 0, result.output
    after = digests(store)
    # the statistics are those of the float32 features again, the values are the same
    assert {name for name in after if after[name] != before[name]} <= {"receipts/depth/00001.json", "manifest.json"}
    receipt = FeatureStore.open(store).receipt("depth", 1)
    assert receipt is not None and receipt.revision == 1


@pytest.mark.parametrize("call", range(1, 10))
def test_an_interrupted_forget_is_finished_by_a_rerun(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    undisturbed = shutil.copytree(store, tmp_path / "undisturbed")
    assert olapipe("forget", undisturbed, KEY, "--yes").exit_code == 0
    with monkeypatch.context() as patch:
        _stop_at(patch, LocalPlace, "publish" if call < 9 else "remove", call if call < 9 else 1)
        with pytest.raises(_Killed):
            forget_module.forget(FeatureStore.open(store), KEY)
    result = olapipe("forget", store, KEY, "--yes")
    assert result.exit_code == 0, result.output
    assert digests(store) == digests(undisturbed)


def test_two_images_of_one_shard_and_a_second_call(store: Path) -> None:
    assert olapipe("forget", store, KEY, "--yes").exit_code == 0
    assert olapipe("forget", store, "d.png", "--yes").exit_code == 0
    receipt = FeatureStore.open(store).receipt("depth", 1)
    assert receipt is not None
    assert receipt.revision == 2 and receipt.ok == 0
    assert [path.name for path in (store / "samples").glob("*.parquet")] == ["0000-00000-r2.parquet"]
    before = digests(store)
    assert olapipe("forget", store, KEY, "--yes").exit_code == 0
    assert digests(store) == before
    assert olapipe("verify", store).exit_code == 0


def test_forget_before_extraction_and_of_what_is_not_there(store: Path, corpus: Path) -> None:
    assert olapipe("drop", store, "--teacher", "depth", "--yes").exit_code == 0
    assert olapipe("forget", store, KEY, "--yes").exit_code == 0
    result = olapipe(*depth_arguments(corpus, store, "--batch-size", 2, "--workers", 1))
    assert result.exit_code == 0, result.output
    assert "forgotten: 1" in result.stdout
    receipt = FeatureStore.open(store).receipt("depth", 1)
    assert receipt is not None and receipt.revision == 1
    result = olapipe("forget", store, "nobody.png", "--yes")
    assert result.exit_code == 1
    assert "has no image nobody.png" in result.stderr


def test_bytes_that_no_receipt_names_are_deleted_too(store: Path) -> None:
    (store / "receipts/depth/00001.json").unlink()
    assert olapipe("forget", store, KEY, "--yes").exit_code == 0
    assert not (store / "depth/values/c/1/0/0/0").exists()


def test_a_damaged_shard_is_not_taken_for_a_forgotten_one(store: Path) -> None:
    path = store / "depth/values/c/1/0/0/0"
    path.write_bytes((store / "depth/values/c/0/0/0/0").read_bytes())
    result = olapipe("forget", store, KEY, "--yes")
    assert result.exit_code == 1
    assert "verify --repair" in result.stderr


def test_other_keys_of_the_same_image_are_named(corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    shutil.copy(folder / KEY, folder / "twin.png")
    out = tmp_path / "t"
    assert olapipe(*depth_arguments(folder, out, "--shard-size", 3, "--workers", 1)).exit_code == 0
    result = olapipe("forget", out, KEY, "--yes")
    assert "the same image is still in the store as twin.png" in result.stdout
    assert json.loads(olapipe("verify", out, "--json").stdout)["problems"] == []
