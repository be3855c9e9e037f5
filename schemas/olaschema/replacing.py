"""Replacing a committed shard so that a kill at any moment loses none of its features.

A shard's files have fixed names, so they cannot be exchanged together with their receipt at once. What takes their
place is therefore written beside first, under `_log/replacing/TEACHER/SHARD`, its receipt last; then the old receipt
goes, the files are exchanged, and the new receipt comes. Killed before the old receipt goes, the old shard stands.
Killed after, whoever next writes to the teacher finishes it: rows that the new shard keeps, of images that are gone,
are in nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError
from olaschema.layout import receipt_file, shard_lock
from olaschema.manifest import Receipt
from olaschema.place import Place

REPLACING = "_log/replacing"
_RECEIPT = "receipt.json"


def note_replacement(place: Place, receipt: Receipt, objects: Mapping[str, bytes]) -> None:
    """Write down what a shard will be; the caller holds the shard's lock."""
    folder = _folder(receipt.teacher, receipt.shard)
    place.remove(f"{folder}/{_RECEIPT}")  # of a replacement that was superseded
    for name, data in objects.items():
        place.publish(f"{folder}/{_flat(name)}", data)
    place.publish(f"{folder}/{_RECEIPT}", sealed(receipt))


def drop_note(place: Place, teacher: str, shard: int) -> None:
    """Delete what was noted, the receipt first; the caller holds the shard's lock."""
    folder = _folder(teacher, shard)
    place.remove(f"{folder}/{_RECEIPT}")
    for name in place.names(folder):
        place.remove(f"{folder}/{name}")


def finish_replacement(place: Place, teacher: str, shard: int) -> None:
    """Finish the replacement of one shard that was stopped; the caller holds the shard's lock.

    Where the shard has a receipt, the old or the new one, it stands and the note is deleted. Raises DamagedStoreError
    where what was noted is not what its receipt promises.
    """
    # imported late: store.py imports this module
    from olaschema.store import read_document

    folder = _folder(teacher, shard)
    if not place.names(folder):
        return
    noted = f"{folder}/{_RECEIPT}"
    if not place.exists(receipt_file(teacher, shard)) and place.exists(noted):
        receipt = read_document(Receipt, place, noted)
        for name, promised in receipt.files.items():
            data = place.read(f"{folder}/{_flat(name)}")
            if hashlib.sha256(data).hexdigest() != promised.sha256:
                raise DamagedStoreError(
                    f"{place.locate(folder)}/{_flat(name)} is damaged: it was to replace {name}",
                    f"Delete {place.locate(folder)} and run `olapipe extract` again; features of images that are "
                    "gone, which only this file still had, are lost.",
                )
            place.publish(name, data)
        place.publish(receipt_file(teacher, shard), sealed(receipt))
    drop_note(place, teacher, shard)


def finish_replacements(place: Place, teacher: str) -> None:
    """Finish all replacements of a teacher's shards that were stopped; raises as `finish_replacement` does."""
    for name in place.folders(f"{REPLACING}/{teacher}"):
        with place.lock(shard_lock(teacher, int(name))):
            finish_replacement(place, teacher, int(name))


def _folder(teacher: str, shard: int) -> str:
    return f"{REPLACING}/{teacher}/{shard:05d}"


def _flat(name: str) -> str:
    return name.replace("/", "%2F")
