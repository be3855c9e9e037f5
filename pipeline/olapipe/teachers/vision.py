"""Vision transformers of transformers as teachers: `dinov2`, `dinov3`, `siglip`, `clip`, `internvit`, and any `hf`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights, weights_digest
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config
from olapipe.teachers.pixels import CONFIG, read_preprocessor
from olapipe.teachers.tower import Tower, build_tower
from olaschema.manifest import Fingerprint, Scalar

if TYPE_CHECKING:
    from olapipe.teachers.info import TeacherInfo

# Parts of a checkpoint beside the tower's tokens: heads, poolers, and what only masked training uses.
_BESIDE = re.compile(r"(pooler|head|classifier|attention_pool)\.|(.*\.)?mask_token$")
# What changes a feature but shows neither in the weights nor in the other fields of the fingerprint.
_ARCHITECTURE = (
    "hidden_act", "num_attention_heads", "num_heads", "layer_norm_eps", "patch_size", "rope_theta", "window_size",
    "norm_type", "use_qk_norm", "use_gated_mlp", "use_swiglu_ffn",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Which checkpoints a teacher takes: `model_type` of config.json, and of the vision tower described in it."""

    types: tuple[str, ...]
    tower: tuple[str, ...]
    what: str
    processors: tuple[str, ...]


def _forms(*names: str) -> tuple[str, ...]:
    return tuple(name + suffix for name in names for suffix in ("", "Fast", "Pil"))


_CLIP_PROCESSORS = (*_forms("CLIPImageProcessor"), "CLIPFeatureExtractor")
FAMILIES: Mapping[str, Family] = {
    "dinov2": Family(
        ("dinov2", "dinov2_with_registers"), ("dinov2", "dinov2_with_registers"), "DINOv2 checkpoint",
        _forms("BitImageProcessor"),
    ),
    "dinov3": Family(
        ("dinov3_vit",), ("dinov3_vit",), "DINOv3 ViT checkpoint", _forms("DINOv3ViTImageProcessor")
    ),
    "siglip": Family(
        ("siglip", "siglip_vision_model"), ("siglip_vision_model",), "SigLIP or fixed-resolution SigLIP 2 checkpoint",
        _forms("SiglipImageProcessor"),
    ),
    "clip": Family(
        ("clip", "clip_vision_model", "llava"), ("clip_vision_model",), "CLIP checkpoint, or a LLaVA with a CLIP tower",
        _CLIP_PROCESSORS,
    ),
    "internvit": Family(
        ("internvl", "internvl_vision"), ("internvl_vision",), "InternVL checkpoint in the Hugging Face layout (…-hf)",
        _forms("GotOcr2ImageProcessor"),
    ),
    "hf": Family((), (), "vision model of transformers", ()),
}  # fmt: skip


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load a vision transformer and tap its blocks; raises TeacherError."""
    family = FAMILIES[info.name]
    options = resolve_options(info.name, info.options, settings)
    by_card = options.get("licence") == "card"
    extra = (CONFIG, "README.md") if by_card else (CONFIG,)
    checkpoint = locate(info.name, settings.checkpoint or info.published, extra=extra)
    config, is_part = _tower_config(checkpoint, family)
    preprocessor = read_preprocessor(checkpoint, options, expected=family.processors)
    model, tensors = _load_model(checkpoint, config, is_part=is_part)
    side, _ = preprocessor.output_size
    tower = build_tower(
        checkpoint, model, config, side=side, taps=str(options["taps"]), pooling=str(options["pooling"]),
        final_norm=options["norm"] == "final", truncate=info.name != "hf",
    )  # fmt: skip
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class=type(model).__name__,
        weights=weights_digest(_computing(tensors, tower)),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=tower.taps,
        pooling=tower.pooling,
        options={"norm": str(options["norm"]), **_architecture(config)},
        grid=tower.grid,
        channels=tower.channels,
        compute_dtype=settings.compute_dtype,
    )
    licence = info.licence
    if "licence" in options:
        licence = _card_licence(checkpoint) if by_card else str(options["licence"])
    return TorchTeacher(
        tower,
        settings,
        name=info.name,
        licence=licence,
        source=checkpoint.source,
        preprocessor=preprocessor,
        fingerprint=fingerprint,
    )


def _tower_config(checkpoint: Checkpoint, family: Family) -> tuple[Any, bool]:
    """Return the config of the vision tower, and whether it is a part of a larger model's."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = read_config(checkpoint, checkpoint.path, model_type=family.types, what=family.what)
    inner = values.get("vision_config")
    if isinstance(inner, Mapping):
        values = {"model_type": f"{values['model_type']}_vision_model", **inner}
    found = values.get("model_type")
    wrong = bool(family.tower) and found not in family.tower
    if wrong or not isinstance(found, str) or found not in CONFIG_MAPPING:
        expected = " or ".join(map(repr, family.tower)) or "a model type of transformers"
        raise checkpoint.error(
            f"its vision tower is of type {found!r}, expected {expected}",
            f"Pass the folder of a {family.what}: --checkpoint {checkpoint.teacher}=FOLDER",
        )
    # Neither the pooling head nor the token of masked training takes part in the patch tokens.
    off = {"vision_use_head": False, "use_mask_token": False}
    return make_config(CONFIG_MAPPING[found], values | off, checkpoint), isinstance(inner, Mapping)


