"""One shard, encoded without Ray by a teacher whose features can be computed by hand."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from pipeline_support import FakeTeacher, digests, write_images
from store_support import DOCS, decoding

from olapipe.corpus import list_corpus
from olapipe.dedup import dedup
from olapipe.encode import STAGES, Limits, ShardEncoder, execution
from olapipe.load import teacher_record
from olapipe.progress import make_reporter
from olapipe.verify import verify
from olaschema.errors import CorpusError, TeacherError
from olaschema.manifest import ChannelStatistics, Precision
from olaschema.reader import FeatureReader
from olaschema.seal import unseal
from olaschema.store import FeatureStore

ROWS = 8


def _ignore(teacher: str, rows: int) -> None:
    pass


def _encoder(
    out: Path,
    corpus: Path,
    *teachers: FakeTeacher,
    batch: int = 3,
    precision: Precision = "float32",
    max_pixels: int = 100_000,
    decoders: int = 1,  # decoding changes the warnings filter, which pytest holds at "error"
) -> ShardEncoder:
    store = FeatureStore.create(out, rows_per_shard=ROWS)
    if not store.generations():
        store.add_generation(entry.sample() for entry in list_corpus(corpus, None).entries)
    by_name = {teacher.name: teacher for teacher in teachers}
    records = {name: teacher_record(teacher, precision) for name, teacher in by_name.items()}
    for record in records.values():
        store.put_teacher(record)
    limits = Limits(batch, max_pixels, decoders)
    return ShardEncoder(store, corpus, by_name, records, limits, execution("cpu", batch))


def _expected(path: Path) -> np.ndarray:
    """The fake teacher's feature of one file, computed here."""
    with Image.open(path) as opened:
        small = opened.convert("RGB").resize((2, 2), Image.Resampling.BOX)
    colours = np.asarray(small, dtype=np.float32) / np.float32(255)
    return np.concatenate((colours, colours.sum(-1, keepdims=True)), axis=-1)


def _corpus(folder: Path, count: int = 7) -> Path:
    write_images(folder, *(f"{index}.png" for index in range(count)))
    return folder


def test_stored_values_are_the_teachers_and_the_rest_is_nan(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "c", 10)
    encoder = _encoder(tmp_path / "s", corpus, FakeTeacher())
    for shard in (0, 1):
        encoder.encode(shard, ["fake"], _ignore)
    values = zarr.open_group(tmp_path / "s", mode="r")["fake/values"][:]
    assert values.shape == (16, 2, 2, 4)
    for index in range(10):
        np.testing.assert_allclose(values[index], _expected(corpus / f"{index}.png"), rtol=1e-6)
    assert np.isnan(values[10:]).all()


