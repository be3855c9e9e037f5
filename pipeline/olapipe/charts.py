"""Markup for the page of `inspect --html`: escaped text, tables, and charts as SVG without any style of their own."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from olapipe.report import visible

_WIDTH = 640


def text(value: object) -> str:
    """Return anything as text that is safe in an element and in a quoted attribute."""
    return html.escape(visible(str(value)), quote=True)


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[object]], *, key: int | None = None) -> str:
    """Return a table; True marks columns of numbers, `key` the column of keys."""
    head = "".join(f'<th class="number">{text(n)}</th>' if number else f"<th>{text(n)}</th>" for n, number in columns)
    lines = []
    for row in rows:
        cells = []
        for place, (cell, (_, number)) in enumerate(zip(row, columns, strict=True)):
            kind = ' class="number"' if number else ' class="key"' if place == key else ""
            cells.append(f"<td{kind}>{text(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def stacked(parts: Sequence[tuple[str, int]]) -> str:
    """Return a bar divided in proportion to counts; each part is (`ok`, `bad` or `wait`, count)."""
    total = max(sum(count for _, count in parts), 1)
    bars, left = [], 0.0
    for kind, count in parts:
        width = _WIDTH * count / total
        bars.append(f'<rect class="fill-{kind}" x="{left:.1f}" y="0" width="{width:.1f}" height="14"/>')
        left += width
    return _svg(14, "".join(bars), "share of images")


def histogram(edges: Sequence[float], counts: Sequence[int]) -> str:
    """Return bars of equal width for bins on a logarithmic axis."""
    if not counts:
        return '<p class="note">no token that is not zero</p>'
    height, top = 150, max(counts)
    step = _WIDTH / len(counts)
    bars = "".join(
        f'<rect class="fill-accent" x="{i * step + 0.5:.1f}" y="{height * (1 - c / top):.1f}" '
        f'width="{max(step - 1, 0.6):.1f}" height="{height * c / top:.1f}">'
        f"<title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {c}</title></rect>"
        for i, c in enumerate(counts)
    )
    every = max(1, len(counts) // 6)
    ticks = "".join(_tick(i * step, height + 15, f"{edges[i]:.3g}") for i in range(0, len(edges) - every // 2, every))
    return _svg(height + 22, _axis(height) + bars + ticks, "histogram of token norms")


def ranges(minimum: np.ndarray, maximum: np.ndarray, mean: np.ndarray, std: np.ndarray) -> str:
    """Return the range of each channel, its mean ± standard deviation and its mean; channels by ascending mean.

    Where there are more channels than room, a column shows several: the whole of their ranges, the middle of the rest.
    """
    order = np.argsort(mean, kind="stable")
    parts = np.array_split(order, min(len(order), _WIDTH // 2))
    low, high = [minimum[p].min() for p in parts], [maximum[p].max() for p in parts]
    middle, spread = [mean[p].mean() for p in parts], [std[p].mean() for p in parts]
    bottom, top = float(min(low)), float(max(high))
    height, scale = 150, 150 / ((top - bottom) or 1.0)
    x = (np.arange(len(parts)) + 0.5) * _WIDTH / len(parts)

    def y(values: Sequence[float]) -> list[float]:
        return [height - (value - bottom) * scale for value in values]

    band = _band(x, y(low), y(high), "fill-band")
    inner = _band(x, y([m - s for m, s in zip(middle, spread, strict=True)]),
                  y([m + s for m, s in zip(middle, spread, strict=True)]), "fill-band2")  # fmt: skip
    line = f'<polyline class="mean" points="{_points(x, y(middle))}"/>'
    labels = _tick(2, 11, f"{top:.4g}", "start") + _tick(2, height - 3, f"{bottom:.4g}", "start")
    return _svg(height, band + inner + line + labels, "range of each channel")


def strip(values: Sequence[float], flagged: Sequence[bool]) -> str:
    """Return a bar for each shard; where there are more than fit, a column shows the largest of several."""
    groups = np.array_split(np.arange(len(values)), min(len(values), _WIDTH // 3))
    height, top, step = 90, max(values) or 1.0, _WIDTH / len(groups)
    bars = []
    for i, group in enumerate(groups):
        largest = max(values[j] for j in group)
        kind = "fill-bad" if any(flagged[j] for j in group) else "fill-accent"
        name = f"shard {group[0]}" if len(group) == 1 else f"shards {group[0]} to {group[-1]}"
        bars.append(
            f'<rect class="{kind}" x="{i * step:.1f}" y="{height * (1 - largest / top):.1f}" '
            f'width="{max(step - 1, 0.6):.1f}" height="{height * largest / top:.1f}">'
            f"<title>{name}: {largest:.3f}</title></rect>"
        )
    return _svg(height + 4, _axis(height) + "".join(bars) + _tick(2, 11, f"{top:.3g}", "start"), "shift of each shard")


def _svg(height: float, content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{text(label)}">{content}</svg>'


def _axis(height: float) -> str:
    return f'<line class="axis" x1="0" y1="{height}" x2="{_WIDTH}" y2="{height}"/>'


def _tick(x: float, y: float, label: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{text(label)}</text>'


def _points(x: Sequence[float] | np.ndarray, y: Sequence[float]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _band(x: np.ndarray, low: Sequence[float], high: Sequence[float], kind: str) -> str:
    return f'<polygon class="{kind}" points="{_points(x, high)} {_points(x[::-1], low[::-1])}"/>'
