"""Features as a picture: the image, and each teacher's map in colours of its three largest principal components."""

from __future__ import annotations

import hashlib
import io
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from olapipe.corpus import ANY_PIXELS, read_image
from olapipe.report import visible
from olaschema.errors import StoreError
from olaschema.images import DEFAULT_MAX_PIXELS, decode_image
from olaschema.manifest import Fingerprint, RowReceipt, SampleRow
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_HEIGHT = 336
_WIDEST = 3 * _HEIGHT
_LABEL = 22
_GAP = 8
# A fixed part of the values saturates, so that a few outliers do not take the whole range.
_ROBUST = (2.0, 98.0)


def pca_rgb(features: np.ndarray) -> np.ndarray:
    """Return `(H, W, C)` features as `(H, W, 3)` uint8: their three largest principal components as R, G, B.

    Components are those of this map alone, so colours of two images are not comparable. The sign of each is fixed
    by its largest loading being positive; missing components (C < 3, or a constant map) are mid-grey.
    """
    height, width, channels = features.shape
    flat = features.reshape(-1, channels).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, strengths, axes = np.linalg.svd(centred, full_matrices=False)
    out = np.full((height * width, 3), 127, np.uint8)
    for component in range(min(3, len(strengths))):
        if strengths[component] <= 1e-9 * max(strengths[0], 1e-300):
            continue
        axis = axes[component]
        sign = 1.0 if axis[np.abs(axis).argmax()] > 0 else -1.0
        out[:, component] = _to_bytes(sign * (centred @ axis))
    return out.reshape(height, width, 3)


def bars(vector: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a `(C,)` feature as `(height, width, 3)` uint8 bars, positive ones up and negative ones down.

    Where there are more channels than pixels, each column shows the mean of its channels.
    """
    edges = np.linspace(0, len(vector), width + 1)
    columns = np.array([vector[int(a) : max(int(a) + 1, int(b))].mean() for a, b in pairwise(edges)])
    scale = np.percentile(np.abs(columns), _ROBUST[1]) or 1.0
    lengths = np.clip(columns / scale, -1, 1) * (height / 2 - 1)
    distance = height / 2 - 0.5 - np.arange(height)[:, None]
    out = np.full((height, width, 3), 255, np.uint8)
    out[(distance > 0) & (distance <= lengths)] = (36, 94, 160)
    out[(distance < 0) & (distance >= lengths)] = (190, 66, 48)
    return out


def _to_bytes(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, _ROBUST)
    if high <= low:
        return np.full(values.shape, 127, np.uint8)
    scaled: np.ndarray = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return scaled


def save_picture(store: FeatureStore, sample: SampleRow, images: Path, out: Path) -> None:
    """Save the image beside the features of every teacher, labelled, as a PNG.

    Raises StoreError if the file under `images` is not the one that was extracted, or `out` cannot be written;
    ImageError if the image cannot be read.
    """
    readers = {name: FeatureReader(store, name) for name in store.teachers()}
    receipts = {name: reader.status(sample.row) for name, reader in readers.items()}
    upright = any(reader.fingerprint.preprocessing.exif for reader in readers.values()) or not readers
    shown = photograph(sample, images, [receipt for receipt in receipts.values() if receipt], upright=upright)
    width = round(min(max(shown.width / shown.height * _HEIGHT, 1), _WIDEST))
    panels = [(f"{visible(sample.key)}, {shown.width} x {shown.height}", shown.resize((width, _HEIGHT)))]
    for name, reader in readers.items():
        receipt = receipts[name]
        if receipt is None or receipt.status != "ok":
            reason = "not extracted" if receipt is None else str(receipt.reason)
            panels.append((f"{name}: {reason}", Image.new("RGB", (_HEIGHT, _HEIGHT), (224, 224, 224))))
        else:
            values = reader.feature(sample.row)
            panels.append((label(reader.fingerprint), panel(values, reader.fingerprint, width, _HEIGHT)))
    _save(_side_by_side(panels), out)


def photograph(sample: SampleRow, images: Path, receipts: list[RowReceipt], *, upright: bool) -> Image.Image:
    """Return the decoded image of a row, turned as its EXIF says if `upright`.

    Raises StoreError if the file under `images` is not the one that was extracted, ImageError if it cannot be read.
    """
    # within the limit of the extraction, or failed there; a mended file has another size, and its digest is checked
    data = read_image(images, sample, ANY_PIXELS, mended=True)
    digest = hashlib.sha256(data).hexdigest()
    known = {receipt.sha256 for receipt in receipts} - {None}
    if known and digest not in known:
        raise StoreError(
            f"{visible(sample.key)} under {images} is not the image that was extracted (its SHA-256 differs)",
            "Give the folder that the features were extracted from with --images.",
        )
    limit = ANY_PIXELS if known else DEFAULT_MAX_PIXELS
    return decode_image(data, name=sample.key, max_pixels=limit).oriented(exif=upright)


def panel(values: np.ndarray, fingerprint: Fingerprint, width: int, height: int) -> Image.Image:
    """Draw a feature `height` pixels high: a vector as bars, a map in PCA colours.

    A squashed view is drawn `width` wide, in the shape of the image that it was squashed from.
    """
    if fingerprint.grid is None:
        return Image.fromarray(bars(values, height, height))
    across = width if fingerprint.preprocessing.view.kind == "squash" else height
    return Image.fromarray(pca_rgb(values)).resize((across, height), Image.Resampling.NEAREST)


def label(fingerprint: Fingerprint) -> str:
    """Name a teacher, the shape of its feature and what it saw."""
    view = fingerprint.preprocessing.view
    seen = {"squash": "whole image", "pad": "padded", "crop": "centre crop"}[view.kind]
    shape = " x ".join(map(str, fingerprint.shape))
    return f"{fingerprint.teacher} {shape}, {seen}"


def _side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    font = ImageFont.load_default(13)
    width = sum(image.width for _, image in panels) + _GAP * (len(panels) + 1)
    canvas = Image.new("RGB", (width, _HEIGHT + _LABEL + 2 * _GAP), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    left = _GAP
    for label, image in panels:
        canvas.paste(image, (left, _LABEL + _GAP))
        draw.text((left, 4), _fitted(label, image.width, font), fill=(32, 32, 32), font=font)
        left += image.width + _GAP
    return canvas


def _fitted(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "…") > width:
        label = label[:-1]
    return label + "…"


def _save(canvas: Image.Image, out: Path) -> None:
    data = io.BytesIO()
    canvas.save(data, format="PNG")
    try:
        out.write_bytes(data.getvalue())
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror}", "Give another file with --picture.") from error
