"""Stand-ins for features of the published sizes, for what cannot be measured where there are no published weights.

Never called features: what is measured on them says how a code treats data of this kind, not what a teacher's
features cost. Three sets: `proxy`, `noise` (what no code can shrink) and `tiny` (the forward pass of small teachers
with random weights on photographs: real in kind, neither in size nor in training).

A proxy map is a mean map + components × spatial fields + a full-rank noise floor. Where its numbers come from:

- eigenvalues of the covariance over the data set fall as 1/k: for representations that generalise the exponent is
  close to 1 (Agrawal et al. 2022, "α-ReQ"; Stringer et al. 2019 measured 1.04 in visual cortex);
- each image lives in a subspace of its own: final tokens of CaiT-S24 have 99 / 95 / 90 / 80 % of an image's energy in
  121 / 61 / 34 / 14 of 384 directions, while the data set as a whole fills nearly all (arXiv 2511.15572). So the
  strength of each component is log-normal from image to image;
- spatial power falls as 1/f², as in natural images (Field 1987);
- few channels are 30 times as large as the others and nearly constant (massive activations, arXiv 2402.17762);
- the mean map is most of the energy: alone it scores a cosine of 0.95 for maps; vectors of CLIP share less, 0.7;
- white noise of 0.5 % of the variance, so that nothing is of low rank.

`python benchmarks/proxy_features.py` prints what came out beside what was published.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPES: dict[str, tuple[int, ...]] = {"depth": (24, 24, 1024), "seg": (24, 24, 1536), "gen": (1024,)}
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TINY = {"depth": GOLDEN / "depth", "seg": GOLDEN / "seg", "gen": GOLDEN / "gen"}
EXPONENT = 1.0
SPREAD = 0.5
"""Standard deviation, from image to image, of the logarithm of a component's strength; chosen to meet CaiT's shares."""
NOISE_FLOOR = 0.005
OUTLIERS = 256
"""One channel in so many is OUTLIER_MEAN times as large in the mean."""
OUTLIER_MEAN = 30.0
MEAN_COSINE = {3: 0.95, 1: 0.7}
"""By the number of dimensions: cosine between the mean map and a feature."""

_Draw = Callable[[int, int], np.ndarray]


class Proxy:
    """Draws proxy maps of one shape. `first` and `count` say which: the same ones always, whoever draws them."""

    def __init__(self, shape: tuple[int, ...], *, exponent: float = EXPONENT, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, *shape])
        self.shape = shape
        self.seed = seed
        self.grid = shape[:-1] or (1, 1)
        channels = shape[-1]
        self.rotation = np.linalg.qr(rng.normal(size=(channels, channels)))[0].astype(np.float32)
        eigenvalues = np.arange(1, channels + 1) ** -exponent
        self.strengths = np.sqrt(channels * eigenvalues / eigenvalues.sum())
        cosine = MEAN_COSINE[len(shape)]
        place = _fields(rng, self.grid, 8) @ rng.normal(size=(8, channels)) / 8
        mean = rng.normal(size=channels) * np.where(np.arange(channels) % OUTLIERS == OUTLIERS // 2, OUTLIER_MEAN, 1)
        self.mean = mean + place
        # a feature has mean square 1, of which the mean map has cosine² and what differs between images the rest
        self.mean *= cosine / np.sqrt(np.mean(self.mean**2))
        self.variance = 1 - cosine**2

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Return maps `first` to `first + count - 1` as float32 `(count, *shape)`."""
        return np.stack([self._one(index) for index in range(first, first + count)])

    def _one(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *self.shape, 1 + index])
        channels = self.shape[-1]
        # the mean of exp(2 · SPREAD · n) is exp(2 · SPREAD²): the data set keeps its eigenvalues
        gains = self.strengths * np.exp(SPREAD * rng.normal(size=channels) - SPREAD**2)
        varying = ((_fields(rng, self.grid, channels) * gains).astype(np.float32) @ self.rotation).astype(np.float64)
        floor = rng.normal(size=varying.shape)
        centred = np.sqrt(1 - NOISE_FLOOR) * varying + np.sqrt(NOISE_FLOOR) * floor
        whole: np.ndarray = (self.mean + np.sqrt(self.variance) * centred).astype(np.float32)
        return whole.reshape(self.shape)


def _fields(rng: np.random.Generator, grid: tuple[int, ...], count: int) -> np.ndarray:
    """Return `count` Gaussian fields `(H, W, count)` of mean square 1 whose power falls as 1/f²; no edges wrap."""
    height, width = grid
    if height * width == 1:
        return rng.normal(size=(1, 1, count))
    side_y, side_x = 2 * height, 2 * width
    fy, fx = np.fft.fftfreq(side_y)[:, None] * side_y, np.fft.rfftfreq(side_x)[None] * side_x
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1)
    white = rng.normal(size=(count, side_y, side_x)).astype(np.float32)
    power = np.mean(np.square(np.abs(np.fft.fft2(np.fft.irfft2(amplitude, s=(side_y, side_x))))))
    smooth = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(side_y, side_x))[:, :height, :width]
    return np.moveaxis(smooth / np.sqrt(power), 0, -1)


