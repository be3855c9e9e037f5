"""What a run tells about itself: a progress bar or plain lines, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from olaschema.errors import ConfigError
from olatrain.stream import Skipped
from olatrain.trackers import Tracker

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"


class Watch:
    """Rank 0's view of the run. `start` is the step that the run goes on from, 0 for a new one."""

    def __init__(
        self, out: Path, *, start: int, total: int, log_every: int, trackers: Sequence[Tracker], console: Console
    ) -> None:
        self._console = console
        self._log_every = log_every
        self._total = total
        self._began, self._start = time.monotonic(), start
        _forget_after(out / METRICS, start)
        self._metrics = (out / METRICS).open("a", encoding="utf-8")
        self._trackers = trackers
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total, completed=start, figures="")
        self._progress.start()

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl and its numbers to the trackers."""
        self._metrics.write(json.dumps({"event": name, "step": step, **record}, allow_nan=False) + "\n")
        self._metrics.flush()
        values = dict(_flatten(record, name))
        for tracker in self._trackers:
            tracker.log(values, step)

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        """Report one training step."""
        self.event("train", step, record)
        shown = summary(record)
        rates = f"{record['samples_per_s']:.1f} samples/s, data wait {100 * record['data_wait']:.0f} %"
        rates += f", {record['memory_gib']:.1f} GiB"
        self._progress.update(self._task, completed=step, figures=f"{shown}  {rates}")
        if not self._console.is_terminal and (step % self._log_every == 0 or step in (1, self._total)):
            left = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
            self.say(f"step {step}/{self._total}  {shown}  {rates}, {_duration(left)} left")

    def close(self) -> None:
        """Flush and close everything."""
        self._progress.stop()
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


def summary(record: Mapping[str, Any]) -> str:
    """One line of the losses: text, then per teacher the mean over layers beside the mean map's."""
    parts = [f"loss {record['loss']:.4f}"] if "loss" in record else []
    parts.append(f"text {record['text']:.4f}")
    for teacher, found in record["teachers"].items():
        if "layers" in found:
            layers = found["layers"].values()
            loss = sum(layer["smooth_l1"] for layer in layers) / len(layers)
            cosine = sum(layer["cosine"] for layer in layers) / len(layers)
            floor = found["mean_map"]
            parts.append(
                f"{teacher} {loss:.4f} (mean map {floor['smooth_l1']:.4f}) cos {cosine:.3f} ({floor['cosine']:.3f})"
            )
    return "  ".join(parts)


def record_skips(out: Path, skipped: list[Skipped], *, held_out_at: int | None = None) -> None:
    """Append samples that trained nothing to skipped.jsonl; any rank may, a line is one write.

    `held_out_at` is the step at which samples held out were scored without them.
    """
    if not skipped:
        return
    where = {} if held_out_at is None else {"held_out_at": held_out_at}
    lines = [
        json.dumps({**where, "position": s.position, "sample": s.name, "reason": s.reason, "detail": s.detail})
        for s in skipped
    ]
    handle = os.open(out / SKIPPED, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, "".join(line + "\n" for line in lines).encode())
    finally:
        os.close(handle)


def forget_skips(out: Path, step: int, position: int) -> None:
    """Drop from skipped.jsonl what will be done again from `step` on, whose first sample is at `position`."""

    def done(line: str) -> bool:
        try:
            found = json.loads(line)
            return bool(
                found["position"] < position if "held_out_at" not in found else 0 < found["held_out_at"] <= step
            )
        except (ValueError, KeyError, TypeError):  # the line that the crash cut short
            return False

    _keep_lines(out / SKIPPED, done)


def last_events(out: Path, until: int | None = None) -> dict[str, dict[str, Any]]:
    """Return the last record of each event in a run's metrics, up to step `until`; empty where there are none.

    Raises ConfigError where the file holds something else.
    """
    path = out / METRICS
    if not path.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # cut short by a crash
            record = json.loads(line)
            if until is None or record["step"] <= until:
                found[record["event"]] = record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "Restore it, or remove it to go without.") from error
    return found


def below_mean_map(out: Path, teachers: Mapping[str, Sequence[int]], *, first: int) -> dict[str, dict[str, float]]:
    """Return by teacher and layer the centred R² (`meter.figures`) from step `first` on, where that is below 0.

    It is the mean over the steps in metrics.jsonl. A teacher is there when the mean over its layers, those named, is
    below 0: what its predictions tell of an image is less than what the mean training map does, which knows no image.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in teachers}
    with (out / METRICS).open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["event"] != "train" or record["step"] < first:
                continue
            for name, layers in teachers.items():
                told = record["teachers"][name].get("layers", {})
                for layer in map(str, layers):
                    if layer in told and told[layer]["r2"] is not None:
                        found[name].setdefault(layer, []).append(told[layer]["r2"])
    means = {name: {layer: sum(r2) / len(r2) for layer, r2 in layers.items()} for name, layers in found.items()}
    return {name: layers for name, layers in means.items() if layers and sum(layers.values()) < 0}


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that are about to be done again after a crash: all of them at the very start."""
    _keep_lines(path, lambda line: 0 < step >= _step_of(line))


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if keep(line)]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept), encoding="utf-8")
    scratch.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that the crash cut short
        return float("inf")


def _flatten(record: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{name}", float(value)))
    return found


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
