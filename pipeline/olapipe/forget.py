"""The command `forget`: one image leaves the plan and the bytes of every teacher, and does not come back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from olapipe.corpus import PROBLEMS
from olapipe.report import visible
from olapipe.rewrite import Change, rewrite
from olapipe.stored import committed_receipt
from olaschema.digest import sealed
from olaschema.errors import StoreError
from olaschema.keys import normalise_key, tombstone
from olaschema.lease import changing
from olaschema.manifest import FileReceipt, Generation, RowReceipt, SampleRow
from olaschema.reader import FeatureReader
from olaschema.seal import seal, unseal
from olaschema.store import FeatureStore

_REPAIR = "The image is out of the plan already: `olapipe verify --repair` makes the shard again without it."


@dataclass(frozen=True)
class Forgotten:
    """What was done. `twins` are the keys of other images with the same bytes, which are still in the store."""

    row: int
    tombstone: str
    teachers: list[str]
    twins: list[str]
    logs: list[str]
    """Files under `_log/` that hold the key in some message."""


def forget(store: FeatureStore, key: str, *, say: Callable[[str], None] | None = None) -> Forgotten:
    """Remove one image from the plan and from every teacher's shards; a second call finishes an interrupted one.

    The plan keeps its row and a tombstone with the SHA-256 of its key, by which `extract` knows not to take it again.
    Raises StoreError where the store has no such image or a job writes features, DamagedStoreError where a shard of it
    must be repaired first.
    """
    stone = tombstone(normalise_key(key))
    with changing(store, say=say) as teachers:
        generation, part, row = _find(store, key, stone)
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
    found = store.find(wanted)
    if found is not None:
        generation, part, sample = found
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
    """Take an image out of one teacher's shard. What other rows share moves to the first of them."""
    shard, index = divmod(row, store.rows_per_shard)
    receipt = store.receipt(teacher, shard)
    digest = receipt.rows[index].sha256 if receipt is not None and receipt.rows[index].stored else None
    if digest is not None:
        _bequeath(store, teacher, row, digest)
    gone = RowReceipt(status="failed", reason="forgotten", detail=PROBLEMS["forgotten"])
    rewrite(store, teacher, shard, {index: Change(gone)}, remedy=_REPAIR)


def _bequeath(store: FeatureStore, teacher: str, row: int, digest: str) -> None:
    """Let the rows that share `row` share another one instead, which gets its values unless it has its own.

    The heir comes first and the row itself last, so every row can be read whenever this stops.
    """
    size = store.rows_per_shard
    sharing: list[int] = []
    heir: int | None = None
    for shard in store.committed(teacher):
        for index, seen in enumerate(committed_receipt(store, teacher, shard).rows):
            if seen.same_as == row:
                sharing.append(shard * size + index)
            elif heir is None and seen.stored and seen.sha256 == digest and shard * size + index != row:
                heir = shard * size + index
    if not sharing:
        return
    if heir is None:
        heir = sharing.pop(0)
        values = FeatureReader(store, teacher).read(row)
        seen = committed_receipt(store, teacher, heir // size).rows[heir % size]
        own = Change(seen.model_copy(update={"same_as": None}), values)
        rewrite(store, teacher, heir // size, {heir % size: own}, remedy=_REPAIR)
    for shard in sorted({place // size for place in sharing}):
        rows = committed_receipt(store, teacher, shard).rows
        mine = [place % size for place in sharing if place // size == shard]
        changes = {index: Change(rows[index].model_copy(update={"same_as": heir})) for index in mine}
        rewrite(store, teacher, shard, changes, remedy=_REPAIR)
