"""Ray actors that write whole shards, as `olapipe extract` has them, against a pipeline of Ray Data. Once, to choose.

    OMP_NUM_THREADS=1 python benchmarks/raydata.py

The same photographs (640 × 480 JPEG), teacher (DINOv2 of reduced size, float32 on the CPU), precision (float16), Zarr
shards of 16 images and batches of 8 on both sides. Ray Data is used as its guide says: three `map_batches` stages that
overlap, of decoding and preprocessing, the teacher in a pool of actors, and writing with a sync for each batch of 16
rows. It writes no receipts, digests or statistics, retries nothing by shard and records no failed image, so it does
less. Each side has two CPUs and its rate is that of the steady state: batches written after the first four, over the
time since. They take turns. Ray Data needs pandas, which the project does not install: `pip install pandas` first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from extract import BATCH, SHARD, with_ray
from pipeline_support import write_images
from published_teachers import write_checkpoint
from teachers import hardware, versions

from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings
from olaschema.images import decode_image
from olaschema.place import LocalPlace
from olaschema.precision import encode
from olaschema.zarrbytes import encode_shard

RESULTS = Path(__file__).parent / "results" / "raydata.json"
WARM_UP = 4


def _teacher(checkpoint: str) -> Any:
    import torch

    torch.set_num_threads(1)
    return registry.load("dinov2", TeacherSettings(checkpoint))


class Decode:
    """Reads, decodes and preprocesses."""

    def __init__(self, checkpoint: str) -> None:
        self.preprocessor = _teacher(checkpoint).preprocessor

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [decode_image(Path(path).read_bytes(), name=path) for path in batch["path"]]
        return {"row": batch["row"], "pixels": np.stack([self.preprocessor(image) for image in images])}


class Forward:
    """Runs the teacher."""

    def __init__(self, checkpoint: str) -> None:
        self.teacher = _teacher(checkpoint)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        with torch.inference_mode():
            features = self.teacher.encode(torch.from_numpy(np.ascontiguousarray(batch["pixels"])))
        return {"row": batch["row"], "features": features.cpu().numpy()}


class Write:
    """Encodes and writes a Zarr shard of each batch."""

    def __init__(self, checkpoint: str, out: str) -> None:
        self.meaning = _teacher(checkpoint).fingerprint
        self.place = LocalPlace(out)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        stored = encode(batch["features"], "float16")
        for name, data in encode_shard(stored, self.meaning, "float16").items():
            self.place.publish(f"{name}/{int(batch['row'].min())}", data)
        return {"finished": np.array([time.time()]), "rows": np.array([len(batch["row"])])}


def ray_data(images: Path, out: Path, checkpoint: Path) -> dict[str, float]:
    """Run the three stages; return the rate."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"row": row, "path": str(path)} for row, path in enumerate(sorted(images.iterdir()))]
    # parts of a CPU, since the stages of both pipelines share two: the system gives each what it needs
    shares = {Decode: (0.35, BATCH, {}), Forward: (0.5, BATCH, {}), Write: (0.15, SHARD, {"out": str(out)})}
    data = ray.data.from_items(rows, override_num_blocks=len(rows) // SHARD)
    for stage, (cpus, size, more) in shares.items():
        arguments = {"checkpoint": str(checkpoint)} | more
        data = data.map_batches(
            stage, fn_constructor_kwargs=arguments, batch_size=size, num_cpus=cpus, concurrency=2, zero_copy_batch=False
        )
    started = time.time()
    written = sorted((float(row["finished"]), int(row["rows"])) for row in data.iter_rows())
    after = written[WARM_UP - 1 :]
    steady = sum(count for _, count in after[1:]) / (after[-1][0] - after[0][0])
    if sum(count for _, count in written) != len(rows):
        raise SystemExit("images are missing")
    return {
        "images_per_second": round(steady, 3),
        "seconds": round(written[-1][0] - started, 2),
        "first_shard_after": round(written[0][0] - started, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--conditions", default="", help="what else the machine was doing; kept in the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback only; read when ray is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    load = os.getloadavg()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = work / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint("dinov2", checkpoint, full=False)
        write_images(work / "images", *(f"{number:05d}.jpg" for number in range(options.images)), size=(640, 480))
        for number in range(options.repeats):
            actors = with_ray(work / "images", work / f"actors-{number}", "dinov2", checkpoint, "--workers", 2)
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)
            data = ray_data(work / "images", work / f"data-{number}", checkpoint)
            ray.shutdown()
            ratio = round(actors["images_per_second"] / data["images_per_second"], 3)
            pairs.append({"actors": actors, "ray_data": data, "actors_over_ray_data": ratio})
            print(pairs[-1], flush=True)
    result = {
        "what": (__doc__ or "").strip(),
        "pairs": pairs,
        "actors_over_ray_data": statistics.median(pair["actors_over_ray_data"] for pair in pairs),
        "settings": {"images": options.images, "shard_size": SHARD, "batch_size": BATCH},
        "conditions": {"said": options.conditions, "load_average_before": load, "after": os.getloadavg()},
        "hardware": hardware("cpu"),
        "versions": versions() | {name: version(name) for name in ("ray", "pyarrow", "pandas")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
