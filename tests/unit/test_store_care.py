"""What must not be lost or taken for our own: forgotten images, others' tars, interrupted work, strange folders."""

from __future__ import annotations

import hashlib
import io
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pipeline_support import write_images
from store_support import fill_shard, record

from olapipe.audit import Report
from olapipe.config import ExtractConfig
from olapipe.copy import copy
from olapipe.corpus import compare, list_corpus
from olapipe.direct import DirectSet, working
from olapipe.dryrun import dry_run
from olapipe.forget import forget
from olapipe.pack import PackSettings, pack
from olapipe.picture import photograph
from olapipe.preview.rows import read_picture
from olapipe.progress import make_reporter
from olapipe.repair import Repair
from olapipe.transfer import begin
from olapipe.verify import Findings, verify
from olaschema import lease
from olaschema.errors import StoreError
from olaschema.images import DEFAULT_MAX_PIXELS
from olaschema.layout import array_document, basis_file
from olaschema.manifest import RowReceipt, SampleRow, TeacherRecord
from olaschema.place import open_place
from olaschema.replacing import REPLACING
from olaschema.seal import seal
from olaschema.store import FeatureStore


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fill(store: FeatureStore, told: TeacherRecord, shard: int, images: Path) -> None:
    paths = [images / sample.key for sample in store.shard_samples(shard)]
    rng = np.random.default_rng(shard)
    features = rng.normal(size=(len(paths), *told.fingerprint.shape)).astype(np.float32)
    failed = tuple(place for place, path in enumerate(paths) if not path.exists())
    seen = [_digest(path) if path.exists() else "" for path in paths]
    fill_shard(store, told, shard, features, failed=failed, seen=seen)


def _store(root: Path, images: Path, count: int = 4, *, shards: Sequence[int] | None = None) -> FeatureStore:
    """A store of `depth` over images that are there, two to a shard."""
    write_images(images, *(f"{number}.png" for number in range(count)))
    store = FeatureStore.create(root, rows_per_shard=2)
    store.add_generation(entry.sample() for entry in list_corpus(images, None).entries)
    told = record("float16")
    store.put_teacher(told)
    for shard in range(store.shard_count()) if shards is None else shards:
        _fill(store, told, shard, images)
    seal(store, ["depth"])
    return store


def test_an_image_is_not_called_forgotten_while_another_teacher_joins(tmp_path: Path) -> None:
    _store(tmp_path / "s", tmp_path / "i")
    planned, release = threading.Event(), threading.Event()
    told = record("float16", teacher="late")

    def job() -> None:  # as a run of `extract` with another teacher does it
        store = FeatureStore.open(tmp_path / "s")
        with lease.writing(store.place, ["late"], wait=True):
            with store.place.lock("plan"):
                planned.set()
                release.wait(20)
                store.put_teacher(told)
            finished.wait(20)

    finished = threading.Event()
    thread = threading.Thread(target=job)
    thread.start()
    planned.wait(20)
    threading.Timer(0.3, release.set).start()
    try:
        with pytest.raises(StoreError, match=r"leases/late: .* is writing there now"):
            forget(FeatureStore.open(tmp_path / "s"), "0.png")
    finally:
        finished.set()
        thread.join()
    done = forget(FeatureStore.open(tmp_path / "s"), "0.png")
    assert done.teachers == ["depth", "late"]


def test_tars_of_others_are_left_alone(tmp_path: Path) -> None:
    _store(tmp_path / "s", tmp_path / "i")
    others = tmp_path / "others"
    others.mkdir()
    for number in range(3):
        (others / f"{number:06d}.tar").write_bytes(b"a shard of webdataset's")
    before = {path.name: path.read_bytes() for path in others.iterdir()}
    settings = PackSettings(str(tmp_path / "s"), None, tmp_path / "i", str(others))
    config = ExtractConfig(corpus=tmp_path / "i", out=str(others), teachers=("depth",), format="webdataset")
    for _ in range(2):  # having been refused once makes it no more ours
        with pytest.raises(StoreError, match=r"others holds something else: 000000\.tar"):
            pack(settings)
        with pytest.raises(StoreError, match=r"others holds something else: 000000\.tar"):
            DirectSet(config, tmp_path / "i")
    assert {path.name: path.read_bytes() for path in others.iterdir()} == before


