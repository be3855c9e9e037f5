"""Arrays to colours, and labelled pictures side by side. Needs numpy and Pillow only."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _FAINT = (24, 24, 24), (255, 255, 255), (110, 110, 110)
_BOX, _GAP = 320, 16
_TOKENS = 64
_TITLE, _CAPTION, _LINE = 16, 13, 17
_COLUMNS_OF_TEXT = 48  # what fits into a box at the caption's size
# From dark over violet and orange to light, so that luminance alone carries the order.
_HEAT = np.array([(5, 5, 25), (75, 15, 110), (185, 50, 90), (245, 135, 30), (250, 250, 170)], dtype=np.float64)


@dataclass(frozen=True)
class Cell:
    """One labelled picture, uint8 `(H, W, 3)`, or None for a cell of text alone.

    `aspect` is width over height as it is to be shown, for a map of a squashed image; None keeps the picture's own.
    """

    title: str
    rgb: np.ndarray | None
    caption: str = ""
    aspect: float | None = None


def heat(values: np.ndarray) -> np.ndarray:
    """Colour a map `(H, W)` from its least value (dark) to its greatest (light); uint8 `(H, W, 3)`."""
    low, span = values.min(), np.ptp(values)
    place = (values - low) / span * (len(_HEAT) - 1) if span > 0 else np.zeros(values.shape)
    return (
        np.stack([np.interp(place, range(len(_HEAT)), _HEAT[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)
    )


class PcaColours:
    """The first three principal components of one map as red, green and blue, applicable to further maps.

    The components are those of the tokens of `reference`, `(H, W, C)`, each scaled from its 1st to its 99th
    percentile. Another map coloured by them shows the same colour where it holds the same feature.
    """

    def __init__(self, reference: np.ndarray) -> None:
        tokens = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
        self._mean = tokens.mean(axis=0)
        _, _, axes = np.linalg.svd(tokens - self._mean, full_matrices=False)
        axes = axes[:3]
        # a component's sign is arbitrary: its largest loading is made positive
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
        self._axes = axes * np.where(largest < 0, -1.0, 1.0)
        scores = (tokens - self._mean) @ self._axes.T
        self._low, high = np.percentile(scores, (1, 99), axis=0)
        self._span = np.where(high - self._low > 1e-12, high - self._low, np.inf)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Colour `(H, W, C)`; returns uint8 `(H, W, 3)`, mid-grey where there is no variation to show."""
        place = ((features.astype(np.float64) - self._mean) @ self._axes.T - self._low) / self._span
        rgb = np.full((*features.shape[:2], 3), 0.5)
        flat = np.isinf(self._span)
        rgb[..., : place.shape[-1]] = np.where(flat, 0.5, place)
        return (np.clip(rgb, 0, 1) * 255).round().astype(np.uint8)


def strip(vector: np.ndarray, reach: float) -> np.ndarray:
    """Draw a vector `(C,)` as bars from a zero line, channels left to right; uint8 `(H, W, 3)`.

    `reach` is the magnitude at the upper and lower edge. Where there are more channels than pixels, each column
    spans its channels' least to greatest value.
    """
    width, middle = _BOX, _BOX // 4
    rgb = np.full((2 * middle + 1, width, 3), 245, dtype=np.uint8)
    scaled = np.clip(vector / reach, -1, 1) * middle if reach > 0 else np.zeros(len(vector))
    for column in range(width):
        first = column * len(vector) // width
        last = max(first + 1, (column + 1) * len(vector) // width)
        low, high = min(0.0, scaled[first:last].min()), max(0.0, scaled[first:last].max())
        rgb[middle - round(float(high)) : middle + 1, column] = (30, 100, 180)
        rgb[middle : middle - round(float(low)) + 1, column] = (200, 80, 40)
    rgb[middle] = _INK
    return rgb


@cache
def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, which every installation has."""
    return ImageFont.load_default(size)


def arrange(heading: str, rows: Sequence[Sequence[Cell | None]]) -> Image.Image:
    """Put rows of cells below a heading; columns that are empty throughout are left out."""
    columns = max(len(row) for row in rows)
    padded = [[*row, *[None] * (columns - len(row))] for row in rows]
    used = [column for column in range(columns) if any(row[column] for row in padded)]
    cells = [[row[column] for column in used] for row in padded]
    heights = [max(_height(cell) for cell in row if cell) for row in cells]
    width = len(used) * (_BOX + _GAP) + _GAP
    lines = textwrap.wrap(heading, width // 9) or [""]
    top = _GAP + len(lines) * (_LINE + 5)
    page = Image.new("RGB", (width, top + sum(heights) + _GAP * (len(heights) + 1)), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.multiline_text((_GAP, _GAP), "\n".join(lines), fill=_INK, font=font(_TITLE + 2), spacing=5)
    y = top + _GAP
    for row, height in zip(cells, heights, strict=True):
        for index, cell in enumerate(row):
            if cell:
                _place(page, draw, cell, _GAP + index * (_BOX + _GAP), y)
        y += height + _GAP
    return page


def _shown(cell: Cell) -> tuple[int, int]:
    """Width and height of the picture on the page: as large as the box allows."""
    if cell.rgb is None:
        return _BOX, 0
    aspect = cell.aspect or cell.rgb.shape[1] / cell.rgb.shape[0]
    return (_BOX, max(1, round(_BOX / aspect))) if aspect >= 1 else (max(1, round(_BOX * aspect)), _BOX)


def _caption_lines(cell: Cell) -> list[str]:
    return [piece for line in cell.caption.splitlines() for piece in textwrap.wrap(line, _COLUMNS_OF_TEXT) or [""]]


def _height(cell: Cell) -> int:
    return _shown(cell)[1] + _TITLE + 10 + len(_caption_lines(cell)) * _LINE


def _place(page: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    draw.text((x, y), cell.title, fill=_INK, font=font(_TITLE))
    y += _TITLE + 6
    width, height = _shown(cell)
    if cell.rgb is not None:
        # a map of tokens is enlarged without smoothing: each stored token stays one visible block
        method = Image.Resampling.NEAREST if max(cell.rgb.shape) <= _TOKENS else Image.Resampling.LANCZOS
        page.paste(Image.fromarray(cell.rgb).resize((width, height), method), (x, y))
    draw.multiline_text(
        (x, y + height + 4), "\n".join(_caption_lines(cell)), fill=_FAINT, font=font(_CAPTION), spacing=_LINE - _CAPTION
    )
