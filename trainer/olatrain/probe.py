"""`olatrain probe`: how well each layer of a frozen student lets a teacher's features be read from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from olaschema.errors import ConfigError
from olaschema.manifest import Frozen, canonical_json
from olatrain.config import Probe, ProbeStart, TrainConfig
from olatrain.launch import under_launcher
from olatrain.probebank import split_by_image
from olatrain.setup import open_data
from olatrain.sidecar import Sidecar
from olatrain.tokens import Context
from olatrain.train import train
from olatrain.watch import last_events

RESULT_NAME = "probe.json"
PLOT_NAME = "probe.png"
_SUGGESTED = 2


class LayerScore(Frozen):
    """How one layer does on the images held out."""

    cosine: float
    """Of the flattened maps, averaged over images."""
    r2: float | None
    """Centred: 0 for the mean map, 1 for a perfect prediction; None where all targets are equal."""
    smooth_l1: float


class TeacherProbe(Frozen):
    """One teacher's probes."""

    fingerprint: str
    mean_map_cosine: float
    """What the mean of the training targets gets: the floor."""
    mean_map_smooth_l1: float
    layers: dict[int, LayerScore] = Field(min_length=1)
    suggested: tuple[int, ...]


class ProbeResult(Frozen):
    """The record `probe.json`."""

    format: int = 1
    student: str
    context: Context
    start: ProbeStart = "random"
    """What the probes began at; results of versions that knew no other do not say."""
    trained_on: int
    """Images."""
    held_out: int
    held_out_digest: str
    """Equal for equal images held out."""
    steps: int
    teachers: dict[str, TeacherProbe]


def count_layers(student: Path) -> int:
    """Return the number of decoder layers that a student's config tells; raises ConfigError where it does not."""
    try:
        config = AutoConfig.from_pretrained(student, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{student} cannot be loaded as a student: {error}", "Give a student's folder (--student)."
        ) from error
    return int(config.get_text_config().num_hidden_layers)


def fed_teachers(student: Path) -> list[str]:
    """Return the teachers whose features a student takes as inputs; raises ConfigError for a damaged sidecar."""
    sidecar = Sidecar.load(student)
    return list(sidecar.record.feeds) if sidecar is not None else []


