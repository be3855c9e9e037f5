"""What a packed set is made of, in order: the store's plan and the conversations decide, no feature is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from olapipe.corpora.conversations import samples as read_entries
from olapipe.corpus import PROBLEMS
from olaschema.errors import CorpusError, ImageError
from olaschema.keys import normalise_key, tombstone
from olaschema.store import FeatureStore
from olaschema.tarshard import LeftOut

NO_CONVERSATION = -1


@dataclass
class Group:
    """One set of images with all conversations about it; no image for text alone."""

    keys: tuple[str, ...]
    rows: tuple[int, ...]
    entries: list[tuple[int, bytes]] = field(default_factory=list)
    """Place in the file, and the entry as JSON."""

    def left_out(self, error: ImageError) -> list[LeftOut]:
        """Return the record of what is not in the set because of this group's image."""
        places = [index for index, _ in self.entries] or [NO_CONVERSATION]
        key = ", ".join(self.keys)
        return [LeftOut(index=i, key=key, reason=error.reason, detail=error.problem) for i in places]


@dataclass(frozen=True)
class PackPlan:
    """The groups of each tar in the order of the set, and what no tar can have."""

    tars: list[list[Group]]
    left_out: list[LeftOut]
    firsts: list[int]
    """Number of each tar's first sample."""
    rows_per_shard: int

    def shards(self, number: int) -> list[int]:
        """Return the shards of the store that a tar is made of, ascending."""
        rows = [row for group in self.tars[number] for row in group.rows if row >= 0]
        return sorted({row // self.rows_per_shard for row in rows})


def plan_pack(store: FeatureStore, conversations: Path | None, samples_per_tar: int | None = None) -> PackPlan:
    """Decide what goes into which tar. Without conversations each planned image is a sample.

    Raises CorpusError for conversations that cannot be read, and where there is nothing to pack.
    """
    groups, left_out = _images(store) if conversations is None else _conversations(store, conversations)
    tars = _cut(groups, store.rows_per_shard, samples_per_tar)
    if not tars:
        raise CorpusError(
            f"{conversations or store.url} holds nothing to pack",
            "Give a store with images, or LLaVA-style conversations.",
        )
    firsts = list(accumulate((len(groups) for groups in tars[:-1]), initial=0))
    return PackPlan(tars, left_out, firsts, store.rows_per_shard)


def _images(store: FeatureStore) -> tuple[list[Group], list[LeftOut]]:
    groups, left_out = [], []
    for sample in store.samples():
        group = Group((sample.key,), (sample.row,))
        if sample.problem is None:
            groups.append(group)
        else:
            left_out += group.left_out(ImageError(sample.problem, PROBLEMS[sample.problem]))
    return groups, left_out


def _conversations(store: FeatureStore, conversations: Path) -> tuple[list[Group], list[LeftOut]]:
    """Return the groups in the order of the set, and the conversations that no group can have."""
    rows: dict[str, int] = {}
    forgotten: set[str] = set()
    for sample in store.samples():
        if sample.problem == "forgotten":
            forgotten.add(sample.key)
        else:
            rows[sample.key] = sample.row
    groups: dict[Any, Group] = {}
    left_out: list[LeftOut] = []
    for index, (where, entry) in enumerate(read_entries(conversations)):
        try:
            keys = _keys(entry, where)
            for key in keys:
                if forgotten and tombstone(key) in forgotten:
                    raise ImageError("forgotten", f"{where}: its image was forgotten")
        except ImageError as error:
            left_out.append(LeftOut(index=index, key="", reason=error.reason, detail=error.problem))
            continue
        group = groups.setdefault(keys or index, Group(keys, tuple(rows.get(key, -1) for key in keys)))
        group.entries.append((index, json.dumps(entry).encode()))
    # images by row, those that the store does not plan behind them, text alone last
    order = sorted(
        groups.values(), key=lambda g: (not g.keys, not g.keys or g.rows[0] < 0, g.rows[:1], g.entries[0][0])
    )
    return order, left_out


def _keys(entry: Any, where: str) -> tuple[str, ...]:
    if not isinstance(entry, dict):
        raise ImageError("not-an-object", f"{where} is a {type(entry).__name__}")
    value = entry.get("image")
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ImageError("bad-image", f"{where}: `image` is not a path or a list of paths")
    return tuple(normalise_key(name) for name in names)


def _cut(groups: list[Group], rows_per_shard: int, samples_per_tar: int | None) -> list[list[Group]]:
    """Cut the groups into tars; text alone gets tars of its own, so that it can be read without the images."""
    tars: list[list[Group]] = []
    last: object = None
    for group in groups:
        planned = bool(group.keys) and group.rows[0] >= 0 and samples_per_tar is None
        part = (bool(group.keys), group.rows[0] // rows_per_shard if planned else -1)
        full = bool(tars) and not planned and len(tars[-1]) >= (samples_per_tar or rows_per_shard)
        if part != last or full:
            tars.append([])
        tars[-1].append(group)
        last = part
    return tars
