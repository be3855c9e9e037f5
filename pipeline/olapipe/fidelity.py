"""What each precision costs, in bytes and in training: figures of a sample of features, their table and plot."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from rich.console import Console
from rich.table import Table

from olapipe.gradients import Change, change
from olapipe.klt import fit_basis
from olapipe.report import size
from olaschema.basis import Basis
from olaschema.errors import ConfigError, ImageError
from olaschema.manifest import Precision
from olaschema.precision import decode, encode, is_centred, require_storable
from olaschema.zarrbytes import zstd_level

CENTRED_COSINES = (0.5, 0.8, 0.9)
TIERS: tuple[Precision, ...] = ("float32", "float16", "int8", "int4", "klt")


@dataclass(frozen=True)
class Figures:
    """One precision, or the yardstick, against the exact features of the sample."""

    name: str
    raw_bytes: float | None
    """Per image, before entropy coding; None for the yardstick."""
    stored_bytes: float | None
    """Per image after entropy coding, in the chunks that the store would write; the basis is not in it."""
    basis_bytes: int
    """Once per store."""
    cosine: float
    """Mean over the images of the cosine to the exact feature, flattened."""
    relative_l2: float
    """Mean over the images of ‖stored − exact‖ / ‖exact‖."""
    changes: tuple[Change, ...]
    """For predictions at each of CENTRED_COSINES."""
    problem: str = ""
    """Why the sample cannot be stored in this precision; then the other figures say nothing."""

    @property
    def gradient_error(self) -> float:
        """1 − the worse cosine of the two gradients, for predictions at centred cosine 0.9."""
        return self.changes[-1].gradient_error if self.changes else float("inf")

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


def measure(exact: np.ndarray, mean: np.ndarray, precision: Precision, basis: Basis | None = None) -> Figures:
    """Store features (N, ...) float32 in a precision and compare; `mean` is a map of other images, in their shape."""
    centred = is_centred(exact.shape[1:], precision)
    for index, feature in enumerate(exact):
        try:
            require_storable(feature, precision, centred=centred, name=f"sampled image {index}", basis=basis)
        except ImageError as error:
            return Figures(precision, None, None, 0, 0.0, float("inf"), (), error.problem)
    stored = encode(exact, precision, basis, centred=centred)
    arrays = stored.arrays
    zstd = Zstd(level=zstd_level(precision))
    together = max(1, (1 << 20) // arrays["values"][0].nbytes)  # rows of an inner chunk, as olaschema.layout has it
    packed = sum(
        len(zstd.encode(np.ascontiguousarray(array[first : first + together])))
        for array in arrays.values()
        for first in range(0, len(exact), together)
    )
    found = against(exact, decode(stored, exact.shape[-1], basis), mean)
    raw = sum(array.nbytes for array in arrays.values()) / len(exact)
    file = len(basis.to_bytes()) if basis is not None else 0
    return Figures(precision, raw, packed / len(exact), file, *found)


def yardstick(exact: np.ndarray, other: np.ndarray, mean: np.ndarray, name: str) -> Figures:
    """Compare features with those of a forward pass in another compute dtype."""
    return Figures(name, None, None, 0, *against(exact, other, mean))


def against(exact: np.ndarray, other: np.ndarray, mean: np.ndarray) -> tuple[float, float, tuple[Change, ...]]:
    """Return cosine, relative L2 and the changes to training of features (N, ...) against the exact ones."""
    a, b = (values.reshape(len(exact), -1).astype(np.float64) for values in (exact, other))
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-300)
    relative = np.linalg.norm(b - a, axis=1) / np.maximum(lengths[0], 1e-300)
    changes = tuple(change(a, b, mean.ravel(), at) for at in CENTRED_COSINES)
    return float(cosine.mean()), float(relative.mean()), changes


def all_tiers(fitting: np.ndarray, scored: np.ndarray, max_gradient_error: float) -> tuple[list[Figures], Basis]:
    """Measure every precision on `scored` (N, ...); mean map and basis come from `fitting`, which are other images."""
    basis = fit_basis(list(fitting), max_gradient_error)
    mean = fitting.mean(axis=0, dtype=np.float64)
    tiers = [measure(scored, mean, tier, basis if tier == "klt" else None) for tier in TIERS]
    return tiers, basis


def smallest(tiers: Sequence[Figures], max_gradient_error: float) -> Figures:
    """Return the precision of fewest bytes after entropy coding whose gradient error is within the limit.

    float32 has none, so one always is.
    """
    passing = [tier for tier in tiers if not tier.problem and tier.gradient_error <= max_gradient_error]
    return min(passing, key=lambda tier: (tier.stored_bytes or 0, TIERS.index(tier.name)))


def show(console: Console, title: str, tiers: Sequence[Figures], notes: Sequence[str]) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("precision", "raw", "stored", "cosine", "relative L2"):
        table.add_column(column, justify="left" if column == "precision" else "right", no_wrap=column == "precision")
    for at in CENTRED_COSINES:
        for part in ("loss", "smooth-L1", "contrastive"):
            table.add_column(f"{part} at {at}", justify="right")
    for tier in tiers:
        if tier.problem:
            table.add_row(tier.name, tier.problem)
            continue
        cells = [tier.name]
        cells += ["–" if count is None else size(round(count)) for count in (tier.raw_bytes, tier.stored_bytes)]
        cells += [f"{tier.cosine:.6f}", f"{tier.relative_l2:.1e}"]
        for found in tier.changes:
            cells += [f"{found.loss:.1e}", f"{1 - found.smooth_l1:.1e}", f"{1 - found.contrastive:.1e}"]
        table.add_row(*cells)
    console.print(table)
    console.print(
        "bytes per image, before and after entropy coding; loss: relative change of smooth-L1 + 0.3 · contrastive;\n"
        "smooth-L1, contrastive: 1 − cosine of the gradients from exact and stored targets, for predictions at that\n"
        "centred cosine to the target",
        markup=False,
        highlight=False,
    )
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def require_plot(path: Path) -> None:
    """Raise ConfigError where `plot` could not draw: without matplotlib, or for another kind of file."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib", "Install ola-distill[plot], or leave --plot out.") from error
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: not a kind of picture that can be drawn", "Name a .png, .svg or .pdf file.")


def plot(path: Path, title: str, tiers: Sequence[Figures]) -> None:
    """Draw bytes per image against gradient error (.png, .svg or .pdf); raises as `require_plot` does."""
    require_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for tier in tiers:
        if tier.problem:
            continue
        height = max(tier.gradient_error, 1e-9)
        if tier.stored_bytes is None:
            axes.axhline(height, linestyle="--", color="grey", label=tier.name)
            continue
        axes.plot(tier.stored_bytes, height, "o", label=tier.name)
        axes.annotate(tier.name, (tier.stored_bytes, height), textcoords="offset points", xytext=(6, 4))
    axes.set(xscale="log", yscale="log", xlabel="bytes per image after entropy coding")
    axes.set(ylabel="1 − cosine of gradients, predictions at centred cosine 0.9", title=title)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}", "Name another file.") from error
