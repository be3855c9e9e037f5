"""`olapipe plan`: what an extraction will take, from a sample that is extracted here, and whether it pays."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.config import ExtractConfig
from olapipe.corpora.entry import Entry
from olapipe.corpus import Listing, list_corpus
from olapipe.report import size, visible
from olapipe.teachers.base import Teacher
from olaschema.errors import ConfigError
from olaschema.reader import FeatureReader
from olaschema.store import DEFAULT_ROWS_PER_SHARD, FeatureStore

_ONLINE = ("preprocess", "forward")
_LARGEST_SAMPLE = 4096
_READ_ROWS = 64


@dataclass(frozen=True)
class Assumptions:
    """What the user knows and a machine cannot measure; prices are in any currency."""

    nodes: int = 1
    epochs: int = 1
    runs: int = 1
    price_hour: float | None = None
    """Of one node like this machine."""
    price_tb_month: float | None = None
    """Of 10^12 bytes stored for a month."""
    months: float = 1.0
    seconds: float = 60.0
    """How long the sample may take, about."""


@dataclass(frozen=True)
class Measured:
    """Per image, on this machine. `stages` are seconds of one worker; `node_seconds` count all workers."""

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
class Plan:
    """The prediction. Hours and costs are of all nodes together doing the whole corpus; costs None without prices."""

    images: int
    licences: dict[str, str]
    measured: Measured
    assumptions: Assumptions
    images_per_second: float
    hours: float
    terabytes: float
    files: int
    requests: int
    extraction_cost: float | None
    storage_cost: float | None
    cached_node_hours: float
    online_node_hours: float
    break_even_epochs: float | None
    """Epochs over all runs from which on the store takes less machine time than teachers in the loop; None: never."""

    @property
    def cached_cost(self) -> float | None:
        """Money for extraction, storage and reading; None without both prices."""
        price = self.assumptions.price_hour
        if price is None or self.storage_cost is None:
            return None
        return self.cached_node_hours * price + self.storage_cost

    @property
    def online_cost(self) -> float | None:
        """Money for the teachers in the training loop; None without a price."""
        price = self.assumptions.price_hour
        return None if price is None else self.online_node_hours * price

    @property
    def pays(self) -> bool:
        """Whether caching is cheaper: in money where both prices are known, else in machine time."""
        if self.cached_cost is not None and self.online_cost is not None:
            return self.cached_cost < self.online_cost
        return self.cached_node_hours < self.online_node_hours

    def plain(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"cached_cost": self.cached_cost, "online_cost": self.online_cost, "pays": self.pays}

    def show(self, console: Console, *, as_json: bool) -> None:
        """Print it."""
        if as_json:
            console.file.write(json.dumps(self.plain(), indent=1, ensure_ascii=False) + "\n")
            return
        for line in self._lines():
            console.print(Text(visible(line)), soft_wrap=True)
        table = Table(title="seconds per image of one worker", title_justify="left")
        for stage in self.measured.stages:
            table.add_column(stage, justify="right")
        table.add_row(*(f"{seconds:.4f}" for seconds in self.measured.stages.values()))
        console.print(table)

    def _lines(self) -> Iterator[str]:
        measured, given = self.measured, self.assumptions
        workers = f"{measured.workers} worker{'s' if measured.workers > 1 else ''} a node"
        yield f"measured here on {measured.images} images ({measured.failed} of them unusable), {workers}:"
        rate = f"{self.images_per_second:.1f} images/s on {given.nodes} node(s)"
        yield f"{self.images} images at {rate}: {self.hours:.2f} h"
        yield f"start-up, on top: {measured.load_seconds:.0f} s to load the teachers, and Ray"
        per_image = ", ".join(f"{name} {size(round(count))}" for name, count in measured.stored_bytes.items())
        yield f"stored: {self.terabytes:.4f} TB in {self.files} files ({per_image} per image)"
        yield f"requests: {self.requests} to write them into a bucket"
        for name, licence in self.licences.items():
            yield f"licence of {name}: {licence}"
        if self.extraction_cost is not None:
            yield f"cost of the extraction: {self.extraction_cost:.2f}"
        if self.storage_cost is not None:
            yield f"cost of storage for {given.months:g} months: {self.storage_cost:.2f}"
        epochs = given.epochs * given.runs
        yield (
            f"{given.runs} run(s) of {given.epochs} epoch(s): {self.cached_node_hours:.2f} node hours with the store, "
            f"{self.online_node_hours:.2f} with the same teachers, batched, in the training loop"
        )
        if self.break_even_epochs is None:
            yield "reading the store takes longer than running these teachers: caching never pays here"
        else:
            yield f"break-even in machine time: {self.break_even_epochs:.2f} epochs over all runs"
        if self.pays:
            yield f"caching pays for {epochs} epoch(s) in all"
        else:
            yield f"caching does not pay for {epochs} epoch(s) in all: run the teachers in the training loop instead"


def make_plan(config: ExtractConfig, assumptions: Assumptions) -> Plan:
    """Extract a sample of the corpus into a temporary folder, and predict; raises OlaError as `extract` does."""
    from olapipe.extract import require_usable

    require_usable(config)
    if min(assumptions.nodes, assumptions.epochs, assumptions.runs) < 1 or assumptions.seconds <= 0:
        raise ConfigError("--nodes, --epochs, --runs and --seconds are positive", "Leave them out for 1, 1, 1 and 60.")
    listing = list_corpus(config.corpus, config.images)
    teachers, load_seconds = _loaded(config)
    with tempfile.TemporaryDirectory(prefix="olapipe-sample-") as folder:
        measured = _measure(config, assumptions, listing, teachers, load_seconds, Path(folder) / "store")
    return predict(listing.count, measured, assumptions, config, {name: t.licence for name, t in teachers.items()})


def predict(
    images: int, measured: Measured, given: Assumptions, config: ExtractConfig, licences: Mapping[str, str]
) -> Plan:
    """Return what follows from the measurement for a corpus of `images`."""
    hours = images * measured.node_seconds / 3600
    usable = 1 - measured.failed / measured.images
    terabytes = images * usable * sum(measured.stored_bytes.values()) / 1e12
    shards = -(-images // (config.shard_size or DEFAULT_ROWS_PER_SHARD))
    requests = shards * (measured.shard_files + len(config.teachers))
    uses = given.epochs * given.runs
    online = measured.node_seconds * sum(measured.stages[name] for name in _ONLINE) / sum(measured.stages.values())
    reading = measured.read_seconds / measured.workers
    gain = online - reading
    price, rent = given.price_hour, given.price_tb_month
    return Plan(
        images=images,
        licences=dict(licences),
        measured=measured,
        assumptions=given,
        images_per_second=given.nodes / measured.node_seconds,
        hours=hours / given.nodes,
        terabytes=terabytes,
        files=requests,
        requests=requests,
        extraction_cost=None if price is None else hours * price,
        storage_cost=None if rent is None else terabytes * rent * given.months,
        cached_node_hours=hours + uses * images * reading / 3600,
        online_node_hours=uses * images * online / 3600,
        break_even_epochs=measured.node_seconds / gain if gain > 0 else None,
    )


def _loaded(config: ExtractConfig) -> tuple[dict[str, Teacher], float]:
    import torch

    from olapipe.load import load_teachers

    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    return load_teachers(config, _device(config)), time.perf_counter() - started


def _device(config: ExtractConfig) -> str:
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no GPU here", "Use --device cpu, or plan on the machine of the job.")
    return "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"


def _workers(config: ExtractConfig) -> int:
    import torch

    room = torch.cuda.device_count() if _device(config) == "cuda" else os.cpu_count() or 1
    return config.workers or room


def _measure(
    config: ExtractConfig,
    given: Assumptions,
    listing: Listing,
    teachers: Mapping[str, Teacher],
    load_seconds: float,
    folder: Path,
) -> Measured:
    """Encode shards of the sample as a worker does until the time is up; the first one only warms up."""
    import torch

    from olapipe.encode import LOG, Limits, ShardEncoder, execution
    from olapipe.load import teacher_record

    rows = 2 * config.batch_size
    store = FeatureStore.create(folder, rows_per_shard=rows)
    sample = list(_spread(listing))
    shards = max(3, -(-len(sample) // rows))
    store.add_generation(entry.sample() for entry in islice(cycle(sample), shards * rows))
    if config.precision == "auto" or config.precision == "klt":
        raise ConfigError(
            f"--precision {config.precision} is fitted to the corpus and cannot be predicted",
            "Predict int8, and see `olapipe fidelity` for the bytes of the others.",
        )
    for teacher in teachers.values():
        store.put_teacher(teacher_record(teacher, config.precision))
    device = _device(config)
    limits = Limits(config.batch_size, config.max_pixels, config.decoders)
    records = {name: store.teacher(name) for name in teachers}
    encoder = ShardEncoder(
        store, listing.root, teachers, records, limits, execution(device, config.batch_size, compiled=config.compile)
    )
    names = list(teachers)
    encoder.encode(0, names, _ignore)
    wall, cpu = time.perf_counter(), time.process_time()
    done = 0
    while done + 1 < shards and (done < 2 or time.perf_counter() - wall < given.seconds):
        done += 1
        encoder.encode(done, names, _ignore)
        if device == "cuda":
            torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    images = done * rows
    workers = _workers(config)
    lines = [json.loads(line) for line in store.place.read_log(LOG).decode().splitlines()]
    spent = [line["seconds"] for line in lines if 0 < line["shard"] <= done]
    stages = {stage: sum(each[stage] for each in spent) / images for stage in spent[0] if stage != "wall"}
    receipts = {name: [store.receipt(name, shard) for shard in range(1, done + 1)] for name in names}
    failed = max(sum(r.failed for r in found if r is not None) for found in receipts.values())
    stored = {
        name: sum(file.bytes for r in found if r is not None for file in r.files.values())
        / max(sum(r.ok for r in found if r is not None), 1)
        for name, found in receipts.items()
    }
    # workers on one machine share its cores: together they are no faster than all of these are busy
    node = max(wall / images / workers, cpu / images / (os.cpu_count() or 1))
    files = sum(len(found[0].files) for found in receipts.values() if found[0] is not None)
    read = _reading(store, names, done * rows)
    return Measured(images, failed, workers, load_seconds, stages, node, stored, read, files)


def _spread(listing: Listing) -> Iterator[Entry]:
    """Yield images from all over the corpus, at most some thousands."""
    step = max(1, listing.count // _LARGEST_SAMPLE)
    chosen = list(islice(listing.entries, 0, None, step))[:_LARGEST_SAMPLE]
    # neighbours are alike (one folder, one camera): the few that are extracted come from everywhere
    jump = next(n for n in (997, 991, 983, 1) if len(chosen) % n or n == 1)
    for place in range(len(chosen)):
        yield chosen[place * jump % len(chosen)]


def _reading(store: FeatureStore, teachers: Sequence[str], rows: int) -> float:
    """Return seconds per image that training takes to read the features of all teachers, in one process."""
    readers = {name: FeatureReader(store, name) for name in teachers}
    chosen = [(place * 31) % rows for place in range(min(_READ_ROWS, rows))]
    started = time.perf_counter()
    for row in chosen:
        for reader in readers.values():
            status = reader.status(row)
            if status is not None and status.status == "ok":
                reader.read(row)
    return (time.perf_counter() - started) / len(chosen)


def _ignore(_teacher: str, _rows: int) -> None:
    """Take no note of progress."""