def test_a_packing_that_was_killed_before_its_end_goes_on(tmp_path: Path) -> None:
    _store(tmp_path / "s", tmp_path / "i")
    settings = PackSettings(str(tmp_path / "s"), None, tmp_path / "i", str(tmp_path / "p"))
    pack(settings)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "p").glob("*.*")}
    for name in ("packed.json", "000001.json"):
        (tmp_path / "p" / name).unlink()
    assert pack(settings).made == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "p").glob("*.*")} == whole


def test_an_image_that_is_back_is_packed(tmp_path: Path) -> None:
    _store(tmp_path / "s", tmp_path / "i")
    (tmp_path / "i/1.png").rename(tmp_path / "hidden.png")
    settings = PackSettings(str(tmp_path / "s"), None, tmp_path / "i", str(tmp_path / "p"))
    first = pack(settings)
    assert (first.record.samples, first.record.left_out) == (3, {"missing": 1})
    assert pack(settings).made == 0, "what is still gone is not tried again and again"
    (tmp_path / "hidden.png").rename(tmp_path / "i/1.png")
    again = pack(settings)
    assert (again.made, again.record.samples, again.record.left_out) == (1, 4, {})
    pack(PackSettings(str(tmp_path / "s"), None, tmp_path / "i", str(tmp_path / "fresh")))
    names = {path.name for path in (tmp_path / "fresh").glob("*.*")}
    assert {name: (tmp_path / "p" / name).read_bytes() for name in names} == {
        name: (tmp_path / "fresh" / name).read_bytes() for name in names
    }


def test_a_set_whose_first_tar_was_never_made_is_mended_and_guarded(tmp_path: Path) -> None:
    images = tmp_path / "i"
    config = ExtractConfig(
        corpus=images, out=str(tmp_path / "p"), teachers=("depth",), format="webdataset", shard_size=2
    )
    store = _store(tmp_path / "p/_log/store", images, 6, shards=(1, 2))
    told = store.teacher("depth")

    def go_on(only: int | None = None, teachers: tuple[str, ...] = ("depth",)) -> Any:
        listing = list_corpus(images, None)
        direct = DirectSet(config.model_copy(update={"teachers": teachers}), listing.root)
        own = FeatureStore.open(working(config).out)
        with direct.writing():
            direct.reopen(own, compare(listing, own), lambda text: None)
            with direct.packing(own) as packing:
                for shard in sorted(set(range(3)) - set(own.committed("depth"))):
                    if only is None or shard == only:
                        _fill(own, told, shard, images)
                        packing.shard_done(shard)
                return packing.finish()

    assert go_on(only=7) is None
    made = sorted(path.name for path in (tmp_path / "p").glob("*.tar"))
    assert made == ["000001.tar", "000002.tar"], "shard 0 was given up"
    with pytest.raises(StoreError, match="it gets no others"):
        go_on(teachers=("depth", "gen"))
    (tmp_path / "p/000001.tar").write_bytes(b"torn")
    packed = go_on()
    assert packed is not None
    assert packed.record.samples == 6


def test_a_repair_that_gave_a_shard_up_is_no_success() -> None:
    findings = Findings()
    assert Report(findings, Repair([])).exit_code == 0
    assert Report(findings, Repair([], lost=["depth shard 1: out of memory"])).exit_code == 1


