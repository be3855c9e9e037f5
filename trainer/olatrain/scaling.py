"""Stored arrays to features on the device where the student trains: the arithmetic of `olaschema.precision.decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from olaschema.precision import GROUP


def decode(values: Tensor, scale: Tensor | None, channels: int) -> Tensor:
    """Return features `(..., channels)`: float values as they are stored, integers times their scale as float32.

    `values` and `scale` are as in `olaschema.precision.Stored`. Bit for bit what numpy gives, as the product is exact.
    """
    if scale is None:
        return values
    features = (_unpack(values) if values.dtype == torch.uint8 else values)[..., :channels].to(torch.float32)
    factors = scale.to(torch.float32)
    # group by group in place: a scale spread over all channels would take the memory of the features once more
    for group, part in enumerate(torch.split(features, GROUP, dim=-1)):
        part.mul_(factors[..., group, None])
    return features


def _unpack(packed: Tensor) -> Tensor:
    """Return the signed halves of the bytes `(..., n)` as int8 `(..., 2n)`; the shift right keeps the sign."""
    halves = torch.stack((packed << 4, packed), dim=-1).view(torch.int8) >> 4
    return halves.flatten(-2)
