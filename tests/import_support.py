"""A golden case as a checkpoint folder in the published OLA-VLM layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainer_support import LLAMA
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "golden/e2e"


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable character: fewer than the model has rows, as Phi-3's tokenizer."""
    special = ["<s>", "</s>", "<|start|>", "<|sep|>", "<|eot|>"]
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "é"]
    vocabulary = {token: place for place, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        additional_special_tokens=special[2:],
    )
    made.chat_template = LLAMA
    return made


def published(case: Path, target: Path, **changes: Any) -> Path:
    """The case as a checkpoint folder: config.json and tokenizer beside the weights."""
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((case / "expected.json").read_text())["config"] | changes
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(case / "model.safetensors", target)
    shutil.copytree(case / config["mm_vision_tower"], target / config["mm_vision_tower"])
    tokenizer().save_pretrained(target)
    return target
