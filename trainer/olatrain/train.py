"""The training loop: batches in order, one global step at a time, saved so that a rerun goes on where it stopped."""

from __future__ import annotations

import errno
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from olaschema.errors import ConfigError
from olatrain.checkpoint import Saver
from olatrain.checks import TrainingError, names_at, require_scored, require_sound
from olatrain.config import TrainConfig
from olatrain.groups import by_group
from olatrain.insight import Insight, due, merged
from olatrain.losses import MAX_TEMPERATURE
from olatrain.meter import add_totals, figures
from olatrain.order import PositionSampler
from olatrain.parallel import Ranks, open_ranks
from olatrain.predicted import keep_predictions
from olatrain.resume import Progress, resume, save, saver, write_config
from olatrain.setup import Run, locked, set_up
from olatrain.signals import Stopped, StopRequest
from olatrain.step import run_batch
from olatrain.stream import Batch, Fault, SampleStream, make_loader
from olatrain.trackers import open_trackers
from olatrain.watch import SKIPPED, Watch, below_mean_map, forget_skips, record_skips, summary

# A whole batch that cannot be used is no accident, unless batches are this small.
_MOST_UNUSED = 8


def train(config: TrainConfig, console: Console) -> None:
    """Train from the newest checkpoint in `config.out`, or from the start.

    Raises the errors of `set_up`, CheckpointError, TrainingError for a loss that is not finite or is zero without
    reason, or where memory or disk do not suffice, and Stopped after a signal.
    """
    config.require_inputs()
    with (
        open_ranks(config.device, nproc=config.nproc, negatives=config.negatives) as ranks,
        locked(config.out, ranks),
        StopRequest() as stop,
    ):
        torch.manual_seed(config.seed + ranks.rank)
        with _explained(config, ranks):
            run = set_up(config, ranks)
        if ranks.first and ranks.device.type == "cpu" and config.precision == "bf16":
            text = "precision = bf16 on a CPU: one that has no bfloat16 arithmetic is faster with --precision float32"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        optimiser = make_optimiser(run)
        with _explained(config, ranks):
            progress = resume(run, optimiser)
        if progress.step == run.steps:
            if ranks.first:
                text = f"{config.out}: all {run.steps} steps are done already"
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        if ranks.first:
            forget_skips(config.out, progress.step, progress.position)
        ranks.barrier()  # before any rank adds to it
        with _explained(config, ranks):
            watch = _watch(run, progress, console) if ranks.first else None
            try:
                if progress.step == 0:
                    _evaluate(run, 0, watch)
                _loop(run, optimiser, progress, stop, watch)
            finally:
                if watch is not None:
                    watch.close()


