"""Shards as arrays: decoding of every tier by an independent computation, and writing one again byte by byte."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd
from store_support import record
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from olapipe.stored import UNREADABLE, StoredArray, array_shard_file, decode, error_bound
from olaschema.layout import shard_file
from olaschema.precision import Stored, blank, encode
from olaschema.zarrbytes import array_documents, encode_like, encode_shard


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("empty", [(), (1,), (0, 1, 2, 3)])
def test_a_shard_is_written_again_to_the_same_bytes(precision: str, empty: tuple[int, ...]) -> None:
    teacher = record(precision, grid=(24, 24), channels=600)  # type: ignore[arg-type]  # a chunk for each row
    document = array_documents(teacher, 4, 9)["values"]
    values = np.random.default_rng(0).normal(size=(4, 24, 24, 600)).astype(precision)
    values[list(empty)] = np.nan
    data = encode_shard(Stored(values), teacher)["values"]
    assert encode_like(document, values) == data
    stored = StoredArray(document, data, 4)
    assert stored.chunk_rows == 1
    np.testing.assert_array_equal(stored.whole(), values)
    np.testing.assert_array_equal(stored.slice(2, 3), values[2:3])
    assert stored.blank(values).tolist() == [row in empty for row in range(4)]
    assert array_shard_file("depth", "values", 7, document) == shard_file("depth", 7, 4)


def test_a_shard_is_written_at_the_level_of_its_record() -> None:
    """Zstandard itself says what each level makes of the rows; shards of an old store stay what they were."""
    values = np.random.default_rng(0).normal(size=(2, 24, 24, 600)).round(1).astype(np.float16)
    sizes = {level: sum(len(Zstd(level=level).encode(row)) for row in values) for level in (1, 3)}
    assert sizes[1] != sizes[3]
    for level, size in sizes.items():
        teacher = record("float16", grid=(24, 24), channels=600, zstd_level=level)
        data = encode_shard(Stored(values), teacher)["values"]
        assert len(data) == size + 2 * 4 + 2 * 16 + 4  # a checksum for each row, then an index with its own
        assert encode_like(array_documents(teacher, 2, 1)["values"], values) == data


def test_an_array_of_integers_is_written_again_with_its_own_fill_value() -> None:
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=(8, 3), chunks=(2, 3), shards=(4, 3), dtype="i1", fill_value=0,
        serializer=BytesCodec(endian=None), compressors=[ZstdCodec(level=3), Crc32cCodec()],
        config={"write_empty_chunks": True},
    )  # fmt: skip
    values = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)
    values[2:] = 0
    array[4:] = values
    get = lambda key: sync(store.get(key, default_buffer_prototype())).to_bytes()  # type: ignore[union-attr]  # noqa: E731
    assert encode_like(get("zarr.json"), values) == get("c/1/0")
    stored = StoredArray(get("zarr.json"), get("c/1/0"), 4)
    assert stored.fill == 0
    assert stored.blank(values).tolist() == [False, False, True, True]


def test_damaged_bytes_raise_what_is_caught() -> None:
    teacher = record("float16")
    document = array_documents(teacher, 4, 1)["values"]
    data = encode_shard(Stored(np.ones((4, 3, 3, 5), np.float16)), teacher)["values"]
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 0x10
        with pytest.raises(UNREADABLE):
            StoredArray(document, bytes(damaged), 4).whole()
    for length in (0, 1, len(data) - 1):
        with pytest.raises(UNREADABLE):
            StoredArray(document, data[:length], 4).whole()


@pytest.mark.parametrize("channels", [1, 2, 63, 64, 65, 129])
def test_integers_times_the_scale_of_their_group(channels: int) -> None:
    rng = np.random.default_rng(channels)
    groups = (channels + 63) // 64
    scale = rng.uniform(0.01, 2, size=(2, 3, groups)).astype(np.float16)
    integers = rng.integers(-7, 8, size=(2, 3, channels))
    expected = np.zeros((2, 3, channels), np.float64)
    packed = np.zeros((2, 3, (channels + 1) // 2), np.uint8)
    for place in np.ndindex(2, 3):
        for channel in range(channels):
            expected[(*place, channel)] = integers[(*place, channel)] * float(scale[(*place, channel // 64)])
            # even channels in the low half of the byte, odd ones in the high half, two's complement
            packed[(*place, channel // 2)] |= (int(integers[(*place, channel)]) % 16) << (4 * (channel % 2))
    for values in (integers.astype(np.int8), packed):
        np.testing.assert_array_equal(decode({"values": values, "scale": scale}, channels), expected)
    bound = error_bound({"values": packed, "scale": scale}, channels)
    assert bound.shape == expected.shape
    for place in np.ndindex(2, 3):
        for channel in range(channels):
            half = float(scale[(*place, channel // 64)]) / 2
            assert half < bound[(*place, channel)] < half * 1.01


def test_the_bound_holds_for_floats() -> None:
    exact = np.concatenate([np.random.default_rng(0).normal(size=5000), np.logspace(-9, 4, 2000)])
    values = exact.astype(np.float16)
    assert (np.abs(values - exact) <= error_bound({"values": values}, 1) * (1 + 2**-10)).all()
    assert not error_bound({"values": values.astype(np.float32)}, 1).any()


def test_the_document_names_the_dimensions() -> None:
    document = array_documents(record("float32", grid=None), 4, 2)["values"]
    assert json.loads(document)["shape"] == [8, 5]
    assert array_shard_file("gen", "scale", 3, document) == "gen/scale/c/3/0"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integer_tiers_as_they_are_stored(precision: str) -> None:
    teacher = record(precision, grid=(2, 2), channels=70, centred=False)  # type: ignore[arg-type]
    features = np.random.default_rng(3).normal(size=(4, 2, 2, 70)).astype(np.float32) * 5
    stored = blank(4, teacher.fingerprint.shape, precision)  # type: ignore[arg-type]
    for row in (0, 1, 3):
        stored[row] = encode(features[row], precision)  # type: ignore[arg-type]
    documents = array_documents(teacher, 4, 1)
    objects = encode_shard(stored, teacher)
    assert set(objects) == {"values", "scale"}
    arrays = {name: StoredArray(documents[name], data, 4) for name, data in objects.items()}
    wholes = {name: array.whole() for name, array in arrays.items()}
    for name, array in arrays.items():
        assert array.blank(wholes[name]).tolist() == [False, False, True, False]
        assert encode_like(documents[name], wholes[name]) == objects[name]
    kept = {name: whole[[0, 1, 3]] for name, whole in wholes.items()}
    assert (np.abs(decode(kept, 70) - features[[0, 1, 3]]) <= error_bound(kept, 70)).all()
    assert np.isnan(decode({name: whole[2:3] for name, whole in wholes.items()}, 70)).all()
