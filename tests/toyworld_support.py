"""The toy world's modules, which are scripts beside each other and no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOYWORLD = Path(__file__).parents[1] / "examples" / "toyworld"


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """Let a file of tests import them by their names, and forget them after it."""
    sys.path.insert(0, str(TOYWORLD))
    yield
    sys.path.remove(str(TOYWORLD))
    for path in TOYWORLD.glob("*.py"):
        sys.modules.pop(path.stem, None)


def load(name: str) -> ModuleType:
    return __import__(name)
