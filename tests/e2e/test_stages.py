"""Stages: what trains, what the losses are, one rank or several, and out again as a plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from run_support import losses, newest, prepared, require_gradients, run, whole_gradients
from safetensors.torch import load_file
from trainer_support import (
    end_all,
    make_student,
    metrics,
    saved,
    start_ranks,
)
from transformers import AutoModelForImageTextToText, CLIPVisionModel
from typer.testing import CliRunner

import olatrain.step as step_module
from olaschema.errors import ConfigError
from olatrain.cli import app
from olatrain.compose import load_processor
from olatrain.export import export
from olatrain.resume import resume
from olatrain.setup import Run
from olatrain.step import run_batch
from olatrain.tokens import TaskTokens
from olatrain.tower import on_grid
from olatrain.train import make_optimiser

LLM = ["projector", "predictors", "task_tokens", "llm"]


def moved(values: dict[str, Any]) -> set[str]:
    """Names of the saved tensors that training changed."""
    before = {name: value.clone() for name, value in prepared(values).learner.state().items()}
    after = saved(newest(values["out"]), "trainable")
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_split_language_model_trains_as_a_whole_one(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """One rank whose batches pass as a whole; two, then more that go on where two stopped, sample by sample.

    The gradients of the first step are those of the whole batch. The last batch leaves all ranks but one without a
    sample, which must pass through the split model all the same.
    """
    values = chosen(steps=None, epochs=1, train=LLM, lora=lora, lrs={"llm": 2e-3})
    run(values)
    split = values | {"out": str(tmp_path / "split"), "micro_batch": 1}
    gradients = tmp_path / "gradients.safetensors"
    end_all(start_ranks(split | {"nproc": 2, "stop_after": 2}, world=2, gradients=gradients))
    require_gradients(load_file(gradients), whole_gradients(values))
    world = 4 if lora is None else 2
    end_all(start_ranks(split | {"nproc": world}, world=world))
    assert losses(split["out"]) == pytest.approx(losses(values["out"]), rel=1e-5)
    norms, expected = ([line["grad_norm"] for line in metrics(Path(v["out"]))] for v in (split, values))
    assert norms == pytest.approx(expected, rel=1e-3)
    one, many = (saved(newest(v["out"]), "trainable") for v in (values, split))
    assert one.keys() == many.keys()
    assert any(name.startswith("llm.") for name in moved(values))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_gradients_are_those_of_the_large_batch_while_everything_trains(
    chosen: Callable[..., dict[str, Any]], micro: int
) -> None:
    """Contrastive term included: with the negatives of its own micro-batch, each gradient would be another one."""
    values = chosen(batch=8, train=[*LLM, "vision"], contrastive=3.0, text=0.3)
    whole = whole_gradients(values)
    assert {name.partition(".")[0] for name in whole} >= {"projector", "latents", "predictors", "llm", "vision"}
    ready = prepared(values | {"micro_batch": micro})
    batch = ready.collate([ready.stream[p] for p in range(8)])
    assert len(batch.micro) == -(-8 // micro)  # type: ignore[union-attr]
    run_batch(ready.learner, batch, ready.ranks, ready.means, bf16=False)  # type: ignore[arg-type]
    found = {name: p.grad for name, p in ready.learner.trainable().items() if p.grad is not None}
    require_gradients(found, whole)
    # what that would leave: the sum over micro-batches that each see their own targets alone
    ready.learner.zero_grad()
    for first in range(0, 8, micro):
        alone = ready.collate([ready.stream[p] for p in range(first, min(first + micro, 8))])
        run_batch(ready.learner, alone, ready.ranks, ready.means, bf16=False)  # type: ignore[arg-type]
    name = "llm.model.language_model.layers.0.self_attn.q_proj.weight"
    wrong = ready.learner.trainable()[name].grad
    assert wrong is not None
    cosine = torch.nn.functional.cosine_similarity(wrong.flatten(), whole[name].flatten(), dim=0)
    assert cosine < 0.99


def test_what_trains_is_exported_and_the_next_stage_starts_from_it(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """LoRA with embedding losses, exported; then next tokens alone from there, without a store or predictors."""
    values = chosen(steps=3, train=LLM, lora={"rank": 2, "alpha": 8, "targets": ["q_proj", "down_proj"]}, lr=0.05)
    said = run(values)
    assert "trains: projector 544 at 0.05, task_tokens 96 at 0.05, predictors" in said
    assert "llm (LoRA) 432 at 0.05" in said  # 3 blocks of (16 + 16) · 2 and (24 + 16) · 2
    export(Path(values["out"]), tmp_path / "first")
    lora = trained(values)
    batch = lora.collate([lora.stream[0]])
    (micro,) = batch.micro  # type: ignore[union-attr]
    with torch.no_grad():
        ours = lora.learner.student(micro.inputs).logits
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "first")(**micro.inputs).logits
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)
    start = prepared(values)
    with torch.no_grad():
        assert (start.learner.student(micro.inputs).logits - ours).abs().max() > 0.01

    tune = {name: values[name] for name in ("conversations", "images", "device", "workers", "trackers")}
    tune |= {"student": str(tmp_path / "first"), "out": str(tmp_path / "tuned"), "preset": "finetune", "steps": 2}
    tune |= {"batch": 4, "precision": "float32", "lr": 0.01}
    said = run(tune)
    assert "trains: projector 544 at 0.01, llm " in said
    changed = moved(tune)
    assert {name.split(".")[0] for name in changed} == {"projector", "llm"}
    export(tmp_path / "tuned", tmp_path / "second")
    tuned = trained(tune)
    with torch.no_grad():
        ours = tuned.learner.student(micro.inputs).logits
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "second")(**micro.inputs).logits
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)
    for teacher, latents in tuned.learner.student.latents.items():
        assert torch.equal(latents, lora.learner.student.latents[teacher])
    with pytest.raises(ConfigError, match="is the folder of a run") as caught:
        run(tune | {"student": str(tmp_path / "tuned"), "out": str(tmp_path / "third")})
    assert "olatrain export" in caught.value.remedy


def test_every_vector_stays_frozen_in_the_sequence_of_the_next_stage(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Exported as `emb`, tuned, exported: the rows hold the pretrained latents, with tied embeddings too."""
    values = chosen(steps=2, student=str(make_student(tmp_path / "tied", tied=True)))
    run(values)
    arguments = ["export", values["out"], "--out", str(tmp_path / "first"), "--task-format", "emb"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    tokens = TaskTokens.load(tmp_path / "first")
    assert {teacher: len(ids) for teacher, ids in tokens.ids.items()} == {"gen": 2, "depth": 4}
    tune = {name: values[name] for name in ("conversations", "images", "device", "workers", "trackers")}
    tune |= {"student": str(tmp_path / "first"), "out": str(tmp_path / "tuned"), "preset": "finetune", "steps": 2}
    run(tune | {"batch": 4, "precision": "float32", "lr": 0.01})
    latents = saved(newest(values["out"]), "trainable")
    assert {name.split(".")[0] for name in moved(tune | {"batch": 4, "precision": "float32"})} == {"projector", "llm"}
    export(tmp_path / "tuned", tmp_path / "second")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "second")
    rows = model.get_input_embeddings().weight
    output = model.get_output_embeddings().weight
    for teacher, ids in tokens.ids.items():
        assert torch.equal(rows[list(ids)], latents[f"latents.{teacher}"])
        assert (rows[list(ids)] - output[list(ids)]).abs().max() > 0.1
    processor = load_processor(tmp_path / "second")
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nso?"}])
    placed = processor(images=Image.new("RGB", (30, 20)), text=text, return_tensors="pt")
    ids = placed["input_ids"][0].tolist()
    start = ids.index(tokens.image_id)
    assert ids[start : start + 4 + 6] == [tokens.image_id] * 4 + list(tokens.flat)
    found = model.generate(**placed, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert not {*found.tolist()} & {*tokens.flat}
    with pytest.raises(ConfigError, match="has seen every vector"):
        export(tmp_path / "tuned", tmp_path / "third", task_format="expand_emb")
    none = chosen(steps=1, student=str(make_student(tmp_path / "none", task_tokens=0)), out=str(tmp_path / "bare"))
    run(none)
    with pytest.raises(ConfigError, match="no task tokens to spread"):
        export(tmp_path / "bare", tmp_path / "fourth", task_format="emb")


def trained(values: dict[str, Any]) -> Run:
    """The trained model as training itself restores it."""
    ready = prepared(values)
    resume(ready, make_optimiser(ready))
    return ready


def test_each_group_has_its_learning_rate_and_weight_decay(chosen: Callable[..., dict[str, Any]]) -> None:
    """AdamW's first step moves every number by its learning rate: the moments cancel."""
    groups = ["projector", "predictors", "task_tokens", "llm", "vision"]
    rates = {"projector": 0.01, "predictors": 0.002, "task_tokens": 0.03, "llm": 0.0004, "vision": 0.005}
    values = chosen(steps=1, train=groups, lr=9.0, lrs=rates, weight_decays={"vision": 0.5}, warmup=0.0)
    before = {name: value.clone() for name, value in prepared(values).learner.state().items()}
    run(values)
    parts = {"projector": "projector", "latents": "task_tokens", "predictors": "predictors"}
    steps = dict.fromkeys(groups, 0.0)
    for name, value in saved(newest(values["out"]), "trainable").items():
        group = parts.get(name.split(".")[0], name.split(".")[0])
        decayed = before[name] * (1 - 0.005 * 0.5) if group == "vision" else before[name]
        steps[group] = max(steps[group], (value - decayed).abs().max().item())
    assert steps == pytest.approx(rates, rel=0.01)


def test_recomputing_blocks_changes_nothing(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Not the taps, the losses or the weights, to the bit; and blocks are recomputed."""
    values = chosen(steps=2, train=LLM)
    run(values)
    again = values | {"out": str(tmp_path / "again"), "gradient_checkpointing": True}
    ready = prepared(again)
    calls = []
    norm = ready.learner.student.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[operator]
    batch = ready.collate([ready.stream[p] for p in range(4)])
    run_batch(ready.learner, batch, ready.ranks, ready.means, bf16=False)  # type: ignore[arg-type]
    assert len(calls) == 2
    run(again)
    assert losses(again["out"]) == losses(values["out"])
    one, other = (saved(newest(v["out"]), "trainable") for v in (values, again))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_weights_regressions_and_schedules_reach_the_loss(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The logged total is the sum of the logged parts, weighted here by hand."""
    teachers = {
        "depth": {"layers": [2], "weight": 0.7, "regression": "cosine", "contrastive": 0.0},
        "gen": {"layers": [1, 3], "weight": 0.4, "layer_weights": {3: 0.25}, "regression": "mse"},
    }
    run(chosen(steps=3, teachers=teachers, text=0.5, embedding_schedule="linear", embedding_end=0.2))
    for line, factor in zip(metrics(tmp_path / "out"), (1.0, 0.6, 0.2), strict=True):
        found = line["teachers"]
        depth, gen = found["depth"]["layers"]["2"], found["gen"]["layers"]
        parts = 0.7 * depth["loss"] + 0.4 * gen["1"]["loss"] + 0.4 * 0.25 * gen["3"]["loss"]
        assert line["loss"] == pytest.approx(0.5 * line["text"] + factor * parts, rel=1e-5)
        assert 0 < depth["loss"] <= 2  # one less a cosine
        assert gen["1"]["loss"] > gen["1"]["smooth_l1"] + 0.3 * gen["1"]["contrastive"]  # squares are larger


def test_the_mean_control_trains_towards_the_mean_map(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(chosen(steps=2, target_control="mean"))
    for line in metrics(tmp_path / "out"):
        for found in line["teachers"].values():
            assert found["mean_map"]["smooth_l1"] == pytest.approx(0.0, abs=1e-7)
            assert found["mean_map"]["cosine"] == pytest.approx(1.0)
            assert all(layer["smooth_l1"] > 0.01 for layer in found["layers"].values())


@pytest.mark.parametrize("vision", [False, True])
def test_the_self_control_learns_the_students_own_initial_tower(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path, vision: bool
) -> None:
    """Targets are the CLIP tower's states, taken here from the tower's own folder; they train, and stay as they were.

    The map of the tower is 2 × 2 as the teacher's; the vector is its mean. Where the tower trains, targets do not.
    """
    groups = ["projector", "predictors", "task_tokens", *(["vision"] if vision else [])]
    values = chosen(steps=30, target_control="self", train=groups, micro_batch=3, checkpoint_every=30, lr=0.03)
    values |= {"contrastive": 0.0, "warmup": 0.0}
    run(values)
    lines = metrics(tmp_path / "out")
    for teacher, layer in (("depth", "2"), ("gen", "1")):
        curve = [line["teachers"][teacher]["layers"][layer]["smooth_l1"] for line in lines]
        assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    ready = trained(values)
    batch = ready.collate([ready.stream[p] for p in range(6)])
    tower = CLIPVisionModel.from_pretrained(Path(values["student"]).parent / "vision")
    pixels = torch.cat([m.inputs["pixel_values"] for m in batch.micro])  # type: ignore[union-attr]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    valid = batch.features["depth"].valid  # type: ignore[union-attr]
    if vision:
        moving = ready.learner.student.model.model.vision_tower  # type: ignore[union-attr]
        now = moving(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert (now - states).abs().max() > 1e-2
    found = targets_of(ready, batch)
    torch.testing.assert_close(found["depth"][valid], states.reshape(-1, 2, 2, 16)[valid])
    torch.testing.assert_close(found["gen"][valid], states.mean(dim=1)[valid])
    images = torch.cat([
        one.inputs["pixel_values"]
        for n in range(9)
        for p in range(len(ready.stream))
        if (sample := ready.stream[p]).keys[:1] == (f"{n:02d}.png",)  # type: ignore[union-attr]
        for one in sample.shown  # type: ignore[union-attr]
    ])  # fmt: skip
    images = images.unique(dim=0)
    assert len(images) == 9
    with torch.no_grad():
        mean = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:].mean(dim=0)
    torch.testing.assert_close(ready.means["depth"], mean.reshape(2, 2, 16), rtol=1e-4, atol=1e-5)


def targets_of(ready: Run, batch: Any) -> dict[str, torch.Tensor]:
    """What a step compares predictions with, caught on its way into the loss."""
    seen: dict[str, list[torch.Tensor]] = {}
    whole = step_module.compute_losses

    def catching(*args: Any, targets: Any, **kwargs: Any) -> Any:
        for name, target in targets.items():
            seen.setdefault(name, []).append(target.values[target.own])
        return whole(*args, targets=targets, **kwargs)

    step_module.compute_losses = catching
    try:
        run_batch(ready.learner, batch, ready.ranks, ready.means, bf16=False)
    finally:
        step_module.compute_losses = whole
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_a_tower_is_averaged_onto_a_coarser_grid_and_interpolated_onto_a_finer_one() -> None:
    maps = torch.arange(2 * 4 * 4 * 3, dtype=torch.float32).reshape(2, 4, 4, 3)
    coarse = on_grid(maps, (2, 2, 7))
    for y in range(2):
        for x in range(2):
            patch = maps[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean(dim=(1, 2))
            torch.testing.assert_close(coarse[:, y, x], patch)
    fine = on_grid(maps, (8, 8, 7))
    # half-pixel centres: the second of eight lies at 0.25 of four
    torch.testing.assert_close(fine[:, 0, 1], 0.75 * maps[:, 0, 0] + 0.25 * maps[:, 0, 1])
    torch.testing.assert_close(on_grid(maps, (7,)), maps.mean(dim=(1, 2)))


def test_tokens_without_a_loss_and_a_student_without_tokens(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Control arms: the tokens are read and trained by the text alone; without tokens there is nothing to train."""
    silent = {"depth": {"layers": [2], "weight": 0.0}, "gen": {"layers": [1], "weight": 0.0}}
    values = chosen(steps=2, teachers=silent)
    run(values)
    assert {name.split(".")[0] for name in moved(values)} == {"projector", "latents"}
    for line in metrics(tmp_path / "out"):
        assert line["loss"] == pytest.approx(line["text"], rel=1e-6)
    none = str(make_student(tmp_path_factory.mktemp("none"), task_tokens=0))
    values = chosen(steps=2, student=none, out=str(tmp_path / "none"))
    run(values)
    assert {name.split(".")[0] for name in moved(values)} == {"projector", "predictors"}


def test_negatives_of_its_own_rank_are_another_loss(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """As if the gather were missing: the text's loss is that of one rank, the contrastive one is smaller."""
    values = chosen(steps=1, negatives="rank")
    run(values)
    two = values | {"out": str(tmp_path / "two"), "nproc": 2}
    end_all(start_ranks(two, world=2))
    (one,), (other,) = metrics(tmp_path / "out"), metrics(tmp_path / "two")
    assert other["text"] == pytest.approx(one["text"], rel=1e-5)
    for layer in ("1", "3"):
        ours, theirs = (line["teachers"]["gen"]["layers"][layer] for line in (other, one))
        assert ours["smooth_l1"] == pytest.approx(theirs["smooth_l1"], rel=1e-5)
        assert ours["contrastive"] < 0.9 * theirs["contrastive"]
