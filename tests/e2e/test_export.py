"""`olatrain export`: what transformers makes of it in a process without our packages, and what the card says."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare_environment import make_environment, run_in
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from trainer_support import Corpus, conversation, make_corpus, make_student, metrics, settings, write_json
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olatrain.checkpoint import CheckpointError, latest_checkpoint
from olatrain.cli import app
from olatrain.compose import load_processor
from olatrain.config import TrainConfig
from olatrain.export import export, load_trained
from olatrain.parallel import Ranks
from olatrain.resume import resume
from olatrain.setup import Run, set_up
from olatrain.sidecar import Sidecar
from olatrain.tokens import TaskTokens
from olatrain.train import train

QUESTION = "what is it?"
LENGTH = 12

# Runs in an environment of its own.
ALONE = """
import json, sys

from importlib.util import find_spec

for name in ("olatrain", "olaschema", "olapipe", "zarr", "ray"):
    assert find_spec(name) is None, name
picture, length, *folders = sys.argv[1:]
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = Image.open(picture)
    structured = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    found = {}
    for form, content in (("structured", structured), ("plain", "<image>\\nwhat is it?")):
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=int(length), min_new_tokens=int(length))
        found |= {form + ".ids": batch["input_ids"], form + ".logits": logits}
        found[form + ".tokens"] = tokens[:, batch["input_ids"].shape[1]:].contiguous()
    save_file(found, folder + ".safetensors")
