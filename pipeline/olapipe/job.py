"""The Ray job: a pool of workers that each hold the teachers and write whole shards. The only module that uses ray."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olapipe.config import ExtractConfig
from olaschema.errors import ConfigError, OlaError, TeacherError
from olaschema.manifest import TeacherRecord
from olaschema.place import absolute_url
from olaschema.store import FeatureStore

_ATTEMPTS = 3
_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 5.0
# Nothing large goes through Ray's object store: tasks are numbers and the shards are written by the workers.
_OBJECT_STORE_BYTES = 80 << 20
ERRORS = "errors.log"


@dataclass(frozen=True)
class ShardTask:
    """One shard to encode for the teachers that lack it. `replace`: also what is committed, as images are now."""

    shard: int
    teachers: tuple[str, ...]
    rows: int
    replace: bool = False


@dataclass(frozen=True)
class LostShard:
    """A shard that was given up, and why."""

    shard: int
    reason: str


class ShardWorker:
    """The actor: loads the teachers once, then encodes one shard after another."""

    def __init__(self, config: ExtractConfig, root: Path, device: str) -> None:
        # cuBLAS picks its workspace from this when it is first used; without it sums may differ from run to run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._config = config
        self._root = root
        self._device = device
        self._teachers: dict[str, Any] = {}
        self._encoder: Any = None
        self._settled: dict[str, int] = {}

    def load(self) -> list[TeacherRecord]:
        """Load the teachers and describe them; raises TeacherError."""
        import torch

        from olapipe.load import load_teachers, teacher_record

        torch.set_num_threads(self._config.threads)
        self._teachers = load_teachers(self._config, self._device)
        return [teacher_record(teacher, self._config.precision) for teacher in self._teachers.values()]

    def encode(self, out: str, task: ShardTask) -> None:
        """Encode and commit one shard."""
        if self._encoder is None:
            self._encoder = self._make_encoder(out)
        self._settled = {}
        self._encoder.encode(task.shard, task.teachers, self._settled.__setitem__, replace=task.replace)

    def progress(self) -> dict[str, int]:
        """Return how many rows of the present shard are settled; runs beside `encode`."""
        return dict(self._settled)

    def _make_encoder(self, out: str) -> Any:
        import warnings

        from olapipe.encode import Limits, ShardEncoder, execution

        # decoding switches warnings off and on again, which is not safe in several threads: here they stay off
        warnings.simplefilter("ignore")
        store = FeatureStore.open(out)
        records = {name: store.teacher(name) for name in self._teachers}
        for name, record in records.items():
            record.fingerprint.require_equal(
                self._teachers[name].fingerprint,
                mine="in the store",
                theirs="of a worker",
                remedy="Every machine of the job must hold the same checkpoints under the same paths.",
            )
        limits = Limits(self._config.batch_size, self._config.max_pixels, self._config.decoders)
        how = execution(self._device, self._config.batch_size, compiled=self._config.compile)
        return ShardEncoder(store, self._root, self._teachers, records, limits, how)


@dataclass
class _Slot:
    """A worker, and what it is doing."""

    actor: Any
    doing: Any
    task: ShardTask | None = None
    """None while it loads, or is idle."""
    loaded: bool = False
    asked: Any = None
    settled: dict[str, int] = field(default_factory=dict)


class WorkerPool:
    """Workers that are replaced when they die. Made by `worker_pool`."""

    def __init__(self, config: ExtractConfig, root: Path, device: str, workers: int) -> None:
        self._config = config
        self._root = root
        self._device = device
        self._deaths_while_loading = 0
        self._slots = [self._start() for _ in range(workers)]

    def __len__(self) -> int:
        return len(self._slots)

    def load(self) -> list[TeacherRecord]:
        """Wait for the first worker and return its teachers' records; raises TeacherError."""
        import ray

        while True:
            slot = self._slots[0]
            try:
                records: list[TeacherRecord] = ray.get(slot.doing)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except ray.exceptions.RayError as error:
                self._replace(slot, error)
                continue
            return records

    def run(
        self, store: FeatureStore, tasks: Sequence[ShardTask], progress: Callable[[str, int], None]
    ) -> list[LostShard]:
        """Encode every task's shard; return those given up.

        A worker that dies is replaced and its shard tried again, as is a shard whose encoding raised something
        unforeseen. `progress(teacher, rows)` is told the rows settled so far in all of this run. Raises the OlaError
        that a worker meets: it would meet every other shard too.
        """
        import ray

        queue = deque(tasks)
        attempts: Counter[int] = Counter()
        finished: Counter[str] = Counter()
        lost: list[LostShard] = []
        while queue or any(slot.task for slot in self._slots):
            for slot in self._slots:
                if slot.loaded and slot.task is None and queue:
                    slot.task = queue.popleft()
                    slot.settled = {}
                    slot.doing = slot.actor.encode.remote(absolute_url(store.url), slot.task)
            busy = {slot.doing: slot for slot in self._slots if slot.task or not slot.loaded}
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=_POLL_SECONDS)
            for reference in ready:
                slot = busy[reference]
                task = slot.task
                problem = self._settle(slot, store)
                if task is None:
                    continue
                if problem is None:
                    finished.update(dict.fromkeys(task.teachers, task.rows))
                    continue
                attempts[task.shard] += 1
                if attempts[task.shard] < _ATTEMPTS:
                    queue.appendleft(task)
                else:
                    lost.append(LostShard(task.shard, problem))
            self._poll()
            under_way = Counter(finished)
            for slot in self._slots:
                if slot.task is not None:
                    under_way.update(slot.settled)
            for name in self._config.teachers:
                progress(name, under_way[name])
        return lost

    def close(self) -> None:
        """Stop all workers at once."""
        import ray

        for slot in self._slots:
            ray.kill(slot.actor)

    def _start(self) -> _Slot:
        import ray

        on_gpu = 1 if self._device == "cuda" else 0
        # two threads: one encodes, one answers how far it is
        options = {"num_cpus": 1, "num_gpus": on_gpu, "max_concurrency": 2, "max_restarts": 0}
        actor: Any = ray.remote(ShardWorker).options(**options).remote(self._config, self._root, self._device)
        return _Slot(actor, actor.load.remote())

    def _settle(self, slot: _Slot, store: FeatureStore) -> str | None:
        """Take note of what a worker finished; return what went wrong with its task, if anything."""
        import ray

        try:
            ray.get(slot.doing)
        except ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, OlaError) or not slot.loaded:
                raise cause from None
            store.place.append_log(ERRORS, str(error))
            slot.task = None
            return f"{type(cause).__name__}: {cause}"
        except ray.exceptions.RayError as error:
            store.place.append_log(ERRORS, str(error))
            self._replace(slot, error)
            return "its worker died (out of memory, or killed from outside)"
        slot.loaded = True
        slot.task = None
        return None

    def _replace(self, slot: _Slot, error: Exception) -> None:
        if not slot.loaded:
            self._deaths_while_loading += 1
            if self._deaths_while_loading >= _ATTEMPTS:
                raise TeacherError(
                    f"workers die while they load the teachers: {str(error).splitlines()[0]}",
                    "Each worker holds all teachers: use fewer --workers, or a machine with more memory.",
                ) from None
        self._slots[self._slots.index(slot)] = self._start()

    def _poll(self) -> None:
        """Collect answers on progress and ask again, without waiting."""
        import ray

        for slot in self._slots:
            if slot.task is None:
                slot.asked = None
            elif slot.asked is None:
                slot.asked = slot.actor.progress.remote()
            elif ray.wait([slot.asked], timeout=0)[0]:
                try:
                    slot.settled = ray.get(slot.asked)
                except ray.exceptions.RayError:
                    slot.settled = {}  # the worker died; its task says so
                slot.asked = None


