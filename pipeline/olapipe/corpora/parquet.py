"""Parquet files with a column of images: Hugging Face datasets, or img2dataset's parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from olapipe.corpora.entry import Entry, make_key
from olaschema.errors import CorpusError, ImageError
from olaschema.parquetimages import parquet_images


def parquet_entries(root: Path, name: str) -> Iterator[Entry]:
    """Yield the rows of one parquet file; their keys are `NAME/ROW`, from 0. Only the footer is read: no sizes.

    A file that is damaged is one entry, which cannot be read later and then says why. Raises CorpusError for a file
    that cannot be opened, or has no column of images.
    """
    container, problem = make_key(name)
    if problem is not None:
        yield Entry(container, -1, problem)
        return
    try:
        images = parquet_images(root / name)
    except ImageError as error:
        if error.reason == "truncated":
            yield Entry(f"{container}/0", -1)
            return
        raise CorpusError(
            f"{name} cannot be read: {error.problem}", "Make it readable, or take it out of the corpus."
        ) from error
    for row in range(len(images)):
        yield Entry(f"{container}/{row}", -1)
