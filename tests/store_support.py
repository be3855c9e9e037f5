"""Small stores made directly through the contract, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from olaschema.basis import Basis
from olaschema.manifest import (
    ChannelStatistics,
    Execution,
    Fingerprint,
    Precision,
    Preprocessing,
    RowReceipt,
    SampleRow,
    TeacherRecord,
    View,
)
from olaschema.precision import blank, decode, encode
from olaschema.store import FeatureStore
from olaschema.zarrbytes import zstd_level

DOCS = (Path(__file__).parents[1] / "docs" / "store-format.md").read_text(encoding="utf-8")
EXECUTION = Execution(device="cpu", torch="2.13.0", batch_size=4, threads=1)


def fingerprint(
    teacher: str = "depth",
    *,
    grid: tuple[int, int] | None = (3, 3),
    channels: int = 5,
    weights: str = "w",
    view: str = "squash",
) -> Fingerprint:
    return Fingerprint(
        teacher=teacher,
        model_class="TestModel",
        weights=weights,
        preset="default",
        preprocessing=Preprocessing(
            processor="TestProcessorPil",
            backend="pil",
            channel_order="rgb",
            exif=True,
            view=View.model_validate({"kind": view}),
            steps=(),
        ),
        taps=(1, 2),
        pooling="mean",
        grid=grid,
        channels=channels,
    )


def small_basis(shape: tuple[int, ...], *, seed: int = 5, step: float = 2.0**-6) -> Basis:
    """A basis for features of `shape` that nothing was fitted on: two rotations and a mean map."""
    rng = np.random.default_rng(seed)
    tokens, channels = int(np.prod(shape[:-1])), shape[-1]
    rotations = [np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for n in (tokens, channels)]
    return Basis(rng.normal(size=(tokens, channels)).astype(np.float32), *rotations, step)


def record(precision: Precision = "float16", **changes: object) -> TeacherRecord:
    """What a store records; integers of maps with offsets, as they are written now, unless `centred` is False."""
    centred, level = bool(changes.pop("centred", True)), changes.pop("zstd_level", zstd_level(precision))
    described = fingerprint(**changes)  # type: ignore[arg-type]
    return TeacherRecord(
        centred=centred and precision in ("int8", "int4") and described.grid is not None,
        zstd_level=level,
        basis=small_basis(described.shape).record(4) if precision == "klt" else None,
        fingerprint=described,
        precision=precision,
        source="tests",
        licence="MIT",
        libraries={},
    )


def put(store: FeatureStore, teacher: TeacherRecord) -> None:
    """Give the store a teacher's record, with the basis that `record` describes."""
    store.put_teacher(teacher, small_basis(teacher.fingerprint.shape) if teacher.precision == "klt" else None)


def images(count: int, start: int = 0) -> list[SampleRow]:
    return [SampleRow(row=0, key=f"{i:04d}.jpg", uri=f"{i:04d}.jpg", size=10 + i) for i in range(start, start + count)]


def fill_shard(
    store: FeatureStore,
    teacher: TeacherRecord,
    shard: int,
    features: np.ndarray,
    *,
    failed: tuple[int, ...] = (),
    seen: list[str] | None = None,
) -> np.ndarray:
    """Commit float32 `features` (n, ...) as the first rows of a shard; returns the decoded rows, NaN where none.

    `seen` are the digests of the images, made up where there are none.
    """
    rows_per_shard = store.rows_per_shard
    basis = store.basis(teacher)
    stored = blank(rows_per_shard, teacher.fingerprint.shape, teacher.precision, centred=teacher.centred)
    rows = [RowReceipt(status="absent")] * rows_per_shard
    statistics = ChannelStatistics(teacher.fingerprint.channels)
    for i, feature in enumerate(features):
        if i in failed:
            rows[i] = RowReceipt(status="failed", reason="truncated", detail="cut short")
            continue
        stored[i] = encode(feature, teacher.precision, basis, centred=teacher.centred)
        rows[i] = RowReceipt(status="ok", sha256=seen[i] if seen else f"{i:064x}", width=8, height=6)
        statistics.update(feature[None])
    store.commit_shard(teacher, shard, stored, rows, statistics, EXECUTION)
    return decode(stored, teacher.fingerprint.channels, basis)


def decoding(docs: str, precision: str) -> Callable[..., np.ndarray]:
    """The decoding that the table in docs/store-format.md gives for a precision, to be called with the arrays."""

    def decode(*, channels: int, basis: Path | None = None, **arrays: np.ndarray) -> np.ndarray:
        start = f"| `{precision}` centred " if "offset" in arrays else f"| `{precision}` "
        found = [line for line in docs.splitlines() if line.startswith(start)]
        (line,) = [line for line in found if "offset" in arrays or "centred" not in line.split("|")[1]]
        code = compile(line.split("|")[3].strip().strip("`"), "docs/store-format.md", "eval")
        names: dict[str, object] = {"np": np, "C": channels}
        if basis is not None:  # what stands above the table
            values = arrays["values"]
            names["T"] = int(np.prod(values.shape[-3:-1])) if values.ndim > 2 else 1
            lines = [line for line in docs.splitlines() if line.startswith(("basis = np", "mean, places"))]
            exec("\n".join(lines).replace('"features.zarr/bases/depth.npy"', repr(str(basis))), names)  # noqa: S102
        feature: np.ndarray = eval(code, names, arrays)  # noqa: S307
        return feature

    return decode


def fixture_features(row: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 feature of a row of the stores under `fixtures/`: exact numbers, an outlier channel, a zero token."""
    places = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    values = ((places * 1103515245 + row * 40503 + 12345) % 4096 - 2048) / 256
    values[..., 3] *= 100
    if len(shape) == 3:
        values[0, 0] = 0
    return values.astype(np.float32)


def make_store(
    root: Path,
    *,
    count: int = 6,
    rows_per_shard: int = 4,
    precision: Precision = "float16",
    seed: int = 0,
    **changes: object,
) -> tuple[FeatureStore, TeacherRecord, np.ndarray]:
    """A store of random features; returns it, the teacher's record and all decoded rows (shards * rows, ...)."""
    store = FeatureStore.create(root, rows_per_shard=rows_per_shard)
    store.add_generation(images(count))
    teacher = record(precision, **changes)
    put(store, teacher)
    rng = np.random.default_rng(seed)
    values = []
    for shard in range(store.shard_count()):
        n = min(rows_per_shard, count - shard * rows_per_shard)
        features = rng.normal(size=(n, *teacher.fingerprint.shape)).astype(np.float32)
        values.append(fill_shard(store, teacher, shard, features))
    return store, teacher, np.concatenate(values)
