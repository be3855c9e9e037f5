"""Our pool of actors against Ray Data on the same images, teacher and machine: images per second, start-up apart.

    OMP_NUM_THREADS=1 python benchmarks/ray_data.py

Both decode and preprocess to 336 × 336, run the tiny `depth` teacher of the tests, and write compressed float16. Ray
Data reads the files in tasks, preprocesses in tasks, encodes in actors (which get the pixels from the object store) and
writes one file per block, without checksums, receipts or a fixed order: what it would still owe a feature store. The
result is `benchmarks/results/ray_data.json`.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
from numcodecs import Zstd
from pipeline_support import DEPTH, write_images

from olapipe.config import ExtractConfig
from olapipe.extract import extract
from olapipe.progress import LineReporter
from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings
from olaschema.images import decode_image

BATCH = 8
SHARD = 32


def load() -> Any:
    import torch

    torch.set_num_threads(1)
    return registry.load("depth", TeacherSettings(checkpoint=str(DEPTH)))


class Preprocess:
    """Bytes to pixels."""

    def __init__(self) -> None:
        self.preprocessor = load().preprocessor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": self.preprocessor(decode_image(row["bytes"], name="image"))}


class Encode:
    """Pixels to features."""

    def __init__(self) -> None:
        self.teacher = load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        features = self.teacher.encode(torch.from_numpy(np.ascontiguousarray(batch["pixels"])))
        return {"features": features.numpy().astype(np.float16)}


class Write:
    """Features to files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / f"{os.getpid()}-{time.time_ns()}.zst"
        with path.open("wb") as file:
            file.write(Zstd(level=3).encode(np.ascontiguousarray(batch["features"]).tobytes()))
            file.flush()
            os.fsync(file.fileno())
        return {"finished": np.full(len(batch["features"]), time.time())}


def with_ray_data(corpus: Path, folder: Path, workers: int) -> list[float]:
    """Return when each image was written."""
    folder.mkdir()
    rows = ray.data.read_binary_files(str(corpus)).map(Preprocess, concurrency=workers, num_cpus=0.5)
    encoded = rows.map_batches(Encode, batch_size=BATCH, concurrency=workers, num_cpus=0.5)
    written = encoded.map_batches(
        Write, batch_size=SHARD, concurrency=1, num_cpus=0.1, fn_constructor_kwargs={"folder": folder}
    )
    return [row["finished"] for row in written.iter_rows()]


def with_our_job(corpus: Path, folder: Path, workers: int) -> list[float]:
    """Return when each image was committed."""
    config = ExtractConfig(
        corpus=corpus, out=folder, teachers=("depth",), checkpoints={"depth": str(DEPTH)}, workers=workers,
        batch_size=BATCH, shard_size=SHARD,
    )  # fmt: skip
    extract(config, LineReporter(io.StringIO()))
    lines = [json.loads(line) for line in (folder / "_log" / "timings.jsonl").read_text().splitlines()]
    return [line["finished"] for line in lines for _ in range(line["ok"]["depth"])]


def measure(run: Any, corpus: Path, folder: Path, workers: int) -> dict[str, float]:
    started = time.time()
    finished = np.sort(run(corpus, folder, workers))
    wall = time.time() - started
    steady = finished > finished[0]  # what came after the first shard or block
    return {
        "seconds": round(wall, 2),
        "start_up_seconds": round(float(finished[0]) - started, 2),
        "images_per_second": round(len(finished) / wall, 2),
        "images_per_second_steady": round(float(steady.sum() / (finished[-1] - finished[0])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ray_data.json")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"actors": [], "ray_data": []}
    ray.init(address="local", num_cpus=arguments.workers, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_images(corpus, *(f"{index:04d}.jpg" for index in range(arguments.images)), size=(640, 480))
        for repeat in range(arguments.repeats):  # in turn, so that a busy machine disturbs both
            for name, run in (("actors", with_our_job), ("ray_data", with_ray_data)):
                found[name].append(measure(run, corpus, Path(scratch) / f"{name}-{repeat}", arguments.workers))
                print(name, found[name][-1], flush=True)
    ray.shutdown()
    result = {
        "images": arguments.images,
        "workers": arguments.workers,
        "runs": found,
        "median_images_per_second_steady": {
            name: float(np.median([run["images_per_second_steady"] for run in runs])) for name, runs in found.items()
        },
        "median_images_per_second": {
            name: float(np.median([run["images_per_second"] for run in runs])) for name, runs in found.items()
        },
        "load_of_the_machine": round(os.getloadavg()[0], 1),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "ray": ray.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median_images_per_second_steady"]))


if __name__ == "__main__":
    main()
