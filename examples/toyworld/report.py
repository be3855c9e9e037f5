"""`docs/results.md` from the rows of the experiment: tables, intervals, plots, and what was fixed beforehand."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, LAYER_CHOICES, LAYERS, PRECISIONS, layers_arm, numbers
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
    rules: dict[tuple[str, str], dict[str, float]]
    """By split and kind: the share of right answers by a rule that does not look for what is asked."""
    versions: list[str]
    dates: list[str]
    left_out: int
    """Rows of other settings than the newest of their arm and budget, or about other questions than the newest."""

    stored: dict[str, dict[str, float]]
    """By store: bytes an image, and centred R² of what is read from it with float16."""
    students: list[dict[str, Any]]
    """Rows of part (a)."""
    headroom: dict[str, float]
    """What a regression reads of depth from the places of two things, by what it reads from."""
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
        return hierarchical(self.values(arm, budget, split, kind, seeds), self.images[split, kind])

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
    bench = rows[-1]["bench"] if rows else None
    used = [row for row in rows if newest[row["arm"], row["budget"]] == row["config"] and row["bench"] == bench]
    right: dict[Place, dict[int, str]] = defaultdict(dict)
    for row in used:
        right[row["arm"], row["budget"], row["split"], row["kind"]][row["seed"]] = row["right"]
    students = {(row["width"], row["tower_steps"], row["pictures"]): row for row in _rows(folder / "students.jsonl")}
    return Results(
        right=dict(right),
        images={(s, k): np.asarray(v["images"]) for s, kinds in asked.items() for k, v in kinds.items()},
        chance={(s, k): v["chance"] for s, kinds in asked.items() for k, v in kinds.items()},
        rules={(s, k): v["rules"] for s, kinds in asked.items() for k, v in kinds.items()},
        versions=sorted({", ".join(f"{n} {v}" for n, v in row["versions"].items()) for row in used}),
        dates=sorted({row["date"] for row in used}),
        left_out=len(rows) - len(used),
        stored=_record(folder / "stores.json"),
        headroom=_record(folder / "headroom.json"),
        students=[row for row in students.values() if bench is None or row["bench"] == bench],
        repeated=[
            right[row["arm"], row["budget"], row["split"], row["kind"]].get(row["seed"]) == row["right"]
            for row in _rows(folder / "repeated.jsonl")
            if newest.get((row["arm"], row["budget"])) == row["config"]
        ],
    )


def write(folder: Path, out: Path) -> None:
    """Write the page from a folder of results, and its pictures into `images/` beside the page."""
    results = load(folder)
    plan = _record(HERE / "plan.json")
    images = out.parent / "images"
    parts = [_HEAD, _missing(results, plan), _fixed(plan), _endpoint(results, plan)]
    if plot(results, plan, images / "results.png"):
        parts.append("![accuracy by arm and seed](images/results.png)\n")
    corrected = _corrected(results, plan)
    parts += [_sensitivity(results, plan, corrected), _accuracies(results), _rest(results, corrected)]
    parts += [_layers(results, plan, corrected), _precision(results, plan, corrected)]
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

One teacher, the depth one, with 9 task tokens; its losses are on while the projector is pretrained on captions, and off in fine-tuning on questions. The student's tower is frozen throughout.
"""


