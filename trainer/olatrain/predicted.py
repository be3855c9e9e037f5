"""Predictions kept as small feature stores, one for each supervised layer, to look at beside the targets.

`olapipe preview STORE KEY --predictions RUN/predictions/step-00001000/layer-18` draws them; no teacher is loaded here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olaschema.manifest import ChannelStatistics, Execution, RowReceipt, SampleRow
from olaschema.precision import blank, encode
from olaschema.store import FeatureStore
from olatrain.folder import publish_folder
from olatrain.predictors import Standard
from olatrain.setup import Run
from olatrain.step import fed_features, in_step
from olatrain.stream import Batch, Sample

FOLDER = "predictions"


@torch.no_grad()
def keep_predictions(run: Run, step: int) -> Path | None:
    """Predict a handful of images, held out where there are any, always the same, and write what comes out.

    Every rank computes, rank 0 writes `RUN/predictions/step-NNNNNNNN/layer-NN`, each a store of that layer's teachers:
    float32, in the teacher's own units, under the teacher's fingerprint. Returns the folder; None where no image of
    the first samples can be shown.
    """
    if not run.config.teachers or run.learner.tower is not None:
        return None  # a tower's features are no teacher's, whatever the fingerprint would say
    samples = _handful(run)
    found = _predict(run, samples)
    if not samples:
        return None
    folder = run.config.out / FOLDER / f"step-{step:08d}"
    if not run.ranks.first:
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # of the same step, before a crash
    by_key: dict[str, tuple[int, int]] = {}
    for place, (sample, number, key) in enumerate(_images(samples)):
        by_key.setdefault(key, (sample.places[number], place))  # its first use: what is asked may colour predictions
    layers = sorted({layer for _, layer in found})
    with publish_folder(folder) as made:
        for layer in layers:
            store = FeatureStore.create(made / f"layer-{layer:02d}", rows_per_shard=len(by_key))
            store.add_generation(SampleRow(row=0, key=key, uri=key, size=-1) for key in by_key)
            for teacher, number in found:
                if number == layer:
                    _write(run, store, teacher, layer, step, found[teacher, layer], list(by_key.values()))
    return folder


def _handful(run: Run) -> list[Sample]:
    stream = run.heldout or run.stream
    samples: list[Sample] = []
    keys: set[str] = set()
    # a few more than wanted are tried: some may be text, or not readable
    for position in range(min(len(stream), 4 * run.config.predictions.images)):
        sample = stream[position]
        if isinstance(sample, Sample) and sample.keys and any(f for one in sample.features for f in one.values()):
            samples.append(sample)
            keys |= set(sample.keys)
        if len(keys) >= run.config.predictions.images:
            break
    return samples


def _images(samples: list[Sample]) -> list[tuple[Sample, int, str]]:
    return [(sample, number, key) for sample in samples for number, key in enumerate(sample.keys)]


def _predict(run: Run, samples: list[Sample]) -> dict[tuple[str, int], Tensor]:
    """Return each (teacher, layer)'s predictions (I, *shape) on the CPU, in the teacher's units."""
    learner, device = run.learner, run.ranks.device
    batch = run.collate(samples)
    if not isinstance(batch, Batch):
        raise batch.error
    parts: dict[tuple[str, int], list[Tensor]] = {}
    fed = fed_features(learner, batch, device)
    first = 0
    for micro in in_step(learner, batch.micro, run.ranks):
        inputs = {name: value.to(device) for name, value in micro.inputs.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.config.precision == "bf16"):
            given = {teacher: found.part(first, len(micro.items)) for teacher, found in fed.items()}
            output = learner.student(inputs, keep=torch.zeros(1, dtype=torch.int64, device=device), fed=given)
            predictions = learner.bank(output.taps, micro.items.to(device), learner.student.latents)
        first += len(micro.items)
        for (teacher, layer), values in predictions.items():
            standard = dict(learner.bank.standards.items()).get(teacher)
            values = standard.invert(values) if isinstance(standard, Standard) else values
            parts.setdefault((teacher, layer), []).append(values.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _write(
    run: Run,
    store: FeatureStore,
    teacher: str,
    layer: int,
    step: int,
    values: Tensor,
    rows: list[tuple[int, int]],
) -> None:
    exact = {"precision": "float32", "basis": None, "centred": False}
    record = run.teachers[teacher].model_copy(
        update=exact | {"source": f"predicted from layer {layer} at step {step}", "libraries": {}}
    )
    store.put_teacher(record)
    opened = (run.heldout or run.stream).data.open()
    stored = blank(len(rows), record.fingerprint.shape, "float32")
    receipts = []
    statistics = ChannelStatistics(record.fingerprint.channels)
    for place, (where, image) in enumerate(rows):
        feature = np.ascontiguousarray(values[image].numpy())
        stored[place] = encode(feature, "float32")
        statistics.update(feature[None])
        status = opened.status(teacher, where)
        seen = status.model_dump(include={"sha256", "width", "height"}) if status is not None else {}
        receipts.append(RowReceipt(status="ok", **seen))
    execution = Execution(
        device=run.ranks.device.type, torch=torch.__version__, batch_size=len(rows), threads=torch.get_num_threads()
    )
    store.commit_shard(record, 0, stored, receipts, statistics, execution)
