"""The sample of `olapipe plan`: how a rate is told, and what becomes of a worker that fails."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest

from olapipe.measure import _encode, _Worker, steady_rate
from olapipe.tally import ShardTask
from olaschema.errors import TeacherError


def test_a_rate_leaves_out_the_start() -> None:
    # two shards of 8 images began together and were slow; then one a second
    assert steady_rate([30.0, 31.0, 33.0, 32.0], 8) == pytest.approx(2 * 8 / 2)


def test_a_worker_encodes_until_the_time_is_up_and_at_least_enough_for_a_rate() -> None:
    done: list[int] = []
    worker = SimpleNamespace(encode=lambda url, task: done.append(task.shard))
    tasks = [ShardTask(shard, ("depth",), 8) for shard in range(9)]
    assert 4 <= len(_encode(worker, "s", tasks, 0.0)) <= 5
    assert len(_encode(worker, "s", tasks, 60.0)) == 9
    assert sorted(done[-9:]) == list(range(9))


def test_what_a_worker_says_is_an_answer_an_error_or_its_death() -> None:
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    worker = _Worker(None, mine)
    theirs.send([1.0])
    theirs.send(TeacherError("no weights", "Download them."))
    theirs.close()
    assert worker.answer() == [1.0]
    with pytest.raises(TeacherError, match="no weights"):
        worker.answer()
    with pytest.raises(TeacherError, match="died while it measured"):
        worker.answer()
