"""A vision transformer as a map of features: which blocks are tapped, where its patch tokens are, on which grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn import ModuleList

from olapipe.teachers.checkpoint import Checkpoint

Pooling = Literal["mean", "last", "concat"]
_NORMS = ("layernorm", "norm", "post_layernorm", "layer_norm", "ln_post", "final_layernorm", "final_layer_norm")
_SIZE_REMEDY = "Use an image_size that the model takes (a multiple of its patches), or the checkpoint's own."


class Tower(torch.nn.Module):
    """Patch tokens of the tapped blocks, pooled over the blocks: `(B, 3, H, W)` to `(B, h, w, C)`, float32.

    Class and register tokens are dropped. The taps are hooks: no other block's output is kept.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        blocks_name: str,
        norm_name: str,
        norm: torch.nn.Module | None,
        taps: tuple[int, ...],
        pooling: Pooling,
        arguments: dict[str, bool],
    ) -> None:
        super().__init__()
        self.model = model
        self.blocks_name, self.norm_name = blocks_name, norm_name
        self.taps, self.pooling = taps, pooling
        self.norm = norm
        self.prefix = 0
        self.grid = (0, 0)
        self.channels = 0
        self._arguments = arguments
        self._kept: dict[int, torch.Tensor] = {}
        blocks = model.get_submodule(blocks_name)
        for tap in taps:
            blocks.get_submodule(str(tap)).register_forward_hook(self._keep(tap))

    def _keep(self, tap: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(module: torch.nn.Module, given: Any, output: Any) -> None:
            self._kept[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def outputs(self, pixels_bchw: torch.Tensor) -> list[torch.Tensor]:
        """Run the model and return what the tapped blocks gave, `(B, N, C)` or `(B, C, h, w)`."""
        self.model(pixels_bchw, **self._arguments)
        return [self._kept.pop(tap) for tap in self.taps]

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Return the features `(B, h, w, C)`."""
        maps = [self._map(output) for output in self.outputs(pixels_bchw)]
        if self.pooling == "concat":
            return torch.cat(maps, dim=-1)
        if self.pooling == "last":
            return maps[-1]
        return torch.stack(maps).mean(dim=0)

    def _map(self, output: torch.Tensor) -> torch.Tensor:
        tokens = output[:, self.prefix :] if output.ndim == 3 else output.permute(0, 2, 3, 1)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return tokens.float().reshape(len(tokens), *self.grid, -1)


def build_tower(
    checkpoint: Checkpoint,
    model: torch.nn.Module,
    config: Any,
    *,
    side: int,
    taps: str,
    pooling: str,
    final_norm: bool,
    truncate: bool,
) -> Tower:
    """Tap a model, and run it once on an empty image to learn its grid and channels.

    `truncate` removes the blocks after the last tap, which compute nothing that is kept. Raises TeacherError
    where blocks, norm or grid are not found, or the model does not take images of this side.
    """
    blocks_name, blocks = find_blocks(checkpoint, model, config)
    chosen = choose_taps(checkpoint, taps, len(blocks), pooling)
    norm_name, norm = find_norm(model, blocks_name)
    if final_norm and norm is None:
        raise checkpoint.error(f"{type(model).__name__} has no final norm", "Choose norm=none.")
    if truncate:
        del blocks[chosen[-1] + 1 :]
    if len(chosen) == 1:
        pooling = "last"  # one tap is the same feature under every pooling, and gets one fingerprint
    takes_size = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    trained = getattr(config, "image_size", None)
    resized = (list(trained) if isinstance(trained, tuple) else trained) not in (side, [side, side])
    tower = Tower(
        model.eval(),
        blocks_name=blocks_name,
        norm_name=norm_name,
        norm=norm if final_norm else None,
        taps=chosen,
        pooling="concat" if pooling == "concat" else "last" if pooling == "last" else "mean",
        arguments={"interpolate_pos_encoding": True} if takes_size and resized else {},
    )
    _learn_shape(checkpoint, tower, config, side)
    return tower


def find_blocks(checkpoint: Checkpoint, model: torch.nn.Module, config: Any) -> tuple[str, ModuleList]:
    """Return name and list of the model's blocks: the largest list with as many entries as the config has layers."""
    depth = getattr(config, "num_hidden_layers", None) or len(getattr(config, "depths", ()))
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ModuleList) and depth and len(module) == depth
    ]
    if not lists:
        raise checkpoint.error(
            f"no list of {depth} blocks was found in {type(model).__name__}",
            "Register a teacher of your own as a plug-in.",
        )
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))