@contextmanager
def worker_pool(config: ExtractConfig, root: Path, shards: int) -> Iterator[WorkerPool]:
    """Start Ray (or join the cluster at `config.address`) and yield a pool for about `shards` tasks.

    Raises OlaError where Ray cannot be started or joined, ConfigError for more workers than there is room for.
    """
    with ray_running(config.address, config.workers or 1):
        device, room = _room(config)
        if config.workers is not None and config.workers > room:
            kind = "GPUs" if device == "cuda" else "CPUs"
            raise ConfigError(
                f"{config.workers} workers were asked for, there are {room} {kind}", f"Use --workers {room} or fewer."
            )
        pool = WorkerPool(config, root, device, min(config.workers or room, max(shards, 1)))
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def ray_running(address: str | None, cpus: int) -> Iterator[None]:
    """Join the cluster at `address`, or start Ray here with room for `cpus` workers at least; stop it in the end.

    A Ray that this process has running already is used and left running. Raises OlaError where there is none to use.
    """
    if address is None:
        # Set before ray is imported, which reads it then: servers listen on the loopback address only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # A token for this run alone; otherwise Ray writes one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    scratch = None if address else _scratch_folder()
    try:
        _initialise(address, cpus, scratch)
        yield
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _initialise(address: str | None, cpus: int, scratch: str | None) -> None:
    import ray

    where: dict[str, Any] = {
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": scratch,
    }
    if address is not None:
        _require_reachable(address)
        where = {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (RuntimeError, ValueError, ConnectionError, OSError) as error:
        if address is not None:
            raise _unreachable(address, error) from error
        raise OlaError(
            f"Ray cannot be started here: {_first_line(error)}", "Free memory or processes, or use --address."
        ) from error


def _require_reachable(address: str) -> None:
    """Ray itself tries a dead address for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator:
        return  # `auto`, which Ray answers at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> OlaError:
    return OlaError(
        f"no Ray cluster can be joined at {address}: {_first_line(error)}",
        "Check --address, and RAY_AUTH_TOKEN if the cluster wants one. Without --address Ray is started here.",
    )


def _scratch_folder() -> str:
    # Sockets live in there, and their paths may have 107 bytes at most.
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="olapipe-", dir=parent if len(parent) <= 24 else "/tmp")  # noqa: S108


def _room(config: ExtractConfig) -> tuple[str, int]:
    """Return the device to use, and how many workers fit."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise ConfigError(
            "--device cuda: Ray sees no GPU here", "Use --device cpu, or --address of a cluster with GPUs."
        )
    if gpus and config.device != "cpu":
        return "cuda", gpus
    return "cpu", max(int(resources.get("CPU", 1)), 1)


def _cause(error: Any) -> Exception:
    cause: Exception = error.cause
    return cause


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
