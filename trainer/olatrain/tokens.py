"""Task tokens: which ids of the vocabulary they are, and where a batch holds them.

Positions come from the ids alone, so any prompt layout and several images per sample work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from olaschema.errors import ConfigError
from olaschema.manifest import Frozen, canonical_json

RECORD_NAME = "ola.json"

Context = Literal["image", "prompt", "all"]
Family = Literal["llava", "llava_next", "idefics3", "qwen2_5_vl"]
TaskFormat = Literal["expand_emb", "emb"]


class TaskTokens(Frozen):
    """The record `ola.json` of a student's folder: its task tokens and the other ids that the method needs."""

    format: Literal[1] = 1
    teachers: tuple[str, ...]
    """In the order of their tokens in the prompt."""
    tokens_per_teacher: int = Field(ge=0)
    """Groups that a teacher's latents are averaged in: its task tokens, but for a map's in the format `emb`."""
    task_format: TaskFormat = "expand_emb"
    """What stands in the sequence: the means of groups of latents, or (`emb`) each latent for itself."""
    ids: dict[str, tuple[int, ...]]
    """For each teacher its ids, in the order of their place in the prompt."""
    family: Family = "llava"
    """How the student takes images (`olatrain.families`): its model type."""
    image_id: int
    """The placeholder that stands where image features go."""
    image_length: int | None = None
    """Placeholders of one image, where every image has the same number."""
    after_image: tuple[int, ...] = ()
    """Ids that the chat template writes between an image and its task tokens."""
    base_view: Literal["all", "first", "last"] = "all"
    """Which of a tiled image's placeholders show the whole image: the predictors read those and no tile's."""
    base_length: int | None = None
    """Placeholders of that view, where it is not all of them."""
    never_predicted: tuple[int, ...]
    """Ids that are no answer: left out of the softmax of the next-token loss and suppressed in generation."""
    chat_template: Literal["adapted", "plain"] | None = None
    """Whether the prompt's chat template is the language model's own, adapted, or a plain one written for it."""

    @model_validator(mode="after")
    def _consistent(self) -> TaskTokens:
        if tuple(self.ids) != self.teachers and set(self.ids) != set(self.teachers):
            raise ValueError(f"ids name {sorted(self.ids)}, teachers name {sorted(self.teachers)}")
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError(f"a teacher is named twice: {', '.join(self.teachers)}")
        size, every = self.tokens_per_teacher, self.task_format == "emb"
        for teacher, ids in self.ids.items():
            whole = bool(size and ids) and len(ids) % size == 0 if every else len(ids) == size
            if not whole:
                raise ValueError(f"{teacher} has {len(ids)} ids, tokens_per_teacher is {size}")
        if (self.base_view == "all") != (self.base_length is None):
            raise ValueError("base_length belongs to a base_view that is first or last")
        flat = (*self.flat, self.image_id)
        if len(set(flat)) != len(flat):
            raise ValueError("an id stands for two tokens")
        return self

    @property
    def flat(self) -> tuple[int, ...]:
        """Ids of all task tokens, teachers in order."""
        return tuple(i for teacher in self.teachers for i in self.ids[teacher])

    def count(self, teacher: str) -> int:
        """Return how many task tokens of a teacher follow each image."""
        return len(self.ids[teacher])

    def say(self) -> str:
        """Return how many task tokens follow each image, in words."""
        if len(set(map(self.count, self.teachers))) > 1:
            return "task tokens: " + ", ".join(f"{self.count(teacher)} for {teacher}" for teacher in self.teachers)
        return f"{self.tokens_per_teacher} task tokens for each of {', '.join(self.teachers)}"

    @classmethod
    def load(cls, folder: Path) -> TaskTokens:
        """Read `ola.json`; raises ConfigError where it is missing or not such a record."""
        path = folder / RECORD_NAME
        if (folder / "checkpoints").is_dir() and not path.exists():
            raise ConfigError(
                f"{folder} is the folder of a run, which holds only what was trained",
                f"Make a student of it with `olatrain export {folder} --out DIR` and start from that.",
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror}", "Make the student's folder with `olatrain compose`."
            ) from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the record"
            raise ConfigError(
                f"{path}: {where}: {problem['msg']}", "Make the student's folder again with `olatrain compose`."
            ) from error

    def save(self, folder: Path) -> None:
        """Write `ola.json`, equal bytes for equal records."""
        (folder / RECORD_NAME).write_bytes(canonical_json(self))


