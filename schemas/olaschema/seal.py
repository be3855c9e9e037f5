"""The root manifest: what metadata a finished store has.

Each document shows by its own digest that it was not changed; only a list of them shows that one is lost, or was put
back from an older copy. A run takes its teachers off the list before it changes anything and puts them on it when it
has finished, so the list is a function of the finished store, whatever happened on the way. Callers hold the lock
`plan`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError
from olaschema.layout import array_document, basis_file, receipt_file
from olaschema.ledger import read_ledger
from olaschema.manifest import FileReceipt, StoreManifest
from olaschema.store import FeatureStore, read_document

MANIFEST = "manifest.json"


def read_manifest(store: FeatureStore) -> StoreManifest | None:
    """Return the manifest, None where no run has finished; raises DamagedStoreError."""
    if not store.place.exists(MANIFEST):
        return None
    return read_document(StoreManifest, store.place, MANIFEST)


def unseal(store: FeatureStore, teachers: Iterable[str]) -> None:
    """Take `teachers` and the documents outside `receipts/` off the manifest: they are about to change."""
    try:
        manifest = read_manifest(store)
    except DamagedStoreError:
        store.place.remove(MANIFEST)  # it says nothing any more, and the run that is about to start writes it again
        return
    if manifest is None:
        return
    changing = set(teachers)
    kept = {name: digest for name, digest in manifest.receipts.items() if name not in changing}
    if manifest.files or kept != manifest.receipts:
        store.place.publish(MANIFEST, sealed(StoreManifest(files={}, receipts=kept)))


def seal(store: FeatureStore, teachers: Iterable[str]) -> None:
    """Put the complete ones of `teachers`, and the documents, on the manifest; what is on it stays as it is.

    Raises DamagedStoreError where the present manifest is damaged.
    """
    manifest = read_manifest(store) or StoreManifest(files={}, receipts={})
    receipts = dict(manifest.receipts)
    for name in teachers:
        every = list(range(store.shard_count()))
        if name not in receipts and store.committed(name) == every:
            ledger = read_ledger(store, name, keep=True)
            if ledger.shards.tolist() == every:
                receipts[name] = ledger.digests
    files = manifest.files or {name: _promise(store.place.read(name)) for name in documents(store)}
    data = sealed(StoreManifest(files=files, receipts=receipts))
    if not store.place.exists(MANIFEST) or store.place.read(MANIFEST) != data:
        store.place.publish(MANIFEST, data)


def documents(store: FeatureStore) -> list[str]:
    """Return the names of the metadata documents outside `receipts/`, but the manifest."""
    names = ["zarr.json"]
    names += [f"samples/{name}" for name in store.place.names("samples") if name.endswith(".json")]
    for teacher in store.teachers():
        arrays = store.array_names(teacher)
        if store.place.exists(basis_file(teacher)):
            names.append(basis_file(teacher))
        names += [f"{teacher}/zarr.json", *(array_document(teacher, array) for array in arrays)]
    return names


def receipt_digest(store: FeatureStore, teacher: str, shard: int) -> str:
    """Return the SHA-256 of a receipt's file; raises StoreError if it is missing."""
    return hashlib.sha256(store.place.read(receipt_file(teacher, shard))).hexdigest()


def _promise(data: bytes) -> FileReceipt:
    return FileReceipt(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
