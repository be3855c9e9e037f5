"""`olatrain import-ola`: every golden case through a student's folder on disk, back to the published numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_support import CASES, error, read, require_losses, run_case
from import_support import HERE, published, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from store_support import fingerprint
from torch import Tensor
from trainer_support import make_corpus, metrics
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)
from typer.testing import CliRunner

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olatrain.cli import app
from olatrain.compose import load_processor, student_view
from olatrain.config import TrainConfig
from olatrain.conversations import parse_conversation
from olatrain.importing import import_student
from olatrain.learner import Learner, build_learner, load_start
from olatrain.prompts import PromptBuilder
from olatrain.sidecar import SIDECAR_NAME, Sidecar
from olatrain.tokens import TaskTokens


def reloaded(folder: Path, **changes: Any) -> Learner:
    """What a run starts with, from nothing but the folder."""
    record = Sidecar.load(folder)
    assert record is not None
    needed = dict.fromkeys(("student", "store", "conversations", "images", "out"), folder)
    flags = needed | {"compat": "ola"} | changes
    if record.record.context != "all":
        del flags["compat"]
    config = load_config(TrainConfig, file=folder / "published.json", flags=flags)
    means = {
        name: fingerprint(name, grid=p.shape[:2] if p.spatial else None, channels=p.channels)
        for name, p in record.record.predictors.items()
    }
    return build_learner(config, means, TaskTokens.load(folder), torch.device("cpu"), start=load_start(config))


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.name)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("imported")
    folder = published(request.param, root / "published")
    result = CliRunner().invoke(app, ["import-ola", str(folder), "--out", str(root / "student")])
    assert result.exit_code == 0, result.output
    return request.param, root / "student"


def test_imported_saved_and_loaded_it_reproduces_the_published_numbers(imported: tuple[Path, Path]) -> None:
    source, folder = imported
    case, learner = read(source), reloaded(folder)
    pad_id = int(load_processor(folder).tokenizer.pad_token_id)
    report, predictions, logits = run_case(case, learner.student, learner.bank, learner.losses, pad_id)
    require_losses(case, report, learner.bank, learner.losses)
    for teacher, config in learner.bank.configs.items():
        for n, layer in enumerate(config.layers):
            theirs = case.outputs[f"{teacher}_emb_{n}"]
            theirs = theirs.permute(0, 2, 3, 1) if teacher == "seg" else theirs
            predicted = predictions[teacher, layer]
            assert error(predicted, theirs.reshape(predicted.shape)) < 1e-4, (teacher, layer)
    theirs = case.outputs["text_logits"]
    real = case.batch["attention_mask"][:, -theirs.shape[1] :] == 1
    assert error(logits[:, -theirs.shape[1] :, : theirs.shape[2]][real], theirs[real]) < 1e-4


def test_transformers_alone_sees_the_same_student(imported: tuple[Path, Path]) -> None:
    """The embedding rows hold the means; ids beyond the published vocabulary never come out."""
    source, folder = imported
    learner, tokens = reloaded(folder), TaskTokens.load(folder)
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = load_processor(folder)
    assert len(processor.tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert min(tokens.never_predicted) == json.loads((source / "expected.json").read_text())["config"]["vocab_size"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nso?"}], add_generation_prompt=True)
    batch = processor(images=picture, text=text, return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    start = ids.index(tokens.image_id)
    assert ids[start : start + 576 + len(tokens.flat)] == [tokens.image_id] * 576 + list(tokens.flat)
    assert processor.tokenizer.decode(ids[-20:], skip_special_tokens=False).endswith("<|start|>assistant<|sep|>\n\n")
    with torch.no_grad():
        ours = learner.student(dict(batch)).logits
        torch.testing.assert_close(model(**batch).logits, ours, rtol=1e-5, atol=1e-5)
        out = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert not set(out.tolist()) & set(tokens.never_predicted)
    assert student_view(processor).kind == "crop"


# --- after instruction tuning


def tuned(case: Path, target: Path, task_format: str | None, model_type: str) -> Path:
    """The case's student as instruction tuning leaves it: its language model and vectors, no predictors."""
    changes = {"model_type": model_type} | ({"task_token_format": task_format} if task_format else {})
    folder = published(case, target, **changes)
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("image_") and "logit_scale" not in name}
    save_file(kept, folder / "model.safetensors")
    if task_format is None:
        config = json.loads((folder / "config.json").read_text())
        del config["task_token_format"]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def vectors_in_sequence(weights: dict[str, Tensor], mode: str, task_format: str) -> Tensor:
    """By hand, as the public code strings them together."""
    found = []
    for teacher in mode.split("-"):
        vectors = weights[f"model.special_{teacher}_tokens"]
        if teacher != "gen" and task_format == "expand_emb":
            count = len(vectors) // 8
            vectors = torch.stack([vectors[n * count : (n + 1) * count].mean(dim=0) for n in range(8)])
        found.append(vectors)
    return torch.cat(found)


