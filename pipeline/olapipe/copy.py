"""The command `copy`: a store at another place, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

from olapipe.progress import Reporter
from olapipe.transfer import ROOT, begin, identity, require_finished, require_intact, require_unchanged
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.store import FeatureStore


@dataclass(frozen=True)
class Copied:
    """How much was copied; `present` files were there already, from an interrupted run."""

    files: int
    bytes: int
    present: int


def copy(source: FeatureStore, out: str, reporter: Reporter) -> Copied:
    """Copy all files outside `_log/` and verify the result.

    Values come before receipts, and the root document last. A second call finishes an interrupted one: it reads what
    is there and writes what differs. Raises StoreError where `out` holds something else or the source
    changes meanwhile, DamagedStoreError where the result is not a sound store.
    """
    require_finished([source])
    before = identity(source)
    place = begin(out, f"copy {before}")
    if place.exists(ROOT) and identity(FeatureStore(place, source.record)) != before:
        raise StoreError(f"{out} has changed since it was copied", "Choose a new place.")
    names = sorted((name for name in source.place.walk() if name != ROOT), key=_order)
    size, present = 0, 0
    reporter.say(f"copying {len(names) + 1} files …")
    for name in [*names, ROOT]:
        if name == ROOT:
            require_unchanged([source], [before])
        data = source.place.read(name)
        size += len(data)
        if place.exists(name) and place.size(name) == len(data) and place.read(name) == data:
            present += 1
            continue
        place.publish(name, data)
    require_intact(out, reporter)
    if identity(FeatureStore(place, source.record)) != before:
        place.remove(ROOT)
        raise DamagedStoreError(
            f"{out} is not what was written to it", "Check the disk, and run the same command again."
        )
    return Copied(len(names) + 1, size, present)


def _order(name: str) -> tuple[int, str]:
    return (2 if name == "manifest.json" else 1 if name.startswith("receipts/") else 0, name)
