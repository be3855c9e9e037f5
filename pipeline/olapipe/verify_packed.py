"""Every byte of a packed training set, checked against what its documents promise."""

from __future__ import annotations

from collections.abc import Iterator

from olapipe.pack import promise
from olaschema.errors import StoreError
from olaschema.packed import PackedSet
from olaschema.tarshard import CONVERSATIONS, LISTING, ROOT, Tar, crc32c, index_name, member_path, tar_name


def verify_packed(packed: PackedSet) -> list[tuple[str, str]]:
    """Check every byte of a set; returns name (with the member, for a tar) and problem of all that is wrong."""
    found: list[tuple[str, str]] = []
    for name, promised in packed.record.files.items():
        if not packed.place.exists(name) or promise(packed.place.read(name)) != promised:
            found.append((name, f"is not the file that {ROOT} promises"))
    for number, tar in enumerate(packed.record.tars):
        found += _verify_tar(packed, number, tar)
    wanted = {n(number) for number in range(len(packed.record.tars)) for n in (tar_name, index_name)}
    known = wanted | {LISTING, CONVERSATIONS, ROOT}
    return found + [(name, "is named by nothing") for name in packed.place.walk() if name not in known]


def _verify_tar(packed: PackedSet, number: int, tar: Tar) -> Iterator[tuple[str, str]]:
    name = tar_name(number)
    try:
        index = packed.index(number)
    except StoreError as error:
        yield index_name(number), error.problem
        index = None
    if not packed.place.exists(name):
        yield name, "is missing"
        return
    data = packed.place.read(name)
    if promise(data) == tar.tar:
        return
    yield name, f"is not the file that {ROOT} promises"
    for sample in index.samples if index else ():
        for member in sample.members:
            if crc32c(data[member.offset : member.offset + member.bytes]) != member.crc32c:
                yield f"{name}: {member_path(sample.number, member.name)}", "fails its checksum"
