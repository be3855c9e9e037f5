r"""Is every flipped bit found? Damages a small store of every kind of file, one bit at a time, and reads it again.

    python benchmarks/damage.py --flips 20000 --out benchmarks/results/damage.json
    python benchmarks/damage.py --every-bit          each bit of each file, once

For each flip: does `verify` name the file, and does what training reads (plan, records, receipts, features) raise an
error? A flip that is not found is listed with file, offset and bit. The manifest and the documents of the arrays are
read by other programs only, so training is not asked about those.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from olapipe.progress import LineReporter
from olapipe.verify import verify
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
from olaschema.precision import blank, encode
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore

ROWS = 4
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
        root = Path(folder) / "s"
        make_store(root)
        result = campaign(root, chosen)
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text + "\n")
    return 1 if result["undetected"] else 0


def make_store(root: Path) -> None:
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
            stored = blank(ROWS, record.fingerprint.shape, record.precision)
            rows = [RowReceipt(status="absent")] * ROWS
            statistics = ChannelStatistics(channels)
            for place, _ in enumerate(store.shard_samples(shard)):
                feature = rng.normal(size=record.fingerprint.shape).astype(np.float32)
                stored[place] = encode(feature, record.precision)
                rows[place] = RowReceipt(status="ok", sha256=f"{place:064x}", width=8, height=6)
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
    return TeacherRecord(fingerprint=meaning, precision=precision, source="none", licence="none", libraries={})


def campaign(root: Path, chosen: argparse.Namespace) -> dict[str, object]:
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] != "_log")
    started = time.perf_counter()
    undetected: list[dict[str, object]] = []
    flips: Counter[str] = Counter()
    for file, offset, bit in draw(files, chosen):
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[offset] ^= 1 << bit
        file.write_bytes(damaged)
        name = str(file.relative_to(root))
        flips[name] += 1
        found = {problem.file for problem in verify(str(root), LineReporter(io.StringIO())).problems}
        if name not in found:
            undetected.append({"by": "verify", "file": name, "offset": offset, "bit": bit})
        if (
            name != "manifest.json"
            and (name.count("/") != 2 or not name.endswith("zarr.json"))
            and not training_finds(root)
        ):
            undetected.append({"by": "training", "file": name, "offset": offset, "bit": bit})
        file.write_bytes(original)
    return {
        "question": "is every flipped bit found?",
        "settings": {"flips": chosen.flips, "every_bit": chosen.every_bit, "seed": chosen.seed},
        "files": {str(file.relative_to(root)): file.stat().st_size for file in files},
        "flips": sum(flips.values()),
        "flips_by_file": dict(flips),
        "undetected": undetected,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{platform.machine()}, {platform.system()}",
        "versions": {name: importlib.metadata.version(name) for name in ("zarr", "numpy", "pyarrow", "numcodecs")},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def draw(files: list[Path], chosen: argparse.Namespace) -> Iterator[tuple[Path, int, int]]:
    if chosen.every_bit:
        yield from ((f, offset, bit) for f in files for offset in range(f.stat().st_size) for bit in range(8))
        return
    rng = random.Random(chosen.seed)
    for number in range(chosen.flips):
        file = files[number % len(files)]
        yield file, rng.randrange(file.stat().st_size), rng.randrange(8)


def read_by_training(name: str) -> bool:
    return name != "manifest.json" and (name.count("/") != 2 or not name.endswith("zarr.json"))


def training_finds(root: Path) -> bool:
    try:
        store = FeatureStore.open(root)
        rows = [sample.row for sample in store.samples()]
        if len(rows) != sum(IMAGES):
            return True
        for name in TEACHERS:
            reader = FeatureReader(store, name)
            for row in rows:
                reader.read(row)
    except OlaError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
