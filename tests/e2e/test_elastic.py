"""Stopped anywhere, killed at any moment, on any number of ranks and workers: each sample once an epoch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from free_ports import free_port
from pipeline_support import olapipe
from run_support import newest
from trainer_support import (
    Corpus,
    end_all,
    environment,
    make_corpus,
    metrics,
    run_file,
    saved,
    settings,
    start_ranks,
)

from olaschema.config import load_config
from olatrain.checkpoint import latest_checkpoint
from olatrain.compose import load_processor
from olatrain.config import TrainConfig
from olatrain.order import PositionSampler
from olatrain.parallel import Ranks
from olatrain.setup import set_up
from olatrain.stream import Sample, make_loader

SEED = int(os.environ.get("OLA_TEST_SEED", "6"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), images=24, texts=8)


@pytest.fixture(scope="module")
def packed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "set"
    where = ("--conversations", corpus.conversations, "--images", corpus.images, "--out", out)
    assert olapipe("pack", corpus.store, *where).exit_code == 0
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("other"), images=7, texts=2, seed=9)


LAYOUTS = ("store", "packed", "mixture")


def layout(name: str, corpus: Corpus, packed: Path, other: Corpus) -> tuple[dict[str, Any], Counter[str]]:
    """Settings that read a layout, and how often its conversation files say that an epoch has each answer."""
    files = {"store": str(corpus.store), "conversations": str(corpus.conversations), "images": str(corpus.images)}
    nothing: dict[str, Any] = dict.fromkeys(files)
    alone = Counter(answers(corpus))
    if name == "store":
        return files, alone
    if name == "packed":
        return nothing | {"store": str(packed)}, alone
    second = {"store": str(other.store), "conversations": str(other.conversations), "images": str(other.images)}
    sources = [{"store": str(packed), "repeats": 2}, second | {"repeats": 3}]
    expected = Counter({text: 2 * count for text, count in alone.items()})
    expected.update({text: 3 * count for text, count in Counter(answers(other)).items()})
    return nothing | {"sources": sources}, expected


def answers(corpus: Corpus) -> list[str]:
    """As the chat template writes them, trimmed."""
    return [entry["conversations"][1]["value"].strip() for entry in json.loads(corpus.conversations.read_text())]


def as_loaded(loaded: list[Sample]) -> list[Sample]:
    return loaded


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than this machine has cores
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_stops_worlds_and_workers_load_each_sample_as_often_as_it_is_due(
    name: str, corpus: Corpus, packed: Path, other: Corpus, student: Path, tmp_path: Path
) -> None:
    """What the loaders of all ranks give: three random ways through two epochs, none of them through a training."""
    where, expected = layout(name, corpus, packed, other)
    chosen = settings(corpus, student, tmp_path / "out", steps=None, epochs=2) | where
    config = load_config(TrainConfig, flags={key: value for key, value in chosen.items() if value is not None})
    run = set_up(config, Ranks(0, 1, torch.device("cpu")))
    size = sum(expected.values())
    assert run.end == 2 * size
    tokenizer = load_processor(student).tokenizer
    rng = random.Random(SEED)
    for _ in range(3):
        batch = rng.randrange(3, 8)
        stops = sorted(rng.sample(range(1, run.end // batch), 3))
        borders = [0, *(batch * stop for stop in stops), run.end]
        said: dict[int, str] = {}
        for world, start, end in zip((1, 2, 4, 1), borders[:-1], borders[1:], strict=True):
            workers = rng.randrange(4)
            for rank in range(world):
                sampler = PositionSampler(start=start, end=end, batch=batch, rank=rank, world=world)
                loader: Any = make_loader(run.stream, sampler, as_loaded, workers=workers, pin=False)  # type: ignore[arg-type]
                for sample in (sample for found in loader for sample in found):
                    assert sample.position not in said
                    answer = [id_ for id_ in sample.labels if id_ != -100]
                    said[sample.position] = tokenizer.decode(answer).removesuffix("<|eot|>")
        for epoch in (0, 1):
            assert Counter(said.get(position) for position in range(epoch * size, (epoch + 1) * size)) == expected


def test_an_epoch_has_each_sample_once_whatever_ranks_and_workers(
    corpus: Corpus, packed: Path, other: Corpus, student: Path, tmp_path: Path
) -> None:
    """Worlds 1 → 2 → 4 → 1 with 0 to 3 workers, stopped at random steps; the language model split or whole.

    From the store and from the set that was packed of it, in turns.
    """
    rng = random.Random(SEED)
    values = settings(
        corpus, student, tmp_path / "out", steps=None, epochs=2, batch=5, checkpoint_every=100,
        order="grouped", train=["projector", "predictors", "llm"],
    )  # fmt: skip
    total = -(-2 * 33 // 5)
    stops = [*sorted(rng.sample(range(1, total), 3)), None]
    layouts = ("store", "packed", "store", "packed")
    for world, workers, stop, name in zip((1, 2, 4, 1), (0, 3, 1, 2), stops, layouts, strict=True):
        leg = values | {"nproc": world, "workers": workers, "stop_after": stop}
        end_all(start_ranks(leg | layout(name, corpus, packed, other)[0], world, record=tmp_path))
    seen = [json.loads(line) for path in tmp_path.glob("seen-*") for line in path.read_text().splitlines()]
    assert Counter(position for position, _ in seen) == Counter(range(66))
    for epoch in (0, 1):
        indices = Counter(index for position, index in seen if position // 33 == epoch)
        assert indices == Counter(range(33))
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, total + 1))
    assert sum(line["samples"] for line in metrics(tmp_path / "out")) == 66


def test_ten_kills_at_random_moments_end_with_the_same_bits(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    """And none loses a save point that a later step has been seen after."""
    rng = random.Random(SEED)
    values = settings(corpus, student, tmp_path / "out", steps=90, checkpoint_every=3, workers=1)
    end_all(start_ranks(values | {"out": str(tmp_path / "whole")}, 1))
    out = Path(values["out"])
    reached, kills = 0, 0
    while kills < 10:
        (rank,) = start_ranks(values, 1)
        wait_for_step(out, reached + rng.randrange(1, 6))
        time.sleep(rng.uniform(0, 0.05))
        rank.kill()
        rank.join(30)
        assert rank.exitcode == -9, "the run ended before it was killed"
        kills += 1
        latest = latest_checkpoint(out / "checkpoints")
        reached = int(latest.name.removeprefix("step-")) if latest is not None else 0
        seen = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        last = max(json.loads(line)["step"] for line in seen if line.endswith("\n"))
        assert reached >= (last - 1) // 3 * 3
    end_all(start_ranks(values, 1))
    one, other = (saved(newest(folder), "trainable") for folder in (out, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())
    assert [line["step"] for line in metrics(out)] == list(range(1, 91))
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in metrics(tmp_path / "whole")]


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    path = out / "metrics.jsonl"
    while f'"event": "train", "step": {step},' not in (path.read_text(encoding="utf-8") if path.exists() else ""):
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.005)


def test_torchrun_on_two_nodes(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    """Two launchers of one process each meet at an address, as two machines would; negatives stay on a node."""
    values = settings(corpus, student, tmp_path / "out", steps=2, negatives="node")
    file = run_file(tmp_path / "run.json", values)
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
             "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port),
             "-m", "olatrain", "run", "--config", str(file)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert said[0].count("step 2/2: saved") == 1
    assert "saved" not in said[1]
    alone = values | {"out": str(tmp_path / "alone"), "negatives": "rank", "nproc": 2}
    end_all(start_ranks(alone, 2))
    assert [line["loss"] for line in metrics(tmp_path / "out")] == [
        line["loss"] for line in metrics(tmp_path / "alone")
    ]
