"""Paired differences of arms, corrected within the families that the plan fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arms import LAYER_CHOICES, PRECISIONS, layers_arm
from recorded import Results
from report_endpoint import FEWEST_FOR_INTERVAL, endpoint_of, p_value, within
from significance import Estimate, holm


@dataclass(frozen=True)
class Compared:
    """A paired difference, with its p-value after correction for all of its family."""

    estimate: Estimate
    p: float


Comparison = tuple[str, str, int, str, str]
"""Arm, the arm it is compared with, budget, split, kind."""


_CONTROLS = ("none", "longer", "own", "published", "feed", "oracle")


def families(plan: Mapping[str, Any]) -> dict[str, list[Comparison]]:
    """What is corrected together, by the plan's names for it: all about the endpoint's questions."""
    where = endpoint_of(plan)
    found: dict[str, list[Comparison]] = {
        "gates": [(arm, "none", *where) for arm in ("feed", "oracle")],
        "controls": [("embedding", other, *where) for other in _CONTROLS],
        "layers": [(layers_arm(layers), "embedding", *where) for layers in LAYER_CHOICES],
        "precision": [(precision, "embedding", *where) for precision in PRECISIONS],
    }
    if (fixed := sorted(plan.get("families", {}))) != sorted(found):
        raise ValueError(
            f"the plan's families are {fixed} where {sorted(found)} are corrected: "
            "change `families` in plan.json, or comparisons.py"
        )
    return found


def corrections(results: Results, plan: Mapping[str, Any]) -> dict[Comparison, Compared]:
    """The families' comparisons that there are, each corrected after Holm for all that its family lists."""
    corrected: dict[Comparison, Compared] = {}
    for family in families(plan).values():
        found = {one: results.difference(*one) for one in family}
        told = {one for one, e in found.items() if e is not None and e.seeds >= FEWEST_FOR_INTERVAL}
        p = holm({str(one): e.p if e is not None and one in told else 1.0 for one, e in found.items()})
        corrected |= {one: Compared(e, p[str(one)]) for one, e in found.items() if e is not None}
    return corrected


def difference(found: Compared) -> str:
    """Say a difference, its interval and its p-value as cells of a table."""
    e = found.estimate
    p = "–" if e.seeds < FEWEST_FOR_INTERVAL else p_value(found.p)
    return f"{e.value:+.1f} | {within(e)} | {p}"
