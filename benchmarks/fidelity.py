"""What each precision costs at the published sizes: bytes per image for depth + seg + gen, and change of gradients.

Measured on the stand-ins of `proxy_features.py`, which are no features: proxies of a published spectrum (exponent 1,
and 1.5 beside it), pure noise, and the small teachers of the tests, with random weights, on photographs. The trivial
baseline is float16; the yardstick is bfloat16: of the values where there is no teacher, of the teacher where there is.
Bases are fitted on other images than those that are scored. Run `python benchmarks/fidelity.py`; it writes
benchmarks/results/fidelity.json and prints the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import proxy_features
import torch
from codec import cpu_name
from proxy_features import SHAPES, Proxy, noise, tiny

from olapipe.fidelity import TIERS, Figures, against, measure, yardstick
from olapipe.klt import fit_basis
from olaschema.manifest import Precision
from olaschema.precision import decode, encode

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
GRADIENT_ERRORS = (0.01, 0.001)
AIM_BYTES = 1 << 18
INTEGERS: tuple[Precision, ...] = ("int8", "int4")


def compare(fitting: np.ndarray, scored: np.ndarray, rough: np.ndarray) -> list[dict[str, Any]]:
    """Measure all precisions, klt once for each of GRADIENT_ERRORS, and the yardstick `rough`."""
    mean = fitting.mean(axis=0, dtype=np.float64)
    lines = [line(measure(scored, mean, tier)) for tier in TIERS if tier != "klt"]
    for error in GRADIENT_ERRORS:
        basis = fit_basis(list(fitting), error)
        lines.append(line(measure(scored, mean, "klt", basis)) | {"precision": f"klt {error}"})
    return [*lines, line(yardstick(scored, rough, mean, "bfloat16"))]


def line(found: Figures) -> dict[str, Any]:
    """Return the figures that are kept."""
    changes = {
        str(change.centred_cosine): {
            "loss": change.loss,
            "smooth_l1": 1 - change.smooth_l1,
            "contrastive": 1 - change.contrastive,
        }
        for change in found.changes
    }
    return {
        "precision": found.name,
        "raw_bytes": found.raw_bytes,
        "stored_bytes": found.stored_bytes,
        "basis_bytes": found.basis_bytes,
        "cosine": found.cosine,
        "relative_l2": found.relative_l2,
        "change": changes,
    }


def bfloat16(features: np.ndarray) -> np.ndarray:
    """Round to bfloat16."""
    return torch.from_numpy(features).to(torch.bfloat16).float().numpy()


def rounded(lines: Any) -> Any:
    """Return the same with floats to five digits."""
    if isinstance(lines, dict):
        return {name: rounded(value) for name, value in lines.items()}
    if isinstance(lines, list):
        return [rounded(value) for value in lines]
    return float(f"{lines:.5g}") if isinstance(lines, float) else lines


def of_kind(kind: str, teacher: str, fit: int, score: int) -> list[dict[str, Any]]:
    """Measure one kind of data in the shape of a teacher's."""
    if kind == "tiny":
        exact, rough = tiny(teacher, fit + score), tiny(teacher, fit + score, dtype="bfloat16")
        return compare(exact[:fit], exact[fit:], rough[fit:])
    if kind == "noise":
        fitting, scored = noise(SHAPES[teacher], 0, fit), noise(SHAPES[teacher], 100_000, score)
    else:
        draw = Proxy(SHAPES[teacher], exponent=float(kind.removeprefix("proxy ")))
        fitting, scored = draw(0, fit), draw(100_000, score)
    return compare(fitting, scored, bfloat16(scored))


