"""Features to stored arrays on the device where the teacher runs: the arithmetic of `olaschema.precision.encode`.

Every step is an IEEE operation with one correct result (division, rounding, comparison), so that a CPU, a GPU and
numpy write the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from olaschema.manifest import Precision
from olaschema.precision import GROUP, LARGEST_Q, Stored


def quantise(features: Tensor, precision: Precision) -> Stored:
    """Round float32 features `(..., C)` on any device; the stored arrays arrive on the host.

    Bit for bit what `olaschema.precision.encode` gives, with its error bounds, for all images that `require_storable`
    accepts. What becomes of the others is undefined: they are not to be stored.
    """
    if precision == "float32":
        return Stored(features.cpu().numpy())
    if precision == "float16":
        return Stored(features.to(torch.float16).cpu().numpy())
    channels = features.shape[-1]
    groups = -(-channels // GROUP)
    padded = functional.pad(features, (0, groups * GROUP - channels))
    grouped = padded.reshape(*features.shape[:-1], groups, GROUP)
    scale = _scale(grouped.abs().amax(dim=-1), LARGEST_Q[precision])
    integers = (grouped / scale.float().unsqueeze(-1)).round().to(torch.int8).flatten(-2)
    if precision == "int4":
        halves = integers[..., : channels + channels % 2].view(torch.uint8) & 15
        return Stored((halves[..., 0::2] | halves[..., 1::2] << 4).cpu().numpy(), scale.cpu().numpy())
    return Stored(integers[..., :channels].contiguous().cpu().numpy(), scale.cpu().numpy())


def _scale(largest: Tensor, largest_q: int) -> Tensor:
    # a tensor on the device, because CUDA divides by a number on the host as a product with its rounded inverse
    exact = largest / torch.full_like(largest, largest_q)
    nearest = exact.to(torch.float16)
    bits = nearest.view(torch.int16) + (nearest.float() < exact)
    return bits.clamp(min=1).view(torch.float16)
