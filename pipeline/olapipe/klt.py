"""Fitting the basis of the precision klt: principal components of tokens and channels, and the step of the integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from olapipe.quantise import DeviceBasis
from olaschema.basis import Basis
from olaschema.errors import CorpusError
from olaschema.precision import GROUP

STEP_IMAGES = 16
STEP_TOKENS = 4096
"""So many images, or tokens where that is more, but at most a quarter of all, choose the step and are kept from the
components: a basis fits the images that it was fitted on too well."""
MARGIN = 0.9
"""Share of the gradient error asked for that the fit aims at, because other images will be scored."""


def fit_basis(features: Sequence[np.ndarray], max_gradient_error: float) -> Basis:
    """Fit a basis on float32 features `(H, W, C)` or `(C,)` of some images.

    The step is the largest with which 1 − cosine of the smooth-L1 gradients, for predictions at centred cosine 0.9,
    stays within MARGIN of `max_gradient_error`. There a gradient is the prediction's error, 1 − 0.9² of the centred
    variance, and storing adds an independent one: the cosine is 1/√(1 + stored/(0.19 · variance)).
    Raises CorpusError for fewer than 4 images. All sums run in torch, whose number of threads the caller has set: with
    another number a sum may differ in its last bit, and then so does the file.
    """
    if len(features) < 4:
        raise CorpusError(
            f"{len(features)} usable images are too few to fit a basis on", "Take another --precision, or more images."
        )
    tokens, channels = int(np.prod(features[0].shape[:-1])), features[0].shape[-1]
    kept = min(max(STEP_IMAGES, STEP_TOKENS // tokens), len(features) // 4)
    fitted = [feature.reshape(tokens, channels) for feature in features[kept:]]
    mean = np.stack(fitted).mean(axis=0, dtype=np.float64).astype(np.float32)
    by_channel = torch.zeros(channels, channels, dtype=torch.float64)
    by_place = torch.zeros(tokens, tokens, dtype=torch.float64)
    for feature in fitted:
        centred = torch.from_numpy(feature - mean)
        by_channel += centred.t() @ centred
        by_place += centred @ centred.t()
    basis = Basis(mean, _components(by_place), _components(by_channel), 2.0**-24)
    tests = torch.from_numpy(np.stack(features[:kept]))
    coefficients = DeviceBasis(basis, tests.device).forward(tests).numpy()
    return Basis(basis.mean, basis.places, basis.channels, _step(coefficients, max_gradient_error * MARGIN))


def _components(covariance: Tensor) -> np.ndarray:
    """Return the orthonormal eigenvectors as rows, the strongest first, each with its largest entry positive."""
    rows = torch.linalg.eigh(covariance)[1].t().flip(0).numpy()
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    return np.ascontiguousarray(rows * np.where(largest < 0, -1, 1)[:, None], dtype=np.float32)


def _step(coefficients: np.ndarray, gradient_error: float) -> float:
    """Return the largest float16 whose multiples are near enough to the coefficients, at least 2⁻²⁴."""
    centred = coefficients.astype(np.float64)
    allowed = (1 / (1 - gradient_error) ** 2 - 1) * (1 - 0.9**2) * np.square(centred).sum()
    low, high = 1, 0x7BFF  # positive float16 numbers in order, as their bits
    while low < high:
        middle = (low + high + 1) // 2
        step = float(np.uint16(middle).view(np.float16))
        if _squared_error(centred, step) <= allowed:
            low = middle
        else:
            high = middle - 1
    return float(np.uint16(low).view(np.float16))


def _squared_error(coefficients: np.ndarray, step: float) -> float:
    """Return the squared error of storing coefficients, with the larger steps of groups that need them."""
    *grid, channels = coefficients.shape
    padded = np.zeros((*grid, -(-channels // GROUP) * GROUP))
    padded[..., :channels] = coefficients
    grouped = padded.reshape(*grid, -1, GROUP)
    scale = np.maximum(np.abs(grouped).max(axis=-1, keepdims=True) / 127, step)
    return float(np.square(np.rint(grouped / scale) * scale - grouped).sum())