def run_probe(config: TrainConfig, console: Console, *, compare: Sequence[Path] = ()) -> ProbeResult:
    """Train the probes, score the images held out, and write `probe.json` and, with matplotlib, `probe.png`.

    A probe that was interrupted goes on. `compare` are folders of earlier probes of the same images, drawn together.
    Raises the errors of `train`, and ConfigError, before it trains, for results that cannot be compared.
    """
    if under_launcher():
        raise ConfigError("a probe runs in one process", "Start it without torchrun.")
    others = [read_result(folder) for folder in compare]
    if others:
        _require_comparable(config, others)
    train(config, console)
    result = _result(config)
    (config.out / RESULT_NAME).write_bytes(canonical_json(result))
    for teacher in result.teachers:
        console.print(_table(teacher, [result, *others]))
    for teacher, found in result.teachers.items():
        console.print(_suggestion(teacher, found), markup=False, highlight=False, soft_wrap=True)
    if draw([result, *others], config.out / PLOT_NAME):
        console.print(f"drawn in {config.out / PLOT_NAME}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print("matplotlib is not installed: no plot", markup=False, highlight=False)
    return result


def read_result(folder: Path) -> ProbeResult:
    """Read `probe.json` of an earlier probe; raises ConfigError where there is none."""
    path = folder / RESULT_NAME
    try:
        return ProbeResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "Give the --out folder of a finished probe (--compare)."
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{path} is no probe's result: {error.errors()[0]['msg']}", "Probe again.") from error


def suggest(layers: dict[int, LayerScore]) -> tuple[int, ...]:
    """Return the two layers of highest centred R², as many as the paper supervises; none that the mean map beats."""
    useful = [(score.r2, -layer) for layer, score in layers.items() if score.r2 is not None and score.r2 > 0]
    return tuple(sorted(-negative for _, negative in sorted(useful, reverse=True)[:_SUGGESTED]))


def draw(results: Sequence[ProbeResult], path: Path) -> bool:
    """Draw R² and cosine over layers, a row per teacher, a line per student; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    teachers = list(results[0].teachers)
    figure = Figure(figsize=(9, 3.2 * len(teachers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(teachers), 2, squeeze=False)
    for (left, right), teacher in zip(axes, teachers, strict=True):
        for result in results:
            found = result.teachers[teacher]
            numbers = list(found.layers)
            left.plot(numbers, [s.r2 for s in found.layers.values()], marker="o", label=result.student)
            (line,) = right.plot(numbers, [s.cosine for s in found.layers.values()], marker="o", label=result.student)
            right.axhline(found.mean_map_cosine, linestyle="--", color=line.get_color(), alpha=0.5)
        left.axhline(0.0, linestyle="--", color="grey")
        left.set(title=f"{teacher}: centred R² (mean map: 0)", xlabel="layer")
        right.set(title=f"{teacher}: cosine (dashed: mean map)", xlabel="layer")
        left.legend()
    figure.savefig(path, dpi=120)
    return True


def _result(config: TrainConfig) -> ProbeResult:
    events = last_events(config.out)
    if "evaluation" not in events or "start" not in events:
        raise ConfigError(f"{config.out} has no scores", "Remove the folder and probe again.")
    scores, start = events["evaluation"], events["start"]
    saved = TrainConfig.model_validate(json.loads((config.out / "config.json").read_bytes()))
    teachers = {}
    for name, found in scores["teachers"].items():
        if "layers" not in found:
            raise ConfigError(
                f"no image held out has a feature of {name}", "Extract more images, or hold out a larger share."
            )
        layers = {
            int(layer): LayerScore(cosine=values["cosine"], r2=values["r2"], smooth_l1=values["smooth_l1"])
            for layer, values in found["layers"].items()
        }
        teachers[name] = TeacherProbe(
            fingerprint=saved.fingerprints[name].digest(),
            mean_map_cosine=found["mean_map"]["cosine"],
            mean_map_smooth_l1=found["mean_map"]["smooth_l1"],
            layers=layers,
            suggested=suggest(layers),
        )
    return ProbeResult(
        student=config.student.resolve().name,
        context=config.context,
        start=(config.probe or Probe()).start,
        trained_on=start["samples"],
        held_out=start["held_out"]["images"],
        held_out_digest=start["held_out"]["digest"],
        steps=scores["step"],
        teachers=teachers,
    )


def _require_comparable(config: TrainConfig, others: Sequence[ProbeResult]) -> None:
    """Raise ConfigError, before anything trains, unless `others` were asked what this probe is about to ask."""
    probe = config.probe or Probe()
    remedy = "Probe both students with the same conversations, store, seed and share held out."
    data = open_data(config)
    _, held = split_by_image(data.listing(data.conversations()), held_out=probe.held_out, seed=config.seed)
    digests = {teacher: data.teacher(teacher).fingerprint.digest() for teacher in config.teachers}
    for other in others:
        if other.held_out_digest != held.digest:
            raise ConfigError(f"{other.student} was scored on other images", remedy)
        if other.context != config.context:
            raise ConfigError(f"the probes of {other.student} saw {other.context}, these see {config.context}", remedy)
        if other.start != probe.start:
            raise ConfigError(
                f"the probes of {other.student} started at {other.start}, these at {probe.start} (probe.start)", remedy
            )
        for teacher, digest in digests.items():
            if teacher not in other.teachers or other.teachers[teacher].fingerprint != digest:
                raise ConfigError(f"{other.student} was not probed for the same features of {teacher}", remedy)


def _table(teacher: str, results: Sequence[ProbeResult]) -> Table:
    table = Table(title=f"{teacher}: {results[0].held_out} images held out")
    table.add_column("layer", justify="right")
    for result in results:
        for name in ("cosine", "centred R²"):
            table.add_column(f"{result.student}: {name}", justify="right")
    for layer in results[0].teachers[teacher].layers:
        cells = []
        for result in results:
            score = result.teachers[teacher].layers.get(layer)
            cells += ["–", "–"] if score is None else [f"{score.cosine:.4f}", _number(score.r2)]
        table.add_row(str(layer), *cells)
    floors = [text for result in results for text in (f"{result.teachers[teacher].mean_map_cosine:.4f}", "0.0000")]
    table.add_row("mean map", *floors)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _suggestion(teacher: str, found: TeacherProbe) -> str:
    if not found.suggested:
        return f"{teacher}: no layer does better than the mean map: train on more images before choosing layers"
    return f"{teacher}: supervise --layers {teacher}={','.join(map(str, found.suggested))} (highest centred R²)"
