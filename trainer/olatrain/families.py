"""Families of students: how each takes images, and what stands for an image in its prompt.

Everything else of a student comes from its ids (`tokens.locate`) and its modules (`student.Student`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from olatrain.tokens import Family, TaskTokens

FAMILIES: tuple[Family, ...] = ("llava", "llava_next", "idefics3", "qwen2_5_vl")


@dataclass(frozen=True)
class Shown:
    """One image as the student's model takes it."""

    inputs: dict[str, Tensor]
    """The image processor's arrays for this image alone."""
    block: list[int]
    """Ids that stand for the image in the prompt, placeholders and what is between them."""


class Vision:
    """A LLaVA's images: squares of one size, a fixed number of placeholders. Other families derive from it."""

    def __init__(self, processor: Any, tokens: TaskTokens) -> None:
        self._processor = processor
        self._tokens = tokens

    def show(self, image: Image.Image) -> Shown:
        """Preprocess one image: `pixel_values` (1, 3, H, W) float32."""
        inputs = self._processor.image_processor(images=image, return_tensors="pt")
        length = self._tokens.image_length or 1
        return Shown({"pixel_values": inputs["pixel_values"]}, [self._tokens.image_id] * length)

    def collate(self, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """Join the arrays of a batch's images, in order; nothing where there are none."""
        return _joined(shown, 0)

    def sequence(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return what the model wants to know of each position of `input_ids` (B, L)."""
        return {}

    def placeholders(self, shown: Shown) -> int:
        """Count the placeholders of one image."""
        return shown.block.count(self._tokens.image_id)

    def _expanded(self, image: Image.Image) -> tuple[Any, list[int]]:
        """Let the processor write out one image in a prompt that is nothing else."""
        mark = self._processor.tokenizer.convert_ids_to_tokens(self._tokens.image_id)
        found = self._processor(images=image, text=mark, add_special_tokens=False, return_tensors="pt")
        return found, found["input_ids"][0].tolist()


class TiledVision(Vision):
    """LLaVA-NeXT: the whole image first, then tiles with a newline after each row."""

    def show(self, image: Image.Image) -> Shown:
        """Preprocess one image: `pixel_values` (1, tiles, 3, H, W), `image_sizes` (1, 2) as height and width."""
        found, block = self._expanded(image)
        return Shown({name: found[name] for name in ("pixel_values", "image_sizes")}, block)

    def collate(self, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """Join images of different numbers of tiles; the model leaves out what `image_sizes` does not account for."""
        if not shown:
            return {}
        pixels = [one.inputs["pixel_values"] for one in shown]
        most = max(one.shape[1] for one in pixels)
        padded = [torch.nn.functional.pad(one, (0,) * 7 + (most - one.shape[1],)) for one in pixels]
        return {
            "pixel_values": torch.cat(padded),
            "image_sizes": torch.cat([one.inputs["image_sizes"] for one in shown]),
        }


class SplitVision(Vision):
    """Idefics3: tiles row by row, each announced by tokens of its own, then the whole image."""

    def show(self, image: Image.Image) -> Shown:
        """Preprocess one image: `pixel_values` (1, tiles, 3, H, W), `pixel_attention_mask` (1, tiles, H, W)."""
        found, block = self._expanded(image)
        return Shown({name: found[name] for name in ("pixel_values", "pixel_attention_mask")}, block)

    def collate(self, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """Join all tiles in one row: the model flattens samples and tiles, so none has to be filled up."""
        return _joined(shown, 1)


class PatchVision(Vision):
    """Qwen2.5-VL: patches of the whole image in its own shape; positions in the image follow from the grid."""

    def show(self, image: Image.Image) -> Shown:
        """Preprocess one image: `pixel_values` (patches, 3·2·P·P), `image_grid_thw` (1, 3)."""
        found = self._processor.image_processor(images=image, return_tensors="pt")
        count = int(found["image_grid_thw"].prod()) // self._processor.image_processor.merge_size**2
        names = ("pixel_values", "image_grid_thw")
        return Shown({name: found[name] for name in names}, [self._tokens.image_id] * count)

    def sequence(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return `mm_token_type_ids`: 1 at image tokens, 0 at text."""
        return {"mm_token_type_ids": (input_ids == self._tokens.image_id).long()}


_VISIONS: dict[Family, type[Vision]] = {
    "llava": Vision, "llava_next": TiledVision, "idefics3": SplitVision, "qwen2_5_vl": PatchVision,
}  # fmt: skip


def open_vision(processor: Any, tokens: TaskTokens) -> Vision:
    """Return how a student takes images; `processor` is what `compose.load_processor` gives."""
    return _VISIONS[tokens.family](processor, tokens)


class Parts:
    """Tokenizer and image processor of a student whose own processor class cannot be loaded without torchvision."""

    def __init__(self, tokenizer: Any, image_processor: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template: str | None = tokenizer.chat_template
        self._others = {
            name: json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("processor_config.json", "video_preprocessor_config.json")
            if (folder / name).is_file()
        }

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        """Render messages as the tokenizer does."""
        return self.tokenizer.apply_chat_template(messages, **settings)

    def save_pretrained(self, folder: Path) -> None:
        """Write both, and the files of the processor that they were loaded from."""
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        for name, content in self._others.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _joined(shown: Sequence[Shown], dim: int) -> dict[str, Tensor]:
    names = shown[0].inputs if shown else ()
    return {name: torch.cat([one.inputs[name] for one in shown], dim=dim) for name in names}
