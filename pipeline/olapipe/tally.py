"""What the driver and the workers of a job tell each other, and what a job has done so far. No Ray in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ERRORS = "errors.log"
Stop = Literal["SIGINT", "SIGTERM", "max-failures"]


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode for the teachers that lack it. `replace`: also what is committed, as images are now.

    `poisoned` are, by teacher, the rows that a worker did not survive, with the reason to record.
    """

    shard: int
    teachers: tuple[str, ...]
    rows: int
    replace: bool = False
    poisoned: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardResult:
    """What a worker made of one shard, by teacher: images with and without a feature, batch size; seconds by stage."""

    ok: Mapping[str, int]
    failed: Mapping[str, int]
    batch_size: Mapping[str, int]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class LostShard:
    """A shard that was given up, and why."""

    shard: int
    reason: str


@dataclass
class Tally:
    """A job so far. Counts are images by teacher and hold for this run."""

    settled: Counter[str] = field(default_factory=Counter)
    """Images with a verdict, those of shards under way included."""
    ok: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    """Seconds of all workers by stage, over finished shards."""
    shards: int = 0
    lost: list[LostShard] = field(default_factory=list)
    smaller: dict[str, dict[int, int]] = field(default_factory=dict)
    """By teacher the shards whose batch did not fit the device, with the batch size that did."""
    workers: int = 0
    """Workers that have loaded their teachers."""
    in_flight: int = 0
    stopped: Stop | None = None

    def add(self, task: ShardTask, result: ShardResult, batch_size: int) -> None:
        """Count a finished shard; `batch_size` is the one asked for."""
        self.shards += 1
        self.ok.update(result.ok)
        self.failed.update(result.failed)
        self.seconds.update(result.seconds)
        for name, used in result.batch_size.items():
            if used < batch_size:
                self.smaller.setdefault(name, {})[task.shard] = used

    @property
    def failures(self) -> int:
        """Failed images of the teacher that has most of them."""
        return max(self.failed.values(), default=0)
