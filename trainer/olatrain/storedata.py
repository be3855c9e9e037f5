"""A feature store beside conversations and a folder of images; without teachers, those two alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from olaschema.basis import Basis
from olaschema.cache import CacheSettings, through
from olaschema.errors import ImageError, StoreError
from olaschema.manifest import ChannelStatistics, RowReceipt, TeacherRecord
from olaschema.precision import Stored
from olaschema.reader import FeatureReader
from olaschema.rooted import read_rooted
from olaschema.store import FeatureStore
from olatrain.conversations import Conversations
from olatrain.join import Coverage, Listing, coverage, join, require_images


@dataclass(frozen=True)
class StoreData:
    """See `olatrain.source.Data`. The place of an image is its row."""

    store: str | None
    teachers: tuple[str, ...]
    file: Path
    """Of the conversations."""
    images: Path
    committed: Mapping[str, frozenset[int]]
    """Shards by teacher that had a receipt when the run began: one that is gone since is no missing feature."""
    fingerprints: Mapping[str, str]
    """Digests by teacher of what features meant when the run began: loaders and evaluations open the store later."""
    cache: CacheSettings | None = None

    @classmethod
    def at(
        cls,
        store: str | None,
        teachers: tuple[str, ...],
        file: Path,
        images: Path,
        *,
        cache: CacheSettings | None = None,
    ) -> StoreData:
        """Note what is committed now; raises StoreError where there is no such store."""
        found = FeatureStore.open(store) if store is not None else None
        committed = {name: frozenset(found.committed(name)) for name in teachers} if found is not None else {}
        meant = {name: found.teacher(name).fingerprint.digest() for name in teachers} if found is not None else {}
        return cls(store, teachers, file, images, committed, meant, cache)

    @property
    def url(self) -> str:
        """The store's folder or address, or the folder of images."""
        return self.store if self.store is not None else str(self.images)

    @property
    def remote(self) -> bool:
        """Whether the features come over a network."""
        return self.store is not None and "://" in self.store

    def teacher(self, name: str) -> TeacherRecord:
        """Return what the store records of a teacher."""
        return self._opened().teacher(name)

    def basis(self, name: str) -> Basis | None:
        """Return the basis of a teacher stored as klt."""
        store = self._opened()
        return store.basis(store.teacher(name))

    def statistics(self, name: str) -> ChannelStatistics:
        """Return the statistics of all committed shards."""
        return self._opened().statistics(name)

    def conversations(self) -> Conversations:
        """Read the file."""
        return Conversations.read(self.file)

    def listing(self, conversations: Conversations) -> Listing:
        """Find the rows of the images."""
        return join(conversations, None if self.store is None else self._opened())

    def coverage(self, listing: Listing, teacher: str) -> Coverage:
        """Count from the receipts."""
        return coverage(self._opened(), listing, teacher)

    def require_images(self, listing: Listing) -> None:
        """Look for some of the images."""
        require_images(listing, self.images)

    def notes(self) -> list[str]:
        """Nothing."""
        return []

    def open(self) -> OpenedStore:
        """Open the store; raises StoreError where a teacher's features mean something else by now."""
        return OpenedStore(self, None if self.store is None else FeatureStore.open(through(self.cache, self.store)))

    def _opened(self) -> FeatureStore:
        if self.store is None:
            raise StoreError("no feature store is given", "Give one (--store).")
        return FeatureStore.open(self.store)


class OpenedStore:
    """See `olatrain.source.Opened`."""

    def __init__(self, data: StoreData, store: FeatureStore | None) -> None:
        self._data = data
        self._store = store
        self._rows_per_shard = store.rows_per_shard if store is not None else 1
        self._readers = {name: FeatureReader(store, name) for name in data.teachers} if store is not None else {}
        for name, reader in self._readers.items():
            if reader.fingerprint.digest() != data.fingerprints[name]:
                raise StoreError(
                    f"{data.url}: the features of {name} are others than when the run began",
                    "Put back the ones it began with, or start a new run with another --out.",
                )

    @property
    def requests(self) -> int:
        """Requests to the store; images are local files."""
        return self._store.place.requests.total() if self._store is not None else 0

    def image(self, place: int, key: str) -> bytes:
        """Read it from the folder."""
        try:
            return read_rooted(self._data.images, key)
        except ImageError as error:
            raise ImageError(error.reason, f"{key}: {error.problem}") from error

    def status(self, teacher: str, place: int) -> RowReceipt | None:
        """What its receipt says of a row."""
        return self._readers[teacher].status(place) if place >= 0 else None

    def describe(self, place: int) -> str:
        """Name a row."""
        return f"row {place}"

    def feature(self, teacher: str, place: int) -> Stored | None:
        """Read a row; raises StoreError where its receipt is gone since the run began."""
        status = self.status(teacher, place)
        shard = place // self._rows_per_shard
        if place >= 0 and status is None and shard in self._data.committed.get(teacher, ()):
            raise StoreError(
                f"{self._data.url}: the receipt of {teacher} shard {shard} is gone since the run began",
                "Extract that shard again, then run the same command again.",
            )
        return self._readers[teacher].read(place) if status is not None and status.status == "ok" else None
