"""The part of `docs/results.md` on students of part (a): what goes with a better depth probe?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from recorded import Results, best_probe, order, share, title
from significance import Correlation, permutation_p, rank_correlation

FEWEST_STUDENTS = 12


def representations(results: Results, plan: Mapping[str, Any]) -> str:
    """Write the section."""
    # in one order within each tower, which the permutations rely on
    rows = sorted(results.students, key=lambda row: (row["width"], row["tower_steps"], row["told"]))
    lines = ["## (a) Better representations, better answers?", ""]
    if len(rows) < FEWEST_STUDENTS:
        said = f"Not enough was run yet: {len(rows)} students; correlations are told from {FEWEST_STUDENTS} on."
        return "\n".join([*lines, said, ""])
    towers = [(row["width"], row["tower_steps"]) for row in rows]
    probe = np.array([best_probe(row) for row in rows])
    text = np.array([row["text"] for row in rows])
    lines += [
        f"{len(rows)} students of next tokens alone: towers of {_values(rows, 'width')} channels trained for "
        f"{_values(rows, 'tower_steps')} steps, pretrained for equally many steps on the same pictures, with {_values(rows, 'told')} of the captions telling distances. "
        f"Depth probe, best block: R² {probe.min():.3f} to {probe.max():.3f} (the mean map: 0).", "",
        "| questions | chance | accuracy, lowest to highest | Spearman with the depth probe | 95 % interval | p, by towers | given the next-token loss | 95 % interval |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for place in sorted(rows[0]["right"], key=lambda name: order((name.split()[0], name.split()[1]))):
        split, kind = place.split()
        shares = np.array([share(row["right"][place]) for row in rows])
        plain = rank_correlation(probe, shares, groups=towers)
        partial = rank_correlation(probe, shares, text, groups=towers)
        lines.append(
            f"| {title((split, kind))} | {100 * results.chance[split, kind]:.0f} | {100 * shares.min():.1f} to {100 * shares.max():.1f} | "
            f"{_correlation(plain)} | {_p(permutation_p(probe, shares, towers))} | {_correlation(partial)} |"
        )
    depth, colour = (np.array([share(row["right"][f"test {kind}"]) for row in rows]) for kind in ("depth", "colour"))
    apart = rank_correlation(probe, depth, minus=colour, groups=towers)
    lines += [
        "",
        "A rank correlation of 0 is what no relation gives; –: too few students differ. The bootstrap draws towers, which several students share; "
        f"percentiles of draws of {len(set(towers))} towers are too narrow an interval, so trust the p-value more: how often the correlation is as far from 0 where the probes of whole towers change places. "
        "It is not corrected and describes, no more. The next-token loss is that after pretraining, on pictures held out, of what stands in which column, which all were taught alike.", "",
        f"The depth probe's correlation with depth answers minus that with colour answers: {_correlation(apart).replace(' | ', ' (95 %: ')}).", "",
        *_specificity(rows),
    ]  # fmt: skip
    return "\n".join(lines)


def _specificity(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The matrix of what is known about a student and what it is asked: is depth what goes with depth?"""
    about = {"depth probe of the student": np.array([best_probe(row) for row in rows])}
    about |= {
        f"{name} of its tower": np.array([row["tower"][name] for row in rows])
        for name in rows[0]["tower"]
        if not name.endswith("by chance")
    }
    places = sorted(rows[0]["right"], key=lambda name: order((name.split()[0], name.split()[1])))
    lines = [
        "Spearman's correlation of each score with the answers to each kind of question:", "",
        "| score | " + " | ".join(title((place.split()[0], place.split()[1])) for place in places) + " |",
        "|---|" + "---|" * len(places),
    ]  # fmt: skip
    for name, values in about.items():
        shares = [np.array([share(row["right"][place]) for row in rows]) for place in places]
        found = [_correlation(rank_correlation(values, share)).split(" | ")[0] for share in shares]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return [*lines, ""]


def _correlation(found: Correlation) -> str:
    """A correlation and its interval, as two cells."""
    if math.isnan(found.value) or math.isnan(found.low):
        return "– | –"
    return f"{found.value:+.2f} | {found.low:+.2f} to {found.high:+.2f}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _values(rows: list[dict[str, Any]], name: str) -> str:
    return ", ".join(str(value) for value in sorted({row[name] for row in rows}))
