"""Tiny students, pictures, conversations and stores for tests of the trainer; no teacher is needed."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from free_ports import free_port
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from store_support import EXECUTION, put, record
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from olaschema.config import load_config
from olaschema.manifest import ChannelStatistics, RowReceipt, SampleRow, TeacherRecord
from olaschema.precision import blank, encode
from olaschema.store import FeatureStore
from olatrain.compose import compose
from olatrain.config import TrainConfig
from olatrain.train import train

LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|sep|>\n\n"
    "{{ message['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}"
)
PHI3 = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# content as a list, a space after the header that the generation prompt lacks, the answer ended by eos
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ':' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ ' <image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer(
    template: str | None = LLAMA, *, adds_bos: bool = False, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """One token per byte, so that any text is encoded; nothing merges but `merges`."""
    special = ["<s>", "</s>", "<pad>", "<|start|>", "<|sep|>", "<|eot|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*special, *alphabet, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if adds_bos:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_student(
    root: Path,
    *,
    teachers: Sequence[str] = ("gen", "depth"),
    view: Any = "squash",
    template: str | None = LLAMA,
    tied: bool = False,
    phi3: bool = False,
    task_tokens: int = 2,
) -> Path:
    """Compose a LLaVA of 3 layers and 16 channels; an image is 4 tokens, a teacher has 2 task tokens."""
    torch.manual_seed(7)
    tokenizer = byte_tokenizer(template)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
    }
    llm = Phi3ForCausalLM(Phi3Config(**sizes)) if phi3 else LlamaForCausalLM(LlamaConfig(**sizes))
    llm.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(root / "vision")
    compose(
        root / "llm",
        root / "vision",
        root / "student",
        teachers=teachers,
        tokens_per_teacher=task_tokens,
        view=view,
        seed=3,
    )
    return root / "student"


@dataclass(frozen=True)
class Corpus:
    """What a run reads: pictures `NN.png` under `images`, a LLaVA-style file, and a store of random features."""

    root: Path
    images: Path
    conversations: Path
    store: Path
    keys: list[str]


def conversation(key: str | None, answer: str, *, question: str = "what is it?") -> dict[str, Any]:
    """One question and one answer, about an image where there is a key."""
    mark = "<image>\n" if key is not None else ""
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": key} if key is not None else {})


def write_json(path: Path, entries: Any) -> Path:
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def make_images(folder: Path, count: int, *, seed: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    keys = [f"{number:02d}.png" for number in range(count)]
    for key in keys:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / key)
    return keys


def records(view: str = "squash") -> dict[str, TeacherRecord]:
    """A teacher with a map and one with a vector."""
    return {
        "depth": record("float16", teacher="depth", grid=(2, 2), channels=5, view=view),
        "gen": record("float32", teacher="gen", grid=None, channels=6, view=view),
    }


def make_store(
    root: Path,
    images: Path,
    keys: Sequence[str],
    *,
    rows_per_shard: int = 4,
    failed: Mapping[str, str] | None = None,
    teachers: Mapping[str, TeacherRecord] | None = None,
    spoiled: Sequence[str] = (),
    seed: int = 5,
) -> FeatureStore:
    """Random features of every key; `failed` names keys whose rows failed for a teacher, `spoiled` hold infinity."""
    store = FeatureStore.create(root, rows_per_shard=rows_per_shard)
    store.add_generation(SampleRow(row=0, key=key, uri=key, size=1) for key in keys)
    rng = np.random.default_rng(seed)
    failed = failed or {}
    for name, teacher in (teachers or records()).items():
        put(store, teacher)
        basis = store.basis(teacher)
        for shard in range(store.shard_count()):
            stored = blank(rows_per_shard, teacher.fingerprint.shape, teacher.precision, centred=teacher.centred)
            rows = [RowReceipt(status="absent")] * rows_per_shard
            statistics = ChannelStatistics(teacher.fingerprint.channels)
            for place, sample in enumerate(store.shard_samples(shard)):
                feature = (rng.normal(size=teacher.fingerprint.shape) + 1.5).astype(np.float32)
                digest = hashlib.sha256((images / sample.key).read_bytes()).hexdigest()
                if failed.get(sample.key) == name:
                    rows[place] = RowReceipt(status="failed", sha256=digest, reason="not-finite", detail="NaN")
                    continue
                stored[place] = encode(feature, teacher.precision, basis, centred=teacher.centred)
                if sample.key in spoiled:
                    stored.values[place] = np.inf
                rows[place] = RowReceipt(status="ok", sha256=digest, width=24, height=20)
                statistics.update(feature[None])
            store.commit_shard(teacher, shard, stored, rows, statistics, EXECUTION)
    return store


def make_corpus(root: Path, *, images: int = 10, texts: int = 3, **store: Any) -> Corpus:
    """Images of which the third is used twice, and some text alone."""
    keys = make_images(root / "images", images)
    make_store(root / "store", root / "images", keys, **store)
    entries = [conversation(key, f"picture {place} " + "x" * (place % 4)) for place, key in enumerate([*keys, keys[2]])]
    entries += [conversation(None, f"text {place}") for place in range(texts)]
    file = write_json(root / "conversations.json", entries)
    return Corpus(root, root / "images", file, root / "store", keys)


def settings(corpus: Corpus, folder: Path, target: Path, /, **changes: Any) -> dict[str, Any]:
    """A run of 6 steps over 4 samples each."""
    chosen = {
        "student": str(folder),
        "store": str(corpus.store),
        "conversations": str(corpus.conversations),
        "images": str(corpus.images),
        "out": str(target),
        "teachers": {"depth": {"layers": [2]}, "gen": {"layers": [1, 3]}},
        "steps": 6,
        "batch": 4,
        "lr": 1e-2,
        "window": 2,
        "workers": 0,
        "device": "cpu",
        "trackers": [],
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return chosen | changes


def saved(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    """Tensors of one part of a checkpoint, put together here from the pieces that ranks wrote."""
    found: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                if name.startswith(f"{part}."):
                    piece = (offsets[name]["saved_offsets"], file.get_tensor(name))
                    found.setdefault(name.removeprefix(f"{part}."), []).append(piece)
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece[0])
    return {n: torch.cat([piece for _, piece in p]) if len(p) > 1 else p[0][1] for n, p in found.items()}


def start_ranks(
    chosen: Mapping[str, Any], world: int, *, record: Path | None = None, gradients: Path | None = None
) -> list[BaseProcess]:
    """Start a run as `world` real processes, forked from a server that has the imports behind it.

    With `record`, what each step trains on is written there: `seen-RANK-PID`, lines of [position, place in the file].
    With `gradients`, a safetensors file, the first step's gradients as they are over all ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_preload"])
    port = free_port()
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(dict(chosen), rank, world, port, record, gradients))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def end_all(ranks: Sequence[BaseProcess]) -> None:
    """Wait for all ranks, which must succeed; ranks that wait for one another for ever are ended."""
    deadline = time.monotonic() + 300
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * len(ranks)


