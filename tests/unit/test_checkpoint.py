from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from olatrain import checkpoint
from olatrain.checkpoint import (
    CheckpointError,
    Saver,
    latest_checkpoint,
    load_tensors,
    optimiser_tensors,
    prefixed,
    read_state,
)
from olatrain.parallel import Ranks, open_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with open_ranks("cpu") as opened:
        yield opened


def test_a_lone_rank_puts_no_number_before_tracebacks(ranks: Ranks) -> None:
    assert ranks.world == 1
    assert sys.excepthook.__name__ != "_distributed_excepthook"


def save(ranks: Ranks, root: Path, step: int, tensors: Mapping[str, Tensor] | None = None, *, keep: int = 2) -> Path:
    saver = Saver(root, ranks, keep_last=keep)
    saver.save(step, tensors or {"trainable.a": torch.full((2, 3), float(step))}, {"position": 10 * step, "name": "é"})
    done = saver.wait()
    assert done is not None
    assert done[0] == step
    assert saver.wait() is None
    return done[1]


def test_what_is_saved_comes_back(tmp_path: Path, ranks: Ranks) -> None:
    tensors = {"t.x": torch.randn(3, 4), "t.step": torch.tensor(5.0), "t.half": torch.randn(2).bfloat16()}
    folder = save(ranks, tmp_path, 7, tensors)
    state = read_state(folder)
    assert (state["step"], state["position"], state["name"]) == (7, 70, "é")
    for group in (ranks, None):
        found = {name: torch.zeros_like(value) for name, value in tensors.items()}
        load_tensors(folder, state, found, ranks=group)
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 2
    assert names[0].endswith(".safetensors")
    assert names[1] == "state.json"


def test_a_small_one_is_there_when_save_returns(tmp_path: Path, ranks: Ranks) -> None:
    saver = Saver(tmp_path, ranks, keep_last=1)
    assert not saver.ready
    saver.save(1, {"t.x": torch.zeros(3)}, {})
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert saver.ready


def test_what_changes_while_it_is_written_is_not_saved(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one is written in the background; the next one waits for it."""
    may_go_on, write = threading.Event(), checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda *given: may_go_on.wait(60) and write(*given))
    monkeypatch.setattr(checkpoint, "BACKGROUND_BYTES", 4_000_000)
    value = torch.zeros(1000, 1000)
    saver = Saver(tmp_path, ranks, keep_last=1)
    saver.save(1, {"t.x": value}, {})
    assert not saver.ready
    assert latest_checkpoint(tmp_path) is None
    value += 1.0
    may_go_on.set()
    done = saver.wait()
    assert done is not None
    assert done[1] == latest_checkpoint(tmp_path)
    found = {"t.x": torch.ones(1000, 1000)}
    load_tensors(done[1], read_state(done[1]), found)
    assert not found["t.x"].any()


def test_the_last_ones_are_kept(tmp_path: Path, ranks: Ranks) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (2, 9, 10, 11):
        save(ranks, tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000011"


@pytest.mark.parametrize("failing", ["tensors", "state"])
def test_a_crash_while_saving_leaves_the_one_before(
    tmp_path: Path, ranks: Ranks, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ranks, tmp_path, 1)

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "state":
        monkeypatch.setattr(checkpoint, "_write", broken)
    else:
        monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CheckpointError, match="step-00000002 cannot be written: No space left"):
        save(ranks, tmp_path, 2)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000001"
    monkeypatch.undo()
    save(ranks, tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["*.safetensors", "state.json"])
def test_damage_is_named_and_never_passed_over(tmp_path: Path, ranks: Ranks, name: str) -> None:
    save(ranks, tmp_path, 1)
    folder = save(ranks, tmp_path, 2)
    (path,) = folder.glob(name)
    data = bytearray(path.read_bytes())
    data[-8] ^= 255
    path.write_bytes(bytes(data))
    assert latest_checkpoint(tmp_path) == folder
    with pytest.raises(CheckpointError, match=r"step-00000002.*(is damaged|cannot be read)") as caught:
        load_tensors(folder, read_state(folder), {"trainable.a": torch.zeros(2, 3)}, ranks=ranks)
    assert "Delete the folder" in caught.value.remedy


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"trainable.a": (3, 2)}, r"does not fit the student: trainable\.a"),
        ({"trainable.a": (2, 3), "trainable.b": (1,)}, r"does not fit the student: trainable\.b"),
        ({"trainable.b": (1,)}, r"trainable\.b, trainable\.a"),
    ],
)
def test_tensors_of_another_student_are_refused(
    tmp_path: Path, ranks: Ranks, wanted: dict[str, tuple[int, ...]], message: str
) -> None:
    folder = save(ranks, tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(folder, read_state(folder), {name: torch.zeros(shape) for name, shape in wanted.items()})


def steps(model: torch.nn.Module, optimiser: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(model(torch.full((2, 3), float(seed))), torch.ones(2, 2)).backward()
        optimiser.step()


def test_an_optimiser_goes_on_bit_for_bit(tmp_path: Path, ranks: Ranks) -> None:
    def made() -> tuple[torch.nn.Linear, torch.optim.AdamW, dict[Tensor, str]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), names

    def everything(model: torch.nn.Linear, optimiser: torch.optim.AdamW, names: dict[Tensor, str]) -> dict[str, Tensor]:
        return prefixed("w", model.state_dict()) | prefixed("optimiser", optimiser_tensors(optimiser, names))

    whole, optimiser, _ = made()
    steps(whole, optimiser, range(6))
    first, optimiser, names = made()
    steps(first, optimiser, range(3))
    folder = save(ranks, tmp_path, 3, everything(first, optimiser, names))
    second, optimiser, names = made()
    load_tensors(folder, read_state(folder), everything(second, optimiser, names), ranks=ranks)
    steps(second, optimiser, range(3, 6))
    assert torch.equal(second.weight, whole.weight)
    assert torch.equal(second.bias, whole.bias)
