from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olatrain.card import _how
from olatrain.config import TrainConfig
from olatrain.order import epoch_order, group_by_modality
from olatrain.train import embedding_factor

TEACHERS = {"depth": {"layers": [2, 3]}}


def build(**changes: Any) -> TrainConfig:
    paths = {name: f"/nowhere/{name}" for name in ("student", "conversations", "images", "out")}
    given = {**paths, "store": "/nowhere/store", "teachers": TEACHERS, **changes}
    return load_config(TrainConfig, flags={name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize(
    ("preset", "train", "lr", "batch", "order"),
    [
        ("pretrain", ("projector", "predictors", "task_tokens"), 1e-3, 256, "mixed"),
        ("vpt", ("projector", "llm"), 2e-5, 128, "mixed"),
        ("finetune", ("projector", "llm"), 2e-5, 128, "grouped"),
    ],
)
def test_presets_are_the_published_settings(
    preset: str, train: tuple[str, ...], lr: float, batch: int, order: str
) -> None:
    config = build(preset=preset)
    assert (config.train, config.lr, config.batch, config.order) == (train, lr, batch, order)
    assert (config.epochs, config.warmup, config.weight_decay, config.precision) == (1, 0.03, 0.0, "bf16")
    assert config.max_length == 4096


def test_what_is_given_wins_over_the_preset_and_the_resolved_settings_stay() -> None:
    config = build(preset="finetune", lr=1e-4, steps=9, train=["llm"])
    assert (config.lr, config.steps, config.epochs, config.train) == (1e-4, 9, None, ("llm",))
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config


def test_a_stage_of_text_alone_needs_no_store() -> None:
    config = build(preset="finetune", store=None, teachers=None)
    assert config.teachers == {}


ONLY = {"layers": [2], "regression": "none"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": None}, "teachers are named, but the setting store is missing"),
        ({"teachers": None, "preset": "vpt"}, "a store is given, but teachers names none"),
        ({"preset": "sft"}, "preset"),
        ({"text": 0.0, "teachers": {"depth": {"layers": [2], "weight": 0.0}}}, "there is no loss"),
        ({"text": 0.0, "teachers": {"depth": {"layers": [2], "layer_weights": {2: 0.0}}}}, "there is no loss"),
        ({"teachers": {"depth": {"layers": [2], "layer_weights": {3: 1.0}}}}, r"layer_weights name layers \[3\]"),
        ({"teachers": {"depth": {"layers": [2], "regression": "l1"}}}, "regression"),
        ({"lrs": {"llm": 1e-5}}, "lrs names llm, which train does not"),
        ({"weight_decays": {"projector": -1.0}}, "weight_decays are 0 or more"),
        ({"lora": {"rank": 4}}, "lora is given, but train does not name llm"),
        ({"train": ["llm", "llm"]}, "names a group twice"),
        ({"train": ["decoder"]}, "train"),
        ({"teachers": None, "store": None, "target_control": "mean"}, "no teacher is named"),
        ({"target_control": "self", "normalise": "channel"}, "statistics and probes are not of a tower's features"),
        ({"negatives": "host"}, "negatives"),
        ({"embedding_end": 0.5}, "embedding_end is given, but embedding_schedule is constant"),
        ({"teachers": {"depth": ONLY}, "contrastive": 0}, "depth has no regression and contrastive is 0"),
        ({"teachers": {"depth": ONLY | {"contrastive": 0}}}, "depth has no regression and contrastive is 0"),
        ({"teachers": {"depth": ONLY}, "batch": 1}, "a batch of one image has no negatives"),
        ({"teachers": {"depth": ONLY}, "batch": 2, "nproc": 2, "negatives": "rank"}, "no negatives"),
        ({"probe": {}, "train": ["predictors"]}, "leave text at 0"),
        ({"probe": {}, "train": ["predictors"], "text": 0, "compat": "ola"}, "leave it out of a probe"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_embedding_weights_fall_as_they_are_told() -> None:
    def factors(**changes: Any) -> list[float]:
        return [embedding_factor(build(**changes), step, 5) for step in range(5)]

    assert factors() == [1.0] * 5
    assert factors(embedding_schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    half = 0.5**0.5 / 2
    wave = [1.0, 0.5 + half, 0.5, 0.5 - half, 0.0]
    assert factors(embedding_schedule="cosine") == pytest.approx(wave)
    assert factors(embedding_schedule="cosine", embedding_end=0.2) == pytest.approx([0.2 + 0.8 * w for w in wave])


@pytest.mark.parametrize(("images", "texts", "batch"), [(40, 17, 8), (3, 30, 4), (25, 0, 4), (0, 9, 4), (5, 5, 64)])
def test_grouped_batches_hold_one_modality(images: int, texts: int, batch: int) -> None:
    """But for those at an epoch's ends and one more; every sample once, the order within each modality kept."""
    total = images + texts
    loose = np.arange(total) % total >= images
    shards = np.where(loose, -1, np.arange(total) // 5)
    orders = []
    for epoch in range(4):
        plain = epoch_order(shards, seed=3, epoch=epoch, window=2)
        grouped = group_by_modality(plain, loose, first=epoch * total, batch=batch)
        assert sorted(grouped.tolist()) == list(range(total))
        for kind in (True, False):
            assert grouped[loose[grouped] == kind].tolist() == plain[loose[plain] == kind].tolist()
        orders.append(grouped)
    run = loose[np.concatenate(orders)]
    ends = {epoch * total // batch for epoch in range(5)}
    mixed: dict[int, int] = {}
    for number in range(-(-len(run) // batch)):
        if len(set(run[number * batch : (number + 1) * batch].tolist())) == 2 and number not in ends:
            epoch = number * batch // total
            mixed[epoch] = mixed.get(epoch, 0) + 1
    assert all(count <= 1 for count in mixed.values())
    if (images, texts, batch) == (40, 17, 8):
        assert run.reshape(-1)[: 7 * 8].reshape(7, 8).all(axis=1).sum() == 2


def test_the_card_of_a_control_arm_claims_no_features_of_the_images() -> None:
    said = {control: _how(build(target_control=control)) for control in ("none", "shuffle", "mean", "self")}
    assert "supervised with features of depth" in said["none"]
    assert "supervised with other images' features of depth" in said["shuffle"]
    assert "supervised with the mean features of depth" in said["mean"]
    assert "supervised with its own initial vision tower's features in place of those of depth" in said["self"]
    assert all("a control arm" in words for control, words in said.items() if control != "none")
