"""The files below a folder, in the order of the bytes of their paths, one folder's names in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from olaschema.errors import CorpusError


def walk(root: Path) -> Iterator[bytes]:
    """Yield the paths of all files below `root`, relative to it.

    Links to folders are followed if they lead out of `root`, and each folder outside is listed once, under the first
    link that leads there; what a link leads to inside of `root` is listed under its own path. So folders that link to
    each other end, and are not listed under every combination of links. Raises CorpusError for a folder that cannot
    be listed.
    """
    top = os.path.realpath(os.fsencode(root))
    yield from _below(os.fsencode(root), b"", top, set(), linked=False)


def _below(folder: bytes, prefix: bytes, top: bytes, outside: set[tuple[int, int]], *, linked: bool) -> Iterator[bytes]:
    """`outside`: the folders outside of `top` that were listed. `linked`: this is one of them."""
    try:
        with os.scandir(folder) as scan:
            # a folder sorts as its name and a slash: then walking in order is the order of whole paths
            names = [entry.name + b"/" if _leads_on(entry) else entry.name for entry in scan]
    except OSError as error:
        raise CorpusError(
            f"{os.fsdecode(folder)} cannot be listed: {error.strerror}",
            "Make the folder readable, or take it out of the corpus.",
        ) from error
    names.sort()
    for name in names:
        if not name.endswith(b"/"):
            yield prefix + name
            continue
        path = os.path.join(folder, name[:-1])
        leads_out = linked or os.path.islink(path)
        if not leads_out or _first_visit(path, top, outside):
            yield from _below(path, prefix + name, top, outside, linked=leads_out)


def _leads_on(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: no folder, and as an image it is one that cannot be read
        return False


def _first_visit(path: bytes, top: bytes, seen: set[tuple[int, int]]) -> bool:
    real = os.path.realpath(path)
    if real == top or real.startswith(top.rstrip(b"/") + b"/") or top.startswith(real.rstrip(b"/") + b"/"):
        return False
    try:
        status = os.stat(path)
    except OSError:
        return False
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return False
    seen.add(identity)
    return True
