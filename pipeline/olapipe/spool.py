"""Tables that wait outside memory, in pieces, sorted into numbered bins."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from olaschema.errors import CorpusError

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)


class Spool:
    """Bins of rows in one temporary file that has no name: it is gone with the process, however that ends."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        handle, path = tempfile.mkstemp(prefix="olapipe-plan-")
        os.unlink(path)
        self._handle = handle
        self._end = 0
        self._blocks: dict[int, list[tuple[int, int]]] = {}
        weakref.finalize(self, os.close, handle)

    def add(self, table: pa.Table, bins: np.ndarray) -> None:
        """Put each row of a table into the bin that `bins` (N,) names; within a bin rows keep their order."""
        if not len(bins):
            return
        order = np.argsort(bins, kind="stable")
        sorted_table = table.cast(self.schema).take(pa.array(order)).combine_chunks()
        numbers, starts = np.unique(bins[order], return_index=True)
        ends = [*starts[1:].tolist(), len(bins)]
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True):
            self._write(number, sorted_table.slice(start, end - start))

    def bins(self) -> list[int]:
        """Return the numbers of the bins that hold something, ascending."""
        return sorted(self._blocks)

    def bin(self, number: int) -> pa.Table:
        """Return all rows of a bin in the order in which they were added."""
        return pa.concat_tables([self.schema.empty_table(), *self._read(number)]).combine_chunks()

    def _read(self, number: int) -> Iterator[pa.Table]:
        for offset, size in self._blocks.get(number, ()):
            with pa.ipc.open_stream(pa.py_buffer(os.pread(self._handle, size, offset))) as reader:
                yield reader.read_all()

    def _write(self, number: int, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema, options=_OPTIONS) as writer:
            writer.write_table(table)
        data = memoryview(sink.getvalue())
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._handle, data[written:], self._end + written)
        except OSError as error:
            raise CorpusError(
                f"the plan does not fit the temporary folder {tempfile.gettempdir()}: {error.strerror}",
                "Set TMPDIR to a folder with more space: about 150 bytes per image.",
            ) from error
        self._blocks.setdefault(number, []).append((self._end, len(data)))
        self._end += len(data)
