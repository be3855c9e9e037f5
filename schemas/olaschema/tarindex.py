"""Where the members of a tar file are, from its headers alone: nothing is unpacked, no link is followed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from olaschema.errors import ImageError
from olaschema.keys import normalise_key

BLOCK = 512
_LONGEST_NAME = 1 << 20
_LARGEST = 1 << 60
"""Bytes of a member; offsets must stay within 64 bits."""
_REGULAR = b"0\x007"
# Types without data, whatever size their header names (POSIX.1-2008, pax interchange format).
_EMPTY = b"123456"


class Member(NamedTuple):
    """One member that is no folder. `name` is as it was written; bytes that are no UTF-8 are surrogates.

    `regular` is false for links, devices and pipes. `offset` and `size` are of the data, in bytes.
    """

    name: str
    offset: int
    size: int
    regular: bool


class TarDamage(Exception):
    """The headers cannot be read from byte `offset` on; `problem` says why."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(offset, problem)
        self.offset = offset
        self.problem = f"the tar file is damaged at byte {offset}: {problem}"


def members(handle: int) -> Iterator[Member]:
    """Yield the members of an open tar file in order: ustar, GNU and pax headers.

    Raises TarDamage where a header is damaged or cut short, and at the end if the end-of-archive mark is missing;
    OSError if the file cannot be read. A member whose data is cut short is yielded before.
    """
    end = os.fstat(handle).st_size
    offset = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        header = os.pread(handle, BLOCK, offset)
        if not header:
            raise TarDamage(offset, "it ends without an end-of-archive mark, so it may have been cut short")
        if len(header) < BLOCK:
            raise TarDamage(offset, "it ends inside a header")
        kind = header[156:157]
        if header[:1] == b"\0" and not header.strip(b"\0"):
            return
        _check(header, offset)
        size = _number(header[124:136], offset)
        data = offset + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if size > _LONGEST_NAME or data + size > end:
                raise TarDamage(offset, "an extended header is too long")
            text = os.pread(handle, size, data)
            if kind == b"L":
                long_name = _text(text.rstrip(b"\0"))
            elif kind == b"x":
                fields = _pax(text, offset)
                if any(name.startswith("GNU.sparse") for name in fields):
                    raise TarDamage(offset, "sparse members cannot be read")
                long_name = fields.get("path", long_name)
                long_size = _pax_size(fields, offset)
            offset = data + _padded(size)
            continue
        if kind == b"S":
            raise TarDamage(offset, "sparse members cannot be read")
        name = long_name if long_name is not None else _name(header)
        size = long_size if long_size is not None else size
        long_name = long_size = None
        if size > _LARGEST:
            raise TarDamage(offset, "a header gives a member more bytes than any file has")
        stored = 0 if kind in _EMPTY else size
        if kind != b"5" and not (kind == b"\0" and name.endswith("/")):
            yield Member(name, data, size, kind in _REGULAR)
        offset = data + _padded(stored)


def _check(header: bytes, offset: int) -> None:
    promised = _number(header[148:156], offset)
    if promised != sum(header) - sum(header[148:156]) + 8 * 0x20:
        raise TarDamage(offset, "a header has a wrong checksum")


def _number(field: bytes, offset: int) -> int:
    if field[0] == 0x80:  # base 256, for what octal digits cannot hold; 0xff begins a negative number
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarDamage(offset, "a header holds no number where one belongs")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes, offset: int) -> dict[str, str]:
    """Return the records of a pax header: each is its own length, a space, `KEY=VALUE` and a line feed."""
    fields = {}
    while data:
        digits = data.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        whole = len(digits) + 1 < length <= len(data)
        record, data = data[len(digits) + 1 : length], data[length:]
        if not whole or not record.endswith(b"\n"):
            raise TarDamage(offset, "a pax header is malformed")
        key, _, value = record[:-1].partition(b"=")
        fields[_text(key)] = _text(value)
    return fields


def _pax_size(fields: dict[str, str], offset: int) -> int | None:
    if "size" not in fields:
        return None
    if not (fields["size"].isascii() and fields["size"].isdigit() and len(fields["size"]) < 20):
        raise TarDamage(offset, "a pax header is malformed")
    return int(fields["size"])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class TarIndex:
    """Name → place of the data, for one tar file; 24 bytes per member.

    The first member of a name counts. Names are held as 64-bit hashes.
    """

    def __init__(self, handle: int) -> None:
        self.damage: TarDamage | None = None
        hashes, offsets, sizes = [], [], []
        try:
            for member in members(handle):
                try:
                    name = normalise_key(member.name)
                except ImageError:  # listed as a problem, never read
                    continue
                hashes.append(_hash(name))
                offsets.append(member.offset)
                sizes.append(member.size if member.regular else -1)
        except TarDamage as damage:
            self.damage = damage
        found, first = np.unique(np.array(hashes, dtype=np.uint64), return_index=True)
        self._hashes = found
        self._offsets = np.array(offsets, dtype=np.int64)[first]
        self._sizes = np.array(sizes, dtype=np.int64)[first]

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, name: str) -> tuple[int, int] | None:
        """Return offset and size of a member's data, size -1 if it is a link or a device; None if it is not there."""
        wanted = np.uint64(_hash(name))
        place = int(np.searchsorted(self._hashes, wanted))
        if place == len(self._hashes) or self._hashes[place] != wanted:
            return None
        return int(self._offsets[place]), int(self._sizes[place])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")
