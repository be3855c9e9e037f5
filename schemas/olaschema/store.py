"""The feature store: what is planned, what is committed, and the commit of one shard.

Metadata is read as plain JSON and parquet; this module never reads feature values (see `reader.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from olaschema.basis import Basis, read_basis
from olaschema.digest import FIELD, intact, sealed
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.layout import array_document, basis_file, receipt_file, shard_file, shard_lock
from olaschema.manifest import (
    FORMAT_VERSION,
    ChannelStatistics,
    Execution,
    FileReceipt,
    Frozen,
    Generation,
    Receipt,
    RowReceipt,
    SampleRow,
    StoreRecord,
    TeacherRecord,
)
from olaschema.nesting import require_outside_stores
from olaschema.place import LocalPlace, Place, open_place
from olaschema.plantable import part_bytes, plan_table, rechunked, sample_rows
from olaschema.precision import Stored
from olaschema.replacing import drop_note, note_replacement

DEFAULT_ROWS_PER_SHARD = 256
_PART_ROWS = 1 << 16
Model = TypeVar("Model", bound=Frozen)


class FeatureStore:
    """A store on disk or in a bucket. Opening reads the root document and the generations, nothing else."""

    def __init__(self, place: Place, record: StoreRecord) -> None:
        self.place = place
        self.record = record

    @property
    def url(self) -> str:
        """The store's folder or address, for messages and for other processes."""
        return self.place.url

    @property
    def root(self) -> Path:
        """The store's folder; raises StoreError where it is not in one."""
        if not isinstance(self.place, LocalPlace):
            raise StoreError(f"{self.url} is no folder", "Copy the store to a disk first.")
        return self.place.root

    @property
    def rows_per_shard(self) -> int:
        """Rows in every shard of every teacher."""
        return self.record.rows_per_shard

    @classmethod
    def open(cls, where: str | Path | Place) -> FeatureStore:
        """Open a store; raises StoreError if there is none, or it is of another format version."""
        place = where if isinstance(where, Place) else open_place(where)
        root = place.url
        if not place.present():
            raise StoreError(f"{root}: no such feature store", "Give the folder that `olapipe extract --out` wrote.")
        data = place.read("zarr.json")
        attributes = _ours(place, "zarr.json", data)
        if attributes is None:
            raise StoreError(
                f"{root} is a Zarr group, but not a feature store of ours",
                "Give the folder that `olapipe extract` wrote.",
            )
        if attributes.get("format") != FORMAT_VERSION:
            raise StoreError(
                f"{root} has format version {attributes.get('format')}, this program reads version {FORMAT_VERSION}",
                "Install a version of ola-distill that reads it.",
            )
        return cls(place, _validated(StoreRecord, _intact(place, "zarr.json", data, attributes), place, "zarr.json"))

    @classmethod
    def create(cls, root: str | Path, *, rows_per_shard: int = DEFAULT_ROWS_PER_SHARD) -> FeatureStore:
        """Open the store at `root`, or make an empty one.

        Raises StoreError if the folder holds something else, or a store with another shard size.
        """
        from olaschema.zarrbytes import root_document

        place = open_place(root)
        if place.exists("zarr.json"):
            store = cls.open(root)
            if store.rows_per_shard != rows_per_shard:
                raise StoreError(
                    f"{root} has {store.rows_per_shard} rows per shard, {rows_per_shard} were asked for",
                    f"Use --shard-size {store.rows_per_shard}, or another --out.",
                )
            return store
        require_outside_stores(root)
        if not place.vacant():
            raise StoreError(f"{root} exists and is not a feature store", "Choose a new or empty folder for --out.")
        record = StoreRecord(rows_per_shard=rows_per_shard)
        if not place.publish_if_absent("zarr.json", root_document(record)):
            return cls.create(root, rows_per_shard=rows_per_shard)  # somebody else made it just now
        return cls(place, record)

    def generations(self) -> list[Generation]:
        """Return the committed plans in order, checked to follow each other at shard boundaries."""
        names = [name for name in self.place.names("samples") if name.endswith(".json")]
        found = [self.generation(f"samples/{name}") for name in names]
        first = 0
        for number, generation in enumerate(found):
            if generation.number != number or generation.first_row != first:
                raise DamagedStoreError(
                    f"{self.url}/samples: generation {number} does not follow the one before it",
                    "Restore the folder `samples` from a copy.",
                )
            first = self._next_first_row(generation)
        return found

    def generation(self, name: str) -> Generation:
        """Return one committed plan by the name of its file; raises DamagedStoreError."""
        return read_document(Generation, self.place, name)

    def _next_first_row(self, generation: Generation) -> int:
        return generation.first_row + -(-generation.rows // self.rows_per_shard) * self.rows_per_shard

    def shard_count(self) -> int:
        """Number of shards that every complete teacher has."""
        generations = self.generations()
        return self._next_first_row(generations[-1]) // self.rows_per_shard if generations else 0

    def add_generation(self, images: Iterable[SampleRow]) -> Generation | None:
        """Commit a plan of further images; their `row` is assigned here. Returns None where there are none.

        The same images in the same order make the same bytes. Interrupted halfway, nothing was planned.
        """
        stream = iter(images)
        return self.add_plan(plan_table(piece) for piece in iter(lambda: list(islice(stream, self.part_rows)), []))

    def add_plan(self, tables: Iterable[pa.Table]) -> Generation | None:
        """Commit a plan of further images, given as tables of key, uri, size and problem, as `add_generation` does."""
        generations = self.generations()
        number = len(generations)
        first = self._next_first_row(generations[-1]) if generations else 0
        parts: dict[str, FileReceipt] = {}
        count = 0
        for table in rechunked(tables, self.part_rows):
            name = f"samples/{number:04d}-{len(parts):05d}.parquet"
            data = part_bytes(table, first + count, self.rows_per_shard)
            self.place.publish(name, data)
            parts[name] = FileReceipt(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            count += len(table)
        if not count:
            return None
        for name in self.place.names("samples"):  # parts of an interrupted, longer plan
            if name.startswith(f"{number:04d}-") and f"samples/{name}" not in parts:
                self.place.remove(f"samples/{name}")
        generation = Generation(number=number, first_row=first, rows=count, parts=parts)
        self.place.publish(f"samples/{number:04d}.json", sealed(generation))
        return generation

    @property
    def part_rows(self) -> int:
        """Rows in every parquet part of a plan but its last."""
        return max(1, _PART_ROWS // self.rows_per_shard) * self.rows_per_shard

    def part_bytes(self, images: list[SampleRow], first_row: int) -> bytes:
        """Return the parquet file of some images, which become the rows from `first_row` on."""
        return part_bytes(plan_table(images), first_row, self.rows_per_shard)

    def plan_tables(self) -> Iterator[pa.Table]:
        """Yield the plan as tables of row, key, uri, size and problem, one per part, in row order."""
        for generation in self.generations():
            for name in generation.parts:
                with self._part(generation, name) as part:
                    yield part.read()

    def find(self, keys: Collection[str]) -> tuple[Generation, str, SampleRow] | None:
        """Return the first planned image with one of `keys`, its generation and part; None if there is none.

        Reads part after part, and holds one.
        """
        wanted = pa.array(keys, type=pa.string())
        for generation in self.generations():
            for name in generation.parts:
                with self._part(generation, name) as part:
                    hits = pc.is_in(part.read(["key"])["key"], value_set=wanted)
                    place = pc.index(hits, True).as_py()
                    if place >= 0:
                        return generation, name, next(sample_rows(part.read().slice(place, 1)))
        return None

    def samples(self) -> Iterator[SampleRow]:
        """Yield every planned image in row order."""
        for generation in self.generations():
            for name in generation.parts:
                yield from self.part_samples(generation, name)

    def part_samples(self, generation: Generation, name: str) -> Iterator[SampleRow]:
        """Yield the planned images of one parquet part of a generation."""
        with self._part(generation, name) as part:
            for group in range(part.num_row_groups):
                yield from sample_rows(part.read_row_group(group))

    def shard_samples(self, shard: int) -> list[SampleRow]:
        """Return the planned images of one shard; fewer than `rows_per_shard` in the last one of a generation."""
        first = shard * self.rows_per_shard
        for generation in self.generations():
            offset = first - generation.first_row
            if 0 <= offset < generation.rows:
                part_rows = self.part_rows
                name = list(generation.parts)[offset // part_rows]  # canonical JSON keeps them sorted
                with self._part(generation, name) as part:
                    return list(sample_rows(part.read_row_group(offset % part_rows // self.rows_per_shard)))
        raise StoreError(f"{self.url} has no shard {shard}: {self.shard_count()} shards are planned")

    def _part(self, generation: Generation, name: str) -> pq.ParquetFile:
        data = self.place.read(name)
        promised = generation.parts[name]
        if (len(data), hashlib.sha256(data).hexdigest()) != (promised.bytes, promised.sha256):
            raise DamagedStoreError(
                f"{self.url}/{name} is damaged: it is not the file that samples/{generation.number:04d}.json promises",
                "Restore it from a copy.",
            )
        try:
            return pq.ParquetFile(io.BytesIO(data))
        except pa.ArrowInvalid as error:
            raise DamagedStoreError(f"{self.url}/{name} is damaged: {error}", "Restore it from a copy.") from error

    def teachers(self) -> list[str]:
        """Return the names of the teachers that the store has a group for, sorted."""
        return [name for name in self.place.folders("") if self.place.exists(f"{name}/zarr.json")]

    def teacher(self, name: str) -> TeacherRecord:
        """Return what the store records of a teacher; raises StoreError naming those present."""
        if not name or "/" in name or not self.place.exists(f"{name}/zarr.json"):
            raise StoreError(
                f"{self.url} has no features of the teacher {name!r}",
                f"It holds: {', '.join(self.teachers()) or 'none'}. Add it with `olapipe extract --teacher {name}`.",
            )
        return read_document(TeacherRecord, self.place, f"{name}/zarr.json")

    def arrays(self, teacher: str) -> dict[str, bytes]:
        """Return the `zarr.json` of each array of a teacher by the array's name; raises DamagedStoreError."""
        found = {}
        for array in self.array_names(teacher):
            name = array_document(teacher, array)
            data = self.place.read(name)
            _intact(self.place, name, data, _ours(self.place, name, data))
            found[array] = data
        return found

    def array_names(self, teacher: str) -> list[str]:
        """Return the names of the arrays that a teacher's group has documents of, sorted."""
        return [name for name in self.place.folders(teacher) if self.place.exists(array_document(teacher, name))]

    def basis(self, record: TeacherRecord) -> Basis | None:
        """Return the basis that a teacher's features are stored in, None where there is none.

        Raises DamagedStoreError naming the file unless it is what the record promises.
        """
        if record.basis is None:
            return None
        name = basis_file(record.fingerprint.teacher)
        if not self.place.exists(name):
            raise DamagedStoreError(f"{self.place.locate(name)} is missing", "Restore it from a copy.")
        return read_basis(self.place.read(name), record.basis, record.fingerprint.shape, name=self.place.locate(name))

    def put_teacher(self, record: TeacherRecord, basis: Basis | None = None) -> None:
        """Make a teacher's group and arrays, or grow its arrays to the planned rows.

        A new teacher of the precision klt comes with its `basis`; one that is there keeps its own. One that is there
        also stays with or without offsets (`TeacherRecord.centred`) and at its `zstd_level`, whatever `record` says.

        Raises FingerprintError if the store holds features of another meaning, StoreError for another precision.
        """
        from olaschema.zarrbytes import array_documents, teacher_document

        name = record.fingerprint.teacher
        if self.place.exists(f"{name}/zarr.json"):
            present = self.teacher(name)
            remedy = "Use the settings that the store was made with, or another --out."
            present.fingerprint.require_equal(
                record.fingerprint, mine="in the store", theirs="asked for", remedy=remedy
            )
            if present.precision != record.precision:
                raise StoreError(
                    f"{self.url}: {name} is stored as {present.precision}, {record.precision} was asked for",
                    remedy,
                )
            record = record.model_copy(update={"centred": present.centred, "zstd_level": present.zstd_level})
            if basis is not None and present.basis != record.basis:
                raise StoreError(f"{self.url}: {name} is stored in another basis", "Another --out holds another basis.")
        elif (record.precision == "klt") != (basis is not None and record.basis is not None):
            raise StoreError(f"{name}: the precision klt, and no other, comes with a basis", "Fit one.")
        elif basis is not None:
            self._publish_unless_there(basis_file(name), basis.to_bytes())
        documents = array_documents(record, self.rows_per_shard, self.shard_count())
        if not self.place.exists(f"{name}/zarr.json"):  # a start in another precision may have been killed here
            for array in self.place.folders(name):
                if array not in documents:
                    self.place.remove(array_document(name, array))
            if basis is None:
                self.place.remove(basis_file(name))
        for array, document in documents.items():
            self._publish_unless_there(array_document(name, array), document)
        if not self.place.exists(f"{name}/zarr.json"):
            self.place.publish(f"{name}/zarr.json", teacher_document(record))

    def receipt(self, teacher: str, shard: int) -> Receipt | None:
        """Return a shard's receipt, None while it is not committed."""
        name = receipt_file(teacher, shard)
        data = self.place.find(name)
        return None if data is None else parse_document(Receipt, self.place, name, data)

    def receipt_bytes(self, teacher: str, shard: int) -> tuple[bytes, Receipt] | None:
        """Return a receipt's file and what it says, None while the shard is not committed."""
        name = receipt_file(teacher, shard)
        data = self.place.find(name)
        return None if data is None else (data, parse_document(Receipt, self.place, name, data))

    def committed(self, teacher: str) -> list[int]:
        """Return the numbers of the committed shards of a teacher, ascending."""
        stems = (name.removesuffix(".json") for name in self.place.names(f"receipts/{teacher}"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def statistics(self, teacher: str) -> ChannelStatistics:
        """Return channel statistics over all committed shards, merged in shard order."""
        total = ChannelStatistics(self.teacher(teacher).fingerprint.channels)
        for shard in self.committed(teacher):
            receipt = self.receipt(teacher, shard)
            if receipt is not None:
                total.merge(ChannelStatistics.from_json(receipt.statistics, len(total.mean)))
        return total

    def commit_shard(
        self,
        record: TeacherRecord,
        shard: int,
        stored: Stored,
        rows: list[RowReceipt],
        statistics: ChannelStatistics,
        execution: Execution,
        *,
        replace: bool = False,
        timings: dict[str, float] | None = None,
    ) -> Receipt:
        """Publish the stored arrays `(rows_per_shard, ...)` of one shard, then its receipt.

        A shard that is committed already stays as it is, unless `replace`: its receipt is returned, so a writer
        presumed dead changes nothing. Seconds are added to `timings["compress"]` and `["write"]`. Rows that are not
        `ok` must decode to NaN (`precision.blank`). Raises StoreError
        for arrays of another precision or shape than the record's.
        """
        from olaschema.zarrbytes import encode_shard

        started = time.perf_counter()
        teacher = record.fingerprint.teacher
        encoded = encode_shard(stored, record)
        objects = {
            shard_file(teacher, shard, stored.arrays[array].ndim, array): data for array, data in encoded.items()
        }
        receipt = Receipt(
            teacher=teacher,
            shard=shard,
            revision=sum(row.reason == "forgotten" for row in rows),
            fingerprint=record.fingerprint.digest(),
            rows=tuple(rows),
            files={
                name: FileReceipt(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for name, data in objects.items()
            },
            statistics=statistics.to_json(),
            execution=execution,
        )
        compressed = time.perf_counter()
        with self.place.lock(shard_lock(teacher, shard)):
            present = self.receipt(teacher, shard)
            if present is not None and not replace:
                return present
            if present is not None:
                note_replacement(self.place, receipt, objects)
                # never a receipt that promises bytes which are being replaced
                self.place.remove(receipt_file(teacher, shard))
            for name, data in objects.items():
                self._publish_unless_there(name, data)
            # a writer presumed dead may have come first after all; then its receipt stands, and what it promises
            if not self.place.publish_if_absent(receipt_file(teacher, shard), sealed(receipt)):
                receipt = read_document(Receipt, self.place, receipt_file(teacher, shard))
            if present is not None:
                drop_note(self.place, teacher, shard)
        if timings is not None:
            timings["compress"] = timings.get("compress", 0.0) + compressed - started
            timings["write"] = timings.get("write", 0.0) + time.perf_counter() - compressed
        return receipt

    def _publish_unless_there(self, name: str, data: bytes) -> None:
        if not self.place.publish_if_absent(name, data) and self.place.find(name) != data:
            self.place.publish(name, data)


def read_document(model: type[Model], place: Place, name: str) -> Model:
    """Return what a document of ours says; raises DamagedStoreError unless its digest and its content are right."""
    return parse_document(model, place, name, place.read(name))


def parse_document(model: type[Model], place: Place, name: str, data: bytes) -> Model:
    """Return what the bytes `data` of a document of ours say; raises as `read_document` does."""
    return _validated(model, _intact(place, name, data, _ours(place, name, data)), place, name)


def _ours(place: Place, name: str, data: bytes) -> dict[str, Any] | None:
    """Return the object in a file that is ours: of a `zarr.json`, the attribute `ola`, if there is one."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(
            f"{place.locate(name)} is not valid JSON: {error}", "Restore it from a copy."
        ) from error
    if not isinstance(document, dict):
        raise DamagedStoreError(f"{place.locate(name)} does not hold a JSON object", "Restore it from a copy.")
    if not name.endswith("zarr.json"):
        return document
    attributes = document.get("attributes")
    ours = attributes.get("ola") if isinstance(attributes, dict) else None
    return ours if isinstance(ours, dict) else None


def _intact(place: Place, name: str, data: bytes, ours: dict[str, Any] | None) -> dict[str, Any]:
    if ours is None or not intact(data, ours.get(FIELD)):
        raise DamagedStoreError(
            f"{place.locate(name)} is damaged: it does not have the digest that it carries",
            "`olapipe verify --repair` makes receipts again; restore other documents from a copy.",
        )
    return {key: value for key, value in ours.items() if key != FIELD}


def _validated(model: type[Model], data: dict[str, Any], place: Place, name: str) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedStoreError(
            f"{place.locate(name)}: {where}: {first['msg']}",
            "Restore it from a copy, or extract that shard again.",
        ) from error
