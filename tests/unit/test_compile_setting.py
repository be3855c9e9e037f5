"""The setting `compile`: from the command line to the module, and into the receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_support import DEPTH, olapipe, write_images

from olapipe.config import ExtractConfig
from olapipe.corpus import list_corpus
from olapipe.tally import ShardTask
from olapipe.worker import ShardWorker
from olaschema.store import FeatureStore


def receipt_of(tmp_path: Path, *, compiled: bool) -> Any:
    """Encode one image as a worker does, without Ray, and return the receipt."""
    write_images(tmp_path / "images", "a.png")
    out = tmp_path / "features.zarr"
    config = ExtractConfig(
        corpus=tmp_path / "images", out=out, teachers=("depth",), checkpoints={"depth": str(DEPTH)}, compile=compiled,
        decoders=1, threads=torch.get_num_threads(), batch_size=2,
    )  # fmt: skip
    worker = ShardWorker(config, tmp_path / "images", "cpu")
    records = worker.load()
    store = FeatureStore.create(out, rows_per_shard=2)
    store.add_generation(entry.sample() for entry in list_corpus(tmp_path / "images", None).entries)
    for record in records:
        store.put_teacher(record)
    worker.encode(out, ShardTask(0, ("depth",), 1))
    return store.receipt("depth", 0)


@pytest.mark.parametrize("compiled", [True, False])
def test_compile_reaches_the_module_and_the_receipt(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile itself is replaced: generating code takes half a minute on a CPU, and is torch's own affair."""
    passed: list[torch.nn.Module] = []

    def compile_(module: torch.nn.Module) -> torch.nn.Module:
        passed.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    receipt = receipt_of(tmp_path, compiled=compiled)
    assert len(passed) == int(compiled)
    assert receipt.execution.compile is compiled
    assert receipt.ok == 1


@pytest.mark.parametrize(("flags", "expected"), [(["--compile"], True), (["--set", "compile=true"], True), ([], False)])
def test_flag_and_setting_are_the_same(
    flags: list[str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ExtractConfig] = []

    def extract(config: ExtractConfig, reporter: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("olapipe.extract.extract", extract)
    olapipe("extract", tmp_path, "--out", tmp_path / "s", "--teacher", "depth", *flags)
    assert [config.compile for config in seen] == [expected]
