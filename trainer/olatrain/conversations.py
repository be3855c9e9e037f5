"""Conversations: reading LLaVA-style JSON, JSONL and parquet, kept compactly, each with the key of its image."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from olaschema.errors import CorpusError, ImageError, OlaError
from olaschema.keys import normalise_key

IMAGE_MARK = "<image>"
Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_SHOWN = 3


class SampleError(OlaError):
    """One conversation cannot be used as it is. `reason` is a short stable code that reports group by.

    Reasons: not-an-object, no-turns, unknown-role, turn-order, empty-answer, image-mark, bad-image, reserved-text,
    too-long.
    """

    def __init__(self, reason: str, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """One message. A single image's mark is taken out of `text`; several keep their marks, where they stand."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """Alternating turns of user and assistant, perhaps after a system message, about any number of images."""

    index: int
    """Place in the file, from 0."""
    keys: tuple[str, ...]
    """The images' keys in the order of their marks, none for text alone."""
    image_turns: tuple[int, ...]
    """The turn that shows each image, ascending."""
    turns: tuple[Turn, ...]

    @property
    def key(self) -> str | None:
        """The first image's key, None for text alone."""
        return self.keys[0] if self.keys else None


@dataclass(frozen=True)
class BadConversation:
    """A conversation left out, and why."""

    index: int
    reason: str
    detail: str


class Conversations(Sequence[Conversation]):
    """All usable conversations of a file, in its order.

    They are held as one block of bytes: loader processes share it without copies, and a million of them are few
    Python objects.
    """

    def __init__(self, path: Path, entries: Iterator[tuple[int, Any]]) -> None:
        self.path = path
        self.bad: list[BadConversation] = []
        self.keys: list[tuple[str, ...]] = []
        encoded: list[bytes] = []
        indices: list[int] = []
        digest = hashlib.sha256()
        for index, entry in entries:
            try:
                conversation = parse_conversation(entry, index)
            except SampleError as error:
                self.bad.append(BadConversation(index, error.reason, error.problem))
                continue
            encoded.append(_encode(conversation))
            digest.update(encoded[-1] + b"\n")
            indices.append(index)
            self.keys.append(conversation.keys)
        if not encoded:
            shown = "; ".join(bad.detail for bad in self.bad[:_SHOWN])
            raise CorpusError(
                f"{path} holds no usable conversation" + (f": {shown}" if shown else ""),
                'Each entry is {"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}.',
            )
        self._indices = np.asarray(indices, dtype=np.int64)
        self._ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
        self._data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.digest = digest.hexdigest()

    @classmethod
    def read(cls, path: Path) -> Conversations:
        """Read a `.jsonl` file line by line, a `.parquet` file row by row, any other as one JSON list.

        A parquet file has the columns `conversations` and, where there are images, `image`: their paths, or the images
        themselves, whose keys then are `NAME.parquet/ROW`, as when the file is a corpus. Unusable conversations are
        collected in `bad`. Raises CorpusError where the file is not readable as that, or no conversation is usable.
        """
        return cls(path, _entries(path))

    @classmethod
    def concatenate(cls, parts: Sequence[Conversations], repeats: Sequence[int]) -> Conversations:
        """Return all parts' conversations, one part after the other, each `repeats` times in a row."""
        chosen = copy.copy(parts[0])
        chosen.path = Path(", ".join(str(part.path) for part in parts))
        chosen.bad = [bad for part in parts for bad in part.bad]
        repeated = [part for part, count in zip(parts, repeats, strict=True) for _ in range(count)]
        chosen.keys = [keys for part in repeated for keys in part.keys]
        chosen._indices = np.concatenate([part._indices for part in repeated])
        chosen._data = np.concatenate([part._data for part in repeated])
        lengths = [np.diff(part._ends, prepend=0) for part in repeated]
        chosen._ends = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        chosen.digest = hashlib.sha256("".join(part.digest for part in repeated).encode()).hexdigest()
        return chosen

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: Any) -> Any:
        start = self._ends[place - 1] if place else 0
        keys, image_turns, turns = json.loads(self._data[start : self._ends[place]].tobytes())
        index = int(self._indices[place])
        return Conversation(index, tuple(keys), tuple(image_turns), tuple(Turn(*turn) for turn in turns))

    def select(self, places: Sequence[int]) -> Conversations:
        """Return the conversations at `places`, in that order."""
        pieces = [self._data[self._ends[p - 1] if p else 0 : self._ends[p]] for p in places]
        chosen = copy.copy(self)
        chosen.keys = [self.keys[p] for p in places]
        chosen._indices = self._indices[list(places)]
        chosen._ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        chosen._data = np.concatenate(pieces)
        chosen.digest = hashlib.sha256(b"".join(piece.tobytes() + b"\n" for piece in pieces)).hexdigest()
        return chosen

    def problems(self) -> str:
        """One line on what was left out, empty where nothing was."""
        if not self.bad:
            return ""
        counts = Counter(bad.reason for bad in self.bad)
        shown = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        return f"{self.path}: {len(self.bad)} conversations left out ({shown}); the first: {self.bad[0].detail}"


