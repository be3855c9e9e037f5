"""From settings to a run that can take its first step: every check that needs no training is made here."""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olaschema.errors import ConfigError
from olaschema.manifest import Fingerprint, TeacherRecord
from olaschema.packed import is_packed
from olaschema.precision import formats_of
from olatrain.compose import load_processor, student_view
from olatrain.config import Evaluation, TrainConfig
from olatrain.controls import known_images, partners
from olatrain.conversations import Conversations
from olatrain.families import open_vision
from olatrain.groups import describe
from olatrain.join import Coverage, Listing
from olatrain.learner import Learner, build_learner, load_start
from olatrain.meanmap import mean_maps
from olatrain.mixeddata import MixedData
from olatrain.packeddata import PackedData
from olatrain.parallel import Ranks
from olatrain.predictors import Standard
from olatrain.probebank import ProbeBank, build_probe, split_by_image
from olatrain.prompts import PromptBuilder
from olatrain.scaling import StoredBasis
from olatrain.sidecar import Sidecar
from olatrain.source import Data, require_features, require_same_form
from olatrain.storedata import StoreData
from olatrain.stream import Collator, SampleStream, Source
from olatrain.tokens import TaskTokens
from olatrain.tower import tower_means
from olatrain.views import require_fed_views, require_views, student_exif

