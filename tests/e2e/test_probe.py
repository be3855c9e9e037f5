"""`olatrain probe`: finds what is in the images, does not find what is not, and scores what it says it scores."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from store_support import EXECUTION, record
from torch.nn import functional
from trainer_support import Corpus, conversation, make_corpus, make_student, write_json
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from olaschema.config import load_config
from olaschema.errors import ConfigError, CorpusError
from olaschema.manifest import ChannelStatistics, RowReceipt, SampleRow
from olaschema.precision import Stored
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.cli import app
from olatrain.config import TrainConfig
from olatrain.conversations import Conversations
from olatrain.export import load_trained
from olatrain.join import Listing, join
from olatrain.parallel import Ranks
from olatrain.probe import LayerScore, read_result, run_probe, suggest
from olatrain.probebank import ProbeBank, split_by_image
from olatrain.resume import resume
from olatrain.setup import Run, set_up
from olatrain.tokens import Items

IMAGES = 24


def make_colours(root: Path) -> Corpus:
    """Plain pictures of random colours; `colour` is that colour, `noise` has nothing to do with the picture."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    keys = [f"{n:02d}.png" for n in range(IMAGES)]
    colours = rng.integers(0, 256, (IMAGES, 3))
    for key, colour in zip(keys, colours, strict=True):
        Image.new("RGB", (28, 28), tuple(colour.tolist())).save(root / "images" / key)
    noise = rng.normal(size=(IMAGES, 2, 2, 8))
    centred = (colours - 127.5) / 40
    # of mean 0 and deviation 1 over channels, which is what a predictor's last layer norm can give
    codes = np.concatenate([centred, -centred, np.full((IMAGES, 1), 2.0), np.full((IMAGES, 1), -2.0)], axis=1)
    patches = np.broadcast_to((codes / codes.std(axis=1, keepdims=True))[:, None, None], noise.shape)
    store = FeatureStore.create(root / "store", rows_per_shard=8)
    store.add_generation(SampleRow(row=0, key=key, uri=key, size=1) for key in keys)
    for name, features in (("colour", patches), ("noise", noise)):
        teacher = record("float32", teacher=name, grid=(2, 2), channels=8)
        store.put_teacher(teacher)
        for shard in range(store.shard_count()):
            values = features[shard * 8 : shard * 8 + 8].astype(np.float32)
            statistics = ChannelStatistics(8)
            statistics.update(values)
            digests = [hashlib.sha256((root / "images" / s.key).read_bytes()) for s in store.shard_samples(shard)]
            rows = [RowReceipt(status="ok", sha256=d.hexdigest(), width=28, height=28) for d in digests]
            store.commit_shard(teacher, shard, Stored(values), rows, statistics, EXECUTION)
    entries = [conversation(key, f"answer {n}") for n, key in enumerate(keys)]
    entries += [conversation(keys[3], "again"), conversation(None, "text alone")]
    return Corpus(root, root / "images", write_json(root / "c.json", entries), root / "store", keys)


