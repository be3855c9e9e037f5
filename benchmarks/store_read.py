"""How fast shuffled training reads are: our reader against other readers and formats, same rows, same stored bytes.

int8 rows of 576 x 1024 with their scales and offsets, from proxies of features (see codec.py). Every format holds the
same zstd frames with the same CRC-32C, as many rows in a shard; every row that is read is checked, decompressed, put
into a batch of tensors, and in an untimed first epoch compared with what was written. The trivial baseline is a
memory map of the uncompressed arrays without any check. Each measurement is a process of its own; they take turns (A
B C A B C ...), and a figure is the median of its turns. The page cache is warm. Rows per CPU second (all threads of
the process counted) say more than rows per second where others use the machine.

    benchmarks/peers/install.sh && .venv-peers/bin/python benchmarks/store_read.py

writes benchmarks/results/store-read.json and prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

from codec import cpu_name, fastest, proxy  # noqa: E402
from peers.formats import CHANNELS, GRID, KINDS, SHAPES, WRITERS, Layout  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "store-read.json"
# in the process itself, and in two loader processes
MODES = {"one process": 0, "2 workers": 2}
PACKAGES = (
    *("ola-distill", "numpy", "torch", "numcodecs", "google-crc32c", "zarr", "zarrs", "tensorstore"),
    *("mosaicml-streaming", "litdata", "webdataset", "obstore"),
)


class MeasurementError(RuntimeError):
    """A reader did not get to the end; what it said is on the standard error."""


Turns = dict[tuple[str, str], list[dict[str, Any]]]
Save = Callable[[Turns], None]


def make(layout: Layout, seed: int) -> dict[str, float]:
    """Write the rows as a store; returns what encoding and writing them cost, in CPU seconds of one core."""
    from store_support import EXECUTION, images, record

    from olapipe.quantise import quantise
    from olaschema.manifest import ChannelStatistics, RowReceipt
    from olaschema.store import FeatureStore

    store = FeatureStore.create(layout.at("store"), rows_per_shard=layout.rows_per_shard)
    store.add_generation(images(layout.rows))
    teacher = record("int8", grid=GRID, channels=CHANNELS)
    store.put_teacher(teacher)
    rng = np.random.default_rng(seed)
    seconds = dict.fromkeys(("float32_mb", "quantise", "statistics", "compress_and_write"), 0.0)
    for shard in range(layout.rows // layout.rows_per_shard):
        features = proxy((*GRID, CHANNELS), layout.rows_per_shard, rng)
        seconds["float32_mb"] += features.nbytes / 1e6
        start = time.process_time()
        stored = quantise(torch.from_numpy(features), "int8", centred=True)
        seconds["quantise"] += time.process_time() - start
        start = time.process_time()
        collected = ChannelStatistics(CHANNELS)
        for feature in features:
            collected.update(feature[None])
        seconds["statistics"] += time.process_time() - start
        rows = [RowReceipt(status="ok", sha256=f"{i:064x}", width=8, height=6) for i in range(len(features))]
        start = time.process_time()
        store.commit_shard(teacher, shard, stored, rows, collected, EXECUTION)
        seconds["compress_and_write"] += time.process_time() - start
    return seconds


def sums(layout: Layout) -> list[int]:
    """Return a checksum of each row as it was before it was stored anywhere."""
    arrays = [np.load(layout.at(f"{name}.npy"), mmap_mode="r") for name in SHAPES]
    return [_sum(array[i] for array in arrays) for i in range(layout.rows)]


def _sum(arrays: Iterable[np.ndarray]) -> int:
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array), found)
    return found


def measure(kind: str, workers: int, layout: Layout, epochs: int, expected: list[int]) -> dict[str, Any]:
    """Read every row once and compare it, then time further epochs; over a network, time the only one."""
    remote = layout.endpoint is not None
    begun = time.perf_counter()
    loader = KINDS[kind](layout, workers)
    batches = []
    for numbers, *arrays in loader:
        batches.append(numbers)
        if remote:
            continue
        for number, *row in zip(numbers, *(array.numpy() for array in arrays), strict=True):
            if _sum(row) != expected[number]:
                raise SystemExit(f"{kind}: row {number} is not what was written")
    if sorted(number for numbers in batches for number in numbers) != list(range(layout.rows)):
        raise SystemExit(f"{kind}: an epoch does not hold every row once")
    start, cpu = (begun, 0.0) if remote else (time.perf_counter(), time.process_time())
    rows = layout.rows if remote else 0
    for _ in range(0 if remote else epochs):
        for numbers, *_ in loader:
            rows += len(numbers)
    seconds = time.perf_counter() - start
    found = {"rows_per_s": rows / seconds, "share_a_shard": sharing(batches, layout.rows_per_shard)}
    if workers == 0 and not remote:
        found["rows_per_cpu_s"] = rows / (time.process_time() - cpu)
    return found


def sharing(batches: list[list[int]], rows_per_shard: int) -> float:
    """Return the share of pairs of rows in a batch that are of one shard."""
    pairs = same = 0
    for numbers in batches:
        shards = np.array(numbers) // rows_per_shard
        equal = int((shards[:, None] == shards[None]).sum()) - len(numbers)
        same, pairs = same + equal, pairs + len(numbers) * (len(numbers) - 1)
    return same / pairs


def in_a_process(kind: str, mode: str, layout: Layout, epochs: int, expected: list[int]) -> dict[str, Any]:
    """Measure in a fork of this process, in which no reader was ever opened."""
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)
    child = forked.Process(target=_send, args=(sender, kind, MODES[mode], layout, epochs, expected))
    child.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        raise MeasurementError(f"{kind}, {mode}: the measurement failed") from None
    child.join()
    return found


def _send(sender: Connection, *task: Any) -> None:
    sender.send(measure(*task))
    sender.close()


def local(layout: Layout, kinds: list[str], rounds: int, epochs: int, save: Save) -> None:
    """Let the readers take turns; `save` is called with all turns so far."""
    turns: Turns = {(kind, mode): [] for kind in kinds for mode in MODES}
    expected = sums(layout)
    for turn in range(rounds):
        for (kind, mode), found in turns.items():
            found.append(in_a_process(kind, mode, layout, epochs, expected))
            speed, by_cpu = found[-1]["rows_per_s"], found[-1].get("rows_per_cpu_s", 0)
            print(f"turn {turn + 1}  {kind:22} {mode:11} {speed:7.0f} rows/s  {by_cpu:7.0f} /CPU s", flush=True)
            save(turns)


def compared(turns: Turns) -> list[dict[str, Any]]:
    """Return the medians of each reader's turns, and of the ratios of ours to it in the same turn.

    What else the machine does falls on both of a turn.
    """
    lines = []
    for (kind, mode), found in turns.items():
        if not found:
            continue
        line: dict[str, Any] = {"reader": kind, "mode": mode, "turns": len(found)}
        line |= {name: statistics.median(one[name] for one in found) for name in found[0]}
        ours = turns["ours", mode]
        for name in ("rows_per_s", "rows_per_cpu_s"):
            if name in line and ours:
                pairs = zip(ours, found, strict=False)
                line[f"ours_over_it_{name}"] = statistics.median(a[name] / b[name] for a, b in pairs)
        lines.append(line)
    return lines


@contextmanager
def bucket(layout: Layout, latency: float) -> Iterator[Any]:
    """Serve the formats from an S3 server behind a proxy that adds `latency` seconds; yields the proxy."""
    import place_support
    from proxy_support import Proxy

    server = place_support.s3_server.__wrapped__()
    upstream = next(server)
    os.environ.update(place_support.ENVIRONMENT)
    try:
        import boto3

        client = boto3.client("s3", endpoint_url=upstream)
        client.put_bucket_acl(Bucket=place_support.BUCKET, ACL="public-read")
        for path in sorted(Path(layout.root).rglob("*")):
            if path.is_file() and path.suffix != ".npy" and "_log" not in path.parts:
                client.upload_file(str(path), place_support.BUCKET, f"bench/{path.relative_to(layout.root)}")
        with Proxy(upstream) as proxied:
            proxied.latency = latency
            for name in ("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"):
                os.environ[name] = proxied.url
            os.environ["AWS_ALLOW_HTTP"] = "true"
            yield proxied
    finally:
        server.close()


def remote(layout: Layout, kinds: list[str], rounds: int, latency: float, save: Save) -> None:
    """Read one epoch, from the opening on, with nothing of it on this machine before."""
    turns: Turns = {(kind, mode): [] for mode in MODES for kind in kinds if kind != "memmap"}
    with bucket(layout, latency) as proxied:
        for turn in range(rounds):
            for (kind, mode), found in turns.items():
                with tempfile.TemporaryDirectory() as scratch:
                    there = dataclasses.replace(
                        layout, root="s3://features/bench", endpoint=proxied.url, scratch=scratch
                    )
                    proxied.requests.clear()
                    try:
                        one = in_a_process(kind, mode, there, 1, [])
                    except MeasurementError as error:
                        # not every reader takes every server
                        print(error, flush=True)
                        continue
                one["requests_per_row"] = proxied.requests.total() / layout.rows
                found.append(one)
                speed, asked = one["rows_per_s"], one["requests_per_row"]
                print(f"turn {turn + 1}  {kind:22} {mode:11} {speed:7.1f} rows/s  {asked:.2f} requests/row", flush=True)
                save(turns)


def writing(seconds: dict[str, float], layout: Layout) -> dict[str, float]:
    """Derive what storing costs per core and how many cores 600 images a second take."""
    block = np.ones(64 << 20, np.uint8)
    copy = block.nbytes / fastest(block.copy, 7) / 1e6
    whole = seconds["quantise"] + seconds["statistics"] + seconds["compress_and_write"]
    speed = seconds["float32_mb"] / whole
    return {
        "float32_mb_per_s_per_core": speed,
        "memory_copy_mb_per_s": copy,
        "of_memory_copy": speed / copy,
        "cpu_ms_per_row": 1e3 * whole / layout.rows,
        **{f"{name}_ms_per_row": 1e3 * seconds[name] / layout.rows for name in seconds if name != "float32_mb"},
        "cores_for_600_rows_per_s": 600 * whole / layout.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows-per-shard", type=int, default=32)
    parser.add_argument("--window", type=int, default=4, help="shards among whose rows the trainer shuffles")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of a turn")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds that the proxy adds; 0: leave it out")
    parser.add_argument("--remote-rounds", type=int, default=1)
    parser.add_argument("--only", action="append", choices=[*KINDS], help="readers beside ours; default: all")
    parser.add_argument("--conditions", default="", help="what else the machine was doing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [kind for kind in KINDS if not settings.only or kind in ("ours", *settings.only)]
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(
            folder, settings.shards * settings.rows_per_shard, settings.rows_per_shard, settings.batch, settings.window
        )
        seconds = make(layout, settings.seed)
        for write in WRITERS.values():
            write(layout)
        stored = sum(path.stat().st_size for path in Path(layout.at("store")).rglob("0") if path.is_file())
        result: dict[str, Any] = {
            "question": "how fast shuffled training reads of int8 576 x 1024 rows are, by reader and format",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "conditions": {"said": settings.conditions, "load": [os.getloadavg()[0]]},
            "settings": {k: v for k, v in vars(settings).items() if k not in ("out", "conditions")},
            "stored_bytes_per_row": stored / layout.rows,
            "writing": writing(seconds, layout),
        }

        def save(part: str, turns: Turns) -> None:
            # after every turn: what a run that is stopped has measured counts
            result[part] = compared(turns)
            result["conditions"]["load"] = [*result["conditions"]["load"][:1], os.getloadavg()[0]]
            settings.out.parent.mkdir(parents=True, exist_ok=True)
            settings.out.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")

        local(layout, kinds, settings.rounds, settings.epochs, partial(save, "local"))
        if settings.latency:
            remote(layout, kinds, settings.remote_rounds, settings.latency, partial(save, "remote"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
