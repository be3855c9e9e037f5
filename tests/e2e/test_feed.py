"""The multi-encoder baseline: features as inputs of the student, in training, after it, and where they are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_support import losses, prepared, require_gradients, run, weights, whole_gradients
from safetensors.torch import load_file
from trainer_support import Corpus, end_all, make_corpus, make_student, metrics, records, settings, start_ranks
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from olaschema.config import load_config
from olaschema.errors import ConfigError, FingerprintError, ViewError
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.cli import app
from olatrain.config import TrainConfig
from olatrain.cvbench import read_questions
from olatrain.evaluate import Examinee
from olatrain.export import export
from olatrain.feed import Fed, FeedProjector
from olatrain.probe import fed_teachers
from olatrain.setup import Run
from olatrain.sidecar import Sidecar
from olatrain.step import fed_features, run_batch
from olatrain.stream import Batch, Sample

MISSING = "03.png"
GEN = {"gen": {"layers": [1, 3]}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), texts=2, failed={MISSING: "depth"})


def shown(ready: Run) -> list[str]:
    """Keys of all images of an epoch, in order of position and appearance."""
    samples = [ready.stream[position] for position in range(len(ready.stream))]
    return [key for sample in samples if isinstance(sample, Sample) for key in sample.keys]


def batch_of(ready: Run, count: int) -> Batch:
    found = ready.collate([ready.stream[position] for position in range(count)])
    assert isinstance(found, Batch)
    return found


@pytest.mark.parametrize("shape", [(3, 4, 5), (5,)])
def test_a_map_is_averaged_in_consecutive_groups_and_a_vector_repeated(shape: tuple[int, ...]) -> None:
    """As published: avg_pool1d over the vectors row by row, then Linear, GELU, Linear; here in numpy."""
    torch.manual_seed(0)
    projector = FeedProjector(shape, 6, torch.randn(7))
    values = torch.randn(3, *shape).half()
    values[1] = torch.nan
    found = projector(Fed(values, torch.tensor([True, False, True])))
    first, second = projector.linear_1, projector.linear_2
    for item in (0, 2):
        vectors = values[item].double().numpy().reshape(-1, 5)
        for token in range(6):
            pooled = vectors[2 * token : 2 * token + 2].mean(axis=0) if len(shape) == 3 else vectors[0]
            hidden = torch.from_numpy(pooled) @ first.weight.double().t() + first.bias.double()
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
            expected = hidden @ second.weight.double().t() + second.bias.double()
            torch.testing.assert_close(found[item, token].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], projector.missing.expand(6, -1))
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in projector.parameters() if p.grad is not None)
    assert projector.missing.grad is not None
    torch.testing.assert_close(projector.missing.grad, torch.full((7,), 6.0))
    assert projector(Fed(values[:0], torch.zeros(0, dtype=torch.bool))).shape == (0, 6, 7)


def test_features_stand_behind_their_image_and_gradients_reach_the_projectors(corpus: Corpus, student: Path) -> None:
    """What enters the first block, place by place; swapping features of two images swaps it, and changes the logits."""
    ready = prepared(settings(corpus, student, corpus.root / "unused", teachers=GEN, feed="depth", micro_batch=2))
    learner = ready.learner
    count = len(ready.stream)
    batch = batch_of(ready, count)
    parts = run_batch(learner, batch, ready.ranks, ready.means, bf16=False)
    gradients = {}
    for name, parameter in learner.student.feeds.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        gradients[name] = parameter.grad.clone()
    learner.zero_grad()
    whole = replace(ready.collate, micro_batch=None)([ready.stream[position] for position in range(count)])
    assert isinstance(whole, Batch)
    assert run_batch(learner, whole, ready.ranks, ready.means, bf16=False)["loss"] == pytest.approx(parts["loss"])
    for name, parameter in learner.student.feeds.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    fed = fed_features(learner, batch, ready.ranks.device)["depth"]
    keys = shown(ready)
    assert fed.valid.tolist() == [key != MISSING for key in keys]
    stored = FeatureReader(FeatureStore.open(str(corpus.store)), "depth")
    for key, values, valid in zip(keys, fed.values, fed.valid, strict=True):
        if valid:  # rows of the store are in the order of the keys
            assert np.array_equal(values.float().numpy(), stored.feature(corpus.keys.index(key)))
    first = swaps = 0
    ids = torch.tensor(learner.tokens.ids["depth"])
    with torch.no_grad():
        for micro in batch.micro:
            here = slice(first, first + len(micro.items))
            own = Fed(fed.values[here], fed.valid[here])
            first += len(micro.items)
            out = learner.student(micro.inputs, fed={"depth": own})
            expected = learner.student.feeds.projector("depth")(own)
            for item, sample in enumerate(micro.items.sample.tolist()):
                places = micro.items.task[item, 1]
                assert torch.equal(micro.inputs["input_ids"][sample, places], ids)
                torch.testing.assert_close(out.entry[sample, places], expected[item])
            if len(own.valid) == 2 and own.valid.all() and not torch.equal(*own.values):
                swaps += 1
                swapped = learner.student(micro.inputs, fed={"depth": Fed(own.values.flip(0), own.valid)})
                for item, sample in enumerate(micro.items.sample.tolist()):
                    places = micro.items.task[item, 1]
                    torch.testing.assert_close(swapped.entry[sample, places], expected[1 - item])
                    after = int(places.max()) + 1
                    assert (swapped.logits[sample, after:] - out.logits[sample, after:]).abs().max() > 1e-3
                    before = int(places.min())
                    torch.testing.assert_close(swapped.logits[sample, :before], out.logits[sample, :before])
    assert swaps
    with pytest.raises(ConfigError, match="is fed features of depth, and none are given"):
        learner.student(batch.micro[0].inputs)
    with pytest.raises(ConfigError, match="features of 5 images"):
        learner.student(batch.micro[0].inputs, fed={"depth": Fed(torch.zeros(5, 2, 2, 5), torch.ones(5).bool())})


def test_it_trains_is_saved_and_resumed_and_goes_on_in_the_next_stage(
    corpus: Corpus, student: Path, tmp_path: Path
) -> None:
    values = settings(
        corpus, student, tmp_path / "first", teachers=GEN, feed="depth", lrs={"feed": 0.02}, preset="pretrain"
    )
    values |= {"precision": "float32"}
    said = run(values)
    assert "feed 384 at 0.02" in said  # (5 + 1) · 16 + (16 + 1) · 16 + 16
    assert "depth: 10 of 11 are fed (without: 1 not-finite)" in said
    lines = metrics(tmp_path / "first")
    assert sum(line["fed"]["depth"]["missing"] for line in lines) >= 1
    assert sum(line["fed"]["depth"]["images"] for line in lines) > 10
    again = values | {"out": str(tmp_path / "again")}
    run(again | {"stop_after": 3})
    run(again)
    whole, parts = weights(values["out"]), weights(again["out"])
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    start = prepared(values).learner.state()
    moved = {name for name, value in whole.items() if not torch.equal(value, start[name])}
    assert {name for name in whole if name.startswith("feeds.depth.")} <= moved
    assert not any(name.startswith("latents.depth") for name in whole)

    export(tmp_path / "first", tmp_path / "model")
    sidecar = Sidecar.load(tmp_path / "model")
    assert sidecar is not None
    assert list(sidecar.record.feeds) == ["depth"]
    assert {record.fingerprint.teacher for record in sidecar.record.teachers} == {"depth", "gen"}
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    ids = list(prepared(values).learner.tokens.ids["depth"])
    rows = plain.get_input_embeddings().weight[ids]
    torch.testing.assert_close(rows, whole["feeds.depth.missing"].expand(2, -1))
    card = (tmp_path / "model/README.md").read_text()
    assert "needs features of depth" in card

    stage = {**values, "student": str(tmp_path / "model"), "out": str(tmp_path / "tuned"), "preset": "finetune"}
    stage |= {"steps": 2, "lr": 1e-3}
    del stage["teachers"], stage["lrs"]
    with pytest.raises(ConfigError, match="is fed features of depth, and this run does not feed them"):
        run({name: value for name, value in stage.items() if name not in ("feed", "store")})
    begun = prepared(stage).learner
    for name, value in begun.student.feeds.projectors.state_dict().items():
        assert torch.equal(value, whole[f"feeds.{name}"])
    said = run(stage)
    assert "trains: projector 544 at 0.001, feed 384 at 0.001, llm " in said
    tuned = weights(tmp_path / "tuned")
    assert not torch.equal(tuned["feeds.depth.linear_1.weight"], whole["feeds.depth.linear_1.weight"])


@pytest.mark.parametrize("llm", [False, True])
def test_ranks_feed_what_one_does(corpus: Corpus, student: Path, tmp_path: Path, llm: bool) -> None:
    """The loss curve of one rank, whether the language model is whole or split over the ranks.

    Text alone, an image without a feature, and a last batch that leaves a rank without any sample.
    """
    groups = ["projector", "predictors", "task_tokens", "feed", *(["llm"] if llm else [])]
    values = settings(corpus, student, tmp_path / "one", teachers=GEN, feed="depth", train=groups)
    values |= {"steps": None, "epochs": 1, "batch": 3, "lr": 3e-3}
    assert len(prepared(values).stream) % 3 == 1
    run(values)
    two = values | {"out": str(tmp_path / "two"), "nproc": 2, "micro_batch": 1}
    gradients = tmp_path / "gradients.safetensors"
    end_all(start_ranks(two, world=2, gradients=gradients))
    found = load_file(gradients)
    require_gradients(found, whole_gradients(values))
    assert {name for name in found if name.startswith("feeds.")} == {
        f"feeds.depth.{name}"
        for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias", "missing")
    }
    assert losses(two["out"]) == pytest.approx(losses(values["out"]), rel=1e-5)
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["fed"] == other["fed"]
    missing = sum(line["fed"]["depth"]["missing"] for line in metrics(tmp_path / "two"))
    assert missing == 1
    after, expected = weights(two["out"]), weights(values["out"])
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-2, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def exported(corpus: Corpus, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    run(settings(corpus, student, folder / "run", teachers={}, feed="depth,gen", steps=2))
    export(folder / "run", folder / "model")
    return folder / "model"


def test_a_fed_student_is_scored_with_features_found_by_the_images_bytes(
    corpus: Corpus, exported: Path, tmp_path: Path
) -> None:
    """Likelihoods equal those worked out with the features of the store's own rows; one image is in no store."""
    bench = tmp_path / "bench"
    bench.mkdir()
    rows = []
    for number, key in enumerate([*corpus.keys[:3], MISSING]):
        image = (corpus.images / key).read_bytes()
        rows.append(
            {
                "type": "3D", "task": "Depth", "source": "Omni3D", "question": "?", "choices": ["a", "b"],
                "answer": "(A)", "prompt": f"Which? {number}\n(A) a (B) b", "image": {"bytes": image, "path": None},
            }
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), bench / "test_3d.parquet")
    flags = ["eval", "--student", str(exported), "--cv-bench", str(bench), "--out", str(tmp_path / "scores.json")]
    flags += ["--method", "likelihood"]
    refused = CliRunner().invoke(app, flags)
    assert isinstance(refused.exception, ConfigError)
    assert "is fed features of" in str(refused.exception)
    done = CliRunner().invoke(app, [*flags, "--store", str(corpus.store)])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["fed"] == {"depth": {"images": 3, "missing": 1}, "gen": {"images": 4, "missing": 0}}
    assert "fed features of depth for 3 questions, none for 1" in done.output

    examinee = Examinee(exported, torch.device("cpu"), store=str(corpus.store))
    values = settings(corpus, exported, tmp_path / "unused", teachers={}, feed="depth,gen")
    ready = prepared(values)
    batch = batch_of(ready, len(ready.stream))
    fed = fed_features(ready.learner, batch, ready.ranks.device)
    keys = shown(ready)
    for key in [*corpus.keys[:3], MISSING]:
        theirs = examinee._features.find((corpus.images / key).read_bytes(), torch.device("cpu"))
        for teacher in ("depth", "gen"):
            own = fed[teacher].part(keys.index(key), 1)
            assert torch.equal(theirs[teacher].valid, own.valid)
            if bool(own.valid):
                torch.testing.assert_close(theirs[teacher].values, own.values.float())
    question = next(iter(read_questions(bench)))
    (answer,) = examinee.answers([question], "generate")
    assert isinstance(answer.said, str)
    inputs = examinee._inputs([question])
    given = examinee._features.find(question.image, torch.device("cpu"))
    with torch.no_grad():
        ours = ready.learner.student(inputs, fed=given).logits
        with examinee._feeds.given(given):
            theirs_logits = examinee._model(**inputs).logits
    torch.testing.assert_close(theirs_logits, ours, rtol=1e-4, atol=1e-5)


