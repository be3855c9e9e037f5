"""The part of `docs/results.md` on the second experiment, which asks once more what the first showed afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arms import numbers
from recorded import Results, order, record, title
from report_endpoint import decided, differences, endpoint_of, met, paired, points, within
from report_tables import accuracy_table, headroom_table, progress_table

HERE = Path(__file__).parent


def confirmed(results: Results, plan: Mapping[str, Any]) -> str:
    """Say what came out, for a reader who stops there; nothing before a verdict."""
    own = plan["confirmation"]
    holds = met(results, own)
    if holds is None:
        return ""
    found, seeds, where = differences(results, own), paired(results, own), endpoint_of(own)
    share = 100 * float(results.values(own["endpoint"]["arm"], *where, seeds).mean())
    told = "; ".join(f"over {_OTHERS[other]} (`{other}`) {points(e)}" for other, e in found.items())
    return (
        f"**A second experiment asked whether the depth that a teacher tells, as target, gives more right answers than no loss and than three other targets, in another drawing of the world and with another teacher: its criterion is {'met' if holds else 'not met'}.** "
        f"Over {len(seeds)} paired seeds that target (`map`) gave {share:.1f} % right answers: {told}.{_beside(results, own)}\n"
    )


_OTHERS = {
    "tokens": "task tokens without a loss",
    "map-shuffled": "what it tells of another image",
    "map-untrained-each": "what networks tell that were never trained, another for each seed",
    "cells": "the picture's colours in that form",
}


def _beside(results: Results, own: Mapping[str, Any]) -> str:
    found = results.difference(own["endpoint"]["arm"], "embedding", *endpoint_of(own), seeds=paired(results, own))
    if found is None:
        return ""
    return f" Over the teacher's features (`embedding`; described, not tested): {points(found)}, {found.seeds} seeds."


def confirmation(results: Results, plan: Mapping[str, Any]) -> str:
    """Write what was fixed, what came out, and what else changed; nothing where nothing was run."""
    if not results.right:
        return ""
    own = plan["confirmation"]
    end = own["endpoint"]
    budget = end["budget"]
    wanted = [
        (arm, seed)
        for part in plan["forms"]["confirmation"]["arms"]
        for arm in part["arms"]
        for seed in numbers(part["seeds"])
    ]
    there = sum(seed in results.right.get((arm, *endpoint_of(own)), {}) for arm, seed in wanted)
    lines = [
        "## A second experiment: the depth that the teacher tells as target", "",
        f"Why: {own['why']}. Fixed on {own['fixed_on']}, before {own['before']} (`examples/toyworld/plan.json`):", "",
        f"- **Fresh**: {own['fresh']}. **The same**: {own['same']}.",
        f"- **Untrained networks**: {own['untrained']}.",
        f"- **Endpoint**: {end['statistic']}; questions of {end['question']} order, split `{end['split']}`, {budget} fine-tuning questions.",
        f"- **Success**: {end['success']}: `{'`, `'.join(end['against'])}`. **Interval**: {end['interval']}.",
        f"- **Seeds**: {own['seeds']}. **Stopping**: {own['stopping']}.",
        f"- **Expected**: {own['expected']}.",
        f"- **What it cannot tell**: {own['limits']}.",
        f"- **Beside it**: {own['beside']}",
        f"- **Noted later**: {own.get('noted_after', 'nothing')}.", "",
        f"Held-out scores of the two depth teachers: {_teachers()}.", "",
        f"{there} of {len(wanted)} runs are there (`make evidence FORM=confirmation`), made {' to '.join(dict.fromkeys([results.dates[0], results.dates[-1]]))} with {'; '.join(results.versions)}.", "",
        *decided(results, own), "",
    ]  # fmt: skip
    lines += _kinds(results, own)
    lines += [
        "Right answers in percent, with intervals over seeds and images; only paired differences compare.", "",
        *accuracy_table(results, budget), "",
        "What training ended at; R² is centred: 0 is the mean map of the arm's own targets.", "",
        *progress_table(results, budget), "",
    ]  # fmt: skip
    lines += headroom_table(results, end["question"])
    if results.spread:
        told = ", ".join(f"`{name}` {found['beyond']:.2f}" for name, found in sorted(results.spread.items()))
        lines += [f"Share of the targets' variance that is beyond their mean map, by arm or store: {told}.", ""]
    return "\n".join(lines)


def _teachers() -> str:
    """Say how well the first and the second depth teacher tell inverse depth, beside the mean map."""
    told = []
    for name, folder in (("the first", "teachers"), ("this one", "teachers-again")):
        scores = record(HERE / folder / "scores.json")["depth"]["scores"]
        over = [
            f"{where} R² {scores[f'test R²{key}']:.3f} (mean map {scores[f'test R²{key} of the mean map']:.3f})"
            for where, key in (("over all pixels", ""), ("over things", " on things"))
        ]
        told.append(f"{name} {', '.join(over)}")
    return "; ".join(told)


def _kinds(results: Results, own: Mapping[str, Any]) -> list[str]:
    """What the endpoint's arm is to the others at each kind of question."""
    end = own["endpoint"]
    budget, seeds = end["budget"], paired(results, own)
    kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=order)
    rows = []
    for other in (*end["against"], "embedding"):
        found = [results.difference(end["arm"], other, budget, *place, seeds=seeds) for place in kinds]
        if all(e is not None for e in found):
            cells = " | ".join(f"{e.value:+.1f} ({within(e)})" for e in found if e is not None)
            rows.append(f"| `{other}` | {cells} |")
    if not rows:
        return []
    return [
        f"`{end['arm']}` minus others by kind of question, points with 95 % intervals; all but depth (test) are descriptive:", "",
        "| | " + " | ".join(title(place) for place in kinds) + " |", "|---|" + "---|" * len(kinds), *rows, "",
    ]  # fmt: skip
