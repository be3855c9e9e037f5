"""The parts of a job that need no Ray: suspects, the tally, the slowest stage, notes and status, limits, signals."""

from __future__ import annotations

import atexit
import fcntl
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from pydantic import ValidationError
from rich.console import Console

from olapipe import job
from olapipe.bottleneck import bottleneck, busy
from olapipe.cluster import ray_running, sweep_scratch
from olapipe.config import ExtractConfig
from olapipe.poison import Suspects
from olapipe.progress import LineReporter
from olapipe.signals import Terminated, sigterm_raises, stop_flag
from olapipe.status import JOBS, Heartbeat, JobNote, jobs, show_status, teacher_status
from olapipe.tally import ShardResult, ShardTask, Stop, Tally
from olapipe.watch import watched
from olaschema.errors import ConfigError, OlaError
from olaschema.manifest import SampleRow
from olaschema.place import LocalPlace
from olaschema.store import FeatureStore


def _try(suspects: Suspects, deadly: set[tuple[str, int]], raising: set[tuple[str, int]]) -> int:
    deaths = 0
    while not suspects.done and not suspects.hopeless:
        present = suspects.next()
        if present in deadly:
            deaths += 1
            suspects.blame("crashed")
        elif present in raising:
            suspects.blame("teacher-failed")
        else:
            suspects.survived()
    return deaths


def test_suspects_are_blamed_by_teacher_and_a_death_counts_when_it_happens_twice() -> None:
    task = ShardTask(3, ("a", "b"), 5, poisoned={"b": {4: "crashed"}})
    suspects = Suspects(task)
    assert _try(suspects, {("a", 1)}, {("b", 0)}) == 2
    assert suspects.poisoned() == {"a": {1: "crashed"}, "b": {0: "teacher-failed", 4: "crashed"}}
    assert task.poisoned == {"b": {4: "crashed"}}, "the task itself stays as it was"


def test_one_death_from_outside_is_no_images_fault() -> None:
    suspects = Suspects(ShardTask(0, ("a",), 2))
    suspects.blame("crashed")
    suspects.survived()
    suspects.blame("crashed")
    suspects.survived()
    assert suspects.done and suspects.poisoned() == {}


def test_a_broken_teacher_is_not_the_images_fault() -> None:
    suspects = Suspects(ShardTask(0, ("a",), 100))
    deaths = _try(suspects, {("a", row) for row in range(100)}, set())
    assert suspects.hopeless and deaths == 18


def test_a_tally_counts_shards_and_names_those_with_smaller_batches() -> None:
    tally = Tally()
    tally.add(ShardTask(0, ("a", "b"), 4), ShardResult({"a": 3, "b": 4}, {"a": 1, "b": 0}, {"a": 8, "b": 8}, {}), 8)
    tally.add(ShardTask(5, ("a",), 4), ShardResult({"a": 2}, {"a": 2}, {"a": 2}, {"forward": 0.5, "write": 1.25}), 8)
    assert dict(tally.ok) == {"a": 5, "b": 4} and tally.failures == 3 and tally.shards == 2
    assert tally.smaller == {"a": {5: 2}}
    assert tally.seconds["write"] == 1.25


def test_the_busiest_stage_is_named_with_the_decoding_threads_taken_together() -> None:
    seconds = {"read": 2.0, "decode": 6.0, "preprocess": 8.0, "forward": 7.0, "write": 1.0, "wait": 9.0}
    shares = busy(seconds, wall=10.0, workers=1, decoders=2)
    assert shares["decode"] == pytest.approx(0.3) and shares["forward"] == pytest.approx(0.7)
    found = bottleneck(seconds, 10.0, 1, 2)
    assert found is not None and found.stage == "preprocess" and found.busy == pytest.approx(0.8)
    found = bottleneck(seconds | {"forward": 9.0}, 10.0, 1, 2)
    assert found is not None and found.stage == "forward" and found.busy == pytest.approx(0.9)
    found = bottleneck(seconds | {"write": 19.8}, 10.0, 2, 2)
    assert found is not None and found.stage == "write" and found.busy == pytest.approx(0.99)
    assert bottleneck({}, 10.0, 1, 2) is None