def arguments(corpus: Corpus, student: Path, out: Path, *more: str) -> list[str]:
    given = {"student": student, "store": corpus.store, "conversations": corpus.conversations, "images": corpus.images}
    flags = [text for name, value in (given | {"out": out}).items() for text in (f"--{name}", str(value))]
    fast = ["--batch", "18", "--workers", "0", "--held-out", "0.25", "--lr", "1e-2"]
    return ["probe", *flags, *fast, "--set", "device=cpu", "--set", "trackers=[]", *more]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It was composed for gen and depth; that a probe asks for other teachers must not matter."""
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def probed(student: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("probe") / "out"
    more = ("--teacher", "colour", "--teacher", "noise", "--steps", "80")
    result = CliRunner().invoke(app, arguments(corpus, student, out, *more))
    assert result.exit_code == 0, (result.output, result.exception)
    return out, result.output


def prepared(out: Path) -> Run:
    config = load_config(TrainConfig, file=out / "config.json")
    return set_up(config, Ranks(0, 1, torch.device("cpu")))


def test_what_is_in_the_image_is_found_and_what_is_not_is_not(probed: tuple[Path, str]) -> None:
    out, printed = probed
    result = read_result(out)
    assert (result.trained_on, result.held_out, result.context, result.steps) == (18, 6, "image", 80)
    colour, noise = result.teachers["colour"], result.teachers["noise"]
    assert list(colour.layers) == [1, 2, 3]
    assert all(score.r2 is not None and score.r2 > 0.5 for score in colour.layers.values())
    assert all(score.r2 is not None and score.r2 < 0.05 for score in noise.layers.values())
    assert all(score.cosine > colour.mean_map_cosine + 0.1 for score in colour.layers.values())
    assert len(colour.suggested) == 2
    assert noise.suggested == ()
    assert f"--layers colour={','.join(map(str, colour.suggested))}" in printed
    assert "noise: no layer does better than the mean map" in printed
    assert "mean map" in printed


def test_the_scores_are_those_of_the_trained_probes_on_unseen_images(probed: tuple[Path, str], corpus: Corpus) -> None:
    out, _ = probed
    run = prepared(out)
    resume(run, torch.optim.AdamW(run.learner.trainable().values()))
    assert run.heldout is not None
    samples = [run.heldout[p] for p in range(len(run.heldout))]
    trained_on = {run.stream.name(p) for p in range(len(run.stream))}
    unseen = [sample.keys[0] for sample in samples]
    assert sorted([*trained_on, *unseen]) == corpus.keys
    reader = FeatureReader(FeatureStore.open(corpus.store), "colour")
    rows = {sample.key: sample.row for sample in FeatureStore.open(corpus.store).samples()}
    targets = torch.stack([torch.from_numpy(reader.feature(rows[key])) for key in unseen])
    mean = torch.stack([torch.from_numpy(reader.feature(rows[key])) for key in trained_on]).mean(dim=0)
    batch = run.collate(samples)
    (micro,) = batch.micro
    with torch.no_grad():
        output = run.learner.student(micro.inputs)
        predictions = run.learner.bank(output.taps, micro.items, {})
    found = read_result(out).teachers["colour"]
    for layer, score in found.layers.items():
        predicted = predictions["colour", layer]
        r2 = 1 - (targets - predicted).square().sum() / (targets - mean).square().sum()
        cosine = functional.cosine_similarity(predicted.flatten(1), targets.flatten(1)).mean()
        assert score.r2 == pytest.approx(r2.item(), abs=1e-4)
        assert score.cosine == pytest.approx(cosine.item(), abs=1e-5)
    floor = functional.cosine_similarity(mean.expand_as(targets).flatten(1), targets.flatten(1)).mean()
    assert found.mean_map_cosine == pytest.approx(floor.item(), abs=1e-5)


@pytest.mark.parametrize("start", ["mean", "random"])
def test_a_probe_that_has_learnt_nothing_is_the_mean_map(
    student: Path, corpus: Corpus, tmp_path: Path, start: str
) -> None:
    out = tmp_path / "out"
    more = ("--teacher", "colour", "--steps", "1", "--lr", "1e-9", "--set", f"probe.start={start}")
    result = CliRunner().invoke(app, arguments(corpus, student, out, *more))
    assert result.exit_code == 0, (result.output, result.exception)
    found = read_result(out)
    assert found.start == start
    scores = found.teachers["colour"].layers.values()
    if start == "mean":
        assert all(score.r2 == pytest.approx(0, abs=1e-4) for score in scores)
        assert all(
            score.cosine == pytest.approx(found.teachers["colour"].mean_map_cosine, abs=1e-4) for score in scores
        )
    else:
        assert all(score.r2 is not None and score.r2 < -0.1 for score in scores)


def test_the_student_stays_as_it_is_and_is_asked_as_it_is(probed: tuple[Path, str], student: Path) -> None:
    """Nothing but the probes trains, and the task tokens are the folder's own rows, not fresh vectors."""
    run = prepared(probed[0])
    assert all(name.startswith("predictors.") for name in run.learner.trainable())
    model = LlavaForConditionalGeneration.from_pretrained(student)
    sample = run.collate([run.stream[0]]).micro[0].inputs
    with torch.no_grad():
        ours, theirs = run.learner.student(sample).logits, model(**sample).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "read"), [("image", "image"), ("prompt", "image before"), ("all", "image before after")]
)
def test_a_probe_reads_the_context_and_no_task_token(probed: tuple[Path, str], context: str, read: str) -> None:
    run = prepared(probed[0])
    config = run.config.model_copy(update={"context": context})
    bank = ProbeBank(config, config.fingerprints, 16)
    items = run.collate([run.stream[0], run.stream[1]]).micro[0].items
    taps = {n: torch.randn(2, items.image.shape[1], 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3)}
    expected = bank(taps, items, {})

    def changed(mask: torch.Tensor) -> bool:
        other = {n: torch.where(mask[:, :, None], tap + 1.0, tap) for n, tap in taps.items()}
        found = bank(other, items, {})
        same = [torch.allclose(found[key], expected[key], atol=1e-6) for key in expected]
        assert len(set(same)) == 1
        return not same[0]

    task = torch.zeros_like(items.image).scatter(1, items.task.flatten(1), True)
    assert task.any()
    assert not changed(task)
    assert not changed(items.padding)
    for part in ("image", "before", "after"):
        assert changed(getattr(items, part)) == (part in read.split()), part
    assert isinstance(items, Items)


