"""Features fed to the language model: the multi-encoder baseline of OLA-VLM (arXiv 2412.09585), from a store.

As published with `aggregation = tokens`: the N vectors of a map, row by row, are averaged in K consecutive groups, one
vector for the whole image is repeated K times; a two-layer GELU MLP of the teacher's own projects them to the language
model's width; they stand right behind the image's tokens. Here those places are the teacher's task tokens, which then
hold no latents, so K is their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from olaschema.errors import ConfigError
from olatrain.tokens import TaskTokens


@dataclass(frozen=True)
class Fed:
    """One teacher's features of I images, as the teacher gave them."""

    values: Tensor
    """(I, H, W, C) or (I, C), any float dtype; what stands in rows that are not valid has no effect."""
    valid: Tensor
    """(I,) bool: whether there is a feature."""

    def part(self, first: int, count: int) -> Fed:
        """Return `count` images from number `first` on, fewer at the end."""
        return Fed(self.values[first : first + count], self.valid[first : first + count])


def joined(images: Sequence[Mapping[str, Fed]]) -> dict[str, Fed]:
    """Return the features of several images as one, by teacher; all have the same teachers."""
    return {
        teacher: Fed(
            torch.cat([fed[teacher].values for fed in images]), torch.cat([fed[teacher].valid for fed in images])
        )
        for teacher in images[0]
    }


class FeedProjector(nn.Module):
    """From one teacher's features to K input embeddings; `missing` (D,) is learned for images without a feature."""

    def __init__(self, shape: tuple[int, ...], tokens: int, missing: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = tokens
        hidden = len(missing)
        self.linear_1 = nn.Linear(shape[-1], hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        self.missing = nn.Parameter(missing.detach().float().clone())

    def forward(self, fed: Fed) -> Tensor:
        """Return (I, K, D)."""
        groups, vectors = 1, 1
        if len(self.shape) == 3:
            groups, vectors = self.tokens, self.shape[0] * self.shape[1] // self.tokens
        grouped = fed.values.float().reshape(len(fed.values), groups, vectors, self.shape[-1])
        pooled = grouped.mean(dim=2).expand(-1, self.tokens, -1)
        present = fed.valid[:, None, None]
        # `where` on both sides: a NaN in a row that is not valid must reach neither the output nor a gradient
        projected = self.linear_2(functional.gelu(self.linear_1(torch.where(present, pooled, 0.0))))
        return torch.where(present, projected, self.missing.to(projected))


@dataclass
class _Given:
    owner: Feeds
    embedded: dict[str, Tensor]
    written: set[str] = field(default_factory=set)


# The features of the pass in progress on this thread.
_GIVEN: ContextVar[_Given | None] = ContextVar("fed_features", default=None)


class Feeds(nn.Module):
    """The projectors of a model's fed teachers, and the hook by which their output becomes input embeddings.

    `shapes` are the features' by teacher. `missing` starts as the mean of the embedding rows of the teacher's tokens.
    Without a teacher nothing is hooked. Raises ConfigError for a teacher that has no task tokens, or whose vectors
    cannot be split into as many equal groups.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], tokens: TaskTokens, embeddings: nn.Embedding, *, seed: int
    ) -> None:
        super().__init__()
        self._ids = {teacher: _places(teacher, shape, tokens) for teacher, shape in shapes.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projectors = nn.ModuleDict(
                {
                    teacher: FeedProjector(shape, len(ids), embeddings.weight[list(ids)].mean(dim=0))
                    for (teacher, ids), shape in zip(self._ids.items(), shapes.values(), strict=True)
                }
            )
        if shapes:
            embeddings.register_forward_hook(self._write)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Who is fed."""
        return tuple(self._ids)

    def projector(self, teacher: str) -> FeedProjector:
        """Return one teacher's projector."""
        found = self.projectors.get_submodule(teacher)
        if not isinstance(found, FeedProjector):
            raise TypeError(f"{teacher} is a {type(found).__name__}")
        return found

    @contextmanager
    def given(self, fed: Mapping[str, Fed]) -> Iterator[None]:
        """Inside, prompts of the model hold these features: of every image, in order of sample and of appearance.

        Raises ConfigError where a fed teacher's features are not given, or reach no prompt.
        """
        if not self._ids:
            yield
            return
        missing = sorted(set(self._ids) - set(fed))
        if missing:
            raise _ungiven(missing)
        given = _Given(self, {teacher: self.projector(teacher)(fed[teacher]) for teacher in self._ids})
        token = _GIVEN.set(given)
        try:
            yield
        finally:
            _GIVEN.reset(token)
        lost = [teacher for teacher, rows in given.embedded.items() if len(rows) and teacher not in given.written]
        if lost:
            raise ConfigError(
                f"features of {', '.join(lost)} were given, and no prompt has room for them",
                "Make prompts with the student's own chat template.",
            )

    @torch.no_grad()
    def store_missing(self, embeddings: nn.Embedding) -> None:
        """Write what stands for no feature into the tokens' embedding rows: what the bare model then reads."""
        for teacher, ids in self._ids.items():
            embeddings.weight[list(ids)] = self.projector(teacher).missing.to(embeddings.weight)

    def _write(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids: Tensor = args[0]
        given = _GIVEN.get()
        for teacher, own in self._ids.items():
            # groups are whole and in order (`tokens.locate`), so row by row they are image by image
            here = torch.isin(ids, torch.tensor(own, dtype=ids.dtype, device=ids.device))
            places = int(here.sum())
            if not places:
                continue  # what is generated, or text alone
            if given is None or given.owner is not self:
                raise _ungiven([teacher])
            rows = given.embedded[teacher]
            if places != rows.shape[0] * rows.shape[1]:
                raise ConfigError(
                    f"the prompts have {places} places for features of {teacher}, features of {len(rows)} images "
                    f"fill {rows.shape[0] * rows.shape[1]}",
                    "Give the features of every image of the prompts, in order.",
                )
            output = output.masked_scatter(here.unsqueeze(-1), rows.to(output))
            given.written.add(teacher)
        return output


def _places(teacher: str, shape: tuple[int, ...], tokens: TaskTokens) -> tuple[int, ...]:
    ids = tokens.ids.get(teacher, ())
    if not ids:
        known = ", ".join(name for name in tokens.teachers if tokens.ids[name])
        raise ConfigError(
            f"feed names {teacher}, for which the student has no task tokens to put features at",
            f"It has some for {known or 'no teacher'}: compose it again with --teacher {teacher} and --task-tokens 8.",
        )
    vectors = shape[0] * shape[1] if len(shape) == 3 else len(ids)
    if vectors % len(ids):
        raise ConfigError(
            f"{teacher}: {vectors} vectors cannot be averaged in {len(ids)} equal groups",
            f"Compose the student with a number of task tokens that divides {vectors}.",
        )
    return ids


def _ungiven(teachers: list[str]) -> ConfigError:
    return ConfigError(
        f"the student is fed features of {', '.join(teachers)}, and none are given",
        "Give it a store of them (--store), of the fingerprint that it was trained with.",
    )
