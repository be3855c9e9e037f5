"""From the means of a teacher's latents in the sequence (`expand_emb`) to every latent for itself (`emb`).

The two published forms of the task tokens (OLA-VLM, arXiv 2412.09585): pretraining puts the means there, instruction
tuning either. An id has one embedding row, so every latent that is to stand in the sequence needs an id of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AddedToken

from olaschema.errors import ConfigError
from olatrain.compose import grow, task_names
from olatrain.student import group_means
from olatrain.tokens import TaskFormat, TaskTokens


def in_format(
    wanted: TaskFormat | None, model: Any, processor: Any, tokens: TaskTokens, latents: nn.ParameterDict
) -> TaskTokens:
    """Return a student's record in the format `wanted`, its model and processor changed to fit; None: as it is.

    For `emb` each latent (N, D) of a teacher gets an id: the first K are the task tokens it has, the others follow the
    tokenizer's last. Vocabulary and chat template grow by them; the embedding rows of all hold the latents. The model's
    embeddings must not be tied.

    Raises ConfigError for `emb` without task tokens or without a token that is free, and for a way back.
    """
    if wanted is None or wanted == tokens.task_format:
        return tokens
    if wanted == "expand_emb":
        raise ConfigError(
            "the language model has seen every vector of its task tokens, so their means cannot stand in for them",
            "Leave --task-format out, or start from the student of the stage before.",
        )
    if not tokens.flat:
        raise ConfigError("the student has no task tokens to spread", "Leave --task-format out.")
    fed = [teacher for teacher in tokens.teachers if teacher not in latents]
    if fed:
        raise ConfigError(
            f"the tokens of {', '.join(fed)} hold features that the student is fed, no latents to spread",
            "Leave --task-format out.",
        )
    tokenizer = processor.tokenizer
    known = tokenizer.convert_ids_to_tokens(list(tokens.flat))
    names = {t: task_names([t], len(latents[t]))[t] for t in tokens.teachers}
    new = [name for group in names.values() for name in group if name not in known]
    taken = [name for name in new if name in tokenizer.get_vocab()]
    if taken:
        raise ConfigError(f"the tokenizer already has {taken[0]}", "Start from the student as it was composed.")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    ids = {teacher: tuple(vocabulary[name] for name in group) for teacher, group in names.items()}
    fresh = [vocabulary[name] for name in new]
    hidden = tuple(sorted({*tokens.never_predicted, *fresh}))
    changes = {"task_format": wanted, "ids": ids, "never_predicted": hidden}
    made = TaskTokens.model_validate(tokens.model_dump() | changes)
    if fresh:
        grow(model, fresh)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[list(made.flat)] = group_means(made, latents).to(weight)
    suppressed = model.generation_config.suppress_tokens or ()
    model.generation_config.suppress_tokens = sorted({*suppressed, *hidden})
    block, longer = "".join(known), "".join(name for group in names.values() for name in group)
    processor.chat_template = tokenizer.chat_template = processor.chat_template.replace(block, longer)
    return made
