"""Ports for the servers of tests."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port that nobody listens at, below those that connections get on their way out.

    One of those may be taken between this and the server's start, and was: Ray's agents then run without their port.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