@pytest.mark.parametrize(
    ("case", "task_format", "count"),
    [("e2e", "emb", (8, 16, 16)), ("e2e", "expand_emb", (8, 8, 8)), ("e2e_phi3", None, (8, 16, 16))],
)
def test_a_tuned_checkpoint_computes_what_its_language_model_does_with_its_vectors(
    tmp_path: Path, case: str, task_format: str | None, count: tuple[int, ...]
) -> None:
    """Its own transformers language model, fed embeddings that are strung together here; `emb` is the default."""
    source = HERE.parent / case
    family = "phi3" if "phi3" in case else "llama"
    folder = tuned(source, tmp_path / "published", task_format, f"llava_{family}")
    tokens, _ = import_student(folder, tmp_path / "student")
    settings = json.loads((folder / "config.json").read_text())
    assert tuple(map(len, tokens.ids.values())) == count
    weights = load_file(folder / "model.safetensors")
    inner = {k: v for k, v in weights.items() if k.startswith(("model.layers", "model.norm", "model.embed", "lm_head"))}
    made: Any = LlamaConfig if family == "llama" else Phi3Config
    config = made(**{k: v for k, v in settings.items() if k in made().to_dict() and k not in ("model_type", "dtype")})
    config.rope_parameters = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    config.pad_token_id = 0
    language = (LlamaForCausalLM if family == "llama" else Phi3ForCausalLM)(config)
    language.load_state_dict(inner)
    tower = CLIPVisionModel.from_pretrained(folder / settings["mm_vision_tower"])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = torch.nn.functional.linear(
            patches, weights["model.mm_projector.0.weight"], weights["model.mm_projector.0.bias"]
        )
        hidden = torch.nn.functional.gelu(hidden)
        image = torch.nn.functional.linear(
            hidden, weights["model.mm_projector.2.weight"], weights["model.mm_projector.2.bias"]
        )
        text = weights["model.embed_tokens.weight"][ids]
        vectors = vectors_in_sequence(weights, settings["aux_mode"], task_format or "emb")
        whole = torch.cat((text[:, :3], image, vectors[None], text[:, 3:]), dim=1)
        expected = language(inputs_embeds=whole).logits
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
        block = [tokens.image_id] * image.shape[1] + list(tokens.flat)
        ours = model(input_ids=torch.tensor([[5, 6, 7, *block, 8, 9, 10]]), pixel_values=pixels).logits[
            ..., : settings["vocab_size"]
        ]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    processor = load_processor(tmp_path / "student")
    text_ids = processor.tokenizer(processor.apply_chat_template([{"role": "user", "content": "<image>\nso?"}]))[
        "input_ids"
    ]
    at = text_ids.index(tokens.image_id)
    assert text_ids[at + 1 : at + 1 + sum(count)] == list(tokens.flat)
    assert not reloaded(tmp_path / "student", store=None).bank.configs


