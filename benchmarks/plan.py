"""Does `olapipe plan` predict what `olapipe extract` then takes? Five corpora, the depth teacher, this machine.

The pictures are drawn by numpy, 5 sizes from 128 × 96 to 1280 × 960; the checkpoint is any that --checkpoint names (the
tests' tiny one by default, so reading and writing weigh more than with a published one). The prediction of the job's
seconds is compared with images over the steady rate of the run, from its `_log/timings.jsonl`: for each worker its
images after its first shards, over the time since, summed over the workers (as `benchmarks/extract.py` has it). So
start-up is left out of both; `plan` prints it apart. The trivial baseline is what one worker takes that runs alone,
over the number of workers, as if they shared nothing.
Run `python benchmarks/plan.py`; it writes benchmarks/results/plan.json and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from extract import rate
from PIL import Image

from olapipe.config import ExtractConfig
from olapipe.extract import extract as run_job
from olapipe.plan import Assumptions, make_plan
from olapipe.progress import LineReporter

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "plan.json"
SIZES = ((128, 96), (320, 240), (640, 480), (960, 720), (1280, 960))


def write_images(folder: Path, size: tuple[int, int], count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(size[0])
    for place in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{place:05d}.jpg", quality=90)


def measure(size: tuple[int, int], arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    corpus = work / f"{size[0]}"
    write_images(corpus, size, arguments.images)
    config = ExtractConfig(
        corpus=corpus, out=work / f"{size[0]}.zarr", teachers=("depth",),
        checkpoints={"depth": str(arguments.checkpoint)}, batch_size=arguments.batch_size, device="cpu",
        shard_size=arguments.shard_size,
    )  # fmt: skip
    with open(os.devnull, "w") as nowhere:
        plan = make_plan(config, Assumptions(seconds=arguments.seconds))
        alone = make_plan(config.model_copy(update={"workers": 1}), Assumptions(seconds=arguments.seconds))
        run_job(config, LineReporter(nowhere))
    predicted = plan.hours * 3600
    taken = arguments.images / rate(work / f"{size[0]}.zarr", arguments.shard_size)["images_per_second"]
    bare = alone.hours * 3600 / plan.measured.workers
    return {
        "size": list(size),
        "images": arguments.images,
        "predicted_seconds": round(predicted, 2),
        "taken_seconds": round(taken, 2),
        "error": round(predicted / taken - 1, 3),
        "baseline_error": round(bare / taken - 1, 3),
        "conditions": arguments.conditions,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "tests" / "golden" / "depth")
    parser.add_argument("--widths", type=int, nargs="*", default=[width for width, _ in SIZES], help="of the sizes")
    parser.add_argument("--add", action="store_true", help="keep the runs of other sizes in the result file")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--conditions", default="", help="what else the machine was doing; kept in the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    runs: dict[int, dict[str, Any]] = {}
    if arguments.add:
        runs = {run["size"][0]: run for run in json.loads(arguments.out.read_text(encoding="utf-8"))["runs"]}
    try:
        for size in SIZES:
            if size[0] in arguments.widths:
                runs[size[0]] = measure(size, arguments, work)
                print(runs[size[0]], flush=True)
                save([runs[width] for width in sorted(runs)], arguments)
    finally:
        shutil.rmtree(work)


def save(runs: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "ray", "zarr")} | {"python": platform.python_version()},
        "what": (__doc__ or "").strip(),
        "median_error": statistics.median(abs(run["error"]) for run in runs),
        "median_baseline_error": statistics.median(abs(run["baseline_error"]) for run in runs),
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"median error {record['median_error']:.1%}, baseline {record['median_baseline_error']:.1%}", flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
