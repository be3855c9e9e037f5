"""One shard under verification: its receipt, the files that it names, and the values in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from olapipe.stored import UNREADABLE, StoredArray, StoredBasis, array_shard_file, decode, error_bound
from olaschema.errors import StoreError
from olaschema.layout import receipt_file
from olaschema.manifest import ChannelStatistics, Receipt, RowReceipt, TeacherRecord
from olaschema.norms import NormHistogram, squared_norms
from olaschema.store import FeatureStore

_SLACK = 1e-9
"""Sums in another order, in float64."""
_NAMED = 8


@dataclass(frozen=True)
class Trouble:
    """What is wrong with one file of a shard; `rows` are numbers in the store, empty where they are not known."""

    file: str
    text: str
    rows: tuple[int, ...] = ()


@dataclass
class Checked:
    """What was found, and how much was looked at."""

    troubles: list[Trouble] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    rows: int = 0


def check_shard(
    store: FeatureStore,
    record: TeacherRecord,
    shard: int,
    planned: int | None,
    documents: Mapping[str, bytes],
    shared: Callable[[int], RowReceipt | None],
    basis: StoredBasis | None,
) -> Checked:
    """Check one committed shard of a teacher.

    `planned` is the number of images that the plan gives it, None where the plan is damaged; `documents` are the
    `zarr.json` of the teacher's arrays by name; `shared` gives the receipt of a row that another one shares. Without
    the `basis` that klt needs, digests are checked and no values.
    """
    checked = Checked()
    name = receipt_file(record.fingerprint.teacher, shard)
    try:
        receipt = store.receipt(record.fingerprint.teacher, shard)
    except StoreError as error:
        receipt = None
        checked.troubles.append(Trouble(name, error.problem))
    checked.files += 1
    if receipt is not None:
        checked.bytes += store.place.size(name)
        texts = list(_receipt_troubles(receipt, record, shard, store.rows_per_shard, planned, shared))
        checked.troubles += [Trouble(name, text) for text in texts]
        if texts:
            receipt = None  # its rows cannot be held against the values
    arrays = {}
    names = {array_shard_file(record.fingerprint.teacher, a, shard, d): a for a, d in documents.items()}
    if receipt is not None and set(receipt.files) != set(names):
        checked.troubles.append(Trouble(name, f"it names {sorted(receipt.files)}, not {sorted(names)}"))
        receipt = None
    for file, array in names.items():
        found = _open(store, file, documents[array], receipt, checked)
        if found is not None:
            arrays[file] = found
    decodable = record.basis is None or basis is not None
    if receipt is not None and len(arrays) == len(names) and decodable:
        _check_values({file: (names[file], a) for file, a in arrays.items()}, record, shard, receipt, checked, basis)
    return checked


def _receipt_troubles(
    receipt: Receipt,
    record: TeacherRecord,
    shard: int,
    rows_per_shard: int,
    planned: int | None,
    shared: Callable[[int], RowReceipt | None],
) -> Iterator[str]:
    teacher = record.fingerprint.teacher
    if (receipt.teacher, receipt.shard) != (teacher, shard):
        yield f"it is the receipt of {receipt.teacher} shard {receipt.shard}"
    if receipt.fingerprint != record.fingerprint.digest():
        yield f"its fingerprint {receipt.fingerprint[:16]} is not that of the teacher"
    if len(receipt.rows) != rows_per_shard:
        yield f"it has {len(receipt.rows)} rows, a shard has {rows_per_shard}"
        return
    if planned is None:
        return
    if planned == 0:
        yield "no images are planned for this shard"
        return
    absent = [row.status == "absent" for row in receipt.rows]
    if any(absent[:planned]) or not all(absent[planned:]):
        yield f"it must speak of the first {planned} rows and call the others absent"
    for index, row in enumerate(receipt.rows):
        if row.same_as is not None:
            other = shared(row.same_as)
            if row.status != "ok" or other is None or not other.stored or other.sha256 != row.sha256:
                place = shard * rows_per_shard + index
                yield f"row {place} shares row {row.same_as}, which has no feature of the same image"
    if receipt.revision != sum(row.reason == "forgotten" for row in receipt.rows):
        yield f"revision {receipt.revision} is not the number of forgotten images"


def _open(
    store: FeatureStore, file: str, document: bytes, receipt: Receipt | None, checked: Checked
) -> StoredArray | None:
    try:
        data = store.place.read(file)
    except StoreError as error:
        checked.troubles.append(Trouble(file, error.problem))
        return None
    checked.files += 1
    checked.bytes += len(data)
    try:
        array = StoredArray(document, data, store.rows_per_shard)
    except UNREADABLE as error:
        checked.troubles.append(Trouble(file, f"zarr cannot open it: {error}"))
        return None
    if receipt is None:
        return array
    promised = receipt.files[file]
    if len(data) != promised.bytes:
        checked.troubles.append(Trouble(file, f"it has {len(data)} bytes, its receipt promises {promised.bytes}"))
    elif hashlib.sha256(data).hexdigest() != promised.sha256:
        rows = tuple(_unreadable_rows(array, receipt.shard * store.rows_per_shard))
        hit = f"; damaged: {_list(rows)}" if rows else ""
        checked.troubles.append(Trouble(file, f"its SHA-256 is not the one its receipt promises{hit}", rows))
    else:
        return array
    return None


def _unreadable_rows(array: StoredArray, first_row: int) -> Iterator[int]:
    """Yield the rows whose chunk fails its checksum, or all where the index of the shard does."""
    for first in range(0, array.rows, array.chunk_rows):
        try:
            array.slice(first, first + array.chunk_rows)
        except UNREADABLE:
            yield from range(first_row + first, first_row + first + array.chunk_rows)


def _check_values(
    arrays: Mapping[str, tuple[str, StoredArray]],
    record: TeacherRecord,
    shard: int,
    receipt: Receipt,
    checked: Checked,
    basis: StoredBasis | None,
) -> None:
    """Decode the shard chunk by chunk: features where the receipt says ok, the fill value elsewhere, the statistics."""
    channels = record.fingerprint.channels
    ok = np.asarray([row.stored for row in receipt.rows])
    first_row = shard * len(ok)
    # only floats, scales and offsets can hold a NaN, and it is what they are filled with; integers cannot
    floats = {name: file for file, (name, array) in arrays.items() if np.isnan(array.fill)}
    statistics = ChannelStatistics(channels)
    bounds = _Bounds(channels)
    wrong: dict[tuple[str, str], set[int]] = {}
    infinite = "rows with a feature hold NaN or infinity"
    step = min(array.chunk_rows for _, array in arrays.values())
    for first in range(0, len(ok), step):
        present = ok[first : first + step]
        parts = {}
        for file, (name, array) in arrays.items():
            try:
                parts[name] = array.slice(first, first + step)
            except UNREADABLE as error:
                text = f"it has the digest of its receipt, but zarr cannot read it: {error}"
                checked.troubles.append(Trouble(file, text, tuple(range(first_row + first, first_row + first + step))))
                return
            full = np.flatnonzero(~array.blank(parts[name]) & ~present)
            wrong.setdefault((file, "rows without a feature hold one"), set()).update(full + first)
        features = decode({name: part[present] for name, part in parts.items()}, channels, basis)
        bad = ~np.isfinite(features).reshape(len(features), -1).all(axis=1) if len(features) else np.zeros(0, bool)
        rows = np.flatnonzero(present)[bad]
        seen = np.zeros(len(rows), bool)
        for name, file in floats.items():
            hit = ~np.isfinite(parts[name][rows]).reshape(len(rows), math.prod(parts[name].shape[1:])).all(axis=1)
            wrong.setdefault((file, infinite), set()).update(rows[hit] + first)
            seen |= hit
        wrong.setdefault((next(iter(floats.values())), infinite), set()).update(rows[~seen] + first)
        statistics.update(features[~bad])
        bound = error_bound({name: part[present][~bad] for name, part in parts.items()}, channels, basis)
        bounds.update(bound, features[~bad], whole=basis is not None)
        checked.rows += step
    for (file, what), indices in wrong.items():
        if indices:
            hit = tuple(sorted(int(index) + first_row for index in indices))
            checked.troubles.append(Trouble(file, f"{what}: {_list(hit)}", hit))
    if not any(wrong.values()):
        difference = _statistics_differ(receipt, statistics, bounds)
        if difference:
            file = receipt_file(record.fingerprint.teacher, shard)
            checked.troubles.append(Trouble(file, f"its statistics are not those of the values: {difference}"))


class _Bounds:
    """Error bounds of all elements of a channel: their sum, sum of squares and maximum; of tokens: shortest, longest.

    The norm of a token differs from that of the feature by the norm of the errors at most.
    """

    def __init__(self, channels: int) -> None:
        self.total = np.zeros(channels)
        self.squares = np.zeros(channels)
        self.largest = np.zeros(channels)
        self.shortest = NormHistogram()
        self.longest = NormHistogram()

    def update(self, bound: np.ndarray, features: np.ndarray, *, whole: bool) -> None:
        """Add features `(N, ..., C)`, each element with its bound.

        Where `whole`, bounds are of the root mean square error of images, all of which may lie in one channel or token.
        """
        flat = bound.reshape(-1, bound.shape[-1]).astype(np.float64)
        channels = flat.shape[1]
        tokens = len(flat) // max(len(bound), 1)
        by_channel, by_token, most = flat, flat, flat.max(axis=0, initial=0.0)
        if whole:
            by_channel, by_token = flat * math.sqrt(channels), flat * math.sqrt(tokens)
            most = most * math.sqrt(channels * tokens)
        norms = np.sqrt(squared_norms(features.reshape(flat.shape)))
        errors = np.sqrt(squared_norms(by_token)) + _SLACK * norms
        self.shortest.update(np.square(np.maximum(norms - errors, 0.0)))
        self.longest.update(np.square(norms + errors))
        self.total += by_channel.sum(axis=0)
        self.squares += np.square(by_channel).sum(axis=0)
        self.largest = np.maximum(self.largest, most)


def _statistics_differ(receipt: Receipt, of_values: ChannelStatistics, bounds: _Bounds) -> str | None:
    """Say which statistic differs by more than storing the features can have changed it."""
    try:
        told = ChannelStatistics.from_json(receipt.statistics, len(of_values.mean))
    except (ValueError, KeyError, TypeError) as error:
        return f"they cannot be read: {error}"
    if told.count != of_values.count:
        return f"they count {told.count} tokens, there are {of_values.count}"
    if not told.count:
        return None
    size = np.maximum(np.abs(of_values.minimum), np.abs(of_values.maximum))
    allowed = {
        "mean": bounds.total / told.count + _SLACK * size,
        "minimum": bounds.largest + _SLACK * size,
        "maximum": bounds.largest + _SLACK * size,
        # m2 is the squared length of the centred values, and theirs differ by the length of the errors at most
        "m2": 2 * np.sqrt(of_values.m2 * bounds.squares) + bounds.squares + _SLACK * told.count * size**2,
    }
    for name, limit in allowed.items():
        difference = np.abs(getattr(told, name) - getattr(of_values, name))
        worst = int(np.argmax(difference - limit))
        if not difference[worst] <= limit[worst]:
            return f"{name} of channel {worst} differs by {difference[worst]:.4g}, {limit[worst]:.4g} is the limit"
    return _norms_differ(told.norms, bounds) if "norms" in receipt.statistics else None


def _norms_differ(told: NormHistogram, bounds: _Bounds) -> str | None:
    """Say so unless, below each edge, there are as many tokens as storing them can have put there."""
    if told.total != bounds.shortest.total:
        return f"the histogram of norms counts {told.total} tokens, there are {bounds.shortest.total}"
    found = [told, bounds.shortest, bounds.longest]
    first = min(histogram.first for histogram in found)
    bins = max(histogram.first + len(histogram.counts) for histogram in found) - first
    below, most, least = (histogram.zero + np.cumsum(histogram.spread(first, bins)) for histogram in found)
    wrong = np.flatnonzero((below < least) | (below > most))
    if told.zero > bounds.shortest.zero or told.zero < bounds.longest.zero or len(wrong):
        return (
            f"the histogram of norms is not that of the tokens from bin {first + int(wrong[0]) if len(wrong) else 0} on"
        )
    return None


def _list(rows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:_NAMED]))
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
