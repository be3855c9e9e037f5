"""`inspect --html`: what a store holds as one page that needs nothing else: no network, no further file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from olapipe import charts
from olapipe.charts import table, text
from olapipe.gallery import panels
from olapipe.inspect import describe, flags
from olapipe.report import Failure, TeacherSummary, size, summarise, visible
from olaschema.errors import StoreError
from olaschema.manifest import Receipt, SampleRow
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

MOST_KEYS = 20_000
"""Keys that the search box knows, beside those of failed images; a store may plan millions."""
MOST_FAILURES = 20_000
GALLERY = 8
_LISTED = 200
_OK, _WAITING = 0, 1


@dataclass
class Keys:
    """What the search box knows: row, key and a status for each teacher, by its number in `statuses`."""

    statuses: list[str] = field(default_factory=lambda: ["ok", "not extracted yet"])
    entries: list[tuple[int, str, list[int]]] = field(default_factory=list)
    samples: dict[int, SampleRow] = field(default_factory=dict)
    """Of some images with features, for the gallery, by row."""
    left_out: int = 0
    """Images that the page does not list."""

    def code(self, receipt: Receipt | None, index: int) -> int:
        """Return the number of a row's status."""
        if receipt is None:
            return _WAITING
        row = receipt.rows[index]
        if row.status == "ok":
            return _OK
        word = row.reason or row.status
        if word not in self.statuses:
            self.statuses.append(word)
        return self.statuses.index(word)


def write_page(store: FeatureStore, images: Path | None, out: Path) -> None:
    """Write the page; raises StoreError where it cannot be written."""
    page = render(store, images)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{out} cannot be written: {error.strerror}", "Give another file with --html.") from error


