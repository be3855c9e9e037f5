"""docs/tutorial.md: every command, in order, in one folder, with data and models of toy size under the same names."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from pipeline_support import ray_session
from safetensors.torch import load_file
from trainer_support import byte_tokenizer, conversation, metrics, write_json
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from olapipe.cli import app as olapipe
from olatrain.cli import app as olatrain

__all__ = ["ray_session"]

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
IMAGES = 10
# what toy size changes; nothing else of a command is touched
TOY = {"--nproc 8": "--set device=cpu", "step-00000500": "step-00000001", "KEY": "00000/000000010.jpg"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(_toy(line)) for line in lines if line.strip()]


def _toy(line: str) -> str:
    for before, after in TOY.items():
        line = line.replace(before, after)
    return line


def test_every_block_is_a_command_a_setting_or_an_installation() -> None:
    languages = re.findall(r"^```(\w*)$", TEXT, flags=re.MULTILINE)
    assert languages[::2] == ["", "bash", "bash", "bash", "bash", "yaml", "bash", "bash", "bash", "bash", "bash"]
    assert all("pip install" in line for line in blocks("")[0].splitlines())
    assert {command[0] for command in commands()} == {"olapipe", "olatrain"}
    for verb in ("extract", "verify", "compose", "probe", "run", "preview", "export", "eval"):
        assert verb in {command[1] for command in commands()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-Pretrain, models and CV-Bench, tiny, as a reader would have them."""
    root = tmp_path_factory.mktemp("tutorial")
    images = root / "LLaVA-Pretrain/images/00000"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries = []
    for number in range(IMAGES):
        name = f"{10 * (number + 1):09d}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(images / name)
        entries.append(conversation(f"00000/{name}", f"a picture, number {number}") | {"id": name})
    write_json(root / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", entries)
    tuning = root / "LLaVA-Instruct"
    shutil.copytree(images, tuning / "images/coco")
    mixed = [entry | {"image": entry["image"].replace("00000/", "coco/")} for entry in entries[:3]]
    write_json(tuning / "llava_v1_5_mix665k.json", [*mixed, conversation(None, "a text alone")])
    models = root / "models"
    shutil.copytree(ROOT / "tests/golden/depth", models / "Depth-Anything-V2-Large-hf")
    shutil.copytree(ROOT / "tests/golden/gen", models / "stable-diffusion-2-1-unclip")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(models / "Meta-Llama-3-8B-Instruct")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=20, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(models / "Meta-Llama-3-8B-Instruct")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(models / "clip-vit-large-patch14-336")
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (9, 99, 199)).save(file, "PNG")
    shape = [("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"), ("3D", "Depth", "Omni3D")]
    rows: list[dict[str, Any]] = [
        {
            "type": kind, "task": task, "source": source, "question": "?", "choices": ["2", "3"], "answer": "(B)",
            "prompt": "How many? (A) 2 (B) 3", "image": {"bytes": file.getvalue(), "path": "x.png"},
        }
        for kind, task, source in shape
    ]  # fmt: skip
    (root / "CV-Bench").mkdir()
    for kind in ("2D", "3D"):
        chosen = [row for row in rows if row["type"] == kind]
        pq.write_table(pa.Table.from_pylist(chosen), root / f"CV-Bench/test_{kind.lower()}.parquet")
    settings = yaml.safe_load(blocks("yaml")[0])
    settings["predictions"]["every"] = 1
    (root / "pretrain.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.mark.usefixtures("ray_session")
def test_a_newcomer_gets_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the commands' own functions: start-up is most of the time."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    said: dict[str, list[str]] = {}
    for command in commands():
        result = CliRunner().invoke({"olapipe": olapipe, "olatrain": olatrain}[command[0]], command[1:])
        assert result.exit_code == 0, (shlex.join(command), result.output, result.exception)
        said.setdefault(" ".join(command[:2]), []).append(result.output)
    for name in ("seen.png", "stored.png", "predicted.png", "model/README.md", "probes/after/probe.json"):
        assert (folder / name).stat().st_size > 100, name
    (line,) = metrics(folder / "runs/pretrain")
    assert line["teachers"]["depth"]["valid"] == IMAGES
    assert "18" in line["teachers"]["depth"]["layers"]
    assert f"first batch: {IMAGES} samples" in said["olatrain run"][0]
    assert json.loads((folder / "cv-bench.json").read_text())["questions"] == 3
    (line,) = metrics(folder / "runs/finetune")
    assert line["samples"] == 4
    assert "teachers" not in line or not line["teachers"]
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "tuned"))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    for part in ("language_model", "multi_modal_projector"):
        assert any(part in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    assert "relative L2" in " ".join(said["olapipe preview"][-1].split())
