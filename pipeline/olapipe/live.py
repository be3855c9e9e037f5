"""`verify --live`: the teacher sees some images again, and its features are held against those stored."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from olapipe.corpus import read_image
from olapipe.load import load_teachers
from olapipe.repair import Source, any_receipt, extract_config
from olapipe.stored import (
    UNREADABLE,
    StoredArray,
    array_shard_file,
    committed_receipt,
    decode,
    error_bound,
    stored_basis,
)
from olapipe.teachers.base import Teacher
from olaschema.errors import DamagedStoreError, ImageError, StoreError
from olaschema.images import decode_image
from olaschema.store import FeatureStore

FLOAT_SLACK = 2.0**-9
"""What another device, library version or batch may change, relative to the largest feature of the image."""


@dataclass(frozen=True)
class Compared:
    """One image: the largest difference in units of what is allowed for that element, and the relative L2 error."""

    teacher: str
    key: str
    row: int
    worst: float
    relative: float
    problem: str = ""

    @property
    def agrees(self) -> bool:
        """Whether every element is within its bound."""
        return not self.problem and self.worst <= 1.0


def compare_live(
    store: FeatureStore, teachers: Sequence[str], count: int, source: Source, *, seed: int = 0
) -> list[Compared]:
    """Compute the features of `count` random images again for each teacher.

    Each element may differ by its precision's bound plus FLOAT_SLACK of the image's largest feature. Raises
    FingerprintError where the checkpoint or the settings mean other features.
    """
    found = []
    for name in teachers:
        receipt = any_receipt(store, name)
        if receipt is None:
            raise StoreError(f"{store.url}: {name} has no committed shard to compare", "Extract it first.")
        config = extract_config(store, name, source, receipt)
        teacher = load_teachers(config, _device(config.device))[name]
        store.teacher(name).fingerprint.require_equal(
            teacher.fingerprint,
            mine="in the store",
            theirs="of the checkpoint given",
            remedy="Give the checkpoint (--checkpoint) and the options (--set) that the store was extracted with.",
        )
        for row in _draw(store, name, count, seed):
            found.append(_compare(store, teacher, row, config.corpus, config.max_pixels))
    return found


def _device(asked: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _draw(store: FeatureStore, teacher: str, count: int, seed: int) -> list[int]:
    """Draw rows with a feature, all alike, without holding more than `count` of them."""
    generator = random.Random(seed)  # noqa: S311 - a sample, not a secret
    kept: list[int] = []
    seen = 0
    for shard in store.committed(teacher):
        for index, status in enumerate(committed_receipt(store, teacher, shard).rows):
            if status.status != "ok":
                continue
            seen += 1
            place = len(kept) if len(kept) < count else generator.randrange(seen)
            if place < count:
                kept[place : place + 1] = [shard * store.rows_per_shard + index]
    return sorted(kept)


def _compare(store: FeatureStore, teacher: Teacher, row: int, root: Path, max_pixels: int) -> Compared:
    import torch

    shard, index = divmod(row, store.rows_per_shard)
    sample = store.shard_samples(shard)[index]
    bad = partial(Compared, teacher.name, sample.key, row, math.inf, math.inf)
    try:
        data = read_image(root, sample, max_pixels, mended=True)
        image = decode_image(data, name=sample.key, max_pixels=max_pixels)
        pixels_chw = teacher.preprocessor(image)
    except ImageError as error:
        return bad(error.problem)
    digest = hashlib.sha256(data).hexdigest()
    if digest != committed_receipt(store, teacher.name, shard).rows[index].sha256:
        return bad("the image is not the one that was extracted: its SHA-256 differs")
    encoded = teacher.encode_images(torch.from_numpy(pixels_chw[None]), [digest])
    now = encoded.cpu().numpy()[0].astype(np.float64)
    stored, bound = _stored(store, teacher.name, shard, index)
    if stored.shape != now.shape:
        return bad(f"the teacher returned {now.shape}, {stored.shape} is stored")
    allowed = bound + FLOAT_SLACK * np.abs(now).max(initial=0.0)
    difference = np.abs(stored - now)
    if store.teacher(teacher.name).basis is not None:  # its bound is of the image as a whole
        difference, allowed = (np.sqrt(np.square(part).mean(keepdims=True)) for part in (difference, allowed))
    # 0/0 is no difference; anything else over 0, or with a NaN, is beyond what is allowed
    ratio = np.divide(difference, allowed, out=np.where(difference == 0, 0.0, math.inf), where=allowed > 0)
    length = float(np.linalg.norm(now))
    relative = float(np.linalg.norm(difference)) / length if length else float(difference.any())
    # a NaN is no agreement
    worst = float(np.nan_to_num(ratio, nan=math.inf).max(initial=0.0))
    return Compared(teacher.name, sample.key, row, worst, relative)


def _stored(store: FeatureStore, teacher: str, shard: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a stored feature as float64, and by how much its precision may have changed each element."""
    record = store.teacher(teacher)
    channels = record.fingerprint.channels
    basis = stored_basis(store, record)
    holder = committed_receipt(store, teacher, shard).rows[index].same_as
    if holder is not None:
        shard, index = divmod(holder, store.rows_per_shard)
    parts = {}
    for array, document in store.arrays(teacher).items():
        name = array_shard_file(teacher, array, shard, document)
        try:
            stored = StoredArray(document, store.place.read(name), store.rows_per_shard)
            parts[array] = stored.slice(index, index + 1)[0]
        except UNREADABLE as error:
            raise DamagedStoreError(
                f"{store.place.locate(name)} cannot be read: {error}", "Run `olapipe verify --repair` first."
            ) from error
    return decode(parts, channels, basis).astype(np.float64), error_bound(parts, channels, basis)
