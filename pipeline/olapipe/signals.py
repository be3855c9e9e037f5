"""Ctrl-C and SIGTERM: the first one lets what is in flight finish, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived where nothing is in flight that would have to finish."""


@dataclass
class StopFlag:
    """Which signal asked to stop; None while none did."""

    number: signal.Signals | None = None


def interrupted(number: int) -> type[KeyboardInterrupt]:
    """Return the exception by which a process ends after a signal."""
    return Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise Terminated, as Ctrl-C raises KeyboardInterrupt; does nothing outside the main thread."""
    came = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if came:  # Ray, where it waits, makes a plain KeyboardInterrupt of whatever a handler raises
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Let the first SIGINT or SIGTERM set a flag and the second one raise; only in the main thread."""
    flag = StopFlag()
    second = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal second
        if flag.number is not None:
            second = number
            raise interrupted(number)
        flag.number = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield flag
    except KeyboardInterrupt:
        if second:  # as in `sigterm_raises`
            raise interrupted(second) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
