"""Predictors: from a tapped layer of the student to the feature a teacher gave for the same image.

One Perceiver-resampler block per (teacher, layer), as published with OLA-VLM (arXiv 2412.09585): queries attend to
the layer's states and to themselves. Module names follow the published checkpoints, so weights carry over by prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from olaschema.errors import ConfigError
from olaschema.manifest import Frozen
from olatrain.tokens import Context, Items, TaskTokens

Predictions = dict[tuple[str, int], Tensor]

PUBLISHED = ("depth", "seg", "gen")
"""Teachers whose predictors OLA-VLM published."""
FEW_CHANNELS = 64
"""Below these, predictors of other teachers are not as those: a layer norm over one channel is a constant, over a few
it loses much of a target, and a resampler as narrow as the target reads hardly anything."""


class PredictorConfig(Frozen):
    """How the features of one teacher are predicted."""

    shape: tuple[int, ...]
    """Shape of one target: (H, W, C), or (C,) for one vector per image."""
    layers: tuple[int, ...]
    """Supervised layers, counted from 1: layer i is the output of decoder block i."""
    width: int = Field(gt=0)
    """Channels inside the resampler."""
    intermediate: bool = False
    """Whether the prediction is Linear–ReLU–Linear of the resampler's output (`use_intermediate_depth`)."""
    heads: int = Field(default=4, gt=0)
    head_width: int = Field(default=32, gt=0)
    ff_mult: int = Field(default=1, gt=0)
    blocks: int = Field(default=1, gt=0)
    norm: bool = True
    """Whether the resampler's output is layer-normed over the channels of the target."""

    @property
    def channels(self) -> int:
        """Channels of the target."""
        return self.shape[-1]

    @property
    def queries(self) -> int:
        """Vectors of the target: H·W, or 1."""
        return self.shape[0] * self.shape[1] if len(self.shape) == 3 else 1

    @property
    def spatial(self) -> bool:
        """Whether the target is a map."""
        return len(self.shape) == 3

    def latents(self, tokens_per_teacher: int) -> int:
        """Number of vectors the student learns for this teacher: one per target vector of a map, else one per token."""
        return self.queries if self.spatial else tokens_per_teacher


def published_predictor(
    teacher: str, shape: tuple[int, ...], layers: tuple[int, ...], *, hidden_size: int, tokens_per_teacher: int
) -> PredictorConfig:
    """Return the published settings: `depth` is as wide as the student, the others are as wide as their target.

    Without task tokens depth is as wide as its target too. `hidden_size` is the student's; `intermediate` is on for
    depth, the public default. A teacher of few channels that none was published for: `for_few_channels`.
    """
    if few_channels(teacher, shape):
        return for_few_channels(shape, layers, hidden_size=hidden_size)
    depth = teacher == "depth"
    width = hidden_size if depth and tokens_per_teacher else shape[-1]
    return PredictorConfig(shape=shape, layers=layers, width=width, intermediate=depth)


def few_channels(teacher: str, shape: tuple[int, ...]) -> bool:
    """Whether a predictor as published would be too narrow for a teacher."""
    return teacher not in PUBLISHED and shape[-1] < FEW_CHANNELS


def for_few_channels(shape: tuple[int, ...], layers: tuple[int, ...], *, hidden_size: int) -> PredictorConfig:
    """Return a predictor that is as wide as the student and ends in a linear layer."""
    return PredictorConfig(shape=shape, layers=layers, width=hidden_size, norm=False)


