"""The bytes of an image by its uri: a file below a root, a member of a tar file, or a row of a parquet file.

`00012.tar/000120034.jpg` is a member of the tar file `00012.tar`, `train.parquet/17` the image in row 17 (from 0).
A folder may be named like a tar file: what is a folder is treated as one.
"""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path
from threading import Lock

from olaschema.errors import CorpusError, ImageError
from olaschema.files import open_regular, read_regular
from olaschema.parquetimages import parquet_images, read_parquet_image
from olaschema.tarindex import TarIndex

TAR = ".tar"
PARQUET = ".parquet"
_CACHED_MEMBERS = 4_000_000


def read_rooted(root: Path, uri: str, *, limit: int | None = None) -> bytes:
    """Return the bytes of an image.

    Raises ImageError with the reason `missing`, `unreadable` (a folder, a pipe, a link inside a tar file, no
    permission), `truncated` (a tar or parquet file that is damaged or cut short) or `too-large` (more than `limit`
    bytes). The problem names no path outside the root.
    """
    container, member = split(root, uri)
    if container is None:
        return read_regular(root / uri, limit=limit)
    if container.suffix.lower() == PARQUET:
        try:
            return read_parquet_image(container, member, limit=limit)
        except CorpusError as error:
            raise ImageError("unreadable", error.problem) from error
    return _read_tar(container, member, limit)


def rooted_size(root: Path, uri: str) -> int:
    """Return an image's size in bytes as a listing knows it; -1 if there is none, or it is a row of a parquet file."""
    try:
        container, member = split(root, uri)
        if container is None:
            found = os.stat(f"{root}/{uri}")
            return found.st_size if stat.S_ISREG(found.st_mode) else -1
        if container.suffix.lower() == PARQUET:
            return -1
        with open_regular(container) as handle:
            place = _INDICES.index(container, handle).find(member)
        return place[1] if place else -1
    except (OSError, ValueError, ImageError):
        return -1


def is_rooted(root: Path, uri: str) -> bool:
    """Whether there is an image of that uri."""
    container, member = split(root, uri)
    try:
        if container is not None and container.suffix.lower() == PARQUET:
            return member.isascii() and member.isdigit() and int(member) < len(parquet_images(container))
    except (ImageError, CorpusError):
        return False
    return rooted_size(root, uri) >= 0


def split(root: Path, uri: str) -> tuple[Path | None, str]:
    """Return the tar or parquet file that a uri leads into and the member's name, or None and the uri itself."""
    lower = uri.lower()
    if f"{TAR}/" in lower or f"{PARQUET}/" in lower:
        parts = uri.split("/")
        for count in range(1, len(parts)):
            path = root.joinpath(*parts[:count])
            if path.suffix.lower() in (TAR, PARQUET) and not path.is_dir() and path.exists():
                return path, "/".join(parts[count:])
    return None, uri


def _read_tar(path: Path, member: str, limit: int | None) -> bytes:
    with open_regular(path) as handle:
        index = _INDICES.index(path, handle)
        place = index.find(member)
        if place is None and index.damage is not None:
            raise ImageError("truncated", index.damage.problem)
        if place is None:
            raise ImageError("missing", "the tar file has no such member")
        offset, size = place
        if size < 0:
            raise ImageError("unreadable", "it is a link or a device inside a tar file, which is not followed")
        if limit is not None and size > limit:
            raise ImageError("too-large", f"a member of {size} bytes is no image within the limit")
        try:
            data = os.pread(handle, size, offset)
        except OSError as error:
            raise ImageError("unreadable", error.strerror or "it cannot be read") from error
    if len(data) < size:
        raise ImageError("truncated", f"the tar file ends {size - len(data)} bytes before the end of this member")
    return data


class _Indices:
    """Indices of the tar files that were used last, 4 million members at most, shared by the threads of a process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: OrderedDict[str, tuple[tuple[int, int], TarIndex]] = OrderedDict()

    def index(self, path: Path, handle: int) -> TarIndex:
        """Return the index of an open tar file, made again if the file has changed."""
        status = os.fstat(handle)
        stamp = (status.st_size, status.st_mtime_ns)
        with self._lock:
            known = self._found.get(str(path))
            if known is not None and known[0] == stamp:
                self._found.move_to_end(str(path))
                return known[1]
            try:
                index = TarIndex(handle)
            except OSError as error:
                raise ImageError("unreadable", error.strerror or "the tar file cannot be read") from error
            self._found[str(path)] = (stamp, index)
            while len(self._found) > 1 and sum(len(each) for _, each in self._found.values()) > _CACHED_MEMBERS:
                self._found.popitem(last=False)
            return index


_INDICES = _Indices()
