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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from olapipe.corpora.conversations import samples as read_entries
from olaschema.digest import sealed
from olaschema.errors import CorpusError, DamagedStoreError, ImageError, StoreError
from olaschema.files import read_regular
from olaschema.keys import normalise_key, tombstone
from olaschema.layout import receipt_file
from olaschema.manifest import FileReceipt, TeacherRecord, canonical_json
from olaschema.nesting import require_outside_stores
from olaschema.packed import listing_schema
from olaschema.place import Place, open_place
from olaschema.reader import FeatureReader
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


@dataclass(frozen=True)
class PackSettings:
    """What to pack: the store, the conversations, the folder of their images, and into what."""

    store: str
    conversations: Path
    images: Path
    out: str
    teachers: tuple[str, ...] | None = None
    samples_per_tar: int | None = None
    """None: one tar for the images of each shard of the store."""


@dataclass
class _Group:
    """One set of images with all conversations about it; no image for text alone."""

    keys: tuple[str, ...]
    rows: tuple[int, ...]
    entries: list[tuple[int, bytes]] = field(default_factory=list)
    """Place in the file, and the entry as JSON."""


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
        raise CorpusError(
            f"--images {settings.images}: no such folder", "Give the folder that `image` paths start from."
        )
    store = FeatureStore.open(settings.store)
    records = {name: store.teacher(name) for name in settings.teachers or store.teachers()}
    for name in records:
        require_nameable(name)
    place = open_place(settings.out)
    require_outside_stores(settings.out)
    _require_ours(place)
    groups, left_out = _plan(store, settings.conversations)
    tars = _cut(groups, store.rows_per_shard, settings.samples_per_tar)
    if not tars:
        raise CorpusError(f"{settings.conversations} holds nothing to pack", "Give LLaVA-style conversations.")
    with place.lock("pack"):
        place.sweep()
        job = _Job(store, records, settings.images, place)
        return job.run(tars, left_out, progress)