@dataclass(frozen=True)
class Items:
    """Where the images of a batch are: I items, one per image, in order of sample and of appearance.

    L is the batch's sequence length, T the number of teachers, K the largest number of task tokens of one.
    """

    sample: Tensor
    """(I,) int64: row of the batch that holds the image."""
    image: Tensor
    """(I, L) bool: the image's tokens with what stands between its tiles, or those of its base view alone."""
    before: Tensor
    """(I, L) bool: text before the image."""
    after: Tensor
    """(I, L) bool: text after the image, the answer included."""
    task: Tensor
    """(I, T, K) int64: positions of the image's task tokens, teachers in the record's order; where a teacher has fewer
    than the K of another, its last position is repeated."""
    padding: Tensor
    """(B, L) bool: positions that hold no token."""

    def __len__(self) -> int:
        return self.sample.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Items:
        """Return the same items on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return Items(**moved)

    def context(self, teacher: int, mode: Context, *, padding: bool = False) -> Tensor:
        """Positions a predictor of teacher number `teacher` may read: (I, L) bool.

        `image`: the item's own image and its task tokens of this teacher; `prompt`: the text before it as well;
        `all`: the text after it as well. Other images and other task tokens are never in it. With `padding`, the
        mode `all` lets positions without a token in, as the public OLA-VLM code does.
        """
        seen = self.image.scatter(1, self.task[:, teacher], True)
        if mode != "image":
            seen = seen | self.before
        if mode == "all":
            seen = seen | self.after
            if padding:
                seen = seen | self.padding[self.sample]
        return seen


def locate(
    tokens: TaskTokens,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    images: Sequence[int] | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
) -> Items:
    """Find the images and their task tokens in `input_ids` (B, L), where `attention_mask` (B, L) is not 0.

    Meant for the data loader: reads values one by one, so give it tensors on the CPU. A teacher's task tokens
    must follow each other in the record's order; the n-th group belongs to the n-th image of its sample, and with
    several images in a sample each image's groups stand between it and the next image. Without task tokens,
    images are runs of placeholders, split by `image_length` where that is fixed, or as `lengths` (placeholders of
    each image of each sample) says; a sample whose number in `images` (images per sample, length B) is 1 has one
    image however many runs its tiles make.

    Raises ConfigError naming the sample where the tokens do not form whole groups, as after a cut, or where what is
    found is not what `images` or `lengths` say.
    """
    real = attention_mask != 0
    ids = torch.where(real, input_ids, -1)
    length = ids.shape[1]
    width = len(tokens.teachers)
    found: list[tuple[int, list[int], list[list[int]]]] = []
    task_ids = torch.tensor(tokens.flat, dtype=ids.dtype)
    special = torch.isin(ids, torch.tensor((*tokens.flat, tokens.image_id), dtype=ids.dtype))
    for sample in range(ids.shape[0]):
        row = ids[sample].tolist()
        places = [p for p in special[sample].nonzero().flatten().tolist() if row[p] == tokens.image_id]
        groups = _groups(tokens, row, sample)
        if tokens.flat:
            spans = _split_by_groups(places, groups, sample)
        elif lengths is not None and sum(lengths[sample]) == len(places):
            spans = [places[end - n : end] for n, end in zip(lengths[sample], accumulate(lengths[sample]), strict=True)]
        elif places and images is not None and images[sample] == 1:
            spans = [places]
        else:
            spans = _split_by_runs(places, tokens.image_length)
        if images is not None and images[sample] != len(spans):
            raise _broken(sample, f"it has {images[sample]} images and the prompt has room for {len(spans)}")
        if lengths is not None and [len(span) for span in spans] != list(lengths[sample]):
            raise _broken(sample, f"its images have {list(lengths[sample])} tokens, not {[len(s) for s in spans]}")
        found += [(sample, span, groups[n] if groups else [[]] * width) for n, span in enumerate(spans)]
    image = torch.zeros(len(found), length, dtype=torch.bool)
    before, after = image.clone(), image.clone()
    text = real & ~special
    for sample, span, _ in found:  # what stands between the tiles of an image is no text
        text[sample, span[0] : span[-1] + 1] = False
    for item, (sample, span, _) in enumerate(found):
        first, last = span[0], span[-1] + 1
        if tokens.base_length is None:
            image[item, first:last] = real[sample, first:last]
        else:
            image[item, span[: tokens.base_length] if tokens.base_view == "first" else span[-tokens.base_length :]] = (
                True
            )
        before[item, :first] = text[sample, :first]
        after[item, last:] = text[sample, last:]
    most = max(map(tokens.count, tokens.teachers), default=0)
    task = torch.tensor([[g + g[-1:] * (most - len(g)) for g in groups] for *_, groups in found], dtype=torch.int64)
    task = task.reshape(len(found), width, most)
    sample_index = torch.tensor([sample for sample, *_ in found], dtype=torch.int64)
    # an image's span may enclose task tokens in an unusual layout: those are never part of the image
    image &= ~torch.isin(ids, task_ids)[sample_index]
    return Items(sample_index, image, before, after, task, ~real)


def _groups(tokens: TaskTokens, row: list[int], sample: int) -> list[list[list[int]]]:
    """Positions of the task tokens as [image][teacher][token]."""
    if not tokens.flat:
        return []
    by_teacher: list[list[list[int]]] = []
    for teacher in tokens.teachers:
        wanted, size = tokens.ids[teacher], tokens.count(teacher)
        members = set(wanted)
        places = [p for p, token in enumerate(row) if token in members]
        chunks = [places[n : n + size] for n in range(0, len(places), size)]
        for chunk in chunks:
            whole = tuple(row[p] for p in chunk) == wanted and chunk[-1] - chunk[0] == size - 1
            if not whole:
                raise _broken(sample, f"the task tokens of {teacher} at position {chunk[0]} are not a whole group")
        by_teacher.append(chunks)
    counts = {teacher: len(chunks) for teacher, chunks in zip(tokens.teachers, by_teacher, strict=True)}
    if len(set(counts.values())) > 1:
        raise _broken(sample, f"the teachers have different numbers of task token groups: {counts}")
    return [list(image) for image in zip(*by_teacher, strict=True)]


def _split_by_groups(images: list[int], groups: list[list[list[int]]], sample: int) -> list[list[int]]:
    if len(groups) <= 1:
        if bool(images) != bool(groups):
            raise _broken(sample, "it has an image without task tokens, or task tokens without an image")
        return [images] if images else []
    spans = []
    start = -1
    for number, group in enumerate(groups):
        places = [p for teacher in group for p in teacher]
        spans.append([p for p in images if start < p < min(places)])
        if not spans[-1]:
            raise _broken(sample, f"no image stands between task token groups {number} and {number + 1}")
        start = max(places)
    if images[-1] > start:
        raise _broken(sample, "its last image has no task tokens")
    return spans


def _split_by_runs(images: list[int], length: int | None) -> list[list[int]]:
    spans: list[list[int]] = []
    for place in images:
        full = length is not None and bool(spans) and len(spans[-1]) == length
        if spans and place == spans[-1][-1] + 1 and not full:
            spans[-1].append(place)
        else:
            spans.append([place])
    return spans


def _broken(sample: int, what: str) -> ConfigError:
    return ConfigError(
        f"sample {sample} of the batch: {what}",
        "Make prompts with the student's own chat template, and drop samples that are longer than the maximum length "
        "instead of cutting them inside an image.",
    )
