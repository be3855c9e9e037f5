"""The basis of the tier `klt`: what a teacher's maps have in common, fitted once, kept as `bases/TEACHER.npy`.

A map (T tokens of C channels) is stored as integers of `places @ (map - mean) @ channels.T`: the mean map taken away,
rotated into the principal components of tokens and of channels (Karhunen–Loève, both orthonormal). Every coefficient
gets the same step, which is the optimal bit allocation by reverse water-filling (Cover and Thomas, theorem 10.3.3):
components weaker than the step become zeros, and the entropy coder makes them vanish.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np

from olaschema.errors import DamagedStoreError
from olaschema.manifest import BasisRecord

REACH = 127 * 65504 * 0.9
"""Longest distance of a map from the mean map that is stored; no coefficient is larger than the distance."""


@dataclass(frozen=True)
class Basis:
    """What that file holds, all float32. T is 1 for vectors."""

    mean: np.ndarray
    """(T, C)."""
    places: np.ndarray
    """(T, T), orthonormal rows."""
    channels: np.ndarray
    """(C, C), orthonormal rows, the strongest component first."""
    step: float
    """The smallest scale of the integers; a number that float16 holds exactly."""

    def forward(self, features: np.ndarray) -> np.ndarray:
        """Return the coefficients of float32 features, in their shape `(..., H, W, C)` or `(..., C)`."""
        tokens = features.reshape(-1, *self.mean.shape)
        coefficients: np.ndarray = (self.places @ (tokens - self.mean) @ self.channels.T).reshape(features.shape)
        return coefficients

    def backward(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the features of float32 coefficients, in their shape."""
        tokens = coefficients.reshape(-1, *self.mean.shape)
        features: np.ndarray = (self.places.T @ tokens @ self.channels + self.mean).reshape(coefficients.shape)
        return features

    def to_bytes(self) -> bytes:
        """Return the file: one flat npy array, mean then places then channels."""
        flat = np.concatenate([part.ravel() for part in (self.mean, self.places, self.channels)])
        file = io.BytesIO()
        np.save(file, flat.astype("<f4"), allow_pickle=False)
        return file.getvalue()

    def record(self, images: int) -> BasisRecord:
        """Return what the teacher's record says of it; `images` is how many it was fitted on."""
        data = self.to_bytes()
        return BasisRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), step=self.step, images=images)


def read_basis(data: bytes, record: BasisRecord, shape: tuple[int, ...], *, name: str) -> Basis:
    """Return the basis in the bytes of its file, for features of `shape`; raises DamagedStoreError naming the file."""
    remedy = "Restore it from a copy: no stored feature can be read without it."
    if (len(data), hashlib.sha256(data).hexdigest()) != (record.bytes, record.sha256):
        raise DamagedStoreError(f"{name} is damaged: it is not the file that the teacher's record promises", remedy)
    channels = shape[-1]
    tokens = int(np.prod(shape[:-1]))
    try:
        flat = np.load(io.BytesIO(data), allow_pickle=False)
        mean, places, rotation = np.split(flat, [tokens * channels, tokens * channels + tokens * tokens])
        return Basis(
            mean.reshape(tokens, channels),
            places.reshape(tokens, tokens),
            rotation.reshape(channels, channels),
            record.step,
        )
    except ValueError as error:
        raise DamagedStoreError(f"{name} does not fit features of {shape}: {error}", remedy) from error
