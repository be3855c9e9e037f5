"""The command `extract`: listing, plan, job, report. What can be refused is refused before any encoding."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from olapipe.bottleneck import Bottleneck, bottleneck
from olapipe.config import ExtractConfig
from olapipe.corpus import Growth, Listing, compare, list_corpus
from olapipe.direct import DirectSet, working
from olapipe.dryrun import DryRun, dry_run
from olapipe.job import worker_pool
from olapipe.pack import Packed
from olapipe.progress import Reporter
from olapipe.remembered import marks, recall, remember
from olapipe.report import TeacherSummary, summarise
from olapipe.tally import LostShard, Stop, Tally
from olapipe.tasks import Pending, Planned
from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings, resolve_options, suggest
from olapipe.teachers.checkpoint import local_path
from olapipe.tiers import Tier, choose
from olapipe.watch import watched
from olaschema.errors import StoreError, TeacherError
from olaschema.lease import writing
from olaschema.ledger import read_ledger
from olaschema.manifest import TeacherRecord
from olaschema.nesting import require_outside_stores
from olaschema.place import Place, absolute_url, open_place
from olaschema.replacing import finish_replacements
from olaschema.seal import seal, unseal
from olaschema.store import DEFAULT_ROWS_PER_SHARD, FeatureStore

RUNS = "runs.jsonl"
_LEDGER_SECONDS = 300.0
_STOPPED: dict[Stop, int] = {"max-failures": 3, "SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True)
class Extraction:
    """What a run did. `rates` are images per second, of the teachers that had something to do."""

    store: FeatureStore
    summaries: list[TeacherSummary]
    rates: dict[str, float]
    lost: list[LostShard]
    tally: Tally | None = None
    """What this run did; None where there was nothing to do."""
    bottleneck: Bottleneck | None = None
    packed: Packed | None = None
    """The packed set that was asked for; None where one was not, or it is not complete."""

    @property
    def stopped(self) -> Stop | None:
        """What ended the run early."""
        return self.tally.stopped if self.tally is not None else None

    @property
    def exit_code(self) -> int:
        """1 if a shard was given up, or a teacher has not one feature; single failed images are no error.

        Stopped: 3 by --max-failures, 130 by Ctrl-C, 143 by SIGTERM.
        """
        if self.stopped is not None:
            return _STOPPED[self.stopped]
        return 1 if self.lost or any(summary.ok == 0 for summary in self.summaries) else 0


def extract(config: ExtractConfig, reporter: Reporter) -> Extraction:
    """Bring the store up to date with the corpus; raises OlaError for what stops the whole run.

    A rerun with nothing to do starts no job. The teachers' fingerprints are compared with the store's: from the notes
    of the last run while checkpoints, settings and code are unchanged, else the teachers are loaded here, on the CPU.
    Two jobs on one store: of one teacher the later waits for the other to end, and then does what is left. A packed set
    is written from a working store beside it, which is the one that is returned.
    """
    with ExitStack() as held:
        return _extract(config, reporter, held)


def _extract(config: ExtractConfig, reporter: Reporter, held: ExitStack) -> Extraction:
    require_usable(config)
    config = _absolute(config)
    listing = list_corpus(config.corpus, config.images)
    direct = DirectSet(config, listing.root) if config.format == "webdataset" else None
    config = working(config) if direct is not None else config
    store = _present_store(config)
    # Also shows, before anything is loaded, that the place can be written to.
    place = open_place(config.out)
    _log_run(place, config)
    held.enter_context(writing(place, config.teachers, wait=True, say=reporter.say))
    if direct is not None:
        held.enter_context(direct.writing())
    store = _present_store(config)  # again: whoever was waited for may have made it
    growth = compare(listing, store)
    if direct is not None:
        direct.reopen(store, growth, reporter.say)
    reporter.say(_describe(listing, growth))
    for name in config.teachers if store is not None else ():
        finish_replacements(place, name)
    tasks = pending(store, config) if store is not None else None
    if store is not None and not growth.new and not tasks:
        return _unchanged(store, config, listing, reporter, direct)
    rows_per_shard = store.rows_per_shard if store else config.shard_size or DEFAULT_ROWS_PER_SHARD
    tiers = choose(config, listing, store, place, reporter)
    reporter.say("starting Ray …" if config.address is None else f"joining the Ray cluster at {config.address} …")
    with worker_pool(config, listing.root, len(tasks or ()) + -(-len(growth.new) // rows_per_shard)) as pool:
        workers = f"{len(pool)} worker{'s' if len(pool) > 1 else ''}"
        if len(pool) > pool.room:
            workers += f" (the cluster has room for {pool.room} now)"
        reporter.say(f"{workers}, loading {', '.join(config.teachers)} …")
        loaded = pool.load()
        store = _prepare(config, listing, growth, loaded, tiers, rows_per_shard)
        remember(store.place, pool.marks(), {record.fingerprint.teacher: record for record in loaded})
        tasks = pending(store, config)
        packing = held.enter_context(direct.packing(store)) if direct is not None else None
        waiting = {name: tasks.images(name) for name in config.teachers}
        planned = sum(generation.rows for generation in store.generations())
        before = {name: planned - waiting[name] for name in config.teachers}
        reporter.begin(dict.fromkeys(config.teachers, planned), before)
        started = time.monotonic()
        most = config.most_failures(max(waiting.values(), default=0))
        with watched(store.place, reporter, config, before, waiting) as watch:
            done = pool.run(
                store,
                tasks,
                _noting(store, config.teachers, watch),
                most_failures=most,
                shard_done=packing.shard_done if packing is not None else None,
            )
        spent = time.monotonic() - started
    _seal(store, config)
    packed = packing.finish() if packing is not None and done.stopped is None else None
    summaries = [summarise(store, name, brief=True) for name in config.teachers]
    rates = {name: done.settled[name] / spent for name, rows in waiting.items() if rows}
    slowest = bottleneck(done.seconds, spent, len(pool), config.decoders)
    return Extraction(store, summaries, rates, done.lost, done, slowest, packed)


def _noting(store: FeatureStore, teachers: Iterable[str], watch: Callable[[Tally], None]) -> Callable[[Tally], None]:
    """Return `watch`, noting the new receipts every few minutes as well, so that none is opened twice."""
    noted = time.monotonic()

    def watch_and_note(tally: Tally) -> None:
        nonlocal noted
        watch(tally)
        if time.monotonic() - noted > _LEDGER_SECONDS:
            for teacher in teachers:
                read_ledger(store, teacher, keep=True)
            noted = time.monotonic()

    return watch_and_note


def plan_only(config: ExtractConfig, reporter: Reporter) -> DryRun:
    """Return what `extract` would do, and touch nothing."""
    require_usable(config)
    config = _absolute(config)
    listing = list_corpus(config.corpus, config.images)
    config = working(config) if config.format == "webdataset" else config
    store = _present_store(config)
    growth = compare(listing, store)
    reporter.say(_describe(listing, growth))
    return dry_run(config, store, len(growth.new))


def require_usable(config: ExtractConfig) -> None:
    """Refuse what can be refused before anything is loaded or started."""
    known = registry.available()
    for name in config.teachers:
        if name not in known:
            raise TeacherError(f"there is no teacher {name!r}", suggest(name, known, "teachers"))
        if not known[name].problem:
            settings = TeacherSettings(preset=config.preset, options=config.options.get(name, {}))
            resolve_options(name, known[name].all_options, settings)
        if config.address is None and name in config.checkpoints:  # else the folders are those of the cluster's nodes
            local_path(name, config.checkpoints[name])


def pending(store: FeatureStore, config: ExtractConfig) -> Pending:
    """Return the shards that lack a receipt of at least one teacher or, with `retry_failed`, hold failed images."""
    return Pending(store, Planned.of(store), config.teachers, retry_failed=config.retry_failed)


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """Return the settings with absolute paths: workers may have another working folder."""
    checkpoints = {
        name: str(Path(value).expanduser().absolute()) if Path(value).expanduser().exists() else value
        for name, value in config.checkpoints.items()
    }
    paths = {"corpus": config.corpus.absolute(), "out": absolute_url(config.out), "checkpoints": checkpoints}
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
    require_outside_stores(config.out)
    if not place.vacant():
        raise StoreError(f"{config.out} exists and is not a feature store", "Choose a new or empty folder for --out.")
    return None


def _log_run(place: Place, config: ExtractConfig) -> None:
    settings = config.model_dump(mode="python")
    line = {"started": time.time(), "host": platform.node(), "pid": os.getpid(), "settings": settings}
    place.append_log(RUNS, json.dumps(line, default=str))


def _prepare(
    config: ExtractConfig,
    listing: Listing,
    growth: Growth,
    loaded: list[TeacherRecord],
    tiers: Mapping[str, Tier],
    rows_per_shard: int,
) -> FeatureStore:
    """Make or extend the store; everything that could be refused is refused before the first change."""
    store = FeatureStore.create(config.out, rows_per_shard=rows_per_shard)
    records = [tiers[record.fingerprint.teacher].settle(record) for record in loaded]
    with store.place.lock("plan"):
        store.place.sweep()
        store.place.clear_withdrawn()
        for record in records:
            if record.fingerprint.teacher in store.teachers():
                store.put_teacher(record)
        unseal(store, config.teachers)
        if tuple(store.generations()) != growth.basis:  # another run has planned since
            growth = compare(listing, store)
        store.add_plan(growth.new.tables())
        for record in records:
            store.put_teacher(record, tiers[record.fingerprint.teacher].basis)
        for name in store.teachers():  # the arrays of all teachers span all planned rows
            store.put_teacher(store.teacher(name))
    return store


def _unchanged(
    store: FeatureStore, config: ExtractConfig, listing: Listing, reporter: Reporter, direct: DirectSet | None
) -> Extraction:
    tiers = choose(config, listing, store, store.place, reporter)
    for name, record in _records(store, config, tiers, reporter).items():
        store.put_teacher(tiers[name].settle(record))
    store.place.sweep()
    _seal(store, config)  # a run that was killed at the very end has not
    packed = None
    if direct is not None:
        with direct.packing(store) as packing:
            packed = packing.finish()
    summaries = [summarise(store, name, brief=True) for name in config.teachers]
    return Extraction(store, summaries, {}, [], packed=packed)


def _records(
    store: FeatureStore, config: ExtractConfig, tiers: Mapping[str, Tier], reporter: Reporter
) -> dict[str, TeacherRecord]:
    """Return what the teachers are, from the notes of the last loading as far as nothing has changed since."""
    taken = marks(config)
    records = recall(store.place, taken)
    unknown = tuple(name for name in config.teachers if name not in records)
    if not unknown:
        reporter.say("nothing to extract; checkpoints and settings are those of the last run")
        return records
    from olapipe.load import load_teachers, teacher_record

    reporter.say(f"nothing to extract; loading {', '.join(unknown)} to compare with the store's …")
    for teacher in load_teachers(config.model_copy(update={"teachers": unknown}), "cpu").values():
        records[teacher.name] = teacher_record(teacher, tiers[teacher.name].precision)
    remember(store.place, {name: taken[name] for name in unknown if name in taken}, records)
    return records


def _seal(store: FeatureStore, config: ExtractConfig) -> None:
    with store.place.lock("plan"):
        seal(store, config.teachers)


def _describe(listing: Listing, growth: Growth) -> str:
    parts = [f"images in the corpus: {listing.count}"]
    if growth.known:
        parts.append(f"new: {len(growth.new)}")
    if listing.repeated:
        parts.append(f"repeated uses: {listing.repeated}")
    if listing.text_only:
        parts.append(f"entries without an image: {listing.text_only}")
    if growth.gone:
        parts.append(f"in the store but no longer in the corpus (their features are kept): {growth.gone}")
    for extension, count in listing.passed_over.items():
        if count:
            parts.append(f"{extension} files beside the images, not read: {count}")
    return "; ".join(parts)