@contextmanager
def _explained(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Turn what a machine runs out of into a TrainingError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_large(config, ranks, error) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch has no class of its own for it
            raise
        raise TrainingError(
            f"a loader process ended: {str(error).splitlines()[0]}",
            "Has this machine too little memory? Take fewer --workers, then run the same command again.",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"{config.out} cannot be written: {error.strerror}",
            "Free some space, then run the same command again: it goes on from the last checkpoint.",
        ) from error


def _too_large(config: TrainConfig, ranks: Ranks, error: torch.OutOfMemoryError) -> TrainingError:
    own = -(-config.batch // ranks.world)
    size = min(config.micro_batch or own, own)
    smaller = "" if config.gradient_checkpointing else ", or gradient_checkpointing=true"
    return TrainingError(
        f"the device has too little memory for passes of {size} samples: {str(error).splitlines()[0]}",
        f"Run fewer at a time (--set micro_batch=N, results stay the same){smaller}, then run the same command again.",
    )


def make_optimiser(run: Run) -> torch.optim.AdamW:
    """AdamW over the parameters that train, by group; `peak` is a group's learning rate after the warm-up."""
    config = run.config
    groups = [
        {
            "params": list(parameters.values()),
            "peak": config.lrs.get(group, config.lr),
            "weight_decay": config.weight_decays.get(group, config.weight_decay),
        }
        for group, parameters in by_group(run.learner.trainable()).items()
    ]
    if not groups:
        raise ConfigError(
            f"nothing trains: this student has no parameters of {', '.join(config.train)}", "Name others in train."
        )
    return torch.optim.AdamW(groups)


def _loop(
    run: Run, optimiser: torch.optim.Optimizer, progress: Progress, stop: StopRequest, watch: Watch | None
) -> None:
    config, ranks = run.config, run.ranks
    parameters = list(run.learner.trainable().values())
    last = min(run.steps, config.stop_after or run.steps)
    step, position, unused = progress.step, progress.position, 0
    keeper = saver(run)
    batches = iter(_loader(run, run.stream, start=position, end=run.end))
    while step < last:
        began = time.perf_counter()
        batch = _next(batches)
        waited = time.perf_counter() - began
        record_skips(config.out, batch.skipped)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step, run.steps, peak=group["peak"])
        optimiser.zero_grad()
        insight = None
        if due(config.look_every, step + 1):
            insight = Insight(run.learner.bank, run.learner.student.projector, ranks.device)
        totals = run_batch(
            run.learner,
            batch,
            ranks,
            run.means,
            bf16=config.precision == "bf16",
            stop=stop.signal is not None,
            mean_targets=config.target_control == "mean",
            losses=run.learner.losses.scaled(embedding_factor(config, step, run.steps)),
            insight=insight,
        )
        if step == 0 and watch is not None:
            _first_batch(run, totals, watch)
        norm = ranks.clip_gradients(parameters, config.clip)
        unused = 0 if totals["samples"] else unused + min(config.batch, run.end - position)
        if unused >= max(config.batch, _MOST_UNUSED):
            raise TrainingError(
                f"not one of {unused} samples in a row could be used, up to {names_at(run, position)}",
                f"The reasons are in {config.out / SKIPPED}; check --images, then run the same command again.",
            )
        require_sound(run, totals, norm, position)
        optimiser.step()
        step, position = step + 1, min(position + config.batch, run.end)
        if watch is not None:
            seconds = time.perf_counter() - began
            record = _record(run, totals, norm, seconds, waited, learning_rate(config, step - 1, run.steps))
            watch.step(step, merged(record, insight.figures) if insight is not None else record)
        stopping = totals["stop"] > 0
        if (config.evaluation is not None and step % config.evaluation.every == 0) or step == run.steps:
            _published(keeper, watch)  # loader processes must not be forked while the saving thread holds a lock
            _evaluate(run, step, watch)
        if config.predictions.every and step % config.predictions.every == 0:
            kept = keep_predictions(run, step)
            if watch is not None and kept is not None:
                watch.event("predictions", step, {"path": kept.name})
        if step % config.checkpoint_every == 0 or step == last or stopping:
            _published(keeper, watch)
            save(run, optimiser, Progress(step, position), keeper)
        if keeper.ready:
            _published(keeper, watch)
        if stopping:
            _published(keeper, watch)
            raise Stopped(step, stop.signal)
    _published(keeper, watch)
    if watch is not None:
        watch.say(f"step {step}/{run.steps}: saved to {config.out}")
        if step == run.steps and config.target_control == "none" and config.probe is None:
            _say_what_was_not_learnt(config, step, watch)


def _say_what_was_not_learnt(config: TrainConfig, step: int, watch: Watch) -> None:
    """Name teachers whose predictions are worse than the mean map: a loss that falls does not show it."""
    supervised = {
        name: [layer for layer in teacher.layers if teacher.layer_weights.get(layer, 1.0) > 0]
        for name, teacher in config.teachers.items()
        if teacher.trains
    }
    last = max(1, step // 10)
    below = below_mean_map(config.out, supervised, first=step - last + 1)
    for name, layers in below.items():
        told = ", ".join(f"{r2:.2f} at layer {layer}" for layer, r2 in layers.items())
        remedies = [
            "train longer",
            f"let the regression weigh more (--set teachers.{name}.weight=4 --set contrastive=0.03)",
        ]
        if config.normalise == "none":
            remedies.append("scale targets (--set normalise=channel)")
        watch.say(
            f"{name}: predictions end worse than the mean map, which knows nothing of an image (centred R² {told}, "
            f"mean of the last {last} steps); " + ", or ".join(remedies)
        )
    if below:
        watch.event("below_mean_map", step, {"teachers": below})


def _published(keeper: Saver, watch: Watch | None) -> None:
    done = keeper.wait()
    if done is not None and watch is not None:
        watch.event("checkpoint", done[0], {"path": done[1].name})


def learning_rate(config: TrainConfig, step: int, steps: int, *, peak: float | None = None) -> float:
    """Linear rise to `peak` (by default `config.lr`) over the warm-up, then half a cosine to 0; `step` from 0."""
    peak = config.lr if peak is None else peak
    warm = math.ceil(config.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def embedding_factor(config: TrainConfig, step: int, steps: int) -> float:
    """What the weights of the embedding losses are multiplied by at `step`, which counts from 0: from 1 to the end."""
    if config.embedding_schedule == "constant":
        return 1.0
    done = step / max(1, steps - 1)
    left = 1.0 - done if config.embedding_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.embedding_end + (1.0 - config.embedding_end) * left


def _loader(run: Run, stream: SampleStream, *, start: int, end: int) -> Any:
    sampler = PositionSampler(start=start, end=end, batch=run.config.batch, rank=run.ranks.rank, world=run.ranks.world)
    pin = run.ranks.device.type == "cuda"
    return make_loader(stream, sampler, run.collate, workers=run.config.workers, pin=pin)


def _next(batches: Any) -> Batch:
    batch: Batch | Fault = next(batches)
    if isinstance(batch, Fault):
        raise batch.error
    return batch


def _record(
    run: Run, totals: dict[str, float], norm: float, seconds: float, waited: float, lr: float
) -> dict[str, Any]:
    found = figures(totals, run.learner.bank, run.learner.losses)
    for name in run.config.teachers:
        scale = float(run.learner.bank.logit_scales[name].detach())
        found["teachers"][name] |= {"logit_scale": scale, "temperature": min(math.exp(scale), MAX_TEMPERATURE)}
    if run.config.feed:
        found["fed"] = fed_counts(run.config, totals)
    if run.stream.remote:
        found["requests_per_sample"] = totals["requests"] / max(totals["samples"], 1)
    return {
        "loss": totals["loss"],
        **found,
        "lr": lr,
        "grad_norm": norm,
        "samples": int(totals["samples"]),
        "skipped": int(totals["skipped"]),
        "cut": int(totals["cut"]),
        "seconds": seconds,
        "samples_per_s": totals["samples"] / seconds,
        "data_wait": waited / seconds,
        "memory_gib": _peak_memory(run.ranks.device) / 2**30,
    }


def _first_batch(run: Run, totals: dict[str, float], watch: Watch) -> None:
    """Say what the first step learns from, before it changes anything."""
    valid = {name: int(totals[f"{name}.valid"]) for name in run.config.teachers}
    tokens, samples = int(totals["tokens"]), int(totals["samples"])
    fed = fed_counts(run.config, totals)
    event = {"samples": samples, "supervised_tokens": tokens, "valid_targets": valid}
    watch.event("first_batch", 0, event | ({"fed": fed} if fed else {}))
    targets = ", ".join(f"{count} of {name}" for name, count in valid.items())
    inputs = ", ".join(f"{name} to {found['images']} of {sum(found.values())} images" for name, found in fed.items())
    more = f", fed: {inputs}" if fed else ""
    watch.say(f"first batch: {samples} samples, {tokens} supervised tokens, valid targets: {targets or 'none'}{more}")


def fed_counts(config: TrainConfig, totals: Mapping[str, float]) -> dict[str, dict[str, int]]:
    """By fed teacher, images that got a feature and images for which there was none (`missing`)."""
    return {
        name: {"images": int(totals[f"{name}.fed"]), "missing": int(totals[f"{name}.unfed"])} for name in config.feed
    }


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on this rank's GPU, or the most that the process was resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def _evaluate(run: Run, step: int, watch: Watch | None) -> None:
    """Losses on the samples held out, with their own features, beside what the mean training map would get."""
    if run.heldout is None:
        return
    totals: dict[str, float] | None = None
    held = len(run.heldout)
    batches = iter(_loader(run, run.heldout, start=0, end=held))
    for _ in range(-(-held // run.config.batch)):
        batch = _next(batches)
        record_skips(run.config.out, batch.skipped, held_out_at=step)
        found = run_batch(run.learner, batch, run.ranks, run.means, bf16=run.config.precision == "bf16")
        totals = found if totals is None else add_totals(totals, found)
    if totals is None:
        return
    require_scored(run, totals, step)
    if watch is not None:
        record = figures(totals, run.learner.bank, run.learner.losses)
        counts = {"samples": int(totals["samples"]), "skipped": int(totals["skipped"])}
        watch.event("evaluation", step, {**counts, **record})
        lost = f" ({counts['skipped']} of {held} samples skipped: {SKIPPED})" if counts["skipped"] else ""
        watch.say(f"held out at step {step}: {summary(record)}{lost}")


def _watch(run: Run, progress: Progress, console: Console) -> Watch:
    config = run.config
    watch = Watch(
        config.out,
        start=progress.step,
        total=run.steps,
        log_every=config.log_every,
        trackers=open_trackers(config, start=progress.step),
        console=console,
    )
    write_config(config)
    for note in run.notes:
        watch.say(note)
    if progress.step:
        watch.say(f"continuing at step {progress.step} of {run.steps}")
    else:
        watch.event("start", 0, {**run.counts, "world": run.ranks.world, "steps": run.steps})
    return watch
