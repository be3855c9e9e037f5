"""Finding one image of a store: its row by key, its stored values, and its bytes as they were when extracted."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np

from olapipe.corpus import ANY_PIXELS, read_image
from olapipe.report import visible
from olaschema.errors import CorpusError, ImageError, StoreError
from olaschema.images import DecodedImage, decode_image
from olaschema.keys import normalise_key
from olaschema.manifest import RowReceipt, SampleRow
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_LOOKED_AT = 10_000


def find_sample(store: FeatureStore, key: str) -> SampleRow:
    """Return the planned image of a key; raises StoreError that says which key was probably meant."""
    wanted = {key}
    with contextlib.suppress(ImageError):  # what reports show for a name that cannot be a key is no key either
        wanted.add(normalise_key(key))
    found = store.find(wanted)
    if found is not None:
        return found[2]
    # what was meant is looked for among the first ones: names of one corpus are alike
    keys = [sample.key for sample in islice(store.samples(), _LOOKED_AT)]
    named_alike = [known for known in keys if PurePosixPath(known).name == PurePosixPath(key).name]
    close = named_alike[:1] or difflib.get_close_matches(key, keys, n=1)
    examples = ", ".join(map(visible, keys[:3])) + (", …" if len(keys) > 3 else "")
    raise StoreError(
        f"{store.url} has no image {visible(key)!r}",
        f"Did you mean {visible(close[0])!r}?"
        if close
        else f"Keys are paths relative to the image folder, with extension: {examples or 'none planned yet'}.",
    )


def read_feature(store: FeatureStore, reader: FeatureReader, sample: SampleRow) -> np.ndarray:
    """Return a row's feature as float32 `(H, W, C)` or `(C,)`.

    Raises StoreError with the recorded reason where the row has none.
    """
    teacher = reader.fingerprint.teacher
    status = reader.status(sample.row)
    if status is None:
        raise StoreError(
            f"{store.url}: {visible(sample.key)} has no {teacher} feature yet: its shard is not extracted",
            "Run the same `olapipe extract` again: it continues where it stopped.",
        )
    if status.status != "ok":
        detail = f": {status.detail}" if status.detail else ""
        raise StoreError(
            f"{store.url}: {visible(sample.key)} has no {teacher} feature: {status.reason or status.status}{detail}",
            "Mend the image and extract into a new store, or choose another image.",
        )
    return reader.feature(sample.row)


def read_picture(root: Path, sample: SampleRow, receipts: list[RowReceipt], max_pixels: int) -> DecodedImage:
    """Decode the image of a row, and check that it is the one that was extracted.

    Raises CorpusError where there is no such folder, ImageError where the image cannot be used or its digest is not
    that of a receipt.
    """
    if not root.is_dir():
        raise CorpusError(f"--images {root}: no such folder", "Give the folder that the keys are relative to.")
    try:
        # what was extracted was within the limit of then, and may have been mended since it was planned
        max_pixels = ANY_PIXELS if any(receipt.sha256 is not None for receipt in receipts) else max_pixels
        data = read_image(root, sample, max_pixels, mended=True)
    except ImageError as error:
        raise ImageError(error.reason, f"{root}/{visible(sample.uri)}: {error.problem}", error.remedy) from error
    digest = hashlib.sha256(data).hexdigest()
    for receipt in receipts:
        if receipt.sha256 not in (None, digest):
            raise ImageError(
                "changed",
                f"{root}/{visible(sample.uri)} is not the image that was extracted: its SHA-256 is {digest[:16]}…, "
                f"the store's receipt has {str(receipt.sha256)[:16]}…",
                "Give the folder that the features were extracted from.",
            )
    return decode_image(data, name=sample.key, max_pixels=max_pixels)