class _Job:
    def __init__(self, store: FeatureStore, records: dict[str, TeacherRecord], images: Path, place: Place) -> None:
        self._store = store
        self._records = records
        self._readers = {name: FeatureReader(store, name) for name in records}
        self._images = images
        self._place = place

    def run(self, tars: list[list[_Group]], left_out: list[LeftOut], progress: Callable[[int, int], None]) -> Packed:
        indices: list[TarIndex] = []
        made = first = 0
        for number, groups in enumerate(tars):
            extra = left_out if number == 0 else []  # what no tar could have is on record with the first
            inputs = self._inputs(groups, first, extra)
            index = self._present(number, inputs)
            if index is None:
                self._place.remove(ROOT)  # a root document never promises tars that are being replaced
                self._place.remove(index_name(number))
                index = self._make(number, groups, first, inputs, extra)
                made += 1
            indices.append(index)
            first += len(groups)
            progress(number + 1, len(tars))
        record = self._finish(tars, indices)
        missing: dict[str, Counter[str]] = {name: Counter() for name in self._records}
        for index in indices:
            for image in (image for sample in index.samples for image in sample.images):
                for name, status in image.features.items():
                    missing[name].update([status] if status != OK else [])
        return Packed(record, made, {name: dict(sorted(found.items())) for name, found in missing.items()})

    def _inputs(self, groups: list[_Group], first: int, left_out: list[LeftOut]) -> str:
        """Digest of all that a tar is made of but the images' bytes."""
        shards = sorted({row // self._store.rows_per_shard for group in groups for row in group.rows if row >= 0})
        receipts = {}
        for name in self._records:
            found = [self._place_digest(receipt_file(name, shard)) for shard in shards]
            receipts[name] = dict(zip(map(str, shards), found, strict=True))
        content = {
            "first": first,
            "groups": [[g.keys, g.rows, [[i, hashlib.sha256(e).hexdigest()] for i, e in g.entries]] for g in groups],
            "receipts": receipts,
            "teachers": {name: record.model_dump(mode="json") for name, record in self._records.items()},
            "left_out": [entry.model_dump(mode="json") for entry in left_out],
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
        return index if whole else None

    def _make(self, number: int, groups: list[_Group], first: int, inputs: str, left_out: list[LeftOut]) -> TarIndex:
        kept: list[tuple[int, _Group, tuple[PackedImage, ...]]] = []
        left_out = list(left_out)

        def samples() -> Iterator[tuple[int, dict[str, bytes]]]:
            for place, group in enumerate(groups):
                try:
                    images, members = self._members(group)
                except ImageError as error:
                    shown = ", ".join(group.keys)
                    left_out.extend(LeftOut(index=i, key=shown, reason=error.reason, detail=error.problem)
                                    for i, _ in group.entries)  # fmt: skip
                    continue
                kept.append((first + place, group, images))
                yield first + place, members

        data, placed = write_tar(samples())
        self._place.publish(tar_name(number), data)
        index = TarIndex(
            tar=promise(data),
            inputs=inputs,
            samples=tuple(
                TarSample(number=n, conversations=tuple(i for i, _ in group.entries), images=images, members=members)
                for (n, group, images), members in zip(kept, placed, strict=True)
            ),
            left_out=tuple(left_out),
        )
        self._place.publish(index_name(number), sealed(index))
        return index

    def _members(self, group: _Group) -> tuple[tuple[PackedImage, ...], dict[str, bytes]]:
        members: dict[str, bytes] = {}
        images = []
        for place, (key, row) in enumerate(zip(group.keys, group.rows, strict=True)):
            try:
                data = read_regular(self._images / key)
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

    def _finish(self, tars: list[list[_Group]], indices: list[TarIndex]) -> PackedRecord:
        entries = sorted((i, entry) for groups in tars for group in groups for i, entry in group.entries)
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


def _require_ours(place: Place) -> None:
    strays = [name for name in place.names("") if not _OURS.fullmatch(name)]
    if strays:
        raise StoreError(f"{place.url} holds something else: {strays[0]}", "Choose a new or empty folder for --out.")


def _plan(store: FeatureStore, conversations: Path) -> tuple[list[_Group], list[LeftOut]]:
    """Return the groups in the order of the set, and the conversations that no group can have."""
    rows: dict[str, int] = {}
    forgotten: set[str] = set()
    for sample in store.samples():
        if sample.problem == "forgotten":
            forgotten.add(sample.key)
        else:
            rows[sample.key] = sample.row
    groups: dict[Any, _Group] = {}
    left_out: list[LeftOut] = []
    for index, (where, entry) in enumerate(read_entries(conversations)):
        try:
            keys = _keys(entry, where)
            for key in keys:
                if forgotten and tombstone(key) in forgotten:
                    raise ImageError("forgotten", f"{where}: its image was forgotten")
        except ImageError as error:
            left_out.append(LeftOut(index=index, key="", reason=error.reason, detail=error.problem))
            continue
        group = groups.setdefault(keys or index, _Group(keys, tuple(rows.get(key, -1) for key in keys)))
        group.entries.append((index, json.dumps(entry).encode()))
    # images by row, those that the store does not plan behind them, text alone last
    order = sorted(
        groups.values(), key=lambda g: (not g.keys, not g.keys or g.rows[0] < 0, g.rows[:1], g.entries[0][0])
    )
    return order, left_out


def _keys(entry: Any, where: str) -> tuple[str, ...]:
    if not isinstance(entry, dict):
        raise ImageError("not-an-object", f"{where} is a {type(entry).__name__}")
    value = entry.get("image")
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ImageError("bad-image", f"{where}: `image` is not a path or a list of paths")
    return tuple(normalise_key(name) for name in names)


def _cut(groups: list[_Group], rows_per_shard: int, samples_per_tar: int | None) -> list[list[_Group]]:
    """Cut the groups into tars; text alone gets tars of its own, so that it can be read without the images."""
    tars: list[list[_Group]] = []
    last: object = None
    for group in groups:
        planned = bool(group.keys) and group.rows[0] >= 0 and samples_per_tar is None
        part = (bool(group.keys), group.rows[0] // rows_per_shard if planned else -1)
        full = bool(tars) and not planned and len(tars[-1]) >= (samples_per_tar or rows_per_shard)
        if part != last or full:
            tars.append([])
        tars[-1].append(group)
        last = part
    return tars
