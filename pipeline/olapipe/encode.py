"""One shard: read, decode once, preprocess for each teacher, encode in batches, commit. No Ray in here.

Two calls of `encode` in two threads overlap: while one shard is compressed and written the next one has the teachers,
and its first images are decoded while the one before it still has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from olapipe.corpus import read_image
from olapipe.keep import keep_features
from olapipe.quantise import DeviceBasis, quantise
from olapipe.teachers.base import Teacher
from olaschema.basis import Basis
from olaschema.errors import CorpusError, ImageError, TeacherError
from olaschema.images import DEFAULT_MAX_PIXELS, decode_image
from olaschema.layout import shard_lock
from olaschema.manifest import ChannelStatistics, Execution, Receipt, RowReceipt, SampleRow, TeacherRecord
from olaschema.precision import blank, require_storable
from olaschema.replacing import finish_replacement
from olaschema.store import FeatureStore

LOG = "timings.jsonl"
STAGES = ("read", "decode", "preprocess", "wait", "forward", "encode", "compress", "write")
Progress = Callable[[str, int], None]
_LONGEST_DETAIL = 300
_GONE = ("missing", "unreadable")
# How torch's allocator of host memory says that there is none left; it has no exception of its own.
_HOST_MEMORY = "not enough memory"
# What a worker died or raised of; the words are those of every run, so that they may be in a receipt.
CRASHES: Mapping[str, str] = {
    "crashed": "the process that encoded it died, twice on this image alone",
    "teacher-failed": "the teacher raised an error on this image alone",
}


@dataclass(frozen=True)
class Limits:
    """How much one worker takes at a time.

    `max_pixels` refuses larger images; `batch_size` images go through a teacher together; `decoders` threads read,
    decode and preprocess ahead of the teachers, by at most two batches of each shard that is under way.
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

    def __init__(self, record: TeacherRecord, rows_per_shard: int, batch_size: int) -> None:
        self.record = record
        self.batch_size = batch_size
        self.stored = blank(rows_per_shard, record.fingerprint.shape, record.precision, centred=record.centred)
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


