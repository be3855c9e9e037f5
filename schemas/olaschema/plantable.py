"""The plan's parquet parts: rows as tables, tables as parts of equal length, a part as bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from olaschema.manifest import SampleRow

_SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("problem", pa.string()),
    ]
)
_PLANNED_SCHEMA = _SAMPLE_SCHEMA.remove(0)


def plan_table(images: list[SampleRow]) -> pa.Table:
    """Return images as a table of key, uri, size and problem."""
    columns = {name: [getattr(image, name) for image in images] for name in _PLANNED_SCHEMA.names}
    return pa.table(columns, schema=_PLANNED_SCHEMA)


def rechunked(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of tables as tables of `rows`, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table.cast(_PLANNED_SCHEMA))
        count += len(table)
        if count < rows:
            continue
        whole = pa.concat_tables(held)
        for start in range(0, count - count % rows, rows):
            yield whole.slice(start, rows)
        count %= rows
        held = [whole.slice(len(whole) - count, count)]
    if count:
        yield pa.concat_tables(held)


def sample_rows(table: pa.Table) -> Iterator[SampleRow]:
    """Yield the rows of a part."""
    for row in table.to_pylist():
        yield SampleRow.model_validate(row)


def part_bytes(table: pa.Table, first_row: int, rows_per_shard: int) -> bytes:
    """Return the parquet file of images that become the rows from `first_row` on; one row group per shard."""
    rows = pa.array(range(first_row, first_row + len(table)), type=pa.int64())
    # one chunk: where chunks meet would show in the bytes
    whole = table.add_column(0, "row", rows).cast(_SAMPLE_SCHEMA).combine_chunks()
    sink = io.BytesIO()
    pq.write_table(whole, sink, compression="zstd", row_group_size=rows_per_shard, store_schema=False)
    return sink.getvalue()
