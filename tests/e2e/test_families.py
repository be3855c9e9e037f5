"""Every family of students through the whole trainer: falling losses, taps and positions that are what they say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_support import FAMILIES, make_checkpoint
from PIL import Image
from rich.console import Console
from run_support import prepared
from torch import Tensor
from torch.nn import functional
from trainer_support import (
    Corpus,
    conversation,
    end_all,
    make_images,
    make_store,
    metrics,
    settings,
    start_ranks,
    write_json,
)
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

import olatrain.stream
import olatrain.student
from olaschema.config import load_config
from olaschema.errors import ConfigError
from olaschema.manifest import View
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.cli import app
from olatrain.compose import load_processor, student_view
from olatrain.config import TrainConfig
from olatrain.cvbench import Question
from olatrain.evaluate import Examinee
from olatrain.prepare import prepare
from olatrain.setup import Run
from olatrain.step import run_batch
from olatrain.stream import Batch
from olatrain.tokens import Items, TaskTokens, locate
from olatrain.train import train

TEACHERS = {"depth": {"layers": [2], "weight": 2.0}, "gen": {"layers": [1, 4], "weight": 2.0}}
NAMES = [f"<ola_{teacher}_{n}>" for teacher in ("gen", "depth") for n in range(2)]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    for family in FAMILIES:
        checkpoint = make_checkpoint(root / "checkpoints" / family, family)
        prepare(checkpoint, root / family, teachers=("gen", "depth"), tokens_per_teacher=2)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Pictures of several shapes, so that tiles and grids differ; one sample shows two of them."""
    root = tmp_path_factory.mktemp("corpus")
    keys = make_images(root / "images", 6)
    for place, size in enumerate([(60, 25), (25, 60), (40, 40)]):
        path = root / "images" / keys[place]
        Image.open(path).resize(size).save(path)
    make_store(root / "store", root / "images", keys, failed={keys[4]: "gen"})
    entries = [conversation(key, f"picture {place} " + "x" * place) for place, key in enumerate(keys)]
    entries.append(conversation(None, "only text"))
    several = conversation(None, "the first", question="is <image> brighter than <image>?") | {"image": keys[:2]}
    file = write_json(root / "conversations.json", [*entries, several])
    return Corpus(root, root / "images", file, root / "store", keys)