# --- which images are held out


def listing(corpus: Corpus, path: Path, entries: list[Any]) -> Listing:
    return join(Conversations.read(write_json(path, entries)), FeatureStore.open(corpus.store))


def test_each_image_is_used_once_and_in_one_part_whatever_the_order(corpus: Corpus, tmp_path: Path) -> None:
    entries = json.loads(corpus.conversations.read_text())
    entries.append(conversation("elsewhere.png", "not in the store"))
    forward = split_by_image(listing(corpus, tmp_path / "a.json", entries), held_out=0.25, seed=0)
    backward = split_by_image(listing(corpus, tmp_path / "b.json", entries[::-1]), held_out=0.25, seed=0)
    for one, other in zip(forward, backward, strict=True):
        assert sorted(one.conversations.keys) == sorted(other.conversations.keys)
    train, held = forward
    assert sorted([*train.conversations.keys, *held.conversations.keys]) == [(key,) for key in corpus.keys]
    assert len(held) == 6
    whole = listing(corpus, tmp_path / "c.json", entries)
    by_key = {sample.key: sample.row for sample in FeatureStore.open(corpus.store).samples()}
    for part in forward:
        assert part.digest != whole.digest
        for place, (key,) in enumerate(part.conversations.keys):
            assert part.rows[place] == by_key[key]
            assert part.conversations[place].key == key
            assert part.conversations[place].turns[1].text == f"answer {int(key[:2])}"
    copies = {row: row for row in whole.image_rows.tolist()}
    last, before = sorted(row for row in copies if row >= 0)[-2:]
    twins = split_by_image(whole, held_out=0.25, seed=0, same=copies | {last: before, before: before})
    assert sum(map(len, twins)) == sum(map(len, split_by_image(whole, held_out=0.25, seed=0))) - 1
    other_seed = split_by_image(whole, held_out=0.25, seed=1)
    assert set(other_seed[1].conversations.keys) != set(held.conversations.keys)
    for share, count in ((0.01, 1), (0.99, IMAGES - 2)):
        assert len(split_by_image(whole, held_out=share, seed=0)[1]) == count


