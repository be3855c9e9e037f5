"""Reading files that somebody else named: regular files only, never waiting for a pipe or a device."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from olaschema.errors import ImageError


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file.

    Raises ImageError with the reason `missing`, `unreadable` (a folder, a pipe, a device, no permission) or
    `too-large` (more than `limit` bytes). The problem does not name the path.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("unreadable", "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no file")
            if limit is not None and status.st_size > limit:
                raise ImageError("too-large", f"a file of {status.st_size} bytes is no image within the limit")
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(handle)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("missing", "there is no such file") from error
    except OSError as error:
        raise ImageError("unreadable", error.strerror or "it cannot be read") from error
