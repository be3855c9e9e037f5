"""Parameter groups: which parameters are projector, language model and vision tower, and what trains of each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from olatrain.config import Group, TrainConfig
from olatrain.lora import is_adapter
from olatrain.student import Student

Parameters = dict[str, nn.Parameter]


def model_groups(student: Student) -> dict[Group, Parameters]:
    """Return a student's own parameters by group and by their name in the model; each is in one group.

    The language model is the decoder with its input and output embeddings; what is neither that nor the projector is
    the vision tower.
    """
    model = student.model
    projector = {id(parameter) for parameter in student.projector.parameters()}
    language = {id(parameter) for parameter in student.decoder.parameters()}
    output = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(output, nn.Module):
        language |= {id(parameter) for parameter in output.parameters()}
    language -= projector
    found: dict[Group, Parameters] = {"projector": {}, "llm": {}, "vision": {}}
    for name, parameter in model.named_parameters():
        group: Group = "vision"
        if id(parameter) in projector:
            group = "projector"
        elif id(parameter) in language:
            group = "llm"
        found[group][name] = parameter
    return found


def choose_trainable(student: Student, bank: nn.Module, config: TrainConfig) -> None:
    """Let the groups that `config.train` names require gradients, and nothing else."""
    # eval mode throughout: dropout, if a model has any, would make a continuation depend on the number of ranks
    for group, parameters in model_groups(student).items():
        for name, parameter in parameters.items():
            chosen = group in config.train
            if group == "llm" and config.lora is not None:
                chosen = is_adapter(name)
            parameter.requires_grad_(chosen)
    student.latents.requires_grad_("task_tokens" in config.train)
    student.feeds.requires_grad_("feed" in config.train)
    if "predictors" not in config.train:
        bank.requires_grad_(False)


def by_group(trainable: Mapping[str, nn.Parameter]) -> dict[Group, Parameters]:
    """Sort the parameters that train, named as in a checkpoint, into their groups."""
    parts: dict[str, Group] = {
        "projector": "projector", "latents": "task_tokens", "predictors": "predictors", "llm": "llm",
        "vision": "vision", "feeds": "feed",
    }  # fmt: skip
    found: dict[Group, Parameters] = {}
    for name, parameter in trainable.items():
        found.setdefault(parts[name.partition(".")[0]], {})[name] = parameter
    return found


def describe(trainable: Mapping[str, nn.Parameter], config: TrainConfig) -> str:
    """Say in one line how many numbers train in each group, and how fast."""
    parts = []
    for group, parameters in by_group(trainable).items():
        count = sum(parameter.numel() for parameter in parameters.values())
        what = f"{group} (LoRA)" if group == "llm" and config.lora is not None else group
        parts.append(f"{what} {count:,} at {config.lrs.get(group, config.lr):g}")
    return f"trains: {', '.join(parts)}"
