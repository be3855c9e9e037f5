"""Settings that hold for every test: no hub, no usage reports, one Ray session at most, loopback only."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two files of tests run side by side, and bits are compared across processes: torch has one thread in all of them
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Undo what code that an earlier test of this process ran has set."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
