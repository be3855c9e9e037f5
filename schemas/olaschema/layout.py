"""Names and geometry of a store's files; no zarr is needed to know them."""

from __future__ import annotations

_TARGET_CHUNK_BYTES = 1 << 20


def shard_file(teacher: str, shard: int, ndim: int, array: str = "values") -> str:
    """Path of one shard of a teacher's array of `ndim` dimensions: `values`, `scale` or `offset`."""
    return f"{teacher}/{array}/c/{shard}" + "/0" * (ndim - 1)


def array_document(teacher: str, array: str) -> str:
    """Path of the metadata of a teacher's array: `values`, `scale` or `offset`."""
    return f"{teacher}/{array}/zarr.json"


def basis_file(teacher: str) -> str:
    """Path of the basis of a teacher stored as `klt`; not in its group, where zarr would warn of it."""
    return f"bases/{teacher}.npy"


def receipt_file(teacher: str, shard: int) -> str:
    """Path of one shard's receipt."""
    return f"receipts/{teacher}/{shard:05d}.json"


def shard_lock(teacher: str, shard: int) -> str:
    """Name of the lock under which a shard is committed."""
    return f"{teacher}-{shard:05d}"


def chunk_rows(row_bytes: int, rows_per_shard: int) -> int:
    """Rows in an inner chunk: the largest divisor of `rows_per_shard` that stays within 1 MiB, at least 1.

    `row_bytes` is that of the values; scales and offsets are chunked like their values.
    """
    wanted = max(1, _TARGET_CHUNK_BYTES // row_bytes)
    return max(n for n in range(1, min(wanted, rows_per_shard) + 1) if rows_per_shard % n == 0)
