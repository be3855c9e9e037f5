"""Corpora: a folder of images or LLaVA-style conversations, listed in a fixed order, and the bytes of one image."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from olaschema.errors import CorpusError, ImageError, StoreError
from olaschema.files import read_regular
from olaschema.images import EXTENSIONS
from olaschema.keys import normalise_key, tombstone
from olaschema.manifest import SampleRow
from olaschema.store import FeatureStore

PROBLEMS: Mapping[str, str] = {
    "bad-name": "the file name is not UTF-8, or empty",
    "outside-root": "not a path inside the image folder",
    "forgotten": "it was forgotten by `olapipe forget`",
}
# The widest pixels of a readable format have 8 bytes; what exceeds that by far is no image within the limit.
_BYTES_PER_PIXEL = 8
_HEADROOM = 64 << 20


class Entry(NamedTuple):
    """One image of the listing. `size` is in bytes, -1 where there is no regular file."""

    key: str
    size: int
    problem: Literal["bad-name", "outside-root"] | None = None

    def sample(self) -> SampleRow:
        """Return the row to plan; the store assigns its number."""
        return SampleRow(row=0, key=self.key, uri=self.key, size=self.size, problem=self.problem)


@dataclass(frozen=True)
class Listing:
    """The images of a corpus, each key once. `root` is the folder that keys are relative to."""

    root: Path
    entries: list[Entry]
    repeated: int
    """Further uses of an image that is listed already."""
    text_only: int
    """Conversations without an image."""


@dataclass(frozen=True)
class Growth:
    """A listing compared with what a store has planned."""

    new: list[Entry]
    known: int
    gone: int
    """Images the store has and the corpus no longer lists; their features are kept."""


def list_corpus(corpus: Path, images: Path | None) -> Listing:
    """List a folder of images, or a JSON or JSONL file of conversations whose images are under `images`.

    Raises CorpusError where the corpus as a whole cannot be used. Entries that cannot be read later are listed.
    """
    if corpus.is_dir():
        if images is not None:
            raise CorpusError(
                f"--images {images} was given, but the corpus {corpus} is a folder of images itself",
                "Leave --images out; it belongs to a JSON or JSONL file of conversations.",
            )
        entries = _unique(_folder_names(corpus), corpus)
        if not entries[0]:
            raise CorpusError(
                f"{corpus}: no image in this folder or below it",
                f"Readable extensions: {', '.join(sorted(EXTENSIONS))}.",
            )
        return Listing(corpus, entries[0], entries[1], 0)
    if not corpus.exists():
        raise CorpusError(f"{corpus}: no such file or folder", "Give a folder of images, or a .json or .jsonl file.")
    if not corpus.is_file():
        raise CorpusError(f"{corpus} is a pipe or a device", "Give a folder of images, or a .json or .jsonl file.")
    if corpus.suffix.lower() not in (".json", ".jsonl"):
        raise CorpusError(
            f"{corpus} is neither a folder nor a .json or .jsonl file",
            "Give a folder of images, or conversations in the LLaVA format.",
        )
    if images is None:
        raise CorpusError(f"{corpus}: the folder of its images is not given", "Add --images FOLDER.")
    if not images.is_dir():
        raise CorpusError(f"--images {images}: no such folder", "Give the folder that the `image` paths start from.")
    names: list[str] = []
    text_only = 0
    for where, sample in _conversations(corpus):
        found = _image_names(sample, f"{corpus}, {where}")
        names += found
        text_only += not found
    if not names:
        raise CorpusError(f"{corpus}: none of its {text_only} entries has an image", "Entries need a field `image`.")
    listed, repeated = _unique(names, images)
    return Listing(images, listed, repeated, text_only)


def compare(listing: Listing, store: FeatureStore | None) -> Growth:
    """Say which images of the listing a store has not planned yet.

    Raises StoreError where a file with features no longer has the planned size: they would be of another image.
    A file without features may have appeared or been mended. A forgotten image is not planned again.
    """
    if store is None:
        return Growth(listing.entries, 0, 0)
    planned: dict[str, tuple[int, int]] = {}
    forgotten: set[str] = set()
    for sample in store.samples():
        if sample.problem == "forgotten":
            forgotten.add(sample.key)
        else:
            planned[sample.key] = (sample.size, sample.row)
    new: list[Entry] = []
    changed: list[tuple[str, int, int]] = []
    for entry in listing.entries:
        found = planned.pop(entry.key, None)
        if found is None:
            if not (forgotten and tombstone(entry.key) in forgotten):
                new.append(entry)
            continue
        size, row = found
        if (
            entry.size != size
            and entry.size >= 0
            and size >= 0
            and _describes_another(store, row, listing.root / entry.key)
        ):
            changed.append((entry.key, size, entry.size))
    if changed:
        key, before, now = changed[0]
        more = f" (and {len(changed) - 1} more images)" if len(changed) > 1 else ""
        raise StoreError(
            f"{key} had {before} bytes when {store.url} planned it, now it has {now}{more}: "
            "features of another image would get its name",
            "Restore the file, or give the new image another name, or extract into another --out.",
        )
    return Growth(new, len(listing.entries) - len(new), len(planned))


def _describes_another(store: FeatureStore, row: int, path: Path) -> bool:
    """Whether the row has features of other bytes than the file now has: a mended image has those of its new bytes."""
    shard, within = divmod(row, store.rows_per_shard)
    receipts = [store.receipt(teacher, shard) for teacher in store.teachers()]
    made_from = {r.rows[within].sha256 for r in receipts if r is not None and r.rows[within].status == "ok"}
    return bool(made_from) and made_from != {hashlib.sha256(read_regular(path)).hexdigest()}


def read_image(root: Path, sample: SampleRow, max_pixels: int, *, mended: bool = False) -> bytes:
    """Return the bytes of a planned image; `mended` takes them whatever size was planned.

    Raises ImageError with the planned problem, or `missing`, `unreadable`, `changed` (another size than planned),
    `too-large` (more bytes than `max_pixels` pixels can have). Waits for no pipe or device.
    """
    if sample.problem is not None:
        raise ImageError(sample.problem, PROBLEMS[sample.problem])
    data = read_regular(root / sample.uri, limit=max_pixels * _BYTES_PER_PIXEL + _HEADROOM)
    if 0 <= sample.size != len(data) and not mended:
        raise ImageError("changed", f"it has {len(data)} bytes, {sample.size} were planned")
    return data


def _unique(names: Iterable[str], root: Path) -> tuple[list[Entry], int]:
    """Return one entry per key in order of first appearance, and how often keys were repeated."""
    entries: dict[str, Entry] = {}
    count = 0
    for name in names:
        count += 1
        key, problem = _key(name)
        if key not in entries:
            entries[key] = Entry(key, -1 if problem else _size(root / key), problem)
    return list(entries.values()), count - len(entries)


def _key(name: str) -> tuple[str, Literal["bad-name", "outside-root"] | None]:
    """Return the key of a path, or a name of the same kind for a path that cannot have one.

    No key starts with `/`, `./` or `../`, so these stand-ins cannot collide with keys; they are injective (up to a
    hash) and hold neither an absolute path nor the signature of a URL.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return _escaped(name), "bad-name"
    try:
        return normalise_key(name), None
    except ImageError as error:
        if error.reason == "bad-name":
            return _escaped(name), "bad-name"
        if name.startswith(("/", "pipe:")) or "://" in name:
            base = name.partition("?")[0].rstrip("/").rpartition("/")[2]
            return f"/…/{base}#{hashlib.sha256(name.encode()).hexdigest()[:8]}", "outside-root"
        return name if name.startswith("../") else f"./{name}", "outside-root"