def _rank(
    chosen: dict[str, Any], rank: int, world: int, port: int, record: Path | None, gradients: Path | None
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if record is not None:
        _record_steps(record / f"seen-{rank}-{os.getpid()}")
    if gradients is not None:
        _record_gradients(gradients, first=rank == 0)
    train(load_config(TrainConfig, flags=chosen), Console(file=io.StringIO()))


def _record_steps(path: Path) -> None:
    """Write down the samples of every batch that reaches a training step, as the sampler and the stream named them."""
    from olatrain import train as module

    run_batch, loader = module.run_batch, module._loader
    pending: list[list[list[int]]] = []

    def remembering(run: Any, stream: Any, *, start: int, end: int) -> Any:
        found = loader(run, stream, start=start, end=end)
        if stream is run.stream:
            pending[:] = [[[p, stream.index(p)] for p in batch] for batch in found.batch_sampler]
        return found

    def stepping(learner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        samples = pending.pop(0)
        assert len(samples) == batch.samples
        with path.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        return run_batch(learner, batch, *args, **kwargs)

    module._loader, module.run_batch = remembering, stepping


def _record_gradients(path: Path, *, first: bool) -> None:
    from olatrain import train as module

    run_batch = module.run_batch
    written = False  # of each rank: whether the file is there may be asked before and after another rank writes it

    def stepping(learner: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal written
        totals = run_batch(learner, *args, **kwargs)
        if torch.is_grad_enabled() and not written:
            written = True
            found = {n: p.grad for n, p in learner.trainable().items() if p.grad is not None}
            whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
            if first:
                save_file({name: value.contiguous() for name, value in whole.items()}, path)
            torch.distributed.barrier()
        return totals

    module.run_batch = stepping


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def run_file(path: Path, chosen: Mapping[str, Any]) -> Path:
    return write_json(path, chosen)


def metrics(out: Path, event: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == event]
