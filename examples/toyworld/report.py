"""`docs/results.md` from the rows of the experiment: tables, intervals, plots, and what was fixed beforehand."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from significance import Estimate, digits, hierarchical, holm, seeds_needed

HERE = Path(__file__).parent
Place = tuple[str, int, str, str]
"""Arm, budget, split, kind."""


@dataclass(frozen=True)
class Results:
    """The rows in use."""

    right: dict[Place, dict[int, str]]
    """By place and seed: a digit for each question."""
    images: dict[tuple[str, str], np.ndarray]
    """By split and kind: which picture each question is about."""
    chance: dict[tuple[str, str], float]
    seconds: dict[str, float]
    """By arm: mean seconds of pretraining."""
    versions: list[str]
    dates: list[str]
    left_out: int
    """Rows of other settings than the newest of their arm and budget."""

    def seeds(self, arms: Sequence[str], budget: int, split: str, kind: str) -> list[int]:
        """Seeds that all these arms have."""
        found = [set(self.right.get((arm, budget, split, kind), {})) for arm in arms]
        return sorted(set.intersection(*found)) if found else []

    def values(self, arm: str, budget: int, split: str, kind: str, seeds: Sequence[int]) -> np.ndarray:
        """(S, Q) of 0 and 1."""
        return digits([self.right[arm, budget, split, kind][seed] for seed in seeds])

    def accuracy(self, arm: str, budget: int, split: str, kind: str) -> Estimate | None:
        """Estimate an arm's accuracy over all its seeds."""
        seeds = self.seeds([arm], budget, split, kind)
        if not seeds:
            return None
        return hierarchical(self.values(arm, budget, split, kind, seeds), self.images[split, kind], null=False)

    def difference(self, arm: str, other: str, budget: int, split: str, kind: str) -> Estimate | None:
        """Estimate the paired difference of two arms over the seeds that both have; None with fewer than two."""
        seeds = self.seeds([arm, other], budget, split, kind)
        if len(seeds) < 2:
            return None
        apart = self.values(arm, budget, split, kind, seeds) - self.values(other, budget, split, kind, seeds)
        return hierarchical(apart, self.images[split, kind])


def load(path: Path) -> Results:
    """Read rows and questions; of each arm and budget the settings of the last row count."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    asked_path = path.with_name("questions.json")
    asked = json.loads(asked_path.read_text(encoding="utf-8")) if asked_path.is_file() else {}
    newest = {(row["arm"], row["budget"]): row["config"] for row in rows}
    used = [row for row in rows if newest[row["arm"], row["budget"]] == row["config"]]
    right: dict[Place, dict[int, str]] = defaultdict(dict)
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    for row in used:
        right[row["arm"], row["budget"], row["split"], row["kind"]][row["seed"]] = row["right"]
        seconds[row["arm"]][row["seed"]] = row["pretrain_seconds"]
    return Results(
        right=dict(right),
        images={(s, k): np.asarray(v["images"]) for s, kinds in asked.items() for k, v in kinds.items()},
        chance={(s, k): v["chance"] for s, kinds in asked.items() for k, v in kinds.items()},
        seconds={arm: float(np.mean(list(found.values()))) for arm, found in seconds.items()},
        versions=sorted({", ".join(f"{n} {v}" for n, v in row["versions"].items()) for row in used}),
        dates=sorted({row["date"] for row in used}),
        left_out=len(rows) - len(used),
    )


def write(path: Path, out: Path) -> None:
    """Write the page, and its picture into `images/` beside it."""
    results = load(path)
    plan = json.loads((HERE / "plan.json").read_text(encoding="utf-8"))
    about = _about()
    parts = [_HEAD, _fixed(plan), _endpoint(results, plan), _accuracies(results, about), _rest(results, plan)]
    parts += [_students(path.parent), _made(results)]
    picture = out.parent / "images" / "results.png"
    if plot(results, plan, picture):
        parts.insert(3, f"![accuracy by arm and seed](images/{picture.name})\n")
    out.write_text("\n".join(part for part in parts if part), encoding="utf-8", newline="\n")


def _about() -> dict[str, str]:
    from arms import ARMS

    return {name: arm.about for name, arm in ARMS.items()}


_HEAD = """# Results: the toy world

