"""Folders that are written whole: beside their place first, then put there in one move."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olaschema.errors import ConfigError


def require_new(out: Path) -> None:
    """Raise ConfigError unless `out` is missing or an empty folder."""
    try:
        empty = not out.exists() or not any(out.iterdir())
    except OSError as error:
        raise ConfigError(f"{out} cannot be used: {error.strerror}", "Choose another folder (--out).") from error
    if not empty:
        raise ConfigError(f"{out} exists and is not empty", "Choose another folder (--out), or empty this one.")


@contextmanager
def publish_folder(out: Path) -> Iterator[Path]:
    """Give a scratch folder to fill, which becomes `out` at the end: a folder that exists is whole.

    Raises ConfigError where the disk does not take it.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            yield made
            if out.exists():
                out.rmdir()
            shutil.move(made, out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror or error}", "Choose another folder (--out)."
        ) from error
