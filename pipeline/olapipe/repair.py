"""`verify --repair`: what follows from images or from other documents is made again; the rest stays as it was."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olapipe.config import ExtractConfig
from olapipe.job import worker_pool
from olapipe.progress import Reporter
from olapipe.signals import interrupted
from olapipe.tally import ShardTask
from olapipe.tasks import Planned
from olapipe.verify import Problem, damaged_shards
from olaschema.config import load_config
from olaschema.errors import ConfigError, DamagedStoreError, StoreError
from olaschema.layout import receipt_file
from olaschema.lease import writing
from olaschema.manifest import Receipt
from olaschema.place import absolute_url
from olaschema.replacing import finish_replacements
from olaschema.seal import read_manifest, receipt_digest, seal, unseal
from olaschema.store import FeatureStore


@dataclass(frozen=True)
class Repair:
    """What was mended. `changed` are the keys of images that are no longer those of the old receipts."""

    shards: list[tuple[str, int]]
    documents: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    """Images that had a feature and could not be extracted again, each with the teacher and the reason."""
    lost: list[str] = field(default_factory=list)
    """Shards that were given up, and why."""


@dataclass(frozen=True)
class Source:
    """Where images and weights are, and further settings `A.B=C`, as for `extract`."""

    images: Path | None
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    workers: int | None = None


def extract_config(store: FeatureStore, teacher: str, source: Source, receipt: Receipt) -> ExtractConfig:
    """Return the settings under which a teacher's features were made, as far as the store records them.

    Batch size, threads and compilation are those of `receipt`. Raises ConfigError where the images are not given.
    """
    if source.images is None:
        raise ConfigError("the image folder is not given", "Add --images FOLDER, the folder that keys start from.")
    if not source.images.is_dir():
        raise ConfigError(f"--images {source.images}: no such folder", "Give the folder that keys start from.")
    record = store.teacher(teacher)
    flags: dict[str, Any] = {
        "corpus": source.images.absolute(),
        "out": absolute_url(store.url),
        "teachers": [teacher],
        "preset": record.fingerprint.preset,
        "compute_dtype": record.fingerprint.compute_dtype,
        "precision": record.precision,
        "batch_size": receipt.execution.batch_size,
        "threads": receipt.execution.threads,
        "compile": receipt.execution.compile,
        "device": source.device,
        "workers": source.workers,
    }
    if teacher in source.checkpoints:
        value = source.checkpoints[teacher]
        local = Path(value).expanduser()
        flags[f"checkpoints.{teacher}"] = str(local.absolute()) if local.exists() else value
    others = tuple(f"options.{name}." for name in store.teachers() if name != teacher)
    overrides = [text for text in source.overrides if not text.startswith(others)]
    return load_config(ExtractConfig, flags=flags, overrides=overrides)


def any_receipt(store: FeatureStore, teacher: str, shards: Collection[int] = ()) -> Receipt | None:
    """Return a readable receipt of a teacher, one of `shards` if possible: it says how features were computed."""
    for shard in [*shards, *store.committed(teacher)]:
        try:
            receipt = store.receipt(teacher, shard)
        except DamagedStoreError:
            continue
        if receipt is not None:
            return receipt
    return None


def repair(store: FeatureStore, problems: Sequence[Problem], source: Source, reporter: Reporter) -> Repair:
    """Extract damaged shards again and write documents that follow from others.

    Raises StoreError where the plan or a teacher's record is damaged: nothing can be made without them.
    """
    beyond = [problem.file for problem in problems if problem.mending is None]
    if any(
        name == "zarr.json" or name.startswith(("samples", "bases/")) or name.endswith("/zarr.json") for name in beyond
    ):
        raise StoreError(
            f"{store.url}: {', '.join(beyond)}: this cannot be made again from images and other documents",
            "Restore it from a copy, then repair the rest.",
        )
    shards = damaged_shards(problems)
    teachers = sorted({name for names in shards.values() for name in names})
    documents = sorted({problem.file for problem in problems if problem.mending == "document"})
    mended = [(name, shard) for shard, names in shards.items() for name in names]
    done = Repair(mended, documents)
    with writing(store.place, teachers, wait=False, say=reporter.say):
        with store.place.lock("plan"):
            promised = _promised(store)
            unseal(store, teachers)
            for name in {file.partition("/")[0] for file in documents}:
                store.put_teacher(store.teacher(name))
        for teacher in teachers:
            finish_replacements(store.place, teacher)
            mine = [shard for shard, names in shards.items() if teacher in names]
            _extract(store, teacher, mine, source, reporter, done, promised.get(teacher, ()))
        with store.place.lock("plan"):
            seal(store, store.teachers())
    return done


def _promised(store: FeatureStore) -> Mapping[str, Sequence[str]]:
    """Return the digests of receipts by teacher and shard, as far as the manifest has them."""
    try:
        manifest = read_manifest(store)
    except DamagedStoreError:
        return {}
    return {} if manifest is None else manifest.receipts


def _extract(
    store: FeatureStore,
    teacher: str,
    shards: list[int],
    source: Source,
    reporter: Reporter,
    report: Repair,
    promised: Sequence[str],
) -> None:
    """Extract shards of one teacher again, and add to the report what became of their images.

    `promised` are the digests that its receipts had.
    """
    planned = Planned.of(store).per_shard()
    unplanned = [shard for shard in shards if shard >= len(planned)]
    if unplanned:
        raise StoreError(
            f"{store.url}: {receipt_file(teacher, unplanned[0])} is of a shard that is not planned",
            "Restore `samples/` from a copy, or delete that receipt.",
        )
    before = {shard: _readable(store, teacher, shard) for shard in shards}
    receipt = any_receipt(store, teacher, shards)
    if receipt is None:
        raise StoreError(
            f"{store.url}: {teacher} has no receipt left that says how it was computed",
            f"Remove the folder receipts/{teacher} and run `olapipe extract` again.",
        )
    config = extract_config(store, teacher, source, receipt)
    for shard, known in before.items():
        if known is None:  # what cannot be read would stop the worker that replaces it
            store.place.remove(receipt_file(teacher, shard))
    tasks = [ShardTask(shard, (teacher,), int(planned[shard]), replace=True) for shard in shards]
    with worker_pool(config, config.corpus, len(tasks)) as pool:
        reporter.say(f"extracting {len(tasks)} shards of {teacher} again …")
        for record in pool.load():
            store.put_teacher(record)  # refuses features of another meaning
        total = sum(task.rows for task in tasks)
        reporter.begin({teacher: total}, {teacher: 0})
        try:
            done = pool.run(store, tasks, lambda tally: reporter.update({teacher: tally.settled[teacher]}))
        finally:
            reporter.end()
    if done.stopped in ("SIGINT", "SIGTERM"):
        raise interrupted(signal.Signals[done.stopped])
    for shard, known in before.items():
        now = _readable(store, teacher, shard)
        if now is None:
            continue
        if known is None:
            if shard >= len(promised) or receipt_digest(store, teacher, shard) != promised[shard]:
                report.gone.extend(
                    f"{sample.key}: no {teacher} feature: {row.reason}; whether it had one, the lost receipt said"
                    for sample, row in zip(store.shard_samples(shard), now.rows, strict=False)
                    if row.status == "failed" and row.reason != "forgotten"
                )
            continue
        for sample, old, new in zip(store.shard_samples(shard), known.rows, now.rows, strict=False):
            if old.status == "ok" and new.status == "failed":
                report.gone.append(f"{sample.key}: no {teacher} feature any more: {new.reason}")
            elif old.sha256 != new.sha256:
                report.changed.append(sample.key)
    report.lost.extend(f"{teacher} shard {entry.shard}: {entry.reason}" for entry in done.lost)


def _readable(store: FeatureStore, teacher: str, shard: int) -> Receipt | None:
    try:
        return store.receipt(teacher, shard)
    except DamagedStoreError:
        return None
