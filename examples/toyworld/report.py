"""`docs/results.md` from the rows of the experiment: tables, intervals, plots, and what was fixed beforehand."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, LAYER_CHOICES, LAYERS, PRECISIONS, layers_arm
from significance import Correlation, Estimate, digits, hierarchical, holm, rank_correlation, seeds_needed

from olatrain.probe import LayerScore, suggest

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

    stored: dict[str, dict[str, float]]
    """By store: bytes an image, cosine and centred R² of what is read from it with float16."""
    students: list[dict[str, Any]]
    """Rows of part (a)."""
    repeated: list[bool]
    """Of rows that were made a second time from nothing: whether every question was answered as before."""

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


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def load(folder: Path) -> Results:
    """Read rows and questions; of each arm and budget the settings of the last row count."""
    rows = _rows(folder / "runs.jsonl")
    asked = _record(folder / "questions.json")
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
        stored=_record(folder / "stores.json"),
        students=_rows(folder / "students.jsonl"),
        repeated=[
            right[row["arm"], row["budget"], row["split"], row["kind"]][row["seed"]] == row["right"]
            for row in _rows(folder / "repeated.jsonl")
            if newest.get((row["arm"], row["budget"])) == row["config"]
        ],
    )


def write(folder: Path, out: Path) -> None:
    """Write the page from a folder of results, and its pictures into `images/` beside the page."""
    results = load(folder)
    plan = _record(HERE / "plan.json")
    images = out.parent / "images"
    parts = [_HEAD, _fixed(plan), _endpoint(results, plan)]
    if plot(results, plan, images / "results.png"):
        parts.append("![accuracy by arm and seed](images/results.png)\n")
    parts += [_accuracies(results), _rest(results, plan), _layers(results, plan), _precision(results, plan)]
    parts.append(_representations(results, plan))
    if plot_students(results, plan, images / "students.png"):
        parts.append("![depth probe and depth answers by student](images/students.png)\n")
    parts += [_cost(results), _parts_of_the_student(), _made(results, plan)]
    out.write_text("\n".join(part for part in parts if part), encoding="utf-8", newline="\n")


MAIN = [name for name in ARMS if name not in PRECISIONS and not name.startswith("layers-")]
"""The arms of the first tables; the others have their own."""


_HEAD = """# Results: the toy world

Does it work? Pretrained weights are out of reach of a test machine, so this is the method in miniature: a world of coloured shapes on a plain whose depth is known
(`examples/toyworld`), small teachers trained on it, a student whose tower sees what is there but little of how far away it is, and everything from extraction to answers through the
commands of this project. `make evidence` writes this page from `examples/toyworld/results/`; nothing here is typed by hand. What a toy shows holds for the toy.
"""


def _fixed(plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    return f"""## What was fixed beforehand

On {plan["fixed_on"]}, before {plan["before"]} (`examples/toyworld/plan.json`):

- **Before that**: {plan["changed"]}
- **Endpoint**: {end["statistic"]}; questions of {end["question"]} order, split `{end["split"]}`, {end["budget"]} fine-tuning questions.
- **Success**: {end["success"]}: `{"`, `".join(end["against"])}`.
- **Interval**: {end["interval"]}.
- **The rest**: {plan["rest"]}.
- **Seeds**: {plan["seeds"]}. **Stopping**: {plan["stopping"]}.
- **Representations**: {plan["representations"]}.
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


def _accuracies(results: Results) -> str:
    parts = []
    for budget in sorted({budget for _, budget, _, _ in results.right}):
        kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=_order)
        arms = [arm for arm in MAIN if any(a == arm and b == budget for a, b, _, _ in results.right)]
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
            lines.append(f"| `{arm}`: {ARMS[arm].about} | {seeds} | {' | '.join(cells)} | {results.seconds[arm]:.0f} |")
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
        if arm == "tokens" or arm not in MAIN or (arm, "tokens", budget, split, kind) in fixed:
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


def _against(results: Results, plan: Mapping[str, Any], arm: str) -> str:
    """Cells of a table: seeds, accuracy at the endpoint's questions, and what is paired with `embedding`."""
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    found = results.accuracy(arm, *where)
    if found is None:
        return "0 | | |"
    difference = results.difference(arm, "embedding", *where)
    apart = f"{difference.value:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})" if difference else "one seed"
    if arm == "embedding":
        apart = "–"
    return f"{found.seeds} | {found.value:.1f} ({found.low:.0f}–{found.high:.0f}) | {apart} |"


