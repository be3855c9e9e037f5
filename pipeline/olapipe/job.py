"""The Ray job: a pool of workers that each hold the teachers and write whole shards; what happens when one dies."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from olapipe.cluster import ray_running
from olapipe.config import ExtractConfig
from olapipe.metrics import JobMetrics
from olapipe.poison import Suspects
from olapipe.signals import StopFlag, stop_flag
from olapipe.tally import ERRORS, LostShard, ShardTask, Tally
from olapipe.worker import ShardWorker
from olaschema.errors import ConfigError, OlaError, StoreError, TeacherError
from olaschema.manifest import TeacherRecord
from olaschema.place import absolute_url
from olaschema.store import FeatureStore

_ATTEMPTS = 3
_POLL_SECONDS = 0.5
# One goes through the teachers while the one before it is written and the next one's first images are decoded.
_SHARDS_PER_WORKER = 2
# Further calls that an actor takes beside them: how far it is.
_OTHER_CALLS = 2


@dataclass
class _Work:
    """A shard, and how often it went wrong."""

    task: ShardTask
    failures: int = 0
    problem: str = ""
    suspects: Suspects | None = None
    """Set while its images are tried one by one."""
    tried: bool = False
    """Whether they have been."""


@dataclass
class _Slot:
    """A worker, and what it is doing."""

    actor: Any
    loading: Any
    """None once it has loaded its teachers."""
    doing: dict[Any, _Work] = field(default_factory=dict)
    asked: Any = None
    settled: dict[int, dict[str, int]] = field(default_factory=dict)

    def takes(self, work: _Work) -> bool:
        """Whether it is free for a shard; one that went wrong before gets a worker of its own."""
        if self.loading is not None or any(present.failures or present.suspects for present in self.doing.values()):
            return False
        return not self.doing if work.failures or work.suspects else len(self.doing) < _SHARDS_PER_WORKER


class WorkerPool:
    """Workers that are replaced when they die. Made by `worker_pool`."""

    def __init__(self, config: ExtractConfig, root: Path, device: str, workers: int, room: int) -> None:
        self.room = room
        """How many workers the cluster has room for now; the others start when machines join it."""
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
                records: list[TeacherRecord] = ray.get(slot.loading)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None
            except ray.exceptions.RayError as error:
                self._replace(slot, error)
                continue
            return records

    def marks(self) -> dict[str, str]:
        """Return by teacher what its record follows from, as `remembered.marks` does; nothing if the worker is lost."""
        import ray

        try:
            found: dict[str, str] = ray.get(self._slots[0].actor.marks.remote())
        except ray.exceptions.RayError:
            return {}
        return found

    def run(
        self,
        store: FeatureStore,
        tasks: Iterable[ShardTask],
        watch: Callable[[Tally], None],
        *,
        most_failures: int | None = None,
        shard_done: Callable[[int], None] | None = None,
    ) -> Tally:
        """Encode every task's shard; return what was done, with the shards given up.

        `tasks` are drawn as workers become free. A worker that dies is replaced and its shards are tried again, as is
        a shard whose encoding raised something unforeseen; after three times its images are tried one by one, and
        those that kill a worker, or that the teacher raises an error on, are recorded as failed. `watch` is called
        about twice a second, `shard_done` with every shard that is committed. More than `most_failures` failed images
        of one teacher, Ctrl-C and SIGTERM end the run when what is in flight has finished. Raises the OlaError that a
        worker meets: it would meet every other shard too.
        """
        with stop_flag() as flag:
            return _Run(self, store, iter(tasks), watch, shard_done, most_failures, flag).go()

    def close(self) -> None:
        """Stop all workers at once."""
        import ray

        for slot in self._slots:
            with suppress(ray.exceptions.RayError):
                ray.kill(slot.actor)

    @property
    def batch_size(self) -> int:
        """Images per forward pass as asked for."""
        return self._config.batch_size

    @property
    def slots(self) -> list[_Slot]:
        """The workers."""
        return self._slots

    def loaded(self, slot: _Slot) -> None:
        """Take note of a worker that has answered `load`; raises TeacherError."""
        import ray

        try:
            ray.get(slot.loading)
        except ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except ray.exceptions.RayError as error:
            self._replace(slot, error)
            return
        slot.loading = None

    def replace(self, slot: _Slot) -> None:
        """Start a new worker in the place of one that died."""
        self._slots[self._slots.index(slot)] = self._start()

    def _start(self) -> _Slot:
        import ray

        # GPUs are given out whole or in fractions; one CPU is for the thread that feeds the device
        on_gpu = self._config.gpus_per_worker if self._device == "cuda" else 0
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": on_gpu,
            "max_concurrency": _SHARDS_PER_WORKER + _OTHER_CALLS,
            "max_restarts": 0,
        }
        actor: Any = ray.remote(ShardWorker).options(**options).remote(self._config, self._root, self._device)
        return _Slot(actor, actor.load.remote())

    def _replace(self, slot: _Slot, error: Exception) -> None:
        if not _machine_lost(error):
            self._deaths_while_loading += 1
        if self._deaths_while_loading >= _ATTEMPTS:
            raise TeacherError(
                f"workers die while they load the teachers: {str(error).splitlines()[0]}",
                "Each worker holds all teachers: use fewer --workers, or a machine with more memory.",
            ) from None
        self.replace(slot)


class _Run:
    """The loop of one job. Holds the shards in flight and those that went wrong, nothing that grows with the corpus."""

    def __init__(
        self,
        pool: WorkerPool,
        store: FeatureStore,
        tasks: Iterator[ShardTask],
        watch: Callable[[Tally], None],
        shard_done: Callable[[int], None] | None,
        most_failures: int | None,
        flag: StopFlag,
    ) -> None:
        self._pool = pool
        self._store = store
        self._url = absolute_url(store.url)
        self._tasks = tasks
        self._watch = watch
        self._shard_done = shard_done
        self._most_failures = most_failures
        self._flag = flag
        self._again: deque[_Work] = deque()
        self._next: _Work | None = None
        self._settled: Counter[str] = Counter()
        self._tally = Tally()
        self._metrics = JobMetrics()
        self._shown = 0.0

    def go(self) -> Tally:
        import ray

        while True:
            self._stop_if_asked()
            if self._tally.stopped is None:
                self._give_out()
            busy = {reference: slot for slot in self._pool.slots for reference in slot.doing}
            if not busy and (self._tally.stopped is not None or not self._more()):
                break
            loading = {slot.loading: slot for slot in self._pool.slots if slot.loading is not None}
            ready, _ = ray.wait([*busy, *loading], num_returns=1, timeout=_POLL_SECONDS)
            for reference in ready:
                if reference in loading:
                    self._pool.loaded(loading[reference])
                elif reference in busy[reference].doing:  # else its worker died, and that was seen at another shard
                    self._settle(busy[reference], reference)
            self._show()
        self._show()
        return self._tally

    def _stop_if_asked(self) -> None:
        if self._tally.stopped is not None:
            return
        if self._flag.number is not None:
            self._tally.stopped = "SIGTERM" if self._flag.number.name == "SIGTERM" else "SIGINT"
        elif self._most_failures is not None and self._tally.failures > self._most_failures:
            self._tally.stopped = "max-failures"

    def _more(self) -> bool:
        if self._next is None:
            task = next(self._tasks, None)
            self._next = None if task is None else _Work(task)
        return bool(self._again) or self._next is not None

    def _give_out(self) -> None:
        """Give every free worker shards, those with least first; shards that went wrong before all others."""
        while self._more():
            work = self._again[0] if self._again else self._next
            if work is None:
                return
            free = [slot for slot in self._pool.slots if slot.takes(work)]
            if not free:
                return
            if self._again:
                self._again.popleft()
            else:
                self._next = None
            self._begin(min(free, key=lambda slot: len(slot.doing)), work)

    def _begin(self, slot: _Slot, work: _Work) -> None:
        if work.suspects is not None:
            teacher, index = work.suspects.next()
            reference = slot.actor.probe.remote(self._url, work.task.shard, teacher, index)
        else:
            reference = slot.actor.encode.remote(self._url, work.task)
        slot.doing[reference] = work

    def _settle(self, slot: _Slot, reference: Any) -> None:
        """Take note of what became of a shard, or of an image that is tried alone."""
        import ray

        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, OlaError):
                raise cause from None
            self._log(str(error))
            self._went_wrong(slot.doing.pop(reference), "teacher-failed", f"{type(cause).__name__}: {cause}")
            return
        except ray.exceptions.RayError as error:
            self._log(str(error))
            self._pool.replace(slot)
            for work in slot.doing.values():
                if _machine_lost(error):  # says nothing about the images
                    self._again.appendleft(work)
                else:
                    self._went_wrong(work, "crashed", "its worker died (out of memory, or killed from outside)")
            slot.doing = {}
            return
        work = slot.doing.pop(reference)
        if work.suspects is not None:
            work.suspects.survived()
            self._after_trial(work, work.suspects)
            return
        self._tally.add(work.task, result, self._pool.batch_size)
        self._settled.update(dict.fromkeys(work.task.teachers, work.task.rows))
        if self._shard_done is not None:
            self._shard_done(work.task.shard)

    def _went_wrong(self, work: _Work, reason: str, problem: str) -> None:
        if work.suspects is not None:
            work.suspects.blame(reason)
            self._after_trial(work, work.suspects)
            return
        work.failures += 1
        work.problem = problem
        if work.failures >= _ATTEMPTS and work.tried:
            lost = LostShard(work.task.shard, f"{problem}; tried one by one, none of its images does that")
            self._tally.lost.append(lost)
            return
        if work.failures >= _ATTEMPTS:
            work.suspects = Suspects(work.task)
        self._again.appendleft(work)

    def _after_trial(self, work: _Work, suspects: Suspects) -> None:
        if suspects.hopeless:
            reason = f"{work.problem}; {suspects.found} of its images do that alone, so they are not to blame"
            self._tally.lost.append(LostShard(work.task.shard, reason))
        elif suspects.done:
            self._again.appendleft(_Work(replace(work.task, poisoned=suspects.poisoned()), tried=True))
        else:
            self._again.appendleft(work)

    def _log(self, text: str) -> None:
        with suppress(StoreError):  # the store itself may be what failed; the workers say so
            self._store.place.append_log(ERRORS, text)

    def _show(self) -> None:
        """Bring the tally up to date with what workers answer, without waiting, and show it."""
        import ray

        under_way = Counter(self._settled)
        for slot in self._pool.slots:
            if not slot.doing:
                slot.asked, slot.settled = None, {}
                continue
            if slot.asked is None:
                slot.asked = slot.actor.progress.remote()
            elif ray.wait([slot.asked], timeout=0)[0]:
                try:
                    slot.settled = ray.get(slot.asked)
                except ray.exceptions.RayError:
                    slot.settled = {}  # the worker died; its tasks say so
                slot.asked = None
            present = {work.task.shard for work in slot.doing.values()}
            for shard, settled in slot.settled.items():
                if shard in present:
                    under_way.update(settled)
        self._tally.settled = under_way
        self._tally.in_flight = sum(len(slot.doing) for slot in self._pool.slots)
        self._tally.workers = sum(slot.loading is None for slot in self._pool.slots)
        now = time.monotonic()
        if now - self._shown >= _POLL_SECONDS:
            self._shown = now
            self._metrics.show(self._tally, len(self._again))
        self._watch(self._tally)


@contextmanager
def worker_pool(config: ExtractConfig, root: Path, shards: int) -> Iterator[WorkerPool]:
    """Start Ray (or join the cluster at `config.address`) and yield a pool for about `shards` tasks.

    On a cluster, `config.workers` may be more than it has room for: an autoscaler adds machines for those that wait.
    Raises OlaError where Ray cannot be started or joined, ConfigError for more workers than fit this machine.
    """
    with ray_running(config.address, config.workers or 1):
        device, room = _room(config)
        if config.workers is not None and config.workers > room and config.address is None:
            kind = "GPUs" if device == "cuda" else "CPUs"
            raise ConfigError(
                f"{config.workers} workers were asked for, the {kind} here are enough for {room}",
                f"Use --workers {room} or fewer.",
            )
        pool = WorkerPool(config, root, device, min(config.workers or room, max(shards, 1)), room)
        try:
            yield pool
        finally:
            pool.close()


def _room(config: ExtractConfig) -> tuple[str, int]:
    """Return the device to use, and how many workers fit."""
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    to_come = config.address is not None and config.workers is not None
    if config.device == "cuda" and not gpus and not to_come:
        raise ConfigError(
            "--device cuda: Ray sees no GPU here",
            "Use --device cpu, or --address of a cluster with GPUs; --workers N too if it gets them when asked for.",
        )
    if config.device == "cuda" or (gpus and config.device != "cpu"):
        return "cuda", int(gpus / config.gpus_per_worker)
    cpus = int(resources.get("CPU", 0))
    return "cpu", cpus if to_come else max(cpus, 1)


def _machine_lost(error: Exception) -> bool:
    """Whether a worker died because its whole machine went away."""
    text = str(error)
    return "node has died" in text or "node was terminated" in text or "node is dead" in text


def _cause(error: Any) -> Exception:
    cause: Exception = error.cause
    return cause
