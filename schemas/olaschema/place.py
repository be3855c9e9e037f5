"""Where a store lives: reading and publishing whole files so that a crash leaves the old file or the new one.

`Place` is all that the rest of the code knows of it. Names are relative to the store's root, with forward slashes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath

from olaschema.errors import StoreError
from olaschema.manifest import FileReceipt

_SCRATCH = "_log/tmp"
_SCRATCH_FILE = re.compile(r"(.+)-(\d+)-[0-9a-f]+")
"""Host and process of a temporary file; others put files there too, as a desktop its .DS_Store."""
_LOCKS = "_log/locks"
_WITHDRAWN = "_log/withdrawn"


class Place(ABC):
    """A store's files, wherever they are. What cannot be read or written is a StoreError that names it."""

    url: str
    """Folder or address as text, for messages and for other processes; holds no credentials."""
    remote = False
    """Whether each request takes a round trip over a network."""
    requests: Counter[str]
    """How often files were asked for, by kind: `read`, `list`, `write`, …"""

    @property
    def name(self) -> str:
        """The last part of the url."""
        return PurePosixPath(self.url).name

    def locate(self, name: str) -> str:
        """Return the whole name of a file, for messages."""
        return f"{self.url}/{name}"

    @abstractmethod
    def present(self) -> bool:
        """Whether there is anything at all."""

    @abstractmethod
    def vacant(self) -> bool:
        """Whether a new store can be made here: nothing is there, or nothing but `_log`."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the file is there."""

    @abstractmethod
    def holds(self, folder: str) -> bool:
        """Whether the folder is there."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises StoreError if it is missing."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises StoreError naming the file if it is missing or cannot be read."""

    @abstractmethod
    def find(self, name: str) -> bytes | None:
        """Return a file's bytes, None if it is missing; raises StoreError if it cannot be read."""

    def expect(self, files: dict[str, FileReceipt]) -> None:  # noqa: B027  # most places have no use for it
        """Take note of files that a document promises. A place with a cache reads them through it from now on."""

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer where the file ends before; raises as `read` does."""

    @abstractmethod
    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        """Return the last `length` bytes (all of a shorter file) and the size of the file; raises as `read` does."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in `folder`; empty if it does not exist."""

    def stamps(self, folder: str) -> dict[str, str]:
        """Return the files directly in `folder`, each with a text that changes whenever it is published again.

        The text is empty where the place cannot say.
        """
        return dict.fromkeys(self.names(folder), "")

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly in `folder` (`""`: the root); empty if it does not exist."""

    @abstractmethod
    def walk(self) -> Iterator[str]:
        """Yield the names of all files outside `_log/`, in a fixed order."""

    @abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Put `data` at `name`, replacing what was there, all at once and durably.

        Raises StoreError where that is not possible; then the old file or none is there.
        """

    @abstractmethod
    def publish_if_absent(self, name: str, data: bytes) -> bool:
        """Put `data` at `name` unless something is there already; says whether it was put.

        Of several processes that try at once, one is told so. Raises as `publish` does.
        """

    @abstractmethod
    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        """Put `new` if the file holds exactly `old` (None: if there is none), all at once; says whether it was put."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file durably; one that is not there is no error."""

    @abstractmethod
    def withdraw(self, folder: str) -> None:
        """Take a folder out of the store; what is left of it is deleted by `clear_withdrawn`."""

    @abstractmethod
    def clear_withdrawn(self) -> bool:
        """Delete what was withdrawn; says whether there was anything."""

    @abstractmethod
    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold an exclusive lock on `name` among all processes that use this place."""

    @abstractmethod
    def append_log(self, name: str, line: str) -> None:
        """Append one line to a log under `_log/`, the only place for what differs between two runs."""

    @abstractmethod
    def logs(self) -> list[str]:
        """Return the sorted names of the logs."""

    @abstractmethod
    def read_log(self, name: str) -> bytes:
        """Return all lines of a log, nothing where there is none."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what processes that are no longer alive have left unfinished."""


