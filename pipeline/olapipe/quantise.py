"""Features to stored arrays on the device where the teacher runs: the arithmetic of `olaschema.precision.encode`.

Every step is an IEEE operation with one correct result (division, rounding, comparison) or a sum of integers, so that a
CPU, a GPU and numpy write the same bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from olaschema.basis import Basis
from olaschema.errors import StoreError
from olaschema.manifest import Precision
from olaschema.precision import EXACT_TOKENS, GROUP, LARGEST_HALF, LARGEST_Q, Stored


class DeviceBasis:
    """A basis on the device where the teacher runs."""

    def __init__(self, basis: Basis, device: torch.device) -> None:
        self.mean = torch.from_numpy(basis.mean).to(device)
        self.places = torch.from_numpy(basis.places).to(device)
        self.channels = torch.from_numpy(basis.channels).to(device)
        self.step = basis.step

    def forward(self, features: Tensor) -> Tensor:
        """Return the coefficients of features (B, ...), in their shape, as `olaschema.basis.Basis.forward`."""
        tokens = features.reshape(-1, *self.mean.shape) - self.mean
        return (self.places @ tokens @ self.channels.t()).reshape(features.shape)


def quantise(
    features: Tensor, precision: Precision, basis: DeviceBasis | None = None, *, centred: bool = False
) -> Stored:
    """Round float32 features `(..., C)`, or `(..., H, W, C)`, on any device; the stored arrays arrive on the host.

    klt, which needs its `basis`, sums in the device's order: integers may differ by one from numpy's where a quotient
    is within rounding of a half, and the same error bound holds.

    Bit for bit what `olaschema.precision.encode` gives, with its error bounds, for all images that `require_storable`
    accepts. What becomes of the others is undefined: they are not to be stored.
    """
    if precision == "float32":
        return Stored(features.cpu().numpy())
    if precision == "float16":
        return Stored(features.to(torch.float16).cpu().numpy())
    if features.device.type == "cpu" and features.ndim == 4 and len(features) > 1 and precision != "klt":
        # image by image, whose temporaries stay in the cache: a fifth of the time
        images = [quantise(image[None], precision, centred=centred).arrays for image in features]
        return Stored(**{name: np.concatenate([image[name] for image in images]) for name in images[0]})
    if precision == "klt":
        if basis is None:
            raise StoreError("features of the precision klt need their basis", "Read it with `FeatureStore.basis`.")
        features = basis.forward(features)
    offset = None
    if centred:
        means = _offset(features)
        features, offset = features - means.float()[..., None, None, :], means.cpu().numpy()
    channels = features.shape[-1]
    groups = -(-channels // GROUP)
    padded = functional.pad(features, (0, groups * GROUP - channels))
    grouped = padded.reshape(*features.shape[:-1], groups, GROUP)
    scale = _scale(grouped.abs().amax(dim=-1), LARGEST_Q[precision], 0.0 if basis is None else basis.step)
    integers = (grouped / scale.float().unsqueeze(-1)).round().to(torch.int8).flatten(-2)
    if precision == "int4":
        halves = integers[..., : channels + channels % 2].view(torch.uint8) & 15
        return Stored((halves[..., 0::2] | halves[..., 1::2] << 4).cpu().numpy(), scale.cpu().numpy(), offset)
    return Stored(integers[..., :channels].contiguous().cpu().numpy(), scale.cpu().numpy(), offset)


def _offset(features: Tensor) -> Tensor:
    halves = features.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16).double()
    tokens = features.shape[-3] * features.shape[-2]
    if tokens <= EXACT_TOKENS:
        sums = halves.sum(dim=(-3, -2)) * 2.0**24
    else:
        sums = (halves * 2.0**24).long().sum(dim=(-3, -2)).double()
    # a tensor, as in _scale
    count = torch.full_like(sums, tokens * 2.0**24)
    return (sums / count).float().to(torch.float16)


def _scale(largest: Tensor, largest_q: int, least: float) -> Tensor:
    # a tensor on the device, because CUDA divides by a number on the host as a product with its rounded inverse
    exact = (largest / torch.full_like(largest, largest_q)).clamp(min=least)
    nearest = exact.to(torch.float16)
    bits = nearest.view(torch.int16) + (nearest.float() < exact)
    return bits.clamp(min=1).view(torch.float16)