def _layers(results: Results, plan: Mapping[str, Any]) -> str:
    probes = [row["probe"] for row in results.students]
    lines = ["## Layers", ""]
    if probes:
        means = {layer: float(np.mean([probe[layer] for probe in probes])) for layer in sorted(probes[0])}
        best = suggest({int(layer): LayerScore(cosine=0.0, r2=value, smooth_l1=0.0) for layer, value in means.items()})
        lines += [
            "What depth probes read from each block of students trained on next tokens alone, before fine-tuning "
            f"(centred R², mean of {len(probes)} students; the mean map has 0):", "",
            "| block | " + " | ".join(means) + " |", "|---|" + "---|" * len(means),
            "| R² | " + " | ".join(f"{value:.3f}" for value in means.values()) + " |", "",
            f"By the rule of `olatrain probe` (the two best blocks that beat the mean map) that suggests "
            f"{' and '.join(map(str, best)) or 'none'}.", "",
        ]  # fmt: skip
    names = {"embedding": f"{LAYERS} (published, scaled)", **{layers_arm(one): str(one) for one in LAYER_CHOICES}}
    rows = [f"| {about} | {_against(results, plan, arm)}" for arm, about in names.items()]
    lines += [
        "| supervised blocks | seeds | depth order, % | minus the published choice, points |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *rows, ""])


def _precision(results: Results, plan: Mapping[str, Any]) -> str:
    lines = [
        "## Precision", "",
        "The arm `embedding` with features stored in other forms; bytes are what an image takes in the store.", "",
        "| stored as | bytes an image | cosine with float16 | seeds | depth order, % | minus float16, points |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in ("embedding", *PRECISIONS):
        store = "float16" if arm == "embedding" else arm
        known = results.stored.get(store, {})
        size = f"{known['bytes']:.0f}" if known else ""
        cosine = f"{known['cosine']:.5f}" if known else ""
        lines.append(f"| {store} | {size} | {cosine} | {_against(results, plan, arm)}")
    return "\n".join([*lines, ""])


def _best_probe(row: Mapping[str, Any]) -> float:
    return float(max(row["probe"].values()))


def _share(text: str) -> float:
    return text.count("1") / len(text)


def _representations(results: Results, plan: Mapping[str, Any]) -> str:
    rows = results.students
    lines = ["## (a) Better representations, better answers?", ""]
    if len(rows) < 4:
        return "\n".join([*lines, f"Not enough was run yet: {len(rows)} students.", ""])
    probe = np.array([_best_probe(row) for row in rows])
    text = np.array([row["text"] for row in rows])
    lines += [
        f"{len(rows)} students of next tokens alone: towers of {_values(rows, 'width')} channels trained for "
        f"{_values(rows, 'tower_steps')} steps, pretrained on {_values(rows, 'pictures')} pictures for equally many steps. "
        f"Depth probe, best block: R² {probe.min():.3f} to {probe.max():.3f} (the mean map: 0).", "",
        "| questions | chance | accuracy, lowest to highest | Spearman with the depth probe | 95 % interval | given the next-token loss | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for place in sorted(rows[0]["right"], key=lambda name: _order((name.split()[0], name.split()[1]))):
        split, kind = place.split()
        shares = np.array([_share(row["right"][place]) for row in rows])
        plain, partial = rank_correlation(probe, shares), rank_correlation(probe, shares, text)
        lines.append(
            f"| {_title((split, kind))} | {100 * results.chance[split, kind]:.0f} | {100 * shares.min():.1f} to {100 * shares.max():.1f} | "
            f"{_correlation(plain)} | {_correlation(partial)} |"
        )
    lines += [
        "",
        "A rank correlation of 0 is what no relation gives; –: too few students differ.",
        "",
        *_specificity(rows),
    ]
    return "\n".join(lines)


def _specificity(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The matrix of what is known about a student and what it is asked: is depth what goes with depth?"""
    about = {"depth probe of the student": np.array([_best_probe(row) for row in rows])}
    about |= {
        f"{name} of its tower": np.array([row["tower"][name] for row in rows])
        for name in rows[0]["tower"]
        if not name.endswith("by chance")
    }
    places = sorted(rows[0]["right"], key=lambda name: _order((name.split()[0], name.split()[1])))
    lines = [
        "Spearman's correlation of each score with the answers to each kind of question:", "",
        "| score | " + " | ".join(_title((place.split()[0], place.split()[1])) for place in places) + " |",
        "|---|" + "---|" * len(places),
    ]  # fmt: skip
    for name, values in about.items():
        shares = [np.array([_share(row["right"][place]) for row in rows]) for place in places]
        found = [_correlation(rank_correlation(values, share)).split(" | ")[0] for share in shares]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return [*lines, ""]


def _correlation(found: Correlation) -> str:
    """A correlation and its interval, as two cells."""
    if math.isnan(found.value) or math.isnan(found.low):
        return "– | –"
    return f"{found.value:+.2f} | {found.low:+.2f} to {found.high:+.2f}"


def _values(rows: list[dict[str, Any]], name: str) -> str:
    return ", ".join(str(value) for value in sorted({row[name] for row in rows}))


def _cost(results: Results) -> str:
    step = _record(HERE.parents[1] / "benchmarks" / "results" / "train-step.json")
    lines = ["## Cost", ""]
    if step:
        base = step["ways"]["text"]
        about = {
            "text": "next tokens alone", "streamed": "embedding losses, features from the store",
            "batched": "embedding losses, teachers in the step, batched",
            "one_by_one": "embedding losses, teachers in the step, an image at a time (as the public code)",
        }  # fmt: skip
        lines += [
            f"One training step of a student of {step['settings']['llm']['num_hidden_layers']} blocks with random weights and the three published teachers at reduced size "
            f"(`benchmarks/train_step.py`, {step['date']}, batch {step['settings']['batch']}, CPU; {step['conditions']['said']}):", "",
            "| | seconds | over next tokens alone | peak memory, GiB |", "|---|---|---|---|",
        ]  # fmt: skip
        for way, said in about.items():
            found = step["ways"][way]
            lines.append(
                f"| {said} | {found['seconds']:.2f} | {found['seconds'] / base['seconds']:.2f} | {found['peak_gib']:.2f} |"
            )
        lines.append("")
    seconds = {arm: results.seconds[arm] for arm in ("none", "embedding", "longer") if arm in results.seconds}
    if seconds:
        said = ", ".join(f"`{arm}` {value:.0f}" for arm, value in seconds.items())
        lines += [f"In this experiment, seconds of pretraining with other jobs on the machine: {said}.", ""]
    return "\n".join(lines)


def _parts_of_the_student() -> str:
    scores = _record(HERE / "student" / "scores.json")
    if not scores:
        return ""
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


def _made(results: Results, plan: Mapping[str, Any]) -> str:
    when = " to ".join(dict.fromkeys([results.dates[0], results.dates[-1]])) if results.dates else "never"
    lines = [
        "## How it was made",
        "",
        f"Run {when}; {'; '.join(results.versions) or 'no version yet'}; CPU, one thread an arm, float32.",
    ]
    if results.repeated:
        lines.append(
            f"{len(results.repeated)} rows (an arm, a seed, a kind of question) were made a second time from nothing, "
            f"pictures and features included: in {sum(results.repeated)} of them every question was answered as before."
        )
    if results.left_out:
        lines.append(f"{results.left_out} rows of earlier settings are kept in the file and are not shown.")
    return "\n".join([*lines, "", plan["cost"], ""])


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
    axis.set_yticks(range(len(arms)), list(reversed(arms)))
    axis.axvline(100 * results.chance[end["split"], end["question"]], color="grey", linestyle="--", label="chance")
    axis.set(xlabel=f"{end['question']} order right, % (dots: seeds; bars: 95 %), {end['budget']} questions")
    axis.legend(loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def plot_students(results: Results, plan: Mapping[str, Any], out: Path) -> bool:
    """Draw depth answers over the depth probe, a dot for each student of part (a); False where there are too few."""
    rows = results.students
    if len(rows) < 4:
        return False
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    where = (str(plan["endpoint"]["split"]), str(plan["endpoint"]["question"]))
    place = " ".join(where)
    for width in sorted({row["width"] for row in rows}):
        own = [row for row in rows if row["width"] == width]
        shares = [100 * _share(row["right"][place]) for row in own]
        axis.plot([_best_probe(row) for row in own], shares, "o", label=f"tower of {width} channels", alpha=0.7)
    axis.axhline(100 * results.chance[where], color="grey", linestyle="--", label="chance")
    axis.set(xlabel="depth probe before fine-tuning, best block (centred R²)", ylabel="questions of depth right, %")
    axis.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