def _missing(results: Results, plan: Mapping[str, Any]) -> str:
    """How much of the full form there is."""
    form = plan["forms"]["full"]
    split, kind = plan["endpoint"]["split"], plan["endpoint"]["question"]
    wanted = [
        (arm, seed, budget)
        for part in form["arms"]
        for arm in part["arms"]
        for seed in numbers(part["seeds"])
        for budget in part["budgets"]
    ]
    left = Counter(arm for arm, seed, budget in wanted if seed not in results.right.get((arm, budget, split, kind), {}))
    lacking = ", ".join(f"`{arm}` {count}" for arm, count in left.items())
    lines = [
        f"**How much of it there is**: {len(wanted) - left.total()} of {len(wanted)} runs of the full form (an arm, a seed, a number of questions), "
        f"{len(results.students)} of {form['students']} students of part (a)."
    ]
    if left:
        lines.append(f"Runs still missing: {lacking}.")
    return " ".join(lines) + "\n"


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
    lines += ["| `embedding` minus | difference (points) | 95 % interval | SD over seeds | paired seeds | seeds needed for this difference (80 % power) |", "|---|---|---|---|---|---|"]  # fmt: skip
    for other, e in known.items():
        lines.append(
            f"| `{other}` | {e.value:+.1f} | {e.low:+.1f} to {e.high:+.1f} | {e.spread:.1f} | {e.seeds} | {_number(seeds_needed(e)) if e.value > 0 else '–'} |"
        )
    fewest = min((e.seeds for e in known.values()), default=0) if len(known) == len(end["against"]) else 0
    worse = [other for other, e in known.items() if e.high < 0]
    open_ = [other for other, e in known.items() if e.low <= 0]
    if fewest < end["seeds_for_a_verdict"]:
        verdict = f"**No verdict yet**: it takes {end['seeds_for_a_verdict']} paired seeds of all arms, and there are {fewest}."
    elif worse:
        verdict = f"**No success**: the embedding losses are worse than `{'`, `'.join(worse)}`."
    elif open_:
        verdict = f"**No success**: the interval against `{'`, `'.join(open_)}` holds 0."
    else:
        verdict = "**Success** as it was fixed: all three intervals lie above 0."
    note = "–: fewer than five seeds, or no advantage; ∞: more seeds do not show it, more pictures might."
    return "\n".join([*lines, "", verdict, "", note, ""])


@dataclass(frozen=True)
class Compared:
    """A paired difference, with its p-value after correction for all that are not the endpoint."""

    estimate: Estimate
    p: float


Comparison = tuple[str, str, int, str, str]
"""Arm, the arm it is compared with, budget, split, kind."""


def _corrected(results: Results, plan: Mapping[str, Any]) -> dict[Comparison, Compared]:
    """Everything but the endpoint that the page compares, corrected together after Holm."""
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    wanted: list[Comparison] = [
        (arm, "tokens", budget, split, kind)
        for arm, budget, split, kind in sorted(results.right)
        if arm in MAIN and arm != "tokens"
    ]
    wanted += [("embedding", other, *where) for other in ("none", *_CONTROLS)]
    wanted += [(arm, "none", *where) for arm in ("oracle", "feed")]
    wanted += [(arm, "embedding", *where) for arm in ARMS if arm not in MAIN]
    fixed = {("embedding", other, *where) for other in end["against"]}
    found = {one: results.difference(*one) for one in dict.fromkeys(wanted) if one not in fixed}
    known = {one: estimate for one, estimate in found.items() if estimate is not None}
    p = holm({str(one): estimate.p for one, estimate in known.items()})
    return {one: Compared(estimate, p[str(one)]) for one, estimate in known.items()}


_CONTROLS = ("longer", "own", "feed", "oracle")