@pytest.mark.parametrize("images", [1, 2])
def test_too_few_images_cannot_be_split(corpus: Corpus, tmp_path: Path, images: int) -> None:
    entries = [conversation(key, answer) for key in corpus.keys[:images] for answer in "ab"]
    entries.append(conversation(None, "c"))
    with pytest.raises(CorpusError, match=f"{images} of its images are in the store, a probe needs 3"):
        split_by_image(listing(corpus, tmp_path / "a.json", entries), held_out=0.5, seed=0)


# --- results


def test_layers_are_suggested_by_r2_and_only_above_the_mean_map() -> None:
    scores = {n: LayerScore(cosine=0.9, r2=r2, smooth_l1=0.1) for n, r2 in enumerate((0.1, 0.4, None, 0.4, -1.0), 1)}
    assert suggest(scores) == (2, 4)
    assert suggest({1: scores[1], 5: scores[5]}) == (1,)
    assert suggest({3: scores[3], 5: scores[5]}) == ()


def test_students_are_compared_on_the_same_images_only(
    probed: tuple[Path, str], student: Path, corpus: Corpus, tmp_path: Path
) -> None:
    first, _ = probed
    assert (first / "probe.png").read_bytes().startswith(b"\x89PNG")
    compared = ("--teacher", "colour", "--steps", "1", "--compare", str(first))
    result = CliRunner().invoke(app, arguments(corpus, student, tmp_path / "second", *compared))
    assert result.exit_code == 0, (result.output, result.exception)
    other = arguments(corpus, student, tmp_path / "third", *compared, "--set", "probe.start=random")
    start = CliRunner().invoke(app, other)
    assert isinstance(start.exception, ConfigError)
    assert "started at mean, these at random (probe.start)" in str(start.exception)
    again = CliRunner().invoke(app, arguments(corpus, student, tmp_path / "third", *compared, "--seed", "5"))
    assert isinstance(again.exception, ConfigError)
    assert "was scored on other images" in str(again.exception)
    assert not (tmp_path / "third").exists(), "it was refused after the probes had trained"
    missing = CliRunner().invoke(
        app, arguments(corpus, student, tmp_path / "fourth", "--teacher", "colour", "--compare", str(tmp_path))
    )
    assert isinstance(missing.exception, ConfigError)
    assert not (tmp_path / "fourth").exists()


def test_without_matplotlib_there_is_a_table_and_no_plot(
    probed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that is done is not done again: the same command shows its scores."""
    out, _ = probed
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    (out / "probe.png").unlink()
    before = (out / "probe.json").read_bytes()
    text = io.StringIO()
    run_probe(load_config(TrainConfig, file=out / "config.json"), Console(file=text, width=200))
    assert "matplotlib is not installed: no plot" in text.getvalue()
    assert not (out / "probe.png").exists()
    assert (out / "probe.json").read_bytes() == before


def test_the_published_protocol_and_its_warning(student: Path, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, arguments(corpus, student, out, "--teacher", "colour", "--published"))
    assert result.exit_code == 0, (result.output, result.exception)
    saved = json.loads((out / "config.json").read_text())
    assert (saved["context"], saved["epochs"], saved["contrastive"]) == ("all", 2, 0.0)
    assert saved["probe"]["start"] == read_result(out).start == "random"
    assert "the probes read the answer's states too" in result.output
    assert read_result(out).steps == 2


def test_a_probe_is_not_exported_and_trains_nothing_else(probed: tuple[Path, str]) -> None:
    with pytest.raises(ConfigError, match="is a probe, which leaves its student as it was"):
        load_trained(probed[0])
    with pytest.raises(ConfigError, match="a probe trains the predictors alone"):
        load_config(TrainConfig, file=probed[0] / "config.json", flags={"train": ["projector"]})


def test_features_of_both_kinds_are_probed(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", images=5)
    more = ("--teacher", "gen", "--teacher", "depth", "--steps", "1")
    result = CliRunner().invoke(app, arguments(corpus, student, tmp_path / "out", *more))
    assert result.exit_code == 0, (result.output, result.exception)
    assert set(read_result(tmp_path / "out").teachers) == {"gen", "depth"}
