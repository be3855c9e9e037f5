"""One shard: read, decode once, preprocess for each teacher, encode in batches, commit. No Ray in here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from olapipe.corpus import read_image
from olapipe.quantise import DeviceBasis, quantise
from olapipe.teachers.base import Teacher
from olaschema.basis import Basis
from olaschema.errors import CorpusError, ImageError, TeacherError
from olaschema.images import DEFAULT_MAX_PIXELS, decode_image
from olaschema.manifest import ChannelStatistics, Execution, Receipt, RowReceipt, SampleRow, TeacherRecord
from olaschema.precision import blank, require_storable
from olaschema.store import FeatureStore

LOG = "shards.jsonl"
Progress = Callable[[str, int], None]
_LONGEST_DETAIL = 300


@dataclass(frozen=True)
class Limits:
    """How much one worker takes at a time.

    `max_pixels` refuses larger images; `batch_size` images go through a teacher together; `decoders` threads read,
    decode and preprocess ahead of the teachers, by at most two batches.
    """

    batch_size: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    decoders: int = 2


@dataclass
class _Row:
    """One image after its CPU half: `(3, H, W)` pixels per teacher, or why there are none."""

    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[str, ImageError] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def receipt(self, sample: SampleRow, error: ImageError | None) -> RowReceipt:
        seen = {"sha256": self.sha256, "width": self.width, "height": self.height}
        if error is None:
            return RowReceipt(status="ok", **seen)
        return RowReceipt(status="failed", reason=error.reason, detail=_detail(sample, error), **seen)


class _Output:
    """What becomes of one shard under one teacher."""

    def __init__(self, record: TeacherRecord, rows_per_shard: int) -> None:
        self.record = record
        self.stored = blank(rows_per_shard, record.fingerprint.shape, record.precision)
        self.rows = [RowReceipt(status="absent")] * rows_per_shard
        self.statistics = ChannelStatistics(record.fingerprint.channels)
        self.batch: list[tuple[int, SampleRow, _Row]] = []


def execution(device: str, batch_size: int, *, compiled: bool = False) -> Execution:
    """Describe what byte identity is conditional on; `device` is a torch device."""
    if torch.device(device).type == "cuda":
        model = torch.cuda.get_device_name(torch.device(device))
    else:
        model = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return Execution(
        device=model,
        torch=str(torch.__version__),
        batch_size=batch_size,
        compile=compiled,
        threads=torch.get_num_threads(),
    )


class ShardEncoder:
    """Encodes shards of one store with loaded teachers.

    `root` is the folder that keys are relative to; `records` are what the store holds of the teachers.
    """

    def __init__(
        self,
        store: FeatureStore,
        root: Path,
        teachers: Mapping[str, Teacher],
        records: Mapping[str, TeacherRecord],
        limits: Limits,
        execution: Execution,
    ) -> None:
        self.store = store
        self.root = root
        self.teachers = teachers
        self.records = records
        self.limits = limits
        self.execution = execution
        self._bases: dict[str, tuple[Basis | None, DeviceBasis | None]] = {}

    def encode(
        self, shard: int, teachers: Sequence[str], progress: Progress, *, replace: bool = False
    ) -> dict[str, Receipt]:
        """Encode and commit one shard for the named teachers; return its receipts.

        `progress(teacher, rows)` is told how many rows of the shard are settled. An image that cannot be used is
        recorded in its row. Raises CorpusError if the whole image folder is gone, TeacherError where a teacher fails
        on any input, StoreError where the store cannot be written. `replace` encodes a committed
        shard again, and takes images that have changed since they were planned.
        """
        if not self.root.is_dir():
            raise CorpusError(
                f"{self.root}: the image folder is not there",
                "Mount it under the same path on every machine of the job.",
            )
        started = time.perf_counter()
        samples = self.store.shard_samples(shard)
        outputs = {name: _Output(self.records[name], self.store.rows_per_shard) for name in teachers}
        seconds = dict.fromkeys(("read", "decode", "preprocess", "forward", "commit"), 0.0)
        settled = dict.fromkeys(teachers, 0)

        def settle(name: str, rows: int) -> None:
            settled[name] += rows
            progress(name, settled[name])

        def flush(name: str) -> None:
            since = time.perf_counter()
            rows = len(outputs[name].batch)
            self._encode_batch(name, outputs[name])
            seconds["forward"] += time.perf_counter() - since
            settle(name, rows)

        made_from = self._made_from(shard, teachers)
        # an image that another teacher has seen is known by its digest, whatever size was planned
        mended = [replace or index in made_from for index in range(len(samples))]
        for index, row in enumerate(self._prepared(samples, teachers, mended)):
            other, digest = made_from.get(index, ("", row.sha256))
            if row.sha256 != digest and not row.failures:
                changed = ImageError("changed", f"it is not the image that the features of {other} were made from")
                row.failures = dict.fromkeys(teachers, changed)
            for stage, spent in row.seconds.items():
                seconds[stage] += spent
            for name in teachers:
                if name in row.failures:
                    outputs[name].rows[index] = row.receipt(samples[index], row.failures[name])
                    settle(name, 1)
                    continue
                outputs[name].batch.append((index, samples[index], row))
                if len(outputs[name].batch) == self.limits.batch_size:
                    flush(name)
        receipts = {}
        for name in teachers:
            if outputs[name].batch:
                flush(name)
            since = time.perf_counter()
            output = outputs.pop(name)
            receipts[name] = self.store.commit_shard(
                output.record, shard, output.stored, output.rows, output.statistics, self.execution, replace=replace
            )
            seconds["commit"] += time.perf_counter() - since
        self._log(shard, receipts, seconds | {"wall": time.perf_counter() - started})
        return receipts

    def _made_from(self, shard: int, teachers: Sequence[str]) -> dict[int, tuple[str, str]]:
        """Which image, by digest, the teachers that are done already saw in each row: one row is one image."""
        found: dict[int, tuple[str, str]] = {}
        for name in self.store.teachers():
            receipt = None if name in teachers else self.store.receipt(name, shard)
            for index, row in enumerate(receipt.rows if receipt else ()):
                if row.status == "ok" and row.sha256 is not None:
                    found[index] = (name, row.sha256)
        return found

    def _prepared(self, samples: list[SampleRow], teachers: Sequence[str], mended: list[bool]) -> Iterator[_Row]:
        """Yield the rows in order, prepared ahead by threads, with a bounded number of images in memory."""
        ahead = 2 * self.limits.batch_size
        waiting: deque[Future[_Row]] = deque()
        pool = ThreadPoolExecutor(self.limits.decoders, thread_name_prefix="decode")
        try:
            for sample, taken in zip(samples, mended, strict=True):
                waiting.append(pool.submit(self._prepare, sample, teachers, taken))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, sample: SampleRow, teachers: Sequence[str], mended: bool) -> _Row:
        row = _Row()
        clock = time.perf_counter
        start = clock()
        try:
            data = read_image(self.root, sample, self.limits.max_pixels, mended=mended)
            row.sha256 = hashlib.sha256(data).hexdigest()
            read = clock()
            image = decode_image(data, name=sample.key, max_pixels=self.limits.max_pixels)
        except ImageError as error:
            row.failures = dict.fromkeys(teachers, error)
            return row
        row.width, row.height = image.rgb.size
        decoded = clock()
        for name in teachers:
            try:
                row.pixels[name] = self.teachers[name].preprocessor(image)
            except ImageError as error:
                row.failures[name] = error
        row.seconds = {"read": read - start, "decode": decoded - read, "preprocess": clock() - decoded}
        return row

    def _encode_batch(self, name: str, output: _Output) -> None:
        pixels_bchw = torch.from_numpy(np.stack([row.pixels.pop(name) for _, _, row in output.batch]))
        # A row that has pixels was read, so it has a digest too.
        digests = [row.sha256 for _, _, row in output.batch if row.sha256 is not None]
        try:
            encoded = self.teachers[name].encode_images(pixels_bchw, digests)
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"{name}: {len(output.batch)} images at a time do not fit the device's memory",
                f"Use a --batch-size below {self.limits.batch_size}.",
            ) from error
        features = encoded.cpu().numpy()  # as computed, for the checks and the statistics
        expected = (len(output.batch), *output.record.fingerprint.shape)
        if features.shape != expected or features.dtype != np.float32:
            raise TeacherError(
                f"{name}: the teacher returned {features.dtype} {features.shape}, its record says float32 {expected}",
                "This is a defect of the teacher's code.",
            )
        basis, on_device = self._basis(name, encoded.device)
        stored = quantise(encoded, output.record.precision, on_device)
        good = []
        for place, (index, sample, row) in enumerate(output.batch):
            try:
                require_storable(features[place], output.record.precision, name=sample.key, basis=basis)
            except ImageError as error:
                output.rows[index] = row.receipt(sample, error)
                continue
            output.stored[index] = stored[place]
            output.rows[index] = row.receipt(sample, None)
            good.append(features[place])
        if good:
            output.statistics.update(np.stack(good))
        output.batch.clear()

    def _basis(self, name: str, device: torch.device) -> tuple[Basis | None, DeviceBasis | None]:
        """Return a teacher's basis here and on the device, read once; none but for the precision klt."""
        if name not in self._bases:
            basis = self.store.basis(self.records[name])
            self._bases[name] = (basis, None if basis is None else DeviceBasis(basis, device))
        return self._bases[name]

    def _log(self, shard: int, receipts: Mapping[str, Receipt], seconds: Mapping[str, float]) -> None:
        line = {
            "shard": shard,
            "ok": {name: receipt.ok for name, receipt in receipts.items()},
            "failed": {name: receipt.failed for name, receipt in receipts.items()},
            "seconds": {stage: round(spent, 4) for stage, spent in seconds.items()},
            "pid": os.getpid(),
            "finished": time.time(),
        }
        self.store.place.append_log(LOG, json.dumps(line))


def _detail(sample: SampleRow, error: ImageError) -> str:
    """Return the problem without what differs between places: the name in front, addresses in memory."""
    text = error.problem.removeprefix(f"{sample.key}: ")
    text = re.sub(r" at 0x[0-9a-f]+", "", text).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + "…"
