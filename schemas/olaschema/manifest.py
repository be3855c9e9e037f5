"""What a feature store says about itself: fingerprints, receipts, sample rows. No bytes are touched here."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from olaschema.errors import FingerprintError
from olaschema.norms import NormHistogram, squared_norms

FORMAT_VERSION: Literal[1] = 1

Precision = Literal["float32", "float16", "int8", "int4", "klt"]
Scalar = str | int | float | bool


class Frozen(BaseModel):
    """Base of every model here: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def canonical_json(model: BaseModel | dict[str, Any]) -> bytes:
    """Serialise to UTF-8 JSON with sorted keys and fixed separators, so that equal content is equal bytes."""
    data = model.model_dump(mode="json") if isinstance(model, BaseModel) else model
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)
    return (text + "\n").encode()


class View(Frozen):
    """Which part of an image a model sees, and how that part is laid on its square input.

    `squash`: the whole image, both sides scaled to the input (aspect ratio lost).
    `crop`: the centre square whose side is `fraction` of the shorter image side (1.0: the largest square;
    above 1.0 is impossible).
    `pad`: the whole image, aspect ratio kept, centred on a square canvas.
    """

    kind: Literal["squash", "crop", "pad"]
    fraction: float = Field(default=1.0, gt=0.0, le=1.0)

    def describe(self) -> str:
        """Say in words what is seen, for error messages."""
        if self.kind == "squash":
            return "the whole image, squashed to a square"
        if self.kind == "pad":
            return "the whole image, padded to a square"
        if self.fraction == 1.0:
            return "the largest centred square of the image"
        return f"a centred square of {self.fraction:.4g} of the shorter side"

    def accepts(self, teacher: View, *, spatial: bool) -> bool:
        """Whether a student with this view can be supervised by targets of a teacher with view `teacher`.

        Spatial targets need the same geometry. A target without a grid (one vector per image) only needs
        the student to see all that the teacher saw.
        """
        if self == teacher:
            return True
        if spatial:
            return False
        if self.kind in ("squash", "pad"):
            return True
        return teacher.kind == "crop" and teacher.fraction <= self.fraction


class Step(Frozen):
    """One preprocessing step, in the order applied, with every value that changes pixels."""

    name: str
    values: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)


class Preprocessing(Frozen):
    """How pixels were made for the teacher."""

    processor: str
    """Class name of the image processor, e.g. `DPTImageProcessorPil`, or `olapipe` for ours."""
    backend: Literal["pil"]
    channel_order: Literal["rgb", "bgr"]
    exif: bool
    """Whether the EXIF orientation was applied before anything else."""
    view: View
    steps: tuple[Step, ...]


