"""Corpora: which kind one is, its listing, and the bytes of one planned image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from olapipe.corpora.conversations import Conversations
from olapipe.corpora.entry import Entry
from olapipe.corpora.folder import Archive, Folder
from olapipe.planning import Growth, Listing, compare, gather
from olaschema.errors import CorpusError, ImageError
from olaschema.manifest import SampleRow
from olaschema.rooted import PARQUET, TAR, read_rooted

__all__ = [
    "ANY_PIXELS",
    "PROBLEMS",
    "Entry",
    "Growth",
    "Listing",
    "compare",
    "list_corpus",
    "open_corpus",
    "read_image",
]

PROBLEMS: Mapping[str, str] = {
    "bad-name": "the file name is not UTF-8, or empty",
    "outside-root": "not a path inside the image folder",
    "forgotten": "it was forgotten by `olapipe forget`",
}
# The widest pixels of a readable format have 8 bytes; what exceeds that by far is no image within the limit.
_BYTES_PER_PIXEL = 8
_HEADROOM = 64 << 20

Source = Folder | Archive | Conversations


def list_corpus(corpus: Path, images: Path | None) -> Listing:
    """List a corpus, each key once, outside memory.

    Raises CorpusError where the corpus as a whole cannot be used. Entries that cannot be read later are listed.
    """
    source = open_corpus(corpus, images)
    listing = gather(source.root, source)
    if not listing.count:
        raise CorpusError(f"{corpus}: no image in it", "Give tar or parquet files that hold images.")
    return replace(listing, text_only=source.text_only, passed_over=source.passed_over)


def open_corpus(corpus: Path, images: Path | None) -> Source:
    """Return what lists a corpus: a folder, a .tar or .parquet file, or conversations whose images are under `images`.

    Its entries come in a fixed order and are not held; `root` is what their keys are relative to. Raises CorpusError.
    """
    kinds = "Give a folder, a .tar or .parquet file, or a .json or .jsonl file of conversations."
    suffix = corpus.suffix.lower()
    if images is not None and (corpus.is_dir() or suffix in (TAR, PARQUET)):
        raise CorpusError(
            f"--images {images} was given, but the corpus {corpus} holds the images itself",
            "Leave --images out; it belongs to a JSON or JSONL file of conversations.",
        )
    if corpus.is_dir():
        return Folder(corpus)
    if not corpus.exists():
        raise CorpusError(f"{corpus}: no such file or folder", kinds)
    if not corpus.is_file():
        raise CorpusError(f"{corpus} is a pipe or a device", kinds)
    if suffix in (TAR, PARQUET):
        return Archive(corpus)
    if suffix not in (".json", ".jsonl"):
        raise CorpusError(
            f"{corpus} is neither a folder nor a .tar, .parquet, .json or .jsonl file",
            "Give a folder, tar (not compressed) or parquet files of images, or conversations in the LLaVA format.",
        )
    if images is None:
        raise CorpusError(f"{corpus}: the folder of its images is not given", "Add --images FOLDER.")
    if not images.is_dir():
        raise CorpusError(f"--images {images}: no such folder", "Give the folder that the `image` paths start from.")
    return Conversations(corpus, images)


ANY_PIXELS = 1 << 31
"""No limit, for images that an extraction has let through: their digest is checked."""


def read_image(root: Path, sample: SampleRow, max_pixels: int, *, mended: bool = False) -> bytes:
    """Return the bytes of a planned image; `mended` takes them whatever size was planned.

    Raises ImageError with the planned problem, or `missing`, `unreadable`, `truncated` (its tar or parquet file is
    damaged), `changed` (another size than planned), `too-large` (more bytes than `max_pixels` pixels can have).
    Waits for no pipe or device.
    """
    if sample.problem is not None:
        raise ImageError(sample.problem, PROBLEMS[sample.problem])
    data = read_rooted(root, sample.uri, limit=max_pixels * _BYTES_PER_PIXEL + _HEADROOM)
    if 0 <= sample.size != len(data) and not mended:
        raise ImageError("changed", f"it has {len(data)} bytes, {sample.size} were planned")
    return data
