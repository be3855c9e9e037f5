"""What the Ray job costs: against the same shards without Ray, on two nodes against one, and with nothing left to do.

    OMP_NUM_THREADS=1 python benchmarks/extract.py

Rates are of the steady state: for each worker its images after its first shards, over the time since, summed over the
workers; so neither start-up (reported apart) nor the last shards, when workers run out of work, count. Runs take turns.

`without_ray`: `olapipe extract` with a worker per core, over as many processes of the same worker without Ray, each
with its part of the shards, two at a time. `nodes`: a Ray cluster of single-CPU nodes on this machine, with
a teacher that waits instead of computing (so that the engine is measured, not the cores) and with a real one.
`nothing_to_do`: the command again on a finished store, start of Python included; beside it the same without the note
of the teacher's files, so that the teacher is loaded to compare.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cluster_support import Nodes, control
from pipeline_support import write_images
from published_teachers import write_checkpoint
from teachers import hardware, versions

RESULTS = Path(__file__).parent / "results" / "extract.json"
PLUGINS = Path(__file__).parents[1] / "tests" / "plugins"
SHARD, BATCH, IN_FLIGHT = 16, 8, 2
PARTS = ("bare", "nothing", "nodes")


def rate(store: Path, shard_size: int = SHARD) -> dict[str, float]:
    """Return images per second in the steady state."""
    lines = [json.loads(line) for line in (store / "_log" / "timings.jsonl").read_text().splitlines()]
    workers: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        workers.setdefault((line["host"], line["pid"]), []).append(line["finished"])
    steady = 0.0
    for times in workers.values():
        times.sort()
        after = times[IN_FLIGHT - 1 :]  # those that began together at the start end together too
        steady += shard_size * (len(after) - 1) / (after[-1] - after[0])
    return {"images_per_second": round(steady, 3), "workers": len(workers)}


def command(corpus: Path, out: Path, teacher: str, checkpoint: Path, *more: object) -> dict[str, float]:
    """Run `olapipe extract`; return its rate and how long it took until the first shard was done."""
    fixed = ["extract", corpus, "--out", out, "--teacher", teacher, "--checkpoint", f"{teacher}={checkpoint}"]
    sizes = ["--shard-size", SHARD, "--batch-size", BATCH, "--device", "cpu"]
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "olapipe", *map(str, [*fixed, *sizes, *more])],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": _path()},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    wall = time.time() - started
    lines = (out / "_log" / "timings.jsonl").read_text().splitlines()
    first = min(json.loads(line)["finished"] for line in lines)
    return {"seconds": round(wall, 2), "first_shard_after": round(first - started, 2)}


def bare_worker(config: Any, out: str, tasks: Sequence[Any], barrier: Any) -> None:
    """What a worker of the job does, in a process that knows no Ray."""
    import torch

    from olapipe.worker import ShardWorker

    torch.set_num_threads(1)
    worker = ShardWorker(config, config.corpus, "cpu")
    worker.load()
    barrier.wait()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(partial(worker.encode, out), tasks))


def without_ray(corpus: Path, out: Path, checkpoint: Path, workers: int) -> dict[str, float]:
    """Extract with processes of our own; return the rate."""
    from olapipe.config import ExtractConfig
    from olapipe.corpus import compare, list_corpus
    from olapipe.tasks import Pending, Planned
    from olapipe.worker import ShardWorker
    from olaschema.store import FeatureStore

    config = ExtractConfig(
        corpus=corpus, out=out, teachers=("dinov2",), checkpoints={"dinov2": str(checkpoint)},
        batch_size=BATCH, device="cpu",
    )  # fmt: skip
    store = FeatureStore.create(out, rows_per_shard=SHARD)
    store.add_plan(compare(list_corpus(corpus, None), None).new.tables())
    for record in ShardWorker(config, corpus, "cpu").load():
        store.put_teacher(record)
    tasks = list(Pending(store, Planned.of(store), ["dinov2"]))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    processes = [
        context.Process(target=bare_worker, args=(config, str(out), tasks[number::workers], barrier))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a worker without Ray ended with status {process.exitcode}")
    return rate(out)


def with_ray(corpus: Path, out: Path, teacher: str, checkpoint: Path, *more: object) -> dict[str, float]:
    """Extract with the command; return the rate and the start-up."""
    found = command(corpus, out, teacher, checkpoint, *more)
    return rate(out) | found


def against_bare(work: Path, checkpoint: Path, repeats: int) -> dict[str, Any]:
    """Measure the job against the same shards without Ray."""
    cores = len(os.sched_getaffinity(0))
    pairs = []
    for number in range(repeats):
        bare = without_ray(work / "photographs", work / f"bare-{number}", checkpoint, cores)
        job = with_ray(work / "photographs", work / f"job-{number}", "dinov2", checkpoint, "--workers", cores)
        ratio = round(job["images_per_second"] / bare["images_per_second"], 3)
        pairs.append({"bare": bare, "job": job, "job_over_bare": ratio})
        print("against bare", pairs[-1], flush=True)
    return {"pairs": pairs, "job_over_bare": statistics.median(pair["job_over_bare"] for pair in pairs)}


def nothing_to_do(work: Path, checkpoint: Path, repeats: int) -> dict[str, Any]:
    """Measure the command on a store that is finished, and where it has to load the teacher to compare; in turns."""
    cores, out = len(os.sched_getaffinity(0)), work / "job-0"
    arguments = (work / "photographs", out, "dinov2", checkpoint, "--workers", cores)
    if not out.exists():
        command(*arguments)
    seconds, loading = [], []
    for _ in range(repeats):
        shutil.rmtree(out / "_log" / "teachers")
        loading.append(command(*arguments)["seconds"])
        seconds.append(command(*arguments)["seconds"])
    print("nothing to do", seconds, "with loading", loading, flush=True)
    median, slower = statistics.median(seconds), statistics.median(loading)
    found = {"runs": seconds, "seconds": median, "loading_runs": loading, "loading_seconds": slower}
    return found | {"over_loading": round(median / slower, 3)}


def nodes_against_one(work: Path, checkpoint: Path, repeats: int, wait: float) -> dict[str, Any]:
    """Measure two single-CPU nodes against one, with a teacher that waits and with one that computes."""
    waiting = control(work / "waiting", wait=wait)
    (waiting / "driver.pid").write_text("0")
    kinds = {"waits": (work / "small", "faulty", waiting), "computes": (work / "photographs", "dinov2", checkpoint)}
    rates: dict[str, dict[int, list[dict[str, float]]]] = {kind: {1: [], 2: []} for kind in kinds}
    for count in (1, 2):
        nodes = Nodes(count)
        for kind, (corpus, teacher, where) in kinds.items():
            for number in range(repeats):
                out = work / f"{kind}-{count}-{number}"
                more = ("--workers", count, "--address", nodes.address)
                rates[kind][count].append(with_ray(corpus, out, teacher, where, *more))
                print(kind, count, "nodes", rates[kind][count][-1], flush=True)
        nodes.cluster.shutdown()
    found: dict[str, Any] = {}
    for kind, runs in rates.items():
        one, two = (statistics.median(run["images_per_second"] for run in runs[count]) for count in (1, 2))
        found[kind] = {"one": runs[1], "two": runs[2], "two_over_one": round(two / one, 3)}
    return found


def _path() -> str:
    return os.pathsep.join([str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wait", type=float, default=0.4, help="seconds per batch of the teacher that waits")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--conditions", default="", help="what else the machine was doing; kept in the result")
    parser.add_argument("--add", action="store_true", help="keep the other part's figures of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.add else {}
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint = work / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint("dinov2", checkpoint, full=False)
        names = [f"{number:05d}.jpg" for number in range(options.images)]
        write_images(work / "photographs", *names, size=(640, 480))
        write_images(work / "small", *names)
        if "bare" in options.parts:
            result["without_ray"] = against_bare(work, checkpoint, options.repeats)
        if "nothing" in options.parts:
            result["nothing_to_do"] = nothing_to_do(work, checkpoint, options.repeats)
        if "nodes" in options.parts:
            result["nodes"] = nodes_against_one(work, checkpoint, options.repeats, options.wait)
    result |= {
        "what": "the Ray job against the same shards without Ray, on two nodes against one, and with nothing to do",
        "settings": {"images": options.images, "shard_size": SHARD, "batch_size": BATCH, "wait": options.wait},
        "hardware": hardware("cpu"),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    conditions = {"said": options.conditions, "load_average_before": load, "load_average_after": os.getloadavg()}
    result["conditions"] = result.get("conditions", {}) | {" and ".join(options.parts): conditions}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