def chosen(corpus: Corpus, student: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return settings(corpus, student, out, teachers=TEACHERS, **changes)


def fit(values: dict[str, Any]) -> None:
    train(load_config(TrainConfig, flags=values), Console(file=io.StringIO()))


# --- what an independent computation of the same batch gives


def spans_by_eye(run: Run, ids: list[int]) -> list[tuple[list[int], dict[str, list[int]]]]:
    """For each image of a prompt: positions of its base view and of its task tokens, read off the tokens' names."""
    tokens: list[str] = load_processor(run.config.student).tokenizer.convert_ids_to_tokens(ids)
    found = []
    begin = 0
    while NAMES[0] in tokens[begin:]:
        first = tokens.index(NAMES[0], begin)
        assert tokens[first : first + 4] == NAMES
        task = {"gen": [first, first + 1], "depth": [first + 2, first + 3]}
        places = [p for p in range(begin, first) if tokens[p] in ("<image>", "<|image_pad|>")]
        family = run.learner.student.model.config.model_type
        if family == "llava_next":
            places = places[:4]
        elif family == "idefics3":
            last = max(p for p in range(begin, first) if tokens[p] == "<global-img>")
            assert [p for p in places if p > last] == list(range(last + 1, last + 5))
            places = places[-4:]
        found.append((places, task))
        begin = first + 4
    return found


def losses_by_hand(run: Run, batch: Batch) -> dict[str, float]:
    """Smooth-L1 sums by teacher and layer, from transformers' own hidden states, one image at a time."""
    learner = run.learner
    totals = {"depth.2": 0.0, "gen.1": 0.0, "gen.4": 0.0}
    (micro,) = batch.micro
    bare = AutoModelForImageTextToText.from_pretrained(run.config.student, dtype=torch.float32).eval()
    with torch.no_grad():
        for teacher in ("gen", "depth"):
            latents = learner.student.latents[teacher]
            for place, id_ in enumerate(learner.tokens.ids[teacher]):
                group = len(latents) // 2
                bare.get_input_embeddings().weight[id_] = latents[place * group : (place + 1) * group].mean(dim=0)
        states = bare(**micro.inputs, output_hidden_states=True, use_cache=False).hidden_states
        image = 0
        for sample, (row, mask) in enumerate(
            zip(micro.inputs["input_ids"].tolist(), micro.inputs["attention_mask"], strict=True)
        ):
            real = row[: int(mask.sum())]
            spans = spans_by_eye(run, real)
            special = {learner.tokens.image_id, *learner.tokens.flat}
            inside = set[int]()  # between the first and the last placeholder of an image
            begin = 0
            for _, task in spans:
                marks = [p for p in range(begin, task["gen"][0]) if real[p] == learner.tokens.image_id]
                inside |= set(range(marks[0], marks[-1]))
                begin = task["depth"][1]
            for places, task in spans:
                for name in totals:
                    teacher, layer = name.split(".")
                    if batch.features[teacher].valid[image]:
                        text = [p for p, token in enumerate(real) if token not in special and p not in inside]
                        context = sorted({*places, *task[teacher], *text})
                        seen = states[int(layer)][sample : sample + 1, context]
                        queries = (
                            learner.student.latents["depth"][None]
                            if teacher == "depth"
                            else states[int(layer)][sample, task["gen"]].mean(dim=0)[None, None]
                        )
                        head = learner.bank.head(teacher, int(layer))
                        everything = torch.ones(1, len(context), dtype=torch.bool)
                        predicted = head(seen, queries, torch.zeros(1, dtype=torch.int64), everything)
                        target = batch.features[teacher].values[image].float()
                        totals[name] += float(functional.smooth_l1_loss(predicted.reshape(target.shape), target))
                image += 1
    assert image == len(batch.rows)
    return totals


def compare(run: Run) -> None:
    batch = run.collate([run.stream[p] for p in range(len(run.stream))])
    assert isinstance(batch, Batch)
    with torch.no_grad():
        totals = run_batch(run.learner, batch, run.ranks, run.means, bf16=False)
    assert [totals["depth.valid"], totals["gen.valid"]] == [8, 7]
    for name, expected in losses_by_hand(run, batch).items():
        assert totals[f"{name}.smooth_l1"] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_right_layers_at_the_right_positions(
    family: str, students: dict[str, Path], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And would not be with a tap shifted by one layer, or with positions shifted by one token."""
    values = chosen(corpus, students[family], tmp_path / "out")
    compare(prepared(values))

    with monkeypatch.context() as patch:
        honest = olatrain.student._decoder

        def shifted(model: Any, embeddings: Any) -> Any:
            decoder, layers, norm = honest(model, embeddings)
            return decoder, torch.nn.ModuleList([*layers[1:], layers[0]]), norm

        patch.setattr(olatrain.student, "_decoder", shifted)
        with pytest.raises(AssertionError, match=r"depth\.2|gen\.1"):
            compare(prepared(values))
    for field in ("image", "task"):
        with monkeypatch.context() as patch:
            patch.setattr(olatrain.stream, "locate", off_by_one(field))
            with pytest.raises(AssertionError, match=r"depth\.2|gen\.1"):
                compare(prepared(values))


def off_by_one(field: str) -> Callable[..., Items]:
    def shift(*args: Any, **kwargs: Any) -> Items:
        items = locate(*args, **kwargs)
        moved = items.image.roll(1, dims=1) if field == "image" else items.task + 1
        return Items(**{**vars(items), field: moved})

    return shift


# --- training and what comes after


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_losses_fall_and_the_exported_student_generates_as_the_trained_one(
    family: str, students: dict[str, Path], corpus: Corpus, tmp_path: Path
) -> None:
    values = chosen(corpus, students[family], tmp_path / "out", steps=14, batch=8, lr=2e-2, workers=1)
    fit(values)
    lines = metrics(tmp_path / "out")
    for teacher, layer in (("depth", "2"), ("gen", "1"), ("gen", "4")):
        first, last = (line["teachers"][teacher]["layers"][layer] for line in (lines[0], lines[-1]))
        assert last["smooth_l1"] < 0.95 * first["smooth_l1"], (teacher, layer)
        assert last["loss"] < 0.95 * first["loss"]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "out"), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    trained = prepared(values | {"steps": 14})
    from olatrain.resume import resume

    resume(trained, torch.optim.AdamW(trained.learner.trainable().values()))
    batch = question(tmp_path / "model", corpus.images / corpus.keys[0], family)
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    answers = [
        model.generate(**batch, do_sample=False, max_new_tokens=5, min_new_tokens=5)[:, batch["input_ids"].shape[1] :]
        for model in (exported, trained.learner.student.model)
    ]
    assert torch.equal(answers[0], answers[1])
    assert not set(answers[0][0].tolist()) & set(TaskTokens.load(tmp_path / "model").never_predicted)
    with torch.no_grad():
        expected = trained.learner.student(batch).logits
        torch.testing.assert_close(exported(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def question(model: Path, picture: Path, family: str) -> dict[str, Tensor]:
    """A structured and a plain prompt give the same inputs, through transformers' own processor where it loads."""
    image = Image.open(picture).convert("RGB")
    forms: list[Any] = [
        [{"type": "image"}, {"type": "text", "text": "what is it?"}],
        "<image>\nwhat is it?",
    ]
    made = []
    for content in forms:
        chat = [{"role": "user", "content": content}]
        if family == "qwen2.5-vl":
            # its processor needs torchvision; this is what it does
            tokenizer = AutoTokenizer.from_pretrained(model)
            images = AutoImageProcessor.from_pretrained(model, backend="pil")
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            found = dict(images(images=image, return_tensors="pt"))
            count = int(found["image_grid_thw"].prod()) // 4
            text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
            made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **found})
        else:
            processor = AutoProcessor.from_pretrained(model)
            processor.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            made.append(dict(processor(images=image, text=text, return_tensors="pt")))
    assert torch.equal(made[0]["input_ids"], made[1]["input_ids"])
    tokens = TaskTokens.load(model)
    ids = made[0]["input_ids"][0].tolist()
    start = ids.index(tokens.flat[0])
    assert ids[start : start + 4] == list(tokens.flat)
    assert tokens.image_id in ids[start - 2 - len(tokens.after_image) : start]
    return made[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_in_training_is_the_one_of_transformers(
    family: str, students: dict[str, Path], corpus: Corpus, tmp_path: Path
) -> None:
    """Same ids up to the answer, same pixels."""
    run = prepared(chosen(corpus, students[family], tmp_path / "out"))
    position = next(p for p in range(len(run.stream)) if run.stream.name(p) == corpus.keys[1])
    batch = run.collate([run.stream[position]])
    assert isinstance(batch, Batch)
    inputs = batch.micro[0].inputs
    expected = question(students[family], corpus.images / corpus.keys[1], family)
    length = expected["input_ids"].shape[1]
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        found = (
            inputs[name][:, :length] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else inputs[name]
        )
        if not value.is_floating_point():
            assert torch.equal(found, value), name
        else:
            torch.testing.assert_close(found, value.reshape(found.shape), rtol=0, atol=0)


def test_whole_batches_of_text_train_every_family(students: dict[str, Path], corpus: Corpus, tmp_path: Path) -> None:
    entries = [conversation(corpus.keys[0], "one picture")] + [conversation(None, f"text {n}") for n in range(5)]
    file = write_json(tmp_path / "texts.json", entries)
    for family, student in students.items():
        out = tmp_path / family
        fit(chosen(corpus, student, out, conversations=str(file), steps=None, epochs=1, batch=2))
        valid = [line["teachers"]["depth"]["valid"] for line in metrics(out)]
        assert sorted(valid) == [0, 0, 1]


def test_what_a_family_sees_and_what_prepare_refuses(students: dict[str, Path], tmp_path: Path) -> None:
    for family in ("llava-next", "idefics3", "qwen2.5-vl"):
        assert student_view(load_processor(students[family])) == View(kind="squash")
    with pytest.raises(ConfigError, match="already has <ola_gen_0>"):
        prepare(students["idefics3"], tmp_path / "out")
    config = json.loads((students["llava-llama"] / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(ConfigError, match="model of type llama"):
        prepare(tmp_path / "other", tmp_path / "out")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llava-llama")
    (checkpoint / "chat_template.jinja").write_text("{{ bos_token }}hello")
    with pytest.raises(ConfigError, match="shows no text of a user's turn"):
        prepare(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_split_language_model_trains_as_a_whole_one_whatever_its_ranks_are_shown(
    students: dict[str, Path], corpus: Corpus, tmp_path: Path
) -> None:
    """Ranks have micro-batches of several images, of text alone, and none; figures are those of one rank."""
    values = chosen(
        corpus, students["qwen2.5-vl"], tmp_path / "one", steps=3, batch=3, micro_batch=1, look_every=1,
        train=["projector", "predictors", "task_tokens", "llm"], predictions={"every": 3, "images": 3},
    )  # fmt: skip
    fit(values)
    end_all(start_ranks(values | {"out": str(tmp_path / "two"), "nproc": 2}, world=2))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["projector_gradient"] == pytest.approx(one["projector_gradient"], rel=1e-2, abs=1e-3)
    kept = [FeatureStore.open(tmp_path / out / "predictions/step-00000003/layer-02") for out in ("one", "two")]
    (mine, theirs) = ([FeatureReader(store, "depth").feature(row) for row in range(3)] for store in kept)
    np.testing.assert_allclose(theirs, mine, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_asked_together_are_answered_as_one_by_one(
    family: str, corpus: Corpus, students: dict[str, Path]
) -> None:
    examinee = Examinee(students[family], torch.device("cpu"))
    keys = sorted(path.name for path in corpus.images.iterdir())[:4]
    asked = [
        Question(key, "2D", "Count", "COCO", "how many " + "x" * 9 * place, ("1", "2", "3", "4")[: 2 + place % 3], "A",
                 (corpus.images / key).read_bytes())
        for place, key in enumerate(keys)
    ]  # fmt: skip
    together = examinee.letter_scores(asked)
    alone = [examinee.letter_scores([question])[0] for question in asked]
    assert [len(scores) for scores in together] == [2, 3, 4, 2]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert together[0] != pytest.approx(together[3], rel=1e-3)
    spoken = [answer.said for answer in examinee.answers(asked, "generate")]
    assert spoken == [examinee.answers([question], "generate")[0].said for question in asked]
    assert len(set(spoken)) == 4, "answers that are all alike would hide that one question got another's"
