"""One image of a listing, and the key it is planned under."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

from olaschema.errors import ImageError
from olaschema.keys import normalise_key
from olaschema.manifest import SampleRow

Problem = Literal["bad-name", "outside-root"]


class Entry(NamedTuple):
    """One image of the listing; its uri is its key. `size` is in bytes, -1 where the listing does not know one."""

    key: str
    size: int
    problem: Problem | None = None

    def sample(self) -> SampleRow:
        """Return the row to plan; the store assigns its number."""
        return SampleRow(row=0, key=self.key, uri=self.key, size=self.size, problem=self.problem)


def make_key(name: str) -> tuple[str, Problem | None]:
    """Return the key of a path, or a name of the same kind for a path that cannot have one.

    No key starts with `/`, `./` or `../`, so these stand-ins cannot collide with keys; they are injective (up to a
    hash) and hold neither an absolute path nor the signature of a URL.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return _escaped(name), "bad-name"
    try:
        return normalise_key(name), None
    except ImageError as error:
        if error.reason == "bad-name":
            return _escaped(name), "bad-name"
        if name.startswith(("/", "pipe:")) or "://" in name:
            base = name.partition("?")[0].rstrip("/").rpartition("/")[2]
            return f"/…/{base}#{hashlib.sha256(name.encode()).hexdigest()[:8]}", "outside-root"
        return name if name.startswith("../") else f"./{name}", "outside-root"


def _escaped(name: str) -> str:
    # file names that are not UTF-8 arrive with surrogates for their bytes; JSON may hold surrogates of its own
    text = name.replace("\\", "\\\\").replace("\0", "\\x00")
    shown = "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else f"\\u{ord(c):04x}" if _surrogate(c) else c
        for c in text
    )
    return f"./{shown}"


def _surrogate(character: str) -> bool:
    return 0xD800 <= ord(character) <= 0xDFFF
