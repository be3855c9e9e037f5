"""The command `olatrain`. Heavy imports wait until a command runs, so that help is quick."""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from olaschema.errors import ConfigError, OlaError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Supervise the hidden states of a multimodal language model with stored teacher features.",
)  # fmt: skip


PROBE_MICRO_BATCH = 8
"""Images of one forward pass of a probe: it keeps what every layer's resampler computes."""


class ViewKind(enum.StrEnum):
    """What part of an image the student sees."""

    squash = "squash"
    crop = "crop"
    pad = "pad"


class ContextName(enum.StrEnum):
    """Which states a probe may read."""

    image = "image"
    prompt = "prompt"
    all = "all"


class PresetName(enum.StrEnum):
    """A published stage."""

    pretrain = "pretrain"
    vpt = "vpt"
    finetune = "finetune"


class TaskFormatName(enum.StrEnum):
    """What stands in the sequence for a teacher's map."""

    emb = "emb"
    expand_emb = "expand_emb"


class ControlName(enum.StrEnum):
    """What stands in place of an image's own targets."""

    shuffle = "shuffle"
    mean = "mean"
    self = "self"


class DtypeName(enum.StrEnum):
    """Type of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def compose(
    llm: Annotated[Path, typer.Option(help="Folder of a Llama or Phi-3 causal language model with its tokenizer.")],
    vision: Annotated[Path, typer.Option(help="Folder of a CLIP vision tower, or of OpenCLIP's ConvNeXT.")],
    out: Annotated[Path, typer.Option(help="Folder to write the student to; new or empty.")],
    teacher: Annotated[
        list[str] | None, typer.Option(help="Teacher with task tokens; repeat, in prompt order. [gen, depth, seg]")
    ] = None,
    task_tokens: Annotated[int, typer.Option(min=0, help="Task tokens of each teacher.")] = 8,
    view: Annotated[ViewKind, typer.Option(help="What the student sees of an image.")] = ViewKind.squash,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fresh projector.")] = 0,
) -> None:
    """Join a language model and a vision tower into a LLaVA student with task tokens."""
    _quiet()
    from olatrain.compose import compose as run_compose

    teachers = tuple(teacher) if teacher else ("gen", "depth", "seg")
    tokens = run_compose(
        llm, vision, out, teachers=teachers, tokens_per_teacher=task_tokens, view=view.value, seed=seed
    )
    typer.echo(f"{out}: LLaVA with {tokens.say()}, {tokens.image_length} tokens per image, view {view.value}")


@app.command()
def prepare(
    model: Annotated[Path, typer.Option(help="Folder of a LLaVA, LLaVA-NeXT, Idefics3 or Qwen2.5-VL checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write the student to; new or empty.")],
    teacher: Annotated[
        list[str] | None, typer.Option(help="Teacher with task tokens; repeat, in prompt order. [gen, depth, seg]")
    ] = None,
    task_tokens: Annotated[int, typer.Option(min=0, help="Task tokens of each teacher.")] = 8,
) -> None:
    """Put task tokens into an existing image-text-to-text checkpoint."""
    _quiet()
    from olatrain.prepare import prepare as run_prepare

    tokens = run_prepare(model, out, teachers=tuple(teacher or ("gen", "depth", "seg")), tokens_per_teacher=task_tokens)
    typer.echo(f"{out}: {tokens.family} with {tokens.say()}")


@app.command("import-ola")
def import_ola(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint in the published OLA-VLM layout.")],
    out: Annotated[Path, typer.Option(help="Folder to write the student to; new or empty.")],
    vision: Annotated[Path | None, typer.Option(help="Folder of its CLIP tower, where it is not inside.")] = None,
    view: Annotated[
        ViewKind | None, typer.Option(help="What the student sees of an image. [as the checkpoint says]")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message it was trained with, for conversations without one.")
    ] = None,
    task_format: Annotated[
        TaskFormatName | None,
        typer.Option(help="emb: each latent in the sequence; expand_emb: means. [as it was trained]"),
    ] = None,
) -> None:
    """Turn a published OLA-VLM checkpoint into a student that `run` starts from."""
    _quiet()
    from olatrain.importing import SETTINGS_NAME, import_student

    tokens, chosen = import_student(
        checkpoint, out, vision=vision, view=view.value if view else None, system=system,
        task_format=task_format.value if task_format else None,
    )  # fmt: skip
    typer.echo(f"{out}: LLaVA with {tokens.say()}, {tokens.image_length} tokens per image, view {chosen}")
    if tokens.chat_template == "plain":
        typer.echo("its tokenizer has no chat template: a plain USER: … ASSISTANT: … was written")
    typer.echo(f"the settings it was trained with: olatrain run --student {out} --config {out / SETTINGS_NAME}")


@app.command()
def run(
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Any setting, over file and flags; repeat.")
    ] = None,
    preset: Annotated[PresetName | None, typer.Option(help="Settings of a published stage; others win.")] = None,
    student: Annotated[Path | None, typer.Option(help="Folder that `olatrain compose` or `export` wrote.")] = None,
    store: Annotated[
        str | None, typer.Option(help="Feature store of `olapipe extract`, or packed training set of `olapipe pack`.")
    ] = None,
    conversations: Annotated[Path | None, typer.Option(help="LLaVA-style JSON, JSONL or parquet.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the conversations' images are relative to.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; a run in it is continued.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="TEACHER=N,N", help="Teacher to learn from and its layers, counted from 1; repeat."),
    ] = None,
    feed: Annotated[
        str | None,
        typer.Option(metavar="TEACHER,TEACHER", help="Teachers whose features are inputs: the multi-encoder baseline."),
    ] = None,
    target_control: Annotated[
        ControlName | None, typer.Option(help="Control arm: other targets than the image's own. [none]")
    ] = None,
    heldout: Annotated[Path | None, typer.Option(help="Conversations to evaluate on.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs to train. [1]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train, instead of epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a step, over all ranks. [256]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [1e-3]")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bf16 (autocast). [float32]")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks to start on this machine. [1]")] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes of each rank. [2]")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [500]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of order and initial values. [0]")] = None,
    allow_view_mismatch: Annotated[
        bool | None,
        typer.Option("--allow-view-mismatch", help="Train though teacher and student see different parts of an image."),
    ] = None,
) -> None:
    """Train a student from conversations and stored features; what trains is a setting (--preset, --set train=…).

    Run the same command again to continue where it stopped.
    """
    _quiet()
    from rich.console import Console

    from olatrain.launch import end_with_parent, launch, under_launcher

    end_with_parent()
    flags: dict[str, Any] = {
        "preset": preset.value if preset else None, "student": student, "store": store, "images": images, "out": out,
        "conversations": conversations, "evaluation.conversations": heldout, "epochs": epochs, "steps": steps,
        "batch": batch, "lr": lr, "precision": precision, "nproc": nproc, "workers": workers,
        "checkpoint_every": checkpoint_every, "seed": seed, "allow_view_mismatch": allow_view_mismatch,
        "feed": feed, "target_control": target_control.value if target_control else None,
        **_layers(layers or []),
    }  # fmt: skip
    from olaschema.config import load_config
    from olatrain.config import TrainConfig

    settings = load_config(TrainConfig, file=config, flags=flags, overrides=set_ or [])
    settings.require_inputs()
    if settings.nproc > 1 and not under_launcher():
        raise typer.Exit(launch(settings.nproc, [sys.executable, "-m", "olatrain", *sys.argv[1:]]))
    from olatrain.train import train

    train(settings, Console(highlight=False))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run (`--out` of `olatrain run`).")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to; new or empty.")],
    student: Annotated[Path | None, typer.Option(help="Student that the run started from, where it has moved.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Type of the weights; the run computes in float32.")] = (
        DtypeName.float32
    ),
    task_format: Annotated[
        TaskFormatName | None,
        typer.Option(help="emb: each latent in the sequence from here on, for the next stage. [as it is]"),
    ] = None,
) -> None:
    """Write a run's newest checkpoint as a model that transformers loads without this package."""
    _quiet()
    from olatrain.export import export as run_export

    trained = run_export(
        run, out, student=student, dtype=dtype.value,
        task_format=task_format.value if task_format else None,
    )  # fmt: skip
    typer.echo(f"{out}: step {trained.step} of {run}, {dtype.value}")
    for record in trained.all_teachers:
        typer.echo(f"learned from {record.fingerprint.teacher} ({record.source}), licence {record.licence}")


