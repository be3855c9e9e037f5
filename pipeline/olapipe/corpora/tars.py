"""Tar files, as img2dataset and webdataset write them: the images by extension; captions are passed over."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path

from olapipe.corpora.entry import Entry, make_key
from olaschema.errors import CorpusError, ImageError
from olaschema.files import open_regular
from olaschema.images import EXTENSIONS
from olaschema.tarindex import Member, TarDamage, members


def tar_entries(root: Path, name: str) -> Iterator[Entry]:
    """Yield the images of one tar file in its order; their keys are `NAME/MEMBER`.

    A place from where on the headers cannot be read is one entry, which cannot be read later and then says why. Raises
    CorpusError for a file that cannot be opened.
    """
    container, problem = make_key(name)
    if problem is not None:
        yield Entry(container, -1, problem)
        return
    try:
        with open_regular(root / name) as handle:
            try:
                for member in members(handle):
                    if posixpath.splitext(member.name)[1].lower() in EXTENSIONS:
                        yield _entry(container, member)
            except TarDamage as damage:
                yield Entry(f"{container}/damaged-at-{damage.offset}", -1)
            except OSError as error:
                raise CorpusError(
                    f"{name} cannot be read: {error.strerror or error}",
                    "Check the disk or the mount, and run it again.",
                ) from error
    except ImageError as error:
        raise CorpusError(
            f"{name} cannot be read: {error.problem}", "Make it readable, or take it out of the corpus."
        ) from error


def _entry(container: str, member: Member) -> Entry:
    key, problem = make_key(member.name)
    if problem is not None:
        return Entry(f"./{container}/{key}", -1, problem)
    return Entry(f"{container}/{key}", member.size if member.regular else -1)
