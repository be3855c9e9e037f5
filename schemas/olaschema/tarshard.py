"""The WebDataset layout of a training set: tars that plain `webdataset` decodes, each with an index of its members.

A tar sample is one set of images with all conversations about it. Members are named by the sample's number, so that
no dot or slash of a key can split them wrongly: `000000012.jpg`, `000000012.json`, `000000012.depth.values.npy`; a
second image of the sample is `000000012.1.jpg`, `000000012.1.depth.values.npy`. Nothing here is pickled, and members
are read by the offsets and checksums of the index, never by names found in a tar.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from functools import lru_cache

import google_crc32c
import numpy as np
from pydantic import Field

from olaschema.errors import StoreError
from olaschema.images import EXTENSIONS
from olaschema.manifest import FORMAT_VERSION, FileReceipt, Frozen, TeacherRecord
from olaschema.precision import ArrayFormat, Stored

ROOT = "packed.json"
LISTING = "listing.parquet"
CONVERSATIONS = "conversations.jsonl"
OK = "ok"
_TEACHER = re.compile(r"[A-Za-z0-9_-]+")
_DIGITS = 9


class Member(Frozen):
    """One file inside a tar."""

    name: str
    """Behind the sample's number and a dot: `jpg`, `json`, `depth.values.npy`."""
    offset: int = Field(ge=0)
    """Of its first byte of content in the tar."""
    bytes: int = Field(ge=0)
    crc32c: int = Field(ge=0, lt=1 << 32)


class PackedImage(Frozen):
    """One image of a tar sample."""

    key: str
    row: int
    """In the feature store that was packed; -1 where that did not plan the image."""
    sha256: str
    member: str
    features: dict[str, str]
    """By teacher `ok`, or why there is no feature: `not-in-store`, `not-extracted`, or the receipt's reason."""
    same_as: int | None = None
    """Row of the store that an image of the same bytes has and that it shares (`olapipe dedup`)."""


class TarSample(Frozen):
    """One sample of a tar."""

    number: int
    conversations: tuple[int, ...]
    """Lines of `conversations.jsonl`, from 0."""
    images: tuple[PackedImage, ...]
    members: tuple[Member, ...]


class LeftOut(Frozen):
    """A conversation, or an image without one, that is not in the set, and why."""

    index: int
    """Place in the conversations that were packed, from 0; -1 for an image that no conversation is about."""
    key: str
    reason: str
    detail: str


class TarIndex(Frozen):
    """The commit of one tar, published after it."""

    format: int = Field(default=FORMAT_VERSION, ge=1, le=1)
    tar: FileReceipt
    inputs: str
    """Digest of all that the tar was made of but the images' bytes: tells a rerun that it is still what is wanted."""
    samples: tuple[TarSample, ...]
    left_out: tuple[LeftOut, ...]


class Tar(Frozen):
    """A tar of the set and its index, as the root document promises them."""

    tar: FileReceipt
    index: FileReceipt


class PackedRecord(Frozen):
    """The root document `packed.json`, written last."""

    format: int = Field(default=FORMAT_VERSION, ge=1, le=1)
    rows_per_shard: int = Field(gt=0)
    """Of the store that was packed."""
    teachers: dict[str, TeacherRecord]
    statistics: dict[str, dict[str, object]]
    """By teacher, of all features of the store that was packed (`ChannelStatistics.to_json`)."""
    tars: tuple[Tar, ...]
    files: dict[str, FileReceipt]
    """`listing.parquet` and `conversations.jsonl`."""
    samples: int
    conversations: int
    left_out: dict[str, int]
    """Conversations, or images without one, that are not in the set, by reason."""


def tar_name(number: int) -> str:
    """Path of a tar."""
    return f"{number:06d}.tar"


def index_name(number: int) -> str:
    """Path of a tar's index."""
    return f"{number:06d}.json"


def require_nameable(teacher: str) -> None:
    """Raise StoreError for a teacher whose name would split a member's name wrongly."""
    if not _TEACHER.fullmatch(teacher):
        raise StoreError(
            f"the teacher {teacher!r} cannot be packed: members are named after it, and a dot or slash splits names",
            "Pack only teachers named by letters, digits, - and _ (--teacher).",
        )


def image_member(key: str, place: int) -> str:
    """Name of the member that holds image number `place` of a sample, by the extension of its key."""
    stem, dot, extension = key.rpartition(".")
    known = bool(stem) and f"{dot}{extension.lower()}" in EXTENSIONS
    return f"{prefix(place)}{extension.lower() if known else 'img'}"


def array_member(teacher: str, array: str, place: int) -> str:
    """Name of the member that holds one array of a teacher's feature of image number `place` of a sample."""
    return f"{prefix(place)}{teacher}.{array}.npy"


def prefix(place: int) -> str:
    """What tells the further images of a sample from the first."""
    return f"{place}." if place else ""


def write_tar(samples: Iterable[tuple[int, dict[str, bytes]]]) -> tuple[bytes, list[tuple[Member, ...]]]:
    """Return a tar of samples, given as number and members by name, and where the members of each are.

    POSIX ustar; times, owners and groups are 0, modes 0644: the same members make the same bytes.
    """
    sink = io.BytesIO()
    placed: list[tuple[Member, ...]] = []
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, members in samples:
            found = []
            for name, data in members.items():
                info = tarfile.TarInfo(member_path(number, name))
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                offset = sink.tell() - padded
                found.append(Member(name=name, offset=offset, bytes=len(data), crc32c=crc32c(data)))
            placed.append(tuple(found))
    return sink.getvalue(), placed


def member_path(number: int, name: str) -> str:
    """Name of a member in its tar: zero-padded number of the sample, dot, name."""
    return f"{number:0{_DIGITS}d}.{name}"


def crc32c(data: bytes) -> int:
    """CRC-32C of some bytes."""
    value: int = google_crc32c.value(data)
    return value


def npy_members(teacher: str, stored: Stored, place: int) -> dict[str, bytes]:
    """Return one image's stored arrays as `.npy` files by member name."""
    return {array_member(teacher, name, place): npy(array) for name, array in stored.arrays.items()}


def npy(array: np.ndarray) -> bytes:
    """Return an array as a `.npy` file, version 1.0."""
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def read_npy(data: bytes, wanted: ArrayFormat) -> np.ndarray:
    """Return the array of a `.npy` file; raises ValueError unless it is exactly one of the format `wanted`.

    The header is compared, not parsed: nothing else can be read, objects least of all.
    """
    header = _npy_header(wanted.shape, wanted.dtype.str)
    if len(data) != len(header) + wanted.row_bytes or not data.startswith(header):
        raise ValueError(f"it is not a .npy file of {wanted.dtype} {wanted.shape}")
    array: np.ndarray = np.frombuffer(data, wanted.dtype, offset=len(header)).reshape(wanted.shape).copy()
    return array


@lru_cache(maxsize=64)
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    sink = io.BytesIO()
    # headers of version 1.0 say nothing of the content
    descr = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(sink, descr)
    return sink.getvalue()