def render(store: FeatureStore, images: Path | None) -> str:
    """Return the page as HTML. `images` is the folder that the gallery takes photographs from, if there is one.

    The policy in its head allows the style and the script of this page, by their SHA-256, and pictures inside it:
    nothing that an image is named can run or load anything.
    """
    style = files("olapipe").joinpath("assets/report.css").read_text(encoding="utf-8")
    script = files("olapipe").joinpath("assets/report.js").read_text(encoding="utf-8")
    summaries = [summarise(store, name) for name in store.teachers()]
    described = {summary.record.fingerprint.teacher: describe(summary, store) for summary in summaries}
    keys = _keys(store, summaries)
    data = {"teachers": list(described), "statuses": keys.statuses, "keys": keys.entries}
    # no `<` inside a script element: a key could end it otherwise
    embedded = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = [
        _head(store, summaries),
        _flags(described),
        _coverage(summaries),
        _distributions(summaries, described),
        _failures(summaries),
        _search(list(described), keys),
        _gallery(store, keys, images),
        _meaning(described),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(store.place.name)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f'\n</main>\n<script type="application/json" id="data">{embedded}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _keys(store: FeatureStore, summaries: Sequence[TeacherSummary]) -> Keys:
    """Choose evenly spaced images and all failed ones, and say what became of them."""
    keys = Keys()
    teachers = [summary.record.fingerprint.teacher for summary in summaries]
    planned = sum(generation.rows for generation in store.generations())
    every = max(1, -(-planned // MOST_KEYS))
    pictured = max(1, planned // GALLERY)
    size = store.rows_per_shard
    shard, receipts = -1, list[Receipt | None]()
    failed = 0
    for place, sample in enumerate(store.samples()):
        if sample.row // size != shard:
            shard = sample.row // size
            receipts = [store.receipt(teacher, shard) for teacher in teachers]
        codes = [keys.code(receipt, sample.row % size) for receipt in receipts]
        bad = any(code > _WAITING for code in codes)
        failed += bad
        if place % every == 0 or (bad and failed <= MOST_FAILURES):
            keys.entries.append((sample.row, visible(sample.key), codes))
        else:
            keys.left_out += 1
        if _OK in codes and len(keys.samples) < GALLERY and place >= len(keys.samples) * pictured:
            keys.samples[sample.row] = sample
    return keys


def _section(title: str, content: str, note: str = "") -> str:
    more = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{more}{content}</section>"


def _head(store: FeatureStore, summaries: Sequence[TeacherSummary]) -> str:
    generations = store.generations()
    planned = sum(generation.rows for generation in generations)
    stored = sum(summary.stored_bytes for summary in summaries)
    full = sum(summary.float32_bytes for summary in summaries)
    figures = [
        (str(planned), "images planned"),
        (str(len(summaries)), "teachers"),
        (size(stored), "of features"),
        (f"{full / stored:.2f} ×" if stored and full else "–", "smaller than float32"),
        (str(len({(f.row) for summary in summaries for f in summary.failures})), "images failed"),
    ]
    items = "".join(f"<li><b>{text(number)}</b>{text(label)}</li>" for number, label in figures)
    place = f"{len(generations)} generation{'s' * (len(generations) != 1)}, {store.rows_per_shard} rows per shard"
    title = f'<h1>{text(store.place.name)}</h1><p class="soft">{text(place)}</p>'
    return f'<header>{title}<ul class="figures">{items}</ul></header>'


def _flags(described: dict[str, dict[str, Any]]) -> str:
    lines = [f"<li><b>{text(name)}</b>: {text(line)}</li>" for name, told in described.items() for line in flags(told)]
    content = f'<ul class="flags">{"".join(lines)}</ul>' if lines else "<p>Nothing.</p>"
    note = "Dead and nearly constant channels, zero tokens, and shards whose values differ from the rest."
    return _section("What stands out", f'<div class="card">{content}</div>', note)


def _coverage(summaries: Sequence[TeacherSummary]) -> str:
    columns = [
        ("teacher", False), ("precision", False), ("images", True), ("failed", True), ("waiting", True),
        ("shards", True), ("bytes", True), ("per image", True), ("× smaller than float32", True),
    ]  # fmt: skip
    rows, bars = [], []
    for summary in summaries:
        name = summary.record.fingerprint.teacher
        rows.append((
            name, summary.record.precision, summary.ok, summary.failed, summary.waiting,
            f"{summary.committed} of {summary.shards}", size(summary.stored_bytes),
            size(summary.stored_bytes // summary.ok) if summary.ok else "–",
            f"{summary.ratio:.2f}" if summary.ratio else "–",
        ))  # fmt: skip
        parts = [("ok", summary.ok), ("bad", summary.failed), ("wait", summary.waiting)]
        bars.append(f"<h3>{text(name)}</h3>{charts.stacked(parts)}")
    legend = "".join(
        f'<span class="key-box key-{kind}"></span>{words} &nbsp; '
        for kind, words in (("ok", "features"), ("bad", "failed"), ("wait", "not extracted yet"))
    )
    bars_card = f'<div class="card">{"".join(bars)}<p class="note">{legend}</p></div>' if bars else ""
    return _section("Coverage and size", f'<div class="card">{table(columns, rows)}</div>{bars_card}')


def _distributions(summaries: Sequence[TeacherSummary], described: dict[str, dict[str, Any]]) -> str:
    parts = []
    for summary in summaries:
        name = summary.record.fingerprint.teacher
        statistics = summary.statistics
        if not statistics.count:
            continue
        norms = described[name]["token_norms"]
        if norms:
            some = "" if norms["tokens"] == norms["of"] else f" (of {norms['tokens']} of {norms['of']} tokens)"
            figure = charts.histogram(norms["edges"], norms["counts"])
            parts.append(f'<div class="card"><h3>{text(name)}: norm of a token{text(some)}</h3>{figure}</div>')
        figure = charts.ranges(
            statistics.minimum, statistics.maximum, statistics.mean, np.sqrt(np.asarray(statistics.variance))
        )
        title = f"{name}: range, mean ± standard deviation of {len(statistics.mean)} channels, by their mean"
        parts.append(f'<div class="card"><h3>{text(title)}</h3>{figure}</div>')
        drift = described[name]["drift"]
        if drift:
            figure = charts.strip([d["shift"] for d in drift], [d["flagged"] for d in drift])
            title = f"{name}: how far the means of a shard are from the rest, in standard deviations"
            parts.append(f'<div class="card"><h3>{text(title)}</h3>{figure}</div>')
    return _section(
        "Distributions", f'<div class="pair">{"".join(parts)}</div>' if parts else "<p>No features yet.</p>"
    )


def _failures(summaries: Sequence[TeacherSummary]) -> str:
    found = [failure for summary in summaries for failure in summary.failures]
    if not found:
        return _section("Failures", '<div class="card"><p>None.</p></div>')
    counts = Counter((failure.reason, failure.teacher) for failure in found)
    teachers = [summary.record.fingerprint.teacher for summary in summaries]
    reasons = sorted({failure.reason for failure in found})
    by_reason = [(reason, *(counts[reason, teacher] for teacher in teachers)) for reason in reasons]
    first = table([("reason", False), *((teacher, True) for teacher in teachers)], by_reason)
    images: dict[tuple[int, str], list[Failure]] = {}
    for failure in found:
        images.setdefault((failure.row, failure.reason), []).append(failure)
    rows = [
        (row, group[0].key, reason, group[0].detail, ", ".join(failure.teacher for failure in group))
        for (row, reason), group in sorted(images.items())[:_LISTED]
    ]
    columns = [("row", True), ("key", False), ("reason", False), ("detail", False), ("teachers", False)]
    listed = table(columns, rows, key=1)
    shown = f"The first {_LISTED} of {len(images)}" if len(images) > _LISTED else f"All {len(images)}"
    details = f'<details class="card"><summary>{shown}, by row</summary>{listed}</details>'
    return _section("Failures", f'<div class="card">{first}</div>{details}')


def _search(teachers: Sequence[str], keys: Keys) -> str:
    head = "".join(f"<th>{text(name)}</th>" for name in teachers)
    note = "All planned images are listed."
    if keys.left_out:
        note = (
            f"This page knows {len(keys.entries)} keys: evenly spaced images, failed ones ({MOST_FAILURES} at most); "
            f"{keys.left_out} further images are in the store. Ask for one with: olapipe inspect STORE KEY"
        )
    content = (
        '<input type="search" id="search" placeholder="part of a key" aria-label="part of a key" autocomplete="off">'
        '<label class="check"><input type="checkbox" id="only-failed"> failed only</label> '
        '<span class="note" id="told" aria-live="polite"></span>'
        f'<div class="card scroll"><table><thead><tr><th class="number">row</th><th>key</th>{head}</tr></thead>'
        '<tbody id="results"></tbody></table></div>'
    )
    return _section("Keys", content, note)


def _gallery(store: FeatureStore, keys: Keys, images: Path | None) -> str:
    readers = {name: FeatureReader(store, name) for name in store.teachers()}
    figures = []
    for row, sample in keys.samples.items():
        cells = []
        for panel in panels(store, readers, sample, images):
            inside = (
                f'<div class="blank">{text(panel.problem)}</div>'
                if panel.uri is None
                else f'<img src="{text(panel.uri)}" alt="{text(panel.label)} of {text(sample.key)}">'
            )
            cells.append(f"<div>{inside}{text(panel.label)}</div>")
        caption = f"<figcaption>{text(sample.key)}, row {row}</figcaption>"
        figures.append(f'<figure class="card"><div class="panels">{"".join(cells)}</div>{caption}</figure>')
    note = "Maps: their three largest principal components as red, green and blue, image by image. Vectors: bars."
    if images is None:
        note += " The images are not shown: they were not given with --images."
    return _section("Gallery", f'<div class="gallery">{"".join(figures) or "<p>No features yet.</p>"}</div>', note)


def _meaning(described: dict[str, dict[str, Any]]) -> str:
    columns = [
        ("teacher", False), ("fingerprint", False), ("model", False), ("source", False), ("licence", False),
        ("shape", False), ("view", False), ("preset", False),
    ]  # fmt: skip
    rows = []
    for name, told in described.items():
        fingerprint = told["fingerprint"]
        shape = [*(fingerprint["grid"] or []), fingerprint["channels"]]
        rows.append((
            name, fingerprint["digest"][:16], fingerprint["model_class"], told["source"], told["licence"],
            " × ".join(map(str, shape)), fingerprint["preprocessing"]["view"]["kind"], fingerprint["preset"],
        ))  # fmt: skip
    return _section("What the features are", f'<div class="card">{table(columns, rows)}</div>')