Does it work? Pretrained weights are out of reach of a test machine, so this is the method in miniature: a world of coloured shapes on a plain whose depth is known
(`examples/toyworld`), small teachers trained on it, a student whose tower sees what is there but little of how far away it is, and everything from extraction to answers through the
commands of this project. `make evidence` writes this page from `examples/toyworld/results/`; nothing here is typed by hand. What a toy shows holds for the toy.
"""


def _fixed(plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    return f"""## What was fixed beforehand

On {plan["fixed_on"]}, before {plan["before"]} (`examples/toyworld/plan.json`):

- **Endpoint**: {end["statistic"]}; questions of {end["question"]} order, split `{end["split"]}`, {end["budget"]} fine-tuning questions.
- **Success**: {end["success"]}: `{"`, `".join(end["against"])}`.
- **Interval**: {end["interval"]}.
- **The rest**: {plan["rest"]}.
- **Seeds**: {plan["seeds"]}. **Stopping**: {plan["stopping"]}.
- **Trivial baseline**: {plan["trivial"]}.
"""


def _endpoint(results: Results, plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    lines = ["## The endpoint", ""]
    found = {other: results.difference("embedding", other, *where) for other in end["against"]}
    known = {other: estimate for other, estimate in found.items() if estimate is not None}
    if not known:
        seeds = results.seeds(["embedding"], *where)
        return "\n".join(
            [*lines, f"Not enough was run yet: a difference takes two paired seeds, and there are {len(seeds)}.", ""]
        )
    lines += ["| `embedding` minus | difference (points) | 95 % interval | SD over seeds | paired seeds | seeds needed at this spread (80 % power) |", "|---|---|---|---|---|---|"]  # fmt: skip
    for other, e in known.items():
        lines.append(
            f"| `{other}` | {e.value:+.1f} | {e.low:+.1f} to {e.high:+.1f} | {e.spread:.1f} | {e.seeds} | {_number(seeds_needed(e.value, e.spread))} |"
        )
    missing = [other for other in end["against"] if other not in known]
    if missing:
        verdict = f"**Undecided**: `{'`, `'.join(missing)}` has fewer than two paired seeds."
    elif all(e.low > 0 for e in known.values()):
        verdict = "**Success** as it was fixed: all three intervals lie above 0."
    elif any(e.high < 0 for e in known.values()):
        worse = [other for other, e in known.items() if e.high < 0]
        verdict = f"**No success**: the embedding losses are worse than `{'`, `'.join(worse)}`."
    else:
        open_ = [other for other, e in known.items() if e.low <= 0]
        verdict = f"**No success so far**: the interval against `{'`, `'.join(open_)}` holds 0."
    return "\n".join([*lines, "", f"{verdict} An SD over fewer than five seeds is itself uncertain.", ""])


def _accuracies(results: Results, about: Mapping[str, str]) -> str:
    parts = []
    for budget in sorted({budget for _, budget, _, _ in results.right}):
        kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=_order)
        arms = [arm for arm in about if any(a == arm and b == budget for a, b, _, _ in results.right)]
        lines = [
            f"## Accuracy after {budget} questions",
            "",
            "Percent, with 95 % intervals over seeds and images. `ood`: pictures in which the apparent size tells no distance.",
            "",
        ]
        lines.append("| arm | seeds | " + " | ".join(_title(place) for place in kinds) + " | pretraining (s) |")
        lines.append("|---|---|" + "---|" * (len(kinds) + 1))
        lines.append("| chance | | " + " | ".join(f"{100 * results.chance[place]:.0f}" for place in kinds) + " | |")
        for arm in arms:
            found = [results.accuracy(arm, budget, *place) for place in kinds]
            cells = [f"{e.value:.1f} ({e.low:.0f}–{e.high:.0f})" if e else "" for e in found]
            seeds = max((e.seeds for e in found if e), default=0)
            lines.append(f"| `{arm}`: {about[arm]} | {seeds} | {' | '.join(cells)} | {results.seconds[arm]:.0f} |")
        counts = ", ".join(f"{_title(p)} {len(results.images[p])}" for p in kinds)
        parts.append(
            "\n".join(
                [
                    *lines,
                    "",
                    f"Questions: {counts}. Seconds were taken while the machine did other work: a hint, not a measurement.",
                    "",
                ]
            )
        )
    return "\n".join(parts)


def _rest(results: Results, plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    fixed = {("embedding", other, end["budget"], end["split"], end["question"]) for other in end["against"]}
    found = {}
    for arm, budget, split, kind in sorted(results.right):
        if arm == "tokens" or (arm, "tokens", budget, split, kind) in fixed:
            continue
        estimate = results.difference(arm, "tokens", budget, split, kind)
        if estimate is not None:
            found[f"| `{arm}` | {budget} | {_title((split, kind))}"] = estimate
    if not found:
        return ""
    corrected = holm({name: estimate.p for name, estimate in found.items()})
    lines = [
        "## The rest: differences from `tokens`",
        "",
        f"{len(found)} comparisons, corrected together (Holm). Nothing here was fixed as a success beforehand.",
        "",
    ]
    lines += [
        "| arm | questions | kind | difference (points) | 95 % interval | seeds | p, corrected |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, e in found.items():
        lines.append(f"{name} | {e.value:+.1f} | {e.low:+.1f} to {e.high:+.1f} | {e.seeds} | {corrected[name]:.3f} |")
    worse = [name for name, e in found.items() if e.high < 0]
    said = "; ".join(" ".join(name.strip("| ").split(" | ")) for name in worse) or "nothing beyond its interval"
    return "\n".join([*lines, "", f"What gets worse than without a loss: {said}.", ""])


def _students(folder: Path) -> str:
    path = folder.parent / "student" / "scores.json"
    if not path.is_file():
        return ""
    scores = json.loads(path.read_text(encoding="utf-8"))
    lines = ["## The student's parts, on held-out scenes", "", "| part | score | value |", "|---|---|---|"]
    lines += [f"| {part} | {name} | {value:.3f} |" for part, found in scores.items() for name, value in found.items()]
    return "\n".join(
        [
            *lines,
            "",
            "Of questions about written-out scenes chance is a half (of counting a quarter); a centred R² of 0 is the mean map's.",
            "",
        ]
    )


def _made(results: Results) -> str:
    when = " to ".join(dict.fromkeys([results.dates[0], results.dates[-1]])) if results.dates else "never"
    lines = [
        "## How it was made",
        "",
        f"Run {when}; {'; '.join(results.versions) or 'no version yet'}; CPU, one thread an arm, float32.",
    ]
    if results.left_out:
        lines.append(f"{results.left_out} rows of earlier settings are kept in the file and are not shown.")
    return "\n".join(
        [*lines, "", "`make evidence SEEDS=0-19` adds the seeds that are missing and writes this page again.", ""]
    )


def _order(place: tuple[str, str]) -> tuple[bool, str]:
    return place[0] != "test", place[1]


def _title(place: tuple[str, str]) -> str:
    split, kind = place
    return kind if split == "test" else f"{kind} ({split})"


def _number(value: float) -> str:
    return "∞" if value == float("inf") else f"{value:.0f}"


def plot(results: Results, plan: Mapping[str, Any], out: Path) -> bool:
    """Draw each arm's accuracy at the endpoint, a dot for each seed, beside chance; False where there is nothing."""
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    arms = [arm for arm in _about() if (arm, *where) in results.right]
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
    axis.set_yticks(range(len(arms)), list(reversed(arms)))
    axis.axvline(100 * results.chance[end["split"], end["question"]], color="grey", linestyle="--", label="chance")
    axis.set(xlabel=f"{end['question']} order right, % (dots: seeds; bars: 95 %), {end['budget']} questions")
    axis.legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
