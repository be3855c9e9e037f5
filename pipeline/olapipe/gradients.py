"""What a stored target does to training: losses and their gradients with respect to the predictions, in plain numpy.

The same losses as the trainer's (`olatrain.losses`), written again because neither half imports the other; a test holds
the two together. Predictions and targets are (N, E): N images of one batch, flattened.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LOGIT_SCALE = 2.0
"""Logarithm of the contrastive temperature at its published start; exp of it is clamped at 100."""
CONTRASTIVE = 0.3
"""Published weight of the contrastive term relative to smooth-L1."""


@dataclass(frozen=True)
class Change:
    """What exchanging exact targets for stored ones changes, for predictions at one centred cosine."""

    centred_cosine: float
    loss: float
    """|L(stored) − L(exact)| / L(exact) of smooth-L1 + 0.3 · contrastive."""
    smooth_l1: float
    """Cosine between the gradients of smooth-L1 over the whole batch."""
    contrastive: float
    """Cosine between the gradients of the contrastive term over the whole batch."""

    @property
    def gradient_error(self) -> float:
        """1 − the worse of the two cosines."""
        return 1.0 - min(self.smooth_l1, self.contrastive)


def predictions_at(exact: np.ndarray, mean: np.ndarray, cosine: float, seed: int = 0) -> np.ndarray:
    """Return predictions (N, E) whose cosine to the targets is `cosine` once `mean` (E,) is taken from both.

    The rest of their length points in a random direction. They are as long as the best predictor of that correlation
    makes them, `cosine` times the centred target, which leaves 1 − cosine² of its variance unexplained.
    """
    centred = exact.astype(np.float64) - mean
    other = np.random.default_rng(seed).normal(size=centred.shape)
    squares = np.square(centred).sum(axis=1, keepdims=True)
    other -= (other * centred).sum(axis=1, keepdims=True) / np.where(squares > 0, squares, 1) * centred
    length = np.linalg.norm(other, axis=1, keepdims=True)
    other *= np.sqrt(squares) / np.where(length > 0, length, 1)
    return np.asarray(mean + cosine * (cosine * centred + np.sqrt(1 - cosine**2) * other))


def smooth_l1(prediction: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the smooth-L1 loss (β = 1), a mean over all elements, and its gradient (N, E)."""
    difference = prediction - target
    size = np.abs(difference)
    loss = np.where(size < 1, 0.5 * np.square(difference), size - 0.5).mean()
    return float(loss), np.clip(difference, -1, 1) / difference.size


def contrastive(
    prediction: np.ndarray, target: np.ndarray, logit_scale: float = LOGIT_SCALE
) -> tuple[float, np.ndarray]:
    """Return InfoNCE from predictions to targets (nats, a mean over the batch) and its gradient (N, E)."""
    lengths = np.maximum(np.linalg.norm(prediction, axis=1, keepdims=True), 1e-12)
    query = prediction / lengths
    pool = target / np.maximum(np.linalg.norm(target, axis=1, keepdims=True), 1e-12)
    temperature = min(float(np.exp(logit_scale)), 100.0)
    logits = query @ pool.T * temperature
    logits -= logits.max(axis=1, keepdims=True)
    shares = np.exp(logits)
    totals = shares.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(totals[:, 0]) - np.diag(logits)))
    pull = (shares / totals - np.eye(len(query))) @ pool * temperature / len(query)
    return loss, (pull - (pull * query).sum(axis=1, keepdims=True) * query) / lengths


def change(exact: np.ndarray, stored: np.ndarray, mean: np.ndarray, cosine: float) -> Change:
    """Compare losses and gradients from `exact` and `stored` targets (N, E), for predictions at a centred cosine."""
    exact, stored, mean = (values.astype(np.float64) for values in (exact, stored, mean))
    prediction = predictions_at(exact, mean, cosine)
    right = [smooth_l1(prediction, exact), contrastive(prediction, exact)]
    given = [smooth_l1(prediction, stored), contrastive(prediction, stored)]
    loss = right[0][0] + CONTRASTIVE * right[1][0]
    other = given[0][0] + CONTRASTIVE * given[1][0]
    return Change(
        centred_cosine=cosine,
        loss=abs(other - loss) / loss if loss else float(other != 0),
        smooth_l1=_cosine(right[0][1], given[0][1]),
        contrastive=_cosine(right[1][1], given[1][1]),
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    # two gradients that are zero are the same gradient
    return float((a * b).sum()) / lengths if lengths else float(np.array_equal(a, b))
