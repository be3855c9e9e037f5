"""A shard that is encoded again keeps the features of images that can no longer be used."""

from __future__ import annotations

import hashlib

from olaschema.errors import DamagedStoreError, StoreError
from olaschema.manifest import ChannelStatistics, Receipt, RowReceipt, TeacherRecord
from olaschema.precision import Stored, decode
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore


def keep_features(
    store: FeatureStore,
    record: TeacherRecord,
    shard: int,
    stored: Stored,
    rows: list[RowReceipt],
    statistics: ChannelStatistics,
) -> None:
    """Put back, bit for bit, the committed features of rows that have failed now; the arguments are changed.

    Only from a shard whose files have the digests of its receipt: of a damaged one nothing is known to be right. What
    another row shares is kept with it, and a row that shares one goes on doing so.
    """
    teacher = record.fingerprint.teacher
    lost = [index for index, row in enumerate(rows) if row.status == "failed" and row.reason != "forgotten"]
    present = _sound(store, teacher, shard) if lost else None
    if present is None:
        return
    reader = FeatureReader(store, teacher)
    for index in lost:
        before = present.rows[index]
        if before.status != "ok":
            continue
        try:
            feature = reader.read(shard * store.rows_per_shard + index)
        except DamagedStoreError:
            continue  # the row that it shares has no feature of this image any more
        rows[index] = before
        if before.same_as is None:
            stored[index] = feature
            statistics.update(decode(feature, record.fingerprint.channels, reader.basis)[None])


def _sound(store: FeatureStore, teacher: str, shard: int) -> Receipt | None:
    """Return the receipt of a shard whose files are those it promises, None where there is no such shard."""
    try:
        receipt = store.receipt(teacher, shard)
        for name, promised in receipt.files.items() if receipt is not None else ():
            data = store.place.read(name)
            if (len(data), hashlib.sha256(data).hexdigest()) != (promised.bytes, promised.sha256):
                return None
    except StoreError:
        return None
    return receipt
