r"""What a training step costs with stored features, beside targets in memory and beside teachers inside the step.

    python benchmarks/train_step.py                                          reduced sizes, CPU
    python benchmarks/train_step.py --published --device cuda --batch 16 --out benchmarks/results/train-step-gpu.json
    python benchmarks/train_step.py --toyworld evidence-out --batch 32 --out examples/toyworld/results/cost.json

Random weights and features, or the student, teacher, pictures and store of the toy world (in the folder that `make
evidence` has filled); one student, one batch size, and these ways to get targets:

    text        no targets: next tokens alone, no task tokens and no predictors
    resident    batches made beforehand, pictures and targets in memory: the floor
    streamed    `olatrain run`: a worker reads pictures and features and makes batches while the step runs
    one_by_one  as the public OLA-VLM code: no store, each teacher takes each image alone inside the step, and all
                hidden states of the language model are kept
    batched     no store, each teacher takes the batch at once (bf16 on a GPU): the fair baseline

Each way runs in a process of its own, in turns; seconds are medians over steps and turns, peak memory is the process's
(on a GPU: what tensors took at most). The step is that of pretraining: language model and tower frozen.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_teachers import write_checkpoint
from rich.console import Console
from rich.table import Table
from teachers import hardware, photograph, versions

NAMES = ("gen", "depth", "seg")
WAYS = ("text", "resident", "streamed", "one_by_one", "batched")
RESULTS = Path(__file__).parent / "results" / "train-step.json"
REDUCED = {
    "llm": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4},
    "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4},
    "layers": {"depth": [5, 6], "seg": [3, 5], "gen": [4, 6]},
}  # fmt: skip
# Llama-3-8B with CLIP ViT-L/14-336, and the published layers
PUBLISHED = {
    "llm": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8},
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "layers": {"depth": [18, 20], "seg": [10, 18], "gen": [12, 20]},
}  # fmt: skip
ANSWER = "a table with two cups, and a lamp behind it"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="published sizes of student and teachers")
    parser.add_argument("--toyworld", type=Path, help="folder of `make evidence`: time its pretraining instead")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each turn, after one that is not")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the step")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of the way `streamed`")
    parser.add_argument("--conditions", default="", help="what else the machine was doing; kept in the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return 0
    if options.published and options.toyworld:
        parser.error("--toyworld has sizes of its own: leave --published out")
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        root = Path(folder)
        setting = prepare_toyworld(root, options) if options.toyworld else prepare(root, options)
        (root / SETTING).write_text(json.dumps(dataclasses.asdict(setting)), encoding="utf-8")
        load = os.getloadavg()
        turns: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _, way in itertools.product(range(options.turns), WAYS):
            turns[way].append(in_a_process(root, way))
    ways = {way: summary(found) for way, found in turns.items()}
    ours = ways["streamed"]
    result = {
        "what": "seconds of one training step by where its targets come from",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(options.device),
        "versions": {"python": platform.python_version(), **versions()},
        "settings": {
            **setting.about, "stored": "float16", "batch": options.batch, "steps": options.steps,
            "turns": options.turns, "threads": options.threads, "workers": options.workers, "device": options.device,
        },
        "conditions": {
            "said": options.conditions, "load_average_before": load, "load_average_after": os.getloadavg()
        },
        "ways": ways,
        "streamed_over_resident": round(ours["seconds"] / ways["resident"]["seconds"], 4),
        "over_streamed": {
            way: {
                "seconds": round(ways[way]["seconds"] / ours["seconds"], 3),
                "peak_memory": round(ways[way]["peak_gib"] / ours["peak_gib"], 3),
            }
            for way in ("text", "one_by_one", "batched")
        },
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    print(f"written: {options.out}")
    return 0


def in_a_process(root: Path, way: str) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--way", way, "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {way}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: {found['seconds']}", flush=True)
    return found


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [second for turn in turns for second in turn["seconds"]]
    return {
        "seconds": round(statistics.median(seconds), 4),
        "wait": round(sum(turn["waited"] for turn in turns) / sum(seconds), 4),
        "peak_gib": round(max(turn["peak_gib"] for turn in turns), 3),
        "all_seconds": [[round(second, 4) for second in turn["seconds"]] for turn in turns],
    }


@dataclass(frozen=True)
class Setting:
    """What the ways have in common, written for the processes that measure; paths are text."""

    about: dict[str, Any]
    """Sizes, for the result."""
    common: dict[str, Any]
    """Settings of `olatrain run`."""
    text: dict[str, Any]
    """More of them, without targets."""
    supervised: dict[str, Any]
    """More of them, with targets from a store."""
    teachers: dict[str, dict[str, Any]]
    """By name: `checkpoint` and `options`."""


SETTING = "setting.json"


def prepare(root: Path, options: argparse.Namespace) -> Setting:
    """Write teachers, student, pictures, conversations and a store of random features of the teachers' shapes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from trainer_support import byte_tokenizer, conversation, make_store, write_json
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from olapipe.teachers import registry
    from olapipe.teachers.base import TeacherSettings
    from olaschema.manifest import TeacherRecord
    from olatrain.compose import compose

    sizes = PUBLISHED if options.published else REDUCED
    torch.manual_seed(0)
    records = {}
    for name in NAMES:
        write_checkpoint(name, root / name, full=options.published)
        fingerprint = registry.load(name, TeacherSettings(str(root / name))).fingerprint
        records[name] = TeacherRecord(
            fingerprint=fingerprint, precision="float16", source="random weights", licence="none", libraries={}
        )
    tokenizer = byte_tokenizer()
    half = torch.float16 if options.published else torch.float32
    vocabulary = 128256 if options.published else 32000
    llm = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, **sizes["llm"])
    LlamaForCausalLM(llm).to(half).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **sizes["vision"])
    CLIPVisionModel(vision).to(half).save_pretrained(root / "vision")
    for name, tokens in (("student", 8), ("student-text", 0)):
        compose(
            root / "llm", root / "vision", root / name, teachers=NAMES, tokens_per_teacher=tokens, view="squash", seed=0
        )
    (root / "images").mkdir()
    count = options.batch * (options.steps + 1)
    keys = [f"{number:05d}.jpg" for number in range(count)]
    for number, key in enumerate(keys):
        (root / "images" / key).write_bytes(photograph(number))
    write_json(root / "conversations.json", [conversation(key, ANSWER) for key in keys])
    make_store(root / "store", root / "images", keys, rows_per_shard=8, teachers=records)
    return Setting(
        about={
            "size": "published" if options.published else "reduced", **sizes, "image": [640, 480],
            "targets": {name: list(record.fingerprint.shape) for name, record in records.items()},
        },
        common={
            "conversations": str(root / "conversations.json"), "images": str(root / "images"), "window": 2,
            "allow_view_mismatch": True, "mean_map_rows": 1,
        },
        text={"student": str(root / "student-text"), "train": ["projector"]},
        supervised={
            "student": str(root / "student"), "store": str(root / "store"),
            "teachers": {name: {"layers": layers} for name, layers in sizes["layers"].items()},
        },
        teachers={name: {"checkpoint": str(root / name), "options": {}} for name in NAMES},
    )  # fmt: skip


