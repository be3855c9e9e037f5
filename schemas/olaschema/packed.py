"""Reading a packed training set: rows and images from its tars, with every checksum on the way verified."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olaschema.errors import DamagedStoreError, StoreError
from olaschema.manifest import ChannelStatistics, FileReceipt, RowReceipt, TeacherRecord
from olaschema.place import Place, open_place
from olaschema.precision import ArrayFormat, Stored, formats_of
from olaschema.store import read_document
from olaschema.tarshard import (
    CONVERSATIONS,
    LISTING,
    OK,
    ROOT,
    PackedImage,
    PackedRecord,
    TarIndex,
    TarSample,
    array_member,
    crc32c,
    index_name,
    member_path,
    read_npy,
    tar_name,
)

_KEPT_INDICES = 16
_RESTORE = "Run the command that wrote the set again (`olapipe pack` or `extract`): tars that are whole are kept."


def listing_schema(teachers: tuple[str, ...]) -> pa.Schema:
    """Columns of `listing.parquet`: one row per packed image, in the order of the tars."""
    whole = [("tar", pa.int32()), ("sample", pa.int32()), ("image", pa.int32()), ("row", pa.int64())]
    text = [("key", pa.string()), ("sha256", pa.string()), *((f"status.{name}", pa.string()) for name in teachers)]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in (*whole, *text)])


def is_packed(where: str | Path) -> bool:
    """Whether a packed training set is there, rather than a feature store."""
    return open_place(where).exists(ROOT)


@dataclass(frozen=True)
class Found:
    """Where an image is: the tar, its sample's place in the tar's index, its place in the sample, its statuses."""

    tar: int
    sample: int
    image: int
    row: int
    key: str
    sha256: str
    statuses: dict[str, str]


class PackedSet:
    """A training set that `olapipe pack` or `extract` wrote. Opening reads the root document, nothing else."""

    def __init__(self, place: Place) -> None:
        if not place.exists(ROOT):
            raise StoreError(
                f"{place.url} is no packed training set: it has no {ROOT}",
                "Give the folder of a finished `olapipe pack --out`.",
            )
        self.place = place
        self.record = read_document(PackedRecord, place, ROOT)
        place.expect({tar_name(number): tar.tar for number, tar in enumerate(self.record.tars)})
        self._indices: OrderedDict[int, TarIndex] = OrderedDict()
        self._formats: dict[str, dict[str, ArrayFormat]] = {
            name: formats_of(record) for name, record in self.record.teachers.items()
        }

    @classmethod
    def open(cls, where: str | Path | Place) -> PackedSet:
        """Open a set; raises StoreError if there is none."""
        return cls(where if isinstance(where, Place) else open_place(where))

    @property
    def teachers(self) -> dict[str, TeacherRecord]:
        """What the store that was packed recorded of each teacher."""
        return self.record.teachers

    def statistics(self, teacher: str) -> ChannelStatistics:
        """Return the channel statistics of the store that was packed."""
        channels = self.record.teachers[teacher].fingerprint.channels
        return ChannelStatistics.from_json(self.record.statistics[teacher], channels)

    def table(self) -> pa.Table:
        """Return `listing.parquet`: every packed image in the order of the tars; raises DamagedStoreError."""
        data = self._promised(LISTING, self.record.files[LISTING])
        try:
            return pq.read_table(io.BytesIO(data), schema=listing_schema(tuple(self.record.teachers)))
        except pa.ArrowInvalid as error:
            raise DamagedStoreError(f"{self.place.locate(LISTING)} is damaged: {error}", _RESTORE) from error

    def listing(self) -> Iterator[Found]:
        """Yield every packed image in the order of the tars; raises DamagedStoreError."""
        names = tuple(self.record.teachers)
        for row in self.table().to_pylist():
            statuses = {name: row.pop(f"status.{name}") for name in names}
            yield Found(**row, statuses=statuses)

    def conversations(self) -> bytes:
        """Return `conversations.jsonl`, one entry of the packed conversations per line; raises DamagedStoreError."""
        return self._promised(CONVERSATIONS, self.record.files[CONVERSATIONS])

    def index(self, tar: int) -> TarIndex:
        """Return the index of a tar; raises DamagedStoreError."""
        if tar not in self._indices:
            name = index_name(tar)
            self._promised(name, self.record.tars[tar].index)
            self._indices[tar] = read_document(TarIndex, self.place, name)
            if len(self._indices) > _KEPT_INDICES:
                self._indices.popitem(last=False)
        self._indices.move_to_end(tar)
        return self._indices[tar]

    def at(self, tar: int, sample: int, image: int) -> Found:
        """Return what the index of a tar says of one image; raises DamagedStoreError."""
        one = self.index(tar).samples[sample].images[image]
        return Found(tar, sample, image, one.row, one.key, one.sha256, one.features)

    def image(self, found: Found) -> bytes:
        """Return an image's bytes; raises DamagedStoreError naming tar and member."""
        sample, image = self._image(found)
        return self._member(found.tar, sample, image.member)

    def status(self, found: Found, teacher: str) -> RowReceipt:
        """What became of an image under a teacher."""
        _, image = self._image(found)
        reason = image.features[teacher]
        if reason == OK:
            return RowReceipt(status="ok", sha256=found.sha256, same_as=image.same_as)
        return RowReceipt(status="failed", sha256=found.sha256, reason=reason)

    def read(self, found: Found, teacher: str) -> Stored:
        """Return a feature as it is stored; raises StoreError where there is none, DamagedStoreError."""
        sample, image = self._image(found)
        if image.features[teacher] != OK:
            raise StoreError(f"{self.place.url}: {found.key} has no {teacher} feature ({image.features[teacher]})")
        formats = self._formats[teacher]
        arrays = {
            name: self._array(found, sample, array_member(teacher, name, found.image), wanted)
            for name, wanted in formats.items()
        }
        return Stored(**arrays)

    def _array(self, found: Found, sample: TarSample, name: str, wanted: ArrayFormat) -> np.ndarray:
        try:
            return read_npy(self._member(found.tar, sample, name), wanted)
        except ValueError as error:
            raise DamagedStoreError(f"{self._locate(found.tar, sample, name)}: {error}", _RESTORE) from error

    def _image(self, found: Found) -> tuple[TarSample, PackedImage]:
        sample = self.index(found.tar).samples[found.sample]
        return sample, sample.images[found.image]

    def _member(self, tar: int, sample: TarSample, name: str) -> bytes:
        for member in sample.members:
            if member.name == name:
                data = self.place.read_range(tar_name(tar), member.offset, member.bytes)
                if len(data) != member.bytes or crc32c(data) != member.crc32c:
                    raise DamagedStoreError(f"{self._locate(tar, sample, name)} fails its checksum", _RESTORE)
                return data
        raise DamagedStoreError(f"{self._locate(tar, sample, name)} is not in the index", _RESTORE)

    def _locate(self, tar: int, sample: TarSample, name: str) -> str:
        return f"{self.place.locate(tar_name(tar))}: {member_path(sample.number, name)}"

    def _promised(self, name: str, promised: FileReceipt) -> bytes:
        data = self.place.read(name)
        if (len(data), hashlib.sha256(data).hexdigest()) != (promised.bytes, promised.sha256):
            raise DamagedStoreError(
                f"{self.place.locate(name)} is damaged: it is not the file that {ROOT} promises", _RESTORE
            )
        return data
