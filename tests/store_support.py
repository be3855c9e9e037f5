"""Small stores made directly through the contract, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

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
from olaschema.precision import DTYPES
from olaschema.store import FeatureStore

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


def record(precision: Precision = "float16", **changes: object) -> TeacherRecord:
    return TeacherRecord(
        fingerprint=fingerprint(**changes),  # type: ignore[arg-type]
        precision=precision,
        source="tests",
        licence="MIT",
        libraries={},
    )


def images(count: int, start: int = 0) -> list[SampleRow]:
    return [SampleRow(row=0, key=f"{i:04d}.jpg", uri=f"{i:04d}.jpg", size=10 + i) for i in range(start, start + count)]


def fill_shard(
    store: FeatureStore, teacher: TeacherRecord, shard: int, features: np.ndarray, *, failed: tuple[int, ...] = ()
) -> np.ndarray:
    """Commit float32 `features` (n, ...) as the first rows of a shard; returns the stored values, NaN where none."""
    rows_per_shard = store.rows_per_shard
    values = np.full((rows_per_shard, *teacher.fingerprint.shape), np.nan, DTYPES[teacher.precision])
    rows = [RowReceipt(status="absent")] * rows_per_shard
    statistics = ChannelStatistics(teacher.fingerprint.channels)
    for i, feature in enumerate(features):
        if i in failed:
            rows[i] = RowReceipt(status="failed", reason="truncated", detail="cut short")
            continue
        values[i] = feature
        rows[i] = RowReceipt(status="ok", sha256=f"{i:064x}", width=8, height=6)
        statistics.update(feature[None])
    store.commit_shard(teacher, shard, values, rows, statistics, EXECUTION)
    return values


def make_store(
    root: Path,
    *,
    count: int = 6,
    rows_per_shard: int = 4,
    precision: Precision = "float16",
    seed: int = 0,
    **changes: object,
) -> tuple[FeatureStore, TeacherRecord, np.ndarray]:
    """A store of random features; returns it, the teacher's record and all values (shards * rows, ...)."""
    store = FeatureStore.create(root, rows_per_shard=rows_per_shard)
    store.add_generation(images(count))
    teacher = record(precision, **changes)
    store.put_teacher(teacher)
    rng = np.random.default_rng(seed)
    values = []
    for shard in range(store.shard_count()):
        n = min(rows_per_shard, count - shard * rows_per_shard)
        features = rng.normal(size=(n, *teacher.fingerprint.shape)).astype(np.float32)
        values.append(fill_shard(store, teacher, shard, features))
    return store, teacher, np.concatenate(values)
