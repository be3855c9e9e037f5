"""Planning outside memory: independent of bins, in order, each key once; and the ledger of receipts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_support import olapipe
from store_support import fill_shard, images, make_store

from olapipe import planning
from olapipe.corpora.conversations import samples
from olapipe.corpora.entry import Entry
from olapipe.planning import compare, gather
from olapipe.report import summarise
from olapipe.tasks import Pending, Planned
from olaschema import ledger
from olaschema.errors import CorpusError, DamagedStoreError
from olaschema.keys import tombstone
from olaschema.manifest import SampleRow
from olaschema.store import FeatureStore

KEYS = st.text(alphabet="ab/é.", min_size=1, max_size=4)


@pytest.fixture
def small_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_BINS", 3)
    monkeypatch.setattr(planning, "_PIECE", 4)
    monkeypatch.setattr(planning, "_RUN", 5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(listed=st.lists(KEYS, max_size=40), known=st.lists(KEYS, max_size=20, unique=True), gone=st.integers(0, 3))
def test_growth_is_what_sets_say(
    small_bins: None, tmp_path_factory: pytest.TempPathFactory, listed: list[str], known: list[str], gone: int
) -> None:
    root = tmp_path_factory.mktemp("s")
    store = FeatureStore.create(root / "s", rows_per_shard=4)
    planned = [SampleRow(row=0, key=key, uri=key, size=-1) for key in known]
    for key in known[:gone]:
        planned[known.index(key)] = SampleRow(row=0, key=tombstone(key), uri="", size=-1, problem="forgotten")
    store.add_generation(planned)
    entries = [Entry(key, place) for place, key in enumerate(listed)]
    listing = gather(root, entries)
    first = list(dict.fromkeys(listed))
    expected = [Entry(key, listed.index(key)) for key in first]
    assert list(listing.entries) == expected
    assert (listing.count, listing.repeated) == (len(first), len(listed) - len(first))
    growth = compare(listing, store)
    assert list(growth.new) == [entry for entry in expected if entry.key not in known]
    assert growth.known == len(set(first) & set(known))
    assert growth.gone == len(set(known[gone:]) - set(first))


def test_a_plan_of_tables_has_the_bytes_of_a_plan_of_rows(tmp_path: Path, small_bins: None) -> None:
    entries = [Entry(f"{i * 7 % 23:02d}.png", i, None if i % 5 else "bad-name") for i in range(23)]
    one = FeatureStore.create(tmp_path / "one", rows_per_shard=4)
    one.add_generation(entry.sample() for entry in entries)
    other = FeatureStore.create(tmp_path / "other", rows_per_shard=4)
    other.add_plan(gather(tmp_path, entries).entries.tables())
    for name in ("samples/0000-00000.parquet", "samples/0000.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_parts_hold_whole_shards_whatever_the_tables_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olaschema.store._PART_ROWS", 8)
    entries = [Entry(f"{i:03d}.png", i) for i in range(50)]
    monkeypatch.setattr(planning, "_RUN", 7)
    stores = []
    for name in ("rows", "tables"):
        store = FeatureStore.create(tmp_path / name, rows_per_shard=3)
        stores.append(store)
    stores[0].add_generation(entry.sample() for entry in entries)
    stores[1].add_plan(gather(tmp_path, entries).entries.tables())
    assert [len(table) for table in stores[1].plan_tables()] == [6] * 8 + [2]
    assert list(stores[0].samples()) == list(stores[1].samples())
    assert stores[0].generations() == stores[1].generations()
    found = stores[1].find({"029.png", "none"})
    assert found is not None and (found[1], found[2].row) == ("samples/0000-00004.parquet", 29)
    assert stores[1].find({"none"}) is None


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_lists_are_read_in_pieces_as_json_reads_them(tmp_path: Path, data: st.DataObject) -> None:
    values = st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
    entries = data.draw(st.lists(st.dictionaries(st.text(max_size=3), values, max_size=4), max_size=6))
    text = json.dumps(entries, ensure_ascii=data.draw(st.booleans()), indent=data.draw(st.sampled_from((None, 1))))
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("olapipe.corpora.conversations._PIECE", data.draw(st.integers(1, 9)))
        assert [sample for _, sample in samples(path)] == entries


@pytest.mark.parametrize("text", ["[{},]", "[{} {}]", "[{}] x", '[{"a": 1}', '[{"a": }]', "", "[,]"])
def test_lists_that_are_broken(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CorpusError, match="is not JSON"):
        list(samples(tmp_path / "c.json"))


def test_an_entry_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olapipe.corpora.conversations._LONGEST", 1000)
    monkeypatch.setattr("olapipe.corpora.conversations._PIECE", 100)
    (tmp_path / "c.json").write_text('[{"a": "' + "x" * 100_000)
    with pytest.raises(CorpusError, match="no end within"):
        list(samples(tmp_path / "c.json"))


def test_pending_shards_are_those_without_a_receipt(tmp_path: Path) -> None:
    store, _, _ = make_store(tmp_path / "s", count=9)
    name = store.teachers()[0]
    shards = store.committed(name)
    gone = shards[1]
    (tmp_path / "s" / "receipts" / name / f"{gone:05d}.json").unlink()
    pending = Pending(store, Planned.of(store).grown(5), [name])
    size = store.rows_per_shard
    tasks = [(task.shard, task.rows) for task in pending]
    fresh = [(len(shards) + i // size, min(size, 5 - i)) for i in range(0, 5, size)]
    assert tasks == [(gone, min(size, 9 - gone * size)), *fresh]
    assert len(pending) == pending.shards(name) == len(tasks)
    assert pending.images(name) == sum(rows for _, rows in tasks)
    assert list(pending) == list(pending)


def test_the_ledger_opens_a_receipt_once_and_again_when_it_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = make_store(tmp_path / "s", count=9)
    name = store.teachers()[0]
    whole = ledger.read_ledger(store, name, keep=True)
    opened: list[int] = []
    real = FeatureStore.receipt_bytes

    def counted(self: FeatureStore, teacher: str, shard: int) -> object:
        opened.append(shard)
        return real(self, teacher, shard)

    monkeypatch.setattr(FeatureStore, "receipt_bytes", counted)
    again = ledger.read_ledger(store, name)
    assert opened == [] and again.table.equals(whole.table)
    receipt = tmp_path / "s" / "receipts" / name / f"{store.committed(name)[1]:05d}.json"
    store.place.publish(f"receipts/{name}/{receipt.name}", receipt.read_bytes())  # the same bytes, another file
    assert ledger.read_ledger(store, name).digests == whole.digests
    assert opened == [store.committed(name)[1]]
    kept = tmp_path / "s" / "_log" / "ledger" / name
    kept.write_bytes(b"nonsense")
    assert ledger.read_ledger(store, name).digests == whole.digests
    spoilt = bytearray(receipt.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    receipt.write_bytes(spoilt)
    with pytest.raises(DamagedStoreError):
        ledger.read_ledger(store, name)


def test_a_ledger_with_any_bit_flipped_is_made_again(tmp_path: Path) -> None:
    store, _, _ = make_store(tmp_path / "s", count=9)
    name = store.teachers()[0]
    whole = ledger.read_ledger(store, name, keep=True)
    assert ledger.read_ledger(store, name).table.equals(whole.table)
    kept = tmp_path / "s" / "_log" / "ledger" / name
    data = kept.read_bytes()
    for place in range(0, len(data), 37):
        kept.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert ledger.read_ledger(store, name).table.equals(whole.table), place


def test_where_nothing_says_that_a_receipt_changed_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = make_store(tmp_path / "s", count=9)
    name = store.teachers()[0]
    monkeypatch.setattr(type(store.place), "stamps", lambda self, folder: dict.fromkeys(self.names(folder), ""))
    whole = ledger.read_ledger(store, name, keep=True)
    (tmp_path / "s" / "receipts" / name / "00001.json").write_bytes(b"{}")
    with pytest.raises(DamagedStoreError):
        ledger.read_ledger(store, name)
    assert len(whole.shards) == len(store.committed(name))


def test_a_receipt_that_goes_while_the_ledger_is_read_counts_as_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = make_store(tmp_path / "s", count=9)
    name = store.teachers()[0]
    shards = store.committed(name)
    real = FeatureStore.receipt_bytes

    def replacing(self: FeatureStore, teacher: str, shard: int) -> object:
        if shard == shards[1]:  # a worker that replaces this shard has just taken its receipt away
            store.place.remove(f"receipts/{name}/{shard:05d}.json")
        return real(self, teacher, shard)

    monkeypatch.setattr(FeatureStore, "receipt_bytes", replacing)
    assert ledger.read_ledger(store, name, keep=True).shards.tolist() == [shards[0], *shards[2:]]


def test_a_ledger_counts_what_the_receipts_say(tmp_path: Path) -> None:
    store, teacher, _ = make_store(tmp_path / "s", count=9)
    store.add_generation(images(7, start=9))
    store.put_teacher(teacher)
    features = np.ones((4, *teacher.fingerprint.shape), dtype=np.float32)
    fill_shard(store, teacher, 3, features, failed=(1, 3))
    fill_shard(store, teacher, 4, features[:3], failed=(0,))
    for name in store.teachers():
        found = ledger.read_ledger(store, name, keep=True)
        receipts = [store.receipt(name, shard) for shard in store.committed(name)]
        rows = [row for receipt in receipts if receipt is not None for row in receipt.rows]
        for status in ("ok", "failed", "absent"):
            assert found.total(status) == sum(row.status == status for row in rows)
        bad = [place for place, row in enumerate(rows) if row.status == "failed"]
        assert bad == [13, 15, 16]
        assert found.mendable().tolist() == [3, 4]
        assert found.failed_rows().keys() == {"truncated"}
        assert sorted(np.concatenate([*found.failed_rows().values(), np.zeros(0)]).tolist()) == bad
        folder = tmp_path / "s" / name
        on_disk = {
            p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file() and f.name != "zarr.json")
            for p in folder.iterdir()
            if p.is_dir()
        }
        assert found.array_bytes() == on_disk
        brief, whole = summarise(store, name, brief=True), summarise(store, name)
        assert brief.failures == whole.failures
        assert [failure.row for failure in whole.failures] == bad
        keys = {sample.row: sample.key for sample in store.samples()}
        assert all(keys[failure.row] == failure.key for failure in whole.failures)


def test_a_shard_whose_failed_rows_are_all_forgotten_is_not_to_be_mended(tmp_path: Path) -> None:
    store, teacher, _ = make_store(tmp_path / "s", count=9)
    store.add_generation(images(4, start=9))
    store.put_teacher(teacher)
    fill_shard(store, teacher, 3, np.ones((4, *teacher.fingerprint.shape), np.float32), failed=(1,))
    for key in ("0005.jpg", "0011.jpg"):  # in a shard without failures, and in the one with
        assert olapipe("forget", tmp_path / "s", key, "--yes").exit_code == 0
    found = ledger.read_ledger(store, "depth")
    assert {reason: rows.tolist() for reason, rows in found.failed_rows().items()} == {
        "forgotten": [5, 14],
        "truncated": [13],
    }
    assert found.mendable().tolist() == [3]


def test_the_spool_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    listing = gather(tmp_path, [Entry("a", 1)])
    assert list(tmp_path.iterdir()) == []
    before = len(os.listdir("/proc/self/fd"))
    del listing
    assert len(os.listdir("/proc/self/fd")) < before
