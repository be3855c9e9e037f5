"""A Ray cluster of several nodes on this machine, and the command run on it as a user would, with a faulty teacher."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_port
from ray._common.network_utils import node_ip_address_from_perspective
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

PLUGINS = Path(__file__).parent / "plugins"
_PATH = os.pathsep.join([str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])])
_SOON = {
    "metrics_report_interval_ms": 1000,
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 8,
}


@contextmanager
def _environment() -> Iterator[None]:
    """What a node is started with, its workers have: the folder of the faulty teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", _PATH)
        yield


class Nodes:
    """A head without CPUs and `count` nodes of one CPU each; nodes that were killed are started again."""

    def __init__(self, count: int = 2) -> None:
        self.metrics_port, self.dashboard_port = free_port(), free_port()
        with _environment():
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": True,
                    "dashboard_port": self.dashboard_port,
                    "dashboard_agent_listen_port": free_port(),  # the usual one may be another Ray's of this machine
                    "metrics_export_port": self.metrics_port,
                    "include_log_monitor": False,
                    "no_monitor": True,  # the autoscaler's
                    "_system_config": _SOON,
                },
            )
        reset_ray_address()  # or every other Ray of this machine would join it
        self.restarted = 0
        for _ in range(count):
            self._add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def _add(self) -> None:
        with _environment():
            self.cluster.add_node(
                num_cpus=1,
                object_store_memory=80 << 20,
                dashboard_agent_listen_port=free_port(),
                wait=False,
            )

    def mend(self) -> None:
        """Start a new node for each one whose raylet is gone."""
        for node in list(self.cluster.worker_nodes):
            if any(kind == "raylet" for kind, _ in node.dead_processes()):
                self.cluster.remove_node(node, allow_graceful=False)
                self._add()
                self.restarted += 1


@dataclass(frozen=True)
class Head:
    """A head that `ray start` has started; `client_address` is for drivers that are no part of the cluster."""

    address: str
    client_address: str
    environment: dict[str, str]
    """What a driver needs: the token, and an address that others reach."""

    def drop_clients(self) -> int:
        """Kill the processes that stand for drivers outside the cluster; return how many there were."""
        found = 0
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                words = command.read_text().split("\0")
                if "--mode=specific-server" in words and f"--address={self.address}" in words:
                    os.kill(int(command.parent.name), signal.SIGKILL)
                    found += 1
        return found


@contextmanager
def started_head(folder: Path, *, most_nodes: int) -> Iterator[Head]:
    """Yield a head of one CPU to which Ray's autoscaler adds up to `most_nodes` nodes of one CPU, on this machine."""
    client_port, host = free_port(), node_ip_address_from_perspective()
    address = f"{host}:{free_port()}"
    (folder / "autoscaling.json").write_text(json.dumps(_autoscaling(address, most_nodes)))
    options = {
        "port": address.rpartition(":")[2],
        "ray-client-server-port": client_port,
        "dashboard-agent-listen-port": free_port(),
        "include-dashboard": "false",
        "num-cpus": 1,
        "object-store-memory": 80 << 20,
        "autoscaling-config": folder / "autoscaling.json",
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    drivers = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # an extraction that an earlier test of this process ran has kept Ray to the loopback address
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }
    environment = drivers | {"PYTHONPATH": _PATH, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    output = folder / "ray.log"
    with output.open("w") as log:
        head = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            stdout=log, stderr=log, start_new_session=True, env=os.environ | environment,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in output.read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(output.read_text())
            time.sleep(0.2)
        yield Head(address, f"ray://127.0.0.1:{client_port}", drivers)
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def _autoscaling(address: str, most_nodes: int) -> dict[str, Any]:
    """Return what Ray's autoscaler wants to know to start nodes that are processes of this machine."""
    node = {"resources": {"CPU": 1, "object_store_memory": 80 << 20}, "node_config": {}}
    same = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
    commands = ("setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "growing",
        "max_workers": most_nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {"type": "fake_multinode", "gcs_address": address, **dict.fromkeys(same, True)},
        "available_node_types": {
            "ray.head.default": node | {"max_workers": 0},
            "cpu": node | {"max_workers": most_nodes},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in commands},
    }


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """One cluster for all tests of a file; its servers, idle, would take a seventh of a core from all later ones."""
    found = Nodes()
    yield found
    found.cluster.shutdown()


def control(folder: Path, **settings: Any) -> Path:
    """Write what the faulty teacher is to do; return its checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fired").mkdir(exist_ok=True)
    (folder / "control.json").write_text(json.dumps(settings))
    return folder


def start(nodes: Nodes | None, corpus: Path, out: Path, checkpoint: Path, *more: object) -> subprocess.Popen[str]:
    """Start `olapipe extract` with the faulty teacher, on the cluster if there is one."""
    where = ["--address", nodes.address] if nodes is not None else []
    return _spawn(checkpoint, [*_extraction(corpus, out, checkpoint), *where, *map(str, more)])


def submit(nodes: Nodes, corpus: Path, out: Path, checkpoint: Path, *more: object) -> subprocess.Popen[str]:
    """The same as a job of the cluster, by `ray job submit`; it follows the job, whose exit status it returns."""
    # `auto`, where only one Ray is: tests that run side by side have several on this machine
    command = [*_extraction(corpus, out, checkpoint), "--address", nodes.address, *map(str, more)]
    ray = str(Path(sys.executable).with_name("ray"))
    address = f"http://127.0.0.1:{nodes.dashboard_port}"
    return _spawn(checkpoint, [ray, "job", "submit", "--address", address, "--", *command])


def _extraction(corpus: Path, out: Path, checkpoint: Path) -> list[str]:
    settings = [corpus, "--out", out, "--teacher", "faulty", "--checkpoint", f"faulty={checkpoint}"]
    return [sys.executable, "-m", "olapipe", "extract", *map(str, settings)]


def _spawn(checkpoint: Path, command: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": _PATH},
    )
    (checkpoint / "driver.pid").write_text(str(process.pid))
    return process


def finish(process: subprocess.Popen[str], nodes: Nodes | None = None, seconds: float = 420) -> str:
    """Wait for the command, with lost nodes replaced meanwhile; return what it printed."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if nodes is not None:
            nodes.mend()
        time.sleep(0.2)
    if process.poll() is None:
        process.kill()
        raise AssertionError(f"the command does not end:\n{process.communicate()[0]}")
    return process.communicate()[0]


def fired(checkpoint: Path) -> set[str]:
    """Which entries of the plan (`0`, …) and which moments (`m0`, …) have happened."""
    return {path.name for path in (checkpoint / "fired").iterdir()}