def parse_conversation(entry: Any, index: int) -> Conversation:
    """Check one entry of the file; raises SampleError naming its index (and id) and what is wrong."""
    if not isinstance(entry, dict):
        raise SampleError("not-an-object", f"conversation {index} is not an object but {type(entry).__name__}")
    name = f"conversation {index}" + (f" (id {entry['id']})" if "id" in entry else "")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise SampleError("no-turns", f"{name} has no turns")
    parsed = [_turn(turn, name) for turn in turns]
    _check_order(parsed, name)
    keys = _keys(entry.get("image"), name)
    marked = tuple(number for number, turn in enumerate(parsed) for _ in range(turn.text.count(IMAGE_MARK)))
    if any(parsed[number].role != "user" for number in marked):
        raise SampleError("image-mark", f"{name}: {IMAGE_MARK} stands in a turn that is not the user's")
    if len(marked) != len(keys):
        have = {0: "no image", 1: "one image"}.get(len(keys), f"{len(keys)} images")
        raise SampleError("image-mark", f"{name} has {have} and {len(marked)} times {IMAGE_MARK}")
    clean = tuple(
        Turn(turn.role, (turn.text if marked.count(n) > 1 else turn.text.replace(IMAGE_MARK, "")).strip())
        for n, turn in enumerate(parsed)
    )
    for turn in clean:
        if turn.role == "assistant" and not turn.text:
            raise SampleError("empty-answer", f"{name} has an empty answer")
    return Conversation(index, keys, marked, clean)


def _turn(turn: Any, name: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise SampleError("no-turns", f'{name}: a turn is not {{"from": …, "value": text}}')
    role = _ROLES.get(turn["from"]) if isinstance(turn.get("from"), str) else None
    if role is None:
        raise SampleError("unknown-role", f"{name}: unknown role {turn.get('from')!r}; known: {', '.join(_ROLES)}")
    return Turn(role, turn["value"])


def _check_order(turns: list[Turn], name: str) -> None:
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise SampleError("turn-order", f"{name}: turns are not question, answer, … but {', '.join(roles)}")


def _keys(image: Any, name: str) -> tuple[str, ...]:
    if image is None:
        return ()
    images = image if isinstance(image, list) else [image]
    wrong = [entry for entry in images if not isinstance(entry, str)]
    if wrong:
        raise SampleError("bad-image", f"{name}: image is not a path but {type(wrong[0]).__name__}")
    try:
        return tuple(normalise_key(entry) for entry in images)
    except ImageError as error:
        raise SampleError("bad-image", f"{name}: {error.problem}") from error


def _encode(conversation: Conversation) -> bytes:
    turns = [(turn.role, turn.text) for turn in conversation.turns]
    # ensure_ascii keeps lone surrogates, which JSON may hold and UTF-8 may not
    return json.dumps((conversation.keys, conversation.image_turns, turns)).encode()


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    remedy = "Give a JSON list of conversations, a .jsonl file with one per line, or a .parquet file with one per row."
    try:
        if path.exists() and not path.is_file():
            raise CorpusError(f"{path} is no file", remedy)
        if path.suffix.lower() == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                yield from enumerate(json.loads(line) for line in file if line.strip())
            return
        if path.suffix.lower() == ".parquet":
            yield from enumerate(_rows(path, remedy))
            return
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except pa.ArrowException as error:
        raise CorpusError(f"{path} cannot be read: {str(error).splitlines()[0]}", remedy) from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path} is not valid JSON: {error}", remedy) from error
    if not isinstance(data, list):
        raise CorpusError(f"{path} holds a {type(data).__name__}, not a list", remedy)
    yield from enumerate(data)


def _rows(path: Path, remedy: str) -> Iterator[dict[str, Any]]:
    # no threads of Arrow: loader processes are forked
    with pq.ParquetFile(path, pre_buffer=False) as file:
        schema = file.schema_arrow
        if "conversations" not in schema.names:
            raise CorpusError(f"{path} has no column conversations; its columns: {', '.join(schema.names)}", remedy)
        kind = schema.field("image").type if "image" in schema.names else pa.null()
        held = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)
        # which rows have an image is told by its path, where it has one: the images are not read
        image = "image.path" if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else "image"
        number = 0
        for batch in file.iter_batches(256, columns=["id", image, "conversations"], use_threads=False):
            for row in batch.to_pylist():
                entry = {name: value for name, value in row.items() if value is not None}
                if held and "image" in entry:
                    entry["image"] = f"{path.name}/{number}"
                yield entry
                number += 1
