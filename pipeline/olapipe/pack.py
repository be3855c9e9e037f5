"""`olapipe pack`: a feature store, conversations and images become WebDataset shards for training.

A tar is the unit of work, of resume and of commit: its bytes, then its index; the root document comes last. What a tar
is made of is decided by the plan alone, so a rerun after any interruption makes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from olapipe.packplan import Group, PackPlan, plan_pack
from olaschema.digest import sealed
from olaschema.errors import CorpusError, DamagedStoreError, ImageError, StoreError
from olaschema.layout import receipt_file
from olaschema.manifest import FileReceipt, canonical_json
from olaschema.nesting import require_outside_stores
from olaschema.packed import listing_schema
from olaschema.place import Place, open_place
from olaschema.reader import FeatureReader
from olaschema.rooted import read_rooted
from olaschema.store import FeatureStore, read_document
from olaschema.tarshard import (
    CONVERSATIONS,
    LISTING,
    OK,
    ROOT,
    LeftOut,
    PackedImage,
    PackedRecord,
    Tar,
    TarIndex,
    TarSample,
    image_member,
    index_name,
    npy_members,
    require_nameable,
    tar_name,
    write_tar,
)

_OURS = re.compile(rf"\d{{6}}\.(tar|json)|{re.escape(LISTING)}|{re.escape(CONVERSATIONS)}|{re.escape(ROOT)}")

LOCK = "pack"
"""Name of the lock of whoever writes a packed set."""


@dataclass(frozen=True)
class PackSettings:
    """What to pack: the store, conversations, the folder of the images, and into what."""

    store: str
    conversations: Path | None
    """None: every planned image is a sample, without any."""
    images: Path
    out: str
    teachers: tuple[str, ...] | None = None
    samples_per_tar: int | None = None
    """None: one tar for the images of each shard of the store."""


@dataclass(frozen=True)
class Packed:
    """What is in the set now; `made` tars were written by this run."""

    record: PackedRecord
    made: int
    missing: dict[str, dict[str, int]]
    """Images without a feature, by teacher and reason."""


def pack(settings: PackSettings, progress: Callable[[int, int], None] = lambda done, total: None) -> Packed:
    """Write or continue a packed set; `progress` is told how many tars of how many are there.

    Raises StoreError where the store or `out` cannot be used, or an image is not the one that its features were made
    from; CorpusError for conversations that cannot be read.
    """
    if settings.samples_per_tar is not None and settings.samples_per_tar < 1:
        raise CorpusError(f"--samples-per-tar {settings.samples_per_tar} is not positive", "Give 1 or more.")
    if not settings.images.is_dir():
        raise CorpusError(f"--images {settings.images}: no such folder", "Give the folder that keys start from.")
    store = FeatureStore.open(settings.store)
    place = open_place(settings.out)
    require_outside_stores(settings.out)
    require_ours(place)
    plan = plan_pack(store, settings.conversations, settings.samples_per_tar)
    with place.lock(LOCK):
        place.sweep()
        packer = Packer(store, settings.teachers or tuple(store.teachers()), settings.images, place, plan)
        for number in range(len(plan.tars)):
            packer.bring(number)
            progress(number + 1, len(plan.tars))
        return packer.finish()


class Packer:
    """Makes the tars of one plan, in any order; the caller holds the lock `pack` of `place`.

    `images` is the folder that keys are relative to. Raises StoreError for a teacher that members cannot be named by.
    """

    def __init__(
        self, store: FeatureStore, teachers: Iterable[str], images: Path, place: Place, plan: PackPlan
    ) -> None:
        for name in teachers:
            require_nameable(name)
        self._store = store
        self._readers = {name: FeatureReader(store, name) for name in teachers}
        self._records = {name: reader.record for name, reader in self._readers.items()}
        for name, record in self._records.items():
            if record.basis is not None:
                raise StoreError(
                    f"{store.url} holds {name} as klt, and a packed set has no place for its basis",
                    "Train from the store, name other teachers with --teacher, or extract with another --precision.",
                )
        self._images = images
        self._place = place
        self.plan = plan
        self._indices: dict[int, TarIndex] = {}
        self._made = 0

    def present(self, number: int) -> bool:
        """Whether a tar is there as wanted, with every byte; asked once, what is there is taken for granted then."""
        if number not in self._indices:
            index = self._present(number, self._inputs(number))
            if index is None:
                return False
            self._indices[number] = index
        return True

    def missing(self) -> list[int]:
        """Return the tars that are not `present`, ascending."""
        return [number for number in range(len(self.plan.tars)) if not self.present(number)]

    def bring(self, number: int) -> None:
        """Make a tar unless it is there.

        Raises StoreError where an image is not the one that its features were made from, DamagedStoreError.
        """
        if not self.present(number):
            self._place.remove(ROOT)  # a root document never promises tars that are being replaced
            self._place.remove(index_name(number))
            self._indices[number] = self._make(number)
            self._made += 1

    def finish(self) -> Packed:
        """Write the root document over all tars, each of which was brought."""
        indices = [self._indices[number] for number in range(len(self.plan.tars))]
        record = self._finish(indices)
        missing: dict[str, Counter[str]] = {name: Counter() for name in self._records}
        for index in indices:
            for image in (image for sample in index.samples for image in sample.images):
                for name, status in image.features.items():
                    missing[name].update([status] if status != OK else [])
        return Packed(record, self._made, {name: dict(sorted(found.items())) for name, found in missing.items()})

    def _left_out(self, number: int) -> list[LeftOut]:
        return self.plan.left_out if number == 0 else []  # what no tar could have is on record with the first

    def _inputs(self, number: int) -> str:
        """Digest of all that a tar is made of but the images' bytes."""
        groups, shards = self.plan.tars[number], self.plan.shards(number)
        receipts = {}
        for name in self._records:
            found = [self._place_digest(receipt_file(name, shard)) for shard in shards]
            receipts[name] = dict(zip(map(str, shards), found, strict=True))
        content = {
            "first": self.plan.firsts[number],
            "groups": [[g.keys, g.rows, [[i, hashlib.sha256(e).hexdigest()] for i, e in g.entries]] for g in groups],
            "receipts": receipts,
            "teachers": {name: record.model_dump(mode="json") for name, record in self._records.items()},
            "left_out": [entry.model_dump(mode="json") for entry in self._left_out(number)],
        }
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def _place_digest(self, name: str) -> str:
        place = self._store.place
        return hashlib.sha256(place.read(name)).hexdigest() if place.exists(name) else ""

    def _present(self, number: int, inputs: str) -> TarIndex | None:
        """Return the index of a tar that is there as wanted, its bytes checked; None where it is to be made."""
        if not (self._place.exists(index_name(number)) and self._place.exists(tar_name(number))):
            return None
        try:
            index = read_document(TarIndex, self._place, index_name(number))
        except DamagedStoreError:
            return None
        whole = index.inputs == inputs and index.tar == promise(self._place.read(tar_name(number)))
        return index if whole and not self._any_is_back(number, index) else None

    def _any_is_back(self, number: int, index: TarIndex) -> bool:
        """Whether all images of a group that was left out because one could not be read can be read now."""
        packed = {sample.number for sample in index.samples}
        groups = enumerate(self.plan.tars[number], self.plan.firsts[number])
        return any(all(map(self._readable, group.keys)) for place, group in groups if place not in packed)

    def _readable(self, key: str) -> bool:
        try:
            read_rooted(self._images, key)
        except ImageError:
            return False
        return True

    def _make(self, number: int) -> TarIndex:
        kept: list[tuple[int, Group, tuple[PackedImage, ...]]] = []
        left_out = list(self._left_out(number))

        def samples() -> Iterator[tuple[int, dict[str, bytes]]]:
            for place, group in enumerate(self.plan.tars[number], self.plan.firsts[number]):
                try:
                    images, members = self._members(group)
                except ImageError as error:
                    left_out.extend(group.left_out(error))
                    continue
                kept.append((place, group, images))
                yield place, members

        data, placed = write_tar(samples())
        self._place.publish(tar_name(number), data)
        index = TarIndex(
            tar=promise(data),
            inputs=self._inputs(number),
            samples=tuple(
                TarSample(number=n, conversations=tuple(i for i, _ in group.entries), images=images, members=members)
                for (n, group, images), members in zip(kept, placed, strict=True)
            ),
            left_out=tuple(left_out),
        )
        self._place.publish(index_name(number), sealed(index))
        return index

    def _members(self, group: Group) -> tuple[tuple[PackedImage, ...], dict[str, bytes]]:
        members: dict[str, bytes] = {}
        images = []
        for place, (key, row) in enumerate(zip(group.keys, group.rows, strict=True)):
            try:
                data = read_rooted(self._images, key)
            except ImageError as error:
                raise ImageError(error.reason, f"{key}: {error.problem}") from error
            digest = hashlib.sha256(data).hexdigest()
            statuses = {name: self._status(name, key, row, digest) for name in self._records}
            name = image_member(key, place)
            shared = self._shared(row)
            images.append(PackedImage(key=key, row=row, sha256=digest, member=name, features=statuses, same_as=shared))
            members[name] = data
            for teacher, status in statuses.items():
                if status == OK:
                    members |= npy_members(teacher, self._readers[teacher].read(row), place)
        document = {
            "key": group.keys[0] if group.keys else None,
            "images": [{"key": image.key, "row": image.row, "member": image.member} for image in images],
            "conversations": [json.loads(entry) for _, entry in group.entries],
        }
        return tuple(images), {"json": json.dumps(document).encode(), **members}

    def _status(self, teacher: str, key: str, row: int, digest: str) -> str:
        if row < 0:
            return "not-in-store"
        status = self._readers[teacher].status(row)
        if status is None:
            return "not-extracted"
        if status.sha256 is not None and status.sha256 != digest:
            raise StoreError(
                f"{key}: the image is not the one that the features of {teacher} were made from (its SHA-256 differs)",
                "Restore the image, check --images, or extract its shard again.",
            )
        return OK if status.status == "ok" else status.reason or status.status

    def _shared(self, row: int) -> int | None:
        statuses = [reader.status(row) for reader in self._readers.values()] if row >= 0 else []
        return min((s.same_as for s in statuses if s is not None and s.same_as is not None), default=None)

    def _finish(self, indices: list[TarIndex]) -> PackedRecord:
        entries = sorted((i, entry) for groups in self.plan.tars for group in groups for i, entry in group.entries)
        packed = {i for index in indices for sample in index.samples for i in sample.conversations}
        lines = b"".join(entry + b"\n" for i, entry in entries if i in packed)
        files = {LISTING: _listing(tuple(self._records), indices), CONVERSATIONS: lines}
        record = PackedRecord(
            rows_per_shard=self._store.rows_per_shard,
            teachers=self._records,
            statistics={name: self._store.statistics(name).to_json() for name in self._records},
            tars=tuple(
                Tar(tar=index.tar, index=promise(self._place.read(index_name(number))))
                for number, index in enumerate(indices)
            ),
            files={name: promise(data) for name, data in files.items()},
            samples=sum(len(index.samples) for index in indices),
            conversations=len(packed),
            left_out=dict(sorted(Counter(e.reason for index in indices for e in index.left_out).items())),
        )
        document = sealed(record)
        present = self._place.read(ROOT) if self._place.exists(ROOT) else None
        if present != document:
            self._place.remove(ROOT)
        for name, data in files.items():
            if not (self._place.exists(name) and self._place.read(name) == data):
                self._place.publish(name, data)
        wanted = {name(number) for number in range(len(indices)) for name in (tar_name, index_name)}
        for name in self._place.names(""):  # of an earlier, longer plan
            if _OURS.fullmatch(name) and name not in wanted | {LISTING, CONVERSATIONS, ROOT}:
                self._place.remove(name)
        if present != document:
            self._place.publish(ROOT, document)
        return record


def promise(data: bytes) -> FileReceipt:
    """Return size and digest of a file's bytes."""
    return FileReceipt(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _listing(teachers: tuple[str, ...], indices: list[TarIndex]) -> bytes:
    rows: list[dict[str, Any]] = [
        {"tar": tar, "sample": sample, "image": place, "row": image.row, "key": image.key, "sha256": image.sha256}
        | {f"status.{name}": image.features[name] for name in teachers}
        for tar, index in enumerate(indices)
        for sample, found in enumerate(index.samples)
        for place, image in enumerate(found.images)
    ]
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=listing_schema(teachers))
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def require_ours(place: Place) -> None:
    """Raise StoreError where something else than a packed set is; to be asked before its lock is taken.

    Others name tars as we do: without a root document they are ours only where a lock says that we wrote there.
    """
    names = place.names("")
    strays = [name for name in names if not _OURS.fullmatch(name)]
    if not strays and not place.exists(ROOT) and not place.exists(f"_log/locks/{LOCK}"):
        strays = names
    if strays:
        raise StoreError(f"{place.url} holds something else: {strays[0]}", "Choose a new or empty folder for --out.")