def _load_model(checkpoint: Checkpoint, config: Any, *, is_part: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the model and its tensors by their names within the tower, as the file spells them."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise checkpoint.error(
            f"transformers has no plain model for {config.model_type!r}", "Register a teacher of your own as a plug-in."
        )
    model_class: Any = MODEL_MAPPING[type(config)]
    pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
    with torch.device("meta"):
        expected = set(model_class(config, **pooler).state_dict())
    names: list[str] = []

    def note(name: str) -> bool:
        names.append(name)
        return False

    read_weights(checkpoint, checkpoint.path, keep=note)  # reads no tensor, only the names
    prefix = tower_prefix(names, expected)
    own_parts = {name.partition(".")[0] for name in expected}

    def belongs(name: str) -> bool:
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or inner in expected:
            return name.startswith(prefix)
        # What is left is another part of the larger model, a head, or a tensor that strict loading has to refuse.
        return not _BESIDE.match(inner) and (not is_part or inner.partition(".")[0] in own_parts)

    found = read_weights(checkpoint, checkpoint.path, keep=belongs)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return load_strictly(model_class, config, tensors, checkpoint, **pooler), tensors


def tower_prefix(names: list[str], expected: set[str]) -> str:
    """Return the prefix under which most of a tower's tensors are found in a checkpoint, e.g. `vision_model.`."""
    counts: dict[str, int] = {"": 0}
    for name in names:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                prefix = "".join(f"{part}." for part in parts[:cut])
                counts[prefix] = counts.get(prefix, 0) + 1
    return max(counts, key=lambda prefix: (counts[prefix], -len(prefix)))


def _computing(tensors: Mapping[str, torch.Tensor], tower: Tower) -> dict[str, torch.Tensor]:
    """Leave out what no tapped token passes: later blocks, a norm that is not applied, masked training's token."""
    block = re.compile(rf"(?:.*\.)?{tower.blocks_name.rpartition('.')[2]}\.(\d+)\.")
    norm = re.compile(rf"{re.escape(tower.norm_name)}\.") if tower.norm_name else None

    def counts(name: str) -> bool:
        found = block.match(name)
        if found is not None:
            return int(found[1]) <= tower.taps[-1]
        return not name.endswith("mask_token") and (tower.norm is not None or norm is None or not norm.match(name))

    return {name: tensor for name, tensor in tensors.items() if counts(name)}


def _architecture(config: Any) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for name in _ARCHITECTURE:
        value = getattr(config, name, None)
        if value is not None:
            found[name] = value if isinstance(value, (str, int, float)) else ",".join(map(str, value))
    return found


def _card_licence(checkpoint: Checkpoint) -> str:
    """Return the licence stated at the top of the model card, README.md."""
    remedy = f"State it: --set options.{checkpoint.teacher}.licence=NAME"
    try:
        text = (checkpoint.path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise checkpoint.error("no README.md states its licence", remedy) from error
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        card = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise checkpoint.error(f"the head of README.md is not YAML: {error}", remedy) from error
    named = card.get("license_name") or card.get("license") if isinstance(card, dict) else None
    if not named or not isinstance(named, str):
        raise checkpoint.error("its README.md states no licence", remedy)
    return named
