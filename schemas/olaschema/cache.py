"""A bounded cache of files of remote places on a local disk, shared by all processes that name the same folder.

Files are named by the SHA-256 that a receipt or root document promises, so a file can only be what is wanted, or
damaged; each process checks a file once before it trusts it. One process downloads a file while others wait. Before a
download the files that were used least recently make room.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olaschema.bucket import BucketPlace
from olaschema.errors import ConfigError, DamagedStoreError, StoreError
from olaschema.manifest import FileReceipt, Frozen
from olaschema.place import Place, open_place

_PIECE = 16 << 20
_PART = ".part"
_WAIT_S = 0.05


class CacheSettings(Frozen):
    """Where a cache is, and the most bytes of files that it holds."""

    folder: Path
    limit: int


class Cache:
    """The cache of one process."""

    def __init__(self, settings: CacheSettings) -> None:
        self._folder = settings.folder
        self._limit = settings.limit
        self._checked: dict[str, int] = {}
        """By digest the inode of the file that was found right."""
        try:
            for name in ("files", "locks"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def read(self, place: Place, name: str, promised: FileReceipt, offset: int, length: int) -> bytes:
        """Return a part of a file of `place`, which is downloaded unless it is here.

        Raises ConfigError where the cache cannot hold it, DamagedStoreError where the place has another file than is
        promised, StoreError where it cannot be read.
        """
        path = self._folder / "files" / promised.sha256
        while True:
            try:
                with path.open("rb") as file:
                    if self._checked.get(promised.sha256) == os.fstat(file.fileno()).st_ino:
                        os.utime(file.fileno())  # the newest is evicted last
                        file.seek(offset)
                        return file.read(length)
            except FileNotFoundError:
                pass  # never here, or evicted
            except OSError as error:
                raise _unusable(path, error) from error
            self._bring(place, name, promised, path)

    def _bring(self, place: Place, name: str, promised: FileReceipt, path: Path) -> None:
        """Check the file that is here, or download it."""
        try:
            with self._locked(promised.sha256):
                if path.exists():
                    digest = hashlib.sha256()
                    with path.open("rb") as file:
                        inode = os.fstat(file.fileno()).st_ino
                        while piece := file.read(_PIECE):
                            digest.update(piece)
                    if digest.hexdigest() == promised.sha256:
                        self._checked[promised.sha256] = inode
                        return
                    path.unlink()
                self._download(place, name, promised, path)
        except FileNotFoundError:
            return  # evicted by another process between two looks: the caller tries again
        except OSError as error:
            raise _unusable(path, error) from error

    def _download(self, place: Place, name: str, promised: FileReceipt, path: Path) -> None:
        part = path.with_name(path.name + _PART)
        if promised.bytes > self._limit:
            raise ConfigError(
                f"{place.locate(name)} has {promised.bytes} bytes, and the cache in {self._folder} is limited to "
                f"{self._limit}",
                "Raise cache_limit: it should hold the files of several shards.",
            )
        while not self._reserved(part, promised):
            time.sleep(_WAIT_S)  # others are downloading: what they have finished can be evicted
        try:
            digest = hashlib.sha256()
            with part.open("r+b") as file:
                for offset in range(0, promised.bytes, _PIECE):
                    piece = place.read_range(name, offset, min(_PIECE, promised.bytes - offset))
                    digest.update(piece)
                    file.write(piece)
                inode = os.fstat(file.fileno()).st_ino
            if digest.hexdigest() != promised.sha256:
                raise DamagedStoreError(
                    f"{place.locate(name)} is damaged: it is not the file that was promised",
                    "`olapipe verify --repair` makes shards of a store again; pack a packed set again.",
                )
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._checked[promised.sha256] = inode

    def _reserved(self, part: Path, promised: FileReceipt) -> bool:
        with self._locked("room"):
            if not self._has_room(promised):
                return False
            with part.open("wb") as file:
                file.truncate(promised.bytes)  # others count it as taken from now on
            return True

    def _has_room(self, promised: FileReceipt) -> bool:
        """Evict until a file fits, the one used least recently first; says whether it does."""
        files = []
        for entry in os.scandir(self._folder / "files"):
            status = entry.stat()
            files.append((status.st_mtime_ns, status.st_size, entry.name))
        taken = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if taken + promised.bytes <= self._limit:
                break
            if self._removed(name, _lock_name(promised.sha256)):
                taken -= size
        return taken + promised.bytes <= self._limit

    def _removed(self, name: str, held: str) -> bool:
        """Delete a file, but one that another process is downloading right now; `held` is the lock that we hold."""
        lock = _lock_name(name.removesuffix(_PART))
        if name.endswith(_PART) and lock != held:
            with (self._folder / "locks" / lock).open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                (self._folder / "files" / name).unlink(missing_ok=True)  # left by a process that was killed
                return True
        (self._folder / "files" / name).unlink(missing_ok=True)
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._folder / "locks" / _lock_name(name)).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class CachedBucket(BucketPlace):
    """A bucket whose files are read through a cache, as soon as a document has promised them (`expect`)."""

    remote = False
    """What is read twice costs one round trip."""

    def __init__(self, url: str, settings: CacheSettings) -> None:
        super().__init__(url)
        self._settings = settings
        self._cache = Cache(settings)
        self._behind = BucketPlace(url)
        self._behind.requests = self.requests
        self._promised: dict[str, FileReceipt] = {}

    def __reduce__(self) -> tuple[type[CachedBucket], tuple[str, CacheSettings]]:  # type: ignore[override]
        return CachedBucket, (self.url, self._settings)

    def expect(self, files: dict[str, FileReceipt]) -> None:
        """Read these files through the cache from now on."""
        self._promised |= files

    def find(self, name: str) -> bytes | None:
        """Return an object's bytes, None if it is missing."""
        promised = self._promised.get(name)
        if promised is None:
            return super().find(name)
        return self._cache.read(self._behind, name, promised, 0, promised.bytes)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer where the object ends before."""
        promised = self._promised.get(name)
        if promised is None:
            return super().read_range(name, offset, length)
        if offset < 0 or length < 0:
            raise StoreError(f"{self.locate(name)} cannot be read: {length} bytes at {offset}")
        return self._cache.read(self._behind, name, promised, offset, length)

    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        """Return the last `length` bytes (all of a shorter object) and the object's size."""
        promised = self._promised.get(name)
        if promised is None:
            return super().read_tail(name, length)
        start = max(promised.bytes - length, 0)
        return self._cache.read(self._behind, name, promised, start, length), promised.bytes


def through(cache: CacheSettings | None, where: str) -> Place:
    """Return the place that an address names, read through a cache where one is given."""
    return open_place(where) if cache is None else CachedBucket(where, cache)


def _lock_name(name: str) -> str:
    return name if name == "room" else name[:2]  # a file for each digest would be a folder without bounds


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the cache {path} cannot be used: {error.strerror or error}", "Choose another cache_dir.")