def open_place(where: str | Path) -> Place:
    """Return the place that a folder or an address names; nothing is read or made yet."""
    text = str(where)
    if "://" in text:
        scheme = text.partition("://")[0]
        from olaschema.bucket import SCHEMES, BucketPlace

        if scheme in SCHEMES:
            return BucketPlace(text)
        if scheme == "hf":
            from olaschema.hub import HubPlace

            return HubPlace(text)
        raise StoreError(
            f"{scheme}://…: no stores are read from such an address",
            "Give a folder, or an address that begins with s3://, az://, gs:// or (only to read) hf://.",
        )
    return LocalPlace(Path(where))


def absolute_url(where: str | Path) -> str:
    """Return a folder's absolute path, which other processes can use; an address stays as it is."""
    text = str(where)
    return text if "://" in text else str(Path(where).absolute())


class LocalPlace(Place):
    """A store's root folder on a POSIX file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(self.root)
        self.requests = Counter()

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.root.name

    def path(self, name: str) -> Path:
        """Return the file system path of `name`."""
        return self.root / PurePosixPath(name)

    def locate(self, name: str) -> str:
        """Return the file system path of `name` as text."""
        return str(self.path(name))

    def present(self) -> bool:
        """Whether the folder is there."""
        return self.root.is_dir()

    def vacant(self) -> bool:
        """Whether a new store can be made here; raises StoreError where that cannot be seen."""
        try:
            if not self.root.exists():
                return True
            return self.root.is_dir() and all(entry.name == "_log" for entry in self.root.iterdir())
        except OSError as error:
            raise StoreError(f"{self.root} cannot be used: {error.strerror}", "Choose another folder.") from error

    def exists(self, name: str) -> bool:
        """Whether the file is there; raises StoreError where that cannot be seen."""
        try:
            return self.path(name).is_file()
        except OSError as error:
            raise StoreError(f"{self.path(name)} cannot be used: {error.strerror}", "Choose another folder.") from error

    def holds(self, folder: str) -> bool:
        """Whether the folder is there."""
        return self.path(folder).is_dir()

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises StoreError if it is missing."""
        with self._reading(name):
            return self.path(name).stat().st_size

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises StoreError naming the file if it is missing or cannot be read."""
        with self._reading(name):
            return self.path(name).read_bytes()

    def find(self, name: str) -> bytes | None:
        """Return a file's bytes, None if it is missing; raises StoreError if it cannot be read."""
        try:
            return self.read(name)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer where the file ends before; raises as `read` does."""
        # opened every time (a fiftieth of decompressing a row): a file that was replaced or dropped is noticed
        with self._reading(name):
            file = os.open(f"{self.url}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return _read_at(file, offset, length)
            finally:
                os.close(file)

    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        """Return the last `length` bytes (all of a shorter file) and the size of the file; raises as `read` does."""
        with self._reading(name), self.path(name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - length, 0))
            return file.read(length), size

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        self.requests["read"] += 1
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"{self.path(name)} is missing", "Is this the folder of a feature store?") from error
        except (OSError, ValueError, OverflowError) as error:
            problem = error.strerror if isinstance(error, OSError) else str(error)
            raise StoreError(f"{self.path(name)} cannot be read: {problem}") from error

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in `folder`; empty if it does not exist."""
        return self._entries(folder, os.DirEntry.is_file)

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly in `folder` (`""`: the root); empty if it does not exist."""
        return self._entries(folder, os.DirEntry.is_dir)

    def _entries(self, folder: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        self.requests["list"] += 1
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(entry.name for entry in entries if wanted(entry))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _cannot_list(self.path(folder), error) from error

    def stamps(self, folder: str) -> dict[str, str]:
        """Return the files directly in `folder`, each with a text that changes when it is published again."""
        self.requests["list"] += 1
        found = {}
        try:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    if entry.is_file():
                        status = entry.stat()
                        found[entry.name] = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise _cannot_list(self.path(folder), error) from error
        return found

    def walk(self) -> Iterator[str]:
        """Yield the names of all files outside `_log/`, in a fixed order."""
        for folder, folders, files in os.walk(self.root):
            relative = os.path.relpath(folder, self.root)
            if relative == ".":
                folders[:] = [name for name in folders if name != "_log"]
            folders.sort()
            # a link to a folder is listed among the folders, and is not followed
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in sorted([*files, *links]):
                yield name if relative == "." else f"{relative}/{name}".replace(os.sep, "/")

    def publish(self, name: str, data: bytes) -> None:
        """Put `data` at `name`, replacing what was there, all at once and durably.

        Temporary file, fsync, rename, fsync of the folder. Raises StoreError on a full disk or missing permission.
        """
        self._put(name, data, os.replace)

    def publish_if_absent(self, name: str, data: bytes) -> bool:
        """Put `data` at `name` unless something is there already; says whether it was put.

        As `publish`, with a link instead of the rename: that one refuses what is there already.
        """
        try:
            self._put(name, data, os.link)
        except StoreError as error:
            if isinstance(error.__cause__, FileExistsError) and self.exists(name):
                return False
            raise
        return True

    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        """Put `new` if the file holds exactly `old` (None: if there is none), under a lock."""
        with self.lock(name.replace("/", "-")):
            if self.find(name) != old:
                return False
            self.publish(name, new)
            return True

    def _put(self, name: str, data: bytes, move: Callable[[Path, Path], None]) -> None:
        target = self.path(name)
        self.requests["write"] += 1
        try:
            scratch = self._scratch_file()
            try:
                with scratch.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._make_folder(target.parent)
                move(scratch, target)
            finally:
                scratch.unlink(missing_ok=True)
            _sync_folder(target.parent)
        except OSError as error:
            raise _cannot_write(target, error) from error

    def remove(self, name: str) -> None:
        """Delete a file durably; one that is not there is no error."""
        path = self.path(name)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def withdraw(self, folder: str) -> None:
        """Take a folder out of the store, all at once; its bytes wait under `_log` for `clear_withdrawn`."""
        source = self.path(folder)
        target = self.path(f"{_WITHDRAWN}/{secrets.token_hex(8)}")
        try:
            if source.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                _sync_folder(source.parent)
        except OSError as error:
            raise _cannot_write(source, error) from error

    def clear_withdrawn(self) -> bool:
        """Delete what was withdrawn; says whether there was anything."""
        folder = self.path(_WITHDRAWN)
        if not folder.is_dir():
            return False
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        return True

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock on `name` among all processes that use this folder."""
        path = self.path(f"{_LOCKS}/{name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            raise _cannot_write(path, error) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def append_log(self, name: str, line: str) -> None:
        """Append one line to a file under `_log/`, the only place for what differs between two runs."""
        path = self.path(f"_log/{name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise _cannot_write(path, error) from error

    def logs(self) -> list[str]:
        """Return the sorted names of the logs."""
        return self.names("_log")

    def read_log(self, name: str) -> bytes:
        """Return all lines of a log, nothing where there is none."""
        return self.read(f"_log/{name}") if self.exists(f"_log/{name}") else b""

    def sweep(self) -> None:
        """Remove temporary files left by processes of this host that are no longer alive."""
        for name in self.names(_SCRATCH):
            scratch = _SCRATCH_FILE.fullmatch(name)
            if scratch is not None and scratch[1] == socket.gethostname() and not _alive(int(scratch[2])):
                self.path(f"{_SCRATCH}/{name}").unlink(missing_ok=True)

    def _scratch_file(self) -> Path:
        folder = self.path(_SCRATCH)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cannot_list(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be listed: {error.strerror or error}", "Check the disk or the mount, and who may read it."
    )


def _cannot_write(path: Path, error: OSError) -> StoreError:
    remedies = {
        errno.ENOSPC: "Free some space and run the same command again: finished shards are kept.",
        errno.EDQUOT: "The disk quota is used up. Free some and run the same command again.",
        errno.EACCES: "Choose a folder that you may write to (--out).",
        errno.EPERM: "Choose a folder that you may write to (--out).",
        errno.EROFS: "It is read-only. Make it writable and run the same command again, or choose another folder.",
        errno.ENOTDIR: "A parent of it is a file. Choose another folder (--out).",
        errno.EEXIST: "A file stands where a folder is needed. Choose another folder (--out).",
    }
    remedy = remedies.get(error.errno or 0, "Check the disk, then run the same command again.")
    return StoreError(f"{path} cannot be written: {error.strerror or error}", remedy)


def _read_at(file: int, offset: int, length: int) -> bytes:
    """Read until `length` bytes or the end; one call of the system may return fewer (over 2 GiB, network mounts)."""
    data = os.pread(file, length, offset)
    while len(data) < length and (more := os.pread(file, length - len(data), offset + len(data))):
        data += more
    return data
