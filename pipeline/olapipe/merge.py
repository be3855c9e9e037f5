"""The command `merge`: one store of the images and features of several.

Every source generation becomes one of the result, less the images that an earlier source has. Shards whose rows stay
together are taken over byte for byte; the others are put together from rows as they are stored, never encoded again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from olapipe.mergeplan import Chosen, MergePlan, plan_merge
from olapipe.progress import Reporter
from olapipe.transfer import ROOT, begin, identity, require_finished, require_intact, require_unchanged
from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.layout import receipt_file, shard_lock
from olaschema.manifest import ChannelStatistics, Execution, RowReceipt, TeacherRecord
from olaschema.precision import blank, decode
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore
from olaschema.zarrbytes import root_document


@dataclass
class Merged:
    """What was done. `taken` shards were taken over as they are, `rebuilt` ones put together from rows."""

    images: int
    repeated: int
    """Images that several sources have."""
    forgotten: int
    taken: int = 0
    rebuilt: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """Features by teacher that are left out: their shard has images which no source has extracted."""


def merge(sources: Sequence[FeatureStore], out: str, reporter: Reporter) -> Merged:
    """Write the union of `sources` to `out`, verify it, and compare every feature with its source bit by bit.

    Images are joined by key. Raises StoreError naming a key whose image differs between sources (by SHA-256) or a
    teacher whose precision does, FingerprintError where features differ in meaning. A second call finishes an
    interrupted one.
    """
    require_finished(sources)
    before = [identity(source) for source in sources]
    records = _records(sources)
    plan = plan_merge(sources)
    place = begin(out, f"merge {' '.join(before)}")
    target = FeatureStore(place, sources[0].record)
    present = len(target.generations())
    if present > len(plan.generations):
        raise StoreError(f"{out} has grown since it was merged", "Choose a new place.")
    for samples in plan.generations[present:]:
        target.add_generation(samples)
    done = Merged(plan.images, plan.repeated, plan.forgotten)
    for record in records.values():
        _Teacher(sources, target, plan, record).write(done, reporter)
    require_unchanged(sources, before)
    place.publish(ROOT, root_document(target.record))
    seal(target, target.teachers())
    require_intact(out, reporter)
    for record in records.values():
        _Teacher(sources, target, plan, record).compare()
    return done


def _records(sources: Sequence[FeatureStore]) -> dict[str, TeacherRecord]:
    found: dict[str, TeacherRecord] = {}
    for source in sources:
        for name in source.teachers():
            record = source.teacher(name)
            first = found.setdefault(name, record)
            remedy = "Merge only stores of the same features; `olapipe drop` takes a teacher out of one."
            first.fingerprint.require_equal(record.fingerprint, mine="so far", theirs=source.url, remedy=remedy)
            if first.precision != record.precision:
                raise StoreError(
                    f"{name} is stored as {first.precision}, and as {record.precision} in {source.url}", remedy
                )
            if first.centred != record.centred:
                raise StoreError(
                    f"{name} is stored as {first.precision} in all sources, but not in all with offsets, which earlier "
                    f"versions did not write: {source.url} differs from those before it",
                    "Extract the older one again.",
                )
            if first.basis != record.basis:
                raise StoreError(f"{name} is stored in another basis in {source.url}", "Extract one of them again.")
    return dict(sorted(found.items()))


class _Teacher:
    """One teacher's part of a merge."""

    def __init__(
        self, sources: Sequence[FeatureStore], target: FeatureStore, plan: MergePlan, record: TeacherRecord
    ) -> None:
        self.sources = sources
        self.target = target
        self.plan = plan
        self.record = record
        self.name = record.fingerprint.teacher
        self.size = target.rows_per_shard
        self.readers = [FeatureReader(s, self.name) if self.name in s.teachers() else None for s in sources]
        self.basis = next(reader.basis for reader in self.readers if reader is not None)

    def write(self, done: Merged, reporter: Reporter) -> None:
        self.target.put_teacher(self.record, self.basis)
        self._further_files()
        reporter.say(f"merging {self.name} …")
        for shard, rows in self._shards():
            if any(row is None for row in rows):
                features = sum(row is not None and row.receipt.status == "ok" for row in rows)
                if features:
                    done.left[self.name] = done.left.get(self.name, 0) + features
                continue
            whole = [row for row in rows if row is not None]
            receipts = [self._receipt(row) for row in whole]
            if self._take(shard, whole, receipts):
                done.taken += 1
            else:
                self._rebuild(shard, whole, receipts)
                done.rebuilt += 1

    def compare(self) -> None:
        """Raise DamagedStoreError unless each row of the result is, bit by bit, the row it was taken from."""
        reader = FeatureReader(self.target, self.name)
        for shard, rows in self._shards():
            for index, row in enumerate(rows):
                place = shard * self.size + index
                status = reader.status(place)
                if row is None or status is None or status.status != "ok":
                    continue
                mine, theirs = reader.read(place).arrays, self._reader(row).read(row.row).arrays
                if any(mine[name].tobytes() != theirs[name].tobytes() for name in theirs):
                    self.target.place.remove(ROOT)
                    raise DamagedStoreError(
                        f"{self.target.url}: row {place} of {self.name} is not that of its source",
                        "Delete this unfinished store and run the same command again; twice is a defect.",
                    )

    def _shards(self) -> Iterator[tuple[int, list[Chosen | None]]]:
        for generation in self.target.generations():
            for first in range(generation.first_row, generation.first_row + generation.rows, self.size):
                last = min(first + self.size, generation.first_row + generation.rows)
                yield first // self.size, [self.plan.choose(row, self.readers) for row in range(first, last)]

    def _reader(self, row: Chosen) -> FeatureReader:
        reader = self.readers[row.source]
        if reader is None:
            raise StoreError(f"{self.sources[row.source].url} has no features of {self.name}")
        return reader

    def _receipt(self, row: Chosen) -> RowReceipt:
        """Return what the result says of a row: one that shares another row still does, if that one has its own."""
        receipt = row.receipt
        if receipt.same_as is None:
            return receipt
        moved = self.plan.moved[row.source].get(receipt.same_as)
        other = None if moved is None else self.plan.choose(moved, self.readers)
        keeps = other is not None and other.receipt.stored and other.receipt.sha256 == receipt.sha256
        return receipt.model_copy(update={"same_as": moved if keeps else None})

    def _take(self, shard: int, rows: Sequence[Chosen], receipts: Sequence[RowReceipt]) -> bool:
        """Take a shard over whose rows are those of one source's shard, in order; says whether they are."""
        first = rows[0]
        source = self.sources[first.source]
        if source.rows_per_shard != self.size or first.row % self.size:
            return False
        if self._reader(first).record.zstd_level != self.record.zstd_level:
            return False  # its bytes are not those that a repair would write
        together = all(row.source == first.source and row.row == first.row + i for i, row in enumerate(rows))
        old = source.receipt(self.name, first.row // self.size) if together else None
        if old is None or sum(row.status != "absent" for row in old.rows) != len(rows):
            return False
        same = [row.stored for row in receipts] == [row.stored for row in old.rows[: len(rows)]]
        if not same or any(row.receipt != seen for row, seen in zip(rows, old.rows, strict=False)):
            return False
        objects, files = {}, {}
        for name, promised in old.files.items():
            data = source.place.read(name)
            if (len(data), hashlib.sha256(data).hexdigest()) != (promised.bytes, promised.sha256):
                raise DamagedStoreError(
                    f"{source.place.locate(name)} is damaged", "Repair it with `olapipe verify --repair`, then merge."
                )
            moved = _renumbered(name, shard)
            objects[moved], files[moved] = data, promised
        absent = [RowReceipt(status="absent")] * (self.size - len(rows))
        changes = {"shard": shard, "rows": (*receipts, *absent), "files": files}
        self._publish(shard, objects, sealed(old.model_copy(update=changes)))
        return True

    def _publish(self, shard: int, objects: dict[str, bytes], receipt: bytes) -> None:
        place = self.target.place
        with place.lock(shard_lock(self.name, shard)):
            if place.exists(receipt_file(self.name, shard)):
                return
            for name, data in objects.items():
                place.publish(name, data)
            place.publish(receipt_file(self.name, shard), receipt)

    def _rebuild(self, shard: int, rows: Sequence[Chosen], receipts: Sequence[RowReceipt]) -> None:
        if self.target.receipt(self.name, shard) is not None:
            return
        fingerprint = self.record.fingerprint
        stored = blank(self.size, fingerprint.shape, self.record.precision, centred=self.record.centred)
        statistics = ChannelStatistics(fingerprint.channels)
        for index, (row, receipt) in enumerate(zip(rows, receipts, strict=True)):
            if receipt.stored:
                stored[index] = feature = self._reader(row).read(row.row)
                statistics.update(decode(feature, fingerprint.channels, self.basis))
        absent = [RowReceipt(status="absent")] * (self.size - len(rows))
        self.target.commit_shard(self.record, shard, stored, [*receipts, *absent], statistics, self._execution(rows))

    def _execution(self, rows: Sequence[Chosen]) -> Execution:
        """Return how most of the rows were computed; devices and versions of all of them where they differ."""
        counts: Counter[Execution] = Counter()
        seen: dict[tuple[int, int], Execution] = {}
        for row in rows:
            shard = row.row // self.sources[row.source].rows_per_shard
            if (row.source, shard) not in seen:
                receipt = self.sources[row.source].receipt(self.name, shard)
                if receipt is None:
                    continue
                seen[row.source, shard] = receipt.execution
            counts[seen[row.source, shard]] += 1
        most = max(sorted(counts, key=str), key=lambda execution: counts[execution])
        device = " + ".join(sorted({execution.device for execution in counts}))
        torch = " + ".join(sorted({execution.torch for execution in counts}))
        return most.model_copy(update={"device": device, "torch": torch})

    def _further_files(self) -> None:
        """Take over what a teacher has beside its arrays, which must be the same in all sources."""
        found: dict[str, bytes] = {}
        for source in self.sources:
            for file in source.place.names(self.name):
                if file == "zarr.json":
                    continue
                data = source.place.read(f"{self.name}/{file}")
                if found.setdefault(file, data) != data:
                    raise StoreError(f"{self.name}/{file} differs between the sources", "They cannot be merged.")
        for file, data in found.items():
            self.target.place.publish(f"{self.name}/{file}", data)


def _renumbered(name: str, shard: int) -> str:
    head, _, tail = name.partition("/c/")
    return f"{head}/c/{shard}/{tail.partition('/')[2]}"