"""


def run_alone(folders: list[Path], picture: Path) -> None:
    """Load, answer and generate in an environment that has only transformers, torch and what they need.

    Into `FOLDER.safetensors`.
    """
    python = make_environment(picture.parent / "environment", ["transformers", "torch", "pillow", "jinja2"])
    result = run_in(python, ["-c", ALONE, str(picture), str(LENGTH), *map(str, folders)], cwd=picture.parent)
    assert result.returncode == 0, result.stderr


def resumed(config: dict[str, Any]) -> Run:
    """The trained model as training itself restores it: not through the code under test."""
    prepared = set_up(load_config(TrainConfig, flags=config), Ranks(0, 1, torch.device("cpu")))
    optimiser = torch.optim.AdamW(prepared.learner.trainable().values())
    assert resume(prepared, optimiser).step > 0
    return prepared


def fit(chosen: dict[str, Any]) -> None:
    train(load_config(TrainConfig, flags=chosen), Console(file=io.StringIO()))


class Exported:
    """A toy student, trained for a few steps and exported; without its store from then on."""

    def __init__(self, root: Path, **student: Any) -> None:
        self.student = make_student(root / "parts", **student)
        self.corpus: Corpus = make_corpus(root / "corpus", images=6, texts=1)
        heldout = write_json(root / "heldout.json", [conversation(k, "held out") for k in self.corpus.keys[:3]])
        evaluation = {"conversations": str(heldout), "every": 2}
        self.chosen = settings(
            self.corpus, self.student, root / "run", steps=3, lr=0.1, evaluation=evaluation, checkpoint_every=1
        )
        fit(self.chosen)
        self.trained = resumed(self.chosen)
        self.run = root / "run"
        self.corpus.store.rename(root / "hidden")
        self.out = root / "exported"
        self.result = CliRunner().invoke(app, ["export", str(self.run), "--out", str(self.out)])
        assert self.result.exit_code == 0, (self.result.output, self.result.exception)
        (root / "hidden").rename(self.corpus.store)


STUDENTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "phi3": {"phi3": True},
    "no-task-tokens": {"task_tokens": 0},
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 44, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def all_exported(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> dict[str, Exported]:
    """One process answers for all: it is the imports that take time."""
    made = {name: Exported(tmp_path_factory.mktemp(name), **student) for name, student in STUDENTS.items()}
    run_alone([exported.out for exported in made.values()], picture)
    return made


@pytest.fixture(params=STUDENTS)
def exported(request: pytest.FixtureRequest, all_exported: dict[str, Exported]) -> Exported:
    return all_exported[request.param]


@pytest.fixture
def plain(all_exported: dict[str, Exported]) -> Exported:
    return all_exported["llama"]


def test_transformers_alone_gives_the_answers_of_the_trained_model(exported: Exported, picture: Path) -> None:
    found = load_file(f"{exported.out}.safetensors")
    learner = exported.trained.learner
    tokens = learner.tokens
    ids = found["structured.ids"][0].tolist()
    start = ids.index(tokens.image_id)
    block = [tokens.image_id] * 4 + list(tokens.flat)
    assert ids[start : start + len(block)] == block
    assert not set(tokens.flat) & set(ids[:start] + ids[start + len(block) :])
    assert torch.equal(found["plain.ids"], found["structured.ids"])
    processor = load_processor(exported.student)
    pixels = processor.image_processor(images=Image.open(picture), return_tensors="pt")["pixel_values"]
    batch = {"input_ids": found["plain.ids"], "attention_mask": torch.ones(1, len(ids)).long(), "pixel_values": pixels}
    with torch.no_grad():
        logits = learner.student(batch).logits
        answer = learner.student.model.generate(**batch, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH)[
            :, len(ids) :
        ]
    for form in ("structured", "plain"):
        # over the whole vocabulary: a mean that became an output row would show here
        torch.testing.assert_close(found[f"{form}.logits"], logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[f"{form}.tokens"], answer)
    assert not set(answer[0].tolist()) & set(tokens.never_predicted)


def test_the_embedding_rows_hold_the_means_and_the_output_rows_stay(exported: Exported) -> None:
    tokens = TaskTokens.load(exported.out)
    before = LlavaForConditionalGeneration.from_pretrained(exported.student)
    after, report = LlavaForConditionalGeneration.from_pretrained(exported.out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    flat = list(tokens.flat)
    kept = [i for i in range(len(before.lm_head.weight)) if i not in flat]
    ours, theirs = after.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert torch.equal(ours[kept], theirs[kept])
    latents = exported.trained.learner.student.latents
    for teacher in tokens.teachers if flat else ():
        size = tokens.tokens_per_teacher
        values = latents[teacher].detach()
        for place, id_ in enumerate(tokens.ids[teacher]):
            group = len(values) // size
            expected = values[place * group : (place + 1) * group].mean(dim=0)
            torch.testing.assert_close(ours[id_], expected, rtol=1e-6, atol=1e-7)
    generation = json.loads((exported.out / "generation_config.json").read_text())
    assert set(generation["suppress_tokens"]) == set(tokens.never_predicted)


def test_a_mean_that_would_win_is_not_generated(exported: Exported) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(exported.out)
    tokens = TaskTokens.load(exported.out)
    hidden = list(tokens.never_predicted)
    with torch.no_grad():
        model.lm_head.weight[hidden] *= 100
        model.lm_head.weight[hidden[::2]] *= -1
        out = model.generate(input_ids=torch.tensor([[0, 20, 30]]), do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert not set(out[0].tolist()) & set(hidden)


def test_the_sidecar_holds_what_was_learned_and_a_run_goes_on_from_it(plain: Exported, tmp_path: Path) -> None:
    sidecar = Sidecar.load(plain.out)
    assert sidecar is not None
    state = plain.trained.learner.state()
    assert set(sidecar.tensors) == {name for name in state if not name.startswith("projector.")}
    for name, value in sidecar.tensors.items():
        assert torch.equal(value, state[name]), name
    chosen = plain.chosen | {"student": str(plain.out), "out": str(tmp_path / "next"), "steps": 1}
    prepared = set_up(load_config(TrainConfig, flags=chosen), Ranks(0, 1, torch.device("cpu")))
    for name, value in prepared.learner.state().items():
        assert torch.equal(value, state[name]), name
    assert "depth: predictors of layers 2 from ola.safetensors" in prepared.notes
    # a second stage that learns from gen alone: depth's licence, and its latents, travel on
    chosen |= {"teachers": {"gen": {"layers": [1, 3]}}}
    fit(chosen)
    again = export(tmp_path / "next", tmp_path / "again")
    assert [record.fingerprint.teacher for record in again.all_teachers] == ["gen", "depth"]
    second = Sidecar.load(tmp_path / "again")
    assert second is not None
    assert second.tensors["latents.depth"].shape == sidecar.tensors["latents.depth"].shape
    card = (tmp_path / "again/README.md").read_text()
    assert "| depth | tests | MIT |" in card
    assert "before this run" in card


def test_the_card_says_what_the_model_learned_from_and_how_well(plain: Exported) -> None:
    card = (plain.out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for name, record in plain.trained.teachers.items():
        layers = ", ".join(map(str, plain.trained.config.teachers[name].layers))
        assert f"| {name} | tests | MIT | `{record.fingerprint.digest()}` | {layers} | 0.5 |" in card
    assert "`conversations.json`, features `store`" in card
    assert "An epoch has 8 samples, 1 of them text alone" in card
    assert '"lr": 0.1' in card
    last = metrics(plain.run, "evaluation")[-1]
    assert last["step"] == 3
    layer, floor = last["teachers"]["depth"]["layers"]["2"], last["teachers"]["depth"]["mean_map"]
    numbers = [f"{layer[name]:.4f}" for name in ("smooth_l1", "contrastive", "cosine", "r2")]
    assert f"| depth | 2 | {' | '.join(numbers)} |" in card
    numbers = [f"{floor[name]:.4f}" for name in ("smooth_l1", "contrastive", "cosine")]
    assert f"| depth | mean map | {' | '.join(numbers)} | 0.0000 |" in card
    assert "samples held out" in card
    assert "licence MIT" in plain.result.output


def test_no_path_of_the_machine_is_in_the_export(plain: Exported) -> None:
    """Nor a folder's name that contains one."""
    root = str(plain.run.parent).encode()
    for path in plain.out.iterdir():
        assert root not in path.read_bytes(), path.name


