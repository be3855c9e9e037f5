"""Progress of a job: a bar per teacher on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from olapipe.report import visible


class Reporter(Protocol):
    """Told by a job how far it is. Counts are images with a verdict, features or failures."""

    def say(self, text: str) -> None:
        """Show one line."""

    def begin(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        """Show the teachers, how many images each will see, and how many it has seen in earlier runs."""

    def update(self, done: Mapping[str, int], failed: Mapping[str, int] | None = None) -> None:
        """Show how many images each teacher has seen, and how many of those it has seen in this run have failed."""

    def stages(self, busy: Mapping[str, float]) -> None:
        """Show which share of the time the threads of each stage are busy."""

    def end(self) -> None:
        """Stop showing; may be called twice."""


def make_reporter(stream: TextIO | None = None) -> Reporter:
    """Return bars if `stream` (standard error by default) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return BarReporter(Console(file=stream)) if stream.isatty() else LineReporter(stream)


class Pace:
    """Images per second of one teacher since the job began."""

    def __init__(self, total: int, before: int, now: float) -> None:
        self.total = total
        self.before = before
        self.done = before
        self.failed = 0
        self.started = now

    def rate(self, now: float) -> float | None:
        """Images per second, None while nothing is known."""
        spent = now - self.started
        return (self.done - self.before) / spent if self.done > self.before and spent > 0 else None

    def left(self, now: float) -> float | None:
        """Seconds left at the present rate, None while nothing is known."""
        rate = self.rate(now)
        return (self.total - self.done) / rate if rate else None

    def describe(self, now: float) -> str:
        """Failed images, rate and time left in words."""
        rate, left = self.rate(now), self.left(now)
        failed = f"{self.failed} of them failed, " if self.failed else ""
        if rate is None or left is None:
            return f"{failed}starting"
        return f"{failed}{rate:.1f} images/s, {duration(left)} left"


class LineReporter:
    """One line for all teachers every `every` seconds, and one at the end."""

    def __init__(self, stream: TextIO, *, every: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._every = every
        self._clock = clock
        self._paces: dict[str, Pace] = {}
        self._shown = 0.0
        self._stages = ""

    def say(self, text: str) -> None:
        """Write one line."""
        self._stream.write(visible(text) + "\n")
        self._stream.flush()

    def begin(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        """Remember where each teacher starts."""
        now = self._clock()
        self._paces = {name: Pace(total, done[name], now) for name, total in totals.items()}
        self._shown = now

    def update(self, done: Mapping[str, int], failed: Mapping[str, int] | None = None) -> None:
        """Write a line if the last one is old enough."""
        for name, count in done.items():
            self._paces[name].done = count
            self._paces[name].failed = (failed or {}).get(name, 0)
        if self._clock() - self._shown >= self._every:
            self._write()

    def stages(self, busy: Mapping[str, float]) -> None:
        """Remember it for the next line."""
        self._stages = _stages(busy)

    def end(self) -> None:
        """Write where each teacher stopped."""
        if self._paces:
            self._write()
            self._paces = {}

    def _write(self) -> None:
        self._shown = self._clock()
        parts = [f"{n}: {p.done}/{p.total} images, {p.describe(self._shown)}" for n, p in self._paces.items()]
        self.say("; ".join([*parts, self._stages] if self._stages else parts))


class BarReporter:
    """A bar per teacher."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stages: TaskID | None = None

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(Text(visible(text)), soft_wrap=True)

    def begin(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        """Draw the bars."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _PaceColumn())
        self._bars = Progress(*columns, console=self._console)
        now = time.monotonic()
        for name, total in totals.items():
            pace = Pace(total, done[name], now)
            self._tasks[name] = self._bars.add_task(name, total=total, completed=done[name], pace=pace)
        self._bars.start()

    def update(self, done: Mapping[str, int], failed: Mapping[str, int] | None = None) -> None:
        """Move the bars."""
        if self._bars is None:
            return
        for name, count in done.items():
            task = self._tasks[name]
            pace = self._bars.tasks[task].fields["pace"]
            pace.done, pace.failed = count, (failed or {}).get(name, 0)
            self._bars.update(task, completed=count)

    def stages(self, busy: Mapping[str, float]) -> None:
        """Show it below the bars."""
        shown = _stages(busy)
        if self._bars is None or not shown:
            return
        if self._stages is None:
            self._stages = self._bars.add_task("", total=None, pace=None)
        self._bars.tasks[self._stages].fields["words"] = shown

    def end(self) -> None:
        """Leave the bars as they are."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


class _PaceColumn(ProgressColumn):
    """Images per second and time left."""

    def render(self, task: Task) -> Text:
        pace: Pace | None = task.fields["pace"]
        if pace is None:
            return Text(task.fields.get("words", ""))
        return Text(pace.describe(time.monotonic()))


def duration(seconds: float) -> str:
    """Return a time in words: `2 h 05 min`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def _stages(busy: Mapping[str, float]) -> str:
    shown = [f"{stage} {share:.0%}" for stage, share in busy.items() if share >= 0.005]
    return f"busy: {', '.join(shown)}" if shown else ""
