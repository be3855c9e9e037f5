"""Which codec stores features smallest at what speed: zstd 1, 3 and 9, plain and behind Blosc's byte and bit shuffle.

The data are proxies, not features: spatially smooth maps of falling spectrum with outlier channels and a full-rank
noise floor, and, reported beside them, pure noise. What is compressed together are the rows of one inner chunk of the
store. Times are CPU times of one thread. Run `python benchmarks/codec.py`; it writes benchmarks/results/codec.json and
prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.blosc import Blosc, set_nthreads
from numcodecs.zstd import Zstd

from olaschema.layout import chunk_rows
from olaschema.manifest import Precision
from olaschema.precision import encode
from olaschema.store import DEFAULT_ROWS_PER_SHARD

RESULTS = Path(__file__).parent / "results" / "codec.json"
SHAPES: dict[str, tuple[int, ...]] = {"depth": (24, 24, 1024), "seg": (24, 24, 1536), "gen": (1024,)}
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "int4")
SHUFFLES = {"none": None, "byte": Blosc.SHUFFLE, "bit": Blosc.BITSHUFFLE}


def proxy(shape: tuple[int, ...], rows: int, rng: np.random.Generator) -> np.ndarray:
    """Float32 stand-ins for features `(rows, *shape)`.

    32 spatial fields, each a sum of plane waves with amplitudes falling as 1/frequency, mixed into the channels with
    strengths falling as 1/k; a mean per channel; white noise of a tenth of the standard deviation; 1 channel in 200
    is 30 times as large. A vector is the spatial mean of such a map.
    """
    grid = shape[:-1] or (24, 24)
    channels = shape[-1]
    rank = 32
    mixing = rng.normal(size=(rank, channels)) / np.arange(1, rank + 1)[:, None]
    mean = rng.normal(size=channels)
    gain = np.where(np.arange(channels) % 200 == 100, 30.0, 1.0)
    y, x = np.meshgrid(*(np.linspace(0, 1, side, endpoint=False) for side in grid), indexing="ij")
    maps = []
    for _ in range(rows):
        fields = np.zeros((*grid, rank))
        for fy in range(6):
            for fx in range(6):
                phase, size = rng.uniform(0, 2 * np.pi, rank), rng.normal(size=rank) / (1 + np.hypot(fy, fx))
                fields += size * np.cos(2 * np.pi * (fy * y + fx * x)[..., None] + phase)
        smooth = fields @ mixing
        noise = 0.1 * smooth.std() * rng.normal(size=smooth.shape)
        whole = (smooth + mean + noise) * gain
        maps.append(whole if len(shape) == 3 else whole.mean(axis=(0, 1)))
    return np.stack(maps).astype(np.float32)


def noise(shape: tuple[int, ...], rows: int, rng: np.random.Generator) -> np.ndarray:
    """White noise `(rows, *shape)` float32: what nothing can shrink beyond the precision's own redundancy."""
    return rng.normal(size=(rows, *shape)).astype(np.float32)


def codec(level: int, shuffle: str, itemsize: int) -> Any:
    """Zstandard as the store uses it, or of the same level inside Blosc behind a shuffle."""
    if SHUFFLES[shuffle] is None:
        return Zstd(level=level)
    # Blosc 1 turns its own level n below 9 into zstd level 2n - 1
    return Blosc(cname="zstd", clevel=(level + 1) // 2, shuffle=SHUFFLES[shuffle], typesize=itemsize)


def fastest(action: Callable[[], Any], repeats: int) -> float:
    """Return the shortest time of `repeats` runs, in seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def each(action: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Do the same to every item."""
    return [action(item) for item in items]


def measure(arrays: dict[str, np.ndarray], level: int, shuffle: str, repeats: int) -> dict[str, float]:
    """Compress the inner chunks of each array; sizes in bytes per row, speeds in MB/s of uncompressed bytes."""
    raw = packed = 0
    encoding = decoding = 0.0
    rows = len(arrays["values"])
    together = min(chunk_rows(arrays["values"][0].nbytes, DEFAULT_ROWS_PER_SHARD), rows)
    for array in arrays.values():
        tool = codec(level, shuffle, array.dtype.itemsize)
        chunks = [array[first : first + together].reshape(-1) for first in range(0, rows, together)]
        stored = [tool.encode(chunk) for chunk in chunks]
        for chunk, data in zip(chunks, stored, strict=True):
            if bytes(tool.decode(data)) != chunk.tobytes():
                raise SystemExit(f"{tool} does not give back what it was given")
        raw += sum(chunk.nbytes for chunk in chunks)
        packed += sum(len(data) for data in stored)
        encoding += fastest(partial(each, tool.encode, chunks), repeats)
        decoding += fastest(partial(each, tool.decode, stored), repeats)
    return {
        "bytes_per_row": packed / rows,
        "of_raw": packed / raw,
        "encode_mb_s": raw / encoding / 1e6,
        "decode_mb_s": raw / decoding / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of a map; vectors are 64 times as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args()
    set_nthreads(1)
    found = []
    for data, make in (("proxy", proxy), ("noise", noise)):
        for teacher, shape in SHAPES.items():
            if data == "noise" and teacher != "depth":
                continue
            rows = settings.rows * (64 if len(shape) == 1 else 1)
            features = make(shape, rows, np.random.default_rng(settings.seed))
            for precision in PRECISIONS:
                arrays = encode(features, precision).arrays
                for level in (1, 3, 9):
                    for shuffle in SHUFFLES:
                        line = {"data": data, "shape": teacher, "precision": precision, "level": level}
                        line |= {"shuffle": shuffle} | measure(arrays, level, shuffle, settings.repeats)
                        found.append(line)
                        print(
                            f"{data:5} {teacher:5} {precision:7} zstd {level} {shuffle:4} "
                            f"{line['bytes_per_row']:10.0f} B/row  {line['of_raw']:.3f} of raw  "
                            f"{line['encode_mb_s']:6.0f} MB/s in  {line['decode_mb_s']:6.0f} MB/s out",
                            flush=True,
                        )
    block = np.ones(64 << 20, np.uint8)
    copy = block.nbytes / fastest(block.copy, 5) / 1e6
    result = {
        "question": "which codec stores features smallest at what speed, one thread",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_copy_mb_s": round(copy)},
        "versions": {name: version(name) for name in ("numcodecs", "numpy", "ola-distill")}
        | {"python": platform.python_version()},
        "settings": {"rows": settings.rows, "repeats": settings.repeats, "seed": settings.seed},
        "results": [{k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in found],
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
