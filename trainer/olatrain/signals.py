"""SIGTERM and Ctrl-C: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from olaschema.errors import OlaError


class Stopped(OlaError):
    """A signal ended the run after it was saved. The exit code is the shell's for that signal."""

    def __init__(self, step: int, number: int | None) -> None:
        super().__init__(
            f"stopped by a signal; step {step} is saved", "Run the same command again to go on from there."
        )
        self.exit_code = 128 + (number or signal.SIGTERM)


class StopRequest:
    """While entered, notes the first SIGTERM or SIGINT instead of dying; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
