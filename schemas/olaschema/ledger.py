"""What the receipts of a teacher say, in a few bytes each: so that 100 000 of them need not be opened at every run.

A ledger is derived: it lies under `_log`, may be deleted at any time, and is believed for a receipt only while that
file's stamp (size and time of writing, or the version that a bucket gives it) is the one it had when it was read.
Its file is a SHA-256 and the parquet file that this is of: the manifest takes digests from it, and parquet would not
notice all damage. `verify` does not use it.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olaschema.errors import StoreError
from olaschema.store import FeatureStore

_FORMAT = b"3"
_DIGEST = 32
_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("stamp", pa.string()),
        ("sha256", pa.string()),
        ("ok", pa.int32()),
        ("failed", pa.int32()),
        ("absent", pa.int32()),
        ("shared", pa.int32()),
        ("batch", pa.int32()),
        ("arrays", pa.list_(pa.string())),
        ("bytes", pa.list_(pa.int64())),
        ("places", pa.list_(pa.int32())),
        ("reasons", pa.list_(pa.string())),
    ],
    metadata={"ledger": _FORMAT},
)


@dataclass(frozen=True)
class Ledger:
    """The receipts of one teacher in shard order."""

    table: pa.Table
    rows_per_shard: int

    def total(self, column: str) -> int:
        """Sum of `ok`, `failed`, `absent` or `shared` rows."""
        return int(self.table[column].to_numpy().sum())

    @property
    def shards(self) -> np.ndarray:
        """Committed shards, ascending int64."""
        shards: np.ndarray = self.table["shard"].to_numpy()
        return shards

    @property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of the receipts' files."""
        return tuple(self.table["sha256"].to_pylist())

    def array_bytes(self) -> dict[str, int]:
        """Bytes of the shards by array."""
        names = _flat(self.table["arrays"]).to_pylist()
        found: dict[str, int] = {}
        for name, size in zip(names, _flat(self.table["bytes"]).to_pylist(), strict=True):
            found[name] = found.get(name, 0) + size
        return found

    def batch_sizes(self) -> Counter[int]:
        """How many shards were encoded with which batch size."""
        return Counter(self.table["batch"].to_pylist())

    def failed_rows(self) -> dict[str, np.ndarray]:
        """Rows of the store without a feature, by reason, ascending int64."""
        counts = np.diff(np.concatenate([c.offsets.to_numpy() for c in self.table["places"].chunks] or [np.zeros(1)]))
        rows = np.repeat(self.shards, counts) * self.rows_per_shard + _flat(self.table["places"]).to_numpy()
        reasons = _flat(self.table["reasons"]).dictionary_encode()
        codes = reasons.indices.to_numpy()
        return {reason: rows[codes == code] for code, reason in enumerate(reasons.dictionary.to_pylist())}

    def mendable(self) -> np.ndarray:
        """Shards with a failed row that is not forgotten."""
        rows = [found for reason, found in self.failed_rows().items() if reason != "forgotten"]
        return np.unique(np.concatenate([*rows, np.zeros(0, dtype=np.int64)]) // self.rows_per_shard)


def read_ledger(store: FeatureStore, teacher: str, *, keep: bool = False) -> Ledger:
    """Return what all receipts of a teacher say; opens those that are new or changed since the ledger was kept.

    `keep` writes it for the next time. Raises DamagedStoreError for a receipt that is damaged.
    """
    stamps = store.place.stamps(f"receipts/{teacher}")
    stems = {name.removesuffix(".json"): stamp for name, stamp in stamps.items() if name.endswith(".json")}
    numbers = {int(stem): stamp for stem, stamp in stems.items() if stem.isdecimal()}
    known = _kept(store, teacher)
    present = pa.array(
        [bool(stamp) and numbers.get(shard) == stamp for shard, stamp in _stamped(known)], type=pa.bool_()
    )
    valid = known.filter(present)
    missing = sorted(numbers.keys() - set(valid["shard"].to_pylist()))
    opened = (_row(store, teacher, shard, numbers[shard]) for shard in missing)
    fresh = pa.Table.from_pylist([row for row in opened if row is not None], schema=_SCHEMA)
    table = pa.concat_tables([valid, fresh]).sort_by("shard").combine_chunks()
    if keep and (missing or len(valid) < len(known)):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        store.place.publish(_file(teacher), hashlib.sha256(data).digest() + data)
    return Ledger(table, store.rows_per_shard)


def _stamped(table: pa.Table) -> Iterator[tuple[int, str]]:
    return zip(table["shard"].to_pylist(), table["stamp"].to_pylist(), strict=True)


def _row(store: FeatureStore, teacher: str, shard: int, stamp: str) -> Mapping[str, Any] | None:
    """Return what a receipt says; None if it is gone since it was listed, as while its shard is replaced."""
    found = store.receipt_bytes(teacher, shard)
    if found is None:
        return None
    data, receipt = found
    arrays: dict[str, int] = {}
    for path, file in receipt.files.items():
        array = path.removeprefix(f"{teacher}/").partition("/")[0]
        arrays[array] = arrays.get(array, 0) + file.bytes
    failed = [(place, row.reason or "") for place, row in enumerate(receipt.rows) if row.status == "failed"]
    return {
        "shard": shard,
        "stamp": stamp,
        "sha256": hashlib.sha256(data).hexdigest(),
        "ok": receipt.ok,
        "failed": len(failed),
        "absent": len(receipt.rows) - receipt.ok - len(failed),
        "shared": receipt.shared,
        "batch": receipt.execution.batch_size,
        "arrays": list(arrays),
        "bytes": list(arrays.values()),
        "places": [place for place, _ in failed],
        "reasons": [reason for _, reason in failed],
    }


def _kept(store: FeatureStore, teacher: str) -> pa.Table:
    """Return the kept ledger; an empty one if there is none, or it cannot be read: it is made again."""
    empty = _SCHEMA.empty_table()
    try:
        data = store.place.find(_file(teacher)) or b""
    except StoreError:
        return empty
    told, data = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(data).digest() != told:
        return empty
    table = pq.read_table(io.BytesIO(data))
    if (table.schema.metadata or {}).get(b"ledger") != _FORMAT or table.schema.names != _SCHEMA.names:
        return empty
    return table.cast(_SCHEMA)


def _file(teacher: str) -> str:
    return f"_log/ledger/{teacher}"


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten() if len(column) else pa.array([], type=column.type.value_type)
