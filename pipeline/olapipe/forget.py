"""The command `forget`: one image leaves the plan and the bytes of every teacher, and does not come back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from olapipe.corpus import PROBLEMS
from olapipe.report import visible
from olapipe.stored import UNREADABLE, StoredArray, array_shard_file, committed_receipt, decode
from olaschema.digest import sealed
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.keys import normalise_key, tombstone
from olaschema.layout import receipt_file, shard_lock
from olaschema.manifest import ChannelStatistics, FileReceipt, Generation, RowReceipt, SampleRow
from olaschema.seal import seal, unseal
from olaschema.store import FeatureStore
from olaschema.zarrbytes import encode_like


@dataclass(frozen=True)
class Forgotten:
    """What was done. `twins` are the keys of other images with the same bytes, which are still in the store."""

    row: int
    tombstone: str
    teachers: list[str]
    twins: list[str]
    logs: list[str]
    """Files under `_log/` that hold the key in some message."""


def forget(store: FeatureStore, key: str) -> Forgotten:
    """Remove one image from the plan and from every teacher's shards; a second call finishes an interrupted one.

    The plan keeps its row and a tombstone with the SHA-256 of its key, by which `extract` knows not to take it again.
    Raises StoreError where the store has no such image, DamagedStoreError where a shard of it must be repaired first.
    """
    stone = tombstone(normalise_key(key))
    with store.place.lock("plan"):
        generation, part, row = _find(store, key, stone)
        teachers = store.teachers()
        twins = _twins(store, teachers, row)
        unseal(store, teachers)
        # the plan comes first: whatever extracts this shard from now on leaves the image out
        _bury(store, generation, part, row, stone)
        for teacher in teachers:
            _erase(store, teacher, row)
        seal(store, teachers)
    logs = [name for name in store.place.logs() if key.encode() in store.place.read_log(name)]
    return Forgotten(row, stone, teachers, twins, [store.place.locate(f"_log/{name}") for name in logs])


def _find(store: FeatureStore, key: str, stone: str) -> tuple[Generation, str, int]:
    wanted = {key, normalise_key(key), stone}
    for generation in store.generations():
        for part in generation.parts:
            for sample in store.part_samples(generation, part):
                if sample.key in wanted:
                    return generation, part, sample.row
    raise StoreError(
        f"{store.url} has no image {visible(key)}", "Keys are paths relative to the image folder, with extension."
    )


def _bury(store: FeatureStore, generation: Generation, part: str, row: int, stone: str) -> None:
    """Put a tombstone into the plan. The part gets a new name, so that the generation changes all at once."""
    images = list(store.part_samples(generation, part))
    place = row - images[0].row
    if images[place].problem != "forgotten":
        images[place] = SampleRow(row=row, key=stone, uri=stone, size=-1, problem="forgotten")
        revision = sum(image.problem == "forgotten" for image in images)
        number = list(generation.parts).index(part)
        name = f"samples/{generation.number:04d}-{number:05d}-r{revision}.parquet"
        data = store.part_bytes(images, images[0].row)
        store.place.publish(name, data)
        parts = dict(generation.parts)
        del parts[part]
        parts[name] = FileReceipt(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        generation = generation.model_copy(update={"parts": dict(sorted(parts.items()))})
        store.place.publish(f"samples/{generation.number:04d}.json", sealed(generation))
    for found in store.place.names("samples"):
        if found.startswith(f"{generation.number:04d}-") and f"samples/{found}" not in generation.parts:
            store.place.remove(f"samples/{found}")


def _twins(store: FeatureStore, teachers: list[str], row: int) -> list[str]:
    """Return the keys of other images whose files have the same digest."""
    found: set[int] = set()
    shard, index = divmod(row, store.rows_per_shard)
    for teacher in teachers:
        receipt = store.receipt(teacher, shard)
        digest = receipt.rows[index].sha256 if receipt is not None else None
        if digest is None:
            continue
        for other in store.committed(teacher):
            rows = committed_receipt(store, teacher, other).rows
            found |= {other * store.rows_per_shard + i for i, seen in enumerate(rows) if seen.sha256 == digest}
    found.discard(row)
    shards = sorted({twin // store.rows_per_shard for twin in found})
    return [sample.key for shard in shards for sample in store.shard_samples(shard) if sample.row in found]


def _erase(store: FeatureStore, teacher: str, row: int) -> None:
    """Write one teacher's shard again without an image: files first, then the receipt.

    Stopped in between, the receipt is the old one; a second call sees that the row is blank already and goes on.
    """
    shard, index = divmod(row, store.rows_per_shard)
    channels = store.teacher(teacher).fingerprint.channels
    # scales come before the integers: whoever reads in between gets NaN, and never 0 times a scale
    documents = dict(sorted(store.arrays(teacher).items(), key=lambda found: found[0] == "values"))
    names = {array: array_shard_file(teacher, array, shard, document) for array, document in documents.items()}
    with store.place.lock(shard_lock(teacher, shard)):
        receipt = store.receipt(teacher, shard)
        if receipt is None:
            for name in names.values():  # bytes that no receipt names may hold the image as well
                store.place.remove(name)
            return
        if receipt.rows[index].reason == "forgotten":
            return
        arrays, files = {}, {}
        for array, name in names.items():
            data = store.place.read(name)
            try:
                stored = StoredArray(documents[array], data, store.rows_per_shard)
                values = stored.whole()
            except UNREADABLE as error:
                raise _damaged(store, name) from error
            promised = receipt.files.get(name)
            if promised is None or hashlib.sha256(data).hexdigest() != promised.sha256:
                # what an interrupted call has left has just this row blank; integers may be 0 in others as well
                empty = np.asarray([place == index or seen.status != "ok" for place, seen in enumerate(receipt.rows)])
                blank = stored.blank(values)
                if not blank[empty].all() or (np.isnan(stored.fill) and blank[~empty].any()):
                    raise _damaged(store, name)
            values[index] = stored.fill
            arrays[array] = values
            encoded = encode_like(documents[array], values)
            if encoded != data:
                store.place.publish(name, encoded)
            files[name] = FileReceipt(bytes=len(encoded), sha256=hashlib.sha256(encoded).hexdigest())
        rows = list(receipt.rows)
        rows[index] = RowReceipt(status="failed", reason="forgotten", detail=PROBLEMS["forgotten"])
        statistics = ChannelStatistics(channels)
        for place, seen in enumerate(rows):
            if seen.status == "ok":
                statistics.update(decode({name: values[place] for name, values in arrays.items()}, channels))
        changes = {
            "revision": sum(seen.reason == "forgotten" for seen in rows),
            "rows": tuple(rows),
            "files": files,
            "statistics": statistics.to_json(),
        }
        store.place.publish(receipt_file(teacher, shard), sealed(receipt.model_copy(update=changes)))


def _damaged(store: FeatureStore, name: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"{store.place.locate(name)} is damaged, so nothing can be taken out of it",
        "The image is out of the plan already: `olapipe verify --repair` makes the shard again without it.",
    )
