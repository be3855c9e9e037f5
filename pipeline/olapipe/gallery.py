"""The gallery of `inspect --html`: some images beside their features, as pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from olapipe.picture import label, panel, photograph
from olaschema.errors import OlaError
from olaschema.manifest import SampleRow
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_HEIGHT = 168
_WIDEST = 2 * _HEIGHT


@dataclass(frozen=True)
class Panel:
    """One picture as a `data:` URI, or why there is none."""

    label: str
    uri: str | None
    problem: str = ""


def panels(
    store: FeatureStore, readers: dict[str, FeatureReader], sample: SampleRow, images: Path | None
) -> Sequence[Panel]:
    """Return the image, if its folder is given, and the features of every teacher."""
    receipts = {name: reader.status(sample.row) for name, reader in readers.items()}
    found = []
    width = _HEIGHT
    if images is not None:
        upright = any(reader.fingerprint.preprocessing.exif for reader in readers.values())
        try:
            shown = photograph(sample, images, [receipt for receipt in receipts.values() if receipt], upright=upright)
        except OlaError as error:
            found.append(Panel("image", None, error.problem))
        else:
            width = round(min(max(shown.width / shown.height * _HEIGHT, 1), _WIDEST))
            small = shown.resize((2 * width, 2 * _HEIGHT), Image.Resampling.LANCZOS)
            found.append(Panel(f"{shown.width} × {shown.height}", _uri(small, "JPEG")))
    for name, reader in readers.items():
        receipt = receipts[name]
        if receipt is None or receipt.status != "ok":
            why = "not extracted yet" if receipt is None else str(receipt.reason)
            found.append(Panel(name, None, why))
            continue
        picture = panel(reader.feature(sample.row), reader.fingerprint, width, _HEIGHT)
        found.append(Panel(label(reader.fingerprint), _uri(picture, "PNG")))
    return found


def _uri(picture: Image.Image, form: str) -> str:
    out = io.BytesIO()
    picture.save(out, format=form, **({"quality": 85} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
