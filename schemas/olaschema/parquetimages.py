"""Images in the rows of a parquet file, as Hugging Face datasets and img2dataset write them."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from olaschema.errors import CorpusError, ImageError
from olaschema.files import open_regular

COLUMNS = ("image", "jpg", "png", "webp")
_LARGEST_GROUP = 1 << 30
_CACHED_BYTES = 1 << 30


class ParquetImages:
    """The image column of one parquet file: `{bytes, path}` or plain bytes. The first of `COLUMNS` that is there.

    Raises ImageError (`truncated`) where the file cannot be read as parquet, CorpusError where it has no such column,
    or row groups whose images exceed 1 GiB.
    """

    def __init__(self, handle: int, name: str) -> None:
        try:
            with os.fdopen(os.dup(handle), "rb") as raw, pq.ParquetFile(raw) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise ImageError("truncated", f"the parquet file cannot be read: {_first_line(error)}") from error
        self.column = _image_column(schema, name)
        self.ends: list[int] = []
        """Number of the first row after each row group."""
        rows = 0
        for group in range(metadata.num_row_groups):
            part = metadata.row_group(group)
            stored = sum(
                part.column(place).total_uncompressed_size
                for place in range(part.num_columns)
                if part.column(place).path_in_schema.partition(".")[0] == self.column
            )
            if stored > _LARGEST_GROUP:
                raise CorpusError(
                    f"{name}: row group {group} holds {stored >> 20} MiB of images",
                    "Write the file with row groups of at most 1 GiB, for example of 100 images.",
                )
            rows += part.num_rows
            self.ends.append(rows)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def place(self, row: int) -> tuple[int, int]:
        """Return the row group of a row and its place in there."""
        group = next(number for number, end in enumerate(self.ends) if row < end)
        return group, row - (self.ends[group - 1] if group else 0)

    def read_group(self, handle: int, group: int) -> pa.Array:
        """Return the images of a row group, `{bytes, path}` or bytes; raises ImageError (`truncated`)."""
        try:
            with os.fdopen(os.dup(handle), "rb") as raw, pq.ParquetFile(raw) as file:
                # no threads of Arrow: DataLoader workers are forked
                return file.read_row_group(group, columns=[self.column], use_threads=False)[0].combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise ImageError("truncated", f"row group {group} of the parquet file cannot be read") from error


def _image_column(schema: pa.Schema, name: str) -> str:
    for column in COLUMNS:
        kind = schema.field(column).type if column in schema.names else None
        if kind is not None and (_is_bytes(kind) or (pa.types.is_struct(kind) and _has_bytes(kind))):
            return column
    raise CorpusError(
        f"{name} has no column of images; its columns: {', '.join(schema.names[:12])}",
        f"Images are bytes, or {{bytes, path}}, in a column named {', '.join(COLUMNS)}.",
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _has_bytes(kind: pa.StructType) -> bool:
    return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)


class _Groups:
    """Files and row groups that were read last, shared by the threads of a process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._files: OrderedDict[tuple[str, int, int], ParquetImages] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int, int, int], pa.Array] = OrderedDict()

    def images(self, path: Path, handle: int) -> ParquetImages:
        """Return what is known of a file, read from its footer if it has changed."""
        key = _stamp(path, handle)
        with self._lock:
            if key not in self._files:
                self._files[key] = ParquetImages(handle, path.name)
                while len(self._files) > 256:
                    self._files.popitem(last=False)
            self._files.move_to_end(key)
            return self._files[key]

    def group(self, path: Path, handle: int, images: ParquetImages, group: int) -> pa.Array:
        """Return a row group. One thread reads, others that want it wait: reading it twice would double the memory."""
        key = (*_stamp(path, handle), group)
        with self._lock:
            if key not in self._groups:
                wanted = images.read_group(handle, group)
                while self._groups and sum(a.nbytes for a in self._groups.values()) + wanted.nbytes > _CACHED_BYTES:
                    self._groups.popitem(last=False)
                self._groups[key] = wanted
            self._groups.move_to_end(key)
            return self._groups[key]


def _stamp(path: Path, handle: int) -> tuple[str, int, int]:
    status = os.fstat(handle)
    return str(path), status.st_size, status.st_mtime_ns


_CACHE = _Groups()


def parquet_images(path: Path) -> ParquetImages:
    """Return what the footer of a parquet file says; raises ImageError or CorpusError."""
    with open_regular(path) as handle:
        return _CACHE.images(path, handle)


def read_parquet_image(path: Path, member: str, *, limit: int | None) -> bytes:
    """Return the bytes of row number `member`.

    Raises ImageError: `missing` (no such row, or it holds a path and no bytes, or null), `truncated`, `too-large`.
    """
    with open_regular(path) as handle:
        images = _CACHE.images(path, handle)
        row = int(member) if member.isascii() and member.isdigit() and len(member) < 16 else -1
        if not 0 <= row < len(images) or str(row) != member:
            raise ImageError("missing", f"the parquet file has {len(images)} rows, none of them is {member!r}")
        group, place = images.place(row)
        value = _CACHE.group(path, handle, images, group)[place]
    if isinstance(value, pa.StructScalar) and value.is_valid:
        value = value["bytes"]
    if not value.is_valid:
        raise ImageError("missing", f"row {row} of the parquet file holds no image bytes (null)")
    if limit is not None and value.as_buffer().size > limit:
        raise ImageError("too-large", f"{value.as_buffer().size} bytes are no image within the limit")
    data: bytes = value.as_py()
    return data


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
