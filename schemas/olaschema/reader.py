"""Reading feature rows straight from shard files, with every checksum on the way verified.

zarr reads the same bytes (a test holds the two together); this reader starts no threads, so it is safe in
DataLoader workers that were forked, and it names the shard and row of any damage.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from olaschema.basis import Basis
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.layout import chunk_rows, shard_file
from olaschema.manifest import Receipt, RowReceipt
from olaschema.precision import ArrayFormat, Stored, decode, formats_of
from olaschema.store import FeatureStore

_INDEX_ENTRY = np.dtype([("offset", "<u8"), ("size", "<u8")])
_KEPT_SHARDS = 64
# Over a network a request costs more than bytes do: small files (scales, single vectors) are fetched whole and kept.
_WHOLE_BYTES = 8 << 20
_CACHE_BYTES = 256 << 20
# CRC-32C of any bytes followed by their own CRC-32C (little endian): checked in one pass, without a copy of the bytes
_RESIDUE = 0x48674BC7


@dataclass(frozen=True)
class _Array:
    """One stored array: where its rows are in its shard files."""

    name: str
    format: ArrayFormat
    chunk_rows: int
    chunks: int


@dataclass(frozen=True)
class _OpenShard:
    receipt: Receipt
    indices: dict[str, np.ndarray]
    """By array: offset and size of each inner chunk."""


class FeatureReader:
    """Random access to the stored rows of one teacher."""

    def __init__(self, store: FeatureStore, teacher: str) -> None:
        self.record = store.teacher(teacher)
        self.fingerprint = self.record.fingerprint
        self._store = store
        self._teacher = teacher
        self._digest = self.fingerprint.digest()
        self._had_receipts = self._has_receipts()
        formats = formats_of(self.record)
        rows = chunk_rows(formats["values"].row_bytes, store.rows_per_shard)
        self._arrays = [_Array(name, found, rows, store.rows_per_shard // rows) for name, found in formats.items()]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._whole: OrderedDict[str, bytes] = OrderedDict()
        self._zstd = Zstd()

    def status(self, row: int) -> RowReceipt | None:
        """What became of a row; None while its shard is not committed.

        Where `same_as` names another row, `read` follows it.
        """
        shard, index = divmod(row, self._store.rows_per_shard)
        opened = self._opened(shard)
        return opened.receipt.rows[index] if opened else None

    def read(self, row: int) -> Stored:
        """Return one row as it is stored: values, and beside integers their scale and perhaps an offset.

        Raises StoreError if the row has no feature, DamagedStoreError if its bytes are not those committed.
        """
        shard, index = divmod(row, self._store.rows_per_shard)
        opened = self._opened(shard)
        status = opened.receipt.rows[index] if opened else None
        if opened is None or status is None or status.status != "ok":
            raise StoreError(f"{self._store.url}: row {row} has no {self._teacher} feature")
        if status.same_as is not None:
            return self._shared(row, status)
        return Stored(**{array.name: self._row(array, opened, shard, row, index) for array in self._arrays})

    def _shared(self, row: int, status: RowReceipt) -> Stored:
        target = status.same_as
        other = self.status(target) if target is not None else None
        if target is None or other is None or not other.stored or other.sha256 != status.sha256:
            raise self._damage(
                row // self._store.rows_per_shard,
                f"{self._store.url}: row {row} of {self._teacher} shares row {target}, which is not of the same image",
            )
        return self.read(target)

    def feature(self, row: int) -> np.ndarray:
        """Return one row's feature, `(H, W, C)` or `(C,)` float32; raises as `read` does."""
        return decode(self.read(row), self.fingerprint.channels, self.basis)

    @cached_property
    def basis(self) -> Basis | None:
        """What decodes rows of the precision klt, read when it is first needed; raises DamagedStoreError."""
        return self._store.basis(self.record)

    def _row(self, array: _Array, opened: _OpenShard, shard: int, row: int, index: int) -> np.ndarray:
        chunk, within = divmod(index, array.chunk_rows)
        values = self._chunk(array, shard, row, opened, opened.indices[array.name][chunk])
        row_values: np.ndarray = values[within].copy() if array.chunk_rows > 1 else values[0]
        return row_values

    def _file(self, array: _Array, shard: int) -> str:
        return shard_file(self._teacher, shard, len(array.format.shape) + 1, array.name)

    def _opened(self, shard: int) -> _OpenShard | None:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        receipt = self._store.receipt(self._teacher, shard)
        if receipt is None:
            self._require_teacher()
            return None
        if receipt.fingerprint != self._digest or len(receipt.rows) != self._store.rows_per_shard:
            raise DamagedStoreError(
                f"{self._store.url}: the receipt of {self._teacher} shard {shard} does not belong to this store",
                "Extract that shard again.",
            )
        self._store.place.expect(receipt.files)
        self._open[shard] = _OpenShard(
            receipt, {array.name: self._read_index(array, shard, receipt) for array in self._arrays}
        )
        if len(self._open) > _KEPT_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def _read_index(self, array: _Array, shard: int, receipt: Receipt) -> np.ndarray:
        name = self._file(array, shard)
        path = self._store.place.locate(name)
        length = array.chunks * _INDEX_ENTRY.itemsize
        if name not in receipt.files:
            raise self._damage(shard, f"{path} is not among the files that its receipt names")
        promised = receipt.files[name].bytes
        try:
            if self._is_kept(promised):
                data = self._kept(name, promised)
                data, size = data[-length - 4 :], len(data)
            else:
                data, size = self._store.place.read_tail(name, length + 4)
        except StoreError as error:
            raise self._damage(shard, f"the shard index cannot be read: {error.problem}") from error
        if size != promised:
            raise self._damage(shard, f"{path} has {size} bytes, its receipt promises {promised}")
        if _crc32c(data[:length]) != data[length:]:
            raise self._damage(shard, f"{path}: the shard index fails its checksum")
        return np.frombuffer(data[:length], dtype=_INDEX_ENTRY)

    def _is_kept(self, promised: int) -> bool:
        return self._store.place.remote and promised <= _WHOLE_BYTES

    def _kept(self, name: str, promised: int) -> bytes:
        """Return a whole file, from the cache if it is there with the size that is promised."""
        data = self._whole.pop(name, b"")
        if len(data) != promised:
            data = self._store.place.read(name)
        self._whole[name] = data
        while sum(map(len, self._whole.values())) > _CACHE_BYTES:
            self._whole.popitem(last=False)
        return data

    def _chunk(self, array: _Array, shard: int, row: int, opened: _OpenShard, entry: np.void) -> np.ndarray:
        """Return the rows of one chunk, `(chunk_rows, *row)`, in memory of their own."""
        name = self._file(array, shard)
        try:
            offset, size = int(entry["offset"]), int(entry["size"])
            promised = opened.receipt.files[name].bytes
            if offset + size > promised:
                raise StoreError(f"{self._store.place.locate(name)} ends before byte {offset + size}")
            if self._is_kept(promised):
                data = self._kept(name, promised)[offset : offset + size]
            else:
                data = self._store.place.read_range(name, offset, size)
        except StoreError as error:
            raise self._damage(shard, f"row {row} cannot be read: {error.problem}") from error
        if len(data) < 4 or google_crc32c.value(data) != _RESIDUE:
            raise self._damage(shard, f"{self._store.place.locate(name)}: row {row} fails its checksum")
        values = np.empty((array.chunk_rows, *array.format.shape), array.format.dtype)
        try:
            # decompressed in place, where a shorter frame would leave the end of the array as it was
            if _frame_content(data) != values.nbytes:
                raise ValueError("another size")
            self._zstd.decode(memoryview(data)[:-4], values)
        except (RuntimeError, ValueError) as error:
            problem = f"{self._store.place.locate(name)}: row {row} does not decompress to {values.nbytes} bytes"
            raise self._damage(shard, problem) from error
        return values

    def _has_receipts(self) -> bool:
        return self._store.place.holds(f"receipts/{self._teacher}")

    def _require_teacher(self) -> None:
        # `olapipe drop` takes the folder of receipts away first, all at once
        if self._had_receipts and not self._has_receipts():
            raise StoreError(
                f"{self._store.url}: the teacher {self._teacher} was dropped from the store while it was being read",
                f"Extract it again with `olapipe extract --teacher {self._teacher}`, or go on without it.",
            )

    def _damage(self, shard: int, problem: str) -> DamagedStoreError:
        self._require_teacher()
        return DamagedStoreError(problem, "`olapipe verify --repair` finds all damage and extracts those shards again.")


def _crc32c(data: bytes) -> bytes:
    value: int = google_crc32c.value(data)
    return value.to_bytes(4, "little")


def _frame_content(data: bytes) -> int | None:
    """Return how many bytes a Zstandard frame says it holds (RFC 8878, 3.1.1.1), None where it does not say."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 5:
        return None
    descriptor = data[4]
    single = descriptor >> 5 & 1
    width = (single, 2, 4, 8)[descriptor >> 6]
    first = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    if not width:
        return None
    return int.from_bytes(data[first : first + width], "little") + (256 if width == 2 else 0)
