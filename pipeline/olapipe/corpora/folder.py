"""A folder: its image files, or if it has none its tar files, or if it has none of these its parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from olapipe.corpora.entry import Entry, make_key
from olapipe.corpora.parquet import parquet_entries
from olapipe.corpora.tars import tar_entries
from olapipe.corpora.walk import walk
from olaschema.errors import CorpusError
from olaschema.images import EXTENSIONS
from olaschema.rooted import PARQUET, TAR, rooted_size


class Folder:
    """The images below a folder in the order of their paths' bytes; inside a tar or parquet file in its own order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text_only = 0
        self.passed_over = {TAR: 0, PARQUET: 0}
        """How many tar and parquet files were not taken, because image files (or tar files) are the corpus."""

    def __iter__(self) -> Iterator[Entry]:
        kind, archives = self._kind()
        if kind is None:
            self.passed_over = {TAR: 0, PARQUET: 0}
            for path in walk(self.root):
                extension = _extension(path)
                if extension in EXTENSIONS:
                    key, problem = make_key(os.fsdecode(path))
                    yield Entry(key, -1 if problem else rooted_size(self.root, key), problem)
                elif extension in self.passed_over:
                    self.passed_over[extension] += 1
            return
        for path in archives:
            name = os.fsdecode(path)
            yield from (tar_entries if kind == TAR else parquet_entries)(self.root, name)

    def _kind(self) -> tuple[str | None, list[bytes]]:
        """Return None for images, or which archives are the corpus, and their paths."""
        archives: dict[str, list[bytes]] = {TAR: [], PARQUET: []}
        for path in walk(self.root):
            extension = _extension(path)
            if extension in EXTENSIONS:
                return None, []
            if extension in archives:
                archives[extension].append(path)
        if archives[TAR]:
            self.passed_over = {TAR: 0, PARQUET: len(archives[PARQUET])}
            return TAR, archives[TAR]
        if archives[PARQUET]:
            return PARQUET, archives[PARQUET]
        raise CorpusError(
            f"{self.root}: no image in this folder or below it",
            f"Readable extensions: {', '.join(sorted(EXTENSIONS))}; or .tar and .parquet files that hold images.",
        )


class Archive:
    """One tar or parquet file as a corpus. Keys start with its name, as in the corpus of its folder."""

    def __init__(self, path: Path) -> None:
        self.root = path.parent
        self.text_only = 0
        self.passed_over: dict[str, int] = {}
        self._path = path

    def __iter__(self) -> Iterator[Entry]:
        is_tar = self._path.suffix.lower() == TAR
        yield from (tar_entries if is_tar else parquet_entries)(self.root, self._path.name)


def _extension(path: bytes) -> str:
    return os.path.splitext(os.fsdecode(path))[1].lower()
