"""What a teacher's files were when it was last loaded for a store, so that comparing need not load it again.

A note per teacher in `_log/teachers`: the record that loading gave, and the mark of all it follows from. It is a log:
losing it costs one loading, and one that does not fit is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import olaschema
from olapipe import load
from olapipe.config import ExtractConfig
from olapipe.load import libraries_of
from olapipe.teachers import registry
from olapipe.teachers.catalogue import BUILT_IN
from olapipe.teachers.checkpoint import hub_copy, local_path
from olaschema.digest import sealed
from olaschema.errors import StoreError
from olaschema.manifest import Frozen, TeacherRecord
from olaschema.place import Place
from olaschema.store import read_document

FOLDER = "_log/teachers"
# A file that is written again within one tick of the clock that dates it, after it was looked at, shows no change.
_SETTLED_SECONDS = 2.0


class TeacherNote(Frozen):
    """A teacher's record as loading gave it, and the mark by which it is known again."""

    mark: str
    record: TeacherRecord


def marks(config: ExtractConfig) -> dict[str, str]:
    """Return a digest of all that the record of each teacher follows from; to be taken before it is loaded.

    That is, beside settings, code and libraries, of every file of the checkpoint its name, size, inode and the times
    of its last change: any write gives another time (ctime), which no program can set, so content need not be read. A
    teacher is left out where this is not known: it is of another package, or its files are not on this machine or
    changed a moment ago.
    """
    found = {}
    for name in config.teachers:
        files = _files(config, name)
        if files is not None:
            settings = [config.preset, config.compute_dtype, config.compile, config.options.get(name, {})]
            found[name] = _digest([name, files, settings, _code(), libraries_of(name)])
    return found


def remember(place: Place, taken: Mapping[str, str], records: Mapping[str, TeacherRecord]) -> None:
    """Leave a note of each teacher that has a mark."""
    for name, mark in taken.items():
        place.publish(f"{FOLDER}/{name}.json", sealed(TeacherNote(mark=mark, record=records[name])))


def recall(place: Place, taken: Mapping[str, str]) -> dict[str, TeacherRecord]:
    """Return what loading would give of those teachers whose mark is that of their note."""
    found = {}
    for name, mark in taken.items():
        try:
            note = read_document(TeacherNote, place, f"{FOLDER}/{name}.json")
        except StoreError:  # there is none, or it is damaged
            continue
        if note.mark == mark:
            found[name] = note.record
    return found


def _files(config: ExtractConfig, name: str) -> list[tuple[str, int, int, int, int]] | None:
    """Return name, size, inode and both times of change of every file of a checkpoint, None where unknown."""
    built_in = {info.name: info for info in BUILT_IN}
    if registry.available()[name] is not built_in.get(name):
        return None
    given = config.checkpoints.get(name) or built_in[name].published
    if not given:
        return None
    root = local_path(name, given) or hub_copy(given)
    if root is None:
        return None
    found = []
    try:
        for path in sorted(_walk(root)):
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError:
        return None
    latest = max((max(mtime, ctime) for *_, mtime, ctime in found), default=0)
    return found if latest < (time.time() - _SETTLED_SECONDS) * 1e9 else None


def _walk(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    return [Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names]


def _code() -> str:
    """Return a digest of the code that makes records, which changes between two versions while it is worked on."""
    folders = (Path(registry.__file__).parent, Path(olaschema.__file__).parent)
    sources = [Path(load.__file__), *(path for folder in folders for path in sorted(folder.glob("*.py")))]
    return _digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in sources])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
