"""The command `extract`: listing, plan, job, report. What can be refused is refused before any encoding."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from olapipe.config import ExtractConfig
from olapipe.corpus import Growth, Listing, compare, list_corpus
from olapipe.job import LostShard, ShardTask, worker_pool
from olapipe.progress import Reporter
from olapipe.report import TeacherSummary, summarise
from olapipe.teachers import registry
from olapipe.teachers.base import suggest
from olaschema.errors import StoreError, TeacherError
from olaschema.manifest import Receipt, TeacherRecord
from olaschema.place import Place, open_place
from olaschema.seal import seal, unseal
from olaschema.store import DEFAULT_ROWS_PER_SHARD, FeatureStore

RUNS = "runs.jsonl"


@dataclass(frozen=True)
class Extraction:
    """What a run did. `rates` are images per second, of the teachers that had something to do."""

    store: FeatureStore
    summaries: list[TeacherSummary]
    rates: dict[str, float]
    lost: list[LostShard]

    @property
    def exit_code(self) -> int:
        """1 if a shard was given up, or a teacher has not one feature; single failed images are no error."""
        return 1 if self.lost or any(summary.ok == 0 for summary in self.summaries) else 0


def extract(config: ExtractConfig, reporter: Reporter) -> Extraction:
    """Bring the store up to date with the corpus; raises OlaError for what stops the whole run.

    A rerun with nothing to do starts no job: the teachers are loaded here, on the CPU, only to compare their
    fingerprints with the store's.
    """
    known = registry.available()
    for name in config.teachers:
        if name not in known:
            raise TeacherError(f"there is no teacher {name!r}", suggest(name, known, "teachers"))
    config = _absolute(config)
    listing = list_corpus(config.corpus, config.images)
    store = _present_store(config)
    # Also shows, before anything is loaded, that the place can be written to.
    _log_run(open_place(config.out), config)
    growth = compare(listing, store)
    reporter.say(_describe(listing, growth))
    tasks = pending(store, config) if store is not None else []
    if store is not None and not growth.new and not tasks:
        return _unchanged(store, config, reporter)
    rows_per_shard = store.rows_per_shard if store else config.shard_size or DEFAULT_ROWS_PER_SHARD
    with worker_pool(config, listing.root, len(tasks) + -(-len(growth.new) // rows_per_shard)) as pool:
        workers = f"{len(pool)} worker{'s' if len(pool) > 1 else ''}"
        reporter.say(f"{workers}, loading {', '.join(config.teachers)} …")
        store = _prepare(config, listing, pool.load(), rows_per_shard)
        tasks = pending(store, config)
        waiting = {name: sum(task.rows for task in tasks if name in task.teachers) for name in config.teachers}
        planned = sum(generation.rows for generation in store.generations())
        before = {name: planned - waiting[name] for name in config.teachers}
        reporter.begin(dict.fromkeys(config.teachers, planned), before)
        started = time.monotonic()
        try:
            lost = pool.run(store, tasks, lambda name, rows: reporter.update({name: before[name] + rows}))
        finally:
            reporter.end()
        spent = time.monotonic() - started
    _seal(store, config)
    summaries = [summarise(store, name) for name in config.teachers]
    rates = {name: rows / spent for name, rows in waiting.items() if rows}
    return Extraction(store, summaries, rates, lost)


def pending(store: FeatureStore, config: ExtractConfig) -> list[ShardTask]:
    """Return the shards that lack a receipt of at least one teacher or, with `retry_failed`, hold failed images."""
    committed = {name: set(store.committed(name)) for name in config.teachers}
    tasks = []
    for shard, rows in shard_rows(store).items():
        missing = [name for name in config.teachers if shard not in committed[name]]
        failed = []
        if config.retry_failed:
            receipts = {name: store.receipt(name, shard) for name in config.teachers if name not in missing}
            failed = [name for name, receipt in receipts.items() if receipt is not None and _mendable(receipt)]
        if missing or failed:
            wanted = tuple(name for name in config.teachers if name in missing or name in failed)
            tasks.append(ShardTask(shard, wanted, rows, replace=config.retry_failed))
    return tasks


def _mendable(receipt: Receipt) -> bool:
    return any(row.status == "failed" and row.reason != "forgotten" for row in receipt.rows)


def shard_rows(store: FeatureStore) -> dict[int, int]:
    """Return how many images each shard has."""
    size = store.rows_per_shard
    return {
        (generation.first_row + offset) // size: min(size, generation.rows - offset)
        for generation in store.generations()
        for offset in range(0, generation.rows, size)
    }


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """Return the settings with absolute paths: workers may have another working folder."""
    checkpoints = {
        name: str(Path(value).expanduser().absolute()) if Path(value).expanduser().exists() else value
        for name, value in config.checkpoints.items()
    }
    paths = {"corpus": config.corpus.absolute(), "out": config.out.absolute(), "checkpoints": checkpoints}
    if config.images is not None:
        paths["images"] = config.images.absolute()
    return config.model_copy(update=paths)


def _present_store(config: ExtractConfig) -> FeatureStore | None:
    """Return the store at `out`, None where there is none yet and one can be made."""
    place = open_place(config.out)
    if place.exists("zarr.json"):
        if config.shard_size is not None:
            return FeatureStore.create(config.out, rows_per_shard=config.shard_size)
        return FeatureStore.open(config.out)
    if not place.vacant():
        raise StoreError(f"{config.out} exists and is not a feature store", "Choose a new or empty folder for --out.")
    return None


def _log_run(place: Place, config: ExtractConfig) -> None:
    settings = config.model_dump(mode="python")
    line = {"started": time.time(), "host": platform.node(), "pid": os.getpid(), "settings": settings}
    place.append_log(RUNS, json.dumps(line, default=str))


def _prepare(
    config: ExtractConfig, listing: Listing, records: list[TeacherRecord], rows_per_shard: int
) -> FeatureStore:
    """Make or extend the store; everything that could be refused is refused before the first change."""
    store = FeatureStore.create(config.out, rows_per_shard=rows_per_shard)
    with store.place.lock("plan"):
        store.place.sweep()
        store.place.clear_withdrawn()
        for record in records:
            if record.fingerprint.teacher in store.teachers():
                store.put_teacher(record)
        unseal(store, config.teachers)
        growth = compare(listing, store)  # again: another run may have planned since
        store.add_generation(entry.sample() for entry in growth.new)
        for record in records:
            store.put_teacher(record)
        for name in store.teachers():  # the arrays of all teachers span all planned rows
            store.put_teacher(store.teacher(name))
    return store


def _unchanged(store: FeatureStore, config: ExtractConfig, reporter: Reporter) -> Extraction:
    from olapipe.load import load_teachers, teacher_record

    reporter.say("nothing to extract; comparing the teachers with the store's …")
    for teacher in load_teachers(config, "cpu").values():
        store.put_teacher(teacher_record(teacher, config.precision))
    store.place.sweep()
    _seal(store, config)  # a run that was killed at the very end has not
    return Extraction(store, [summarise(store, name) for name in config.teachers], {}, [])


def _seal(store: FeatureStore, config: ExtractConfig) -> None:
    with store.place.lock("plan"):
        seal(store, config.teachers)


def _describe(listing: Listing, growth: Growth) -> str:
    parts = [f"images in the corpus: {len(listing.entries)}"]
    if growth.known:
        parts.append(f"new: {len(growth.new)}")
    if listing.repeated:
        parts.append(f"repeated uses: {listing.repeated}")
    if listing.text_only:
        parts.append(f"entries without an image: {listing.text_only}")
    if growth.gone:
        parts.append(f"in the store but no longer in the corpus (their features are kept): {growth.gone}")
    return "; ".join(parts)
