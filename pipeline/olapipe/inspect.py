"""The command `inspect`: what a store holds as a whole, and of one image."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.drift import drifts, dull_channels
from olapipe.report import TeacherSummary, print_failures, size, summarise, visible
from olaschema.errors import ImageError, StoreError
from olaschema.keys import normalise_key, tombstone
from olaschema.layout import array_document
from olaschema.manifest import RowReceipt, SampleRow
from olaschema.norms import edges
from olaschema.packed import PackedSet
from olaschema.precision import formats_of
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_NAMED = 8


@dataclass(frozen=True)
class ImageStatus:
    """One planned image and what became of it under each teacher; None while it is not extracted."""

    sample: SampleRow
    status: dict[str, RowReceipt | None]
    features: dict[str, dict[str, float]]
    """Mean, standard deviation, minimum and maximum of the features that exist."""


def describe(summary: TeacherSummary, store: FeatureStore) -> dict[str, Any]:
    """Return all that `inspect` tells of one teacher, as plain JSON values."""
    record = summary.record
    fingerprint = record.fingerprint
    arrays = {
        name: _array(store, fingerprint.teacher, name, summary.array_bytes.get(name, 0)) for name in formats_of(record)
    }
    reasons: dict[str, int] = {}
    for failure in summary.failures:
        reasons[failure.reason] = reasons.get(failure.reason, 0) + 1
    return {
        "arrays": arrays,
        "images": {
            "planned": summary.planned,
            "ok": summary.ok,
            "failed": summary.failed,
            "waiting": summary.waiting,
        },
        "shards": {"planned": summary.shards, "committed": summary.committed},
        "batch_sizes": {str(used): count for used, count in sorted(summary.batch_sizes.items())},
        "absent_rows": summary.absent,
        "shared_rows": summary.shared,
        "precision": record.precision,
        "bytes": {"stored": summary.stored_bytes, "float32": summary.float32_bytes, "ratio": summary.ratio},
        "channels": _channels(summary),
        "token_norms": _norms(summary),
        "drift": [vars(shard) | {"flagged": shard.flagged} for shard in drifts(summary.by_shard)],
        "failed_by_reason": dict(sorted(reasons.items())),
        "failures": [vars(failure) for failure in summary.failures],
        "fingerprint": fingerprint.model_dump(mode="json") | {"digest": fingerprint.digest()},
        "source": record.source,
        "licence": record.licence,
        "libraries": record.libraries,
    }


def _array(store: FeatureStore, teacher: str, name: str, stored: int) -> dict[str, Any]:
    """Describe one array: `bytes` is what its committed shards take on disk."""
    document = array_document(teacher, name)
    array = json.loads(store.place.read(document))
    return {
        "path": document.removesuffix("/zarr.json"),
        "shape": array["shape"],
        "dtype": array["data_type"],
        "shard": array["chunk_grid"]["configuration"]["chunk_shape"],
        "bytes": stored,
    }


def _channels(summary: TeacherSummary) -> dict[str, Any] | None:
    """Summarise the statistics over channels: `std` is that of a channel, `dead` ones never change."""
    statistics = summary.statistics
    if not statistics.count:
        return None
    std = np.sqrt(statistics.variance)
    dull = dull_channels(statistics)
    return {
        "count": len(std),
        "mean": float(statistics.mean.mean()),
        "mean_of_std": float(std.mean()),
        "smallest_std": float(std.min()),
        "largest_std": float(std.max()),
        "minimum": float(statistics.minimum.min()),
        "maximum": float(statistics.maximum.max()),
        "dead": len(dull.dead),
        "dead_channels": dull.dead,
        "near_constant": len(dull.near_constant),
        "near_constant_channels": dull.near_constant,
    }


def _norms(summary: TeacherSummary) -> dict[str, Any] | None:
    """Describe the histogram of token norms; `tokens` it counts, fewer than there are where old receipts have none."""
    norms = summary.statistics.norms
    if not norms.total:
        return None
    bounds = edges(norms.first, len(norms.counts))
    return {
        "tokens": norms.total,
        "of": summary.statistics.count,
        "zero": norms.zero,
        "edges": bounds.tolist() if len(norms.counts) else [],
        "counts": norms.counts.tolist(),
        **{f"p{share}": norms.quantile(share / 100) for share in (1, 50, 99)},
    }


def show_store(console: Console, store: FeatureStore, *, as_json: bool) -> None:
    """Print what a store holds of every teacher."""
    summaries = [summarise(store, name) for name in store.teachers()]
    described = {summary.record.fingerprint.teacher: describe(summary, store) for summary in summaries}
    if as_json:
        whole = {
            "rows_per_shard": store.rows_per_shard,
            "generations": [g.model_dump(mode="json", exclude={"parts"}) for g in store.generations()],
            "teachers": described,
        }
        _print_json(console, whole)
        return
    planned = sum(generation.rows for generation in store.generations())
    counts = f"images: {planned}, generations: {len(store.generations())}, rows per shard: {store.rows_per_shard}"
    console.print(Text(f"{visible(store.url)}: {counts}"), soft_wrap=True)
    if not summaries:
        console.print(Text("no teacher yet"))
        return
    console.print(_table("arrays", described, _ARRAY_ROWS))
    console.print(_table("channels", described, _CHANNEL_ROWS))
    console.print(_table("meaning", described, _MEANING_ROWS))
    _print_flags(console, described)
    print_failures(console, store, summaries)


def _print_flags(console: Console, described: dict[str, dict[str, Any]]) -> None:
    """Print the channels and shards that stand out."""
    for name, teacher in described.items():
        for line in flags(teacher):
            console.print(Text(visible(f"{name}: {line}")), soft_wrap=True)


def flags(described: dict[str, Any]) -> list[str]:
    """Return what stands out of a described teacher, a sentence each."""
    lines = []
    channels = described["channels"] or {}
    for kind, words in (("dead", "never change"), ("near_constant", "hardly change")):
        numbers = channels.get(f"{kind}_channels", [])
        if numbers:
            shown = ", ".join(map(str, numbers[:_NAMED])) + (" …" if len(numbers) > _NAMED else "")
            lines.append(f"{len(numbers)} of {channels['count']} channels {words}: {shown}")
    norms = described["token_norms"]
    if norms and norms["zero"]:
        lines.append(f"{norms['zero']} of {norms['tokens']} tokens are zero in every channel")
    flagged = sorted((shard for shard in described["drift"] if shard["flagged"]), key=lambda s: -s["shift"])
    for shard in flagged[:_NAMED]:
        divergence = shard["divergence"]
        norm = "" if divergence is None else f", token norms diverge by {divergence:.3f} bits"
        lines.append(
            f"shard {shard['shard']} differs from the others: means are {shard['shift']:.3f} standard deviations away, "
            f"most in channel {shard['channel']}{norm}"
        )
    if len(flagged) > _NAMED:
        lines.append(f"{len(flagged) - _NAMED} more shards differ from the others; all of them: --json")
    return lines


def _table(title: str, described: dict[str, dict[str, Any]], rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in described:
        table.add_column(Text(name), justify="right")
    for label, value in rows.items():
        table.add_row(Text(label), *(Text(visible(value(teacher))) for teacher in described.values()))
    return table


def _times(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _norm(name: str) -> Any:
    # known to a bin of the histogram, which is 9 % wide
    return lambda t: f"≈ {float(format(t['token_norms'][name], '.2g')):g}" if t["token_norms"] else "–"


def _channel(name: str, form: str) -> Any:
    return lambda t: format(t["channels"][name], form) if t["channels"] else "–"


_ARRAY_ROWS = {
    "shape": lambda t: _times(t["arrays"]["values"]["shape"]),
    "precision": lambda t: t["precision"],
    "stored as": lambda t: " + ".join(array["dtype"] for array in t["arrays"].values()),
    "images with features": lambda t: str(t["images"]["ok"]),
    "failed": lambda t: str(t["images"]["failed"]),
    "not extracted yet": lambda t: str(t["images"]["waiting"]),
    "shards": lambda t: f"{t['shards']['committed']} of {t['shards']['planned']}",
    "batch size": lambda t: ", ".join(f"{used} in {n} shards" for used, n in t["batch_sizes"].items()) or "–",
    "rows that share another one": lambda t: str(t["shared_rows"]),
    "rows without an image": lambda t: str(t["absent_rows"]),
    "bytes": lambda t: size(t["bytes"]["stored"]),
    "bytes of the scales": lambda t: size(t["arrays"]["scale"]["bytes"]) if "scale" in t["arrays"] else "–",
    "bytes of the offsets": lambda t: size(t["arrays"]["offset"]["bytes"]) if "offset" in t["arrays"] else "–",
    "× smaller than float32": lambda t: f"{t['bytes']['ratio']:.2f}" if t["bytes"]["ratio"] else "–",
}
_CHANNEL_ROWS = {
    "channels": _channel("count", "d"),
    "mean": _channel("mean", ".4g"),
    "std, mean over channels": _channel("mean_of_std", ".4g"),
    "std, smallest": _channel("smallest_std", ".4g"),
    "std, largest": _channel("largest_std", ".4g"),
    "minimum": _channel("minimum", ".4g"),
    "maximum": _channel("maximum", ".4g"),
    "dead channels": _channel("dead", "d"),
    "nearly constant channels": _channel("near_constant", "d"),
    "norm of a token, 1st percentile": _norm("p1"),
    "norm of a token, median": _norm("p50"),
    "norm of a token, 99th percentile": _norm("p99"),
}
_MEANING_ROWS = {
    "fingerprint": lambda t: t["fingerprint"]["digest"][:16],
    "model": lambda t: t["fingerprint"]["model_class"],
    "source": lambda t: t["source"],
    "weights": lambda t: t["fingerprint"]["weights"][:16],
    "licence": lambda t: t["licence"],
    "preset": lambda t: t["fingerprint"]["preset"],
    "taps": lambda t: f"{t['fingerprint']['taps']} {t['fingerprint']['pooling']}",
    "view": lambda t: t["fingerprint"]["preprocessing"]["view"]["kind"],
    "colours": lambda t: t["fingerprint"]["preprocessing"]["channel_order"],
    "EXIF applied": lambda t: "yes" if t["fingerprint"]["preprocessing"]["exif"] else "no",
    "computed in": lambda t: t["fingerprint"]["compute_dtype"],
    "options": lambda t: ", ".join(f"{name}={value}" for name, value in t["fingerprint"]["options"].items()) or "–",
}


def find(store: FeatureStore, key: str) -> ImageStatus:
    """Return an image by its key, or the stand-in that reports show for a name that cannot be one.

    Raises StoreError if the store has not planned it.
    """
    wanted = {key}
    with contextlib.suppress(ImageError):  # a stand-in is no key
        wanted |= {normalise_key(key), tombstone(normalise_key(key))}
    planned = store.find(wanted)
    if planned is None:
        first = next(store.samples(), None)
        example = f", for example {visible(first.key)}" if first else ""
        raise StoreError(
            f"{store.url} has no image {visible(key)}",
            f"Keys are paths relative to the image folder, with extension{example}.",
        )
    sample = planned[2]
    status: dict[str, RowReceipt | None] = {}
    features = {}
    for name in store.teachers():
        reader = FeatureReader(store, name)
        status[name] = receipt = reader.status(sample.row)
        if receipt is not None and receipt.status == "ok":
            values = reader.feature(sample.row).astype(np.float64)
            numbers = {"mean": values.mean(), "std": values.std(), "minimum": values.min(), "maximum": values.max()}
            features[name] = {label: float(number) for label, number in numbers.items()}
    return ImageStatus(sample, status, features)


def show_image(console: Console, found: ImageStatus, *, as_json: bool) -> None:
    """Print what became of one image."""
    if as_json:
        teachers = {
            name: {
                "receipt": None if receipt is None else receipt.model_dump(mode="json"),
                "features": found.features.get(name),
            }
            for name, receipt in found.status.items()
        }
        _print_json(console, {"sample": found.sample.model_dump(mode="json"), "teachers": teachers})
        return
    console.print(Text(f"{visible(found.sample.key)}: row {found.sample.row}"), soft_wrap=True)
    table = Table()
    for column in ("teacher", "status", "image", "mean", "std", "minimum", "maximum"):
        table.add_column(column)
    for name, receipt in found.status.items():
        features = found.features.get(name, {})
        numbers = [f"{features[label]:.4g}" if features else "–" for label in ("mean", "std", "minimum", "maximum")]
        table.add_row(*map(Text, (name, _verdict(receipt), _pixels(receipt), *numbers)))
    console.print(table)


def _verdict(receipt: RowReceipt | None) -> str:
    if receipt is None:
        return "not extracted yet"
    if receipt.status == "failed":
        return visible(f"failed, {receipt.reason}: {receipt.detail}")
    return receipt.status


def _pixels(receipt: RowReceipt | None) -> str:
    return f"{receipt.width} × {receipt.height}" if receipt is not None and receipt.width is not None else "–"


def _print_json(console: Console, data: dict[str, Any]) -> None:
    # past rich: no wrapping, no highlighting
    console.file.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def show_packed(console: Console, packed: PackedSet, *, as_json: bool) -> None:
    """Print what a packed training set holds."""
    record = packed.record
    images = list(packed.listing())
    teachers: dict[str, dict[str, Any]] = {
        name: {
            "precision": teacher.precision,
            "licence": teacher.licence,
            "fingerprint": teacher.fingerprint.digest(),
            "images": dict(sorted(Counter(image.statuses[name] for image in images).items())),
        }
        for name, teacher in record.teachers.items()
    }
    totals = {"conversations": record.conversations, "samples": record.samples, "images": len(images)}
    sizes = {"tars": len(record.tars), "bytes": sum(tar.tar.bytes for tar in record.tars)}
    plain = {"set": packed.place.url, **totals, **sizes, "left_out": record.left_out, "teachers": teachers}
    if as_json:
        console.file.write(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
        return
    table = Table("teacher", "precision", "licence", "images")
    for name, found in teachers.items():
        shown = ", ".join(f"{count} {reason}" for reason, count in found["images"].items())
        table.add_row(*map(visible, (name, found["precision"], found["licence"], shown)))
    words = [f"{count} {what}" for what, count in (totals | {"tars": sizes["tars"]}).items()]
    console.print(
        visible(f"{packed.place.url}: {', '.join(words)}, {size(sizes['bytes'])}"), markup=False, soft_wrap=True
    )
    console.print(table)