@app.command()
def probe(
    student: Annotated[Path, typer.Option(help="Student to probe; it stays as it is.")],
    store: Annotated[
        str, typer.Option(help="Feature store of `olapipe extract`, or packed training set of `olapipe pack`.")
    ],
    teacher: Annotated[list[str], typer.Option(help="Teacher whose features to read from the layers; repeat.")],
    out: Annotated[Path, typer.Option(help="Folder of the probe; one in it is continued.")],
    conversations: Annotated[
        Path | None,
        typer.Option(help="LLaVA-style JSON, JSONL or parquet; one of each image is used. Not for a packed set."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that the conversations' images are relative to. Not for a packed set.")
    ] = None,
    context: Annotated[
        ContextName | None, typer.Option(help="What the probes read: the image's states, the prompt's, or all. [image]")
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="The paper's protocol: context all, 2 epochs, probe.start=random, unless said."
        ),
    ] = False,
    held_out: Annotated[float, typer.Option(help="Share of the images to score on.")] = 0.1,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Folder of an earlier probe to show beside; repeat.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs to train. [1]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train, instead of epochs.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples of a step. [256]")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [1e-3]")] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes. [2]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, order and initial values. [0]")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Any other setting; repeat.")] = None,
    allow_view_mismatch: Annotated[
        bool, typer.Option("--allow-view-mismatch", help="Though teacher and student see different parts of an image.")
    ] = False,
) -> None:
    """Score how well each layer of a frozen student lets teachers' features be read from it."""
    _quiet()
    from rich.console import Console

    from olaschema.config import load_config
    from olatrain.config import TrainConfig
    from olatrain.probe import count_layers, fed_teachers, run_probe

    if published:
        context = context or ContextName.all
        epochs = epochs if epochs is not None or steps is not None else 2
    layers = list(range(1, count_layers(student) + 1))
    flags = {
        "student": student, "store": store, "conversations": conversations, "images": images, "out": out,
        "teachers": {name: {"layers": layers, "weight": 1.0} for name in teacher}, "train": ["predictors"],
        "text": 0.0, "contrastive": 0.0, "context": (context or ContextName.image).value, "probe.held_out": held_out,
        "probe.start": "random" if published else None, "micro_batch": PROBE_MICRO_BATCH,
        "epochs": epochs, "steps": steps, "batch": batch, "lr": lr, "workers": workers, "seed": seed,
        "allow_view_mismatch": allow_view_mismatch, "feed": fed_teachers(student),
    }  # fmt: skip
    settings = load_config(TrainConfig, flags=flags, overrides=set_ or [])
    settings.require_inputs()
    run_probe(settings, Console(highlight=False), compare=compare or ())


