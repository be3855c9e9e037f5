"""Several sources as one: each is seen a fixed number of times per epoch, and all are shuffled together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from olaschema.basis import Basis
from olaschema.manifest import ChannelStatistics, RowReceipt, TeacherRecord
from olaschema.precision import Stored
from olatrain.conversations import Conversations
from olatrain.join import Coverage, Listing, make_listing
from olatrain.source import Data, Opened, require_same_form

# Rows and places of part p are p times this further up; of what is nowhere, place -1 - p tells the part.
_PARTS = 1 << 50
_ONE_FORM = "Extract one of them again in the other's form; parts of one corpus, in one store or merged, share a basis."


@dataclass(frozen=True)
class MixedData:
    """See `olatrain.source.Data`. The samples of an epoch are those of each part, one part after the other, repeated.

    Repetitions of a sample are shuffled as if they came from stores of their own; in one batch they are still the same
    image, and no negatives of each other. So are images of one store that is a part twice, with other conversations.
    """

    parts: tuple[Data, ...]
    repeats: tuple[int, ...]

    @property
    def url(self) -> str:
        """All parts."""
        return ", ".join(part.url for part in self.parts)

    @property
    def remote(self) -> bool:
        """Whether any part comes over a network."""
        return any(part.remote for part in self.parts)

    def owners(self) -> list[int]:
        """Return by part the first one that has the same store: rows of these are the same images."""
        stores = [part.url if "://" in part.url else str(Path(part.url).resolve()) for part in self.parts]
        return [stores.index(store) for store in stores]

    def teacher(self, name: str) -> TeacherRecord:
        """Return the first part's record; raises FingerprintError or StoreError where another part differs."""
        first = self.parts[0]
        record = first.teacher(name)
        remedy = "Mix only features of one meaning: extract the others again with the same settings."
        for part in self.parts[1:]:
            other = part.teacher(name)
            record.fingerprint.require_equal(
                other.fingerprint, mine=f"in {first.url}", theirs=f"in {part.url}", remedy=remedy
            )
            require_same_form(record, other, mine=f"in {first.url}", theirs=f"in {part.url}", remedy=_ONE_FORM)
        return record

    def basis(self, name: str) -> Basis | None:
        """Return the basis that all parts share."""
        return self.parts[0].basis(name)

    def statistics(self, name: str) -> ChannelStatistics:
        """Return the statistics of all parts, each counted once."""
        total = ChannelStatistics(self.parts[0].teacher(name).fingerprint.channels)
        for part in self.parts:
            total.merge(part.statistics(name))
        return total

    def conversations(self) -> Conversations:
        """Return all parts' conversations, repeated."""
        return Conversations.concatenate([part.conversations() for part in self.parts], self.repeats)

    def listing(self, conversations: Conversations) -> Listing:
        """Find the images of `conversations()`, each in its part; raises CorpusError where a part has none of them."""
        rows: list[list[int]] = []
        places: list[list[int]] = []
        shards: list[np.ndarray] = []
        taken = 0
        owners = self.owners()
        for number, (part, repeats) in enumerate(zip(self.parts, self.repeats, strict=True)):
            listing = part.listing(part.conversations())
            part.require_images(listing)
            samples = range(len(listing))
            offset = number * _PARTS
            first = owners[number] * _PARTS
            part_rows = [[row + first if row >= 0 else -1 for row in listing.rows_of(n)] for n in samples]
            part_places = [[p + offset if p >= 0 else -1 - number for p in listing.places_of(n)] for n in samples]
            most = int(listing.shards.max(initial=-1)) + 1
            for _ in range(repeats):
                rows += part_rows
                places += part_places
                shards.append(np.where(listing.shards >= 0, listing.shards + taken, -1))
                taken += most
        return make_listing(conversations, rows, np.concatenate(shards), places)

    def coverage(self, listing: Listing, teacher: str) -> Coverage:
        """Count each part's, at every use."""
        planned = listing.image_rows >= 0
        part_of = listing.image_places // _PARTS
        missing: Counter[str] = Counter()
        if (~planned).any():
            missing["not-in-store"] = int((~planned).sum())
        ready: list[np.ndarray] = []
        valid = 0
        for number, part in enumerate(self.parts):
            chosen = planned & (part_of == number)
            own = replace(
                listing,
                image_rows=listing.image_rows[chosen] % _PARTS,
                image_places=listing.image_places[chosen] - number * _PARTS,
            )
            found = part.coverage(own, teacher)
            ready.append(found.ready + number * _PARTS)
            valid += found.valid
            missing.update(found.missing)
        return Coverage(np.concatenate(ready), valid, dict(sorted(missing.items())))

    def require_images(self, listing: Listing) -> None:
        """Nothing is left to look for: `listing` has looked in each part."""

    def notes(self) -> list[str]:
        """Say what is mixed."""
        shown = [f"{part.url} × {repeats}" for part, repeats in zip(self.parts, self.repeats, strict=True)]
        return [f"an epoch mixes {', '.join(shown)}", *(note for part in self.parts for note in part.notes())]

    def open(self) -> OpenedMixture:
        """Open every part."""
        return OpenedMixture([part.open() for part in self.parts], self.owners())


class OpenedMixture:
    """See `olatrain.source.Opened`."""

    def __init__(self, parts: list[Opened], owners: list[int]) -> None:
        self._parts = parts
        self._owners = owners

    @property
    def requests(self) -> int:
        """Requests to all parts."""
        return sum(part.requests for part in self._parts)

    def image(self, place: int, key: str) -> bytes:
        """Read it from its part."""
        part, own, _ = self._find(place)
        return part.image(own, key)

    def status(self, teacher: str, place: int) -> RowReceipt | None:
        """What its part says of it."""
        part, own, offset = self._find(place)
        status = part.status(teacher, own)
        if status is None or status.same_as is None:
            return status
        return status.model_copy(update={"same_as": status.same_as + offset})

    def describe(self, place: int) -> str:
        """Name it as its part does."""
        part, own, _ = self._find(place)
        return part.describe(own)

    def feature(self, teacher: str, place: int) -> Stored | None:
        """Read it from its part."""
        part, own, _ = self._find(place)
        return part.feature(teacher, own)

    def _find(self, place: int) -> tuple[Opened, int, int]:
        if place < 0:
            return self._parts[-1 - place], -1, 0
        number, own = divmod(place, _PARTS)
        return self._parts[number], own, self._owners[number] * _PARTS
