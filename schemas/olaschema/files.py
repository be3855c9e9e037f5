"""Reading files that somebody else named: regular files only, never waiting for a pipe or a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olaschema.errors import ImageError


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Raises ImageError with the reason `missing`, `unreadable` (a folder, a pipe, a device, no permission) or
    `too-large` (more than `limit` bytes). The problem does not name the path.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle).st_size
        if limit is not None and size > limit:
            raise ImageError("too-large", f"a file of {size} bytes is no image within the limit")
        try:
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            raise ImageError("unreadable", error.strerror or "it cannot be read") from error


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open a regular file for reading and yield its handle; raises ImageError `missing` or `unreadable`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("missing", "there is no such file") from error
    except OSError as error:
        raise ImageError("unreadable", error.strerror or "it cannot be read") from error
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise ImageError("unreadable", "it is a folder" if stat.S_ISDIR(mode) else "it is no file")
        yield handle
    finally:
        os.close(handle)
