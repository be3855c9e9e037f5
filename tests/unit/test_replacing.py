"""A replacement of a committed shard that is stopped anywhere ends as the undisturbed one, or has not begun."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline_support import FakeTeacher, digests, olapipe, write_images

from olapipe.corpus import list_corpus
from olapipe.encode import Limits, ShardEncoder, execution
from olapipe.load import teacher_record
from olapipe.progress import make_reporter
from olapipe.verify import verify
from olaschema.errors import DamagedStoreError
from olaschema.place import LocalPlace
from olaschema.reader import FeatureReader
from olaschema.replacing import finish_replacements
from olaschema.seal import seal
from olaschema.store import FeatureStore


class _KilledError(Exception):
    """Stands for the end of the process."""


def _ignore(_teacher: str, _rows: int) -> None:
    pass


def _encoder(store: FeatureStore, corpus: Path) -> ShardEncoder:
    teacher = FakeTeacher()
    records = {"fake": store.teacher("fake")}
    return ShardEncoder(store, corpus, {"fake": teacher}, records, Limits(4, 100_000, 1), execution("cpu", 4))


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A store of four images in int8, of which one has failed and is mended now, and one has gone."""
    corpus, root = tmp_path / "c", tmp_path / "s"
    write_images(corpus, *(f"{index}.png" for index in range(4)))
    good = (corpus / "1.png").read_bytes()
    (corpus / "1.png").write_bytes(b"x" * len(good))
    store = FeatureStore.create(root, rows_per_shard=4)
    store.add_generation(entry.sample() for entry in list_corpus(corpus, None).entries)
    store.put_teacher(teacher_record(FakeTeacher(), "int8"))
    _encoder(store, corpus).encode(0, ["fake"], _ignore)
    (corpus / "1.png").write_bytes(good)
    (corpus / "2.png").unlink()
    return root, corpus


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Make the step-th change to the place raise instead; returns how many there were."""
    count = 0
    for name in ("publish", "publish_if_absent", "remove"):
        real = getattr(LocalPlace, name)

        def changing(self: LocalPlace, *arguments: object, real: Callable[..., object] = real) -> object:
            nonlocal count
            if not str(arguments[0]).startswith("_log/timings"):
                count += 1
                if count == step:
                    raise _KilledError
            return real(self, *arguments)

        monkeypatch.setattr(LocalPlace, name, changing)
    return lambda: count


def test_stopped_at_any_change_and_run_again_nothing_is_lost(
    begun: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, corpus = begun
    kept = FeatureReader(FeatureStore.open(root), "fake").feature(2)
    undisturbed = shutil.copytree(root, tmp_path / "u")
    with monkeypatch.context() as patched:
        counted = _stop_at(patched, -1)
        _encoder(FeatureStore.open(undisturbed), corpus).encode(0, ["fake"], _ignore, replace=True)
    steps = counted()
    assert steps >= 9  # a note of three files and the receipt, the old receipt, the exchange, the deleted note
    wanted = digests(undisturbed)
    assert [row.status for row in (FeatureStore.open(undisturbed).receipt("fake", 0) or pytest.fail()).rows] == [
        "ok"
    ] * 4
    for step in range(1, steps + 1):
        stopped = shutil.copytree(root, tmp_path / f"s{step}")
        with monkeypatch.context() as patched:
            _stop_at(patched, step)
            with pytest.raises(_KilledError):
                _encoder(FeatureStore.open(stopped), corpus).encode(0, ["fake"], _ignore, replace=True)
        _encoder(FeatureStore.open(stopped), corpus).encode(0, ["fake"], _ignore, replace=True)
        assert digests(stopped) == wanted, step
        np.testing.assert_array_equal(FeatureReader(FeatureStore.open(stopped), "fake").feature(2), kept)
        assert not [path for path in (stopped / "_log/replacing").rglob("*") if path.is_file()]


def _stopped_after_the_receipt_went(root: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    store = FeatureStore.open(root)
    real = LocalPlace.publish_if_absent

    def killed(self: LocalPlace, name: str, data: bytes) -> bool:
        if name.startswith("receipts/"):
            raise _KilledError
        return real(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(LocalPlace, "publish_if_absent", killed)
        with pytest.raises(_KilledError):
            _encoder(store, corpus).encode(0, ["fake"], _ignore, replace=True)
    assert store.receipt("fake", 0) is None
    return store


def test_a_forgotten_image_does_not_come_back_from_a_note(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, corpus = begun
    store = _stopped_after_the_receipt_went(root, corpus, monkeypatch)
    seal(store, [])
    assert olapipe("forget", root, "2.png", "--yes").exit_code == 0
    assert not [path for path in (root / "_log/replacing").rglob("*") if path.is_file()]
    receipt = store.receipt("fake", 0)
    assert receipt is not None
    assert [row.reason for row in receipt.rows] == [None, None, "forgotten", None]
    finish_replacements(store.place, "fake")
    assert store.receipt("fake", 0) == receipt
    assert verify(str(root), make_reporter()).problems == []


def test_a_dropped_teacher_does_not_come_back_from_a_note(
    begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, corpus = begun
    store = _stopped_after_the_receipt_went(root, corpus, monkeypatch)
    assert olapipe("drop", root, "--teacher", "fake", "--yes").exit_code == 0
    finish_replacements(store.place, "fake")
    assert store.receipt("fake", 0) is None


def test_a_damaged_note_is_said(begun: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, corpus = begun
    store = _stopped_after_the_receipt_went(root, corpus, monkeypatch)
    (noted,) = (root / "_log/replacing/fake/00000").glob("*values*")
    noted.write_bytes(noted.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedStoreError, match=r"it was to replace fake/values/c/0/0/0/0"):
        finish_replacements(store.place, "fake")
