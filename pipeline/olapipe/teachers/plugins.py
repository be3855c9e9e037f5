"""Teachers of other packages, found through the entry point group `olapipe.teachers`."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points

from olapipe.teachers.info import TeacherInfo
from olaschema.errors import OlaError

GROUP = "olapipe.teachers"
# Importing somebody's module can raise whatever that module raises.
_IMPORT_ERRORS = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, OSError, RuntimeError,
    ArithmeticError, AssertionError, OlaError,
)  # fmt: skip


def discover(built_in: Collection[str]) -> dict[str, TeacherInfo]:
    """Return the teachers of installed packages by name; one that cannot be used has a `problem`.

    A name that a built-in teacher or another package has too is refused for all of them.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    teachers = {}
    for name in sorted(found):
        points = sorted(found[name], key=_where)
        owners = [_where(point) for point in points]
        if name in built_in:
            owners.insert(0, "the built-in teacher")
        if len(owners) > 1:
            teachers[name] = _unusable(name, f"several teachers have this name: {' and '.join(owners)}")
        else:
            teachers[name] = _info(points[0])
    return teachers


def _info(point: EntryPoint) -> TeacherInfo:
    try:
        value = point.load()
        info = value if isinstance(value, TeacherInfo) else value()
    except _IMPORT_ERRORS as error:
        return _unusable(point.name, f"{_where(point)} cannot be imported: {type(error).__name__}: {error}")
    if not isinstance(info, TeacherInfo):
        return _unusable(point.name, f"{_where(point)} gives a {type(info).__name__}, not a TeacherInfo")
    if info.name != point.name:
        return _unusable(point.name, f"{_where(point)} calls its teacher {info.name!r}: both names must be the same")
    return info


def _where(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unnamed package"
    return f"{point.value} of {package}"


def _unusable(name: str, problem: str) -> TeacherInfo:
    return TeacherInfo(name=name, published="", licence="", about="", grid=None, channels=0, module="", problem=problem)
