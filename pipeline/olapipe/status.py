"""`olapipe status`: what the jobs on a store are doing, from receipts and the notes that each job leaves in `_log`."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.progress import duration
from olapipe.report import visible
from olapipe.tally import Stop, Tally
from olaschema.errors import StoreError
from olaschema.place import Place
from olaschema.store import FeatureStore

JOBS = "_log/jobs"
EVERY_SECONDS = 10.0
_SILENT_SECONDS = 6 * EVERY_SECONDS
_SHOWN = 10
State = Literal[
    "running", "stopping", "finished", "stopped", "stopped by Ctrl-C", "stopped by SIGTERM",
    "stopped by --max-failures", "ended by an error",
]  # fmt: skip
STOPPED: Mapping[Stop, State] = {
    "SIGINT": "stopped by Ctrl-C",
    "SIGTERM": "stopped by SIGTERM",
    "max-failures": "stopped by --max-failures",
}
_UNDER_WAY = ("running", "stopping")


class JobNote(BaseModel):
    """What a job says of itself. Counts are images of this job by teacher; times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    host: str
    pid: int
    started: float
    updated: float
    spent: float = 0.0
    """Seconds since the start by a clock that is never set."""
    state: State = "running"
    workers: int = 0
    shards: int = 0
    lost: int = 0
    waiting: dict[str, int] = {}
    """Images that the job has to do."""
    settled: dict[str, int] = {}
    ok: dict[str, int] = {}
    failed: dict[str, int] = {}
    seconds: dict[str, float] = {}

    def active(self, now: float) -> bool:
        """Whether the job was heard of lately and has not ended."""
        return self.state in _UNDER_WAY and now - self.updated < _SILENT_SECONDS

    def describe(self, now: float) -> str:
        """The state in words; a job that fell silent was probably killed."""
        if self.state in _UNDER_WAY and self.updated - now > _SILENT_SECONDS:
            return f"{self.state}, unless it was killed: its clock is {duration(self.updated - now)} ahead of this one"
        if self.state not in _UNDER_WAY or self.active(now):
            return self.state
        return f"silent for {duration(now - self.updated)}, probably killed"


class Heartbeat:
    """Leaves a job's note in the store every ten seconds, and at its end."""

    def __init__(self, place: Place, waiting: Mapping[str, int]) -> None:
        self._place = place
        self._started = time.time()
        self._begun = time.monotonic()
        self._name = f"{JOBS}/{self._started:.0f}-{secrets.token_hex(4)}.json"
        self._waiting = dict(waiting)
        self._last = float("-inf")
        self._tally = Tally()
        self._stopping = False

    def beat(self, tally: Tally) -> None:
        """Write the note if the last one is old enough."""
        self._tally = tally
        if time.monotonic() - self._last >= EVERY_SECONDS or (tally.stopped is not None) != self._stopping:
            self._write("running" if tally.stopped is None else "stopping")

    def end(self, state: State) -> None:
        """Write the last note."""
        self._write(state)

    def _write(self, state: State) -> None:
        self._last = time.monotonic()
        self._stopping = state == "stopping"
        tally = self._tally
        note = JobNote(
            host=platform.node(),
            pid=os.getpid(),
            started=self._started,
            updated=time.time(),
            spent=time.monotonic() - self._begun,
            state=state,
            workers=tally.workers,
            shards=tally.shards,
            lost=len(tally.lost),
            waiting=self._waiting,
            settled=dict(tally.settled),
            ok=dict(tally.ok),
            failed=dict(tally.failed),
            seconds={stage: round(spent, 3) for stage, spent in tally.seconds.items()},
        )
        self._place.publish(self._name, note.model_dump_json(indent=1).encode())


def jobs(place: Place) -> list[JobNote]:
    """Return the notes of all jobs, the latest first; one that cannot be read is left out, it is a log."""
    notes = []
    for name in place.names(JOBS):
        try:
            notes.append(JobNote.model_validate_json(place.read(f"{JOBS}/{name}")))
        except (StoreError, ValidationError):
            continue
    return sorted(notes, key=lambda note: -note.started)


@dataclass(frozen=True)
class TeacherStatus:
    """One teacher: shards and images with a verdict, of those planned; images per second of all active jobs."""

    teacher: str
    shards: int
    planned_shards: int
    done: int
    planned: int
    failed: int | None
    """Failed images of the active jobs; None where there is none."""
    rate: float | None
    left: float | None
    """Seconds."""


def teacher_status(store: FeatureStore, name: str, notes: Sequence[JobNote], now: float) -> TeacherStatus:
    """Return how far a teacher is. Lists receipts, opens none: thousands of shards are answered in a moment."""
    size = store.rows_per_shard
    short = {g.first_row // size + (g.rows - 1) // size: -g.rows % size for g in store.generations()}
    committed = store.committed(name)
    planned = sum(generation.rows for generation in store.generations())
    done = len(committed) * size - sum(short.get(shard, 0) for shard in committed)
    active = [note for note in notes if note.active(now) and note.waiting.get(name)]
    rates = [note.settled.get(name, 0) / note.spent for note in active if note.spent > 0]
    rate = sum(rates) if any(rates) else None
    failed = sum(note.failed.get(name, 0) for note in active) if active else None
    left = (planned - done) / rate if rate and planned > done else None
    return TeacherStatus(name, len(committed), store.shard_count(), done, planned, failed, rate, left)


def show_status(console: Console, store: FeatureStore, *, as_json: bool) -> None:
    """Print how far each teacher is and what the jobs do."""
    now = time.time()
    notes = jobs(store.place)
    teachers = [teacher_status(store, name, notes, now) for name in store.teachers()]
    if as_json:
        whole = {
            "teachers": [vars(status) for status in teachers],
            "jobs": [note.model_dump() | {"active": note.active(now)} for note in notes],
        }
        console.file.write(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        return
    table = Table(title=Text(visible(store.url)), title_justify="left")
    for column in ("teacher", "images", "shards", "failed in active jobs", "images/s", "left"):
        table.add_column(column, justify="left" if column == "teacher" else "right")
    for status in teachers:
        table.add_row(
            Text(status.teacher),
            f"{status.done} of {status.planned}",
            f"{status.shards} of {status.planned_shards}",
            "–" if status.failed is None else str(status.failed),
            "–" if status.rate is None else f"{status.rate:.1f}",
            "done" if status.done == status.planned else "–" if status.left is None else duration(status.left),
        )
    console.print(table)
    if not notes:
        console.print(Text("no job has run here"))
        return
    table = Table(title="jobs, the latest first", title_justify="left")
    for column in ("machine", "state", "heard of", "workers", "images", "shards", "given up"):
        table.add_column(column)
    for note in notes[:_SHOWN]:
        # a job that was killed has done more than it could say; the receipts, counted above, know
        least = "at least " if note.state in _UNDER_WAY and not note.active(now) else ""
        images = ", ".join(
            f"{name} {least}{note.settled.get(name, 0)} of {count}" for name, count in note.waiting.items()
        )
        cells = (
            f"{visible(note.host)}, process {note.pid}",
            note.describe(now),
            f"{duration(max(now - note.updated, 0))} ago",
            str(note.workers),
            visible(images),
            f"{least}{note.shards}",
            str(note.lost),
        )
        table.add_row(*map(Text, cells))
    console.print(table)
