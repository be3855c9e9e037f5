"""One shard of a teacher, as its files hold it: any number of Zarr arrays, decoded by the formula of the store format.

Written apart from the code that encodes, and tier by tier from the arrays alone, so that `verify` does not check code
against itself.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.errors import BaseZarrError
from zarr.storage import MemoryStore

from olaschema.errors import StoreError
from olaschema.layout import basis_file, receipt_file
from olaschema.manifest import Receipt, TeacherRecord
from olaschema.store import FeatureStore

UNREADABLE = (BaseZarrError, ValueError, TypeError, KeyError, IndexError, RuntimeError, OSError, OverflowError)
"""What zarr and its codecs raise where the bytes of a shard are damaged."""

_GROUP = 64


def array_shard_file(teacher: str, array: str, shard: int, document: bytes) -> str:
    """Path of one shard of an array, which `document`, its `zarr.json`, gives the number of dimensions of."""
    return f"{teacher}/{array}/c/{shard}" + "/0" * (len(json.loads(document)["shape"]) - 1)


def committed_receipt(store: FeatureStore, teacher: str, shard: int) -> Receipt:
    """Return the receipt of a shard that is committed; raises StoreError if it went away meanwhile."""
    receipt = store.receipt(teacher, shard)
    if receipt is None:
        raise StoreError(f"{store.url}: {receipt_file(teacher, shard)} vanished", "Run the same command again.")
    return receipt


@dataclass
class StoredArray:
    """One shard of one array: `data` are the bytes of its file, `document` is the array's `zarr.json`.

    Raises one of UNREADABLE where the bytes cannot be a shard.
    """

    document: bytes
    data: bytes
    rows: int
    _kept: tuple[int, np.ndarray] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        metadata = json.loads(self.document)
        metadata["shape"][0] = self.rows
        buffer = default_buffer_prototype().buffer.from_bytes
        key = "c/0" + "/0" * (len(metadata["shape"]) - 1)
        store = MemoryStore({"zarr.json": buffer(json.dumps(metadata).encode()), key: buffer(self.data)})
        self._array: Any = zarr.open_array(store, mode="r")
        self.chunk_rows = int(self._array.chunks[0])
        if len(self.data) < 16 * (self.rows // self.chunk_rows) + 4:
            # zarr takes an empty object for a missing one, and reads the fill value
            raise ValueError(f"{len(self.data)} bytes are too few for the index of a shard")

    @property
    def fill(self) -> Any:
        """What a row without a feature holds in every element."""
        return self._array.fill_value

    def slice(self, first: int, last: int) -> np.ndarray:
        """Return rows `first` to `last` - 1, which lie in one chunk; raises one of UNREADABLE for damaged bytes."""
        chunk = first // self.chunk_rows
        if self._kept is None or self._kept[0] != chunk:
            start = chunk * self.chunk_rows
            self._kept = (chunk, np.asarray(self._array[start : start + self.chunk_rows]))
        start = chunk * self.chunk_rows
        return self._kept[1][first - start : last - start]

    def whole(self) -> np.ndarray:
        """Return all rows of the shard; raises one of UNREADABLE for damaged bytes."""
        return np.asarray(self._array[...])

    def blank(self, rows: np.ndarray) -> np.ndarray:
        """Say of each of `rows` (B, ...) whether every element of it is the fill value; shape (B,)."""
        same = np.isnan(rows) if np.issubdtype(rows.dtype, np.floating) and np.isnan(self.fill) else rows == self.fill
        return np.asarray(same.reshape(len(rows), -1).all(axis=1))


@dataclass(frozen=True)
class StoredBasis:
    """The file `bases/TEACHER.npy`, taken apart by the format: mean (T, C), places (T, T) and channels (C, C)."""

    mean: np.ndarray
    places: np.ndarray
    channels: np.ndarray


def stored_basis(store: FeatureStore, record: TeacherRecord) -> StoredBasis | None:
    """Return the basis of a teacher stored as klt; raises DamagedStoreError unless it is the file of its record."""
    if record.basis is None:
        return None
    store.basis(record)  # its digest
    flat = np.load(io.BytesIO(store.place.read(basis_file(record.fingerprint.teacher))), allow_pickle=False)
    *grid, channels = record.fingerprint.shape
    tokens = math.prod(grid)
    places_at, channels_at = tokens * channels, tokens * channels + tokens**2
    return StoredBasis(
        flat[:places_at].reshape(tokens, channels),
        flat[places_at:channels_at].reshape(tokens, tokens),
        flat[channels_at:].reshape(channels, channels),
    )


def decode(arrays: Mapping[str, np.ndarray], channels: int, basis: StoredBasis | None = None) -> np.ndarray:
    """Return the features `(..., C)` that the stored arrays of some rows mean, as float32.

    `values` alone are floats. With `scale`, `values` are int8 or, packed two to a byte with the even channel in the low
    half, int4; `scale` holds one number for each group of 64 channels, and `offset`, if there is one, what is added in
    each channel of the map. With a `basis` they are its coefficients.
    """
    values = arrays["values"]
    if "scale" not in arrays:
        return values.astype(np.float32)
    if values.dtype == np.uint8:
        low, high = values & 15, values >> 4
        values = np.stack([low, high], axis=-1).reshape(*values.shape[:-1], -1).astype(np.int8)
        values = np.where(values > 7, values - 16, values)
    found = np.asarray(values[..., :channels] * _by_channel(arrays["scale"], channels))
    if "offset" in arrays:
        found = found + np.expand_dims(arrays["offset"].astype(np.float32), (-3, -2))
    if basis is None:
        return found
    tokens = found.reshape(-1, *basis.mean.shape)
    rotated = np.tensordot(tokens, basis.channels, axes=(2, 0))
    placed = np.moveaxis(np.tensordot(basis.places, rotated, axes=(0, 1)), 0, 1)
    return np.asarray((placed + basis.mean).reshape(found.shape), dtype=np.float32)


def error_bound(arrays: Mapping[str, np.ndarray], channels: int, basis: StoredBasis | None = None) -> np.ndarray:
    """Return by how much each decoded feature `(..., C)` may differ from the feature that was stored.

    With a `basis` only the error of an image as a whole is bounded: what is returned is the bound of its root mean
    square, the same for all elements of an image.

    Floats: 2⁻¹¹ of a float16 and 2⁻²⁵ where it is small, nothing for float32. Integers: half a step of their group's
    scale, which is M/127 or M/7 rounded to a float16, so 2⁻⁹ more, and for the sum with an offset 2⁻²⁴ of the result.
    """
    values = arrays["values"]
    if basis is not None:
        scale = _by_channel(arrays["scale"], channels).astype(np.float64).reshape(-1, *basis.mean.shape)
        size = np.abs(values[..., :channels].reshape(scale.shape)) * scale
        mean = np.sqrt(np.square(basis.mean.astype(np.float64)).mean())
        step, reach = (np.sqrt(np.square(part).mean(axis=(1, 2))) for part in (scale, size))
        bound = step * (0.5 + 2.0**-9) + 2.0**-16 * (mean + reach)
        return np.broadcast_to(bound[:, None, None], scale.shape).reshape(*values.shape[:-1], channels)
    if "scale" in arrays:
        step = _by_channel(arrays["scale"], channels).astype(np.float64)
        rounded = np.abs(decode(arrays, channels)) * 2.0**-24 if "offset" in arrays else 0.0
        return np.asarray(step * (0.5 + 2.0**-9) + 2.0**-25 + rounded)
    if values.dtype == np.float16:
        return np.asarray(np.abs(values.astype(np.float64)) * 2.0**-11 + 2.0**-25)
    return np.zeros(values.shape)


def _by_channel(scale: np.ndarray, channels: int) -> np.ndarray:
    return np.repeat(scale.astype(np.float32), _GROUP, axis=-1)[..., :channels]
