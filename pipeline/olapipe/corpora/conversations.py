"""LLaVA-style conversations, JSON or JSONL, read a piece at a time; images lie under a root, tar members included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from olapipe.corpora.entry import Entry, make_key
from olaschema.errors import CorpusError
from olaschema.rooted import rooted_size

_PIECE = 1 << 20
_LONGEST = 64 << 20
_SPACE = " \t\n\r"


class Conversations:
    """The images that conversations name, in order of use, as often as they are used."""

    def __init__(self, corpus: Path, root: Path) -> None:
        self.root = root
        self.passed_over: dict[str, int] = {}
        self.text_only = 0
        self._corpus = corpus

    def __iter__(self) -> Iterator[Entry]:
        self.text_only = 0
        entries = 0
        for where, sample in samples(self._corpus):
            names = _image_names(sample, f"{self._corpus}, {where}")
            self.text_only += not names
            for name in names:
                entries += 1
                key, problem = make_key(name)
                yield Entry(key, -1 if problem else rooted_size(self.root, key), problem)
        if not entries:
            raise CorpusError(
                f"{self._corpus}: none of its {self.text_only} entries has an image", "Entries need a field `image`."
            )


def samples(corpus: Path) -> Iterator[tuple[str, Any]]:
    """Yield every entry of a conversations file with words that say where it is.

    Holds one entry, of at most 64 Mi characters. Raises CorpusError where the file is not what its name says.
    """
    try:
        with corpus.open(encoding="utf-8-sig", newline="\n") as file:
            yield from (_lines if corpus.suffix.lower() == ".jsonl" else _array)(corpus, file)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{corpus} cannot be read: {error}", "Give a UTF-8 JSON or JSONL file.") from error


def _lines(corpus: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(_LONGEST):
        number += 1
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{corpus}, line {number} is not JSON: {error}", "A .jsonl file holds one object per line."
            ) from error


def _array(corpus: Path, file: TextIO) -> Iterator[tuple[str, Any]]:
    text = _Text(corpus, file)
    if text.peek() != "[":
        text.require_list()
    text.skip()
    number = 0
    while text.peek() != "]":
        if number:
            if text.peek() != ",":
                raise text.broken(f"a comma or ] is missing after entry {number - 1}")
            text.skip()
        yield f"entry {number}", text.value()
        number += 1
    text.skip()
    if text.peek():
        raise text.broken("something follows the list")


class _Text:
    """A JSON text, of which the piece that is being parsed is in memory."""

    def __init__(self, corpus: Path, file: TextIO) -> None:
        self._corpus = corpus
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False

    def broken(self, problem: object) -> CorpusError:
        return CorpusError(
            f"{self._corpus} is not JSON: {problem}",
            "If it holds one object per line, name it .jsonl; else mend the file.",
        )

    def peek(self) -> str:
        """Return the next character that is no white space, "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._more()

    def skip(self) -> None:
        """Go past the character that was peeked at."""
        self._at += 1

    def value(self) -> Any:
        """Parse one value."""
        self.peek()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise self.broken(error) from error
                if len(self._text) - self._at > _LONGEST:
                    raise self.broken(f"an entry has no end within {_LONGEST >> 20} Mi characters") from error
                self._more()
                continue
            self._at = end
            return found

    def require_list(self) -> None:
        """Raise CorpusError that says what the text holds instead of a list."""
        kind = type(self.value()).__name__
        raise CorpusError(
            f"{self._corpus} holds a JSON {kind}, not a list of conversations",
            "The LLaVA format is a list of objects with `image` and `conversations`.",
        )

    def _more(self) -> None:
        # pieces double with what is held, so that a long entry is not parsed again for every piece
        piece = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._ended = not piece
        self._text = self._text[self._at :] + piece
        self._at = 0


def _image_names(sample: Any, where: str) -> list[str]:
    remedy = "`image` is a path relative to --images, or a list of them."
    if not isinstance(sample, dict):
        raise CorpusError(f"{where} is a {type(sample).__name__}, not an object", remedy)
    value = sample.get("image")
    if isinstance(value, str):
        return [value]
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorpusError(f"{where}: `image` is {str(value)[:80]!r}", remedy)
    return names