def test_a_mended_or_very_large_image_is_shown(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("L", (20_000, 5_001)).save(data, "PNG")
    (tmp_path / "big.png").write_bytes(data.getvalue())
    sample = SampleRow(row=0, key="big.png", uri="big.png", size=40)  # it was cut short when it was planned
    receipt = RowReceipt(status="ok", sha256=hashlib.sha256(data.getvalue()).hexdigest(), width=20_000, height=5_001)
    assert photograph(sample, tmp_path, [receipt], upright=True).size == (20_000, 5_001)
    shown = read_picture(tmp_path, sample, [receipt], DEFAULT_MAX_PIXELS).oriented(exif=True)
    assert shown.size == (20_000, 5_001)


def test_a_store_whose_shard_is_being_replaced_is_not_copied(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", tmp_path / "i")
    receipt = tmp_path / "s/receipts/depth/00001.json"
    note = tmp_path / "s" / REPLACING / "depth/00001"
    note.mkdir(parents=True)
    shutil.copy(receipt, note / "receipt.json")
    copy(store, str(tmp_path / "whole"), make_reporter())  # the old receipt stands: nothing hangs on the note
    receipt.unlink()
    with pytest.raises(StoreError, match="depth shard 1 was being replaced when its job ended"):
        copy(FeatureStore.open(tmp_path / "s"), str(tmp_path / "half"), make_reporter())


def test_a_target_belongs_to_the_last_job_that_used_it(tmp_path: Path) -> None:
    begin(str(tmp_path / "t"), "first")
    begin(str(tmp_path / "t"), "first")
    begin(str(tmp_path / "t"), "second")  # nothing was written yet
    (tmp_path / "t/file").write_bytes(b"of the second job")
    with pytest.raises(StoreError, match="not what an interrupted run of the same command left"):
        begin(str(tmp_path / "t"), "first")
    begin(str(tmp_path / "t"), "second")


def test_a_start_in_another_precision_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", tmp_path / "i")
    for array in ("values", "scale", "offset"):
        (tmp_path / "s" / array_document("late", array)).parent.mkdir(parents=True)
        (tmp_path / "s" / array_document("late", array)).write_text("{}")
    (tmp_path / "s" / basis_file("late")).parent.mkdir(exist_ok=True)
    (tmp_path / "s" / basis_file("late")).write_bytes(b"of a start as klt")
    # an array of the same name says something else, which is refused as ever
    (tmp_path / "s" / array_document("late", "values")).unlink()
    told = record("float16", teacher="late")
    store.put_teacher(told)
    for shard in range(2):
        _fill(store, told, shard, tmp_path / "i")
    assert [problem.file for problem in verify(str(tmp_path / "s"), make_reporter()).problems] == []


def test_parts_of_a_damaged_generation_are_no_strays(tmp_path: Path) -> None:
    _store(tmp_path / "s", tmp_path / "i")
    path = tmp_path / "s/samples/0000.json"
    path.write_text(path.read_text().replace('"first_row"', '"first_raw"', 1).replace('"rows"', '"raws"', 1))
    (tmp_path / "s/samples/0007-00000.parquet").write_bytes(b"of nobody")
    named = {problem.file for problem in verify(str(tmp_path / "s"), make_reporter()).problems}
    assert "samples/0000.json" in named
    assert "samples/0000-00000.parquet" not in named
    assert "samples/0007-00000.parquet" in named


@pytest.mark.parametrize(("share", "images", "most"), [("29%", 100, 29), ("57%", 100, 57), ("0.5%", 1000, 5)])
def test_a_share_of_failures_is_exact(tmp_path: Path, share: str, images: int, most: int) -> None:
    config = ExtractConfig(corpus=tmp_path, out=str(tmp_path / "s"), teachers=("depth",), max_failures=share)
    assert config.most_failures(images) == most


@pytest.mark.parametrize(("precision", "files"), [("float16", 2), ("int8", 4)])
def test_a_dry_run_counts_the_files_of_its_precision(tmp_path: Path, precision: str, files: int) -> None:
    config = ExtractConfig.model_validate(
        {"corpus": tmp_path, "out": str(tmp_path / "s"), "teachers": ["depth"], "precision": precision}
    )
    (told,) = dry_run(config, None, 300).teachers
    assert told.arrays == files - 1


def test_folders_that_cannot_be_listed_and_foreign_temporary_files_are_said(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", tmp_path / "i")
    (tmp_path / "s/_log/tmp/.DS_Store").write_bytes(b"a desktop's")
    store.place.sweep()
    loop = tmp_path / "s/loop"
    loop.symlink_to(loop)
    for listing in (open_place(tmp_path / "s").names, open_place(tmp_path / "s").stamps):
        with pytest.raises(StoreError, match="loop cannot be listed: Too many levels"):
            listing("loop")
