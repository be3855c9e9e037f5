"""A packed training set: conversations, images and features in tars, local or remote."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from olaschema.basis import Basis
from olaschema.cache import CacheSettings, through
from olaschema.errors import CorpusError, ImageError, StoreError
from olaschema.manifest import ChannelStatistics, RowReceipt, TeacherRecord
from olaschema.packed import Found, PackedSet
from olaschema.precision import Stored
from olaschema.tarshard import CONVERSATIONS, OK, tar_name
from olatrain.conversations import Conversations
from olatrain.join import Coverage, Listing, make_listing

# A place is tar, sample and image in one number of 50 bits; tars are numbered with six digits.
_IMAGES = 1 << 12
_SAMPLES = 1 << 18


@dataclass(frozen=True)
class PackedData:
    """See `olatrain.source.Data`."""

    where: str
    cache: CacheSettings | None = None

    @property
    def url(self) -> str:
        """The set's folder or address."""
        return self.where

    @property
    def remote(self) -> bool:
        """Whether it comes over a network."""
        return "://" in self.where

    def teacher(self, name: str) -> TeacherRecord:
        """Return what the store that was packed recorded of a teacher."""
        teachers = self._opened().teachers
        if name not in teachers:
            raise StoreError(
                f"{self.where} has no features of the teacher {name!r}",
                f"It holds: {', '.join(teachers) or 'none'}. Pack it with `olapipe pack --teacher {name}`.",
            )
        return teachers[name]

    def basis(self, name: str) -> Basis | None:
        """Return None: features that need a basis are not packed."""
        return None

    def statistics(self, name: str) -> ChannelStatistics:
        """Return the statistics of the store that was packed."""
        return self._opened().statistics(name)

    def conversations(self) -> Conversations:
        """Return those in the set, in the order of the file that was packed."""
        packed = self._opened()
        return Conversations(Path(self.where) / CONVERSATIONS, _entries(packed.conversations()))

    def listing(self, conversations: Conversations) -> Listing:
        """Find where the images are: in the sample of the same images where there is one, else wherever they are.

        Samples are shuffled by tar as those of a store are by shard; images that the store did not plan, and text
        alone, are spread evenly. So one tar for each shard makes the store's own order.
        """
        table = self._opened().table()
        tar, sample, image = (table[name].to_numpy() for name in ("tar", "sample", "image"))
        if len(image) and (image.max() >= _IMAGES or sample.max() >= _SAMPLES):
            raise StoreError(f"{self.where}: a tar or a sample is larger than can be addressed", "Pack smaller tars.")
        places = (tar.astype(np.int64) * _SAMPLES + sample) * _IMAGES + image
        keys: list[str] = table["key"].to_pylist()
        samples: dict[tuple[str, ...], range] = {}
        single: dict[str, int] = {}
        starts = [*np.flatnonzero(image == 0).tolist(), len(keys)]
        for first, end in pairwise(starts):
            samples.setdefault(tuple(keys[first:end]), range(first, end))
        for number, key in enumerate(keys):
            single.setdefault(key, number)
        # one more, for what is not in the set
        rows = np.append(table["row"].to_numpy(), -1)
        places, tar = np.append(places, -1), np.append(tar, -1)
        found = [samples.get(those) or [single.get(key, -1) for key in those] for those in conversations.keys]
        firsts = np.asarray([numbers[0] if numbers else -1 for numbers in found], dtype=np.int64)
        return make_listing(
            conversations,
            [rows[list(numbers)].tolist() for numbers in found],
            np.where(rows[firsts] >= 0, tar[firsts], -1).astype(np.int64),
            [places[list(numbers)].tolist() for numbers in found],
        )

    def coverage(self, listing: Listing, teacher: str) -> Coverage:
        """Count from the set's listing."""
        table = self._opened().table()
        numbers = (table["tar"].to_numpy().astype(np.int64) * _SAMPLES + table["sample"].to_numpy()) * _IMAGES
        statuses = dict(
            zip((numbers + table["image"].to_numpy()).tolist(), table[f"status.{teacher}"].to_pylist(), strict=True)
        )
        ready: dict[int, int] = {}
        missing: Counter[str] = Counter()
        valid = 0
        for row, place in zip(listing.image_rows.tolist(), listing.image_places.tolist(), strict=True):
            status = statuses[place] if place >= 0 else "not-in-store"
            if status == OK:
                ready.setdefault(row, place)
                valid += 1
            else:
                missing[status] += 1
        by_row = [ready[row] for row in sorted(ready)]
        return Coverage(np.asarray(by_row, dtype=np.int64), valid, dict(sorted(missing.items())))

    def require_images(self, listing: Listing) -> None:
        """Raise CorpusError where conversations show images, and none of them is in the set."""
        if len(listing.image_places) and (listing.image_places < 0).all():
            raise CorpusError(
                f"{self.where} holds none of the images of {listing.conversations.path}",
                "Give conversations about the images that were packed, or pack them as a set of their own.",
            )

    def notes(self) -> list[str]:
        """Say what was left out when the set was packed."""
        left_out = self._opened().record.left_out
        shown = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        return [f"{self.where}: {sum(left_out.values())} conversations were not packed ({shown})"] if left_out else []

    def open(self) -> OpenedPacked:
        """Open the set."""
        return OpenedPacked(PackedSet.open(through(self.cache, self.where)))

    def _opened(self) -> PackedSet:
        return PackedSet.open(self.where)


class OpenedPacked:
    """See `olatrain.source.Opened`."""

    def __init__(self, packed: PackedSet) -> None:
        self._packed = packed

    @property
    def requests(self) -> int:
        """Requests for anything in the set."""
        return self._packed.place.requests.total()

    def image(self, place: int, key: str) -> bytes:
        """Read it from its tar."""
        if place < 0:
            raise ImageError("missing", f"{key}: it is not in {self._packed.place.url}")
        return self._packed.image(self._found(place))

    def status(self, teacher: str, place: int) -> RowReceipt | None:
        """What the index of its tar says."""
        return self._packed.status(self._found(place), teacher) if place >= 0 else None

    def describe(self, place: int) -> str:
        """Name an image and its tar."""
        found = self._found(place)
        return f"{found.key} in {tar_name(found.tar)}"

    def feature(self, teacher: str, place: int) -> Stored | None:
        """Read it from its tar."""
        status = self.status(teacher, place)
        if status is None or status.status != "ok":
            return None
        return self._packed.read(self._found(place), teacher)

    def _found(self, place: int) -> Found:
        rest, image = divmod(place, _IMAGES)
        return self._packed.at(*divmod(rest, _SAMPLES), image)


def _entries(lines: bytes) -> Iterator[tuple[int, Any]]:
    for index, line in enumerate(io.BytesIO(lines)):
        yield index, json.loads(line)