def find_norm(model: torch.nn.Module, blocks_name: str) -> tuple[str, torch.nn.Module | None]:
    """Return name and module of the norm after the last block, or None where the model has none.

    It stands beside the blocks or beside a module that holds them; norms of embeddings or heads stand elsewhere.
    """
    parts = blocks_name.split(".")
    beside = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts))]
    modules = dict(model.named_modules())
    for name in (before + norm for before in beside for norm in _NORMS):
        if name in modules and not isinstance(modules[name], torch.nn.Identity):
            return name, modules[name]
    return "", None


def choose_taps(checkpoint: Checkpoint, text: str, depth: int, pooling: str) -> tuple[int, ...]:
    """Read taps such as `-1` or `4,11`; negative ones count from the end. `last` pooling needs the last one only.

    Raises TeacherError unless they are blocks of the model in ascending order.
    """
    given = [int(part) for part in text.split(",")]
    taps = tuple(tap if tap >= 0 else depth + tap for tap in given)
    if not all(0 <= tap < depth for tap in taps) or list(taps) != sorted(set(taps)):
        raise checkpoint.error(
            f"taps={text} are not blocks of this model in ascending order",
            f"It has {depth} blocks: 0 to {depth - 1}, or -{depth} to -1 counted from the end.",
        )
    return taps[-1:] if pooling == "last" else taps


def _learn_shape(checkpoint: Checkpoint, tower: Tower, config: Any, side: int) -> None:
    try:
        with torch.inference_mode():
            outputs = tower.outputs(torch.zeros(1, 3, side, side))
    except (RuntimeError, ValueError, IndexError) as error:
        raise checkpoint.error(f"the model does not take images of {side} × {side}: {error}", _SIZE_REMEDY) from error
    shapes = [tuple(output.shape) for output in outputs]
    if len(set(shapes)) > 1:
        raise checkpoint.error(
            f"the taps {tower.taps} give maps of different shapes: {', '.join(map(str, shapes))}",
            "Tap one block alone.",
        )
    shape = shapes[0]
    if len(shape) == 4:
        widths = getattr(config, "hidden_sizes", None)  # of convolutional stages, which put channels first
        width = widths[tower.taps[0]] if widths else getattr(config, "hidden_size", None)
        if shape[1] != width or (shape[3] == width and not widths):
            raise checkpoint.error(
                f"a tapped block gives {shape}, where the channels are not known to come first",
                "Register a teacher of your own as a plug-in.",
            )
        tower.channels, tower.grid = shape[1], (shape[2], shape[3])
    elif len(shape) == 3:
        tower.prefix, tower.grid = _token_grid(checkpoint, config, shape[1], side)
        tower.channels = shape[2]
    else:
        raise checkpoint.error(f"a tapped block gives {shape}, which is no map", "Tap another block.")
    if tower.norm is not None and tower.channels not in [p.shape[0] for p in tower.norm.parameters()]:
        raise checkpoint.error(
            f"the final norm is not for the {tower.channels} channels of block {tower.taps[0]}", "Choose norm=none."
        )
    if tower.pooling == "concat":
        tower.channels *= len(tower.taps)


def _token_grid(checkpoint: Checkpoint, config: Any, tokens: int, side: int) -> tuple[int, tuple[int, int]]:
    """Return how many tokens precede the patches, and the grid of the patches.

    A class token is recognised by one token more than patches and registers; DeiT's distillation token by two.
    """
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    registers = int(getattr(config, "num_register_tokens", None) or 0)
    if getattr(config, "depths", None):  # a pyramid: each stage has a smaller square of tokens, and no others
        cells, registers = round(tokens**0.5), 0
    elif isinstance(patch, int) and side % patch == 0:
        cells = side // patch
    else:
        raise checkpoint.error(f"{side} pixels are not a whole number of patches of {patch}", _SIZE_REMEDY)
    most = 2 if config.model_type == "deit" else 1
    prefix = tokens - cells * cells
    if not registers <= prefix <= registers + most:
        raise checkpoint.error(
            f"{tokens} tokens are not {cells} × {cells} patches with {registers} register tokens and a class token",
            "Register a teacher of your own as a plug-in.",
        )
    return prefix, (cells, cells)
