"""Where a store lives: reading and publishing whole files so that a crash leaves the old file or the new one."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from olaschema.errors import StoreError

_SCRATCH = "_log/tmp"
_LOCKS = "_log/locks"
_WITHDRAWN = "_log/withdrawn"


class LocalPlace:
    """A store's root folder on a POSIX file system. Paths are relative to it, with forward slashes."""

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        if "://" in text:
            raise StoreError(
                f"{text}: stores are local folders in this version; buckets are not written yet",
                "Give a folder, or a bucket that is mounted as one.",
            )
        self.root = Path(root)

    def path(self, name: str) -> Path:
        """Return the file system path of `name`."""
        return self.root / PurePosixPath(name)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self.path(name).is_file()

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises StoreError naming the file if it is missing or cannot be read."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"{self.path(name)} is missing", "Is this the folder of a feature store?") from error
        except OSError as error:
            raise StoreError(f"{self.path(name)} cannot be read: {error.strerror}") from error

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in `folder`; empty if it does not exist."""
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return []

    def stamps(self, folder: str) -> dict[str, str]:
        """Return the files directly in `folder`, each with a text that changes when it is published again."""
        found = {}
        try:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    if entry.is_file():
                        status = entry.stat()
                        found[entry.name] = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
        except FileNotFoundError:
            return {}
        return found

    def publish(self, name: str, data: bytes) -> None:
        """Put `data` at `name`, replacing what was there, all at once and durably.

        Temporary file, fsync, rename, fsync of the folder. Raises StoreError on a full disk or missing permission.
        """
        target = self.path(name)
        try:
            scratch = self._scratch_file()
            try:
                with scratch.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._make_folder(target.parent)
                os.replace(scratch, target)
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

    def sweep(self) -> None:
        """Remove temporary files left by processes of this host that are no longer alive."""
        for name in self.names(_SCRATCH):
            host, pid, _ = name.rsplit("-", 2)
            if host == socket.gethostname() and not _alive(int(pid)):
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


def _cannot_write(path: Path, error: OSError) -> StoreError:
    remedies = {
        errno.ENOSPC: "Free some space and run the same command again: finished shards are kept.",
        errno.EDQUOT: "The disk quota is used up. Free some and run the same command again.",
        errno.EACCES: "Choose a folder that you may write to (--out).",
        errno.EPERM: "Choose a folder that you may write to (--out).",
        errno.EROFS: "The file system is read-only. Choose another folder (--out).",
        errno.ENOTDIR: "A parent of it is a file. Choose another folder (--out).",
        errno.EEXIST: "A file stands where a folder is needed. Choose another folder (--out).",
    }
    remedy = remedies.get(error.errno or 0, "Check the disk, then run the same command again.")
    return StoreError(f"{path} cannot be written: {error.strerror or error}", remedy)
