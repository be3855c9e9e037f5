r"""How many images a second each teacher takes, one at a time and in batches. Random weights; no download.

    python benchmarks/teachers.py                                   every teacher at reduced size, on the CPU
    python benchmarks/teachers.py --full --device cuda --batch-size 32 --dtype float32 --dtype bfloat16 \
        --out benchmarks/results/teachers-gpu.json

The public OLA-VLM code runs its teachers inside the training step, one image after another. Here the same module
takes the same images one by one and as one batch, in turns within one process; the ratio is the median over the
pairs. A forward pass includes the copy to the device and of the features back. Preprocessing (decoded image to
pixels, one thread) is measured apart, because any number of workers can share it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from published_teachers import NAMES, source_of, write_checkpoint
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.images import decode_image

SIZE = (640, 480)  # of most COCO photographs
LIBRARIES = ("torch", "transformers", "diffusers", "pillow", "numpy")
DTYPES = ("float32", "bfloat16", "float16")
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", choices=NAMES, help="only this one; may be given several times")
    parser.add_argument("--full", action="store_true", help="published sizes; otherwise a quarter of each dimension")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="compute dtype, several times; float32")
    parser.add_argument("--compile", action="store_true", help="run the module through torch.compile")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements; medians are reported")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a forward pass")
    parser.add_argument("--conditions", default="", help="what else the machine was doing; kept in the result")
    parser.add_argument("--out", type=Path, default=RESULTS / "teachers-cpu.json", help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    untyped: Any = transformers_logging
    untyped.disable_progress_bar()
    load_before = os.getloadavg()
    rows = []
    for name in options.teacher or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            write_checkpoint(name, Path(folder), full=options.full)
            for dtype in options.dtype or ["float32"]:
                rows.append(measure(name, folder, dtype, options))
                print(f"{name} {dtype}: batch / one by one {rows[-1]['batch_over_one_by_one']}", flush=True)
    result = {
        "what": "images per second of each teacher with random weights",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(options.device),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {
            "size": "full" if options.full else "reduced", "device": options.device, "compile": options.compile,
            "batch_size": options.batch_size, "pairs": options.pairs, "threads": options.threads, "image": SIZE,
        },
        "conditions": {
            "said": options.conditions, "load_average_before": load_before, "load_average_after": os.getloadavg()
        },
        "teachers": rows,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    print(f"written: {options.out}")
    return 0


def measure(name: str, folder: str, dtype: Any, options: argparse.Namespace) -> dict[str, Any]:
    teacher = registry.load(
        name,
        TeacherSettings(folder, device=options.device, compute_dtype=dtype, compile=options.compile),
    )
    check_shape(teacher, full=options.full)
    images = [decode_image(photograph(seed), name=str(seed)) for seed in range(options.batch_size)]
    prepare = median_seconds(lambda: [teacher.preprocessor(image) for image in images], options.pairs)
    pixels_bchw = torch.from_numpy(np.stack([teacher.preprocessor(image) for image in images]))
    digests = [f"{seed:064x}" for seed in range(len(images))]

    def one_by_one() -> None:
        for index in range(len(images)):
            teacher.encode_images(pixels_bchw[index : index + 1], digests[index : index + 1]).cpu()

    def batched() -> None:
        teacher.encode_images(pixels_bchw, digests).cpu()

    single, batch = paired_seconds(one_by_one, batched, options.pairs)
    count = len(images)
    return {
        "teacher": name,
        "architecture": source_of(name),
        "dtype": dtype,
        "parameters": sum(p.numel() for p in teacher._module.parameters()),  # type: ignore[attr-defined]
        "input": list(pixels_bchw.shape[1:]),
        "output": list(teacher.fingerprint.shape),
        "preprocess_images_per_second": round(count / prepare, 3),
        "one_by_one_images_per_second": round(count / statistics.median(single), 3),
        "batch_images_per_second": round(count / statistics.median(batch), 3),
        "batch_over_one_by_one": round(statistics.median(s / b for s, b in zip(single, batch, strict=True)), 3),
        "seconds": {"one_by_one": [round(s, 4) for s in single], "batch": [round(s, 4) for s in batch]},
    }


def check_shape(teacher: Teacher, *, full: bool) -> None:
    """Exit where a full-size teacher has not the shape that `olapipe teachers` lists for the published one."""
    info = registry.available()[teacher.name]
    found = (teacher.fingerprint.grid, teacher.fingerprint.channels)
    if full and found != (info.grid, info.channels):
        sys.exit(f"error: {teacher.name} gives {found}, the published one {(info.grid, info.channels)}")


def photograph(seed: int) -> bytes:
    """Return a JPEG of smooth noise, whose cost to preprocess is that of any photograph of its size."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def median_seconds(work: Callable[[], object], times: int) -> float:
    work()  # caches fill, classes are imported
    return statistics.median(seconds(work) for _ in range(times))


def paired_seconds(
    first: Callable[[], object], second: Callable[[], object], pairs: int
) -> tuple[list[float], list[float]]:
    """Return seconds of both, measured in turns after one warm-up each; every other pair starts with the second."""
    first()
    second()
    firsts: list[float] = []
    seconds_: list[float] = []
    for pair in range(pairs):
        order: Sequence[tuple[Callable[[], object], list[float]]] = ((first, firsts), (second, seconds_))
        for work, kept in order if pair % 2 == 0 else reversed(order):
            kept.append(seconds(work))
    return firsts, seconds_


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()  # ends with a copy to the CPU, which waits for the device
    return time.perf_counter() - start


def hardware(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in LIBRARIES if name in installed}


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"images per second, {result['settings']['size']} size, {result['settings']['device']}")
    table.add_column("teacher")
    for column in ("dtype", "parameters", "preprocess", "one by one", "batch", "batch / one by one"):
        table.add_column(column, justify="right")
    for row in result["teachers"]:
        table.add_row(
            row["teacher"], row["dtype"], f"{row['parameters'] / 1e6:.1f} M",
            f"{row['preprocess_images_per_second']:.1f}", f"{row['one_by_one_images_per_second']:.2f}",
            f"{row['batch_images_per_second']:.2f}", f"{row['batch_over_one_by_one']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