_LOCK_WAIT_S = 20.0
# Files of a student's folder beside its weights: settings, chat template, vocabularies
_READ = (".json", ".jinja", ".model", ".txt")
_NOT_TRAINED_FROM = ("generation_config.json", "published.json")
_PIECES, _PIECE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Run:
    """A run, ready to take steps."""

    config: TrainConfig
    """With the fingerprints pinned."""
    ranks: Ranks
    learner: Learner
    stream: SampleStream
    heldout: SampleStream | None
    collate: Collator
    means: dict[str, Tensor]
    """Mean training target by teacher, on the device."""
    teachers: dict[str, TeacherRecord]
    """What the store says about each teacher, its licence included: saved, so that export needs no store."""
    identity: dict[str, str]
    """Digests of what a continuation must find unchanged: samples and student."""
    samples: int
    """Samples of an epoch."""
    notes: list[str]
    """What the user should know before the first step."""
    counts: dict[str, Any]
    """The same as figures, for metrics.jsonl; both only on rank 0."""

    @property
    def end(self) -> int:
        """Position at which the run ends."""
        if self.config.steps is not None:
            return self.config.steps * self.config.batch
        return (self.config.epochs or 1) * self.samples

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return -(-self.end // self.config.batch)


def set_up(config: TrainConfig, ranks: Ranks) -> Run:
    """Open and check everything.

    Raises the errors of the parts: ConfigError, CorpusError, StoreError, FingerprintError, ViewError.
    """
    data = open_data(config)
    records = {name: data.teacher(name) for name in config.reads}
    config = _pin(config, records, data.url)
    tokens = TaskTokens.load(config.student)
    processor = load_processor(config.student)
    found = {name: record.fingerprint for name, record in records.items()}
    start = load_start(config) if config.probe is None else None
    view, exif = student_view(processor), _exif(found, start)
    require_fed_views([found[name] for name in config.feed], view, exif=exif)
    notes = [
        f"view mismatch, allowed: {mismatch}"
        for mismatch in require_views(found.values(), view, allow=config.allow_view_mismatch)
    ]
    listing = data.listing(data.conversations())
    data.require_images(listing)
    heldout, unseen_data = None, data
    if config.evaluation is not None:
        unseen_data, unseen = _evaluation(config, config.evaluation, data)
        heldout = unseen_data.listing(unseen)
        unseen_data.require_images(heldout)
    same = known_images(config, data, listing, ranks)
    if config.probe is not None:
        listing, heldout = split_by_image(listing, held_out=config.probe.held_out, seed=config.seed, same=same)
        if config.context == "all":
            notes.append("context = all: the probes read the answer's states too, not only what the image's hold")
    coverages: dict[str, Coverage] = {}
    counts: dict[str, Any] = {}
    if ranks.first:
        notes += data.notes()
        coverages = {name: data.coverage(listing, name) for name in config.reads}
        require_features(coverages, data.url)
        counts = _counts(config, listing, coverages)
        if heldout is not None and config.evaluation is not None:
            aside = {name: unseen_data.coverage(heldout, name) for name in config.reads}
            require_features(aside, unseen_data.url)
            notes += [f"held out: {found.valid} samples have a target of {name}" for name, found in aside.items()]
            notes += _shared_images(listing, heldout)
        if heldout is not None:
            counts["held_out"] = {"images": len(heldout), "digest": heldout.digest}
        notes += _describe(config, listing, heldout, coverages)
    if start is not None:
        notes += start.describe({name: teacher.layers for name, teacher in config.teachers.items()})
    source = _source(config, data, tokens, processor, exif)
    learner = _learner(config, data, found, tokens, ranks, start)
    notes.append(describe(learner.trainable(), config))
    if learner.tower is not None:
        notes.append("target_control = self: targets are of the student's own vision tower; no predictions are kept")
    grouped = config.batch if config.order == "grouped" else None
    means = _means(config, data, coverages, ranks, learner, SampleStream(source, listing, seed=None))
    if isinstance(learner.bank, ProbeBank) and config.probe is not None and config.probe.start == "mean":
        learner.bank.start_from(means)
    return Run(
        config=config,
        ranks=ranks,
        learner=learner,
        stream=SampleStream(
            replace(source, partners=partners(config, listing, same)),
            listing,
            seed=config.seed,
            window=config.window,
            grouped=grouped,
            kept_bytes=config.keep_samples or 0,
        ),
        heldout=SampleStream(replace(source, data=unseen_data), heldout, seed=None) if heldout else None,
        collate=Collator(
            tokens=tokens,
            vision=source.vision,
            pad_id=int(processor.tokenizer.pad_token_id),
            micro_batch=config.micro_batch,
            formats={name: formats_of(record) for name, record in records.items()},
        ),
        means=means,
        teachers=records,
        identity={"samples": listing.digest, "student": student_digest(config.student)},
        samples=len(listing),
        notes=notes,
        counts=counts,
    )


def open_data(config: TrainConfig) -> Data:
    """Return what a run streams from: a packed set where `store` is one.

    Raises ConfigError where that leaves settings without a meaning, StoreError where there is no store.
    """
    if not config.sources:
        return _one_source(config, config.store, config.conversations, config.images)
    parts = tuple(_one_source(config, each.store, each.conversations, each.images) for each in config.sources)
    return MixedData(parts, tuple(each.repeats for each in config.sources))


def _one_source(config: TrainConfig, store: str | None, conversations: Path | None, images: Path | None) -> Data:
    cache = config.cache if store is not None and "://" in store else None
    if store is not None and is_packed(store):
        if conversations is not None or images is not None:
            raise ConfigError(
                f"{store} is a packed training set, which holds its own conversations and images",
                "Leave conversations and images out, or give the feature store that was packed.",
            )
        return PackedData(store, cache=cache)
    if conversations is None or images is None:
        raise ConfigError(
            f"store = {store} is no packed training set, and conversations and images are missing",
            "Give both (--conversations, --images), or a folder that `olapipe pack` wrote.",
        )
    return StoreData.at(store, config.reads, conversations, images, cache=cache)


def _evaluation(config: TrainConfig, evaluation: Evaluation, data: Data) -> tuple[Data, Conversations]:
    """Where the samples held out come from, and which they are."""
    if evaluation.conversations is not None:
        return data, Conversations.read(evaluation.conversations)
    where = str(evaluation.store)
    aside = PackedData(where, cache=config.cache if "://" in where else None)
    _pin(config, {name: aside.teacher(name) for name in config.reads}, aside.url)
    for name in config.reads:
        require_same_form(
            data.teacher(name),
            aside.teacher(name),
            mine=f"in {data.url}",
            theirs=f"in {aside.url}",
            remedy="Hold out a set of the training store's form: pack it from a store of the same precision.",
        )
    return aside, aside.conversations()


def _exif(found: Mapping[str, Fingerprint], start: Sidecar | None) -> bool:
    """Whether images are turned upright: as the teachers of this run did, or those of the stages before it."""
    earlier = start.fingerprints if start is not None else []
    return student_exif(found.values() or earlier)


def _learner(
    config: TrainConfig,
    data: Data,
    found: dict[str, Fingerprint],
    tokens: TaskTokens,
    ranks: Ranks,
    start: Sidecar | None,
) -> Learner:
    if config.probe is not None:
        learner = build_probe(config, found, tokens, ranks.device)
    else:
        standards = _standards(config, data, found, ranks)
        learner = build_learner(
            config, found, tokens, ranks.device, start=start, standards=standards, world=ranks.world
        )
    for name in found:
        basis = data.basis(name)
        if basis is not None:
            learner.bases[name] = StoredBasis(basis).to(ranks.device)
    return learner


def _standards(config: TrainConfig, data: Data, found: dict[str, Fingerprint], ranks: Ranks) -> dict[str, Standard]:
    """Statistics of all committed shards; read once and handed to the other ranks."""
    if config.normalise == "none":
        return {}
    standards = {}
    for name in config.teachers:
        fingerprint = found[name]
        figures = torch.zeros(2, fingerprint.channels, dtype=torch.float64)
        if ranks.first:
            statistics = data.statistics(name)
            figures = torch.from_numpy(np.stack([statistics.mean, np.sqrt(statistics.variance)]))
        mean, deviation = ranks.sum(figures.to(ranks.device)).cpu()
        standards[name] = Standard(mean, deviation)
    return standards


def _pin(config: TrainConfig, records: dict[str, TeacherRecord], url: str) -> TrainConfig:
    """Check a store against the pinned fingerprints, and pin those not pinned yet."""
    pinned = dict(config.fingerprints)
    for name, record in records.items():
        if name in pinned:
            pinned[name].require_equal(
                record.fingerprint,
                mine="pinned",
                theirs=f"in {url}",
                remedy="Use the store that the run was pinned to, or start a new run with another --out.",
            )
        pinned[name] = record.fingerprint
    return config.model_copy(update={"fingerprints": pinned})


def _source(
    config: TrainConfig,
    data: Data,
    tokens: TaskTokens,
    processor: Any,
    exif: bool,
) -> Source:
    template = processor.chat_template if isinstance(processor.chat_template, str) else None
    return Source(
        data=data,
        teachers=config.reads,
        prompts=PromptBuilder(processor.tokenizer, tokens, max_length=config.max_length, template=template),
        vision=open_vision(processor, tokens),
        exif=exif,
        max_pixels=config.max_pixels,
        inputs=tuple(name for name in config.feed if name not in config.teachers),
    )


def _means(
    config: TrainConfig,
    data: Data,
    coverages: dict[str, Coverage],
    ranks: Ranks,
    learner: Learner,
    stream: SampleStream,
) -> dict[str, Tensor]:
    shapes = {name: predictor.shape for name, predictor in learner.bank.configs.items()}
    if not ranks.first:
        means = {name: torch.zeros(shape) for name, shape in shapes.items()}
    elif learner.tower is not None:
        means = tower_means(learner.tower, stream, shapes, most=config.mean_map_rows, device=ranks.device)
    else:
        means = mean_maps(data, {name: coverages[name] for name in shapes}, most=config.mean_map_rows)
    return {name: ranks.sum(mean.to(ranks.device)) for name, mean in means.items()}


def _counts(config: TrainConfig, listing: Listing, coverages: dict[str, Coverage]) -> dict[str, Any]:
    counted = {name: {"valid": found.valid, "missing": found.missing} for name, found in coverages.items()}
    fed = {name: counted[name] for name in config.feed}
    return {
        "samples": len(listing),
        "text_only": sum(not keys for keys in listing.conversations.keys),
        "images": len(listing.image_rows),
        "left_out": len(listing.conversations.bad),
        "targets": {name: counted[name] for name in config.teachers},
        **({"fed": fed} if fed else {}),
    }


def _shared_images(listing: Listing, heldout: Listing) -> list[str]:
    """Say how many images held out are trained on too, by their keys."""
    trained, unseen = ({key for keys in part.conversations.keys for key in keys} for part in (listing, heldout))
    shared = len(trained & unseen)
    return [f"held out: {shared} of {len(unseen)} images are among those trained on"] if shared else []


def _describe(
    config: TrainConfig, listing: Listing, heldout: Listing | None, coverages: dict[str, Coverage]
) -> list[str]:
    images = len(listing.image_rows)
    texts = sum(not keys for keys in listing.conversations.keys)
    notes = [f"{len(listing)} samples: {len(listing) - texts} with an image, {texts} text only"]
    if images > len(listing) - texts:
        notes.append(f"they show {images} images: each has its own targets and predictions")
    for name, found in coverages.items():
        missing = ", ".join(f"{count} {reason}" for reason, count in found.missing.items())
        what = "are fed" if name in config.feed else "have a target"
        notes.append(f"{name}: {found.valid} of {images} {what}" + (f" (without: {missing})" if missing else ""))
    for part in (listing, heldout):
        if part is not None and part.conversations.bad:
            notes.append(part.conversations.problems())
    return notes


def student_digest(folder: Path) -> str:
    """Return a digest of what a run reads of a student's folder: model, processor, tokenizer, template, task tokens.

    Of the weights only headers and samples at even distances are read: hashing tens of gigabytes would hold up every
    start, and weights that were trained further differ wherever one looks.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for piece in _pieces(path):
                digest.update(piece)
        elif path.suffix in _READ and path.name not in _NOT_TRAINED_FROM:
            digest.update(f"{path.name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield a file's first bytes and others at even distances, all of it where it is small."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek(max(size - _PIECE_BYTES, 0) * number // (_PIECES - 1))
            yield file.read(_PIECE_BYTES)


@contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make `out` and keep other runs out of it; raises ConfigError where one is at work or it is something else.

    A run that was just killed may take a moment to let go.
    """
    if not ranks.first:
        yield
        return
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / "run.lock").exists():
            raise ConfigError(f"{out} is not empty and holds no run", "Choose a new or empty folder (--out).")
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "run.lock").open("a")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", "Choose another folder (--out).") from error
    with file:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                # a record lock: unlike flock it is not inherited by loader processes that outlive us for a moment
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another run is writing to {out}", "Wait for it or stop it, or choose another --out."
                    ) from error
                time.sleep(0.1)
        yield
