"""Kill the driver, workers and raylets of a small Ray cluster many times; compare every byte with an undisturbed run.

    python benchmarks/faults.py --kills 100

Each round makes a store from nothing: one random victim at every write boundary (before, during and after the values,
before, during and after the receipt), each at a shard drawn at random, one more of each kind at a random moment, and
the same command again until it ends by itself. A kill that another one forestalls is not counted. The result, kept
after every round, is `benchmarks/results/faults.json`; with --add the counts of an earlier call stay in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ray
from cluster_support import Nodes, control, finish, fired, start
from pipeline_support import digests, write_images

POINTS = ("before-values", "during-values", "after-values", "before-receipt", "during-receipt", "after-receipt")
IMAGES = 24
COUNTS = (
    "kills",
    "stores_made",
    "stores_that_differ",
    "files_compared",
    "bytes_compared",
    "nodes_restarted",
    "minutes",
)
VICTIMS = ("driver", "worker", "raylet")
SETTINGS = ("--shard-size", 2, "--batch-size", 2, "--workers", 2)
WAIT = 0.2  # seconds per batch, so that a job lasts long enough for random moments
PATIENCE = 7200.0  # the machine may stop this process for a while


def one_round(nodes: Nodes, corpus: Path, folder: Path, random_: random.Random, hit: Counter[str]) -> dict[str, str]:
    shards = random_.sample(range(IMAGES // 2), len(POINTS))
    plan = [(shard, point, random_.choice(VICTIMS)) for shard, point in zip(shards, POINTS, strict=True)]
    moments = [(random_.uniform(0, 3), victim) for victim in VICTIMS]
    checkpoint = control(folder / "faulty", plan=plan, moments=moments, wait=WAIT)
    for _ in range(2 * len(plan)):
        process = start(nodes, corpus, folder / "s", checkpoint, *SETTINGS)
        output = finish(process, nodes, PATIENCE)
        if process.returncode == 0:
            break
        if process.returncode != -9:
            raise SystemExit(f"exit status {process.returncode} of {plan}, {moments}:\n{output}")
    what = {str(number): f"{victim} {point}" for number, (_, point, victim) in enumerate(plan)}
    what |= {f"m{number}": f"{victim} at a random moment" for number, (_, victim) in enumerate(moments)}
    hit.update(what[name] for name in fired(checkpoint))
    return digests(folder / "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="go on from the counts of the result file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    arguments = parser.parse_args()
    random_ = random.Random(arguments.seed)
    hit: Counter[str] = Counter()
    result: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"seeds": []}
    if arguments.add and arguments.out.exists():
        result = json.loads(arguments.out.read_text())
        hit.update(result["by_victim_and_boundary"])
    differing = result["stores_that_differ"]
    result["seeds"].append(arguments.seed)
    nodes = Nodes()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_images(corpus, *(f"{index:02d}.png" for index in range(IMAGES)))
        (corpus / "03.png").write_bytes(b"not an image")
        whole = Path(scratch) / "whole"
        process = start(nodes, corpus, whole / "s", control(whole), *SETTINGS)
        output = finish(process, seconds=PATIENCE)
        if process.returncode:
            raise SystemExit(output)
        undisturbed = digests(whole / "s")
        compared = sum((whole / "s" / name).stat().st_size for name in undisturbed)
        while hit.total() < arguments.kills:
            started, restarted = time.monotonic(), nodes.restarted
            found = one_round(nodes, corpus, Path(scratch) / str(result["stores_made"]), random_, hit)
            differing += found != undisturbed
            result |= {
                "kills": hit.total(),
                "stores_made": result["stores_made"] + 1,
                "stores_that_differ": differing,
                "files_compared": result["files_compared"] + len(undisturbed),
                "bytes_compared": result["bytes_compared"] + compared,
                "nodes_restarted": result["nodes_restarted"] + nodes.restarted - restarted,
                "minutes": round(result["minutes"] + (time.monotonic() - started) / 60, 1),
                "by_victim_and_boundary": dict(sorted(hit.items())),
                "images": IMAGES,
                "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
                "versions": {"python": platform.python_version(), "ray": ray.__version__},
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
            print(f"{result['stores_made']} stores, {hit.total()} kills, {differing} stores differ", flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    nodes.cluster.shutdown()
    if differing:
        raise SystemExit(f"{differing} stores differ from the undisturbed one")


if __name__ == "__main__":
    main()
