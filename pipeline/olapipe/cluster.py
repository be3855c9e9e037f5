"""Starting Ray here, or joining a cluster; the scratch folder of a Ray that runs here."""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from olapipe.environment import environment
from olapipe.signals import Terminated, sigterm_raises
from olaschema.errors import OlaError

_CONNECT_SECONDS = 5.0
_JOINS = 3
# Nothing large goes through Ray's object store: tasks are numbers and the shards are written by the workers.
_OBJECT_STORE_BYTES = 80 << 20
_PREFIX = "olapipe-"
_HELD = "in-use.lock"
_CLIENT = "ray://"
_OTHER_HOSTS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # whatever the system, by Ray's code


@contextmanager
def ray_running(address: str | None, cpus: int) -> Iterator[None]:
    """Join the cluster at `address`, or start Ray here with room for `cpus` workers at least; stop it in the end.

    A Ray that this process has running already is used and left running. Raises OlaError where there is none to use,
    and where the connection to a cluster that this process is no part of (`ray://`) is lost meanwhile.
    """
    alone = {}
    if address is None:
        # Set before ray is imported, which reads it then: servers listen on the loopback address only.
        alone[_OTHER_HOSTS] = os.environ.get(_OTHER_HOSTS, "0")
        # A token of this process, whose Ray keeps the first it sees; otherwise Ray writes one into the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with environment(alone):
        import ray

        if ray.is_initialized():
            yield
            return
        with nullcontext() if address else _scratch_folder() as scratch:
            try:
                _initialise(address, cpus, scratch)
                with sigterm_raises(), _connected(address):  # Ray's own handler dumps stacks and exits with 15
                    yield
            finally:
                ray.shutdown()


def _initialise(address: str | None, cpus: int, scratch: str | None) -> None:
    import ray

    where: dict[str, Any] = {
        "address": "local",  # not one that somebody else runs on this machine
        "num_cpus": max(cpus, os.cpu_count() or 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": scratch,
    }
    if address is not None:
        _require_reachable(address)
        where = {"address": address}
    try:
        for left in reversed(range(_JOINS)):
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
                break
            except ConnectionAbortedError:  # at times the process that is to stand for this one does not start there
                if not left:
                    raise
    except SystemExit as error:
        if error.code == signal.SIGTERM:  # by Ray's own handler, which it sets long before it is there
            raise Terminated from None
        raise
    except Exception as error:
        # Ray raises a plain Exception where it does not come up in its 30 seconds, which no narrower class catches
        if not isinstance(error, (RuntimeError, ValueError, ConnectionError, OSError)) and type(error) is not Exception:
            raise
        if address is not None:
            raise _unreachable(address, error) from error
        raise OlaError(
            f"Ray cannot be started here: {_brief(error)}",
            "Run the command again, when the machine is less busy; free memory or processes; or use --address.",
        ) from error


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Say so where Ray's client loses its cluster; a process that is a part of one has no client."""
    if address is None or not address.startswith(_CLIENT):
        yield
        return
    import grpc

    try:
        yield
    except (ConnectionError, grpc.RpcError) as error:
        raise OlaError(
            f"the connection to the Ray cluster at {address} was lost",
            "Run the same command again: finished shards are kept.",
        ) from error


def _require_reachable(address: str) -> None:
    """Ray itself tries a dead address for minutes."""
    host, separator, port = address.removeprefix(_CLIENT).rpartition(":")
    if not separator:
        return  # `auto`, which Ray answers at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> OlaError:
    return OlaError(
        f"no Ray cluster can be joined at {address}: {_brief(error)}",
        "Check --address (HOST:6379 on a machine of the cluster, ray://HOST:10001 elsewhere, unless it was given other "
        "ports), and RAY_AUTH_TOKEN if the cluster wants one. Without --address Ray is started here.",
    )


@contextmanager
def _scratch_folder() -> Iterator[str]:
    # Sockets live in there, and their paths may have 107 bytes at most.
    parent = tempfile.gettempdir()
    parent = parent if len(parent) <= 24 else "/tmp"  # noqa: S108
    sweep_scratch(Path(parent))
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    # A Ray that did not come up writes there until its own handler ends it, at exit; this one comes after that.
    delete = partial(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(delete)
    try:
        with (Path(folder) / _HELD).open("wb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield folder
        atexit.unregister(delete)
    finally:
        delete()


def sweep_scratch(parent: Path) -> None:
    """Delete scratch folders of drivers that were killed: those of this user whose lock nobody holds any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, one being deleted, or one whose driver lives
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            with (folder / _HELD).open("rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _brief(error: Exception) -> str:
    """Return the first line of a message, and the last one where the first only announces it."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