def noise(shape: tuple[int, ...], first: int, count: int, seed: int = 0) -> np.ndarray:
    """Return white noise `(count, *shape)` float32 of mean square 1."""
    maps = [
        np.random.default_rng([seed, *shape, 1 + index]).normal(size=shape) for index in range(first, first + count)
    ]
    return np.stack(maps).astype(np.float32)


def photographs(count: int, seed: int = 0) -> list[np.ndarray]:
    """Return uint8 `(H, W, 3)` pictures: the colour photographs in the scikit-image wheel, then crops of them."""
    from skimage import data

    whole = [
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.rocket(),
        data.retina()[::3, ::3],
        data.hubble_deep_field(),
    ]
    whole += list(data.stereo_motorcycle()[:2])
    rng = np.random.default_rng(seed)
    pictures = [np.ascontiguousarray(picture[..., :3]) for picture in whole]
    while len(pictures) < count:
        picture = whole[len(pictures) % len(whole)]
        height, width = (int(side * rng.uniform(0.4, 0.8)) for side in picture.shape[:2])
        top, left = rng.integers(picture.shape[0] - height), rng.integers(picture.shape[1] - width)
        pictures.append(np.ascontiguousarray(picture[top : top + height, left : left + width, :3]))
    return pictures[:count]


def tiny(teacher: str, count: int, dtype: str = "float32") -> np.ndarray:
    """Return float32 `(count, *shape)`: a teacher's tiny checkpoint, random weights, run in `dtype` on photographs."""
    import torch
    from PIL import Image

    from olapipe.teachers import registry
    from olapipe.teachers.base import TeacherSettings
    from olaschema.images import decode_image

    settings = TeacherSettings(checkpoint=str(TINY[teacher]), preset="ola-vlm", compute_dtype=dtype)
    loaded = registry.load(teacher, settings)
    features = []
    for index, picture in enumerate(photographs(count)):
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        image = decode_image(data.getvalue(), name=f"photograph {index}")
        pixels = torch.from_numpy(loaded.preprocessor(image)[None])
        features.append(loaded.encode_images(pixels, [f"{index:064x}"]).numpy()[0])
    return np.stack(features)


def source(kind: str, teacher: str, *, exponent: float = EXPONENT, seed: int = 0) -> _Draw:
    """Return what draws maps `first …` of a kind, `proxy`, `noise` or `tiny`, in the shape of a teacher's."""
    if kind == "proxy":
        return Proxy(SHAPES[teacher], exponent=exponent, seed=seed)
    if kind == "noise":
        return lambda first, count: noise(SHAPES[teacher], first, count, seed)
    return lambda first, count: tiny(teacher, first + count)[first:]


def spectrum(features: np.ndarray) -> dict[str, float]:
    """Return of `(N, T, C)` what is published of spectra: shares of directions in an image, exponent over all."""
    counts: dict[str, float] = {}
    energies = np.mean([_energies(one) for one in features], axis=0)
    for share in (0.8, 0.9, 0.95, 0.99):
        counts[f"share of directions for {share:.0%}"] = (
            float(np.searchsorted(energies, share) + 1) / features.shape[-1]
        )
    centred = (features - features.mean(axis=0)).reshape(-1, features.shape[-1]).astype(np.float64)
    values = np.sort(np.linalg.eigvalsh(centred.T @ centred))[::-1]
    k = np.arange(11, min(len(values) // 2, 200))
    counts["exponent"] = float(-np.polyfit(np.log(k), np.log(values[k - 1]), 1)[0])
    mean = features.mean(axis=0).ravel()
    flat = features.reshape(len(features), -1)
    counts["cosine of the mean map"] = float(np.mean(flat @ mean / np.linalg.norm(flat, axis=1) / np.linalg.norm(mean)))
    return counts


def _energies(tokens: np.ndarray) -> np.ndarray:
    squares = np.square(np.linalg.svd(tokens - tokens.mean(axis=0), compute_uv=False))
    return np.asarray(np.cumsum(squares) / squares.sum())


def main() -> None:
    published = {"80%": 14 / 384, "90%": 34 / 384, "95%": 61 / 384, "99%": 121 / 384}
    print("published, CaiT-S24:", {share: round(value, 3) for share, value in published.items()})
    for teacher, shape in SHAPES.items():
        if len(shape) == 3:
            maps = Proxy(shape)(0, 8)
            found = spectrum(maps.reshape(len(maps), -1, shape[-1]))
            print(f"proxy, shape of {teacher}:", {name: round(value, 3) for name, value in found.items()})


if __name__ == "__main__":
    main()
