"""The command `drop`: a teacher leaves the store."""

from __future__ import annotations

from collections.abc import Callable

from olaschema.layout import basis_file
from olaschema.lease import writing
from olaschema.replacing import REPLACING
from olaschema.seal import seal, unseal
from olaschema.store import FeatureStore


def drop(store: FeatureStore, teacher: str, *, say: Callable[[str], None] | None = None) -> bool:
    """Remove a teacher's receipts, then its group with all arrays; a second call finishes an interrupted one.

    Each step takes a whole folder away at once, and the bytes are deleted afterwards. Says whether the teacher was in
    the store; raises StoreError where it was not and there was nothing to finish either.
    """
    if not teacher or "/" in teacher:
        store.teacher(teacher)  # raises: no teacher is called so
    with writing(store.place, [teacher], wait=False, say=say), store.place.lock("plan"):
        present = teacher in store.teachers()
        if present:
            unseal(store, [teacher])
            store.place.withdraw(f"{REPLACING}/{teacher}")
            store.place.withdraw(f"receipts/{teacher}")
            store.place.withdraw(teacher)
        store.place.remove(basis_file(teacher))
        finished = store.place.clear_withdrawn()
        seal(store, [])
    if not present and not finished:
        store.teacher(teacher)  # says which there are
    return present
