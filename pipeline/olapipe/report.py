"""What a store holds, from its receipts alone: coverage, failures, bytes. Used by `extract` and `inspect`."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.bottleneck import Bottleneck
from olapipe.drift import ShardStatistics
from olapipe.tally import Tally
from olapipe.teachers.info import TeacherInfo
from olaschema import precision
from olaschema.errors import OlaError
from olaschema.ledger import read_ledger
from olaschema.manifest import ChannelStatistics, Precision, TeacherRecord
from olaschema.store import FeatureStore

_NAMED = 5


@dataclass(frozen=True)
class Failure:
    """One image without a feature of one teacher."""

    teacher: str
    row: int
    key: str
    reason: str
    detail: str


@dataclass
class TeacherSummary:
    """One teacher's part of a store. Counts are images; `waiting` ones are planned and not extracted yet."""

    record: TeacherRecord
    planned: int
    shards: int
    ok: int = 0
    failed: int = 0
    absent: int = 0
    committed: int = 0
    shared: int = 0
    """Images with a feature that is stored in another row."""
    array_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of the committed shards by array: `values`, and `scale` beside integers."""
    statistics: ChannelStatistics = field(default_factory=lambda: ChannelStatistics(1))
    failures: list[Failure] = field(default_factory=list)
    """In order of rows; of a brief summary the first few of each reason."""
    failed_rows: dict[str, np.ndarray] = field(default_factory=dict)
    """Rows of all failures by reason, ascending."""
    batch_sizes: Counter[int] = field(default_factory=Counter)
    """How many shards were encoded with which batch size: more than one where some did not fit the device."""
    by_shard: list[ShardStatistics] = field(default_factory=list)
    """Of each committed shard that has features, in order."""

    @property
    def waiting(self) -> int:
        """Planned images whose shard is not committed."""
        return self.planned - self.ok - self.failed

    @property
    def stored_bytes(self) -> int:
        """Bytes of the committed shards, all arrays together."""
        return sum(self.array_bytes.values())

    @property
    def float32_bytes(self) -> int:
        """Size of the features that exist, uncompressed in float32."""
        return self.ok * int(np.prod(self.record.fingerprint.shape)) * 4

    @property
    def ratio(self) -> float | None:
        """How many times smaller than float32 the stored features are; None while there are none."""
        return self.float32_bytes / self.stored_bytes if self.ok else None


def summarise(store: FeatureStore, teacher: str, *, brief: bool = False) -> TeacherSummary:
    """Count what one teacher has. `brief`: only the first failures of each reason, and no statistics of channels.

    A brief summary opens the receipts that are new since the last one, and those of the failures that it names.
    """
    record = store.teacher(teacher)
    planned = sum(generation.rows for generation in store.generations())
    summary = TeacherSummary(record, planned, store.shard_count())
    ledger = read_ledger(store, teacher)
    summary.committed = len(ledger.shards)
    summary.ok, summary.failed, summary.absent = (ledger.total(name) for name in ("ok", "failed", "absent"))
    summary.array_bytes = ledger.array_bytes()
    summary.failed_rows = ledger.failed_rows()
    summary.batch_sizes = ledger.batch_sizes()
    named = [rows[:_NAMED] if brief else rows for rows in summary.failed_rows.values()]
    summary.failures = list(_failures(store, teacher, sorted(row for rows in named for row in rows.tolist())))
    summary.statistics = ChannelStatistics(record.fingerprint.channels)
    summary.shared = ledger.total("shared")
    if not brief:
        for shard in ledger.shards.tolist():
            receipt = store.receipt(teacher, shard)
            if receipt is None:
                continue
            statistics = ChannelStatistics.from_json(receipt.statistics, record.fingerprint.channels)
            summary.statistics.merge(statistics)
            if statistics.count:
                summary.by_shard.append(ShardStatistics(shard, receipt.ok, statistics))
    return summary


def _failures(store: FeatureStore, teacher: str, rows: Iterable[int]) -> Iterator[Failure]:
    for shard, group in groupby(rows, key=lambda row: row // store.rows_per_shard):
        receipt = store.receipt(teacher, int(shard))
        samples = store.shard_samples(int(shard))
        for row in group:
            place = int(row) % store.rows_per_shard
            if receipt is not None and receipt.rows[place].status == "failed":
                found = receipt.rows[place]
                yield Failure(teacher, int(row), samples[place].key, found.reason or "", found.detail or "")


def print_summary(
    console: Console, store: FeatureStore, summaries: Sequence[TeacherSummary], rates: Mapping[str, float]
) -> None:
    """Print the closing table and the failures. `rates` are images per second of this run."""
    table = Table(title=Text(f"features in {visible(store.url)}"), title_justify="left")
    table.add_column("teacher", no_wrap=True)
    for column in ("images", "failed", "waiting", "stored", "× smaller than float32", "images/s"):
        table.add_column(column, justify="right")
    for summary in summaries:
        name = summary.record.fingerprint.teacher
        table.add_row(
            Text(name),
            str(summary.ok),
            str(summary.failed),
            str(summary.waiting),
            size(summary.stored_bytes),
            f"{summary.ratio:.2f}" if summary.ratio else "–",
            f"{rates[name]:.1f}" if name in rates else "–",
        )
    console.print(table)
    print_failures(console, store, summaries)


def print_job(console: Console, tally: Tally, slowest: Bottleneck | None) -> None:
    """Print what a run says of itself: batches that were made smaller, the slowest stage, the shards given up."""
    for name, shards in tally.smaller.items():
        sizes = Counter(shards.values())
        counts = ", ".join(f"{count} at {used}" for used, count in sorted(sizes.items(), reverse=True))
        numbers = ", ".join(map(str, sorted(shards)[:_NAMED])) + (", …" if len(shards) > _NAMED else "")
        console.print(
            Text(
                f"{name}: the batch did not fit the device in {len(shards)} shards ({numbers}), they were encoded with "
                f"smaller ones: {counts}. Use --batch-size {min(sizes)} to have all alike, and faster."
            ),
            soft_wrap=True,
        )
    if slowest is not None:
        console.print(
            Text(f"slowest stage: {slowest.stage}, busy {slowest.busy:.0%} of the time. Faster: {slowest.advice}."),
            soft_wrap=True,
        )
    if tally.lost:
        table = Table(title="shards given up after several attempts", title_justify="left")
        table.add_column("shard", justify="right")
        table.add_column("why")
        for lost in sorted(tally.lost, key=lambda lost: lost.shard):
            table.add_row(str(lost.shard), Text(visible(lost.reason)))
        console.print(table)


def print_failures(console: Console, store: FeatureStore, summaries: Sequence[TeacherSummary]) -> None:
    """Print failed images by reason, the first few of each by name."""
    everyone = {summary.record.fingerprint.teacher for summary in summaries}
    images: dict[tuple[str, int], dict[str, Failure]] = {}
    rows_of: dict[str, list[np.ndarray]] = {}
    for summary in summaries:
        for failure in summary.failures:
            images.setdefault((failure.reason, failure.row), {})[failure.teacher] = failure
        for reason, failed in summary.failed_rows.items():
            rows_of.setdefault(reason, []).append(failed)
    reasons = {reason: len(np.unique(np.concatenate(found))) for reason, found in rows_of.items()}
    if not reasons:
        return
    console.print(Text("failed images, by reason:"))
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        console.print(Text(f"  {reason}: {count}"))
        rows = sorted(row for found, row in images if found == reason)
        for row in rows[:_NAMED]:
            by_teacher = images[reason, row]
            failure = next(iter(by_teacher.values()))
            only = "" if set(by_teacher) == everyone else f" [{', '.join(by_teacher)}]"
            console.print(Text(f"    {visible(failure.key)}: {visible(failure.detail)}{only}"), soft_wrap=True)
        if count > _NAMED:
            console.print(Text(f"    and {count - _NAMED} more"))
    console.print(Text(f"  all of them: olapipe inspect {visible(store.url)} --json"), soft_wrap=True)


def print_error(console: Console, error: OlaError) -> None:
    """Print an error and its remedy; nothing in them is taken for markup."""
    console.print(Text.assemble(("error: ", "bold red"), visible(error.problem)), soft_wrap=True)
    if error.remedy:
        console.print(Text(visible(error.remedy)), soft_wrap=True)


def visible(text: str) -> str:
    """Return text that any terminal can show: control, direction and surrogate characters are escaped."""
    return "".join(c if _printable(c) else _escape(c) for c in text)


def _printable(character: str) -> bool:
    return character == " " or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# klt is as large as int8 before entropy coding, and how small after it depends on the features
PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8", "int4")
# What `olapipe teachers` and the table in docs/teachers.md show; True: a column of numbers.
TEACHER_COLUMNS = {
    "teacher": False,
    "published checkpoint": False,
    "licence": False,
    "grid": False,
    "channels": True,
    **{f"{stored} per image": True for stored in PRECISIONS},
    "good for": False,
}


def teacher_cells(info: TeacherInfo) -> tuple[str, ...]:
    """Return the cells of one teacher under `TEACHER_COLUMNS`, uncompressed sizes; one that cannot be used says why."""
    if info.problem:
        return (info.name, *("–" for _ in range(len(TEACHER_COLUMNS) - 2)), f"cannot be used: {info.problem}")
    of_checkpoint = info.channels == 0
    height, width = info.grid or (1, 1)
    shape = (height, width, info.channels) if info.grid else (info.channels,)
    return (
        info.name,
        info.published or "yours",
        info.licence,
        "that of the checkpoint" if of_checkpoint else f"{height} × {width}" if info.grid else "one vector",
        "–" if of_checkpoint else str(info.channels),
        *("–" if of_checkpoint else size(_row_bytes(shape, stored)) for stored in PRECISIONS),
        info.about,
    )


def _row_bytes(shape: tuple[int, ...], stored: Precision) -> int:
    centred = precision.is_centred(shape, stored)
    return sum(array.row_bytes for array in precision.array_formats(shape, stored, centred=centred).values())


def size(count: int) -> str:
    """Return a number of bytes in words: `1.5 MiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
