"""The actor of a job: loads the teachers once, then encodes one shard after another. Knows no Ray."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from olapipe.config import ExtractConfig
from olapipe.tally import ShardResult, ShardTask
from olaschema.manifest import TeacherRecord
from olaschema.store import FeatureStore


class ShardWorker:
    """Holds the teachers. `encode` may run in two threads at a time, `progress` beside them."""

    def __init__(self, config: ExtractConfig, root: Path, device: str) -> None:
        # cuBLAS picks its workspace from this when it is first used; without it sums may differ from run to run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._config = config
        self._root = root
        self._device = device
        self._teachers: dict[str, Any] = {}
        self._marks: dict[str, str] = {}
        self._encoder: Any = None
        self._making = threading.Lock()
        self._settled: dict[int, dict[str, int]] = {}

    def load(self) -> list[TeacherRecord]:
        """Load the teachers and describe them; raises TeacherError."""
        import torch

        from olapipe.load import load_teachers, teacher_record
        from olapipe.remembered import marks

        self._marks = marks(self._config)
        torch.set_num_threads(self._config.threads)
        self._teachers = load_teachers(self._config, self._device)
        # what `auto` chose differs by teacher and is settled where the store is made
        precision = "float32" if self._config.precision == "auto" else self._config.precision
        return [teacher_record(teacher, precision) for teacher in self._teachers.values()]

    def marks(self) -> dict[str, str]:
        """Return the marks of the loaded teachers, as `remembered.marks` does."""
        return self._marks

    def encode(self, out: str, task: ShardTask) -> ShardResult:
        """Encode and commit one shard."""
        encoder = self._ready(out)
        timings: dict[str, float] = {}
        settled = self._settled[task.shard] = {}
        try:
            receipts = encoder.encode(
                task.shard,
                task.teachers,
                settled.__setitem__,
                replace=task.replace,
                poisoned=task.poisoned,
                timings=timings,
            )
        finally:
            del self._settled[task.shard]
        result = ShardResult(
            ok={name: receipt.ok for name, receipt in receipts.items()},
            failed={name: receipt.failed for name, receipt in receipts.items()},
            batch_size={name: receipt.execution.batch_size for name, receipt in receipts.items()},
            seconds=timings,
        )
        self._metrics.shard(result)
        return result

    def probe(self, out: str, shard: int, teacher: str, index: int) -> None:
        """Take one image of a shard as far as its feature, and drop it; dies or raises if the image is to blame."""
        self._ready(out).probe(shard, teacher, index)

    def progress(self) -> dict[int, dict[str, int]]:
        """Return how many rows of the shards under way are settled, by shard and teacher."""
        return {shard: dict(settled) for shard, settled in list(self._settled.items())}

    def _ready(self, out: str) -> Any:
        with self._making:
            if self._encoder is None:
                self._encoder = self._make_encoder(out)
        return self._encoder

    def _make_encoder(self, out: str) -> Any:
        import warnings

        from olapipe.encode import Limits, ShardEncoder, execution
        from olapipe.metrics import WorkerMetrics

        # decoding switches warnings off and on again, which is not safe in several threads: here they stay off
        warnings.simplefilter("ignore")
        self._metrics = WorkerMetrics()
        store = FeatureStore.open(out)
        records = {name: store.teacher(name) for name in self._teachers}
        for name, record in records.items():
            record.fingerprint.require_equal(
                self._teachers[name].fingerprint,
                mine="in the store",
                theirs="of a worker",
                remedy="Every machine of the job must hold the same checkpoints under the same paths.",
            )
        limits = Limits(self._config.batch_size, self._config.max_pixels, self._config.decoders)
        how = execution(self._device, self._config.batch_size, compiled=self._config.compile)
        return ShardEncoder(store, self._root, self._teachers, records, limits, how)
