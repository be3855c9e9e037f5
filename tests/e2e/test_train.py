from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_support import losses, prepared, run, weights
from safetensors.torch import load_file, save_file
from store_support import record
from torch import Tensor
from torch.nn import functional
from trainer_support import (
    Corpus,
    conversation,
    end_all,
    environment,
    make_corpus,
    make_images,
    make_store,
    make_student,
    metrics,
    records,
    run_file,
    settings,
    start_ranks,
    write_json,
)

from olaschema.config import load_config
from olaschema.errors import (
    ConfigError,
    CorpusError,
    DamagedStoreError,
    FingerprintError,
    OlaError,
    StoreError,
    ViewError,
)
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.checkpoint import CheckpointError, latest_checkpoint
from olatrain.checks import TrainingError, require_sound
from olatrain.config import TrainConfig
from olatrain.setup import Run
from olatrain.step import run_batch
from olatrain.stream import Batch, Fault


def require_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- the loss


def test_what_has_no_target_is_left_out_of_the_loss(student: Path, tmp_path: Path) -> None:
    """A text-only sample, one without features, a failed row: the loss and gradients of a computation without them."""
    keys = make_images(tmp_path / "images", 5)
    make_store(tmp_path / "store", tmp_path / "images", keys[:4], failed={keys[1]: "depth"})
    entries = [conversation(key, f"picture {'y' * n}") for n, key in enumerate(keys)]
    entries += [conversation(None, "just text, rather longer than the others"), conversation(keys[0], "again")]
    file = write_json(tmp_path / "c.json", entries)
    corpus = Corpus(tmp_path, tmp_path / "images", file, tmp_path / "store", keys)
    prepared_run = prepared(settings(corpus, student, tmp_path / "out"))
    learner = prepared_run.learner
    alone = [prepared_run.collate([prepared_run.stream[p]]) for p in range(len(entries))]
    together = prepared_run.collate([prepared_run.stream[p] for p in range(len(entries))])
    assert isinstance(together, Batch)
    totals = run_batch(learner, together, prepared_run.ranks, prepared_run.means, bf16=False)
    found = {name: parameter.grad for name, parameter in learner.trainable().items()}

    learner.zero_grad()
    expected = independent_loss(prepared_run, [batch for batch in alone if isinstance(batch, Batch)])
    torch.autograd.backward(expected)
    assert totals["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert [totals["depth.valid"], totals["gen.valid"], totals["samples"]] == [4, 5, 7]
    for name, parameter in learner.trainable().items():
        gradient = found[name]
        assert gradient is not None
        assert parameter.grad is not None, name
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-4, atol=2e-6, msg=name)
        assert gradient.abs().max() > 0 or name.endswith("projector.linear_2.bias"), name


def independent_loss(run: Run, alone: list[Batch]) -> Tensor:
    """The published loss over samples run one at a time, without padding, masks or weights of the code under test."""
    learner = run.learner
    text, tokens = torch.zeros(()), 0
    predicted: dict[tuple[str, int], list[Tensor]] = {}
    target: dict[str, list[Tensor]] = {"depth": [], "gen": []}
    rows: dict[str, list[int]] = {"depth": [], "gen": []}
    for batch in alone:
        (micro,) = batch.micro
        output = learner.student(micro.inputs)
        logits = output.logits[0, :-1].clone()
        logits[:, list(learner.tokens.never_predicted)] = -torch.inf
        for place, label in enumerate(micro.labels[0, 1:].tolist()):
            if label != -100:
                text = text - logits[place].log_softmax(dim=0)[label]
                tokens += 1
        predictions = learner.bank(output.taps, micro.items, learner.student.latents)
        for teacher, features in batch.features.items():
            if features.valid.tolist() == [True]:
                target[teacher].append(features.values[0].float().flatten())
                rows[teacher].append(int(batch.rows[0]))
                for layer in run.config.teachers[teacher].layers:
                    predicted.setdefault((teacher, layer), []).append(predictions[teacher, layer][0].flatten())
    loss = text / tokens
    for (teacher, _), flat in predicted.items():
        scale = learner.bank.logit_scales[teacher].exp()
        n = len(flat)
        for i in range(n):
            smooth = functional.smooth_l1_loss(flat[i], target[teacher][i])
            scores = []
            for j in range(n):
                if j == i or rows[teacher][j] != rows[teacher][i]:  # the same image twice is no negative
                    scores.append(scale * functional.cosine_similarity(flat[i], target[teacher][j], dim=0))
                    if j == i:
                        own = len(scores) - 1
            loss = loss + 0.5 * (smooth + 0.3 * -torch.stack(scores).log_softmax(dim=0)[own]) / n
    return loss