def test_what_is_fed_must_be_what_the_student_sees_and_not_the_answer(
    corpus: Corpus, student: Path, exported: Path, tmp_path: Path
) -> None:
    other = make_corpus(tmp_path / "other", teachers=records(view="crop"))
    for allowed in (False, True):
        values = settings(other, student, tmp_path / "out", teachers={}, feed="depth", allow_view_mismatch=allowed)
        with pytest.raises(ViewError, match="not of the student's own view: depth saw the largest centred square"):
            prepared(values)
    base = settings(corpus, student, tmp_path / "out")
    for changes, message in (
        ({"feed": "depth"}, "depth is fed and predicted"),
        ({"teachers": {}, "feed": "depth,depth"}, "names a teacher twice"),
        ({"train": ["projector", "feed"]}, "train names feed, but no teacher is fed"),
        ({"teachers": {}, "feed": "depth", "store": None}, "store is missing"),
    ):
        given = {name: value for name, value in (base | changes).items() if value is not None}
        with pytest.raises(ConfigError, match=message):
            load_config(TrainConfig, flags=given)
    none = make_student(tmp_path / "none", task_tokens=0)
    with pytest.raises(ConfigError, match="no task tokens to put features at"):
        prepared(base | {"student": str(none), "teachers": {}, "feed": "depth"})
    elsewhere = {"depth": records()["depth"]}
    fingerprint = elsewhere["depth"].fingerprint.model_copy(update={"preset": "other"})
    elsewhere["depth"] = elsewhere["depth"].model_copy(update={"fingerprint": fingerprint})
    changed = make_corpus(tmp_path / "changed", teachers=records() | elsewhere)
    with pytest.raises(FingerprintError, match="preset"):
        Examinee(exported, torch.device("cpu"), store=str(changed.store))
    with pytest.raises(ConfigError, match="is fed no features"):
        Examinee(student, torch.device("cpu"), store=str(corpus.store))


