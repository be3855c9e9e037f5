"""Which teachers exist and how they are loaded. Importing this imports neither torch nor transformers."""

from __future__ import annotations

from olapipe.teachers.base import Teacher, TeacherSettings, suggest
from olapipe.teachers.catalogue import BUILT_IN
from olapipe.teachers.info import TeacherInfo
from olapipe.teachers.plugins import discover
from olaschema.errors import TeacherError

__all__ = ["TeacherInfo", "available", "load"]


def available() -> dict[str, TeacherInfo]:
    """Return the teachers by name: the built-in ones in the order they are listed, then those of other packages.

    One that cannot be used is listed too; its `problem` says why.
    """
    built_in = {info.name: info for info in BUILT_IN}
    return built_in | discover(built_in)


def load(name: str, settings: TeacherSettings) -> Teacher:
    """Load a teacher by name; raises TeacherError where it is unknown or cannot be loaded."""
    known = available()
    if name not in known:
        raise TeacherError(f"there is no teacher {name!r}", suggest(name, known, "teachers"))
    return known[name].load(settings)
