"""Linear readings of which of two things is asked for, learnt from some questions and scored on others.

A question is a row: what is known of the first thing minus what is known of the second, so that to swap the two swaps
the answer, and no constant is needed.
"""

from __future__ import annotations

import numpy as np

_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
_FOLDS = 5
_STEPS = np.arange(1, 10) / 10
_SMALL = 1e-9


class Reading:
    """A ridge regression of `first` (N,), whether the answer is the first thing, on x (N, C).

    The penalty is the one that answers most of the questions held out from it, fifth by fifth in their order: those of
    one picture stand beside each other, and are held out together.
    """

    def __init__(self, x: np.ndarray, first: np.ndarray) -> None:
        scale = _spread(x)
        x, y = x / scale, np.where(first, 1.0, -1.0)
        folds = min(_FOLDS, len(x))
        fold = np.arange(len(x)) * folds // len(x)
        held_out = np.zeros(len(_PENALTIES))
        for out in range(folds):
            told = x[fold == out] @ _ridge(x[fold != out], y[fold != out]) > 0
            held_out += (told == first[fold == out, None]).sum(axis=0)
        self.weights: np.ndarray = _ridge(x, y)[:, int(held_out.argmax())] / scale

    def right(self, x: np.ndarray, first: np.ndarray) -> float:
        """Return the share of other questions that it answers as `first` does."""
        return float(((x @ self.weights > 0) == first).mean())


def _spread(x: np.ndarray) -> np.ndarray:
    """(C,): how far differences (N, C) are from 0."""
    found: np.ndarray = np.sqrt((x**2).mean(axis=0)) + _SMALL
    return found


def _ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(C, P): weights by penalty, all from one decomposition, of the smaller of the two products."""
    wide = x.shape[1] > len(x)
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    told = vectors.T @ (y if wide else x.T @ y)
    found: np.ndarray = vectors @ (told[:, None] / (values[:, None] + np.array(_PENALTIES)))
    return x.T @ found if wide else found


class OddFunctions:
    """Functions of numbers known of two things, (N, Q) each, that change their sign where the two are swapped.

    Of each number the difference, its sign, square and steps; steps of the number itself; of each two numbers one's
    difference by the other's mean, and one's sign where the other differs much. A rule such as "the larger if sizes
    differ by more than so many times, else the smaller" is a sum of these. Steps are at the deciles of the numbers
    given here, which are those of the questions to train on.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        both = np.concatenate([first, second])
        self._spread = _spread(first - second)
        self._middle, self._scale = both.mean(axis=0), both.std(axis=0) + _SMALL
        self._levels = np.quantile(both, _STEPS, axis=0)
        self._apart = np.quantile(np.abs(first - second), _STEPS, axis=0)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return their values, (N, F)."""
        d = (first - second) / self._spread
        sign = np.sign(first - second)
        far = np.abs(first - second)[:, None] > self._apart
        mean = ((first + second) / 2 - self._middle) / self._scale
        levels = (first[:, None] > self._levels).astype(float) - (second[:, None] > self._levels)
        found = [
            d, sign, d * np.abs(d), np.tanh(2 * d), sign[:, None] * far, levels,
            d[:, :, None] * mean[:, None], sign[:, :, None] * far[:, None, len(_STEPS) // 2],
        ]  # fmt: skip
        return np.concatenate([part.reshape(len(d), -1) for part in found], axis=1)