class Fingerprint(Frozen):
    """What a stored float feature means. Two features may be mixed only if all of this is equal.

    Precision, format version and library versions are recorded beside it, not in it.
    """

    teacher: str
    model_class: str
    weights: str
    """SHA-256 over name, shape and float32 bytes of the tensors that compute the feature."""
    preset: str
    preprocessing: Preprocessing
    taps: tuple[int, ...]
    """0-based blocks (or stages) whose output is kept; empty where the model's own output is the feature."""
    pooling: Literal["mean", "last", "concat", "none"]
    options: dict[str, Scalar] = Field(default_factory=dict)
    """Further settings of this teacher that change the feature, e.g. `position_interpolation`."""
    grid: tuple[int, int] | None
    """(height, width) of the stored map, None for one vector per image."""
    channels: int = Field(gt=0)
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's feature: (H, W, C) or (C,)."""
        return (*self.grid, self.channels) if self.grid else (self.channels,)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the short name by which training pins a feature."""
        return hashlib.sha256(canonical_json(self)).hexdigest()

    def require_equal(self, other: Fingerprint, *, mine: str, theirs: str, remedy: str) -> None:
        """Raise FingerprintError naming each differing field unless `other` means the same feature."""
        if self == other:
            return
        fields = _differences(self.model_dump(mode="json"), other.model_dump(mode="json"))
        shown = "; ".join(f"{name}: {a!r} ({mine}) against {b!r} ({theirs})" for name, a, b in fields)
        raise FingerprintError(f"{self.teacher}: features differ in meaning: {shown}", remedy)


def _differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(a.keys() | b.keys()):
            found += _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if a == b else [(path, a, b)]


class BasisRecord(Frozen):
    """The file `bases/TEACHER.npy` of a teacher stored as `klt`; it never changes."""

    bytes: int
    sha256: str
    step: float = Field(gt=0)
    """The smallest scale of the integers."""
    images: int = Field(gt=0)
    """How many images it was fitted on."""


class TeacherRecord(Frozen):
    """Attributes of a teacher's group in the store: the fingerprint and what is recorded beside it."""

    fingerprint: Fingerprint
    precision: Precision
    source: str
    """Published id or folder name of the checkpoint; never an absolute path."""
    licence: str
    libraries: dict[str, str]
    """Versions that made the store: torch, transformers, pillow, zarr, numpy."""
    basis: BasisRecord | None = None
    """Only of the precision `klt`."""
    centred: bool = False
    """Whether integers are of what differs from the channel means of each image, which stand beside them (`offset`).

    True for maps that are stored as `int8` or `int4` from now on, False in stores of earlier versions.
    """
    zstd_level: int = Field(default=3, ge=1, le=22)
    """Level of the Zstandard frames; 3 in stores of earlier versions, which go on at that level."""

    @model_serializer(mode="wrap")
    def _without_absent(self, standard: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # records without these stay the bytes that they were before there were a basis, offsets and levels
        found: dict[str, Any] = standard(self)
        for name in ("basis", "centred", "zstd_level"):
            if getattr(self, name) == type(self).model_fields[name].default:
                found.pop(name, None)  # it is not there where other fields were asked for
        return found


def _decode_array(value: Any) -> np.ndarray:
    if (
        not isinstance(value, dict)
        or set(value) != {"dtype", "shape", "base64"}
        or value["dtype"] not in ("<f8", "<f4")
    ):
        raise ValueError("an array is {dtype: <f8 or <f4, shape, base64}")
    flat = np.frombuffer(base64.b64decode(value["base64"], validate=True), dtype=value["dtype"])
    return flat.reshape(value["shape"]).copy()


def _encode_array(array: np.ndarray) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(little.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


class ChannelStatistics:
    """Running count, mean, sum of squared deviations, minimum and maximum per channel, in float64; norms of tokens.

    Batches and shards are merged with the pairwise update of Chan, Golub and LeVeque (1979), always in
    row order and then shard order, so the result depends on the data alone. `norms` counts fewer tokens than `count`
    where receipts were written before there was a histogram.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros(channels)
        self.m2 = np.zeros(channels)
        self.minimum = np.full(channels, np.inf)
        self.maximum = np.full(channels, -np.inf)
        self.norms = NormHistogram()

    def update(self, features: np.ndarray) -> None:
        """Add features of shape (..., C)."""
        flat = features.reshape(-1, features.shape[-1])
        if not len(flat):
            return
        other = ChannelStatistics(flat.shape[1])
        other.count = len(flat)
        other.mean = flat.mean(axis=0, dtype=np.float64)
        other.m2 = np.square(flat - other.mean).sum(axis=0)  # float64, because the mean is
        other.minimum = flat.min(axis=0).astype(np.float64)
        other.maximum = flat.max(axis=0).astype(np.float64)
        other.norms.update(squared_norms(flat))
        self.merge(other)

    def merge(self, other: ChannelStatistics) -> None:
        """Add the statistics of further rows."""
        if not other.count:
            return
        self.norms.merge(other.norms)
        total = self.count + other.count
        delta = other.mean - self.mean
        self.m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)
        self.count = total

    @property
    def variance(self) -> np.ndarray:
        """Population variance per channel, shape (C,)."""
        return self.m2 / max(self.count, 1)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form that keeps every bit."""
        if not self.count:
            return {"count": 0}
        parts = {"mean": self.mean, "m2": self.m2}
        bounds = {"minimum": self.minimum.astype("<f4"), "maximum": self.maximum.astype("<f4")}
        arrays = {k: _encode_array(v) for k, v in (parts | bounds).items()}
        return {"count": self.count, "norms": self.norms.to_json()} | arrays

    @classmethod
    def from_json(cls, data: dict[str, Any], channels: int) -> ChannelStatistics:
        """Rebuild from `to_json`; raises ValueError where arrays are not of `channels` values.

        Receipts of earlier versions hold no norms.
        """
        stats = cls(channels)
        if data["count"]:
            stats.count = int(data["count"])
            for name in ("mean", "m2", "minimum", "maximum"):
                array = np.asarray(_decode_array(data[name]), dtype=np.float64)
                if array.shape != (channels,):
                    raise ValueError(f"{name} has shape {array.shape}, expected ({channels},)")
                setattr(stats, name, array)
            if "norms" in data:
                stats.norms = NormHistogram.from_json(data["norms"])
        return stats


class RowReceipt(Frozen):
    """What became of one row: `ok`, `failed` with a reason, or `absent` (no image was planned there)."""

    status: Literal["ok", "failed", "absent"]
    sha256: str | None = None
    """Digest of the image file's bytes as they were read (ok, and failed where bytes were read)."""
    width: int | None = None
    height: int | None = None
    """Pixels of the decoded image before any EXIF rotation."""
    reason: str | None = None
    detail: str | None = None
    same_as: int | None = None
    """Row of the store that holds the feature of this image too, as both have the same bytes (only where ok)."""

    @property
    def stored(self) -> bool:
        """Whether the feature is in this row itself."""
        return self.status == "ok" and self.same_as is None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # receipts from before there were shared rows stay what they are, byte for byte
        data: dict[str, Any] = handler(self)
        if self.same_as is None:
            data.pop("same_as", None)  # it is not there where other fields were asked for
        return data


class FileReceipt(Frozen):
    """Size and digest of one file that belongs to a shard."""

    bytes: int
    sha256: str


class Execution(Frozen):
    """What byte identity is conditional on, beside corpus and settings."""

    device: str
    torch: str
    batch_size: int
    compile: bool = False
    threads: int
    """Intra-op CPU threads: reductions split differently with another number."""


class Receipt(Frozen):
    """The commit of one shard of one teacher: written last, promises the bytes it names."""

    format: Literal[1] = FORMAT_VERSION
    teacher: str
    shard: int
    revision: int = 0
    """How many of the shard's images were forgotten: every `olapipe forget` makes a new revision."""
    fingerprint: str
    rows: tuple[RowReceipt, ...]
    files: dict[str, FileReceipt]
    """Paths relative to the store's root."""
    statistics: dict[str, Any]
    execution: Execution

    @property
    def ok(self) -> int:
        """Number of rows with a feature."""
        return sum(row.status == "ok" for row in self.rows)

    @property
    def shared(self) -> int:
        """Number of those whose feature is in another row."""
        return sum(row.same_as is not None for row in self.rows)

    @property
    def failed(self) -> int:
        """Number of rows whose image was planned but has no feature."""
        return sum(row.status == "failed" for row in self.rows)


class SampleRow(Frozen):
    """One planned image: `row` is its place in every teacher's array, for ever."""

    row: int
    key: str
    """POSIX path relative to the corpus root, with extension."""
    uri: str
    """Where the bytes are, relative to the root given at run time; equals `key` for folders and JSON."""
    size: int
    """Bytes in the listing, -1 where the listed file was missing."""
    problem: Literal["bad-name", "outside-root", "forgotten"] | None = None
    """Why it is known before reading that this image gives no feature; None for all others."""


class Generation(Frozen):
    """The commit of one plan: which rows were added together, and the parquet parts that hold them."""

    format: Literal[1] = FORMAT_VERSION
    number: int
    first_row: int
    rows: int
    """Planned images. Rows from `first_row + rows` to the end of the last shard are absent."""
    parts: dict[str, FileReceipt]


class StoreManifest(Frozen):
    """What metadata a finished store has: tells a lost or exchanged document from one that was never written."""

    format: Literal[1] = FORMAT_VERSION
    files: dict[str, FileReceipt]
    """Documents outside `receipts/`. Empty while a run changes the store."""
    receipts: dict[str, tuple[str, ...]]
    """By teacher the SHA-256 of each receipt's file, in shard order; a teacher that is not complete is missing."""


class StoreRecord(Frozen):
    """Attributes of the root group."""

    format: Literal[1] = FORMAT_VERSION
    rows_per_shard: int = Field(gt=0)