def test_a_pretrained_checkpoint_may_be_imported_with_every_vector(plain: Path, tmp_path: Path) -> None:
    """Its predictors come along, and read the 16 places of a map where they read 8."""
    folder = published(HERE, tmp_path / "published")
    arguments = ["import-ola", str(folder), "--out", str(tmp_path / "student"), "--task-format", "emb"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "task tokens: 8 for gen, 16 for depth, 16 for seg" in result.output
    learner = reloaded(tmp_path / "student")
    rows = learner.student.model.get_input_embeddings().weight
    for teacher, latents in learner.student.latents.items():
        assert torch.equal(rows[list(learner.tokens.ids[teacher])], latents)
    assert torch.equal(
        learner.student.task_embeddings(), torch.cat([learner.student.latents[t] for t in ("gen", "depth", "seg")])
    )
    again = ["import-ola", str(folder), "--out", str(tmp_path / "other"), "--task-format", "expand_emb"]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert (tmp_path / "other/model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


# --- layouts of published checkpoints


def sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a-of-2.safetensors": names[::2], "b-of-2.safetensors": names[1::2]}
    for name, part in parts.items():
        save_file({k: weights[k] for k in part}, folder / name)
    table = {k: name for name, part in parts.items() for k in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def torch_files(folder: Path) -> None:
    """Two .bin shards, with a frozen teacher's weights among them, as published checkpoints carry."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["da_v2_head.scratch.weight"] = torch.ones(3)
    names = sorted(weights)
    parts = {"p-1.bin": names[::2], "p-2.bin": names[1::2]}
    for name, part in parts.items():
        torch.save({k: weights[k] for k in part}, folder / name)
    table = {k: name for name, part in parts.items() for k in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))


def torch_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    import_student(published(HERE, root / "published"), root / "student")
    return root / "student"


@pytest.mark.parametrize("layout", [sharded, torch_files, torch_file])
def test_every_layout_of_the_weights_gives_the_same_student(
    plain: Path, tmp_path: Path, layout: Callable[[Path], None]
) -> None:
    folder = published(HERE, tmp_path / "published")
    layout(folder)
    import_student(folder, tmp_path / "student")
    for name in ("model.safetensors", SIDECAR_NAME, "ola.json", "published.json"):
        assert (tmp_path / "student" / name).read_bytes() == (plain / name).read_bytes(), name


class Trap:
    def __reduce__(self) -> Any:
        return (print, ("code from the checkpoint ran",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = published(HERE, tmp_path / "published")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        import_student(folder, tmp_path / "student")
    assert "ran" not in capsys.readouterr().out


def outside(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    (folder / "model.safetensors").unlink()


def many_tokens(folder: Path) -> None:
    made = tokenizer()
    made.add_tokens([f"more{n}" for n in range(200)])
    made.save_pretrained(folder)


def image_token(folder: Path) -> None:
    made = tokenizer()
    made.add_tokens(["<image>"])
    made.save_pretrained(folder)


def heads_gone(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("image_")}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "spoil", "message"),
    [
        ({}, lambda f: shutil.rmtree(f / "clip-vit-tiny"), "vision tower clip-vit-tiny is not inside"),
        ({}, lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        ({}, lambda f: (f / "model.safetensors").unlink(), "neither it nor pytorch_model.bin is there"),
        ({}, outside, "names ../x.bin, a file outside the folder"),
        ({}, heads_gone, "no predictors, though its model_type is ola_llama"),
        ({}, many_tokens, "the tokenizer has 302 tokens, the model's vocabulary only 256"),
        ({}, image_token, "the tokenizer already has <image>"),
        ({"image_aspect_ratio": "anyres"}, lambda f: None, "image_aspect_ratio is anyres"),
        ({"mm_vision_select_feature": "cls_patch"}, lambda f: None, "mm_vision_select_feature is cls_patch"),
        ({}, lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json cannot be read"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    tmp_path: Path, change: dict[str, Any], spoil: Callable[[Path], Any], message: str
) -> None:
    folder = published(HERE, tmp_path / "published", **change)
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        import_student(folder, tmp_path / "student")
    assert caught.value.remedy
    assert not (tmp_path / "student").exists()


def test_the_tower_may_be_elsewhere_and_the_view_be_said(tmp_path: Path) -> None:
    folder = published(HERE, tmp_path / "published", image_aspect_ratio="anyres")
    (folder / "clip-vit-tiny").rename(tmp_path / "tower")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4], "temperature": 1.0}))
    import_student(folder, tmp_path / "student", vision=tmp_path / "tower", view="pad")
    assert student_view(load_processor(tmp_path / "student")).kind == "pad"
    generation = json.loads((tmp_path / "student/generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 4]
    assert set(TaskTokens.load(tmp_path / "student").never_predicted) <= set(generation["suppress_tokens"])


SYSTEM = 'You "see".\nSay {{ what }} — é'


def test_a_system_message_is_said_unless_the_conversation_has_one(tmp_path: Path) -> None:
    folder = published(HERE, tmp_path / "published")
    import_student(folder, tmp_path / "student", system=SYSTEM)
    processor = load_processor(tmp_path / "student")
    user = {"role": "user", "content": "<image>\nso?"}
    text = processor.apply_chat_template([user])
    assert text.startswith(f"<s><|start|>system<|sep|>\n\n{SYSTEM}<|eot|><|start|>user<|sep|>\n\n<image><ola_gen_0>")
    own = processor.apply_chat_template([{"role": "system", "content": "mine"}, user])
    assert own.startswith("<s><|start|>system<|sep|>\n\nmine<|eot|><|start|>user")
    prompts = PromptBuilder(processor.tokenizer, TaskTokens.load(tmp_path / "student"), max_length=4096)
    entry = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nso?"}]}
    entry["conversations"].append({"from": "gpt", "value": "yes"})
    built = prompts.build(parse_conversation(entry, 0))
    answer = [id_ for id_ in built.labels if id_ != -100]
    assert processor.tokenizer.decode(answer) == "yes<|eot|>"
    made = tokenizer()
    made.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    made.save_pretrained(folder)
    with pytest.raises(ConfigError, match="leaves system messages out"):
        import_student(folder, tmp_path / "other", system=SYSTEM)


# --- starting from a sidecar


def start_of(folder: Path, **changes: Any) -> dict[str, Tensor]:
    return reloaded(folder, **changes).state()


def test_a_run_starts_from_the_sidecar_unless_told_otherwise(plain: Path) -> None:
    sidecar = Sidecar.load(plain)
    assert sidecar is not None
    same, fresh = start_of(plain), start_of(plain, init="fresh")
    for name, value in sidecar.tensors.items():
        assert torch.equal(same[name], value), name
    assert not torch.equal(fresh["latents.depth"], sidecar.tensors["latents.depth"])
    assert fresh["predictors.logit_scales.depth"] == 2.0


def test_a_layer_that_the_sidecar_lacks_starts_fresh_and_that_is_said(plain: Path) -> None:
    sidecar = Sidecar.load(plain)
    assert sidecar is not None
    known = sidecar.record.predictors["depth"].layers
    state = start_of(plain, **{"teachers.depth.layers": [known[0], 1]})
    name = "predictors.heads.depth.{}.projector.proj_in.weight"
    assert torch.equal(state[name.format(known[0])], sidecar.tensors[name.format(known[0])])
    assert torch.equal(state["latents.depth"], sidecar.tensors["latents.depth"])
    assert sidecar.describe({"depth": [known[0], 1], "other": [2]}) == [
        f"depth: predictors of layers {known[0]} from ola.safetensors, of layers 1 fresh",
        "other: predictors of layers 2 fresh",
    ]


def test_features_of_another_shape_are_refused(plain: Path) -> None:
    sidecar = Sidecar.load(plain)
    assert sidecar is not None
    with pytest.raises(ConfigError, match=r"predicts depth as \(4, 4, 24\), the store holds \(2, 2, 5\)"):
        sidecar.predictor("depth", (2, 2, 5), (4,))


@pytest.mark.parametrize("content", [b"", b"not a tensor file"])
def test_a_damaged_sidecar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SIDECAR_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=r"ola\.safetensors cannot be read"):
        Sidecar.load(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / SIDECAR_NAME)
    with pytest.raises(ConfigError, match=r"ola\.safetensors"):
        Sidecar.load(tmp_path)


def test_olatrain_run_trains_an_imported_student(plain: Path, tmp_path: Path) -> None:
    from store_support import record

    teachers = {
        "depth": record("float16", teacher="depth", grid=(4, 4), channels=24, view="crop"),
        "seg": record("float16", teacher="seg", grid=(4, 4), channels=40, view="crop"),
        "gen": record("float32", teacher="gen", grid=None, channels=16, view="crop"),
    }
    corpus = make_corpus(tmp_path / "corpus", images=3, texts=1, teachers=teachers)
    given = {
        "--student": plain,
        "--config": plain / "published.json",
        "--store": corpus.store,
        "--images": corpus.images,
    }
    given |= {"--conversations": corpus.conversations, "--out": tmp_path / "out", "--steps": 2, "--batch": 2}
    arguments = [text for flag, value in given.items() for text in (flag, str(value))]
    arguments += ["--workers", "0", "--set", "device=cpu", "--set", "trackers=[]"]
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "depth: predictors of layers 4, 6 from ola.safetensors" in result.output
    assert len(metrics(tmp_path / "out")) == 2