def test_a_fed_student_is_probed_as_it_is_used(corpus: Corpus, exported: Path, tmp_path: Path) -> None:
    """The states that a probe reads are those of the fed student, here beside the trained one's."""
    assert fed_teachers(exported) == ["depth", "gen"]
    values = settings(
        corpus, exported, tmp_path / "probe", teachers={"gen": {"layers": [2]}}, train=["predictors"], text=0
    )
    values |= {"probe": {"held_out": 0.2}, "contrastive": 0.0, "context": "image"}
    ready = prepared(values | {"feed": fed_teachers(exported)})
    batch = batch_of(ready, 4)
    fed = fed_features(ready.learner, batch, ready.ranks.device)
    used = prepared(settings(corpus, exported, tmp_path / "unused", teachers={}, feed="depth,gen"))
    with torch.no_grad():
        probed = ready.learner.student(batch.micro[0].inputs, fed=fed)
        trained = used.learner.student(batch.micro[0].inputs, fed=fed)
    torch.testing.assert_close(probed.logits, trained.logits)
    assert np.isfinite(run_batch(ready.learner, batch, ready.ranks, ready.means, bf16=False)["loss"])
    assert not any(name.startswith("feeds") for name in ready.learner.trainable())
    with pytest.raises(ConfigError, match="is fed features of depth, gen, and this run does not feed them"):
        prepared(values)
