"""What most runs of the trainer start from; a module may have a corpus of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer_support import Corpus, make_corpus, make_student, settings


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), images=9)


@pytest.fixture
def chosen(corpus: Corpus, student: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def choose(**changes: Any) -> dict[str, Any]:
        return settings(corpus, student, tmp_path / "out", **changes)

    return choose