def test_micro_batches_change_nothing_but_memory(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(chosen(steps=3, batch=6))
    run(chosen(steps=3, batch=6, micro_batch=1, out=str(tmp_path / "micro")))
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "out"), rel=1e-5)
    for name, value in weights(tmp_path / "micro").items():
        torch.testing.assert_close(value, weights(tmp_path / "out")[name], rtol=1e-3, atol=1e-4, msg=name)


def test_only_the_chosen_groups_move(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in prepared(chosen()).learner.state().items()}
    run(chosen(steps=2, train=["projector", "task_tokens"]))
    after = weights(tmp_path / "out")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"projector", "latents"}
    assert {name.split(".")[0] for name in after} == {"projector", "latents", "predictors"}


def test_bf16_autocast_follows_float32(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(chosen(steps=2))
    assert "precision = bf16 on a CPU" in run(chosen(steps=2, precision="bf16", out=str(tmp_path / "bf16")))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "out"), rel=0.02)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())


# --- going on


def test_two_ranks_then_one_give_the_curve_of_one(
    chosen: Callable[..., dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    """The last batch has one sample: a rank without any takes part all the same."""
    heldout = {"conversations": str(corpus.conversations), "every": 2}
    values = chosen(steps=None, epochs=1, evaluation=heldout)
    run(values)
    split = values | {"out": str(tmp_path / "split"), "workers": 1}
    end_all(start_ranks(split | {"nproc": 2, "stop_after": 2}, world=2))
    assert [line["step"] for line in metrics(tmp_path / "split")] == [1, 2]
    run(split | {"nproc": 1, "workers": 2, "stop_after": 3})
    end_all(start_ranks(split | {"nproc": 3}, world=3))
    assert [line["samples"] for line in metrics(tmp_path / "split")] == [4, 4, 4, 1]
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "out"), rel=1e-5)
    one, other = (metrics(Path(out), "evaluation") for out in (values["out"], split["out"]))
    assert [line["step"] for line in one] == [line["step"] for line in other] == [0, 2, 4]
    for before, after in zip(one, other, strict=True):
        for teacher, layer in (("depth", "2"), ("gen", "1"), ("gen", "3")):
            figures = before["teachers"][teacher]["layers"][layer]
            assert after["teachers"][teacher]["layers"][layer] == pytest.approx(figures, rel=1e-4, abs=1e-5)


