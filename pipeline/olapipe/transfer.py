"""What `copy` and `merge` share: a target that is no store until it is complete, a job that a rerun goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from olapipe.progress import Reporter
from olapipe.verify import verify
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.layout import receipt_file
from olaschema.nesting import require_outside_stores
from olaschema.place import Place, open_place
from olaschema.replacing import REPLACING
from olaschema.seal import documents, receipt_digest
from olaschema.store import FeatureStore

ROOT = "zarr.json"
_LOG = "origin.log"
_NAMED = 5


def identity(store: FeatureStore) -> str:
    """Return a digest over all documents of a store: what it holds, without reading a feature."""
    told = hashlib.sha256()
    for name in documents(store):
        told.update(f"{name} {hashlib.sha256(store.place.read(name)).hexdigest()}\n".encode())
    for teacher in store.teachers():
        for shard in store.committed(teacher):
            told.update(f"{receipt_file(teacher, shard)} {receipt_digest(store, teacher, shard)}\n".encode())
    return told.hexdigest()


def begin(out: str, job: str) -> Place:
    """Return the place to write to: an empty one, or one where the same job was interrupted.

    Raises StoreError where anything else is there. Without its root document, which comes last, it is no store.
    """
    place = open_place(out)
    require_outside_stores(out)
    if place.vacant():
        place.append_log(_LOG, job)
        return place
    if place.read_log(_LOG).splitlines()[-1:] != [job.encode()]:
        raise StoreError(
            f"{out} exists, and it is not what an interrupted run of the same command left",
            "Choose a new or empty place; to begin again, delete this one.",
        )
    place.sweep()
    return place


def require_finished(stores: Sequence[FeatureStore]) -> None:
    """Raise StoreError where a shard is half replaced: features of images that are gone are under `_log` alone then."""
    for store in stores:
        for teacher in store.teachers():
            for name in store.place.folders(f"{REPLACING}/{teacher}"):
                if not store.place.exists(receipt_file(teacher, int(name))):
                    raise StoreError(
                        f"{store.url}: {teacher} shard {int(name)} was being replaced when its job ended",
                        "Run that `olapipe extract` again, which finishes it, then the same command.",
                    )


def require_unchanged(stores: Sequence[FeatureStore], before: Sequence[str]) -> None:
    """Raise StoreError if a store has changed since its identity was taken."""
    for store, told in zip(stores, before, strict=True):
        if identity(store) != told:
            raise StoreError(
                f"{store.url} has changed while it was read",
                "Wait until nothing else writes to it, delete the unfinished target, and run the same command again.",
            )


def require_intact(out: str, reporter: Reporter) -> None:
    """Verify a store that was just written; what is wrong is no store any more, and DamagedStoreError names it."""
    problems = verify(out, reporter).problems
    if problems:
        open_place(out).remove(ROOT)
        shown = "; ".join(f"{problem.file}: {problem.text}" for problem in problems[:_NAMED])
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise DamagedStoreError(
            f"{out} is not what it should be: {shown}{more}",
            "Check the sources with `olapipe verify`, delete this unfinished store, and run the same command again.",
        )
