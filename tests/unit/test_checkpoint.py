from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olatrain import checkpoint
from olatrain.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    optimiser_tensors,
    restore_optimiser,
    save_checkpoint,
)


def save(root: Path, step: int, *, keep_last: int = 2, value: float | None = None) -> Path:
    files = {"trainable": {"a.weight": torch.full((2, 3), float(step if value is None else value))}, "optimiser": {}}
    return save_checkpoint(root, step, files, {"position": 10 * step}, keep_last=keep_last)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4), "step": torch.tensor(5.0), "half": torch.randn(2).bfloat16()}
    folder = save_checkpoint(tmp_path, 7, {"trainable": tensors}, {"position": 3, "name": "é"}, keep_last=1)
    state, files = load_checkpoint(folder)
    assert (state["step"], state["position"], state["name"]) == (7, 3, "é")
    assert files["trainable"].keys() == tensors.keys()
    assert all(torch.equal(files["trainable"][name], value) for name, value in tensors.items())
    assert sorted(p.name for p in folder.iterdir()) == ["state.json", "trainable.safetensors"]


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (2, 9, 10, 11):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000011"


@pytest.mark.parametrize("failing", ["trainable.safetensors", "optimiser.safetensors", "state.json"])
def test_a_crash_while_saving_leaves_the_one_before(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    write = checkpoint._write

    def broken(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2] if path.name == failing else data)
        if path.name == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", broken)
    with pytest.raises(CheckpointError, match="step-00000002 cannot be written: No space left"):
        save(tmp_path, 2)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"
    load_checkpoint(latest)
    monkeypatch.undo()
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["trainable.safetensors", "state.json"])
def test_damage_is_named_and_never_passed_over(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-8] ^= 255
    path.write_bytes(bytes(data))
    latest = latest_checkpoint(tmp_path)
    assert latest == folder
    with pytest.raises(CheckpointError, match=r"step-00000002.*(is damaged|cannot be read)") as caught:
        load_checkpoint(folder)
    assert "Delete the folder" in caught.value.remedy


def steps(model: torch.nn.Module, optimiser: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(model(torch.full((2, 3), float(seed))), torch.ones(2, 2)).backward()
        optimiser.step()


def test_an_optimiser_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def made() -> tuple[torch.nn.Linear, torch.optim.AdamW, dict[Tensor, str]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), names

    whole, optimiser, _ = made()
    steps(whole, optimiser, range(6))
    first, optimiser, names = made()
    steps(first, optimiser, range(3))
    weights: dict[str, Tensor] = dict(first.state_dict())
    folder = save_checkpoint(
        tmp_path, 3, {"w": weights, "optimiser": optimiser_tensors(optimiser, names)}, {}, keep_last=1
    )
    _, files = load_checkpoint(folder)
    second, optimiser, names = made()
    second.load_state_dict(files["w"])
    restore_optimiser(optimiser, names, files["optimiser"])
    steps(second, optimiser, range(3, 6))
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)


def test_an_optimiser_of_other_parameters_is_refused() -> None:
    model: Any = torch.nn.Linear(1, 1)
    optimiser = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="holds other"):
        restore_optimiser(optimiser, {model.weight: "weight"}, {"other.exp_avg": torch.zeros(1)})
