"""Names and geometry of a store's files; no zarr is needed to know them."""

from __future__ import annotations

_TARGET_CHUNK_BYTES = 1 << 20


def shard_file(teacher: str, shard: int, ndim: int) -> str:
    """Path of one shard's values, for an array of `ndim` dimensions."""
    return f"{teacher}/values/c/{shard}" + "/0" * (ndim - 1)


def receipt_file(teacher: str, shard: int) -> str:
    """Path of one shard's receipt."""
    return f"receipts/{teacher}/{shard:05d}.json"


def shard_lock(teacher: str, shard: int) -> str:
    """Name of the lock under which a shard is committed."""
    return f"{teacher}-{shard:05d}"


def chunk_rows(row_bytes: int, rows_per_shard: int) -> int:
    """Rows in an inner chunk: the largest divisor of `rows_per_shard` that stays within 1 MiB, at least 1."""
    wanted = max(1, _TARGET_CHUNK_BYTES // row_bytes)
    return max(n for n in range(1, min(wanted, rows_per_shard) + 1) if rows_per_shard % n == 0)
