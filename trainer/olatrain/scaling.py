"""Stored arrays to features on the device where the student trains: the arithmetic of `olaschema.precision.decode`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olaschema.basis import Basis
from olaschema.precision import GROUP


class StoredBasis(nn.Module):
    """The basis of a teacher stored as klt, on the student's device; part of no checkpoint."""

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        for name in ("mean", "places", "channels"):
            self.register_buffer(name, torch.from_numpy(getattr(basis, name)), persistent=False)

    def forward(self, coefficients: Tensor) -> Tensor:
        """Return the features `(B, H, W, C)` or `(B, C)` of coefficients, as `olaschema.basis.Basis.backward` does."""
        mean, places, channels = self.get_buffer("mean"), self.get_buffer("places"), self.get_buffer("channels")
        tokens = coefficients.reshape(-1, *mean.shape)
        return (places.t() @ tokens @ channels + mean).reshape(coefficients.shape)


def decode(
    values: Tensor,
    scale: Tensor | None,
    channels: int,
    basis: nn.Module | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Return features `(..., channels)`: float values as they are stored, integers times their scale as float32.

    `values`, `scale` and `offset` are as in `olaschema.precision.Stored`. Bit for bit what numpy gives, as the product
    is exact, also where a device multiplies and adds in one step; with a `basis`, whose coefficients they then are, up
    to the order of sums.
    """
    if scale is None:
        return values
    features = (_unpack(values) if values.dtype == torch.uint8 else values)[..., :channels].to(torch.float32)
    factors = scale.to(torch.float32)
    # group by group in place: a scale spread over all channels would take the memory of the features once more
    for group, part in enumerate(torch.split(features, GROUP, dim=-1)):
        part.mul_(factors[..., group, None])
    if offset is not None:
        features += offset.to(torch.float32)[..., None, None, :]
    if basis is not None:
        features = basis(features)
    return features


def _unpack(packed: Tensor) -> Tensor:
    """Return the signed halves of the bytes `(..., n)` as int8 `(..., 2n)`; the shift right keeps the sign."""
    halves = torch.stack((packed << 4, packed), dim=-1).view(torch.int8) >> 4
    return halves.flatten(-2)