def test_other_dtypes_are_what_they_say(plain: Exported, tmp_path: Path) -> None:
    export(plain.run, tmp_path / "half", dtype="bfloat16")
    weights = load_file(tmp_path / "half/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    sidecar = Sidecar.load(tmp_path / "half")
    assert sidecar is not None
    assert {value.dtype for value in sidecar.tensors.values()} == {torch.float32}
    assert "Weights are bfloat16" in (tmp_path / "half/README.md").read_text()


def test_the_card_of_a_run_without_metrics_says_so(plain: Exported, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain.run, run)
    (run / "metrics.jsonl").unlink()
    export(run, tmp_path / "out")
    assert "The run kept no metrics." in (tmp_path / "out/README.md").read_text()


# --- what is refused


def edited(plain: Exported, target: Path, change: Any) -> Path:
    """The run with another state in its newest checkpoint."""
    shutil.copytree(plain.run, target)
    latest = latest_checkpoint(target / "checkpoints")
    assert latest is not None
    state = json.loads((latest / "state.json").read_text())
    change(state)
    (latest / "state.json").write_text(json.dumps(state))
    return target


def test_a_folder_without_a_checkpoint_is_refused(plain: Exported, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(plain.run, plain.out)


def test_a_run_without_licences_is_refused(plain: Exported, tmp_path: Path) -> None:
    run = edited(plain, tmp_path / "run", lambda state: state.pop("teachers"))
    with pytest.raises(CheckpointError, match="licences are not readable") as caught:
        load_trained(run)
    assert "Continue the run" in caught.value.remedy


def test_a_student_that_moved_is_asked_for_and_another_one_refused(plain: Exported, tmp_path: Path) -> None:
    run = edited(plain, tmp_path / "run", lambda state: state["config"].update(student="gone"))
    with pytest.raises(ConfigError, match="is no folder here") as caught:
        load_trained(run)
    assert "--student" in caught.value.remedy
    moved = tmp_path / "moved"
    shutil.copytree(plain.student, moved)
    assert load_trained(run, student=moved).step == 3
    weights = load_file(moved / "model.safetensors")
    save_file({**weights, "extra": torch.zeros(3)}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the student"):
        load_trained(run, student=moved)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "does not serve structured content"),
        (
            "{% for m in messages %}{% for p in m['content'] %}"
            "{% if p['type'] == 'image' %}@{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}",
            "does not serve plain content",
        ),
    ],
)
def test_a_template_that_loses_the_task_tokens_is_refused(
    plain: Exported, tmp_path: Path, template: str, message: str
) -> None:
    student = tmp_path / "student"
    shutil.copytree(plain.student, student)
    names = "".join(f"<ola_{t}_{n}>" for t in ("gen", "depth") for n in range(2))
    (student / "chat_template.jinja").write_text(template.replace("@", "<image>" + names))
    fit(settings(plain.corpus, student, tmp_path / "run", steps=1))
    with pytest.raises(ConfigError, match=message):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