def _sensitivity(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    """Whether what is given away is used: without that, no effect of the losses says little."""
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    lines = [
        "## Could it see an effect?", "",
        "`feed` has the teacher's features as inputs, `oracle` distances in the captions. Where these help no more than the losses, the endpoint cannot tell whether a student sees depth.", "",
        "| arm | seeds | depth order, % | minus `none`, points | 95 % interval | p, corrected |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in ("none", "oracle", "feed"):
        found = results.accuracy(arm, *where)
        if found is None:
            lines.append(f"| `{arm}` | 0 | | | | |")
            continue
        compared = corrected.get((arm, "none", *where))
        cells = "| – | – | –" if compared is None else f"| {_difference(compared)}"
        lines.append(f"| `{arm}` | {found.seeds} | {_percent(found)} {cells} |")
    lines.append("")
    if results.headroom:
        said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in results.headroom.items())
        lines += [
            "What a linear regression on the questions to train on reads from the places where the two things show, were "
            f"these found (`headroom.py`): {said}. An arm whose tower is frozen cannot be far above what the tower holds.",
            "",
        ]
    return "\n".join(lines)


def _difference(found: Compared) -> str:
    e = found.estimate
    return f"{e.value:+.1f} | {e.low:+.1f} to {e.high:+.1f} | {found.p:.3f}"


def _percent(found: Estimate) -> str:
    return f"{found.value:.1f} ({max(found.low, 0):.0f}–{min(found.high, 100):.0f})"


def _accuracies(results: Results) -> str:
    parts = []
    for budget in sorted({budget for _, budget, _, _ in results.right}):
        kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=_order)
        arms = [arm for arm in MAIN if any(a == arm and b == budget for a, b, _, _ in results.right)]
        lines = [
            f"## Accuracy after {budget} questions",
            "",
            "Percent, with 95 % intervals over seeds and images, of one seed over images alone. `ood`: pictures in which the apparent size tells no distance.",
            "",
        ]
        lines.append("| arm | seeds | " + " | ".join(_title(place) for place in kinds) + " |")
        lines.append("|---|---|" + "---|" * len(kinds))
        lines.append("| chance | | " + " | ".join(f"{100 * results.chance[place]:.0f}" for place in kinds) + " |")
        for rule in dict.fromkeys(rule for place in kinds for rule in results.rules[place]):
            told = [results.rules[place].get(rule) for place in kinds]
            cells = " | ".join("" if share is None else f"{100 * share:.1f}" for share in told)
            lines.append(f"| rule: {rule} | | {cells} |")
        for arm in arms:
            found = [results.accuracy(arm, budget, *place) for place in kinds]
            seeds = max((e.seeds for e in found if e), default=0)
            cells = " | ".join(_percent(e) if e else "" for e in found)
            lines.append(f"| `{arm}`: {ARMS[arm].about} | {seeds} | {cells} |")
        counts = ", ".join(f"{_title(p)} {len(results.images[p])}" for p in kinds)
        parts.append("\n".join([*lines, "", f"Questions: {counts}.", ""]))
    return "\n".join(parts)


