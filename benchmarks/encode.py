"""How much of the machine reaches the teacher: a shard through the whole encoder, over its stages taken one by one.

    OMP_NUM_THREADS=1 python benchmarks/encode.py

No Ray. One process per core, pinned to it, as a job's workers on a CPU are. Each takes turns: first the stages alone,
one after the other in one thread, with everything in memory (read, decode, preprocess; the bare forward pass; precision
and compression); then the same images as shards through the encoder, two at a time as a worker has them, committed to
a store on disk. `over_bound` is the encoder's rate over that of the stages alone, the most that a core can do;
`over_forward` is it over the bare forward pass, which a GPU can come near to and a CPU that also decodes cannot.
Medians over the pairs and processes. The trivial baseline is a shard after the other without a thread beside
(`one_by_one`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_teachers import NAMES, write_checkpoint
from teachers import hardware, photograph, versions

from olapipe.encode import Limits, ShardEncoder, execution
from olapipe.load import teacher_record
from olapipe.quantise import quantise
from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.images import decode_image
from olaschema.manifest import ChannelStatistics, SampleRow
from olaschema.precision import blank, require_storable
from olaschema.store import FeatureStore
from olaschema.zarrbytes import encode_shard

RESULTS = Path(__file__).parent / "results" / "encode.json"


def stages_alone(teacher: Teacher, files: list[Path], batch_size: int, precision: Any) -> dict[str, float]:
    """Return seconds per image of each stage, nothing else going on in this process."""
    clock = time.perf_counter
    record = teacher_record(teacher, precision)
    stored = blank(len(files), record.fingerprint.shape, record.precision, centred=record.centred)
    sums = ChannelStatistics(record.fingerprint.channels)
    seconds = dict.fromkeys(("decode", "forward", "encode"), 0.0)
    for first in range(0, len(files), batch_size):
        started = clock()
        pixels, digests = [], []
        for file in files[first : first + batch_size]:
            data = file.read_bytes()
            digests.append(hashlib.sha256(data).hexdigest())
            pixels.append(teacher.preprocessor(decode_image(data, name=file.name)))
        pixels_bchw = torch.from_numpy(np.stack(pixels))
        decoded = clock()
        features = teacher.encode_images(pixels_bchw, digests)
        forwarded = clock()
        values = features.cpu().numpy()
        batch = quantise(features, record.precision, centred=record.centred)
        for index, row in enumerate(values):
            require_storable(row, record.precision, centred=record.centred, name="image")
            stored[first + index] = batch[index]
        sums.update(values)
        seconds["decode"] += decoded - started
        seconds["forward"] += forwarded - decoded
        seconds["encode"] += clock() - forwarded
    started = clock()
    for data in encode_shard(stored, record).values():
        hashlib.sha256(data).hexdigest()
    seconds["encode"] += clock() - started
    return {stage: spent / len(files) for stage, spent in seconds.items()}


def one_core(core: int, options: argparse.Namespace, checkpoint: str, work: str, barrier: Any) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    teacher = registry.load(options.teacher, TeacherSettings(checkpoint))
    root = Path(work) / "images"
    files = sorted(root.iterdir())[: options.shard_size]
    shards = options.shards * 2 * options.pairs + 1
    store = FeatureStore.create(Path(work) / f"store-{core}", rows_per_shard=options.shard_size)
    names = [file.name for file in files]
    store.add_generation(
        SampleRow(row=0, key=f"{shard:04d}/{name}", uri=name, size=(root / name).stat().st_size)
        for shard in range(shards)
        for name in names
    )
    store.put_teacher(teacher_record(teacher, options.precision))
    limits = Limits(options.batch_size, decoders=options.decoders)
    how = execution("cpu", options.batch_size)
    records = {options.teacher: store.teacher(options.teacher)}
    encoder = ShardEncoder(store, root, {options.teacher: teacher}, records, limits, how)
    encode = partial(encoder.encode, teachers=[options.teacher], progress=lambda *_: None)
    encode(0)
    stages_alone(teacher, files, options.batch_size, options.precision)
    found, done, images = [], 1, options.shards * options.shard_size
    for _ in range(options.pairs):
        barrier.wait()
        alone = [stages_alone(teacher, files, options.batch_size, options.precision) for _ in range(options.shards)]
        stages = {stage: statistics.fmean(each[stage] for each in alone) for stage in alone[0]}
        rates = {}
        for name, threads in (("encoder", 2), ("one_by_one", 1)):
            barrier.wait()
            started = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(encode, range(done, done + options.shards)))
            rates[name] = images / (time.perf_counter() - started)
            done += options.shards
        bound = 1 / sum(stages.values())
        found.append(
            {
                "core": core,
                "stages": {stage: round(spent, 5) for stage, spent in stages.items()},
                "images_per_second": round(rates["encoder"], 3),
                "bound_images_per_second": round(bound, 3),
                "over_bound": round(rates["encoder"] / bound, 3),
                "over_forward": round(rates["encoder"] * stages["forward"], 3),
                "one_by_one_over_bound": round(rates["one_by_one"] / bound, 3),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=NAMES, default="dinov2", help="random weights at reduced size")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--shards", type=int, default=4, help="per measurement and core")
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--conditions", default="", help="what else the machine was doing; kept in the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    load = os.getloadavg()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work, context.Manager() as shared:
        checkpoint, images = Path(work) / "checkpoint", Path(work) / "images"
        checkpoint.mkdir()
        torch.manual_seed(0)
        write_checkpoint(options.teacher, checkpoint, full=False)
        images.mkdir()
        for seed in range(options.shard_size):
            (images / f"{seed:04d}.jpg").write_bytes(photograph(seed))
        barrier = shared.Barrier(len(cores))
        with context.Pool(len(cores)) as pool:
            tasks = [(core, options, str(checkpoint), work, barrier) for core in cores]
            runs = [run for each in pool.starmap(one_core, tasks, chunksize=1) for run in each]
    figures = ("images_per_second", "bound_images_per_second", "over_bound", "over_forward", "one_by_one_over_bound")
    result = {
        "what": "images/s of shards through the encoder on a CPU core, over its stages alone",
        "median": {name: round(statistics.median(run[name] for run in runs), 3) for name in figures},
        "runs": runs,
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "conditions")},
        "hardware": hardware("cpu"),
        "versions": versions(),
        "conditions": {"said": options.conditions, "load_average_before": load, "load_average_after": os.getloadavg()},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["median"]))


if __name__ == "__main__":
    main()
