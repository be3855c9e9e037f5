"""`olapipe plan`: what an extraction will take, from a sample that is extracted here, and whether it pays."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.config import ExtractConfig
from olapipe.corpus import list_corpus
from olapipe.measure import Measured, measure
from olapipe.report import size, visible
from olaschema.errors import ConfigError
from olaschema.store import DEFAULT_ROWS_PER_SHARD

_ONLINE = ("preprocess", "forward")


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
    with tempfile.TemporaryDirectory(prefix="olapipe-sample-") as folder:
        measured, records = measure(config, listing, assumptions.seconds, Path(folder) / "store")
    licences = {name: record.licence for name, record in records.items()}
    return predict(listing.count, measured, assumptions, config, licences)


def predict(
    images: int, measured: Measured, given: Assumptions, config: ExtractConfig, licences: Mapping[str, str]
) -> Plan:
    """Return what follows from the measurement for a corpus of `images`."""
    hours = images * measured.node_seconds / 3600
    usable = 1 - measured.failed / measured.images
    terabytes = images * usable * sum(measured.stored_bytes.values()) / 1e12
    shards = -(-images // (config.shard_size or DEFAULT_ROWS_PER_SHARD))
    files = shards * (measured.shard_files + len(config.teachers))
    # each shard's lock is taken and given back by every teacher, and it leaves a line in the log
    requests = files + shards * (2 * len(config.teachers) + 1)
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
        files=files,
        requests=requests,
        extraction_cost=None if price is None else hours * price,
        storage_cost=None if rent is None else terabytes * rent * given.months,
        cached_node_hours=hours + uses * images * reading / 3600,
        online_node_hours=uses * images * online / 3600,
        break_even_epochs=measured.node_seconds / gain if gain > 0 else None,
    )
