"""Which stage a job spent its time on, and what to change: from the seconds that shards record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ADVICE = {
    "decode": "more --set decoders=N per worker, or a larger --batch-size where the device has room; "
    "images that are stored smaller decode faster",
    "read": "faster storage for the images, a copy on local disks, or more --set decoders=N",
    "preprocess": "more --set decoders=N per worker, and as many CPUs as workers times decoders",
    "forward": "more or faster devices; --set compute_dtype=bfloat16 or --compile make other bits, faster; "
    "a larger --batch-size if the device is not full",
    "encode": "more workers on each device (--gpus-per-worker 0.5): checks and quantising run on the CPU",
    "compress": "more workers on each device (--gpus-per-worker 0.5), or float16 instead of integers",
    "write": "faster storage for --out, or a smaller --precision",
}
_WITH_DECODERS = ("read", "decode", "preprocess")


@dataclass(frozen=True)
class Bottleneck:
    """The busiest stage of a job and the share of the time that what runs it was busy with it."""

    stage: str
    busy: float
    advice: str


def busy(seconds: Mapping[str, float], wall: float, workers: int, decoders: int) -> dict[str, float]:
    """Return by stage which share of the job's `wall` seconds the threads that run it were busy with it.

    `seconds` are those of all workers together. Reading, decoding and preprocessing have `decoders` threads of each
    worker, every other stage one at a time.
    """
    capacity = {stage: wall * workers * (decoders if stage in _WITH_DECODERS else 1) for stage in ADVICE}
    return {stage: seconds.get(stage, 0.0) / capacity[stage] for stage in ADVICE if capacity[stage] > 0}


def bottleneck(seconds: Mapping[str, float], wall: float, workers: int, decoders: int) -> Bottleneck | None:
    """Return the stage that kept its threads busiest, None where nothing was measured.

    The three stages of the decoding threads are held against the others together, and the largest of them is named.
    """
    shares = busy(seconds, wall, workers, decoders)
    if not any(shares.values()):
        return None
    together = sum(shares[stage] for stage in _WITH_DECODERS)
    rest = max((stage for stage in shares if stage not in _WITH_DECODERS), key=shares.__getitem__)
    if together > shares[rest]:
        stage = max(_WITH_DECODERS, key=shares.__getitem__)
        return Bottleneck(stage, together, ADVICE[stage])
    return Bottleneck(rest, shares[rest], ADVICE[rest])
