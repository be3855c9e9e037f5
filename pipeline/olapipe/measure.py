"""What a machine takes for a sample of a corpus: as many workers as a job would have here, in processes without Ray.

They run together, since workers share cores, caches and memory: one alone is faster than each of several.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from olapipe.config import ExtractConfig
from olapipe.corpora.entry import Entry
from olapipe.corpus import Listing
from olapipe.environment import environment
from olapipe.tally import ShardTask
from olaschema.errors import ConfigError, OlaError, TeacherError
from olaschema.manifest import Receipt, TeacherRecord
from olaschema.place import absolute_url
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_LARGEST_SAMPLE = 4096
_READ_ROWS = 64
# As in a job: a worker has two shards under way. Those that began together at the start end together too.
_UNDER_WAY = 2
_FEWEST = 2 * _UNDER_WAY


@dataclass(frozen=True)
class Measured:
    """Per image, on this machine. `stages` are seconds of one worker; `node_seconds` are of all workers together."""

    images: int
    failed: int
    workers: int
    load_seconds: float
    stages: dict[str, float]
    node_seconds: float
    stored_bytes: dict[str, float]
    read_seconds: float
    shard_files: int
    """Files of one shard of all teachers, beside the receipts."""


@dataclass(frozen=True)
class _Worker:
    """A process that encodes, and the line to it."""

    process: Any
    line: Connection

    def answer(self) -> Any:
        """Wait for what it says; raises the OlaError that it met, TeacherError if it died."""
        try:
            said = self.line.recv()
        except EOFError as error:
            raise TeacherError(
                "a worker died while it measured the sample",
                "Each worker holds all teachers: use fewer --workers, or a machine with more memory.",
            ) from error
        if isinstance(said, OlaError):
            raise said
        return said


def measure(
    config: ExtractConfig, listing: Listing, seconds: float, folder: Path
) -> tuple[Measured, dict[str, TeacherRecord]]:
    """Encode a sample for about `seconds` into `folder`; return what it took and the teachers' records.

    Raises OlaError as `extract` does.
    """
    if config.precision == "auto" or config.precision == "klt":
        raise ConfigError(
            f"--precision {config.precision} is fitted to the corpus and cannot be predicted",
            "Predict int8, and see `olapipe fidelity` for the bytes of the others.",
        )
    rows = min(2 * config.batch_size, config.shard_size or 2 * config.batch_size)
    device, count = _room(config)
    store = FeatureStore.create(folder, rows_per_shard=rows)
    sample = list(_spread(listing))
    shards = max(_FEWEST * count, -(-len(sample) // rows))
    store.add_generation(entry.sample() for entry in islice(cycle(sample), shards * rows))
    with _workers(config, listing.root, device, count) as workers:
        loaded = [worker.answer() for worker in workers]
        records: dict[str, TeacherRecord] = {record.fingerprint.teacher: record for record in loaded[0][0]}
        for record in records.values():
            store.put_teacher(record)
        for number, worker in enumerate(workers):
            tasks = [ShardTask(shard, config.teachers, rows) for shard in range(number, shards, count)]
            worker.line.send((absolute_url(store.url), tasks, seconds))
        finished = [worker.answer() for worker in workers]
    rate = sum(steady_rate(times, rows) for times in finished)
    return _described(config, store, rate, count, max(spent for _, spent in loaded)), records


def steady_rate(times: Sequence[float], rows: int) -> float:
    """Return a worker's images per second, from when its shards of `rows` images were done; the first ones warm up."""
    after = sorted(times)[_UNDER_WAY - 1 :]
    return rows * (len(after) - 1) / (after[-1] - after[0])


def _described(config: ExtractConfig, store: FeatureStore, rate: float, workers: int, load_seconds: float) -> Measured:
    from olapipe.encode import LOG

    names, rows = config.teachers, store.rows_per_shard
    lines = [json.loads(line) for line in store.place.read_log(LOG).decode().splitlines()]
    done = sorted(line["shard"] for line in lines)
    stages = {
        stage: sum(line["seconds"][stage] for line in lines) / (rows * len(done))
        for stage in lines[0]["seconds"]
        if stage != "wall"
    }
    receipts = {name: [_receipt(store, name, shard) for shard in done] for name in names}
    failed = max(sum(receipt.failed for receipt in found) for found in receipts.values())
    stored = {
        name: sum(file.bytes for receipt in found for file in receipt.files.values())
        / max(sum(receipt.ok for receipt in found), 1)
        for name, found in receipts.items()
    }
    files = sum(len(found[0].files) for found in receipts.values())
    read = _reading(store, names, done)
    return Measured(rows * len(done), failed, workers, load_seconds, stages, 1 / rate, stored, read, files)


