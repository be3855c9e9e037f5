"""Training on stored features is training with the teachers in the loop: same loss, same gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_support import GOLDEN
from trainer_support import Corpus, conversation, make_images, make_student, settings, write_json

from olapipe.corpus import list_corpus
from olapipe.encode import Limits, ShardEncoder, execution
from olapipe.load import teacher_record
from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings
from olaschema.config import load_config
from olaschema.images import decode_image
from olaschema.store import FeatureStore
from olatrain.config import TrainConfig
from olatrain.order import PositionSampler
from olatrain.parallel import open_ranks
from olatrain.setup import Run, set_up
from olatrain.step import run_batch
from olatrain.stream import Batch, Features, make_loader

TEACHERS = ("gen", "depth", "seg")
LAYERS = {"gen": [1, 3], "depth": [2], "seg": [3]}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Features of the three golden teachers as a worker extracts them, as float16; without Ray around it."""
    root = tmp_path_factory.mktemp("cached")
    keys = make_images(root / "images", 5)
    store = FeatureStore.create(root / "store", rows_per_shard=4)
    store.add_generation(entry.sample() for entry in list_corpus(root / "images", None).entries)
    teachers = {name: registry.load(name, TeacherSettings(checkpoint=str(GOLDEN / name))) for name in TEACHERS}
    records = {name: teacher_record(teacher, "float16") for name, teacher in teachers.items()}
    for record in records.values():
        store.put_teacher(record)
    limits = Limits(batch_size=2, max_pixels=1_000_000, decoders=1)
    encoder = ShardEncoder(store, root / "images", teachers, records, limits, execution("cpu", 2))
    for shard in range(store.shard_count()):
        encoder.encode(shard, TEACHERS, lambda _teacher, _rows: None)
    entries = [conversation(key, f"picture {place}") for place, key in enumerate(keys)] + [conversation(None, "text")]
    file = write_json(root / "conversations.json", entries)
    return Corpus(root, root / "images", file, root / "store", keys)


def _step(run: Run, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    run.learner.zero_grad()
    totals = run_batch(run.learner, batch, run.ranks, run.means, bf16=False)
    gradients = {
        name: parameter.grad.numpy().copy()
        for name, parameter in run.learner.trainable().items()
        if parameter.grad is not None
    }
    return totals["loss"], gradients


def _in_the_loop(run: Run, batch: Batch, corpus: Corpus) -> dict[str, torch.Tensor]:
    """What the teachers say of the batch's images, computed here and now in float32, (I, *shape)."""
    keys = [corpus.keys[row] for row in batch.rows.tolist()]
    features = {}
    for name in TEACHERS:
        teacher = registry.load(name, TeacherSettings(checkpoint=str(GOLDEN / name)))
        images = [decode_image((corpus.images / key).read_bytes(), name=key) for key in keys]
        pixels = np.stack([teacher.preprocessor(image) for image in images])
        features[name] = teacher.encode(torch.from_numpy(pixels)).cpu()
    return features


def _with(batch: Batch, features: dict[str, torch.Tensor]) -> Batch:
    valid = torch.ones(len(batch.rows), dtype=torch.bool)
    return replace(batch, features={name: Features(value, valid) for name, value in features.items()})


def test_cached_and_online_targets_give_the_same_step(extracted: Corpus, tmp_path: Path) -> None:
    student = make_student(tmp_path, teachers=TEACHERS)
    chosen = settings(
        extracted, student, tmp_path / "run", teachers={n: {"layers": layers} for n, layers in LAYERS.items()}, batch=6
    )
    config = load_config(TrainConfig, flags=chosen)
    with open_ranks("cpu", nproc=1) as ranks:
        run = set_up(config, ranks)
        sampler = PositionSampler(start=0, end=6, batch=6, rank=0, world=1)
        (batch,) = make_loader(run.stream, sampler, run.collate, workers=0, pin=False)
        assert isinstance(batch, Batch)
        assert len(batch.rows) == 5
        online = _in_the_loop(run, batch, extracted)

        cached_loss, cached = _step(run, batch)
        online_loss, exact = _step(run, _with(batch, online))
        rounded_loss, rounded = _step(run, _with(batch, {n: v.half() for n, v in online.items()}))

        other = _with(batch, {n: v.roll(1, dims=0) for n, v in online.items()})
        other_loss, _ = _step(run, other)

    # float16 rounds each feature by at most 2^-11 of it; the loss moves by no more than the targets do
    assert cached_loss == pytest.approx(online_loss, rel=2.0**-11)
    assert cached.keys() == exact.keys()
    assert any(np.abs(gradient).max() > 0 for gradient in exact.values())
    for name, gradient in exact.items():
        error = np.linalg.norm(cached[name] - gradient)
        if gradient.ndim == 0:
            # a temperature's gradient is a difference of cosines times exp(2): it may cancel, so its error is absolute
            assert error < 2 * 0.5 * 0.3 * np.exp(2.0) * 2.0**-11, name
        else:
            assert error < 2e-3 * np.linalg.norm(gradient), name
    # the teachers' own features, rounded in the loop, are the stored ones up to the batch they were computed in
    assert rounded_loss == pytest.approx(cached_loss, rel=1e-6)
    for name, gradient in rounded.items():
        np.testing.assert_allclose(cached[name], gradient, rtol=1e-3, atol=1e-6)
    # the test can tell: features of the wrong images give another loss
    assert abs(other_loss - online_loss) > 10 * abs(cached_loss - online_loss)