def test_batches_are_full_but_for_the_last_and_never_cross_a_shard(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c", 10), teacher, batch=3)
    encoder.encode(0, ["fake"], _ignore)
    encoder.encode(1, ["fake"], _ignore)
    assert teacher.batches == [3, 3, 2, 2]


def test_failed_rows_leave_the_batches_and_keep_their_place(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "c", 7)
    (corpus / "2.png").write_bytes((corpus / "2.png").read_bytes()[:-40])
    (corpus / "5.png").write_bytes(b"")
    teacher = FakeTeacher()
    encoder = _encoder(tmp_path / "s", corpus, teacher, batch=4)
    (corpus / "3.png").unlink()  # after the listing
    (corpus / "4.png").write_bytes(b"longer" * 1000)
    receipt = encoder.encode(0, ["fake"], _ignore)["fake"]
    assert [row.status for row in receipt.rows] == ["ok"] * 2 + ["failed"] * 4 + ["ok", "absent"]
    assert [row.reason for row in receipt.rows[2:6]] == ["truncated", "missing", "changed", "empty"]
    assert teacher.batches == [3]
    values = zarr.open_group(tmp_path / "s", mode="r")["fake/values"][:]
    np.testing.assert_allclose(values[6], _expected(corpus / "6.png"), rtol=1e-6)
    assert np.isnan(values[2:6]).all()


def test_receipts_describe_each_image(tmp_path: Path) -> None:
    import hashlib

    corpus = _corpus(tmp_path / "c", 2)
    receipt = _encoder(tmp_path / "s", corpus, FakeTeacher()).encode(0, ["fake"], _ignore)["fake"]
    for index, row in enumerate(receipt.rows[:2]):
        data = (corpus / f"{index}.png").read_bytes()
        assert (row.sha256, row.width, row.height) == (hashlib.sha256(data).hexdigest(), 32, 24)
    assert receipt.execution.batch_size == 3
    assert receipt.execution.threads == torch.get_num_threads()


def test_statistics_are_those_of_the_good_rows(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "c", 7)
    (corpus / "1.png").write_bytes(b"no image at all")
    receipt = _encoder(tmp_path / "s", corpus, FakeTeacher(), batch=2).encode(0, ["fake"], _ignore)["fake"]
    found = ChannelStatistics.from_json(receipt.statistics, 4)
    good = np.stack([_expected(corpus / f"{index}.png") for index in (0, 2, 3, 4, 5, 6)]).reshape(-1, 4)
    assert found.count == len(good)
    np.testing.assert_allclose(found.mean, good.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.variance, good.astype(np.float64).var(0), rtol=1e-5)
    np.testing.assert_allclose(found.minimum, good.min(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("poison", "precision", "reason"),
    [
        (float("nan"), "float32", "not-finite"),
        (float("inf"), "float16", "not-finite"),
        (70_000.0, "float16", "overflow"),
        (70_000.0, "float32", None),
        (float("nan"), "int8", "not-finite"),
        (float("-inf"), "int4", "not-finite"),
        (70_000.0, "int8", None),
        (8_319_009.0, "int8", "overflow"),
        (-458_529.0, "int4", "overflow"),
    ],
)
def test_a_feature_that_cannot_be_stored_fails_alone(
    tmp_path: Path, poison: float, precision: Precision, reason: str | None
) -> None:
    corpus = _corpus(tmp_path / "c", 4)
    teacher = FakeTeacher()
    teacher.poison = {float(_expected(corpus / "1.png")[0, 0, 0]): poison}
    receipt = _encoder(tmp_path / "s", corpus, teacher, batch=4, precision=precision).encode(0, ["fake"], _ignore)
    rows = receipt["fake"].rows
    assert [row.reason for row in rows[:4]] == [None, reason, None, None]
    assert [row.status for row in rows[:4]] == ["ok", "failed" if reason else "ok", "ok", "ok"]
    if reason is not None:
        assert "1.png" not in (rows[1].detail or ""), "the row names the image"
    decoded = _decoded(tmp_path / "s", precision)
    assert np.isnan(decoded[1]).any() == (reason is not None)
    assert np.isfinite(decoded[[0, 2, 3]]).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_are_within_their_bound_of_the_teachers_features(tmp_path: Path, precision: Precision) -> None:
    corpus = _corpus(tmp_path / "c", 5)
    (corpus / "2.png").write_bytes(b"")
    receipt = _encoder(tmp_path / "s", corpus, FakeTeacher(), precision=precision).encode(0, ["fake"], _ignore)["fake"]
    assert sorted(receipt.files) == ["fake/offset/c/0/0", "fake/scale/c/0/0/0/0", "fake/values/c/0/0/0/0"]
    decoded = _decoded(tmp_path / "s", precision)
    assert np.isnan(decoded[[2, 5, 6, 7]]).all()
    for index in (0, 1, 3, 4):
        expected = _expected(corpus / f"{index}.png")
        centred = expected - expected.astype(np.float64).mean(axis=(0, 1))
        bound = np.abs(centred).max(axis=-1, keepdims=True) / {"int8": 254, "int4": 14}[precision] * 1.002 + 2.0**-10
        assert (np.abs(decoded[index] - expected) <= bound).all()
        assert (decoded[index] != expected).any(), "it was rounded"
    # statistics are those of the features as computed, not as stored
    found = ChannelStatistics.from_json(receipt.statistics, 4)
    good = np.stack([_expected(corpus / f"{index}.png") for index in (0, 1, 3, 4)]).reshape(-1, 4)
    np.testing.assert_allclose(found.mean, good.astype(np.float64).mean(0), rtol=1e-6)


def _decoded(root: Path, precision: Precision) -> np.ndarray:
    arrays = {name: array[:] for name, array in zarr.open_group(root, mode="r")["fake"].arrays()}
    return decoding(DOCS, precision)(channels=4, **arrays)


def test_one_decode_serves_all_teachers_and_one_may_refuse_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olapipe import encode

    corpus = _corpus(tmp_path / "c", 3)
    write_images(corpus, "wide.png", size=(90, 10))
    decoded = []
    original = encode.decode_image
    monkeypatch.setattr(encode, "decode_image", lambda data, **more: decoded.append(1) or original(data, **more))
    first, second = FakeTeacher("first"), FakeTeacher("second", refused_width=90)
    encoder = _encoder(tmp_path / "s", corpus, first, second, batch=2)
    receipts = encoder.encode(0, ["first", "second"], _ignore)
    assert len(decoded) == 4
    assert [row.status for row in receipts["first"].rows[:4]] == ["ok"] * 4
    assert [row.reason for row in receipts["second"].rows[:4]] == [None, None, None, "too-large"]
    assert (first.batches, second.batches) == ([2, 2], [2, 1])


def test_only_the_named_teachers_run(tmp_path: Path) -> None:
    first, second = FakeTeacher("first"), FakeTeacher("second")
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c", 2), first, second)
    assert list(encoder.encode(0, ["second"], _ignore)) == ["second"]
    assert first.batches == []
    assert first.fake_preprocessor.seen == []


@pytest.mark.parametrize("decoders", [1, 3])
def test_bytes_depend_neither_on_the_place_of_the_corpus_nor_on_threads(tmp_path: Path, decoders: int) -> None:
    stores = []
    for place in ("here", "elsewhere/deep"):
        corpus = _corpus(tmp_path / place / "c", 7)
        (corpus / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken header")
        (corpus / "4.png").write_bytes((corpus / "4.png").read_bytes()[:60])
        out = tmp_path / place / "s"
        used = decoders if place == "here" else 1
        _encoder(out, corpus, FakeTeacher(), decoders=used).encode(0, ["fake"], _ignore)
        stores.append(out)
    assert digests(stores[0]) == digests(stores[1])
    receipt = FeatureStore.open(stores[0]).receipt("fake", 0)
    assert receipt is not None
    assert receipt.failed == 2
    details = [row.detail for row in receipt.rows if row.status == "failed"]
    assert all(detail and not detail.startswith(("3.png", "4.png")) for detail in details), "the key is not repeated"
    assert str(tmp_path) not in (stores[0] / "receipts/fake/00000.json").read_text()


def test_progress_counts_every_planned_row_once(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "c", 5)
    (corpus / "0.png").write_bytes(b"")
    told: list[int] = []
    _encoder(tmp_path / "s", corpus, FakeTeacher(), batch=2).encode(0, ["fake"], lambda _, rows: told.append(rows))
    assert told == sorted(told)
    assert told[-1] == 5


def test_a_committed_shard_is_replaced_only_when_asked(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "c", 2)
    good = (corpus / "1.png").read_bytes()
    (corpus / "1.png").write_bytes(b"x" * len(good))
    encoder = _encoder(tmp_path / "s", corpus, FakeTeacher())
    assert encoder.encode(0, ["fake"], _ignore)["fake"].failed == 1
    (corpus / "1.png").write_bytes(good)
    assert encoder.encode(0, ["fake"], _ignore)["fake"].failed == 1
    assert encoder.encode(0, ["fake"], _ignore, replace=True)["fake"].failed == 0


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_sound_shard_that_is_replaced_keeps_what_can_no_longer_be_computed(
    tmp_path: Path, precision: Precision
) -> None:
    corpus = _corpus(tmp_path / "c", 6)
    good = (corpus / "1.png").read_bytes()
    (corpus / "1.png").write_bytes(b"x" * len(good))
    (corpus / "5.png").write_bytes((corpus / "3.png").read_bytes())
    encoder = _encoder(tmp_path / "s", corpus, FakeTeacher(), precision=precision)
    encoder.encode(0, ["fake"], _ignore)
    dedup(encoder.store, make_reporter())
    unseal(encoder.store, ["fake"])  # as the run that replaces a shard does
    before = FeatureReader(encoder.store, "fake")
    kept = {row: before.feature(row) for row in (0, 2, 3, 4, 5)}
    (corpus / "1.png").write_bytes(good)
    for name in ("2.png", "3.png", "5.png"):
        (corpus / name).unlink()
    receipt = encoder.encode(0, ["fake"], _ignore, replace=True)["fake"]
    assert [row.status for row in receipt.rows] == ["ok"] * 6 + ["absent"] * 2
    assert [row.same_as for row in receipt.rows[:6]] == [None] * 5 + [3]
    after = FeatureReader(encoder.store, "fake")
    for row, feature in kept.items():
        np.testing.assert_array_equal(after.feature(row), feature)
    assert verify(str(tmp_path / "s"), make_reporter()).problems == []  # the statistics, too

    # of a damaged shard nothing is known to be right
    (path,) = (tmp_path / "s" / "fake" / "values" / "c").rglob("0/0/0/0")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    receipt = encoder.encode(0, ["fake"], _ignore, replace=True)["fake"]
    assert [row.reason for row in receipt.rows[:6]] == [None, None, "missing", "missing", None, "missing"]


def test_a_vanished_image_folder_is_no_reason_to_fail_every_image(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path / "c", 2)
    encoder = _encoder(tmp_path / "s", corpus, FakeTeacher())
    corpus.rename(tmp_path / "moved")
    with pytest.raises(CorpusError, match="image folder is not there"):
        encoder.encode(0, ["fake"], _ignore)
    corpus.mkdir()  # where it was to be mounted
    with pytest.raises(CorpusError, match="image folder is not there, or empty, on "):
        encoder.encode(0, ["fake"], _ignore)
    assert encoder.store.committed("fake") == []


@pytest.mark.parametrize("left", [None, "empty"])
def test_an_image_folder_that_vanishes_meanwhile_fails_no_image(
    left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = _corpus(tmp_path / "c", 7)
    teacher = FakeTeacher()
    encoder = _encoder(tmp_path / "s", corpus, teacher, batch=1)
    encode = teacher.encode

    def unmounted(pixels_bchw: torch.Tensor) -> torch.Tensor:
        if corpus.exists() and any(corpus.iterdir()):
            corpus.rename(tmp_path / "moved")
            if left == "empty":
                corpus.mkdir()
        return encode(pixels_bchw)

    monkeypatch.setattr(teacher, "encode", unmounted)
    with pytest.raises(CorpusError, match="same command again"):
        encoder.encode(0, ["fake"], _ignore)
    assert encoder.store.committed("fake") == []


def test_images_that_were_never_there_need_no_folder_with_others(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "c.json").write_text('[{"image": "none.png", "conversations": []}]')
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=ROWS)
    store.add_generation(entry.sample() for entry in list_corpus(tmp_path / "c.json", tmp_path / "images").entries)
    receipt = _encoder(tmp_path / "s", tmp_path / "images", FakeTeacher()).encode(0, ["fake"], _ignore)["fake"]
    assert receipt.rows[0].reason == "missing"


def test_memory_of_the_device_and_shapes_are_the_teachers_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = FakeTeacher()
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c", 2), teacher)

    def exhausted(pixels_bchw: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(teacher, "encode", exhausted)
    with pytest.raises(TeacherError, match="not even one image") as caught:
        encoder.encode(0, ["fake"], _ignore)
    assert "fewer workers" in caught.value.remedy
    monkeypatch.setattr(teacher, "encode", lambda pixels_bchw: torch.zeros(len(pixels_bchw), 2, 2, 5))
    with pytest.raises(TeacherError, match=r"\(2, 2, 2, 5\)"):
        encoder.encode(0, ["fake"], _ignore)


class _BatchTeacher(FakeTeacher):
    """The last channel of every feature is how many images were encoded with it; more than `fits` do not fit."""

    def __init__(self, name: str = "fake", fits: int = 100, error: Exception | None = None) -> None:
        super().__init__(name)
        self.fits = fits
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        features = super().encode(pixels_bchw)
        if len(pixels_bchw) > self.fits:
            raise self.error
        features[..., 3] = len(pixels_bchw)
        return features


def _batches(out: Path, teacher: str, shard: int) -> list[int]:
    values = FeatureReader(FeatureStore.open(out), teacher)
    return [int(values.feature(row)[0, 0, 3]) for row in range(shard * ROWS, min(shard * ROWS + ROWS, 11))]


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: not enough memory: you tried to …")])
def test_a_batch_that_does_not_fit_is_halved_for_the_whole_shard_and_recorded(
    tmp_path: Path, error: Exception | None
) -> None:
    small, large = _BatchTeacher("small", 2, error), _BatchTeacher("large")
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c", 11), small, large, batch=4)
    for shard in (0, 1):
        receipts = encoder.encode(shard, ["small", "large"], _ignore)
        assert receipts["small"].execution.batch_size == 2
        assert receipts["large"].execution.batch_size == 4
    assert _batches(tmp_path / "s", "small", 0) == [2] * 8
    assert _batches(tmp_path / "s", "small", 1) == [2, 2, 1]
    # no batch holds images of two shards
    assert _batches(tmp_path / "s", "large", 0) == [4] * 8
    assert _batches(tmp_path / "s", "large", 1) == [3, 3, 3]
    # the next shard starts with the full batch again
    assert small.batches == [4, 2, 2, 2, 2, 3, 2, 1]


def test_poisoned_rows_are_not_touched_and_batches_close_up_over_them(tmp_path: Path) -> None:
    teacher = _BatchTeacher()
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c"), teacher, batch=2)
    receipt = encoder.encode(0, ["fake"], _ignore, poisoned={"fake": {1: "crashed"}})["fake"]
    assert [row.status for row in receipt.rows] == ["ok", "failed", "ok", "ok", "ok", "ok", "ok", "absent"]
    assert receipt.rows[1].reason == "crashed" and receipt.rows[1].sha256 is None
    assert teacher.batches == [2, 2, 2]
    assert len(teacher.fake_preprocessor.seen) == 6
    assert np.isnan(zarr.open_group(tmp_path / "s", mode="r")["fake/values"][1]).all()


def test_timings_name_every_stage(tmp_path: Path) -> None:
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c"), FakeTeacher())
    timings: dict[str, float] = {}
    encoder.encode(0, ["fake"], _ignore, timings=timings)
    assert set(timings) == {*STAGES, "wall"}
    assert all(spent > 0 for spent in timings.values())


def test_two_shards_in_two_threads_take_turns_with_the_teacher(tmp_path: Path) -> None:
    inside, most = 0, 0

    class Slow(FakeTeacher):
        def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1
            return super().encode(pixels_bchw)

    teacher = Slow()
    encoder = _encoder(tmp_path / "s", _corpus(tmp_path / "c", 11), teacher, batch=2)
    threads = [threading.Thread(target=encoder.encode, args=(shard, ["fake"], _ignore)) for shard in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert sorted(teacher.batches) == [1, 2, 2, 2, 2, 2]
    for shard in (0, 1):
        for sample in encoder.store.shard_samples(shard):
            np.testing.assert_array_equal(
                FeatureReader(encoder.store, "fake").feature(sample.row), _expected(tmp_path / "c" / sample.key)
            )