def prepare_toyworld(root: Path, options: argparse.Namespace) -> Setting:
    """Compose the students of the toy world's arms `none` and `embedding`, for its pictures and its store."""
    toyworld = Path(__file__).parents[1] / "examples" / "toyworld"
    sys.path.insert(0, str(toyworld))
    from arms import ARMS
    from features import GRID

    from olaschema.store import FeatureStore
    from olatrain.compose import compose

    work = options.toyworld.resolve()
    plain, supervised = ARMS["none"], ARMS["embedding"]
    for arm in (plain, supervised):
        compose(
            toyworld / "student" / "llm", toyworld / "student" / "vision", root / arm.name, teachers=arm.teachers,
            tokens_per_teacher=arm.tokens, view="squash", seed=0,
        )  # fmt: skip
    store = work / str(supervised.store)
    shape = FeatureStore.open(str(store)).teacher("depth").fingerprint.shape
    llm = json.loads((toyworld / "student" / "llm" / "config.json").read_text(encoding="utf-8"))
    return Setting(
        about={
            "size": "toy world", "llm": {name: llm[name] for name in REDUCED["llm"]},
            "layers": {name: one["layers"] for name, one in supervised.settings["teachers"].items()},
            "targets": {"depth": list(shape)},
        },
        common={"conversations": str(work / "world" / "captions.jsonl"), "images": str(work / "world" / "images")},
        text={"student": str(root / plain.name), "train": ["projector"]},
        supervised={"student": str(root / supervised.name), "store": str(store), **supervised.settings},
        teachers={
            "depth": {
                "checkpoint": str(toyworld / "teachers" / "depth"), "options": {"grid": GRID, "grid_resize": "area"},
            }
        },
    )  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Take the steps of one way in this process."""
    torch.set_num_threads(options.threads)
    from olaschema.config import load_config
    from olatrain.config import TrainConfig
    from olatrain.parallel import Ranks
    from olatrain.setup import set_up
    from olatrain.step import run_batch
    from olatrain.train import make_optimiser

    setting = Setting(**json.loads((options.root / SETTING).read_text(encoding="utf-8")))
    device = torch.device(options.device)
    config = load_config(TrainConfig, flags={
        **setting.common, **(setting.text if options.way == "text" else setting.supervised),
        "out": options.root / "out", "steps": options.steps + 1, "batch": options.batch,
        "precision": "bf16" if device.type == "cuda" else "float32", "workers": options.workers,
        "device": options.device,
    })  # fmt: skip
    run = set_up(config, Ranks(0, 1, device))
    optimiser = make_optimiser(run)
    parameters = list(run.learner.trainable().values())
    batches, targets = ways(options, run, setting)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, waits = [], []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        optimiser.zero_grad()
        run_batch(run.learner, targets(batch), run.ranks, run.means, bf16=config.precision == "bf16")
        run.ranks.clip_gradients(parameters, config.clip)
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    # the first step fills caches, makes the optimiser's state, and waits for the workers to start
    return {"seconds": seconds[1:], "waited": sum(waits[1:]), "peak_gib": peak / 2**30}


def ways(options: argparse.Namespace, run: Any, setting: Setting) -> tuple[Iterator[Any], Any]:
    """Return where batches come from, and what puts targets into one."""
    from olatrain.train import _loader

    if options.way in ("text", "streamed"):
        return iter(_loader(run, run.stream, start=0, end=run.end)), lambda batch: batch
    quiet = run.config.model_copy(update={"workers": 0})
    whole = list(_loader(dataclasses.replace(run, config=quiet), run.stream, start=0, end=run.end))
    if options.way == "resident":
        device = run.ranks.device
        return iter([dataclasses.replace(batch, features={
            name: dataclasses.replace(found, values=found.values.to(device), valid=found.valid.to(device))
            for name, found in batch.features.items()
        }) for batch in whole]), lambda batch: batch  # fmt: skip
    return iter(whole), in_the_loop(options, run, setting)


def in_the_loop(options: argparse.Namespace, run: Any, setting: Setting) -> Any:
    """Return what makes a batch's targets with the teachers, its pictures decoded anew as the public code has them."""
    from olapipe.teachers import registry
    from olapipe.teachers.base import TeacherSettings
    from olaschema.images import decode_image
    from olaschema.store import FeatureStore
    from olatrain.stream import Features

    cuda = options.device == "cuda"
    teachers = {
        name: registry.load(
            name,
            TeacherSettings(
                made_of["checkpoint"], device=options.device, compute_dtype="bfloat16" if cuda else "float32",
                options=made_of["options"],
            ),
        )
        for name, made_of in setting.teachers.items()
    }  # fmt: skip
    images = Path(setting.common["images"])
    keys = {sample.row: sample.key for sample in FeatureStore.open(setting.supervised["store"]).samples()}
    if options.way == "one_by_one":
        model = run.learner.student.model
        plain = model.forward
        model.forward = lambda **inputs: plain(**inputs, output_hidden_states=True)
    size = 1 if options.way == "one_by_one" else options.batch

    def targets(batch: Any) -> Any:
        decoded = [decode_image((images / keys[row]).read_bytes(), name=keys[row]) for row in batch.rows.tolist()]
        made = {}
        for name, teacher in teachers.items():
            parts = []
            for first in range(0, len(decoded), size):
                pixels = torch.from_numpy(np.stack([teacher.preprocessor(i) for i in decoded[first : first + size]]))
                digests = [f"{row:064x}" for row in batch.rows[first : first + size].tolist()]
                parts.append(teacher.encode_images(pixels, digests).float())
            made[name] = Features(torch.cat(parts), torch.ones(len(decoded), dtype=torch.bool))
        return dataclasses.replace(batch, features=made)

    return targets


def show(result: dict[str, Any]) -> None:
    """Print the table that the docs hold."""
    table = Table(box=None)
    for column in ("targets", "seconds a step", "over streamed", "peak GiB", "over streamed", "data wait"):
        table.add_column(column, justify="left" if column == "targets" else "right")
    ours = result["ways"]["streamed"]
    lines = io.StringIO()
    for way, found in result["ways"].items():
        cells = [
            way, f"{found['seconds']:.3f}", f"{found['seconds'] / ours['seconds']:.3f}", f"{found['peak_gib']:.2f}",
            f"{found['peak_gib'] / ours['peak_gib']:.2f}", f"{100 * found['wait']:.2f} %" if way == "streamed" else "–",
        ]  # fmt: skip
        lines.write("| " + " | ".join(cells) + " |\n")
        table.add_row(*cells)
    Console(width=110).print(table)
    print(lines.getvalue())
    print(f"streamed over resident: {result['streamed_over_resident']}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
