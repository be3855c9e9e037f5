"""A panoptic map from a stored backbone map: OneFormer's decoders with it in place of their last input."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import OneFormerConfig, SwinBackbone
from transformers.models.oneformer.modeling_oneformer import (
    OneFormerPixelDecoder,
    OneFormerTaskModel,
    OneFormerTransformerModule,
)

from olapipe.preview.base import Decoder, Drawing, Unavailable
from olapipe.preview.modules import load_parts
from olapipe.preview.panoptic import DRAWN, NOTHING, Panoptic, draw, merge_queries
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights
from olapipe.teachers.huggingface import load_strictly, make_config
from olaschema.manifest import Fingerprint

TASK = "the task is panoptic"
_TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_ENCODER = "model.pixel_level_module.encoder."
_NOT_OF_MAPS = re.compile(r"mask_token$|^(swin\.)?layernorm\.")  # of Swin's pretraining and as a classifier


@dataclass(frozen=True)
class Classes:
    """Names of the classes by id, and which of them are things; None where the checkpoint does not say."""

    names: dict[int, str]
    things: frozenset[int] | None

    @property
    def stuff(self) -> frozenset[int]:
        """Classes whose segments are one, however many there are; none where things are not told from stuff."""
        return frozenset(self.names) - self.things if self.things is not None else frozenset()


@dataclass(frozen=True)
class OneFormerParts:
    """OneFormer without its losses and its text branch, which only training uses."""

    backbone: torch.nn.Module
    pixel_decoder: torch.nn.Module
    task_encoder: torch.nn.Module
    transformer: torch.nn.Module


class SegDecoder(Decoder[Panoptic]):
    """OneFormer's panoptic map. The maps before the last are not stored: they are computed from the image."""

    needs_pixels = True

    def __init__(
        self,
        parts: OneFormerParts,
        task_bl: torch.Tensor,
        classes: Classes,
        device: torch.device,
    ) -> None:
        # transformers' own annotations of calling a model are lost in its decorators
        self._backbone: Any = parts.backbone.to(device=device)
        self._pixel_decoder: Any = parts.pixel_decoder.to(device=device)
        self._task_encoder: Any = parts.task_encoder.to(device=device)
        self._transformer: Any = parts.transformer.to(device=device)
        self._task_bl = task_bl.to(device, torch.float32)
        self._classes = classes
        self._device = device

    def full(self, pixels_chw: np.ndarray) -> Panoptic:
        """Return the panoptic map of preprocessed pixels, every backbone map in its own size."""
        with torch.inference_mode():
            return self._merged(self._maps(pixels_chw))

    def decode(self, feature: np.ndarray, pixels_chw: np.ndarray | None) -> Panoptic:
        """Return the panoptic map with `feature` `(H, W, C)` as the last map, the others resized to its size.

        Raises Unavailable without pixels: three of the four maps come from them.
        """
        if pixels_chw is None:
            raise Unavailable("seg: the decoder also reads the backbone's earlier maps", "Add --images FOLDER.")
        last_bchw = torch.from_numpy(feature).permute(2, 0, 1)[None].to(self._device)
        with torch.inference_mode():
            earlier = [
                torch.nn.functional.interpolate(
                    map_bchw, size=last_bchw.shape[-2:], mode="bilinear", align_corners=False
                )
                for map_bchw in self._maps(pixels_chw)[:-1]
            ]
            return self._merged([*earlier, last_bchw])

    def draw(self, output: Panoptic) -> Drawing:
        """Draw segments in colours of their class, named; what belongs to no segment stays dark."""
        return draw(output, self._classes.names)

    def agreement(self, full: Panoptic, decoded: Panoptic) -> str:
        """Share of pixels that get the same class, nothing counting as one."""
        same = float((full.labels == decoded.labels).mean())
        nothing = float((full.labels == NOTHING).mean())
        return f"same class as the full teacher at {same:.1%} of the pixels (it sees none at {nothing:.1%})"

    def _maps(self, pixels_chw: np.ndarray) -> list[torch.Tensor]:
        pixels_bchw = torch.from_numpy(pixels_chw)[None].to(self._device)
        return list(self._backbone(pixels_bchw).feature_maps)

    def _merged(self, maps_bchw: list[torch.Tensor]) -> Panoptic:
        decoded = self._pixel_decoder(maps_bchw, output_hidden_states=False)
        predicted = self._transformer(
            multi_scale_features=decoded.multi_scale_features,
            mask_features=decoded.mask_features,
            task_token=self._task_encoder(self._task_bl),
            output_attentions=False,
        )
        # mask logits are brought to the size they are looked at before queries compete, as the authors do
        masks_bqhw = torch.nn.functional.interpolate(
            predicted.prediction_masks.float(), size=(DRAWN, DRAWN), mode="bilinear", align_corners=False
        )
        return merge_queries(
            predicted.prediction_class[0].float().cpu().numpy(), masks_bqhw[0].cpu().numpy(), fused=self._classes.stuff
        )