def _escaped(name: str) -> str:
    # file names that are not UTF-8 arrive with surrogates for their bytes; JSON may hold surrogates of its own
    text = name.replace("\\", "\\\\").replace("\0", "\\x00")
    shown = "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else f"\\u{ord(c):04x}" if _surrogate(c) else c
        for c in text
    )
    return f"./{shown}"


def _surrogate(character: str) -> bool:
    return 0xD800 <= ord(character) <= 0xDFFF


def _size(path: Path) -> int:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _folder_names(root: Path) -> list[str]:
    """Return the paths of all image files below `root`, sorted by their bytes."""
    found: list[bytes] = []
    _walk(os.fsencode(root), b"", frozenset(), found)
    return [os.fsdecode(name) for name in sorted(found)]


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: no folder, and as an image it is one that cannot be read
        return False


def _walk(folder: bytes, prefix: bytes, above: frozenset[tuple[int, int]], found: list[bytes]) -> None:
    """Collect image files. `above` are the folders on the way here: a link back to one of them would never end."""
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        with os.scandir(folder) as scan:
            entries = sorted((entry.name, _is_folder(entry)) for entry in scan)
    except OSError as error:
        raise CorpusError(
            f"{os.fsdecode(folder)} cannot be listed: {error.strerror}",
            "Make the folder readable, or take it out of the corpus.",
        ) from error
    for name, is_folder in entries:
        if is_folder:
            _walk(os.path.join(folder, name), prefix + name + b"/", above | {identity}, found)
        elif os.path.splitext(os.fsdecode(name))[1].lower() in EXTENSIONS:
            found.append(prefix + name)


def _conversations(corpus: Path) -> Iterator[tuple[str, Any]]:
    """Yield every entry of a conversations file with words that say where it is."""
    try:
        text = corpus.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{corpus} cannot be read: {error}", "Give a UTF-8 JSON or JSONL file.") from error
    if corpus.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise CorpusError(
                        f"{corpus}, line {number} is not JSON: {error}", "A .jsonl file holds one object per line."
                    ) from error
        return
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{corpus} is not JSON: {error}", "If it holds one object per line, name it .jsonl; else mend the file."
        ) from error
    if not isinstance(data, list):
        raise CorpusError(
            f"{corpus} holds a JSON {type(data).__name__}, not a list of conversations",
            "The LLaVA format is a list of objects with `image` and `conversations`.",
        )
    for number, sample in enumerate(data):
        yield f"entry {number}", sample


def _image_names(sample: Any, where: str) -> list[str]:
    remedy = "`image` is a path relative to --images, or a list of them."
    if not isinstance(sample, dict):
        raise CorpusError(f"{where} is a {type(sample).__name__}, not an object", remedy)
    value = sample.get("image")
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorpusError(f"{where}: `image` is {str(value)[:80]!r}", remedy)
    return names