class DeviceName(enum.StrEnum):
    """Where a student answers."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class MethodName(enum.StrEnum):
    """How an answer is read."""

    generate = "generate"
    likelihood = "likelihood"


@app.command("eval")
def eval_command(
    student: Annotated[Path, typer.Option(help="Folder that `olatrain export` wrote.")],
    cv_bench: Annotated[Path, typer.Option(help="Folder of CV-Bench: test_2d.parquet, test_3d.parquet.")],
    method: Annotated[
        MethodName, typer.Option(help="Letter read from a generated answer, or the likeliest letter.")
    ] = MethodName.generate,
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU where there is one.")] = DeviceName.auto,
    out: Annotated[Path | None, typer.Option(help="JSON file for scores and answers.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Feature store of the benchmark's images, for a student that is fed features (run --feed)."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions in one pass.")] = 8,
) -> None:
    """Score a student on CV-Bench: count, relation, depth and distance, averaged by source."""
    _quiet()
    import torch
    from rich.console import Console

    from olatrain.evaluate import evaluate_cv_bench, remarks, table

    if not cv_bench.is_dir():
        raise ConfigError(f"--cv-bench {cv_bench}: no such folder", "Give a local copy of nyu-visionx/CV-Bench.")
    present = torch.cuda.is_available()
    if device is DeviceName.cuda and not present:
        raise ConfigError("--device cuda: there is no GPU", "Use --device cpu.")
    chosen = "cuda" if present and device is not DeviceName.cpu else "cpu"
    console = Console(highlight=False)
    with console.status("asking") as status:
        result = evaluate_cv_bench(
            student, cv_bench, method=method.value, device=torch.device(chosen), out=out, store=store,
            batch=batch, tick=lambda count: status.update(f"{count} questions answered"),
        )  # fmt: skip
    console.print(table(result))
    for line in remarks(result):
        console.print(line, markup=False)


def _layers(given: list[str]) -> dict[str, list[int]]:
    flags = {}
    for text in given:
        teacher, separator, numbers = text.partition("=")
        if not separator or not teacher or not all(number.strip().isdigit() for number in numbers.split(",")):
            raise ConfigError(f"--layers {text!r} is not of the form TEACHER=N,N", "Write for instance depth=18,20")
        flags[f"teachers.{teacher}.layers"] = [int(number) for number in numbers.split(",")]
    return flags


def _quiet() -> None:
    """Keep libraries from asking a hub or warning about what we do on purpose; must come before they are imported."""
    from olaschema.hub import keep_libraries_off

    keep_libraries_off()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Run the command line; an OlaError ends it with its message, remedy and exit code, without a traceback."""
    try:
        app()
    except OlaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
