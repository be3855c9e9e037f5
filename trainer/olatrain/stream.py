"""The stream of samples: a position of the run → conversation, image and features → padded batches.

Everything here runs in loader processes. Files are opened there, on first use; what goes wrong with one image is
skipped with its reason, what is wrong with the data as a whole comes back as the error to raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from olaschema.errors import ImageError, OlaError, StoreError
from olaschema.images import decode_image
from olaschema.manifest import RowReceipt
from olaschema.precision import ArrayFormat, Stored
from olatrain.conversations import SampleError
from olatrain.families import Shown, Vision
from olatrain.join import Listing
from olatrain.losses import IGNORED
from olatrain.order import PositionSampler, epoch_order, group_by_modality
from olatrain.prompts import PromptBuilder
from olatrain.source import Data, Opened
from olatrain.tokens import Items, TaskTokens, locate

# more than any run has positions: tells the images of one sample apart
_POSITIONS = 1 << 40
# what a token takes of a sample, as an element of two lists of integers
_TOKEN_BYTES = 80


@dataclass(frozen=True)
class Source:
    """Where samples come from, and how they become the student's inputs."""

    data: Data
    teachers: tuple[str, ...]
    prompts: PromptBuilder
    vision: Vision
    exif: bool
    max_pixels: int
    partners: Mapping[int, int] | None = None
    """By an image's row, the place whose features it is given instead of its own: the `shuffle` control."""
    inputs: tuple[str, ...] = ()
    """Teachers whose features are inputs: an image keeps its own, whatever the control."""


@dataclass(frozen=True)
class Sample:
    """One sample, ready to be batched."""

    position: int
    keys: tuple[str, ...]
    rows: list[int]
    """Of each image, its identity: -1 where the store does not plan it, the row that it shares where it shares one."""
    places: list[int]
    """Of each image, where the data has it; -1 for nowhere."""
    input_ids: list[int]
    labels: list[int]
    shown: list[Shown]
    """Its images, in order; none for text alone."""
    features: list[dict[str, Stored | None]]
    """Of each image, stored arrays by teacher, None where there is no feature."""
    cut: int
    requests: int = 0
    """How often the store was asked for something."""


@dataclass(frozen=True)
class Skipped:
    """A sample that trains nothing, and why."""

    position: int
    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Fault:
    """An error for the main process to raise; raised here, the loader would wrap it in a traceback."""

    error: OlaError


@dataclass(frozen=True)
class Features:
    """One teacher's features for the I images of a rank's batch, as stored: `olatrain.scaling` decodes them."""

    values: Tensor
    """(I, ...) in the stored dtype; zeros where not valid."""
    valid: Tensor
    """(I,) bool."""
    scale: Tensor | None = None
    """(I, ..., groups) float16 beside integers; zeros where not valid."""
    offset: Tensor | None = None
    """(I, C) float16 beside the integers of centred maps; zeros where not valid."""

    def pin_memory(self) -> Features:
        """Return the features in page-locked memory."""
        scale, offset = (None if part is None else part.pin_memory() for part in (self.scale, self.offset))
        return Features(self.values.pin_memory(), self.valid.pin_memory(), scale, offset)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    inputs: dict[str, Tensor]
    """`input_ids`, `attention_mask` (B, L) and what the student's family takes of images (`families.Vision`)."""
    labels: Tensor
    """(B, L)"""
    items: Items


@dataclass(frozen=True)
class Batch:
    """A rank's part of one step. Images are numbered over all micro-batches, in order."""

    micro: list[MicroBatch]
    features: dict[str, Features]
    rows: Tensor
    """(I,) int64: identity of each image; images that the store does not plan have negative numbers of their own."""
    samples: int
    skipped: list[Skipped] = field(default_factory=list)
    cut: int = 0
    """Samples that were cut at `max_length`."""
    requests: int = 0
    """How often the store was asked for something."""

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the loader calls this where a GPU is used."""
        micro = [
            MicroBatch({k: v.pin_memory() for k, v in m.inputs.items()}, m.labels.pin_memory(), m.items)
            for m in self.micro
        ]
        features = {teacher: found.pin_memory() for teacher, found in self.features.items()}
        return Batch(micro, features, self.rows, self.samples, self.skipped, self.cut, self.requests)


class KeptSamples:
    """Samples of a listing that a process has made, to be had again in a later epoch: the first that fit.

    None makes room for another: where an epoch does not fit, what was used last would be gone before it is asked for
    again. What was skipped is not kept: it is tried again.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._samples: dict[int, Sample] = {}

    def get(self, index: int, position: int) -> Sample | None:
        """Return what was kept of the listing's sample `index`, as of another position; it asks the store nothing."""
        sample = self._samples.get(index)
        return None if sample is None else replace(sample, position=position, requests=0)

    def offer(self, index: int, sample: Sample) -> None:
        """Keep a sample where there is room; its arrays are copied, for they may be parts of larger ones."""
        if self._bytes == self._limit:
            return
        arrays = [a for image in sample.features for s in image.values() if s is not None for a in s.arrays.values()]
        tensors = [tensor for one in sample.shown for tensor in one.inputs.values()]
        size = sum(array.nbytes for array in arrays) + sum(tensor.nbytes for tensor in tensors)
        size += _TOKEN_BYTES * len(sample.input_ids)
        if self._bytes + size > self._limit:
            return
        self._bytes += size
        features = [{teacher: s and _copied(s) for teacher, s in image.items()} for image in sample.features]
        shown = [Shown({n: t.clone() for n, t in one.inputs.items()}, one.block) for one in sample.shown]
        self._samples[index] = replace(sample, shown=shown, features=features)


