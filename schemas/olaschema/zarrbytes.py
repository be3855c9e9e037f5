"""The Zarr layout as bytes: metadata documents and whole shards, made by zarr itself in memory.

A Zarr shard's bytes do not depend on its place in the array, so a shard is encoded as an array of one shard
and its single object is published as `values/c/SHARD/0/0/0`, `scale/c/SHARD/0/0/0` or `offset/c/SHARD/0`.
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
from olaschema.errors import StoreError
from olaschema.layout import chunk_rows
from olaschema.manifest import Precision, StoreRecord, TeacherRecord
from olaschema.precision import ArrayFormat, Stored, formats_of


def zstd_level(precision: Precision) -> int:
    """Return the Zstandard level of features that are stored for the first time.

    int8 and int4: 1, which takes 0.3 and 1 % more bytes than 3 in a third of the time. Floats do not differ, and klt's
    many zeros do (`benchmarks/codec.py`).
    """
    return 1 if precision in ("int8", "int4") else 3


def root_document(record: StoreRecord) -> bytes:
    """`zarr.json` of the root group."""
    return _group_document({"ola": record.model_dump(mode="json")})


def teacher_document(record: TeacherRecord) -> bytes:
    """`zarr.json` of a teacher's group."""
    return _group_document({"ola": record.model_dump(mode="json")})


def array_documents(record: TeacherRecord, rows_per_shard: int, shards: int) -> dict[str, bytes]:
    """`zarr.json` of each of a teacher's arrays by name, arrays of `shards * rows_per_shard` rows."""
    found = {}
    formats = formats_of(record)
    chunk = chunk_rows(formats["values"].row_bytes, rows_per_shard)
    for name, array in formats.items():
        store = MemoryStore()
        _create_array(store, array, record.zstd_level, chunk, rows_per_shard, shards)
        found[name] = _stamped(_get(store, "zarr.json"))
    return found


def encode_shard(stored: Stored, record: TeacherRecord) -> dict[str, bytes]:
    """Encode one shard's rows as the Zarr object of each array, by name.

    Raises StoreError unless the arrays are those of the record: zarr would convert others without a word.
    """
    formats = formats_of(record)
    rows = len(stored.values)
    given = {name: (array.shape, array.dtype) for name, array in stored.arrays.items()}
    wanted = {name: ((rows, *array.shape), array.dtype) for name, array in formats.items()}
    if given != wanted:
        raise StoreError(
            f"{record.fingerprint.teacher}: {_listed(given)} cannot be stored as {record.precision}, "
            f"which is {_listed(wanted)}",
            "Encode the features with the precision that the store holds.",
        )
    chunk = chunk_rows(formats["values"].row_bytes, rows)
    found = {}
    for name, array in formats.items():
        store = MemoryStore()
        _create_array(store, array, record.zstd_level, chunk, rows, 1)[...] = stored.arrays[name]
        found[name] = _get(store, "c/0" + "/0" * len(array.shape))
    return found


def encode_like(document: bytes, values: np.ndarray) -> bytes:
    """Encode the values of one shard as the array whose `zarr.json` is `document` does, whatever dtype and codecs."""
    metadata = json.loads(document)
    metadata["shape"] = list(values.shape)
    store = MemoryStore()
    sync(store.set("zarr.json", default_buffer_prototype().buffer.from_bytes(json.dumps(metadata).encode())))
    with zarr.config.set({"array.write_empty_chunks": True}):  # it is no part of the document
        zarr.open_array(store, mode="r+")[...] = values
    return _get(store, "c/0" + "/0" * (values.ndim - 1))


def _listed(arrays: dict[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return " and ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in arrays.items())


def _create_array(
    store: MemoryStore, array: ArrayFormat, level: int, rows_per_chunk: int, rows_per_shard: int, shards: int
) -> zarr.Array[Any]:
    return zarr.create_array(
        store,
        shape=(shards * rows_per_shard, *array.shape),
        dtype=array.dtype,
        chunks=(rows_per_chunk, *array.shape),
        shards=(rows_per_shard, *array.shape),
        serializer=BytesCodec(endian="little"),
        compressors=[ZstdCodec(level=level), Crc32cCodec()],
        # a row without a feature decodes to NaN, by any reader, and never to a plausible zero
        fill_value=array.fill,
        dimension_names=("row", *(("height", "width") if len(array.shape) == 3 else ()), array.last_axis),
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
