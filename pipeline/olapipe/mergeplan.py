"""Which rows a merge has, and from which source each row's feature comes. Reads plans and receipts, no features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from olaschema.errors import StoreError
from olaschema.keys import tombstone
from olaschema.manifest import Receipt, RowReceipt, SampleRow
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_FORGOTTEN = "forgotten"
_KEPT_RECEIPTS = 256


@dataclass(frozen=True)
class Chosen:
    """What a row of the result is taken from."""

    source: int
    row: int
    receipt: RowReceipt


@dataclass
class MergePlan:
    """The generations of the result, and the rows of the sources behind each of its rows."""

    generations: list[list[SampleRow]] = field(default_factory=list)
    origins: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By row of the result: (source, row there), in the order of the sources."""
    moved: list[dict[int, int]] = field(default_factory=list)
    """For each source, where its rows are in the result."""
    forgotten_rows: set[int] = field(default_factory=set)
    repeated: int = 0

    @property
    def images(self) -> int:
        """Number of rows with an image."""
        return len(self.origins)

    @property
    def forgotten(self) -> int:
        """Number of images that some source has forgotten; the result has, too."""
        return len(self.forgotten_rows)

    def choose(self, row: int, readers: Sequence[FeatureReader | None]) -> Chosen | None:
        """Return where one teacher's row comes from: the first source with a feature, else the first with a reason."""
        found = None
        for source, place in self.origins[row]:
            reader = readers[source]
            receipt = reader.status(place) if reader is not None else None
            if receipt is None:
                continue
            if row in self.forgotten_rows:
                buried = RowReceipt(status="failed", reason=_FORGOTTEN, detail="it was forgotten by `olapipe forget`")
                return Chosen(source, place, receipt if receipt.reason == _FORGOTTEN else buried)
            if receipt.status == "ok":
                return Chosen(source, place, receipt)
            found = found or Chosen(source, place, receipt)
        return found


def plan_merge(sources: Sequence[FeatureStore]) -> MergePlan:
    """Join the plans of stores by key; raises StoreError naming a key that means different images."""
    stones = {sample.key for source in sources for sample in source.samples() if sample.problem == _FORGOTTEN}
    plan = MergePlan(moved=[{} for _ in sources])
    rows: dict[str, int] = {}
    size = sources[0].rows_per_shard
    first = 0
    for number, source in enumerate(sources):
        for generation in source.generations():
            new: list[SampleRow] = []
            for name in generation.parts:
                for sample in source.part_samples(generation, name):
                    stone = sample.key if sample.problem == _FORGOTTEN else tombstone(sample.key)
                    known = stone if stone in stones else sample.key
                    row = rows.get(known)
                    if row is None:
                        row = rows[known] = first + len(new)
                        new.append(sample if known == sample.key else _buried(stone))
                        if stone in stones:
                            plan.forgotten_rows.add(row)
                    else:
                        plan.repeated += 1
                    plan.origins.setdefault(row, []).append((number, sample.row))
                    plan.moved[number][sample.row] = row
            if new:
                plan.generations.append(new)
                first += -(-len(new) // size) * size
    _require_same_images(sources, plan)
    return plan


def _buried(stone: str) -> SampleRow:
    return SampleRow(row=0, key=stone, uri=stone, size=-1, problem=_FORGOTTEN)


def _require_same_images(sources: Sequence[FeatureStore], plan: MergePlan) -> None:
    """Raise StoreError where two sources have features of different bytes under one key.

    Where the first source has none, the row takes the size of the file that the features are of.
    """
    digests = _Digests(sources)
    samples = (sample for generation in plan.generations for sample in generation)
    for sample, (row, origins) in zip(samples, plan.origins.items(), strict=True):
        if len(origins) < 2 or row in plan.forgotten_rows:
            continue
        seen = {source: found for source, place in origins if (found := digests.of(source, place)) is not None}
        if len(set(seen.values())) > 1:
            (a, first), (b, second) = list(seen.items())[:2]
            raise StoreError(
                f"{sample.key} is one image in {sources[a].url} (SHA-256 {first[:16]}) and another one in "
                f"{sources[b].url} ({second[:16]})",
                "Rename it in one corpus, or `olapipe forget` it in one store, then merge.",
            )
    for generation_first, generation in _numbered(plan, sources[0].rows_per_shard):
        for index, sample in enumerate(generation):
            origins = plan.origins[generation_first + index]
            if len(origins) > 1 and sample.problem is None and digests.of(*origins[0]) is None:
                generation[index] = _of_features(sources, digests, origins, sample)


def _numbered(plan: MergePlan, size: int) -> list[tuple[int, list[SampleRow]]]:
    found, first = [], 0
    for generation in plan.generations:
        found.append((first, generation))
        first += -(-len(generation) // size) * size
    return found


def _of_features(
    sources: Sequence[FeatureStore], digests: _Digests, origins: Sequence[tuple[int, int]], sample: SampleRow
) -> SampleRow:
    for number, place in origins[1:]:
        if digests.of(number, place) is not None:
            source = sources[number]
            shard, index = divmod(place, source.rows_per_shard)
            return source.shard_samples(shard)[index]
    return sample


class _Digests:
    """The SHA-256 of the image that a source's features of a row were made from."""

    def __init__(self, sources: Sequence[FeatureStore]) -> None:
        self._sources = sources
        self._teachers = [source.teachers() for source in sources]
        self._receipt = lru_cache(maxsize=_KEPT_RECEIPTS)(self._read)

    def of(self, source: int, row: int) -> str | None:
        """Return it; None where there is no feature."""
        shard, index = divmod(row, self._sources[source].rows_per_shard)
        for teacher in self._teachers[source]:
            receipt = self._receipt(source, teacher, shard)
            if receipt is not None and receipt.rows[index].status == "ok":
                return receipt.rows[index].sha256
        return None

    def _read(self, source: int, teacher: str, shard: int) -> Receipt | None:
        return self._sources[source].receipt(teacher, shard)