class _OutOfMemoryError(Exception):
    """A batch of one teacher does not fit the device."""

    def __init__(self, teacher: str, images: int) -> None:
        super().__init__(teacher, images)
        self.teacher = teacher
        self.images = images


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
        self._decoding = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")
        self._device = threading.Lock()
        """Held by the shard whose batches go through the teachers."""

    def encode(
        self,
        shard: int,
        teachers: Sequence[str],
        progress: Progress,
        *,
        replace: bool = False,
        poisoned: Mapping[str, Mapping[int, str]] | None = None,
        timings: dict[str, float] | None = None,
    ) -> dict[str, Receipt]:
        """Encode and commit one shard for the named teachers; return its receipts.

        `progress(teacher, rows)` is told how many rows of the shard are settled. An image that cannot be used is
        recorded in its row. Raises CorpusError if the whole image folder is gone, before or meanwhile, TeacherError
        where a teacher fails on any input, StoreError where the store cannot be written. `replace` encodes a committed
        shard again, and takes images that have changed since they were planned, but where an image cannot be used any
        more, a sound shard keeps its feature (`keep_features`). `poisoned` are, by teacher, the
        rows that a worker did not survive, with the reason, one of `CRASHES`: they are recorded and not touched.
        `timings` is filled with the seconds spent in each of `STAGES` and `wall`.

        Where a teacher's batch does not fit the device, the whole shard is encoded again with half of that teacher's
        batch size, and so on down to 1; the receipt records the batch size. The next shard starts with the full one,
        so that what happened to other shards changes no feature.
        """
        started = time.perf_counter()
        for name in teachers if replace else ():  # another worker may have died of it
            with self.store.place.lock(shard_lock(name, shard)):
                finish_replacement(self.store.place, name, shard)
        samples = self.store.shard_samples(shard)
        self._require_images(samples)
        seconds = dict.fromkeys(STAGES, 0.0)
        batches = dict.fromkeys(teachers, self.limits.batch_size)
        made_from = self._made_from(shard, teachers)
        # an image that another teacher has seen is known by its digest, whatever size was planned
        poisoned = poisoned or {}
        jobs = [
            partial(self._prepare, sample, wanted, replace or index in made_from)
            for index, sample in enumerate(samples)
            for wanted in [[name for name in teachers if index not in poisoned.get(name, {})]]
        ]
        while True:
            outputs = {n: _Output(self.records[n], self.store.rows_per_shard, batches[n]) for n in teachers}
            ahead = _Ahead(self._decoding, jobs, 2 * self.limits.batch_size)
            try:
                with self._device:
                    self._forward(samples, ahead, outputs, made_from, poisoned, progress, seconds)
                break
            except _OutOfMemoryError as error:
                batches[error.teacher] = self._smaller(error)
            finally:
                ahead.close()
        if any(row.reason in _GONE for output in outputs.values() for row in output.rows):
            self._require_images(samples)  # else a folder that is unmounted meanwhile would make all of them failures
        receipts = {}
        for name in teachers:
            output = outputs.pop(name)
            if replace:
                keep_features(self.store, output.record, shard, output.stored, output.rows, output.statistics)
            how = self.execution.model_copy(update={"batch_size": output.batch_size})
            receipts[name] = self.store.commit_shard(
                output.record,
                shard,
                output.stored,
                output.rows,
                output.statistics,
                how,
                replace=replace,
                timings=seconds,
            )
        seconds["wall"] = time.perf_counter() - started
        if timings is not None:
            timings.update(seconds)
        self._log(shard, receipts, seconds)
        return receipts

    def _require_images(self, samples: Sequence[SampleRow]) -> None:
        """Raise CorpusError where the image folder is gone, or is as empty as where something was to be mounted."""
        try:
            with os.scandir(self.root) as entries:
                there = any(True for _ in entries) or all(sample.size < 0 for sample in samples)
        except OSError:
            there = False
        if not there:
            raise CorpusError(
                f"{self.root}: the image folder is not there, or empty, on {socket.gethostname()}",
                "Mount it under the same path on every machine of the job, then run the same command again.",
            )

    def probe(self, shard: int, teacher: str, index: int) -> None:
        """Take one row of a shard as far as its feature, and drop it: shows whether the process survives that."""
        sample = self.store.shard_samples(shard)[index]
        row = self._prepare(sample, [teacher], mended=True)
        if row.failures:
            return
        output = _Output(self.records[teacher], self.store.rows_per_shard, 1)
        output.batch.append((index, sample, row))
        with self._device:
            self._encode_batch(teacher, output, dict.fromkeys(STAGES, 0.0))

    def _forward(
        self,
        samples: Sequence[SampleRow],
        ahead: _Ahead,
        outputs: Mapping[str, _Output],
        made_from: Mapping[int, tuple[str, str]],
        poisoned: Mapping[str, Mapping[int, str]],
        progress: Progress,
        seconds: dict[str, float],
    ) -> None:
        """Bring every row of a shard into its outputs, in row order."""
        settled = dict.fromkeys(outputs, 0)

        def settle(name: str, rows: int) -> None:
            settled[name] += rows
            progress(name, settled[name])

        def flush(name: str) -> None:
            rows = len(outputs[name].batch)
            self._encode_batch(name, outputs[name], seconds)
            settle(name, rows)

        for index, sample in enumerate(samples):
            asked = time.perf_counter()
            row = ahead.take()
            seconds["wait"] += time.perf_counter() - asked
            other, digest = made_from.get(index, ("", row.sha256))
            if row.sha256 not in (None, digest):
                changed = ImageError("changed", f"it is not the image that the features of {other} were made from")
                row.failures = dict.fromkeys(outputs, changed)
            for stage, spent in row.seconds.items():
                seconds[stage] += spent
            for name, output in outputs.items():
                reason = poisoned.get(name, {}).get(index)
                if reason is not None:
                    # without digest and size, which another teacher may know: the receipt is that of this teacher alone
                    output.rows[index] = RowReceipt(status="failed", reason=reason, detail=CRASHES[reason])
                    settle(name, 1)
                    continue
                if name in row.failures:
                    output.rows[index] = row.receipt(sample, row.failures[name])
                    settle(name, 1)
                    continue
                output.batch.append((index, sample, row))
                if len(output.batch) == output.batch_size:
                    flush(name)
        for name, output in outputs.items():
            if output.batch:
                flush(name)

    def _smaller(self, error: _OutOfMemoryError) -> int:
        """Return the batch size to go on with; raises TeacherError where there is none."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if error.images == 1:
            raise TeacherError(
                f"{error.teacher}: not even one image at a time fits the device's memory",
                "Free memory on the device, use fewer workers on it, or a smaller teacher.",
            ) from error
        return -(-error.images // 2)

    def _made_from(self, shard: int, teachers: Sequence[str]) -> dict[int, tuple[str, str]]:
        """Which image, by digest, the teachers that are done already saw in each row: one row is one image."""
        found: dict[int, tuple[str, str]] = {}
        for name in self.store.teachers():
            receipt = None if name in teachers else self.store.receipt(name, shard)
            for index, row in enumerate(receipt.rows if receipt else ()):
                if row.status == "ok" and row.sha256 is not None:
                    found[index] = (name, row.sha256)
        return found

    def _prepare(self, sample: SampleRow, teachers: Sequence[str], mended: bool) -> _Row:
        row = _Row()
        if not teachers:
            return row
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

    def _encode_batch(self, name: str, output: _Output, seconds: dict[str, float]) -> None:
        pixels_bchw = torch.from_numpy(np.stack([row.pixels.pop(name) for _, _, row in output.batch]))
        # A row that has pixels was read, so it has a digest too.
        digests = [row.sha256 for _, _, row in output.batch if row.sha256 is not None]
        started = time.perf_counter()
        try:
            encoded = self.teachers[name].encode_images(pixels_bchw, digests)
            features = encoded.cpu().numpy()  # as computed, for the checks and the statistics
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _OutOfMemoryError(name, output.batch_size) from error
        except RuntimeError as error:
            if _HOST_MEMORY not in str(error):
                raise
            raise _OutOfMemoryError(name, output.batch_size) from error
        computed = time.perf_counter()
        seconds["forward"] += computed - started
        expected = (len(output.batch), *output.record.fingerprint.shape)
        if features.shape != expected or features.dtype != np.float32:
            raise TeacherError(
                f"{name}: the teacher returned {features.dtype} {features.shape}, its record says float32 {expected}",
                "This is a defect of the teacher's code.",
            )
        basis, on_device = self._basis(name, encoded.device)
        precision, centred = output.record.precision, output.record.centred
        stored = quantise(encoded, precision, on_device, centred=centred)
        good = []
        for place, (index, sample, row) in enumerate(output.batch):
            try:
                require_storable(features[place], precision, centred=centred, name=sample.key, basis=basis)
            except ImageError as error:
                output.rows[index] = row.receipt(sample, error)
                continue
            output.stored[index] = stored[place]
            output.rows[index] = row.receipt(sample, None)
            good.append(features[place])
        if good:
            output.statistics.update(np.stack(good))
        output.batch.clear()
        seconds["encode"] += time.perf_counter() - computed

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
            "batch_size": {name: receipt.execution.batch_size for name, receipt in receipts.items()},
            "seconds": {stage: round(spent, 4) for stage, spent in seconds.items()},
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "finished": time.time(),
        }
        self.store.place.append_log(LOG, json.dumps(line))


def _detail(sample: SampleRow, error: ImageError) -> str:
    """Return the problem without what differs between places: the name in front, addresses in memory."""
    text = error.problem.removeprefix(f"{sample.key}: ")
    text = re.sub(r" at 0x[0-9a-f]+", "", text).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + "…"


class _Ahead:
    """Rows in order, prepared by threads before they are asked for, at most `count` of them at a time."""

    def __init__(self, pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], _Row]], count: int) -> None:
        self._pool = pool
        self._jobs = iter(jobs)
        self._waiting: deque[Future[_Row]] = deque(pool.submit(job) for job in islice(self._jobs, count))

    def take(self) -> _Row:
        """Wait for the next row."""
        self._waiting.extend(self._pool.submit(job) for job in islice(self._jobs, 1))
        return self._waiting.popleft().result()

    def close(self) -> None:
        """Drop what was not asked for."""
        for future in self._waiting:
            future.cancel()