def load(checkpoint: str, fingerprint: Fingerprint, device: torch.device) -> SegDecoder:
    """Load the whole OneFormer with its class list and task tokens, all from local files.

    Raises Unavailable where the folder has no tokenizer, TeacherError where it is not usable.
    """
    found = locate(fingerprint.teacher, checkpoint, extra=("preprocessor_config.json", "vocab.json", "merges.txt"))
    values = read_config(found, found.path, model_type="oneformer", what="OneFormer checkpoint")
    config: OneFormerConfig = make_config(OneFormerConfig, values | {"is_training": False}, found)
    task_bl = _task_tokens(found, config.task_seq_len)
    classes = read_classes(found, {int(index): str(name) for index, name in (config.id2label or {}).items()})
    return SegDecoder(_load_parts(config, found), task_bl, classes, device)


def _load_parts(config: OneFormerConfig, checkpoint: Checkpoint) -> OneFormerParts:
    tensors = read_weights(checkpoint, checkpoint.path, keep=lambda name: name.startswith("model."))
    inner = {name.removeprefix(_ENCODER): tensor for name, tensor in tensors.items() if name.startswith(_ENCODER)}
    encoder = {name: tensor for name, tensor in inner.items() if _NOT_OF_MAPS.search(name) is None}
    swin: Any = config.backbone_config
    swin.set_output_features_output_indices([f"stage{i + 1}" for i in range(len(swin.depths))], None)
    backbone = load_strictly(SwinBackbone, swin, encoder, checkpoint)
    parts = OneFormerParts(
        backbone,
        OneFormerPixelDecoder(config, feature_channels=backbone.channels),
        OneFormerTaskModel(config),
        OneFormerTransformerModule(in_features=config.conv_dim, config=config),
    )
    load_parts(
        {
            "model.pixel_level_module.decoder.": parts.pixel_decoder,
            "model.task_encoder.": parts.task_encoder,
            "model.transformer_module.": parts.transformer,
        },
        tensors,
        checkpoint,
    )
    return parts


def _task_tokens(checkpoint: Checkpoint, length: int) -> torch.Tensor:
    """Return the task's token ids `(1, length)`, 0 after its end, as OneFormer's task encoder reads them."""
    if not any(all((checkpoint.path / name).is_file() for name in kind) for kind in _TOKENIZERS):
        raise Unavailable(
            f"{checkpoint.teacher}: {checkpoint.path} has no tokenizer (vocab.json and merges.txt, or tokenizer.json), "
            f"so the words {TASK!r} cannot be given to OneFormer's decoder",
            "Copy the tokenizer's files from the published checkpoint into that folder.",
        )
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    ids = tokenizer(TASK, truncation=True, max_length=length)["input_ids"]
    return torch.tensor([ids + [0] * (length - len(ids))])


def read_classes(checkpoint: Checkpoint, labels: dict[int, str]) -> Classes:
    """Read the class list named in `preprocessor_config.json`, or the one inside it, else take `labels` of the config.

    Raises TeacherError where the list that is there does not say what it must.
    """
    path = checkpoint.path / "preprocessor_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        file = checkpoint.path / str(config.get("class_info_file"))
        if file.parent == checkpoint.path and file.is_file():
            listed = json.loads(file.read_text(encoding="utf-8"))
            names = {int(index): str(entry["name"]) for index, entry in listed.items()}
            things = frozenset(int(index) for index, entry in listed.items() if entry["isthing"])
            return Classes(names, things)
        if metadata := config.get("metadata"):
            names = {int(index): str(name) for index, name in metadata.items() if index.isdecimal()}
            return Classes(names, frozenset(map(int, metadata["thing_ids"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise checkpoint.error(
            f"its class list cannot be read: {error!r}", "Use preprocessor_config.json and class list as published."
        ) from error
    return Classes(labels, None)