def _receipt(store: FeatureStore, teacher: str, shard: int) -> Receipt:
    found = store.receipt(teacher, shard)
    if found is None:
        raise TeacherError(f"shard {shard} of the sample was not finished", "Leave the temporary folder alone.")
    return found


def _room(config: ExtractConfig) -> tuple[str, int]:
    """Return the device, and how many workers a job would have on this machine."""
    import torch

    gpus = torch.cuda.device_count()
    if config.device == "cuda" and not gpus:
        raise ConfigError("--device cuda: there is no GPU here", "Use --device cpu, or plan on the machine of the job.")
    if gpus and config.device != "cpu":
        room = int(gpus / config.gpus_per_worker)
        if config.workers is not None and config.workers > room:
            raise ConfigError(f"{config.workers} workers, and GPUs for {room}", f"Use --workers {room} or fewer.")
        return "cuda", config.workers or room
    return "cpu", config.workers or os.cpu_count() or 1


@contextmanager
def _workers(config: ExtractConfig, root: Path, device: str, count: int) -> Iterator[list[_Worker]]:
    """Start `count` workers, each on its device, and end them."""
    context = multiprocessing.get_context("spawn")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    started = []
    try:
        for number in range(count):
            gpu = int(number * config.gpus_per_worker)
            own = {"CUDA_VISIBLE_DEVICES": visible[gpu] if visible else str(gpu)} if device == "cuda" else {}
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, config, root, device), daemon=True)
            with environment({"OMP_NUM_THREADS": "1"} | own):  # the former as Ray sets it for a worker
                process.start()
            theirs.close()
            started.append(_Worker(process, mine))
        yield started
    finally:
        for worker in started:
            worker.process.terminate()
            worker.process.join()
            worker.line.close()


def _work(line: Connection, config: ExtractConfig, root: Path, device: str) -> None:
    """Load, say so, encode what is asked for, and say when each shard was done."""
    from olapipe.worker import ShardWorker

    with suppress(BrokenPipeError, EOFError):  # the parent has gone
        try:
            worker = ShardWorker(config, root, device)
            started = time.perf_counter()
            records = worker.load()
            line.send((records, time.perf_counter() - started))
            url, tasks, seconds = line.recv()
            line.send(_encode(worker, url, tasks, seconds))
        except OlaError as error:
            line.send(error)


def _encode(worker: Any, url: str, tasks: Sequence[ShardTask], seconds: float) -> list[float]:
    """Encode tasks until the time is up, at least so many that a rate can be told; return when each was done."""
    finished: list[float] = []
    left = iter(tasks)
    taking = threading.Lock()
    begun = time.monotonic()

    def go_on() -> None:
        while True:
            with taking:
                enough = time.monotonic() - begun > seconds and len(finished) >= _FEWEST
                task = None if enough else next(left, None)
            if task is None:
                return
            worker.encode(url, task)
            finished.append(time.monotonic())

    with ThreadPoolExecutor(_UNDER_WAY) as pool:
        for thread in [pool.submit(go_on) for _ in range(_UNDER_WAY)]:
            thread.result()
    return finished


def _spread(listing: Listing) -> Iterator[Entry]:
    """Yield images from all over the corpus, at most some thousands."""
    step = max(1, listing.count // _LARGEST_SAMPLE)
    chosen = list(islice(listing.entries, 0, None, step))[:_LARGEST_SAMPLE]
    # neighbours are alike (one folder, one camera): the few that are extracted come from everywhere
    jump = next(n for n in (997, 991, 983, 1) if len(chosen) % n or n == 1)
    for place in range(len(chosen)):
        yield chosen[place * jump % len(chosen)]


def _reading(store: FeatureStore, teachers: Sequence[str], shards: Sequence[int]) -> float:
    """Return seconds per image that training takes to read the features of all teachers, in one process."""
    readers = {name: FeatureReader(store, name) for name in teachers}
    rows = [shard * store.rows_per_shard + place for shard in shards for place in range(store.rows_per_shard)]
    chosen = [rows[place * 31 % len(rows)] for place in range(min(_READ_ROWS, len(rows)))]
    started = time.perf_counter()
    for row in chosen:
        for reader in readers.values():
            status = reader.status(row)
            if status is not None and status.status == "ok":
                reader.read(row)
    return (time.perf_counter() - started) / len(chosen)
