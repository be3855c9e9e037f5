"""The Zarr layout as bytes: metadata documents and whole shards, made by zarr itself in memory.

A Zarr shard's bytes do not depend on its place in the array, so a shard is encoded as an array of one shard
and its single object is published as `values/c/SHARD/0/0/0`.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from olaschema.digest import stamp
from olaschema.layout import chunk_rows
from olaschema.manifest import Fingerprint, Precision, StoreRecord, TeacherRecord
from olaschema.precision import DTYPES

ZSTD_LEVEL = 3


def root_document(record: StoreRecord) -> bytes:
    """`zarr.json` of the root group."""
    return _group_document({"ola": record.model_dump(mode="json")})


def teacher_document(record: TeacherRecord) -> bytes:
    """`zarr.json` of a teacher's group."""
    return _group_document({"ola": record.model_dump(mode="json")})


def values_document(fingerprint: Fingerprint, precision: Precision, rows_per_shard: int, shards: int) -> bytes:
    """`zarr.json` of a teacher's values, an array of `shards * rows_per_shard` rows."""
    store = MemoryStore()
    _create_values(store, fingerprint.shape, precision, rows_per_shard, shards)
    return _stamped(_get(store, "zarr.json"))


def encode_shard(values: np.ndarray, precision: Precision) -> bytes:
    """Encode the values `(rows_per_shard, H, W, C)` or `(rows_per_shard, C)` of one shard as its Zarr object."""
    store = MemoryStore()
    array = _create_values(store, values.shape[1:], precision, values.shape[0], 1)
    array[...] = values
    return _get(store, "c/0" + "/0" * (values.ndim - 1))


def encode_like(document: bytes, values: np.ndarray) -> bytes:
    """Encode the values of one shard as the array whose `zarr.json` is `document` does, whatever dtype and codecs."""
    metadata = json.loads(document)
    metadata["shape"] = list(values.shape)
    store = MemoryStore()
    sync(store.set("zarr.json", default_buffer_prototype().buffer.from_bytes(json.dumps(metadata).encode())))
    with zarr.config.set({"array.write_empty_chunks": True}):  # it is no part of the document
        zarr.open_array(store, mode="r+")[...] = values
    return _get(store, "c/0" + "/0" * (values.ndim - 1))


def _create_values(
    store: MemoryStore, shape: tuple[int, ...], precision: Precision, rows_per_shard: int, shards: int
) -> zarr.Array[Any]:
    dtype = DTYPES[precision]
    rows = chunk_rows(int(np.prod(shape)) * dtype.itemsize, rows_per_shard)
    return zarr.create_array(
        store,
        shape=(shards * rows_per_shard, *shape),
        dtype=dtype,
        chunks=(rows, *shape),
        shards=(rows_per_shard, *shape),
        serializer=BytesCodec(endian="little"),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        # a row without a feature reads as NaN, by any reader, and never as a plausible zero
        fill_value=float("nan"),
        dimension_names=("row", "height", "width", "channel") if len(shape) == 3 else ("row", "channel"),
        config={"write_empty_chunks": True},
    )


def _group_document(attributes: dict[str, Any]) -> bytes:
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes)
    return _stamped(_get(store, "zarr.json"))


def _stamped(data: bytes) -> bytes:
    # zarr keeps attributes in the order given; sorted keys make equal content equal bytes
    document = json.loads(data)
    return stamp(document, document.setdefault("attributes", {}).setdefault("ola", {}))


def _get(store: MemoryStore, key: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        buffer = sync(store.get(key, default_buffer_prototype()))
    if buffer is None:
        raise KeyError(f"zarr wrote no {key}")
    return buffer.to_bytes()
