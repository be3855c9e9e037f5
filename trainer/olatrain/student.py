"""The student: any transformers image-text-to-text model, with task tokens written in and hidden states tapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from olaschema.errors import ConfigError
from olatrain.feed import Fed, Feeds
from olatrain.tokens import TaskTokens

_PROJECTORS = ("multi_modal_projector", "connector", "merger")


@dataclass(frozen=True)
class StudentOutput:
    """What one forward pass of the student gives."""

    logits: Tensor
    """(B, L, V), or (B, P, V) where P positions were asked for."""
    taps: dict[int, Tensor]
    """1-based layer → its output (B, L, D); for the last layer after the final norm."""
    entry: Tensor
    """What entered the first decoder block, (B, L, D)."""


@dataclass
class _Call:
    owner: Student
    gradients: bool
    entry: Tensor | None = None
    taps: dict[int, Tensor] = field(default_factory=dict)


# The forward pass in progress on this thread. Hooks write nowhere else, so nothing outlives a call and a call inside
# a call has its own.
_CALL: ContextVar[_Call | None] = ContextVar("student_call", default=None)


class Student(nn.Module):
    """Wraps a model so that its task tokens are learned and its layers can be supervised.

    At each task token's id the embedding layer gives the mean of a group of the teacher's latents: a teacher with
    N latents and K tokens has K consecutive groups of N/K, which in the format `emb` are of one latent each. Latents
    are float32 parameters (N, D), from a standard normal. Hooks stay on the model, so `student.model.generate` sees
    the task tokens too; taps are kept only in the output of `forward`. Teachers in `feeds`, by the shape of their
    features, have no latents: their tokens hold the features given to `forward`, or inside `feeds.given`
    (`olatrain.feed`).
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: TaskTokens,
        *,
        latents: Mapping[str, int],
        taps: Iterable[int],
        seed: int,
        feeds: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.model = model
        embeddings = _embeddings(model)
        self.hidden_size = int(embeddings.weight.shape[1])
        self.decoder, self.layers, self.norm = _decoder(model, embeddings)
        self.taps = _checked_taps(taps, len(self.layers))
        self.feeds = Feeds(feeds or {}, tokens, embeddings, seed=seed)
        self.learned = tuple(teacher for teacher in tokens.teachers if teacher not in self.feeds.teachers)
        self.latents = _make_latents(tokens, self.learned, latents, self.hidden_size, seed)
        if tokens.flat and max(tokens.flat) >= embeddings.weight.shape[0]:
            raise ConfigError(
                f"task token id {max(tokens.flat)} is outside the model's {embeddings.weight.shape[0]} embedding rows",
                "The folder's ola.json belongs to another model: make the folder again with `olatrain compose`.",
            )
        slots = torch.full((embeddings.weight.shape[0],), -1, dtype=torch.int64)
        slots[self._learned_ids] = torch.arange(len(self._learned_ids))
        self.register_buffer("_slots", slots, persistent=False)
        if self._learned_ids:
            embeddings.register_forward_hook(self._write_means)
        self.layers[0].register_forward_pre_hook(self._record_entry)
        for layer in self.taps:
            last = layer == len(self.layers)
            module = self.norm if last else self.layers[layer - 1]
            module.register_forward_hook(self._recorder(layer))

    @property
    def embeddings(self) -> nn.Embedding:
        """The model's input embeddings."""
        return _embeddings(self.model)

    @property
    def projector(self) -> nn.Module:
        """The module between vision tower and language model; raises ConfigError for an unknown layout."""
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] in _PROJECTORS and isinstance(module, nn.Module):
                return module
        raise ConfigError(
            f"{type(self.model).__name__} has no module named {', '.join(_PROJECTORS)}",
            "Choose a LLaVA, LLaVA-NeXT, Idefics3 or Qwen-VL student.",
        )

    def checkpoint_gradients(self) -> None:
        """Recompute each decoder block in the backward pass; raises ConfigError for a model that cannot.

        transformers recomputes blocks in training mode only. Theirs is set and that of their parts is not, so that no
        dropout comes with it; `train` and `eval` would set it again, so this comes last.
        """
        blocks = [layer for layer in self.layers if isinstance(layer, GradientCheckpointingLayer)]
        if len(blocks) != len(self.layers):
            raise ConfigError(
                f"the decoder blocks of {type(self.model).__name__} cannot be recomputed",
                "Set gradient_checkpointing to false, or use a smaller micro_batch.",
            )
        for layer in blocks:
            block: Any = layer
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            block.training = True

    @property
    def _learned_ids(self) -> list[int]:
        return [id_ for teacher in self.learned for id_ in self.tokens.ids[teacher]]

    def task_embeddings(self) -> Tensor:
        """Means of the latents' groups, one for each id of the teachers `learned`, in order: (ids, D) float32."""
        return group_means(self.tokens, self.latents)

    @torch.no_grad()
    def store_task_embeddings(self) -> None:
        """Write the means into the embedding rows of the task tokens, so that the bare model computes the same.

        Rows of a fed teacher get what stands for an image without a feature.
        """
        if self._learned_ids:
            weight = self.embeddings.weight
            weight[self._learned_ids] = self.task_embeddings().to(weight)
        self.feeds.store_missing(self.embeddings)

    def forward(
        self, inputs: Mapping[str, Any], *, keep: Tensor | None = None, fed: Mapping[str, Fed] | None = None
    ) -> StudentOutput:
        """Run the model on `inputs`, its own keyword arguments (`input_ids` (B, L), `pixel_values` …).

        `keep` (P,) int64 names the sequence positions whose logits are wanted; the others are never computed. `fed`
        are the features of all images by fed teacher, in order of sample and of appearance.
        Raises ConfigError where a tapped layer did not run, or ran where its gradient is out of reach, or where
        features are missing or left over.
        """
        call = _Call(self, torch.is_grad_enabled())
        token = _CALL.set(call)
        try:
            extra = {} if keep is None else {"logits_to_keep": keep}
            with self.feeds.given(fed or {}):
                output = self.model(**inputs, **extra, use_cache=False, return_dict=True)
        finally:
            _CALL.reset(token)
        missing = [layer for layer in self.taps if layer not in call.taps]
        if missing:
            raise ConfigError(
                f"layers {missing} of {type(self.model).__name__} did not run", "Tap layers that the model uses."
            )
        if call.entry is None:
            raise ConfigError(
                f"the first decoder block of {type(self.model).__name__} did not run", "Choose another student."
            )
        return StudentOutput(output.logits, call.taps, call.entry)

    def _write_means(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids: Tensor = args[0]
        slots = self._slots[ids]  # type: ignore[index]
        means = self.task_embeddings().to(output)
        return torch.where((slots >= 0).unsqueeze(-1), means[slots.clamp(min=0)], output)

    def _record_entry(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        call = _CALL.get()
        if call is not None and call.owner is self:
            call.entry = args[0]

    def _recorder(self, layer: int) -> Any:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            call = _CALL.get()
            if call is None or call.owner is not self:
                return  # generation, or the second pass of gradient checkpointing
            if call.gradients and not torch.is_grad_enabled():
                raise ConfigError(
                    "reentrant gradient checkpointing hides the tapped states from the gradient",
                    'Enable it with {"use_reentrant": False}.',
                )
            call.taps[layer] = output[0] if isinstance(output, tuple) else output

        return record


def group_means(tokens: TaskTokens, latents: nn.ParameterDict) -> Tensor:
    """Return what stands at each id of the teachers that have latents (N, D), in the record's order: (ids, D)."""
    means = []
    for teacher in (name for name in tokens.teachers if name in latents):
        vectors: Tensor = latents[teacher]
        means.append(vectors.reshape(tokens.count(teacher), -1, vectors.shape[1]).mean(dim=1))
    return torch.cat(means)


def _embeddings(model: nn.Module) -> nn.Embedding:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embeddings, nn.Embedding):
        raise ConfigError(
            f"the input embeddings of {type(model).__name__} are a {type(embeddings).__name__}",
            "Choose a model whose input embeddings are a torch.nn.Embedding.",
        )
    return embeddings


def _decoder(model: nn.Module, embeddings: nn.Embedding) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """The decoder, which is the module that owns the input embeddings, its blocks and its final norm."""
    for module in model.modules():
        owns = any(child is embeddings for child in module.children())
        layers, norm = getattr(module, "layers", None), getattr(module, "norm", None)
        if owns and isinstance(layers, nn.ModuleList) and isinstance(norm, nn.Module):
            return module, layers, norm
    raise ConfigError(
        f"the decoder layers of {type(model).__name__} were not found",
        "The language model must hold its input embeddings, `layers` and `norm` side by side, as Llama, Phi-3, Mistral "
        "and Qwen do.",
    )


def _checked_taps(taps: Iterable[int], layers: int) -> tuple[int, ...]:
    wanted = tuple(sorted(set(taps)))
    wrong = [layer for layer in wanted if not 1 <= layer <= layers]
    if wrong:
        raise ConfigError(
            f"the student has {layers} decoder layers; {wrong} cannot be tapped",
            f"Layers are counted from 1: choose from 1 to {layers}.",
        )
    return wanted


def _make_latents(
    tokens: TaskTokens, learned: Iterable[str], latents: Mapping[str, int], hidden: int, seed: int
) -> nn.ParameterDict:
    expected = set(learned) if tokens.tokens_per_teacher else set()
    if set(latents) != expected:
        raise ConfigError(
            f"latents are given for {sorted(latents)}; the student's task tokens are of {sorted(expected)}",
            "Supervise the teachers that the student was composed with, or compose it again.",
        )
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for teacher in sorted(expected):
        count, own = latents[teacher], tokens.count(teacher)
        if tokens.task_format == "emb" and count != own:
            raise ConfigError(
                f"{teacher}: {count} latents are to be learned, the student's prompts hold {own}, each for itself",
                "Supervise it with features of the shape it was trained with.",
            )
        if count <= 0 or count % own:
            raise ConfigError(
                f"{teacher}: {count} latents cannot be split into {own} equal groups",
                f"Compose the student with a number of task tokens that divides {count}.",
            )
        made[teacher] = nn.Parameter(torch.randn(count, hidden, generator=generator))
    return nn.ParameterDict(made)