def totals(kind: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Add up the teachers: bytes per image, and the worst gradient error for predictions at centred cosine 0.9."""
    lines = []
    for parts in zip(*found.values(), strict=True):
        worst = max(max(part["change"]["0.9"][term] for term in ("smooth_l1", "contrastive")) for part in parts)
        sums = {
            name: None if parts[0][name] is None else sum(part[name] for part in parts)
            for name in ("raw_bytes", "stored_bytes", "basis_bytes")
        }
        lines.append({"data": kind, "precision": parts[0]["precision"]} | sums | {"gradient_error": worst})
    return lines


def outliers(score: int) -> list[dict[str, Any]]:
    """Say how integers depend on how large the outlier channels of a depth proxy are; 1: there are none.

    Beside the offsets that are stored, what else might be taken out of each channel of an image: nothing, as earlier
    versions did; a power of two, by the channel's largest value over that of the median channel; the median over the
    tokens, or the middle between smallest and largest, in place of the mean.
    """
    lines = []
    before = proxy_features.OUTLIER_MEAN
    for times in (1.0, 10.0, 30.0):
        proxy_features.OUTLIER_MEAN = times
        draw = Proxy(SHAPES["depth"])
        exact, mean = draw(100_000, score), draw(0, 32).mean(axis=0, dtype=np.float64)
        tokens = exact.reshape(score, -1, exact.shape[-1])
        largest = np.abs(tokens).max(axis=1)
        powers = 2.0 ** np.rint(np.log2(largest / np.median(largest, axis=1, keepdims=True)).clip(0))
        centres = {
            "mean": tokens.mean(axis=1, dtype=np.float64),
            "median": np.median(tokens, axis=1),
            "mid-range": (tokens.min(axis=1) + tokens.max(axis=1)) / 2,
        }
        for tier in INTEGERS:
            ways = {
                "nothing": through(exact, tier),
                "power of two": through(exact / spread(powers), tier) * spread(powers),
            }
            for name, centre in centres.items():
                offset = spread(centre.astype(np.float16).astype(np.float32))
                ways[name] = through(exact - offset, tier) + offset
            errors = {name: against(exact, other, mean)[2][-1].gradient_error for name, other in ways.items()}
            lines.append({"precision": tier, "outlier_mean": times, "gradient_error": errors})
    proxy_features.OUTLIER_MEAN = before
    return lines


def spread(by_channel: np.ndarray) -> np.ndarray:
    """Return numbers `(N, C)` as float32 `(N, 1, 1, C)`."""
    return by_channel[:, None, None].astype(np.float32)


def through(features: np.ndarray, tier: Precision) -> np.ndarray:
    """Round to integers by token and group, with nothing taken away before."""
    return decode(encode(features, tier), features.shape[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", type=int, default=64, help="images that bases are fitted on; 8 times as many vectors")
    parser.add_argument("--score", type=int, default=8, help="images that are scored")
    parser.add_argument("--kind", action="append", help="only this kind; several times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    results, sums = [], []
    for kind in settings.kind or ("proxy 1.0", "proxy 1.5", "noise", "tiny"):
        found = {}
        for teacher, shape in SHAPES.items():
            fit = settings.fit * (8 if len(shape) == 1 and kind != "tiny" else 1)
            found[teacher] = of_kind(kind, teacher, fit, settings.score)
            results += [{"data": kind, "teacher": teacher} | each for each in found[teacher]]
        for each in totals(kind, found):
            sums.append(each)
            sizes = [each[name] for name in ("raw_bytes", "stored_bytes")]
            shown = "  ".join("       –  " if size is None else f"{size / 1024:8.1f}KiB" for size in sizes)
            print(f"{kind:10} {each['precision']:10} {shown}  gradient error {each['gradient_error']:.2e}", flush=True)
    result = {
        "question": "what each precision costs in bytes and in gradients; stand-ins, no features",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numcodecs", "numpy", "torch", "ola-distill")}
        | {"python": platform.python_version()},
        "settings": {"fit": settings.fit, "score": settings.score, "aim_bytes": AIM_BYTES, "seed": 0},
        "totals": sums,
        "outliers": outliers(settings.score) if settings.kind is None else [],
        "results": results,
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
