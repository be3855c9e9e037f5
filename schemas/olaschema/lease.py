"""Leases: who writes now. They expire, so that a job that was killed does not keep others out for long.

A lease is a small file that its holder renews. Whoever wants it watches the file by its own clock, so clocks of
different machines need not agree: a lease that did not change for its whole term is nobody's any more.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olaschema.errors import StoreError

if TYPE_CHECKING:
    from olaschema.place import Place
    from olaschema.store import FeatureStore

TERM_S = 60.0
_POLL_S = 0.5


class Lease:
    """A lease that is held: renewed by a thread until it is given back."""

    def __init__(self, place: Place, file: str, term: float) -> None:
        self._place = place
        self._file = file
        self._term = term
        self._content = b""
        self._owner = secrets.token_hex(8)
        self._renewals = 0
        self._renewed = 0.0
        self._taken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {file}", daemon=True)

    def acquire(self, *, wait: bool, say: Callable[[str], None] | None = None) -> None:
        """Take the lease as soon as it is free or has expired; raises StoreError unless `wait` if it is held.

        A holder elsewhere holds it while it renews it: that is waited for, a term at most.
        """
        seen, since, looks, told = None, _now(), 0, False
        while True:
            present = self._place.find(self._file)
            if present != seen:
                seen, since, looks = present, _now(), looks + 1
            holder = _holder(present)
            expired = holder is not None and _now() - since > float(holder.get("term", self._term))
            if holder is None or expired or _dead(holder):
                if self._swap(present):
                    self._thread.start()
                    return
                continue
            who = f"{holder.get('host')} process {holder.get('pid')}"
            if not wait and (looks > 1 or _is_here(holder)):
                raise StoreError(
                    f"{self._place.locate(self._file)}: {who} is writing there now", "Wait until it has finished."
                )
            if not told and say is not None:
                what = "which writes the same" if wait else "which may have died: it is watched for its term"
                say(f"waiting for {who}, {what} ({self._place.locate(self._file)}) …")
                told = True
            time.sleep(min(_POLL_S, self._term / 10))

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        self._thread.join()
        if not self._taken:
            self._place.swap(self._file, self._content, b"{}")

    @property
    def lost(self) -> bool:
        """Whether somebody else may hold it by now."""
        return self._taken or _now() - self._renewed > self._term

    def _swap(self, present: bytes | None) -> bool:
        self._renewals += 1
        content = json.dumps(
            {"owner": self._owner, **_myself(), "term": self._term, "renewals": self._renewals}, sort_keys=True
        ).encode()
        asked = _now()
        if not self._place.swap(self._file, present, content):
            return False
        self._content, self._renewed = content, asked
        return True

    def _keep(self) -> None:
        while not self._stop.wait(self._term / 4):
            try:
                if not self._swap(self._content):
                    self._taken = True
                    return
            except StoreError:
                continue  # tried again until the term is over; then `lost` says so


@contextmanager
def hold(
    place: Place, file: str, *, wait: bool = True, say: Callable[[str], None] | None = None, term: float = TERM_S
) -> Iterator[Lease]:
    """Hold the lease in `file`; raises StoreError where somebody else has it and `wait` is false."""
    lease = Lease(place, file, term)
    lease.acquire(wait=wait, say=say)
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def writing(
    place: Place, teachers: Iterable[str], *, wait: bool, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold the leases of all who write features of these teachers; raises StoreError where one is held, unless `wait`.

    Nothing is written under a lease that was lost: the shards' own locks and receipts see to that.
    """
    with ExitStack() as held:
        for teacher in sorted(teachers):  # in one order for all, so that nobody waits in a circle
            held.enter_context(hold(place, f"_log/leases/{teacher.replace('/', '%2F')}", wait=wait, say=say))
        yield


@contextmanager
def changing(store: FeatureStore, *, say: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """Hold the leases of all of a store's teachers, and its plan; yields the teachers.

    Raises StoreError where features of one are being written: also of one that a job puts there meanwhile.
    """
    while True:
        names = store.teachers()
        with writing(store.place, names, wait=False, say=say), store.place.lock("plan"):
            if store.teachers() == names:
                yield names
                return


def _holder(content: bytes | None) -> dict[str, Any] | None:
    """Return who holds a lease; what cannot be read is held by nobody."""
    if content is None:
        return None
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and holder.get("owner") else None


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _now() -> float:
    """Return seconds of a clock that goes on while the machine sleeps, where there is one: leases expire meanwhile."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine, so that it can be seen whether it is alive."""
    return holder.get("machine") == _machine() and isinstance(holder.get("pid"), int)


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone. Start times tell it from a later one."""
    return _is_here(holder) and _started(holder["pid"]) != holder.get("started")


def _machine() -> str:
    """Tell this boot of this machine, and this container of it, from all others: process ids mean the same there."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return secrets.token_hex(8)  # elsewhere nobody is known to be dead, and leases expire


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the boot; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
