"""Writing a committed shard again with some rows blank or filled: files first, then the receipt.

Stopped in between, the receipt is the old one and the shard counts as damaged; a second call with the same changes
sees rows that are changed already, and goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from olapipe.stored import UNREADABLE, StoredArray, array_shard_file, decode, stored_basis
from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError
from olaschema.layout import receipt_file, shard_lock
from olaschema.manifest import ChannelStatistics, FileReceipt, Receipt, RowReceipt
from olaschema.precision import Stored
from olaschema.replacing import finish_replacement
from olaschema.store import FeatureStore
from olaschema.zarrbytes import encode_like


@dataclass(frozen=True)
class Change:
    """What one row becomes: its receipt, and its values, or None for a row without."""

    receipt: RowReceipt
    values: Stored | None = None


def rewrite(store: FeatureStore, teacher: str, shard: int, changes: Mapping[int, Change], *, remedy: str) -> bool:
    """Change rows, by their place in the shard; says whether the shard is committed.

    Bytes of a shard that is not committed are deleted, as they may hold such a row too. The statistics are computed
    again from the stored values, if values have changed. Raises DamagedStoreError with `remedy` for a damaged shard.
    """
    documents = store.arrays(teacher)
    # scales and offsets come before the integers: whoever reads in between gets NaN, and never 0 times a scale
    order = sorted(documents, key=lambda array: array == "values")
    names = {array: array_shard_file(teacher, array, shard, documents[array]) for array in order}
    with store.place.lock(shard_lock(teacher, shard)):
        finish_replacement(store.place, teacher, shard)  # which may hold such a row, too
        receipt = store.receipt(teacher, shard)
        if receipt is None:
            for name in names.values():
                store.place.remove(name)
            return False
        rows = list(receipt.rows)
        for index, change in changes.items():
            rows[index] = change.receipt
        if rows == list(receipt.rows):
            return True
        update: dict[str, object] = {
            "rows": tuple(rows),
            "revision": sum(seen.reason == "forgotten" for seen in rows),
        }
        moved = any(receipt.rows[index].stored != change.receipt.stored for index, change in changes.items())
        if moved:
            arrays, files = {}, {}
            for array, name in names.items():
                data = store.place.read(name)
                values = _values(store, name, data, documents[array], array, receipt, changes, remedy)
                arrays[array] = values
                encoded = encode_like(documents[array], values)
                if encoded != data:
                    store.place.publish(name, encoded)
                files[name] = FileReceipt(bytes=len(encoded), sha256=hashlib.sha256(encoded).hexdigest())
            record = store.teacher(teacher)
            channels, basis = record.fingerprint.channels, stored_basis(store, record)
            statistics = ChannelStatistics(channels)
            for place, seen in enumerate(rows):
                if seen.stored:
                    statistics.update(decode({name: values[place] for name, values in arrays.items()}, channels, basis))
            update |= {"files": files, "statistics": statistics.to_json()}
        store.place.publish(receipt_file(teacher, shard), sealed(receipt.model_copy(update=update)))
    return True


def _values(
    store: FeatureStore,
    name: str,
    data: bytes,
    document: bytes,
    array: str,
    receipt: Receipt,
    changes: Mapping[int, Change],
    remedy: str,
) -> np.ndarray:
    """Return one array of the shard with the changes; raises DamagedStoreError."""
    problem = f"{store.place.locate(name)} is damaged, so nothing can be taken out of it"
    try:
        stored = StoredArray(document, data, store.rows_per_shard)
        values = stored.whole()
    except UNREADABLE as error:
        raise DamagedStoreError(problem, remedy) from error
    promised = receipt.files.get(name)
    if promised is None or hashlib.sha256(data).hexdigest() != promised.sha256:
        # what an interrupted call has left has these rows changed and no others; integers may be 0 in those as well
        filled = {index for index, change in changes.items() if change.values is not None}
        others = [place for place in range(len(values)) if place not in filled]
        empty = np.asarray([place in changes or not receipt.rows[place].stored for place in others])
        blank = stored.blank(values)[others]
        if not blank[empty].all() or (np.isnan(stored.fill) and blank[~empty].any()):
            raise DamagedStoreError(problem, remedy)
    for index, change in changes.items():
        values[index] = stored.fill if change.values is None else change.values.arrays[array]
    return values
