"""The pictures of `docs/results.md`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arms import MAIN
from recorded import Results, best_probe, share
from report_students import FEWEST_STUDENTS


def plot(results: Results, plan: Mapping[str, Any], out: Path) -> bool:
    """Draw each arm's accuracy at the endpoint, a dot for each seed, beside chance; False where there is nothing."""
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    arms = [arm for arm in MAIN if (arm, *where) in results.right]
    if not arms:
        return False
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.5 * len(arms) + 1.4), layout="constrained")
    for height, arm in enumerate(reversed(arms)):
        found = results.right[arm, *where]
        shares = [100 * text.count("1") / len(text) for text in found.values()]
        estimate = results.accuracy(arm, *where)
        axis.plot(shares, [height] * len(shares), "o", color="tab:blue", alpha=0.5, markersize=5)
        if estimate is not None:
            axis.plot([estimate.low, estimate.high], [height - 0.22] * 2, color="black", linewidth=1.5)
    # unlike numbers of seeds: bars of two arms do not compare them
    axis.set_yticks(range(len(arms)), [f"{arm} ({len(results.right[arm, *where])})" for arm in reversed(arms)])
    axis.axvline(100 * results.chance[end["split"], end["question"]], color="grey", linestyle="--", label="chance")
    axis.set(xlabel=f"{end['question']} order right, % (dots: seeds, so many; bars: 95 %), {end['budget']} questions")
    for rule, right in results.rules[end["split"], end["question"]].items():
        axis.axvline(100 * right, color="tab:orange", linestyle=":", linewidth=1, label=f"rule: {rule}")
    axis.legend(loc="lower right", fontsize=7)
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
    for width in sorted({row["width"] for row in rows}):
        own = [row for row in rows if row["width"] == width]
        shares = [100 * share(row["right"][place]) for row in own]
        axis.plot([best_probe(row) for row in own], shares, "o", label=f"tower of {width} channels", alpha=0.7)
    axis.axhline(100 * results.chance[where], color="grey", linestyle="--", label="chance")
    axis.set(xlabel="depth probe before fine-tuning, best block (centred R²)", ylabel="questions of depth right, %")
    axis.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
