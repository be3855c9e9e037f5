"""Kill the driver, workers and raylets of a small Ray cluster many times; compare every byte with an undisturbed run.

    python benchmarks/faults.py --kills 100

Each round makes a store from nothing: one random victim at every write boundary (before, during and after the values,
before, during and after the receipt), each at a shard drawn at random, and the same command again until it ends by
itself. The result is `benchmarks/results/faults.json`.
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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ray
from cluster_support import Nodes, control, finish, fired, start
from pipeline_support import digests, write_images

POINTS = ("before-values", "during-values", "after-values", "before-receipt", "during-receipt", "after-receipt")
IMAGES = 24
SETTINGS = ("--shard-size", 2, "--batch-size", 2, "--workers", 2)


def one_round(nodes: Nodes, corpus: Path, folder: Path, random_: random.Random, hit: Counter[str]) -> dict[str, str]:
    shards = random_.sample(range(IMAGES // 2), len(POINTS))
    victims = [random_.choice(["driver", "worker", "worker", "raylet"]) for _ in POINTS]
    plan = list(zip(shards, POINTS, victims, strict=True))
    checkpoint = control(folder / "faulty", plan=plan)
    for _ in range(2 * len(plan)):
        process = start(nodes, corpus, folder / "s", checkpoint, *SETTINGS)
        output = finish(process, nodes)
        if process.returncode == 0:
            break
        if process.returncode != -9:
            raise SystemExit(f"exit status {process.returncode} of {plan}:\n{output}")
    for number in fired(checkpoint):
        hit[f"{victims[number]} {POINTS[number]}"] += 1
    return digests(folder / "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    arguments = parser.parse_args()
    random_ = random.Random(arguments.seed)
    hit: Counter[str] = Counter()
    differing, rounds, started = 0, 0, time.monotonic()
    nodes = Nodes()
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_images(corpus, *(f"{index:02d}.png" for index in range(IMAGES)))
        (corpus / "03.png").write_bytes(b"not an image")
        process = start(nodes, corpus, Path(scratch) / "whole" / "s", control(Path(scratch) / "whole"), *SETTINGS)
        output = finish(process)
        if process.returncode:
            raise SystemExit(output)
        undisturbed = digests(Path(scratch) / "whole" / "s")
        while hit.total() < arguments.kills:
            found = one_round(nodes, corpus, Path(scratch) / str(rounds), random_, hit)
            differing += found != undisturbed
            rounds += 1
            print(f"{rounds} rounds, {hit.total()} kills, {differing} stores differ", flush=True)
    nodes.cluster.shutdown()
    result = {
        "kills": hit.total(),
        "rounds": rounds,
        "stores_that_differ": differing,
        "nodes_restarted": nodes.restarted,
        "by_victim_and_boundary": dict(sorted(hit.items())),
        "images": IMAGES,
        "seed": arguments.seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": {"python": platform.python_version(), "ray": ray.__version__},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if differing:
        raise SystemExit(f"{differing} stores differ from the undisturbed one")


if __name__ == "__main__":
    main()
