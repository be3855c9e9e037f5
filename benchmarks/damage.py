r"""Is every flipped bit found? Damages a small store and a packed set of it, one bit at a time, and reads them again.

    python benchmarks/damage.py --flips 20000 --out benchmarks/results/damage.json
    python benchmarks/damage.py --every-bit          each bit of each file, once

For each flip, and for a cut of each file at a drawn place: does `verify` name the file, and does what training reads
(plan, records, receipts, features; of a packed set also indices, images and conversations) raise an error? What is not
found is listed with file, offset and bit (-1: cut there). The manifest and the documents of the arrays, the `.json`
members of a tar and the headers between its members are read by other programs only, so training is not asked about
those.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import io
import json
import platform
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olapipe.pack import PackSettings, pack
from olapipe.progress import LineReporter
from olapipe.tiers import Tier
from olapipe.verify import verify
from olapipe.verify_packed import verify_packed
from olaschema.errors import OlaError
from olaschema.manifest import (
    ChannelStatistics,
    Execution,
    Fingerprint,
    Precision,
    Preprocessing,
    RowReceipt,
    SampleRow,
    TeacherRecord,
    View,
)
from olaschema.packed import PackedSet
from olaschema.precision import blank, encode
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore
from olaschema.tarshard import ROOT

ROWS = 4
CUT = -1
IMAGES = (6, 3)
TEACHERS: dict[str, tuple[tuple[int, int] | None, int, Precision]] = {
    "depth": ((2, 2), 3, "float16"),
    "gen": (None, 7, "int4"),
    "seg": ((1, 2), 65, "int8"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=5000, help="shared evenly among the files; 5000")
    parser.add_argument("--every-bit", action="store_true", help="every bit of every file instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        store, packed = Path(folder) / "store", Path(folder) / "packed"
        make_store(store, Path(folder) / "images")
        make_packed(store, Path(folder), packed)
        result = campaign(
            [Layout(store, store_verified, store_read), Layout(packed, packed_verified, packed_read)], chosen
        )
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text + "\n")
    return 1 if result["undetected"] else 0


@dataclass(frozen=True)
class Layout:
    """A folder of features: which files `verify` names, and whether training reads all of it without an error."""

    root: Path
    verified: Callable[[Path], set[str]]
    read: Callable[[Path], bool]

    def files(self) -> list[Path]:
        """Return all files but logs."""
        return sorted(p for p in self.root.rglob("*") if p.is_file() and p.relative_to(self.root).parts[0] != "_log")


def make_store(root: Path, images: Path) -> None:
    images.mkdir()
    for index in range(sum(IMAGES)):
        (images / f"{index:04d}.jpg").write_bytes(content(index))
    store = FeatureStore.create(root, rows_per_shard=ROWS)
    first = 0
    for count in IMAGES:
        names = [f"{index:04d}.jpg" for index in range(first, first + count)]
        store.add_generation([SampleRow(row=0, key=name, uri=name, size=1) for name in names])
        first += count
    for name, (grid, channels, precision) in TEACHERS.items():
        record = teacher(name, grid, channels, precision)
        store.put_teacher(record)
        rng = np.random.default_rng(channels)
        for shard in range(store.shard_count()):
            stored = blank(ROWS, record.fingerprint.shape, record.precision, centred=record.centred)
            rows = [RowReceipt(status="absent")] * ROWS
            statistics = ChannelStatistics(channels)
            for place, sample in enumerate(store.shard_samples(shard)):
                feature = rng.normal(size=record.fingerprint.shape).astype(np.float32)
                stored[place] = encode(feature, record.precision, centred=record.centred)
                rows[place] = RowReceipt(status="ok", sha256=digest(int(sample.key[:4])), width=8, height=6)
                statistics.update(feature[None])
            how = Execution(device="cpu", torch="none", batch_size=1, threads=1)
            store.commit_shard(record, shard, stored, rows, statistics, how)
    seal(store, store.teachers())


def teacher(name: str, grid: tuple[int, int] | None, channels: int, precision: Precision) -> TeacherRecord:
    seen = Preprocessing(
        processor="none", backend="pil", channel_order="rgb", exif=True, view=View(kind="squash"), steps=()
    )
    meaning = Fingerprint(
        teacher=name,
        model_class="none",
        weights="w",
        preset="default",
        preprocessing=seen,
        taps=(),
        pooling="none",
        grid=grid,
        channels=channels,
    )
    record = TeacherRecord(fingerprint=meaning, precision=precision, source="none", licence="none", libraries={})
    return Tier(precision).settle(record)


def content(index: int) -> bytes:
    return random.Random(index).randbytes(200)


def digest(index: int) -> str:
    return hashlib.sha256(content(index)).hexdigest()


def make_packed(store: Path, folder: Path, out: Path) -> None:
    names = [f"{index:04d}.jpg" for index in range(sum(IMAGES))]
    entries = [{"image": name, "conversations": [{"from": "gpt", "value": f"about {name}"}]} for name in names]
    conversations = folder / "c.json"
    conversations.write_text(json.dumps([*entries, {"conversations": [{"from": "gpt", "value": "text"}]}]))
    pack(PackSettings(str(store), conversations, folder / "images", str(out)))


def campaign(layouts: list[Layout], chosen: argparse.Namespace) -> dict[str, object]:
    started = time.perf_counter()
    undetected: list[dict[str, object]] = []
    done: Counter[str] = Counter()
    asked = 0
    for layout, file, offset, bit in draw(layouts, chosen):
        original = file.read_bytes()
        name = str(file.relative_to(layout.root))
        where = {"layout": layout.root.name, "file": name, "offset": offset, "bit": bit}
        file.write_bytes(damaged(original, offset, bit))
        done[f"{layout.root.name}/{name}"] += 1
        if name not in layout.verified(layout.root):
            undetected.append({"by": "verify", **where})
        if read_by_training(original, name, offset, bit):
            asked += 1
            if layout.read(layout.root):
                undetected.append({"by": "training", **where})
        file.write_bytes(original)
    return {
        "question": "is every flipped bit, and every file cut short, found?",
        "settings": {"flips": chosen.flips, "every_bit": chosen.every_bit, "seed": chosen.seed},
        "teachers": {name: precision for name, (_, _, precision) in TEACHERS.items()},
        "files": {
            f"{each.root.name}/{f.relative_to(each.root)}": f.stat().st_size for each in layouts for f in each.files()
        },
        "damages": sum(done.values()),
        "asked_of_training": asked,
        "damages_by_file": dict(done),
        "undetected": undetected,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: importlib.metadata.version(name) for name in ("zarr", "numpy", "pyarrow", "numcodecs")},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def draw(layouts: list[Layout], chosen: argparse.Namespace) -> Iterator[tuple[Layout, Path, int, int]]:
    """Yield where to damage: a byte and its bit, or the new length of the file and CUT."""
    files = [(layout, file) for layout in layouts for file in layout.files()]
    rng = random.Random(chosen.seed)
    yield from ((layout, file, rng.randrange(file.stat().st_size), CUT) for layout, file in files)
    if chosen.every_bit:
        yield from ((*f, offset, bit) for f in files for offset in range(f[1].stat().st_size) for bit in range(8))
        return
    for number in range(chosen.flips):
        layout, file = files[number % len(files)]
        yield layout, file, rng.randrange(file.stat().st_size), rng.randrange(8)


def damaged(data: bytes, offset: int, bit: int) -> bytes:
    if bit == CUT:
        return data[:offset]
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def read_by_training(data: bytes, name: str, offset: int, bit: int) -> bool:
    if name == "manifest.json" or (name.count("/") == 2 and name.endswith("zarr.json")):
        return False
    if not name.endswith(".tar"):
        return True
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        read = [m for m in tar.getmembers() if not m.name.endswith(".json")]
    if bit == CUT:
        return any(m.offset_data + m.size > offset for m in read)
    return any(m.offset_data <= offset < m.offset_data + m.size for m in read)


def store_verified(root: Path) -> set[str]:
    return {problem.file for problem in verify(str(root), LineReporter(io.StringIO())).problems}


def store_read(root: Path) -> bool:
    try:
        store = FeatureStore.open(root)
        rows = [sample.row for sample in store.samples()]
        for name in TEACHERS:
            reader = FeatureReader(store, name)
            for row in rows:
                reader.read(row)
    except OlaError:
        return False
    return len(rows) == sum(IMAGES)


def packed_verified(root: Path) -> set[str]:
    try:
        return {name.partition(":")[0] for name, _ in verify_packed(PackedSet.open(root))}
    except OlaError as error:  # the root document: nothing can be checked without it
        return {ROOT} if f"/{ROOT}" in error.problem else set()


def packed_read(root: Path) -> bool:
    try:
        packed = PackedSet.open(root)
        count = 0
        for found in packed.listing():
            count += 1
            packed.image(found)
            for name in TEACHERS:
                packed.read(found, name)
        packed.conversations()
        for tar in range(len(packed.record.tars)):
            packed.index(tar)
    except OlaError:
        return False
    return count == sum(IMAGES)


if __name__ == "__main__":
    sys.exit(main())
