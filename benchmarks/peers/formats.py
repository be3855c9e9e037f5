"""The same stored rows in every format that is compared, and a way of reading each as a training run would.

A row is what the store holds for it: the zstd frames and CRC-32Cs of its values, scale and offset. Containers of
bytes (MDS, litdata, tar) get exactly these and unpack them with `unpack`; readers of Zarr read the store itself. Where
a format shuffles by itself it does so; the others are read in the trainer's order. As many rows share a shard in
every format.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs.zstd import Zstd
from torch.utils.data import DataLoader, Dataset, IterableDataset

from olaschema.layout import shard_file
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.order import epoch_order

TEACHER = "depth"
GRID, CHANNELS = (24, 24), 1024
SHAPES: dict[str, tuple[tuple[int, ...], np.dtype]] = {
    "values": ((*GRID, CHANNELS), np.dtype("i1")),
    "scale": ((*GRID, CHANNELS // 64), np.dtype("<f2")),
    "offset": ((CHANNELS,), np.dtype("<f2")),
}
# what CRC-32C is of any bytes followed by their own CRC-32C: checked without copying the bytes
_RESIDUE = 0x48674BC7
_zstd = Zstd()

# its number, and the arrays of SHAPES
Row = tuple[int, *tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Layout:
    """Where the formats lie (a folder, or what stands before their names in a bucket), and what they hold."""

    root: str
    rows: int
    rows_per_shard: int
    batch: int
    window: int
    endpoint: str | None = None
    scratch: str = ""

    def at(self, name: str) -> str:
        return f"{self.root}/{name}"


def unpack(data: bytes, name: str) -> np.ndarray:
    """Check and decompress one stored array of a row."""
    if google_crc32c.value(data) != _RESIDUE:
        raise SystemExit(f"{name}: checksum")
    shape, dtype = SHAPES[name]
    out = np.empty(shape, dtype)
    _zstd.decode(memoryview(data)[:-4], out)
    return out


def collate(rows: list[Row]) -> tuple[list[int], *tuple[torch.Tensor, ...]]:
    """Make a batch: row numbers, and the arrays of SHAPES with the rows in front."""
    numbers, *arrays = zip(*rows, strict=True)
    return [int(number) for number in numbers], *(torch.from_numpy(np.stack(array)) for array in arrays)


# ---- writing


def stored_rows(layout: Layout) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Yield each row's chunks as they are in the store's shard files."""
    store = FeatureStore.open(layout.at("store"))
    for shard in range(layout.rows // layout.rows_per_shard):
        files = {
            name: store.place.read(shard_file(TEACHER, shard, len(shape) + 1, name))
            for name, (shape, _) in SHAPES.items()
        }
        for i in range(layout.rows_per_shard):
            row = {}
            for name, data in files.items():
                index = np.frombuffer(data[-16 * layout.rows_per_shard - 4 : -4], "<u8").reshape(-1, 2)
                row[name] = data[index[i, 0] : index[i, 0] + index[i, 1]]
            yield shard * layout.rows_per_shard + i, row


def write_raw(layout: Layout) -> None:
    """The trivial baseline: uncompressed arrays without checksums."""
    for name, (shape, dtype) in SHAPES.items():
        array = np.lib.format.open_memmap(layout.at(f"{name}.npy"), "w+", dtype, (layout.rows, *shape))
        for number, row in stored_rows(layout):
            array[number] = unpack(row[name], name)
        array.flush()


def write_mds(layout: Layout) -> None:
    streaming = _streaming()
    # a shard of MDS is cut by its bytes
    largest = max(sum(map(len, row.values())) for _, row in stored_rows(layout))
    columns = {"row": "int", **dict.fromkeys(SHAPES, "bytes")}
    limit = (largest + 64) * layout.rows_per_shard
    with streaming.MDSWriter(out=layout.at("mds"), columns=columns, size_limit=limit) as writer:
        for number, row in stored_rows(layout):
            writer.write({"row": number, **row})


def write_litdata(layout: Layout) -> None:
    from litdata.streaming.writer import BinaryWriter

    os.makedirs(layout.at("litdata"))
    writer = BinaryWriter(layout.at("litdata"), chunk_size=layout.rows_per_shard)
    for number, row in stored_rows(layout):
        writer[number] = {"row": number, **row}
    writer.done()
    writer.merge(1)


def write_tars(layout: Layout) -> None:
    import webdataset

    Path(layout.at("tars")).mkdir()
    with webdataset.ShardWriter(layout.at("tars/%05d.tar"), maxcount=layout.rows_per_shard, verbose=0) as writer:
        for number, row in stored_rows(layout):
            writer.write({"__key__": f"{number:08d}", **row})


# ---- reading by row number


class Rows(Dataset[Row]):
    """Rows by number, opened where they are first read: in the loader's process."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": None}

    def __len__(self) -> int:
        return self.layout.rows

    def __getitem__(self, number: int) -> Row:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Row]:
        if self.opened is None:
            self.opened = self.open()
        return self.read(numbers)

    def open(self) -> Any:
        raise NotImplementedError

    def read(self, numbers: list[int]) -> list[Row]:
        raise NotImplementedError


class Raw(Rows):
    """The uncompressed arrays, unchecked."""

    def open(self) -> Any:
        return [np.load(self.layout.at(f"{name}.npy"), mmap_mode="r") for name in SHAPES]

    def read(self, numbers: list[int]) -> list[Row]:
        return [(number, *(np.array(array[number]) for array in self.opened)) for number in numbers]


class Ours(Rows):
    """The store through our reader."""

    def open(self) -> Any:
        return FeatureReader(FeatureStore.open(self.layout.at("store")), TEACHER)

    def read(self, numbers: list[int]) -> list[Row]:
        rows = []
        for number in numbers:
            arrays = self.opened.read(number).arrays
            rows.append((number, *(arrays[name] for name in SHAPES)))
        return rows


class PlainZarr(Rows):
    """zarr-python, row by row: an orthogonal selection of a batch takes several times as long."""

    def open(self) -> Any:
        import zarr

        if "://" not in self.layout.root:
            return zarr.open_group(self.layout.at("store"), mode="r")[TEACHER]
        import obstore

        place = obstore.store.from_url(self.layout.at("store"), client_options={"allow_http": True})
        return zarr.open_group(zarr.storage.ObjectStore(place, read_only=True), mode="r")[TEACHER]

    def read(self, numbers: list[int]) -> list[Row]:
        return [(number, *(self.opened[name][number] for name in SHAPES)) for number in numbers]


class Zarrs(PlainZarr):
    """The store through zarr-python with the codecs of zarrs."""

    def open(self) -> Any:
        import zarr
        import zarrs  # noqa: F401

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        return super().open()


class TensorStore(Rows):
    """All rows of a batch are asked for at once."""

    def open(self) -> Any:
        import tensorstore

        def kvstore(name: str) -> dict[str, Any]:
            if self.layout.endpoint is None:
                return {"driver": "file", "path": self.layout.at(f"store/{TEACHER}/{name}/")}
            bucket, _, prefix = self.layout.root.removeprefix("s3://").partition("/")
            path = f"{prefix}/store/{TEACHER}/{name}/"
            where = {"endpoint": self.layout.endpoint, "aws_region": "us-east-1"}
            return {"driver": "s3", "bucket": bucket, "path": path, **where}

        specs = [{"driver": "zarr3", "kvstore": kvstore(name)} for name in SHAPES]
        # shard indices are kept, as our reader keeps them; rows are too many to fit
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 4 << 20}})
        return [tensorstore.open(spec, read=True, open=True, context=context).result() for spec in specs]

    def read(self, numbers: list[int]) -> list[Row]:
        asked = [(number, [array[number].read() for array in self.opened]) for number in numbers]
        return [(number, *(array.result() for array in arrays)) for number, arrays in asked]


# ---- reading in the format's own order


def _streaming() -> types.ModuleType:
    """Return `streaming.base`; the package above it imports torchvision, for data sets of images."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit("mosaicml-streaming is not installed: benchmarks/peers/install.sh")
        package = types.ModuleType("streaming")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    import streaming.base

    return streaming.base


def _unpacked(sample: dict[str, Any]) -> Row:
    return int(sample["row"]), *(unpack(sample[name], name) for name in SHAPES)


def mds(layout: Layout, workers: int) -> Any:
    class Unpacked(_streaming().StreamingDataset):  # type: ignore[misc, name-defined]
        def __getitem__(self, at: int) -> Row:
            return _unpacked(super().__getitem__(at))

    where = {"local": layout.at("mds")}
    if layout.endpoint is not None:
        where = {"remote": layout.at("mds"), "local": f"{layout.scratch}/mds-cache"}
    # its block of shuffled rows is the trainer's window
    block = layout.window * layout.rows_per_shard
    data = Unpacked(
        **where, shuffle=True, batch_size=layout.batch, num_canonical_nodes=1, shuffle_block_size=block, shuffle_seed=1
    )
    return DataLoader(data, layout.batch, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)


def lit(layout: Layout, workers: int) -> Any:
    import litdata

    class Unpacked(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Row:
            return _unpacked(super().__getitem__(at))

    more: dict[str, Any] = {}
    if layout.endpoint is not None:
        more = {"cache_dir": f"{layout.scratch}/lit-cache", "storage_options": {"endpoint_url": layout.endpoint}}
    data = Unpacked(layout.at("litdata"), shuffle=True, **more)
    return litdata.StreamingDataLoader(
        data, batch_size=layout.batch, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )


class _Shaped(IterableDataset[Row]):
    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Row]:
        for sample in self.samples:
            yield _unpacked({"row": sample["__key__"], **{name: sample[name] for name in SHAPES}})


def tars(layout: Layout, workers: int, *, buffer: int) -> Any:
    import webdataset

    urls = [layout.at(f"tars/{i:05d}.tar") for i in range(layout.rows // layout.rows_per_shard)]
    if layout.endpoint is not None:
        urls = [url.replace("s3://", f"{layout.endpoint}/") for url in urls]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls) if buffer else False)
    if buffer:
        samples = samples.shuffle(buffer)
    return DataLoader(
        _Shaped(samples), layout.batch, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )


class _Batches:
    """The trainer's order, one epoch after another, in batches of row numbers."""

    def __init__(self, layout: Layout, window: int) -> None:
        self.layout, self.window, self.epoch = layout, window, 0

    def __iter__(self) -> Iterator[list[int]]:
        shards = np.arange(self.layout.rows) // self.layout.rows_per_shard
        order = epoch_order(shards, seed=1, epoch=self.epoch, window=self.window)
        self.epoch += 1
        for first in range(0, len(order), self.layout.batch):
            yield order[first : first + self.layout.batch].tolist()

    def __len__(self) -> int:
        return -(-self.layout.rows // self.layout.batch)


def by_row(kind: type[Rows], *, everything: bool = False) -> Callable[[Layout, int], Any]:
    def make(layout: Layout, workers: int) -> Any:
        window = layout.rows if everything else layout.window
        return DataLoader(
            kind(layout),
            batch_sampler=_Batches(layout, window),
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            # connections to a bucket do not survive a fork
            multiprocessing_context="spawn" if workers and layout.endpoint is not None else None,
        )

    return make


KINDS: dict[str, Callable[[Layout, int], Any]] = {
    "memmap": by_row(Raw),
    "ours": by_row(Ours),
    "ours, all shards": by_row(Ours, everything=True),
    "zarr": by_row(PlainZarr),
    "zarrs": by_row(Zarrs),
    "tensorstore": by_row(TensorStore),
    "mosaicml-streaming": mds,
    "litdata": lit,
    "webdataset": lambda layout, workers: tars(layout, workers, buffer=layout.window * layout.rows_per_shard),
    "webdataset, in order": lambda layout, workers: tars(layout, workers, buffer=0),
}
WRITERS = {"raw": write_raw, "mds": write_mds, "litdata": write_litdata, "tars": write_tars}
