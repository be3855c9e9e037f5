"""The pictures of `docs/results.md`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recorded import Results, best_probe, share
from report_endpoint import endpoint_of, paired
from report_students import FEWEST_STUDENTS


def plot(results: Results, plan: Mapping[str, Any], out: Path, *, also: Sequence[tuple[str, str]]) -> bool:
    """Draw paired differences at the endpoint, a dot for each seed; False where there is none.

    `also` are other pairs of arms, where they have the endpoint's seeds.
    """
    where = endpoint_of(plan)
    seeds = paired(results, plan)
    wanted = [*((plan["endpoint"]["arm"], other) for other in plan["endpoint"]["against"]), *also]
    found = [((arm, other), results.difference(arm, other, *where, seeds=seeds)) for arm, other in wanted]
    known = [(pair, estimate) for pair, estimate in found if estimate is not None and estimate.seeds == len(seeds)]
    if not known:
        return False
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.5 * len(known) + 1.2), layout="constrained")
    for height, ((arm, other), estimate) in enumerate(reversed(known)):
        apart = results.values(arm, *where, seeds) - results.values(other, *where, seeds)
        axis.plot(100 * apart.mean(axis=1), [height] * len(seeds), "o", color="tab:blue", alpha=0.5, markersize=5)
        axis.plot([estimate.low, estimate.high], [height - 0.22] * 2, color="black", linewidth=1.5)
    axis.set_yticks(range(len(known)), [f"{arm} − {other}" for (arm, other), _ in reversed(known)])
    axis.axvline(0, color="grey", linestyle="--")
    axis.set(xlabel=f"{where[2]} order, points (dots: {len(seeds)} seeds; bars: 95 %), {where[0]} questions")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def plot_students(results: Results, plan: Mapping[str, Any], out: Path) -> bool:
    """Draw depth answers over the depth probe, a dot for each student of part (a); False where there are too few."""
    rows = results.students
    if len(rows) < FEWEST_STUDENTS:
        return False
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    where = (str(plan["endpoint"]["split"]), str(plan["endpoint"]["question"]))
    place = " ".join(where)
    for told in sorted({row["told"] for row in rows}):
        own = [row for row in rows if row["told"] == told]
        shares = [100 * share(row["right"][place]) for row in own]
        axis.plot([best_probe(row) for row in own], shares, "o", label=f"{told} captions tell distances", alpha=0.7)
    axis.axhline(100 * results.chance[where], color="grey", linestyle="--", label="chance")
    axis.set(xlabel="depth probe before fine-tuning, best block (centred R²)", ylabel="questions of depth right, %")
    axis.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
