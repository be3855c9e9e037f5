"""Queries of a mask transformer to one panoptic map, and that map in colours. Needs numpy and Pillow only."""

from __future__ import annotations

import colorsys
from collections.abc import Set
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from olapipe.preview.base import Drawing
from olapipe.preview.panels import font

NOTHING = -1
# The values of transformers' OneFormer processor. A query scored below the first is dropped; so is one that wins less
# than the second of its own mask's area, because others won there.
SCORE_THRESHOLD, OVERLAP_THRESHOLD, MASK_THRESHOLD = 0.5, 0.8, 0.5
_NAMED_SHARE = 0.02
DRAWN = 384
"""Side, in pixels, of the square that masks are compared and drawn on."""


@dataclass(frozen=True)
class Panoptic:
    """`segments` `(H, W)` holds an id per pixel and `labels` its class, both -1 where there is nothing.

    `best` is the highest score of any query for a class, dropped ones included.
    """

    segments: np.ndarray
    labels: np.ndarray
    best: float


def merge_queries(classes_qk: np.ndarray, masks_qhw: np.ndarray, *, fused: Set[int]) -> Panoptic:
    """Merge queries to a map: logits `(Q, K + 1)`, the last class being none, and mask logits `(Q, H, W)`.

    Each pixel goes to the query with the greatest product of class score and mask probability (panoptic inference of
    MaskFormer, Cheng et al. 2021, section 3.4), and belongs to its segment where the mask itself is at least 0.5.
    Segments of a class in `fused` become one.
    """
    scores_qk = np.exp(classes_qk - classes_qk.max(axis=1, keepdims=True))
    scores_qk /= scores_qk.sum(axis=1, keepdims=True)
    label_q, score_q = scores_qk.argmax(axis=1), scores_qk.max(axis=1)
    best = float(scores_qk[:, :-1].max())
    kept = np.flatnonzero((label_q != scores_qk.shape[1] - 1) & (score_q > SCORE_THRESHOLD))
    segments = np.full(masks_qhw.shape[1:], NOTHING)
    labels = segments.copy()
    if not len(kept):
        return Panoptic(segments, labels, best)
    masks_qhw = 1 / (1 + np.exp(-np.clip(masks_qhw[kept], -60, 60)))
    winner_hw = (masks_qhw * score_q[kept, None, None]).argmax(axis=0)
    ids: dict[int, int] = {}
    count = 0
    for place, query in enumerate(kept):
        own = masks_qhw[place] >= MASK_THRESHOLD
        won = (winner_hw == place) & own
        if not won.any() or (winner_hw == place).sum() / own.sum() < OVERLAP_THRESHOLD:
            continue
        label = int(label_q[query])
        if label in ids:
            number = ids[label]
        else:
            number, count = count, count + 1
        if label in fused:
            ids[label] = number
        segments[won], labels[won] = number, label
    return Panoptic(segments, labels, best)


def draw(panoptic: Panoptic, names: dict[int, str]) -> Drawing:
    """Draw each segment in the colour of its class, shaded by its number, with names on the larger ones."""
    segments, labels = panoptic.segments, panoptic.labels
    rgb = np.full((*segments.shape, 3), 40, dtype=np.uint8)
    places: list[tuple[str, float, float]] = []
    shares: dict[str, float] = {}
    for number in np.unique(segments[segments != NOTHING]):
        where = segments == number
        label = int(labels[where][0])
        name = names.get(label, f"class {label}")
        rgb[where] = _colour(label, int(number))
        shares[name] = shares.get(name, 0.0) + float(where.mean())
        if where.mean() >= _NAMED_SHARE:
            rows, columns = np.nonzero(where)
            places.append(
                (name, float(np.median(columns) + 0.5) / where.shape[1], float(np.median(rows) + 0.5) / where.shape[0])
            )
    picture = Image.fromarray(rgb).resize((DRAWN, DRAWN), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for name, x, y in places:
        pen.text(
            (x * DRAWN, y * DRAWN),
            name,
            fill=(255, 255, 255),
            font=font(15),
            anchor="mm",
            stroke_width=2,
            stroke_fill=(0, 0, 0),
        )
    return Drawing(np.asarray(picture), _legend(panoptic, shares))


def _legend(panoptic: Panoptic, shares: dict[str, float]) -> str:
    if not shares:
        return f"no segment: the best score of any query is {panoptic.best:.2f}, above {SCORE_THRESHOLD} counts"
    listed = ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1])[:6])
    return f"{listed}; nothing {1 - sum(shares.values()):.0%}"


def _colour(label: int, number: int) -> tuple[int, int, int]:
    hue = label * 0.618034 % 1  # the golden ratio keeps neighbouring ids apart
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, (1.0, 0.85, 0.7)[number % 3])
    return round(red * 255), round(green * 255), round(blue * 255)
