"""Every `e2e*` case under OLA_GOLDEN: numbers of the public OLA-VLM implementation, from the same weights and batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_support import CASES, PUBLIC_IMAGE, Case, error, read, require_cases, require_losses, run_case
from safetensors.torch import load_file, save_file
from torch import Tensor

from olaschema.errors import ConfigError
from olatrain.convert import ImportedOla, import_ola, published_name
from olatrain.losses import LossReport


def run(case: Case, ours: ImportedOla) -> tuple[LossReport, dict[tuple[str, int], Tensor], Tensor]:
    return run_case(case, ours.student, ours.bank, ours.losses, ours.pad_id)


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def result(folder: Path) -> tuple[Case, ImportedOla, LossReport, dict[tuple[str, int], Tensor], Tensor]:
    case = read(folder)
    ours = import_ola(folder, config=case.expected["config"], compat="ola")
    report, predictions, logits = run(case, ours)
    report.loss.backward()
    return case, ours, report, predictions, logits


def test_there_are_cases() -> None:
    require_cases("e2e")


def test_losses(result: Any) -> None:
    case, ours, report, *_ = result
    require_losses(case, report, ours.bank, ours.losses)


def test_predictions(result: Any) -> None:
    case, ours, _, predictions, _ = result
    for teacher, config in ours.bank.configs.items():
        for n, layer in enumerate(config.layers):
            theirs = case.outputs[f"{teacher}_emb_{n}"]
            if teacher == "seg":
                theirs = theirs.permute(0, 2, 3, 1)
            predicted = predictions[teacher, layer]
            assert error(predicted, theirs.reshape(predicted.shape)) < 1e-4, (teacher, layer)


def test_text_logits(result: Any) -> None:
    case, *_, logits = result
    theirs = case.outputs["text_logits"]
    real = case.batch["attention_mask"][:, -theirs.shape[1] :] == 1  # logits of padding mean nothing
    assert error(logits[:, -theirs.shape[1] :, : theirs.shape[2]][real], theirs[real]) < 1e-4


def test_gradients(result: Any) -> None:
    case, ours, *_ = result
    named = {f"student.{n}": p for n, p in ours.student.named_parameters()}
    named |= {f"bank.{n}": p for n, p in ours.bank.named_parameters()}
    by_published = {published_name(n, ours.bank.configs): p for n, p in named.items()}
    assert case.gradients
    for name, theirs in case.gradients.items():
        gradient = by_published[name].grad
        assert gradient is not None, name
        assert error(gradient, theirs) < 1e-3, name


# --- import, beyond the cases ---


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def rewritten(tmp_path: Path, change: Change) -> tuple[Path, dict[str, Any]]:
    source = Path(__file__).parents[1] / "golden/e2e"
    config = json.loads((source / "expected.json").read_text())["config"]
    weights = load_file(source / "model.safetensors")
    change(weights, config)
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copytree(source / "clip-vit-tiny", tmp_path / "clip-vit-tiny")
    return tmp_path, config


def without_task_tokens(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The published layout with 0 task tokens: latents in the heads, and a depth head as wide as its target."""
    config |= {"num_task_tokens": 0, "aux_mode": "depth-gen", "pass_text_to_aux": False}
    generator = torch.Generator().manual_seed(0)
    for name in list(weights):
        if name.startswith(("model.special_", "image_seg_heads", "seg_logit")):
            del weights[name]
    for n in range(2):
        shapes = {"projector.latents": (1, 16, 24)}
        for name in [k for k in weights if k.startswith(f"image_depth_heads.{n}.")]:
            shape = weights.pop(name).shape
            narrow = tuple(24 if s == 64 else s for s in shape)
            narrow = (24, 64) if name.endswith("proj_in.weight") else narrow
            narrow = (64, 24) if name.endswith("to_kv.weight") else narrow
            shapes[name.split(".", 2)[2]] = narrow
        for key, shape in shapes.items():
            weights[f"image_depth_heads.{n}.{key}"] = torch.randn(shape, generator=generator) * 0.2
        weights[f"image_gen_heads.{n}.projector.latents"] = torch.randn(1, 1, 16, generator=generator)


def test_a_checkpoint_without_task_tokens_has_its_latents_in_the_heads(tmp_path: Path) -> None:
    folder, config = rewritten(tmp_path, without_task_tokens)
    ours = import_ola(folder, config=config)
    weights = load_file(folder / "model.safetensors")
    latents = ours.bank.head("depth", 6).projector.latents
    assert latents is not None
    assert torch.equal(latents, weights["image_depth_heads.1.projector.latents"])
    assert ours.bank.context == "prompt"
    case = read(Path(__file__).parents[1] / "golden/e2e")
    report, predictions, _ = run(case, ours)
    assert set(predictions) == {("depth", 4), ("depth", 6), ("gen", 3), ("gen", 6)}
    # with the text off, another answer leaves the predictions as they are
    answer = case.batch["input_ids"] != PUBLIC_IMAGE
    answer[:, :27] = False
    case.batch["input_ids"] = torch.where(answer, (case.batch["input_ids"] + 1) % 256, case.batch["input_ids"])
    other, same, _ = run(case, ours)
    assert all(torch.allclose(same[key], predictions[key], atol=1e-6) for key in same)
    assert other.text.total != report.text.total


def test_weights_keep_their_dtype_and_padding_embeds_as_zero(tmp_path: Path) -> None:
    def halve(weights: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in weights:
            if name.startswith(("model.layers.", "image_gen")):
                weights[name] = weights[name].half()

    folder, config = rewritten(tmp_path, halve)
    ours = import_ola(folder, config=config)
    dtypes = {n: p.dtype for n, p in ours.student.model.named_parameters()}
    assert dtypes["model.language_model.layers.0.mlp.up_proj.weight"] == torch.float16
    assert dtypes["model.multi_modal_projector.linear_1.weight"] == torch.float32
    assert {p.dtype for p in ours.bank.parameters()} == {torch.float32}
    assert (ours.student.embeddings.weight[ours.pad_id] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, c: w.pop("model.mm_projector.0.bias"), "has no tensor model.mm_projector.0.bias"),
        (lambda w, c: w.update({"model.extra": torch.zeros(1)}), "1 tensors have no place .* model.extra"),
        (lambda w, c: w.update({"da_v2_head.x": torch.zeros(1), "model.norm.weight": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda w, c: c.update(model_type="llama"), "model_type llama is no OLA-VLM student"),
        (lambda w, c: c.update(mm_projector_type="linear"), "projector linear"),
        (lambda w, c: c.update(aux_mode="depth-sam"), "aux_mode names sam"),
        (lambda w, c: c.pop("vocab_size"), "the config has no vocab_size"),
        (lambda w, c: c.pop("image_seg"), "no section image_seg"),
        (lambda w, c: c["image_gen"].pop("num_heads"), "image_gen has no num_heads"),
        (lambda w, c: c["image_depth"].update(num_tokens=18), "18 tokens are not a square map"),
        (lambda w, c: c.update(mm_vision_tower="elsewhere"), "elsewhere/config.json cannot be read"),
    ],
)
def test_what_cannot_be_represented_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    folder, config = rewritten(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as caught:
        import_ola(folder, config=config)
    assert caught.value.remedy
