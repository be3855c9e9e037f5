"""Workers that outlive their job: processes of real Ray whose imports, most of a tiny job's time, are done once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from olapipe.config import ExtractConfig
from olapipe.job import WorkerPool, _Slot
from olapipe.worker import ShardWorker

_kept = False
_own_process = False


def _kept_worker() -> type:
    """The class is made here, or Ray's processes would look for this module, which is not on their path."""

    class KeptWorker(ShardWorker):
        """A worker of one job after the other, which keeps nothing of the last but what its process has imported."""

        def __init__(self) -> None:
            """Wait for `begin`."""

        def begin(self, config: ExtractConfig, root: Path, device: str) -> None:
            vars(self).clear()
            super().__init__(config, root, device)

    return KeptWorker


def _at_rest(slot: _Slot) -> bool:
    """Whether a worker lives and does nothing; one whose teacher was refused does."""
    import ray

    if slot.doing or (slot.loading is not None and not ray.wait([slot.loading], timeout=0)[0]):
        return False
    if slot.loading is not None:
        try:
            ray.get(slot.loading)
        except ray.exceptions.RayActorError:
            return False
        except ray.exceptions.RayTaskError:
            return True
    return True


@contextmanager
def kept_workers() -> Iterator[None]:
    """Let jobs on this process's Ray take workers that an earlier one has left idle, and leave theirs."""
    global _kept
    if _kept:  # by an earlier file
        yield
        return
    import ray

    idle: list[Any] = []
    kept_worker = ray.remote(_kept_worker())
    start, close = WorkerPool._start, WorkerPool.close

    def starting(pool: WorkerPool) -> _Slot:
        if _own_process or pool._device != "cpu":
            return start(pool)
        # without a CPU of its own: idle, it would be in the way of workers that are not kept
        actor = idle.pop() if idle else kept_worker.options(num_cpus=0, max_concurrency=4).remote()
        ray.get(actor.begin.remote(pool._config, pool._root, pool._device))
        return _Slot(actor, actor.load.remote())

    def closing(pool: WorkerPool) -> None:
        if _own_process or pool._device != "cpu":
            close(pool)
            return
        for slot in pool.slots:
            if _at_rest(slot):
                idle.append(slot.actor)
            else:  # what is under way must end here, as it does where the worker ends
                ray.kill(slot.actor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerPool, "_start", starting)
        patch.setattr(WorkerPool, "close", closing)
        _kept = True
        try:
            yield
        finally:
            _kept = False


@contextmanager
def own_workers() -> Iterator[None]:
    """Let jobs start and end their workers, as they do for a user: where that is what is tested."""
    global _own_process
    _own_process = True
    try:
        yield
    finally:
        _own_process = False