class _CrossAttention(nn.Module):
    """Latents attend to [context, latents], both layer-normed."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, states: Tensor, latents: Tensor, sample: Tensor, mask: Tensor) -> Tensor:
        """`states` (B, L, W), `latents` (I or 1, N, W), `sample` (I,), `mask` (I, L) → (I, N, W)."""
        items = sample.shape[0]
        latents = self.norm2(latents)
        query = self._split(self.to_q(latents))
        # keys and values are computed once per sample and once per latent, then shared by the items
        outer = self.to_kv(self.norm1(states))[sample]
        own = self.to_kv(latents).expand(items, -1, -1)
        key, value = (self._split(part) for part in torch.cat((outer, own), dim=1).chunk(2, dim=-1))
        visible = torch.cat((mask, mask.new_ones(items, own.shape[1])), dim=1)[:, None, None]
        out = functional.scaled_dot_product_attention(
            query.expand(items, -1, -1, -1), key, value, attn_mask=visible.expand(-1, -1, query.shape[2], -1)
        )
        merged: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: Tensor) -> Tensor:
        items, length, width = x.shape
        return x.reshape(items, length, self.heads, width // self.heads).transpose(1, 2)


class Resampler(nn.Module):
    """Perceiver resampler with one input projection for context and latents; `own_latents` where it has no other."""

    def __init__(self, config: PredictorConfig, hidden_size: int, *, own_latents: bool) -> None:
        super().__init__()
        width = config.width
        self.latents = nn.Parameter(torch.randn(1, config.queries, width) / width**0.5) if own_latents else None
        self.proj_in = nn.Linear(hidden_size, width)
        self.proj_out = nn.Linear(width, config.channels)
        self.norm_out = nn.LayerNorm(config.channels) if config.norm else nn.Identity()
        inner = width * config.ff_mult
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    _CrossAttention(width, config.heads, config.head_width),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, inner, bias=False),
                        nn.GELU(),
                        nn.Linear(inner, width, bias=False),
                    ),
                )
            )
            for _ in range(config.blocks)
        )

    def forward(self, states: Tensor, queries: Tensor | None, sample: Tensor, mask: Tensor) -> Tensor:
        """`states` (B, L, D), `queries` (I or 1, N, D) or None for the own latents, `mask` (I, L) → (I, N, C)."""
        latents = self.latents if queries is None else self.proj_in(queries)
        if latents is None:
            raise ConfigError("a predictor without latents of its own got no queries", "Give it the student's latents.")
        states = self.proj_in(states)
        for block in self.layers:
            attention, feed_forward = block.children()
            latents = attention(states, latents, sample, mask) + latents
            latents = feed_forward(latents) + latents
        predicted: Tensor = self.norm_out(self.proj_out(latents))
        return predicted


class Predictor(nn.Module):
    """A resampler and, where `intermediate`, the published readouts of its output.

    Only `linear_1` is supervised. `linear_2` and `linear_3` receive no loss, so they do not train; they exist because
    published checkpoints hold them.
    """

    def __init__(self, config: PredictorConfig, hidden_size: int, *, own_latents: bool) -> None:
        super().__init__()
        self.projector = Resampler(config, hidden_size, own_latents=own_latents)
        self.intermediate = config.intermediate
        if config.intermediate:
            self.linear_1 = _readout(config.channels)
            # without a loss, and parameters that never get a gradient would stall DistributedDataParallel
            self.linear_2 = _readout(config.channels).requires_grad_(False)
            self.linear_3 = _readout(config.channels).requires_grad_(False)

    def forward(self, states: Tensor, queries: Tensor | None, sample: Tensor, mask: Tensor) -> Tensor:
        """Return the supervised prediction (I, N, C); arguments as for `Resampler`."""
        plain: Tensor = self.projector(states, queries, sample, mask)
        return self.linear_1(plain) if self.intermediate else plain


def _readout(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))


class Standard(nn.Module):
    """Per-channel standardisation of one teacher's targets: invertible, and saved wherever its predictors are."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        # a channel that never varies has nothing to scale
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, 1.0).float())

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., C) as the teacher gave them → (x − mean) / deviation, float32."""
        return (features.float() - self.mean) / self.deviation

    def invert(self, standardised: Tensor) -> Tensor:
        """Predictions (..., C) → features as the teacher would have given them."""
        return standardised.float() * self.deviation + self.mean


class PredictorBank(nn.Module):
    """All predictors of a student, one per (teacher, layer), and the learned temperature of each teacher.

    `heads[teacher][layer]` are the predictors, `logit_scales[teacher]` the scalars s of the contrastive temperature
    exp(s), from 2.0. `context` says which positions the predictors read (`Items.context`); `compat="ola"` lets
    padding in, as the public code does. `standards` are by teacher; predictions of such a teacher are standardised.
    """

    def __init__(
        self,
        configs: Mapping[str, PredictorConfig],
        tokens: TaskTokens,
        *,
        hidden_size: int,
        seed: int,
        context: Context = "all",
        compat: Literal["ola"] | None = None,
        standards: Mapping[str, Standard] | None = None,
    ) -> None:
        super().__init__()
        unknown = [teacher for teacher in configs if teacher not in tokens.teachers]
        if unknown:
            raise ConfigError(
                f"the student was composed for {', '.join(tokens.teachers)}, not for {', '.join(unknown)}",
                "Supervise only those teachers, or compose the student again.",
            )
        self.configs = dict(configs)
        self.tokens = tokens
        self.context = context
        self.compat = compat
        own_latents = tokens.tokens_per_teacher == 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict(
                {
                    teacher: nn.ModuleDict(
                        {str(n): Predictor(config, hidden_size, own_latents=own_latents) for n in config.layers}
                    )
                    for teacher, config in self.configs.items()
                }
            )
        self.logit_scales = nn.ParameterDict({t: nn.Parameter(torch.tensor(2.0)) for t in self.configs})
        self.standards = nn.ModuleDict(dict(standards or {}))

    def standardise(self, teacher: str, features: Tensor) -> Tensor:
        """Return features (..., C) of a teacher as its predictors are to predict them."""
        if teacher not in self.standards:
            return features
        standardised: Tensor = self.standards[teacher](features)
        return standardised

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose states are needed."""
        return tuple(sorted({layer for config in self.configs.values() for layer in config.layers}))

    def head(self, teacher: str, layer: int) -> Predictor:
        """Return one predictor."""
        found = self.heads.get_submodule(f"{teacher}.{layer}")
        if not isinstance(found, Predictor):
            raise TypeError(f"{teacher}.{layer} is a {type(found).__name__}")
        return found

    def forward(self, taps: Mapping[int, Tensor], items: Items, latents: Mapping[str, Tensor]) -> Predictions:
        """Predict every teacher's feature of every image: {(teacher, layer): (I, *shape)}.

        `taps` are the student's states (B, L, D) by layer, `latents` its learned vectors (N, D) by teacher. A map is
        queried by its learned vectors; one vector is queried by the mean of the states at the item's task tokens.
        Without task tokens the predictors use latents of their own.
        """
        predictions: Predictions = {}
        for teacher, config in self.configs.items():
            index = self.tokens.teachers.index(teacher)
            mask = items.context(index, self.context, padding=self.compat == "ola")
            for layer in config.layers:
                head = self.head(teacher, layer)
                states = taps[layer]
                if not torch.is_autocast_enabled(states.device.type):
                    states = states.to(head.projector.proj_in.weight.dtype)  # a half-precision student, float32 heads
                queries = self._queries(teacher, states, items, latents)
                flat = head(states, queries, items.sample, mask)
                predictions[teacher, layer] = flat.reshape(len(items), *config.shape)
        return predictions

    def _queries(self, teacher: str, states: Tensor, items: Items, latents: Mapping[str, Tensor]) -> Tensor | None:
        if self.tokens.tokens_per_teacher == 0:
            return None
        if self.configs[teacher].spatial:
            return latents[teacher].unsqueeze(0).to(states.dtype)
        places = items.task[:, self.tokens.teachers.index(teacher), : self.tokens.count(teacher)]
        return states[items.sample.unsqueeze(1), places].mean(dim=1, keepdim=True)