def test_a_step_of_text_alone_on_two_ranks(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, images=3, texts=12)
    values = settings(corpus, student, tmp_path / "one", steps=None, epochs=1, batch=2)
    run(values)
    end_all(start_ranks(values | {"out": str(tmp_path / "two"), "nproc": 2}, world=2))
    lines = metrics(tmp_path / "two")
    assert any(line["teachers"]["gen"]["valid"] == 0 and line["samples"] == 2 for line in lines)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_stopping_and_going_on_ends_with_the_same_bits(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    whole = run(chosen())
    assert "step 6/6: saved" in whole
    parts = chosen(out=str(tmp_path / "parts"))
    for stop in (1, 3, 6):
        run(parts | {"stop_after": stop})
    require_same(weights(tmp_path / "parts"), weights(tmp_path / "out"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "out")
    assert "all 6 steps are done already" in run(parts)


def test_sigkill_of_two_ranks_loses_only_the_steps_since_the_last_save(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """One rank is killed ten times in `test_elastic`."""
    values = chosen(steps=12, checkpoint_every=2, workers=1, nproc=2)
    end_all(start_ranks(values | {"out": str(tmp_path / "whole")}, 2))
    out = Path(values["out"])
    for steps in (3, 7):
        ranks = start_ranks(values, 2)
        wait_for_step(out, steps)
        for rank in ranks:
            rank.kill()
            rank.join(20)
        reached = metrics(out)[-1]["step"]
        newest = latest_checkpoint(out / "checkpoints")
        assert newest is not None
        assert steps <= reached < 12
        # the save before the last is published: a save waits for the one before it, and is written in the background
        assert reached - int(newest.name.removeprefix("step-")) <= 2 * 2
    end_all(start_ranks(values, 2))
    require_same(weights(out), weights(tmp_path / "whole"))
    assert [line["step"] for line in metrics(out)] == list(range(1, 13))
    assert losses(out) == losses(tmp_path / "whole")


def test_sigterm_saves_and_exits(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The command itself, through its launcher: both ranks stop, one message, the shell's code for the signal."""
    values = chosen(steps=100000, checkpoint_every=100000, nproc=2)
    out = Path(values["out"])
    with (tmp_path / "stderr").open("w+") as error:
        command = [sys.executable, "-m", "olatrain", "run", "--config", str(run_file(tmp_path / "run.json", values))]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=error)
        wait_for_step(out, 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        error.seek(0)
        said = error.read()
    assert said.count("error: stopped by a signal; step ") == 1
    assert "Run the same command again" in said
    assert "Traceback" not in said
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) == metrics(out)[-1]["step"]


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    path = out / "metrics.jsonl"
    while f'"event": "train", "step": {step},' not in (path.read_text(encoding="utf-8") if path.exists() else ""):
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.005)


# --- refusals


def test_a_changed_image_stops_the_run(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, images=8, texts=0)
    shutil.copy(corpus.images / corpus.keys[0], corpus.images / corpus.keys[5])
    with pytest.raises(StoreError, match=f"{corpus.keys[5]}: the image is not the one"):
        run(settings(corpus, student, tmp_path / "out", epochs=1, steps=None))


def test_a_damaged_shard_is_named(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    path = corpus.store / "gen/values/c/2/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedStoreError, match="gen/values/c/2"):
        run(settings(corpus, student, tmp_path / "out", epochs=1, steps=None))


def test_another_view_is_refused_or_allowed(
    chosen: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cropping = str(make_student(tmp_path_factory.mktemp("crop"), view="crop"))
    with pytest.raises(ViewError, match=r"depth saw the whole image, squashed .* the largest centred square"):
        run(chosen(student=cropping))
    said = run(chosen(student=cropping, allow_view_mismatch=True, steps=1))
    assert "view mismatch, allowed: depth saw the whole image" in said


def test_other_features_are_refused_by_the_pin_and_by_the_checkpoint(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    values = settings(corpus, student, tmp_path / "out", stop_after=1)
    run(values)
    pinned = json.loads((tmp_path / "out" / "config.json").read_text())
    assert pinned["fingerprints"].keys() == {"depth", "gen"}
    shutil.rmtree(corpus.store)
    changed = {
        name: record.model_copy(update={"fingerprint": record.fingerprint.model_copy(update={"weights": "other"})})
        for name, record in records().items()
    }
    make_store(corpus.store, corpus.images, corpus.keys, teachers=changed)
    with pytest.raises(FingerprintError, match=r"weights: 'w' \(in .*step-00000001\) against 'other'"):
        run(values)
    with pytest.raises(FingerprintError, match=r"weights: 'w' \(pinned\) against 'other'"):
        run(pinned | {"out": str(tmp_path / "new")})


def test_features_exchanged_while_a_run_goes_on_reach_no_figure(student: Path, tmp_path: Path) -> None:
    """Evaluations open the store anew, long after the run's fingerprints were compared with it."""
    corpus = make_corpus(tmp_path)
    values = settings(corpus, student, tmp_path / "out", evaluation={"conversations": str(corpus.conversations)})
    ready = prepared(values)
    shutil.rmtree(corpus.store)
    changed = {
        name: record.model_copy(update={"fingerprint": record.fingerprint.model_copy(update={"weights": "other"})})
        for name, record in records().items()
    }
    make_store(corpus.store, corpus.images, corpus.keys, teachers=changed)
    assert ready.heldout is not None
    fault = ready.heldout[0]
    assert isinstance(fault, Fault)
    assert isinstance(fault.error, StoreError)
    assert "features of depth are others than when the run began" in str(fault.error)


def test_one_image_has_no_other_to_be_shuffled_with(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    entries = json.loads(corpus.conversations.read_text())
    write_json(corpus.conversations, [entry for entry in entries if entry.get("image") == corpus.keys[0]])
    with pytest.raises(ConfigError, match="there is one image in the store"):
        prepared(settings(corpus, student, tmp_path / "out", target_control="shuffle"))


def test_a_continuation_must_be_of_the_same_run(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    values = settings(corpus, student, tmp_path / "out", stop_after=1)
    run(values)
    with pytest.raises(CheckpointError, match=r"other settings: steps: 6 → 9; lr: 0\.01 → 0\.5"):
        run(values | {"lr": 0.5, "steps": 9})
    entries = json.loads(corpus.conversations.read_text())
    write_json(corpus.conversations, entries[:-1])
    with pytest.raises(CheckpointError, match=r"the conversations, or the rows of the store.* changed"):
        run(values)
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run(values | {"out": str(corpus.images)})


@pytest.mark.parametrize("name", ["chat_template.jinja", "processor_config.json", "tokenizer.json", "weights"])
def test_a_student_changed_under_a_run_is_refused(name: str, corpus: Corpus, student: Path, tmp_path: Path) -> None:
    mine = tmp_path / "student"
    shutil.copytree(student, mine)
    values = settings(corpus, mine, tmp_path / "out", steps=2, stop_after=1)
    run(values)
    (mine / "README.md").write_text("notes")
    (mine / "generation_config.json").write_text("{}")
    run(values)  # nothing to do, and nothing that a run reads has changed
    if name == "weights":  # of equal size, as those of the same model trained further are
        weights = load_file(mine / "model.safetensors")
        save_file({k: v + 1 for k, v in weights.items()}, mine / "model.safetensors", {"format": "pt"})
    else:
        (mine / name).write_text((mine / name).read_text() + "\n")
    with pytest.raises(CheckpointError, match="the student's folder changed since"):
        run(values | {"stop_after": 2})


def test_wrong_inputs_are_refused(chosen: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[OlaError], str]] = [
        ({"store": str(tmp_path)}, StoreError, "missing"),
        ({"teachers": {"seg": {"layers": [1]}}}, StoreError, "no features of the teacher 'seg'"),
        ({"teachers": {"depth": {"layers": [4]}}}, ConfigError, r"3 decoder layers; \[4\] cannot be tapped"),
        ({"student": str(tmp_path)}, ConfigError, r"ola\.json cannot be read"),
        ({"nproc": 2}, ConfigError, "the launcher started 1 ranks"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(chosen(**changes))


def test_a_loss_that_is_not_finite_names_the_batch(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, texts=0, spoiled=("03.png",))
    values = settings(corpus, student, tmp_path / "out", epochs=1, steps=None, checkpoint_every=1)
    with pytest.raises(StoreError, match="row 3 of depth holds NaN or infinity"):
        run(values)
    values |= {"mean_map_rows": 1}  # the mean map's rows are a part, the batches see all
    message = r"gen\.1\.smooth_l1.* not finite: .* stored features of 03\.png \(depth\), 03\.png \(gen\)"
    with pytest.raises(TrainingError, match=message):
        run(values)
    # what is not finite for another reason is not put down to a feature
    clean = make_corpus(tmp_path / "clean", texts=0)
    with pytest.raises(TrainingError, match=r"not finite in the batch of .*\.png"):
        run(settings(clean, student, tmp_path / "far", lr=1e30, clip=1e30, steps=9))
    kept = latest_checkpoint(tmp_path / "out" / "checkpoints")
    assert kept is None or all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())


def test_an_embedding_loss_of_exactly_zero_names_the_batch(chosen: Callable[..., dict[str, Any]]) -> None:
    ready = prepared(chosen())
    batch = ready.collate([ready.stream[p] for p in range(4)])
    assert isinstance(batch, Batch)
    totals = run_batch(ready.learner, batch, ready.ranks, ready.means, bf16=False)
    require_sound(ready, totals, 1.0, 0)
    with pytest.raises(TrainingError, match=rf"gen at layer 3 is exactly 0 in the batch of {ready.stream.name(0)}"):
        require_sound(ready, totals | {"gen.3.smooth_l1": 0.0}, 1.0, 0)
    require_sound(ready, totals | {"gen.3.smooth_l1": 0.0, "gen.valid": 0.0}, 1.0, 0)


# --- what it tells, and what it needs


@pytest.mark.parametrize(("changes", "size"), [({}, 4), ({"micro_batch": 3}, 3), ({"micro_batch": 9}, 4)])
def test_too_little_memory_says_what_to_change(
    changes: dict[str, Any], size: int, chosen: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("olatrain.train.run_batch", full)
    with pytest.raises(TrainingError, match=rf"passes of {size} samples: CUDA out of memory.*2 GiB\n.*micro_batch=N"):
        run(chosen(batch=4, **changes))


def test_a_loader_process_that_is_killed_is_no_traceback(
    chosen: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_args: Any, **_kwargs: Any) -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    monkeypatch.setattr("olatrain.watch.Watch.step", killed)
    with pytest.raises(TrainingError, match=r"a loader process ended: DataLoader worker .*\n.*fewer --workers"):
        run(chosen(workers=1, steps=60))


def test_a_disk_that_takes_no_more_figures_says_so(
    chosen: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    values = chosen(steps=2, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("olatrain.watch.Watch.step", full)
        with pytest.raises(TrainingError, match=r"out cannot be written: No space left on device\nFree some space"):
            run(values)
    run(values)  # nothing else is lost


def test_skipped_images_are_recorded_and_text_alone_trains(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    (corpus.images / "04.png").unlink()
    said = run(settings(corpus, student, tmp_path / "out", steps=None, epochs=1, batch=1, trackers=["tensorboard"]))
    assert "14 samples: 11 with an image, 3 text only" in said
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["sample"], line["reason"]) for line in skipped] == [("04.png", "missing")]
    lines = metrics(tmp_path / "out")
    assert sum(line["samples"] for line in lines) == 13
    assert sum(line["skipped"] for line in lines) == 1
    assert sum(line["teachers"]["gen"]["valid"] == 0 for line in lines) == 4
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))
    (start_line,) = metrics(tmp_path / "out", "start")
    assert start_line["targets"]["depth"] == {"valid": 11, "missing": {}}


def test_samples_of_which_not_one_can_be_used_stop_the_run(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", texts=0)
    for key in corpus.keys[1:]:
        (corpus.images / key).unlink()  # one is left, or the run is refused before it starts
    with pytest.raises(TrainingError, match=r"not one of 8 samples in a row could be used"):
        run(settings(corpus, student, tmp_path / "out"))


def test_samples_held_out_that_cannot_be_used_are_counted_and_named(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    held = write_json(tmp_path / "held.json", [conversation(key, "x") for key in corpus.keys[6:9]])
    file = write_json(tmp_path / "train.json", [conversation(key, "x") for key in corpus.keys[:7]])
    (corpus.images / corpus.keys[8]).unlink()
    evaluation = {"conversations": str(held), "every": 1}
    values = settings(corpus, student, tmp_path / "out", steps=2, evaluation=evaluation, conversations=str(file))
    said = run(values)
    assert "held out: 1 of 3 images are among those trained on" in said
    assert "(1 of 3 samples skipped: skipped.jsonl)" in said
    assert [(line["samples"], line["skipped"]) for line in metrics(tmp_path / "out", "evaluation")] == [(2, 1)] * 3
    lost = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["held_out_at"], line["sample"], line["reason"]) for line in lost] == [
        (step, "08.png", "missing") for step in (0, 1, 2)
    ]
    (tmp_path / "one").mkdir()
    held = write_json(tmp_path / "one/held.json", [conversation(corpus.keys[8], "x")] * 2)
    values = settings(corpus, student, tmp_path / "two", steps=2, conversations=str(file))
    with pytest.raises(
        (TrainingError, CorpusError), match=r"not one of the 2 samples held out|holds none of the images"
    ):
        run(values | {"evaluation": {"conversations": str(held), "every": 1}})


def test_features_held_out_that_are_not_finite_are_named(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", spoiled=["08.png"])
    held = write_json(tmp_path / "held.json", [conversation(key, "x") for key in corpus.keys[6:9]])
    file = write_json(tmp_path / "train.json", [conversation(key, "x") for key in corpus.keys[:6]])
    values = settings(
        corpus, student, tmp_path / "out", conversations=str(file), mean_map_rows=4,
        evaluation={"conversations": str(held), "every": 1},
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"held out are not finite at step 0: there is NaN or infinity .*08\.png"):
        run(values)


def test_what_is_done_again_after_a_crash_stands_once_in_the_logs(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    (corpus.images / "04.png").unlink()
    values = settings(corpus, student, tmp_path / "out", steps=4, stop_after=2)
    run(values)
    out = tmp_path / "out"
    before = (out / "skipped.jsonl").read_text()
    # what a run leaves that was killed after its second step's checkpoint
    (out / "skipped.jsonl").write_text(before + '{"position": 11, "sample": "x", "reason": "r", "detail": ""}\n{"posi')
    run(values | {"stop_after": None})
    positions = [json.loads(line)["position"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len(positions) == len(set(positions))
    # and one that was killed before its first
    shutil.rmtree(out / "checkpoints")
    run(values | {"stop_after": None})
    assert len(metrics(out, "start")) == len(metrics(out, "first_batch")) == 1
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]


def test_going_on_with_features_in_another_form_is_refused(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    run(settings(corpus, student, tmp_path / "out", stop_after=2))
    told = records()
    told["depth"] = record("int8", teacher="depth", grid=(2, 2), channels=5, view="squash")
    make_store(tmp_path / "int8", corpus.images, corpus.keys, teachers=told)
    with pytest.raises(StoreError, match=r"depth is stored as float16 in .*, as int8 in the store"):
        run(settings(corpus, student, tmp_path / "out", store=str(tmp_path / "int8")))


def test_a_probe_that_would_not_be_scored_and_parts_that_are_not_there_are_refused(
    student: Path, chosen: Callable[..., dict[str, Any]]
) -> None:
    flags = chosen(stop_after=1, probe={"held_out": 0.3}, train=["predictors"], text=0.0, contrastive=0.0)
    with pytest.raises(ConfigError, match="stop_after would end a probe before it is scored"):
        load_config(TrainConfig, flags=flags)


def test_a_held_out_set_without_features_is_refused(student: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c")
    make_images(tmp_path / "more", 1)
    (corpus.images / "unseen.png").write_bytes((tmp_path / "more" / "00.png").read_bytes())
    file = write_json(tmp_path / "held.json", [conversation("unseen.png", "new")])
    changed = settings(corpus, student, tmp_path / "out", evaluation={"conversations": str(file), "every": 2})
    with pytest.raises(CorpusError, match="has no feature for any sample"):
        run(changed)


def test_the_floor_is_what_the_mean_training_map_would_get(
    chosen: Callable[..., dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    heldout = write_json(tmp_path / "held.json", [conversation(key, "x") for key in corpus.keys[6:]])
    file = write_json(tmp_path / "train.json", [conversation(key, "x") for key in corpus.keys[:6]])
    values = chosen(
        conversations=str(file), steps=2, evaluation={"conversations": str(heldout), "every": 1},
        target_control="shuffle",
    )  # fmt: skip
    run(values)
    reader = FeatureReader(FeatureStore.open(corpus.store), "depth")
    rows = np.stack([reader.feature(row).astype(np.float64).ravel() for row in range(9)])
    mean = rows[:6].mean(axis=0)
    gap = np.abs(rows[6:] - mean)
    smooth = np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
    cosine = np.mean([row @ mean / np.linalg.norm(row) / np.linalg.norm(mean) for row in rows[6:]])
    for line in metrics(tmp_path / "out", "evaluation"):
        floor = line["teachers"]["depth"]["mean_map"]
        assert floor["smooth_l1"] == pytest.approx(smooth, rel=1e-5)
        assert floor["cosine"] == pytest.approx(cosine, rel=1e-5)
        layer = line["teachers"]["depth"]["layers"]["2"]
        assert layer["loss"] == pytest.approx(layer["smooth_l1"] + 0.3 * layer["contrastive"])