@pytest.mark.parametrize(
    ("given", "most"), [("12", 12), ("5%", 10), ("0", 0), ("2.5%", 5), ("0%", 0), ("100%", 200), (7, 7)]
)
def test_max_failures_is_a_number_or_a_share(given: object, most: int) -> None:
    assert _config(given).most_failures(200) == most


@pytest.mark.parametrize("given", ["-1", "5 %", "many", "%", "1.5", "100.1%", "200%"])
def test_other_limits_are_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="max_failures"):
        _config(given)


def _config(most: object) -> ExtractConfig:
    return ExtractConfig.model_validate(_settings() | {"max_failures": most})


def _settings() -> dict[str, object]:
    return {"corpus": "c", "out": "s", "teachers": ("depth",)}


def test_the_first_signal_sets_a_flag_and_the_second_one_raises() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_flag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.number == signal.SIGTERM
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    with sigterm_raises(), pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    # Ray, where it waits, makes a KeyboardInterrupt of what a handler raises
    with pytest.raises(Terminated), sigterm_raises():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise KeyboardInterrupt from None
    with pytest.raises(Terminated), stop_flag():
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise KeyboardInterrupt from None
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("given", "present", "device", "workers", "room"),
    [
        ({}, {"CPU": 4.0}, "cpu", 4, 4),
        ({}, {"CPU": 4.0, "GPU": 2.0}, "cuda", 2, 2),
        ({"gpus_per_worker": 0.5}, {"CPU": 4.0, "GPU": 2.0}, "cuda", 4, 4),
        ({"address": "auto", "workers": 6}, {"CPU": 4.0}, "cpu", 6, 4),
        ({"address": "auto", "workers": 6, "device": "cuda"}, {"CPU": 0.0}, "cuda", 6, 0),
        ({"address": "auto", "device": "cuda"}, {"CPU": 4.0}, "no GPU", 0, 0),
        ({"workers": 6}, {"CPU": 4.0}, "enough for 4", 0, 0),
        ({"workers": 2, "device": "cuda"}, {"CPU": 4.0}, "no GPU", 0, 0),
    ],
)
def test_workers_wait_for_machines_that_a_cluster_gets_and_are_refused_here(
    given: dict[str, Any], present: dict[str, float], device: str, workers: int, room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(job, "ray_running", lambda *_: nullcontext())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: present))
    started: list[str] = []
    monkeypatch.setattr(job.WorkerPool, "_start", lambda pool: started.append(pool._device))
    monkeypatch.setattr(job.WorkerPool, "close", lambda pool: None)
    config = _config(None).model_copy(update=given)
    if not workers:
        with pytest.raises(ConfigError, match=device), job.worker_pool(config, Path(), 9):
            pass
        return
    with job.worker_pool(config, Path(), 9) as pool:
        assert started == [device] * workers
        assert pool.room == room


def test_scratch_folders_of_dead_drivers_are_swept(tmp_path: Path) -> None:
    for name in ("olapipe-dead", "olapipe-alive", "other-dead"):
        (tmp_path / name / "session").mkdir(parents=True)
        (tmp_path / name / "in-use.lock").touch()
    (tmp_path / "olapipe-unknown").mkdir()
    with (tmp_path / "olapipe-alive" / "in-use.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep_scratch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["olapipe-alive", "olapipe-unknown", "other-dead"]


def test_a_ray_that_does_not_come_up_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: Exception = Exception("The current node timed out during startup.\nMore.")

    def init(**_: object) -> None:
        (tmp_path / "session").mkdir(exist_ok=True)
        raise raised

    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: str(tmp_path))
    stub = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", stub)
    with pytest.raises(OlaError, match=r"timed out during startup\.\n") as found, ray_running(None, 1):
        pass
    assert "Run the command again" in found.value.remedy
    tmp_path.mkdir()  # by what Ray left running
    for function in at_exit:
        function()
    assert not tmp_path.exists()
    tmp_path.mkdir()
    raised = KeyError("a defect")
    with pytest.raises(KeyError), ray_running(None, 1):
        pass


