"""The two layouts of features behind one small interface, so that one class of tests holds both to one contract."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from store_support import fill_shard, images, record

from olapipe.pack import PackSettings, pack
from olapipe.progress import LineReporter
from olapipe.verify import verify
from olapipe.verify_packed import verify_packed
from olaschema.layout import shard_file
from olaschema.manifest import ChannelStatistics, RowReceipt, TeacherRecord
from olaschema.packed import Found, PackedSet
from olaschema.place import open_place
from olaschema.precision import Stored
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olaschema.tarshard import tar_name

COUNT, ROWS = 7, 4
FAILED = 1
"""The image without a depth feature."""
LAYOUTS = ("zarr", "webdataset")


class Layout(ABC):
    """What both layouts promise to a reader."""

    def __init__(self, url: str) -> None:
        self.place = open_place(url)

    @abstractmethod
    def keys(self) -> list[str]: ...

    @abstractmethod
    def teachers(self) -> dict[str, TeacherRecord]: ...

    @abstractmethod
    def status(self, key: str, teacher: str) -> RowReceipt | None: ...

    @abstractmethod
    def read(self, key: str, teacher: str) -> Stored: ...

    @abstractmethod
    def statistics(self, teacher: str) -> ChannelStatistics: ...

    @abstractmethod
    def verify(self) -> list[str]:
        """The names of all files that something is wrong with."""

    @abstractmethod
    def file(self, key: str) -> str:
        """The file that holds a depth feature."""


class ZarrLayout(Layout):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._store = FeatureStore.open(url)
        self._rows = {sample.key: sample.row for sample in self._store.samples()}
        self._readers = {name: FeatureReader(self._store, name) for name in self._store.teachers()}

    def keys(self) -> list[str]:
        return list(self._rows)

    def teachers(self) -> dict[str, TeacherRecord]:
        return {name: self._store.teacher(name) for name in self._store.teachers()}

    def status(self, key: str, teacher: str) -> RowReceipt | None:
        return self._readers[teacher].status(self._rows[key])

    def read(self, key: str, teacher: str) -> Stored:
        return self._readers[teacher].read(self._rows[key])

    def statistics(self, teacher: str) -> ChannelStatistics:
        return self._store.statistics(teacher)

    def verify(self) -> list[str]:
        return [problem.file for problem in verify(self.place.url, LineReporter(io.StringIO())).problems]

    def file(self, key: str) -> str:
        return shard_file("depth", self._rows[key] // ROWS, 4)


class WebDatasetLayout(Layout):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._set = PackedSet.open(url)
        self._found: dict[str, Found] = {found.key: found for found in self._set.listing()}

    def keys(self) -> list[str]:
        return list(self._found)

    def teachers(self) -> dict[str, TeacherRecord]:
        return self._set.teachers

    def status(self, key: str, teacher: str) -> RowReceipt | None:
        status = self._set.status(self._found[key], teacher)
        return None if status.reason == "not-extracted" else status

    def read(self, key: str, teacher: str) -> Stored:
        return self._set.read(self._found[key], teacher)

    def statistics(self, teacher: str) -> ChannelStatistics:
        return self._set.statistics(teacher)

    def verify(self) -> list[str]:
        return [name.partition(":")[0] for name, _ in verify_packed(self._set)]

    def file(self, key: str) -> str:
        return tar_name(self._found[key].tar)


def features(teacher: str) -> np.ndarray:
    """The float32 features of all images under a teacher, (7, 3, 3, 5) or (7, 70)."""
    shape = (3, 3, 5) if teacher == "depth" else (70,)
    return np.random.default_rng(len(teacher)).normal(size=(COUNT, *shape)).astype(np.float32)


def write_layout(layout: str, url: str, scratch: Path) -> None:
    """Write seven images: `depth` in float16 fails on image 1, `gen` in int4 has only the first shard."""
    where = url if layout == "zarr" else str(scratch / "store")
    store = FeatureStore.create(where, rows_per_shard=ROWS)
    planned = images(COUNT)
    contents = [f"image {index}".encode() for index in range(COUNT)]
    store.add_generation(planned)
    seen = [hashlib.sha256(data).hexdigest() for data in contents]
    for teacher in (record(), record("int4", teacher="gen", grid=None, channels=70)):
        name = teacher.fingerprint.teacher
        store.put_teacher(teacher)
        for first in range(0, COUNT if name == "depth" else ROWS, ROWS):
            failed = (FAILED,) if name == "depth" and first == 0 else ()
            rows = slice(first, first + ROWS)
            fill_shard(store, teacher, first // ROWS, features(name)[rows], failed=failed, seen=seen[rows])
    if layout == "webdataset":
        (scratch / "images").mkdir()
        for sample, data in zip(planned, contents, strict=True):
            (scratch / "images" / sample.key).write_bytes(data)
        talk = [{"image": sample.key, "conversations": []} for sample in planned]
        (scratch / "c.json").write_text(json.dumps(talk))
        pack(PackSettings(where, scratch / "c.json", scratch / "images", url))


def open_layout(layout: str, url: str) -> Layout:
    """Open what `write_layout` wrote."""
    return ZarrLayout(url) if layout == "zarr" else WebDatasetLayout(url)