def _rest(results: Results, corrected: Mapping[Comparison, Compared]) -> str:
    if not corrected:
        return ""
    lines = [
        "## The rest",
        "",
        f"{len(corrected)} comparisons, those of layers and precision among them, corrected together (Holm). Nothing here was fixed as a success beforehand.",
        "",
        "| arm | minus | questions | kind | difference (points) | 95 % interval | p, corrected | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (arm, other, budget, split, kind), found in corrected.items():
        if arm in MAIN:
            lines.append(
                f"| `{arm}` | `{other}` | {budget} | {_title((split, kind))} | {_difference(found)} | {found.estimate.seeds} |"
            )
    worse = [
        f"{_title((split, kind))} after {budget} questions"
        for (arm, other, budget, split, kind), found in corrected.items()
        if (arm, other) == ("embedding", "tokens") and found.estimate.high < 0
    ]
    said = ", ".join(worse) or "nothing beyond its interval"
    return "\n".join([*lines, "", f"What the embedding losses make worse than tokens without one (uncorrected intervals): {said}.", ""])  # fmt: skip


def _against(
    results: Results, plan: Mapping[str, Any], arm: str, corrected: Mapping[Comparison, Compared], other: str
) -> str:
    """Cells of a table: seeds, accuracy at the endpoint's questions, and what is paired with `other`."""
    end = plan["endpoint"]
    where = (end["budget"], end["split"], end["question"])
    found = results.accuracy(arm, *where)
    if found is None:
        return "0 | | | | |"
    compared = corrected.get((arm, other, *where))
    cells = "– | – | –" if compared is None else _difference(compared)
    return f"{found.seeds} | {_percent(found)} | {cells} |"


_COLUMNS = "seeds | depth order, % | minus {}, points | 95 % interval | p, corrected |"


def _floor(results: Results, plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    found = results.chance.get((end["split"], end["question"]))
    return "" if found is None else f"Chance is {100 * found:.0f} %."


def _layers(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
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
    names |= {arm: f"none (`{arm}`)" for arm in ("tokens", "shuffled")}
    rows = [f"| {about} | {_against(results, plan, arm, corrected, 'embedding')}" for arm, about in names.items()]
    lines += [f"| supervised blocks | {_COLUMNS.format('the published choice')}", "|---|" + "---|" * 5]
    return "\n".join([*lines, *rows, "", _floor(results, plan), ""])


def _precision(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    lines = [
        "## Precision", "",
        "The arm `embedding` with features stored in other forms; bytes are what an image takes in the store.", "",
        f"| stored as | bytes an image | centred R² to float16 | {_COLUMNS.format('float16')}", "|---|---|---|" + "---|" * 5,
    ]  # fmt: skip
    for arm in ("embedding", *PRECISIONS):
        store = "float16" if arm == "embedding" else arm
        known = results.stored.get(store, {})
        size = f"{known['bytes']:.0f}" if known else ""
        near = f"{known['r2']:.5f}" if known else ""
        lines.append(f"| {store} | {size} | {near} | {_against(results, plan, arm, corrected, 'embedding')}")
    tokens = _against(results, plan, "tokens", corrected, "embedding")
    lines.append(f"| no loss (`tokens`) | | | {tokens}")
    return "\n".join([*lines, "", f"{_floor(results, plan)} The mean over images has a centred R² of 0.", ""])


def _best_probe(row: Mapping[str, Any]) -> float:
    return float(max(row["probe"].values()))


def _share(text: str) -> float:
    return text.count("1") / len(text)


_FEWEST_STUDENTS = 12


def _representations(results: Results, plan: Mapping[str, Any]) -> str:
    rows = results.students
    lines = ["## (a) Better representations, better answers?", ""]
    if len(rows) < _FEWEST_STUDENTS:
        said = f"Not enough was run yet: {len(rows)} students; correlations are told from {_FEWEST_STUDENTS} on."
        return "\n".join([*lines, said, ""])
    towers = [(row["width"], row["tower_steps"]) for row in rows]
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
        plain = rank_correlation(probe, shares, groups=towers)
        partial = rank_correlation(probe, shares, text, groups=towers)
        lines.append(
            f"| {_title((split, kind))} | {100 * results.chance[split, kind]:.0f} | {100 * shares.min():.1f} to {100 * shares.max():.1f} | "
            f"{_correlation(plain)} | {_correlation(partial)} |"
        )
    depth, colour = (np.array([_share(row["right"][f"test {kind}"]) for row in rows]) for kind in ("depth", "colour"))
    apart = rank_correlation(probe, depth, minus=colour, groups=towers)
    lines += [
        "",
        "A rank correlation of 0 is what no relation gives; –: too few students differ. The bootstrap draws towers, which several students share; "
        "the next-token loss is that of pretraining on captions.", "",
        f"The depth probe's correlation with depth answers minus that with colour answers: {_correlation(apart).replace(' | ', ' (95 %: ')}).", "",
        *_specificity(rows),
    ]  # fmt: skip
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
            "Of questions about written-out scenes chance is a half (of counting a quarter); a centred R² of 0 is the mean map's. The language model was scored on questions of depth as they were in the first form of the experiment.",
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
    for rule, share in results.rules[end["split"], end["question"]].items():
        axis.axvline(100 * share, color="tab:orange", linestyle=":", linewidth=1, label=f"rule: {rule}")
    axis.legend(loc="lower right", fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def plot_students(results: Results, plan: Mapping[str, Any], out: Path) -> bool:
    """Draw depth answers over the depth probe, a dot for each student of part (a); False where there are too few."""
    rows = results.students
    if len(rows) < _FEWEST_STUDENTS:
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