@pytest.mark.parametrize("given", [None, "1"])
def test_a_ray_of_this_machine_alone_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    seen: list[str | None] = []

    def init(**_: object) -> None:
        seen.append(os.environ.get(name))

    stub = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", stub)
    with ray_running(None, 1):
        pass
    assert seen == [given or "0"]
    assert os.environ.get(name) == given


def test_sigterm_while_ray_starts_ends_as_it_does_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        def handler(number: int, frame: object) -> None:
            sys.exit(number)

        signal.signal(signal.SIGTERM, handler)
        os.kill(os.getpid(), signal.SIGTERM)

    stub = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", stub)
    with pytest.raises(Terminated), sigterm_raises(), ray_running(None, 1):
        pass


def test_a_cluster_is_joined_again_when_its_server_for_outsiders_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused: list[str] = []
    refusals = 2

    def init(*, address: str, **_: object) -> None:
        if len(refused) < refusals:
            refused.append(address)
            raise ConnectionAbortedError(
                "Initialization failure from server:\nTraceback\n  more\nServer startup failed\n"
            )

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        stub = SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: None)
        monkeypatch.setitem(sys.modules, "ray", stub)
        with ray_running(address, 1):
            assert refused == [address] * 2
        refused, refusals = [], 3
        message = f"{address}: Initialization failure from server: Server startup failed\nCheck --address (HOST:6379"
        with pytest.raises(OlaError, match=re.escape(message)), ray_running(address, 1):
            pass
        assert len(refused) == 3, "not for ever"