def _copied(stored: Stored) -> Stored:
    return Stored(**{name: array.copy() for name, array in stored.arrays.items()})


class SampleStream(Dataset[Sample | Skipped | Fault]):
    """Samples by position. Position p of a run is sample p mod N of epoch p div N, in that epoch's order.

    With `seed` None samples come in the listing's order. With `grouped`, a number, batches of that many samples are
    of one modality (`group_by_modality`). `kept_bytes`: of samples that each process keeps for later epochs.
    """

    def __init__(
        self,
        source: Source,
        listing: Listing,
        *,
        seed: int | None,
        window: int = 1,
        grouped: int | None = None,
        kept_bytes: int = 0,
    ) -> None:
        self._source = source
        self._listing = listing
        self._seed = seed
        self._window = window
        self._grouped = grouped
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._opened: Opened | None = None
        self._kept_bytes = kept_bytes
        self._kept = KeptSamples(kept_bytes)

    def __getstate__(self) -> dict[str, Any]:
        # for a spawned loader process, which opens the store and makes the order for itself
        return {name: value for name, value in vars(self).items() if name not in ("_order", "_opened", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _opened=None, _kept=KeptSamples(state["_kept_bytes"]))
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return len(self._listing)

    @property
    def remote(self) -> bool:
        """Whether the features come over a network."""
        return self._source.data.remote

    @property
    def data(self) -> Data:
        """Where the samples come from."""
        return self._source.data

    def index(self, position: int) -> int:
        """Return which sample of the listing stands at a position."""
        epoch, within = divmod(position, len(self))
        return within if self._seed is None else int(self._order(epoch)[within])

    def name(self, position: int) -> str:
        """Name the sample at a position for a message: its key, or its place in the file."""
        conversation = self._listing.conversations[self.index(position)]
        return conversation.key or f"conversation {conversation.index}"

    def __getitem__(self, position: int) -> Sample | Skipped | Fault:
        index = self.index(position)
        kept = self._kept.get(index, position)
        if kept is not None:
            return kept
        try:
            sample = self._load(position, index)
        except (ImageError, SampleError) as error:
            return Skipped(position, self.name(position), error.reason, error.problem)
        except OlaError as error:
            return Fault(error)
        self._kept.offer(index, sample)
        return sample

    def _make_order(self, epoch: int) -> np.ndarray:
        order = epoch_order(self._listing.shards, seed=self._seed or 0, epoch=epoch, window=self._window)
        if self._grouped is None:
            return order
        loose = np.asarray([not keys for keys in self._listing.conversations.keys])
        return group_by_modality(order, loose, first=epoch * len(self), batch=self._grouped)

    def _load(self, position: int, index: int) -> Sample:
        conversation = self._listing.conversations[index]
        rows, places = self._listing.rows_of(index), self._listing.places_of(index)
        shown: list[Shown] = []
        identities: list[int] = []
        features: list[dict[str, Stored | None]] = []
        asked = self._opened.requests if self._opened is not None else 0
        opened = self._open()
        for key, row, place in zip(conversation.keys, rows, places, strict=True):
            statuses = {teacher: opened.status(teacher, place) for teacher in self._source.teachers}
            shown.append(self._show(opened, key, place, statuses))
            target = place
            if self._source.partners is not None:
                target = self._source.partners[row] if row >= 0 else -1
            features.append(
                {
                    teacher: opened.feature(teacher, place if teacher in self._source.inputs else target)
                    for teacher in self._source.teachers
                }
            )
            # keys that share a row are one image: none is a negative of another
            shared = [s.same_as for s in statuses.values() if s is not None and s.same_as is not None]
            identities.append(min(shared, default=row))
        prompt = self._source.prompts.build(conversation, [one.block for one in shown])
        return Sample(
            position,
            conversation.keys,
            identities,
            places,
            prompt.input_ids,
            prompt.labels,
            shown,
            features,
            prompt.cut,
            opened.requests - asked,
        )

    def _open(self) -> Opened:
        if self._opened is None:
            self._opened = self._source.data.open()
        return self._opened

    def _show(self, opened: Opened, key: str, place: int, statuses: Mapping[str, RowReceipt | None]) -> Shown:
        data = opened.image(place, key)
        _require_same(data, key, statuses)
        decoded = decode_image(data, name=key, max_pixels=self._source.max_pixels)
        return self._source.vision.show(decoded.oriented(exif=self._source.exif))


def _require_same(data: bytes, key: str, statuses: Mapping[str, RowReceipt | None]) -> None:
    digest = hashlib.sha256(data).hexdigest()
    for teacher, status in statuses.items():
        if status is not None and status.sha256 is not None and status.sha256 != digest:
            raise StoreError(
                f"{key}: the image is not the one that the features of {teacher} were made from (its SHA-256 differs)",
                "Restore the image, check --images, or extract its shard again.",
            )


@dataclass(frozen=True)
class Collator:
    """Makes a rank's batch of its samples; `formats` are the stored arrays of each teacher, by name."""

    tokens: TaskTokens
    vision: Vision
    pad_id: int
    micro_batch: int | None
    formats: Mapping[str, Mapping[str, ArrayFormat]]

    def __call__(self, loaded: Sequence[Sample | Skipped | Fault]) -> Batch | Fault:
        """Pad on the right, `micro_batch` samples at a time; the first fault stands for the whole batch."""
        for entry in loaded:
            if isinstance(entry, Fault):
                return entry
        samples = [entry for entry in loaded if isinstance(entry, Sample)]
        skipped = [entry for entry in loaded if isinstance(entry, Skipped)]
        size = self.micro_batch or max(len(samples), 1)
        micro = [self._micro(samples[first : first + size]) for first in range(0, len(samples), size)]
        # an image outside the store is nobody's twin
        rows = [
            row if row >= 0 else -1 - sample.position - number * _POSITIONS
            for sample in samples
            for number, row in enumerate(sample.rows)
        ]
        found = [features for sample in samples for features in sample.features]
        features = {teacher: self._features(teacher, found) for teacher in self.formats}
        cut = sum(sample.cut > 0 for sample in samples)
        requests = sum(sample.requests for sample in samples)
        images = torch.tensor(rows, dtype=torch.int64)
        return Batch(micro, features, images, len(samples), skipped, cut, requests)

    def _micro(self, samples: list[Sample]) -> MicroBatch:
        length = max(len(sample.input_ids) for sample in samples)
        input_ids = torch.full((len(samples), length), self.pad_id, dtype=torch.int64)
        labels = torch.full((len(samples), length), IGNORED, dtype=torch.int64)
        mask = torch.zeros((len(samples), length), dtype=torch.int64)
        for place, sample in enumerate(samples):
            n = len(sample.input_ids)
            input_ids[place, :n] = torch.tensor(sample.input_ids)
            labels[place, :n] = torch.tensor(sample.labels)
            mask[place, :n] = 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        inputs |= self.vision.sequence(input_ids)
        inputs |= self.vision.collate([one for sample in samples for one in sample.shown])
        lengths = [[self.vision.placeholders(one) for one in sample.shown] for sample in samples]
        items = locate(self.tokens, input_ids, mask, images=[len(s.shown) for s in samples], lengths=lengths)
        return MicroBatch(inputs, labels, items)

    def _features(self, teacher: str, found: list[dict[str, Stored | None]]) -> Features:
        arrays = {
            name: np.zeros((len(found), *array.shape), array.dtype) for name, array in self.formats[teacher].items()
        }
        stored = Stored(**arrays)
        valid = np.zeros(len(found), dtype=bool)
        for place, features in enumerate(found):
            feature = features[teacher]
            if feature is not None:
                stored[place], valid[place] = feature, True
        tensors = {name: torch.from_numpy(array) for name, array in stored.arrays.items()}
        return Features(valid=torch.from_numpy(valid), **tensors)


def make_loader(
    stream: SampleStream, sampler: PositionSampler, collate: Collator, *, workers: int, pin: bool
) -> DataLoader[Batch | Fault]:
    """Load a rank's batches in order, `workers` processes ahead of the training (0: in this process)."""
    return DataLoader(
        stream,  # type: ignore[arg-type]  # it gives samples, the collator makes batches of them
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        # Stores and the tokenizer are opened after the fork; nothing here starts threads before it. But the library
        # that reads buckets has started some when the run was set up, and they do not survive a fork.
        multiprocessing_context=("spawn" if stream.remote else "fork") if workers else None,
        # without one of its own the loader draws from the global generator, whose state is part of a checkpoint
        generator=torch.Generator(),
    )
