"""Driver, worker and raylet of a cluster are killed at every write boundary; the rerun gives an undisturbed store."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from cluster_support import Head, Nodes, control, finish, fired, nodes, start, started_head, submit
from pipeline_support import digests, write_images
from place_support import kill

from olaschema.store import FeatureStore

__all__ = ["nodes"]

POINTS = ("before-values", "during-values", "after-values", "before-receipt", "during-receipt", "after-receipt")
SETTINGS = ("--shard-size", 2, "--batch-size", 2, "--workers", 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder, *(f"{index:02d}.png" for index in range(24)))
    (folder / "03.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = control(folder / "faulty", wait=1)
    deadline = time.monotonic() + 200
    output = "No available agent"  # a node's agent comes up some time after the node
    while "No available agent" in output and time.monotonic() < deadline:
        process = submit(nodes, corpus, folder / "s", checkpoint, *SETTINGS)
        try:
            exported = _exported(nodes, process)
            output = finish(process)
        finally:
            kill(process)
    assert process.returncode == 0, output
    assert exported, output
    assert "Job 'raysubmit_" in output and "succeeded" in output
    assert FeatureStore.open(folder / "s").committed("faulty") == list(range(12))
    return digests(folder / "s")


def _exported(nodes: Nodes, process: subprocess.Popen[str]) -> bool:
    """Whether Prometheus would have found the job's figures while it ran, where `ray start` was told to export them."""
    while process.poll() is None:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{nodes.metrics_port}/metrics", timeout=10) as answer:
            said = answer.read().decode()
            shards = re.search(
                r"^ray_olapipe_shards\{(?=.*State=.in_flight.).*\} (\S+)$", said, re.MULTILINE | re.IGNORECASE
            )
            workers = re.search(r"^ray_olapipe_workers\{.*\} (\S+)$", said, re.MULTILINE)
            if shards and workers and 1 <= float(shards[1]) <= 4 and 1 <= float(workers[1]) <= 2:
                return True
        time.sleep(0.5)
    return False


def test_workers_and_nodes_killed_at_every_boundary_of_one_run(
    nodes: Nodes, corpus: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    plan = [(shard, point, "worker") for shard, point in enumerate(POINTS)]
    plan += [(6 + shard, point, "raylet") for shard, point in enumerate(POINTS) if shard % 2]
    checkpoint = control(tmp_path / "faulty", plan=plan, orderly=True)
    before = nodes.restarted
    process = start(nodes, corpus, tmp_path / "s", checkpoint, *SETTINGS)
    output = finish(process, nodes)
    assert process.returncode == 0, output
    assert fired(checkpoint) == set(map(str, range(len(plan)))), "every boundary was hit"
    nodes.mend()
    assert nodes.restarted >= before + 3
    assert digests(tmp_path / "s") == undisturbed


def test_the_driver_killed_at_every_boundary_and_run_again(
    nodes: Nodes, corpus: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    plan = [(2 * number, point, "driver") for number, point in enumerate(POINTS)]
    checkpoint = control(tmp_path / "faulty", plan=plan, orderly=True)
    runs = 0
    while True:
        process = start(nodes, corpus, tmp_path / "s", checkpoint, *SETTINGS)
        output = finish(process)
        runs += 1
        if process.returncode != -9:
            break
        assert runs <= len(plan)
    assert process.returncode == 0, output
    assert fired(checkpoint) == set(map(str, range(len(plan)))), "every boundary was hit"
    assert digests(tmp_path / "s") == undisturbed


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("head"), most_nodes=1) as found:
        yield found


@pytest.fixture
def with_token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("with_token")
def test_an_autoscaler_adds_machines_for_the_workers_that_wait(head: Head, corpus: Path, tmp_path: Path) -> None:
    checkpoint = control(tmp_path / "faulty", wait=4)
    process = start(None, corpus, tmp_path / "s", checkpoint, "--address", head.address, *SETTINGS)
    try:
        output = finish(process)
    finally:
        kill(process)
    assert process.returncode == 0, output
    assert "2 workers (the cluster has room for 1 now)" in output
    lines = (tmp_path / "s" / "_log" / "timings.jsonl").read_text().splitlines()
    assert len({json.loads(line)["pid"] for line in lines}) == 2


@pytest.mark.usefixtures("with_token")
def test_a_driver_outside_the_cluster_that_loses_its_connection_says_how_to_go_on(
    head: Head, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "2")  # half a minute else
    out = tmp_path / "s"
    where = (corpus, out, control(tmp_path / "faulty", wait=1), "--address", head.client_address, *SETTINGS[:-2])
    process = start(None, *where)
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if list(out.glob("receipts/faulty/*.json")):
                assert head.drop_clients() == 1
                break
            time.sleep(0.2)
        output = finish(process)
    finally:
        kill(process)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert f"the connection to the Ray cluster at {head.client_address} was lost\nRun the same command again" in output

    process = start(None, *where)
    output = finish(process)
    assert process.returncode == 0, output
    assert FeatureStore.open(out).committed("faulty") == list(range(12))