def test_a_lost_connection_is_an_error_only_where_this_process_is_no_part_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub = SimpleNamespace(init=lambda **_: None, is_initialized=lambda: False, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", stub)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for error in (ConnectionError("gone"), grpc.RpcError()):
            with (
                pytest.raises(OlaError, match=rf"ray://{address} was lost\n.*same command"),
                ray_running(f"ray://{address}", 1),
            ):
                raise error
        with pytest.raises(ConnectionError, match="a defect"), ray_running(address, 1):
            raise ConnectionError("a defect")


@pytest.mark.parametrize(
    ("raised", "stopped", "state"),
    [
        (None, None, "finished"),
        (None, "max-failures", "stopped by --max-failures"),
        (None, "SIGTERM", "stopped by SIGTERM"),
        (Terminated, "SIGTERM", "stopped by SIGTERM"),
        (KeyboardInterrupt, None, "stopped by Ctrl-C"),
        (OSError, None, "ended by an error"),
    ],
)
def test_status_says_how_a_job_ended(
    tmp_path: Path, raised: type[BaseException] | None, stopped: Stop | None, state: str
) -> None:
    place, reporter = LocalPlace(tmp_path), LineReporter(io.StringIO())
    reporter.begin({"a": 5}, {"a": 0})
    ending = suppress(KeyboardInterrupt, OSError)
    with ending, watched(place, reporter, _config(None), {"a": 0}, {"a": 5}) as say:
        say(Tally())
        say(Tally(stopped=stopped))
        (note,) = jobs(place)
        assert note.state == ("running" if stopped is None else "stopping")
        if raised is not None:
            raise raised
    (note,) = jobs(place)
    assert note.describe(time.time() + 3600) == state


def _store(root: Path, images: int) -> FeatureStore:
    store = FeatureStore.create(root, rows_per_shard=4)
    store.add_generation(SampleRow(row=0, key=f"{n}.png", uri=f"{n}.png", size=1) for n in range(images))
    return store


def test_status_counts_images_of_short_shards_and_the_rate_of_active_jobs(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", 10)
    (tmp_path / "s" / "receipts" / "a").mkdir(parents=True)
    for shard in (0, 2):
        (tmp_path / "s" / "receipts" / "a" / f"{shard:05d}.json").touch()
    now = 1000.0
    running = JobNote(
        host="m", pid=1, started=50.0, updated=990.0, spent=10.0, waiting={"a": 10}, settled={"a": 5}, failed={"a": 2}
    )
    silent = running.model_copy(update={"updated": 100.0, "started": 0.0})
    found = teacher_status(store, "a", [running, running, silent], now)
    assert (found.shards, found.planned_shards, found.done, found.planned) == (2, 3, 6, 10)
    assert found.rate == pytest.approx(1.0) and found.left == pytest.approx(4.0) and found.failed == 4
    assert silent.describe(now) == "silent for 15 min 00 s, probably killed"
    assert not running.model_copy(update={"state": "finished"}).active(now)
    ahead = running.model_copy(update={"updated": now + 3600})
    assert ahead.describe(now) == "running, unless it was killed: its clock is 1 h 00 min ahead of this one"
    assert ahead.model_copy(update={"state": "finished"}).describe(now) == "finished"


def test_the_rate_of_a_job_follows_no_clock_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store(tmp_path / "s", 10)
    heart = Heartbeat(store.place, {"a": 10})
    begun = time.time()
    monkeypatch.setattr(time, "time", lambda: begun + 36_000)
    tally = Tally()
    tally.settled["a"] = 3
    time.sleep(0.2)
    heart.beat(tally)
    rate = teacher_status(store, "a", jobs(store.place), time.time()).rate
    assert rate is not None and 0.1 < rate < 16


@pytest.mark.parametrize("address", ["auto", "head:6379", "127.0.0.1:6379", "[::1]:6379", "ray://head.cluster:10001"])
def test_addresses_of_clusters(address: str) -> None:
    assert ExtractConfig.model_validate(_settings() | {"address": address}).address == address


@pytest.mark.parametrize(
    "address", ["", "local", "head", "ray://", "ray://head", "http://head:8265", "os://head:1", "a b:1", "head:6379\n"]
)
def test_other_addresses_are_refused_at_once(address: str) -> None:
    with pytest.raises(ValidationError, match="give auto, HOST:6379 or ray://HOST:10001"):
        ExtractConfig.model_validate(_settings() | {"address": address})


def test_a_job_leaves_notes_that_status_shows(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", 10)
    heart = Heartbeat(store.place, {"a": 10})
    tally = Tally(workers=2)
    tally.settled["a"] = 3
    heart.beat(tally)
    tally.settled["a"] = 7
    heart.beat(tally)  # too early
    (note,) = jobs(store.place)
    assert note.settled == {"a": 3} and note.active(time.time())
    heart.end("finished")
    LocalPlace(tmp_path / "s").publish(f"{JOBS}/9-broken.json", b"{")
    (note,) = jobs(store.place)
    assert note.settled == {"a": 7} and not note.active(time.time())
    out = io.StringIO()
    show_status(Console(file=out, width=200), store, as_json=True)
    assert json.loads(out.getvalue())["jobs"][0]["state"] == "finished"
    out = io.StringIO()
    show_status(Console(file=out, width=200), store, as_json=False)
    assert "a 7 of 10" in out.getvalue() and f"process {os.getpid()}" in out.getvalue()
    killed = note.model_copy(update={"state": "running", "updated": note.updated - 3600})
    LocalPlace(tmp_path / "s").publish(f"{JOBS}/8.json", killed.model_dump_json().encode())
    out = io.StringIO()
    show_status(Console(file=out, width=200), store, as_json=False)
    assert "a at least 7 of 10" in out.getvalue() and "probably killed" in out.getvalue()
