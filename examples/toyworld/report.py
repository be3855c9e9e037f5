"""`docs/results.md` from the rows of the experiment: tables, intervals, plots, and what was fixed beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arms import ARMS, LAYER_CHOICES, LAYERS, MAIN, PRECISIONS, layers_arm, numbers
from plots import plot, plot_students
from recorded import Results, load, order, record, title
from report_endpoint import (
    FEWEST_FOR_INTERVAL,
    advice,
    endpoint,
    endpoint_of,
    p_value,
    points,
    summary,
    targets,
    untrained,
    within,
)
from report_students import representations, verdict
from significance import Estimate, holm
from trivial import FADED

from olatrain.probe import LayerScore, suggest

HERE = Path(__file__).parent


def write(folder: Path, out: Path, fixed: Path = HERE / "plan.json") -> None:
    """Write the page from a folder of results and the plan, and its pictures into `images/` beside the page.

    Raises:
        ValueError: where the plan's families of comparisons are not those that are corrected here.
    """
    results = load(folder)
    plan = record(fixed)
    images = out.parent / "images"
    parts = [_HEAD, summary(results, plan), verdict(results), _WHAT, _missing(results, plan)]
    parts += [advice(results, plan), endpoint(results, plan)]
    if plot(results, plan, images / "results.png"):
        parts.append("![differences by seed](images/results.png)\n")
    corrected = _corrected(results, plan)
    parts += [
        untrained(results, plan),
        _progress(results, plan),
        targets(results, plan),
        _sensitivity(results, plan, corrected),
    ]
    parts += [_fixed(plan), _controls(results, plan, corrected)]
    parts += [_budgets(results, plan), _accuracies(results), _rest(results, plan)]
    parts += [_layers(results, plan, corrected), _precision(results, plan, corrected)]
    parts.append(representations(results, plan))
    if plot_students(results, plan, images / "students.png"):
        parts.append("![depth probe and depth answers by student](images/students.png)\n")
    parts += [_cost(results), _parts_of_the_student(), _made(results, plan)]
    out.write_text("\n".join(part for part in parts if part), encoding="utf-8", newline="\n")


_HEAD = """# Results: the toy world

Does it work? Pretrained weights are out of reach of a test machine, so this is the method in miniature: a world of coloured shapes on a plain whose depth is known
(`examples/toyworld`), small teachers trained on it, a student whose tower holds part of what is there and part of how far away it is (how much of each: the table of the student's parts, below), and everything
from extraction to answers through the commands of this project. `make evidence` writes this page from `examples/toyworld/results/`; nothing here is typed by hand. What a toy shows holds for the toy.

"""

_WHAT = """One teacher, the depth one, with 9 task tokens; its losses are on while the projector is pretrained on captions, and off in fine-tuning on questions. The student's tower is frozen throughout.

A seed varies how a run's student is composed and initialised and in which order it sees what it is trained on; world, tower, language model, teacher and questions are the same for all
seeds. Intervals are about other seeds and other pictures of this world, then, and not about other worlds or teachers.
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
- **Seeds**: {plan["seeds"]}. **Stopping**: {plan["stopping"]}. (It was not kept: see “Noted later”.)
- **Representations**: {plan["representations"]}.
- **Trivial baseline**: {plan["trivial"]}.
- **Noted later**: {plan.get("noted_after", "nothing")}.
- **Families**, each with p-values corrected for its own number (Holm; what was not run yet counts): {_described(plan)}. Everything else that the page shows is descriptive: an interval, and no claim.

How intervals are made: every seed answers the same questions, so seeds and images are crossed, and the variance of a mean is (MS_seed + MS_image − MS_rest) / (seeds · images) by the mean squares of an
analysis of variance, no component below 0, with Student's t and Satterthwaite's degrees of freedom. A hierarchical bootstrap over seeds and images was asked for; it does not stand here because drawing both
counts the interaction of seeds and images, and the answers' own chance, three times ([Owen 2007](https://arxiv.org/abs/0712.1111)): on data of nothing else its intervals were 1.74 times as wide as
they should be, and these 1.23 times (`significance.py`). With two seeds these may cover as little as 88 % where 95 % is said.
"""


def _described(plan: Mapping[str, Any]) -> str:
    return "; ".join(f"{name} – {said}" for name, said in plan["families"].items())


@dataclass(frozen=True)
class Compared:
    """A paired difference, with its p-value after correction for all of its family."""

    estimate: Estimate
    p: float


Comparison = tuple[str, str, int, str, str]
"""Arm, the arm it is compared with, budget, split, kind."""

_CONTROLS = ("none", "longer", "own", "published", "feed", "oracle")


def _families(plan: Mapping[str, Any]) -> dict[str, list[Comparison]]:
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
            f"the plan's families are {fixed} where {sorted(found)} are corrected: change `families` in plan.json, or report.py"
        )
    return found


def _corrected(results: Results, plan: Mapping[str, Any]) -> dict[Comparison, Compared]:
    """The families' comparisons that there are, each corrected after Holm for all that its family lists."""
    corrected: dict[Comparison, Compared] = {}
    for family in _families(plan).values():
        found = {one: results.difference(*one) for one in family}
        told = {one for one, e in found.items() if e is not None and e.seeds >= FEWEST_FOR_INTERVAL}
        p = holm({str(one): e.p if e is not None and one in told else 1.0 for one, e in found.items()})
        corrected |= {one: Compared(e, p[str(one)]) for one, e in found.items() if e is not None}
    return corrected


def _progress(results: Results, plan: Mapping[str, Any]) -> str:
    """What training ended at: no difference in answers says little of losses that taught nothing."""
    budget = plan["endpoint"]["budget"]
    lines = ["## Did the losses do anything?", ""]
    ended = {arm: results.ended[arm, budget] for arm in ARMS if (arm, budget) in results.ended}
    if not ended:
        return "\n".join([*lines, "No run has kept what its losses ended at yet.", ""])
    lines += [
        f"What training ended at (its last tenth of steps), means over seeds, of runs with {budget} questions. R² is that of the embedding predictions, centred: 0 is the mean map of the arm's own targets, "
        "the trivial baseline, and 1 the targets themselves, which differ between arms, as do the captions of `oracle`; it says what the predictors reach, which fine-tuning does not use. –: no such loss.", "",
        "| arm | seeds | pretraining: next-token loss | embedding R² by block | fine-tuning: next-token loss |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for arm, by_seed in ended.items():
        names = dict.fromkeys(name for one in by_seed.values() for name in one)
        mean = {name: float(np.mean([one[name] for one in by_seed.values() if name in one])) for name in names}
        text, tuned = (f"{mean[name]:.3f}" if name in mean else "–" for name in ("text", "tune_text"))
        layers = sorted(name for name in mean if "." in name)
        r2 = ", ".join(f"{name.replace('.', ' ')}: {mean[name]:.3f}" for name in layers) or "–"
        lines.append(f"| `{arm}` | {len(by_seed)} | {text} | {r2} | {tuned} |")
    return "\n".join([*lines, ""])


def _sensitivity(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    """Whether what is given away is used: without that, no effect of the losses says little."""
    where = endpoint_of(plan)
    lines = [
        "## Could it see an effect?", "",
        "`oracle` has distances in the captions: where it helps no more than the losses, a student cannot use what is told of depth. `feed` has the teacher's features as inputs: where it helps no more than the losses, "
        "features help as targets and not as inputs, and the endpoint cannot tell what is in them.", "",
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
    feed = corrected.get(("feed", "none", *where))
    if feed is not None and feed.estimate.low <= 0:
        lines += [
            "",
            "`feed` does not pass: what the features hold of depth is not used as an input here, so only `oracle` shows that an effect could be seen.",
        ]
    return "\n".join([*lines, "", *_headroom(results, plan)])


def _headroom(results: Results, plan: Mapping[str, Any]) -> list[str]:
    """What could be read, were the things found."""
    if not results.headroom:
        return []
    kind = plan["endpoint"]["question"]
    lines = [
        "What a linear regression, fitted on the questions to train on, answers of depth from what stands at the places of the two things (`headroom.py`), in percent:", "",
        "| read from | test | ood |", "|---|---|---|",
        "| chance | " + " | ".join(f"{100 * results.chance.get((split, kind), 0.5):.0f}" for split in ("test", "ood")) + " |",
    ]  # fmt: skip
    for name, shares in results.headroom.items():
        cells = " | ".join(f"{100 * shares[split]:.1f}" if split in shares else "–" for split in ("test", "ood"))
        lines.append(f"| {name} | {cells} |")
    cue = " | ".join(f"{100 * results.rules.get((split, kind), {}).get(FADED, 0.5):.1f}" for split in ("test", "ood"))
    lines.append(f"| the cue itself: whose colour is faded less, nothing learnt | {cue} |")
    return [
        *lines, "",
        "It is given the places; a student has to find the things itself, and may read more than a linear regression does. So this is neither what a student will reach nor a bound on it.", "",
    ]  # fmt: skip


def _controls(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    """What the embedding losses are to arms that are not the endpoint's."""
    lines = [
        "## Controls", "",
        "The arm `embedding` minus others, at the endpoint's questions; nothing here was fixed as a success beforehand.", "",
        "| `embedding` minus | what that is | difference (points) | 95 % interval | p, corrected | paired seeds |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in _families(plan)["controls"]:
        found, about = corrected.get(one), _about(one[1])
        cells = "– | – | – | fewer than 2" if found is None else f"{_difference(found)} | {found.estimate.seeds}"
        lines.append(f"| `{one[1]}` | {about} | {cells} |")
    return "\n".join([*lines, ""])


_ABOUT = {
    "random": "embedding losses, features of an untrained network: no knowledge of depth, but the picture's colours, and in them the cue",
    "feed": "no loss, the teacher's features as inputs (a map's 36 vectors), at test time too",
}
"""What an arm is, in the words of what was learnt about it; `Arm.about` is part of a row's digest."""


def _about(arm: str) -> str:
    return _ABOUT.get(arm, ARMS[arm].about)


def _difference(found: Compared) -> str:
    e = found.estimate
    p = "–" if e.seeds < FEWEST_FOR_INTERVAL else p_value(found.p)
    return f"{e.value:+.1f} | {within(e)} | {p}"


def _percent(found: Estimate) -> str:
    """An accuracy with its interval; two seeds have none, and one has that over its pictures."""
    if found.seeds == 2:
        return f"{found.value:.1f}"
    return f"{found.value:.1f} ({max(found.low, 0):.0f}–{min(found.high, 100):.0f})"


def _accuracies(results: Results) -> str:
    parts = []
    for budget in sorted({budget for _, budget, _, _ in results.right}):
        kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=order)
        arms = [arm for arm in MAIN if any(a == arm and b == budget for a, b, _, _ in results.right)]
        lines = [
            f"## Accuracy after {budget} questions",
            "",
            "Percent, with 95 % intervals over seeds and images, of one seed over images alone. **Rows are not to be compared with each other**: arms have unlike numbers of seeds, and of the same seeds and questions "
            "much cancels. Only paired differences compare: those to `tokens` stand in “The rest”. `ood`: pictures whose only cue is contact (what stands lower is closer), which no question to train on was about; pictures with that cue are among the captions. It is not depth seen by another cue: there the cells' mean colours answer more than on `test` (“Could it see an effect?”), perhaps as what stands higher has the sky around it.",
            "",
        ]
        lines.append("| arm | seeds | " + " | ".join(title(place) for place in kinds) + " |")
        lines.append("|---|---|" + "---|" * len(kinds))
        lines.append("| chance | | " + " | ".join(f"{100 * results.chance[place]:.0f}" for place in kinds) + " |")
        rules = dict.fromkeys(rule for place in kinds for rule in results.rules[place])
        for rule in (rule for rule in rules if rule != FADED):
            told = [results.rules[place].get(rule) for place in kinds]
            cells = " | ".join("" if share is None else f"{100 * share:.1f}" for share in told)
            lines.append(f"| rule: {rule} | | {cells} |")
        for arm in arms:
            found = [results.accuracy(arm, budget, *place) for place in kinds]
            seeds = max((e.seeds for e in found if e), default=0)
            cells = " | ".join(_percent(e) if e else "" for e in found)
            lines.append(f"| `{arm}`: {_about(arm)} | {seeds} | {cells} |")
        counts = ", ".join(f"{title(p)} {len(results.images[p])}" for p in kinds)
        parts.append("\n".join([*lines, "", f"Questions: {counts}.", ""]))
    return "\n".join(parts)


def _budgets(results: Results, plan: Mapping[str, Any]) -> str:
    """What the losses are worth after fewer and more questions to fine-tune on."""
    end = plan["endpoint"]
    budgets = sorted({budget for arm, budget, _, _ in results.right if arm == "embedding"})
    if len(budgets) < 2:
        return ""
    lines = [
        "## Fine-tuning budgets", "",
        f"Questions of {end['question']} order (`{end['split']}`), percent; chance is {100 * results.chance[end['split'], end['question']]:.0f}. Described and not tested, but for the endpoint's {end['budget']}.", "",
        "| questions to fine-tune on | `tokens` | `embedding` | difference (points) | 95 % interval | paired seeds |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for budget in budgets:
        where = (budget, end["split"], end["question"])
        seeds = results.seeds(["tokens", "embedding"], *where)
        if not seeds:
            continue
        before, after = (100 * float(results.values(arm, *where, seeds).mean()) for arm in ("tokens", "embedding"))
        found = results.difference("embedding", "tokens", *where)
        interval = "one seed: none" if found is None else within(found)
        lines.append(f"| {budget} | {before:.1f} | {after:.1f} | {after - before:+.1f} | {interval} | {len(seeds)} |")
    return "\n".join([*lines, ""])


def _rest(results: Results, plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    fixed = {("embedding", other, end["budget"], end["split"], end["question"]) for other in end["against"]}
    wanted: list[Comparison] = [
        (arm, "tokens", budget, split, kind)
        for arm, budget, split, kind in sorted(results.right)
        if arm in MAIN and arm != "tokens"
    ]
    known = {one: found for one in wanted if one not in fixed and (found := results.difference(*one)) is not None}
    if not known:
        return ""
    told = [e for e in known.values() if e.seeds >= FEWEST_FOR_INTERVAL]
    apart = sum(e.low > 0 or e.high < 0 for e in told)
    lines = [
        "## The rest",
        "",
        f"Arms minus `tokens`, over the seeds that both have (two at least): {len(known)} differences, described and not tested. Intervals are not corrected: were there no difference at all, about one in twenty would leave out 0, and {apart} of the {len(told)} of three seeds or more do.",
        "",
        "| arm | minus | questions | kind | difference (points) | 95 % interval | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{arm}` | `{other}` | {budget} | {title((split, kind))} | {e.value:+.1f} | {within(e)} | {e.seeds} |"
        for (arm, other, budget, split, kind), e in known.items()
    ]
    worse = [
        f"{title((split, kind))} after {budget} questions"
        for (arm, _, budget, split, kind), e in known.items()
        if arm == "embedding" and e.seeds >= FEWEST_FOR_INTERVAL and e.high < 0
    ]
    said = ", ".join(worse) or "no kind beyond its interval"
    return "\n".join([*lines, "", f"Which answers the embedding losses make worse than tokens without one (uncorrected intervals): {said}.", ""])  # fmt: skip


def _against(
    results: Results, plan: Mapping[str, Any], arm: str, corrected: Mapping[Comparison, Compared], other: str
) -> str:
    """Cells of a table: seeds, accuracy at the endpoint's questions, and what is paired with `other`."""
    where = endpoint_of(plan)
    found = results.accuracy(arm, *where)
    if found is None:
        return "0 | | | | |"
    compared = corrected.get((arm, other, *where))
    cells = "– | – | –" if compared is None else _difference(compared)
    return f"{found.seeds} | {_percent(found)} | {cells} |"


def _over_tokens(results: Results, plan: Mapping[str, Any], arms: Mapping[str, str]) -> str:
    """Arms, by what they are called here, minus task tokens without a loss; nothing where no two seeds are paired."""
    found = {said: results.difference(arm, "tokens", *endpoint_of(plan)) for arm, said in arms.items()}
    told = [f"{said} {points(e)}, {e.seeds} seeds" for said, e in found.items() if e is not None]
    return f"Minus task tokens without a loss, described and not tested: {'; '.join(told)}." if told else ""


def _apart(plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared], family: str, reference: str) -> str:
    """Which of a family differ from what they are compared with after correction."""
    found = {one[0]: corrected[one] for one in _families(plan)[family] if one in corrected}
    if not found:
        return ""
    names = ", ".join(f"`{arm}` ({e.estimate.value:+.1f} points)" for arm, e in found.items() if e.p < 0.05)
    return f"Different from {reference} after correction: {names or 'none of them'}. That an interval holds 0 does not show that nothing is lost: it says how much may be."


def _chance_of_a_run(results: Results, plan: Mapping[str, Any]) -> str:
    """What two runs of one seed differ by that were told all but the same."""
    where = endpoint_of(plan)
    near = results.stored.get("int8", {}).get("r2", 0.0)
    seeds = results.seeds(["int8", "embedding"], *where)
    if near < 0.999 or not seeds:
        return ""
    one, other = (results.values(arm, *where, seeds).mean(axis=1) for arm in ("int8", "embedding"))
    apart = ", ".join(f"{100 * difference:+.1f}" for difference in one - other)
    return (
        f"**A seed fixes a run only to the last bit**: features in int8 are those in float16 to a centred R² of {near:.4f}, and yet the two answer differently, seed by seed by {apart} points. "
        "So a single run tells nothing of a precision (or of a layer), and a few seeds only large effects; and all differences of these two tables are to the same runs of `embedding`."
    )


_SEE = "Differences of `embedding` to `tokens` and `shuffled` are the endpoint's, and stand there."
_COLUMNS = "seeds | depth order, % | minus {}, points | 95 % interval | p, corrected |"


def _floor(results: Results, plan: Mapping[str, Any]) -> str:
    end = plan["endpoint"]
    found = results.chance.get((end["split"], end["question"]))
    return "" if found is None else f"Chance is {100 * found:.0f} %."


def _layers(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    fewest = min((row["told"] for row in results.students), default=0)
    probes = [row["probe"] for row in results.students if row["told"] == fewest]
    lines = ["## Layers", ""]
    if probes:
        means = {layer: float(np.mean([probe[layer] for probe in probes])) for layer in sorted(probes[0])}
        best = suggest({int(layer): LayerScore(cosine=0.0, r2=value, smooth_l1=0.0) for layer, value in means.items()})
        lines += [
            "What depth probes read from each block of students trained on next tokens alone, before fine-tuning "
            f"(centred R², mean of {len(probes)} students{', whose captions tell no distances' if fewest == 0 else f', {fewest} of whose captions tell distances'}; the mean map has 0):", "",
            "| block | " + " | ".join(means) + " |", "|---|" + "---|" * len(means),
            "| R² | " + " | ".join(f"{value:.3f}" for value in means.values()) + " |", "",
            f"By the rule of `olatrain probe` (the two best blocks that beat the mean map) that suggests "
            f"{' and '.join(map(str, best)) or 'none'}.", "",
        ]  # fmt: skip
    if not any(one in corrected or results.accuracy(one[0], *one[2:]) for one in _families(plan)["layers"]):
        return "\n".join([*lines, "No other layers were run yet.", ""])
    names = {"embedding": f"{LAYERS} (published, scaled)", **{layers_arm(one): str(one) for one in LAYER_CHOICES}}
    names |= {arm: f"none (`{arm}`)" for arm in ("tokens", "shuffled")}
    rows = [f"| {about} | {_against(results, plan, arm, corrected, 'embedding')}" for arm, about in names.items()]
    lines += [f"| supervised blocks | {_COLUMNS.format('the published choice')}", "|---|" + "---|" * 5, *rows, ""]
    lines += [_apart(plan, corrected, "layers", "the published choice"), ""]
    told = _over_tokens(
        results, plan, {arm: f"blocks {said}" for arm, said in names.items() if arm.startswith("layers")}
    )
    return "\n".join([*lines, f"{_floor(results, plan)} {_SEE} {told}".rstrip(), ""])


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
    if apart := _apart(plan, corrected, "precision", "float16"):
        lines += ["", apart]
    told = _over_tokens(results, plan, {arm: arm for arm in PRECISIONS})
    lines += ["", f"{_floor(results, plan)} The mean over images has a centred R² of 0. {_SEE} {told}".rstrip(), ""]
    noise = _chance_of_a_run(results, plan)
    return "\n".join([*lines, noise, ""] if noise else lines)


def _cost(results: Results) -> str:
    lines = ["## Cost", ""]
    if results.cost:
        lines += [
            f"One step of this experiment's pretraining (`benchmarks/train_step.py --toyworld`, {_conditions(results.cost)}; one thread, a process that loads beside it):",
            "", *_ways(results.cost),
        ]  # fmt: skip
    step = record(HERE.parents[1] / "benchmarks" / "results" / "train-step.json")
    if step:
        lines += [
            f"One training step of a student of {step['settings']['llm']['num_hidden_layers']} blocks with random weights and the three published teachers at reduced size "
            f"(`benchmarks/train_step.py`, {_conditions(step)}):", "", *_ways(step),
        ]  # fmt: skip
    if "none" in results.seconds:
        base = _mean(results.seconds["none"])
        lines += [
            "The runs of this page themselves, several at a time, so only roughly comparable (feature extraction not counted, which all arms of one store share):", "",
            "| arm | runs | pretraining, s | fine-tuning, s | over `none` |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for arm in (name for name in MAIN if name in results.seconds):
            took = results.seconds[arm]
            pretraining, tuning = (float(np.mean(part)) for part in zip(*took, strict=True))
            lines.append(f"| `{arm}` | {len(took)} | {pretraining:.0f} | {tuning:.0f} | {_mean(took) / base:.2f} |")
        lines.append("")
    return "\n".join(lines)


def _mean(took: Sequence[tuple[float, float]]) -> float:
    return float(np.mean([sum(parts) for parts in took]))


def _conditions(found: Mapping[str, Any]) -> str:
    said = found["conditions"]["said"]
    return f"{found['date']}, batch {found['settings']['batch']}, {found['settings']['device']}" + (
        f"; {said}" if said else ""
    )


_WAYS = {
    "text": "next tokens alone", "streamed": "embedding losses, features from the store",
    "batched": "embedding losses, teachers in the step, batched",
    "one_by_one": "embedding losses, teachers in the step, an image at a time (as the public code)",
}  # fmt: skip


def _ways(found: Mapping[str, Any]) -> list[str]:
    base = found["ways"]["text"]["seconds"]
    lines = ["| | seconds | over next tokens alone | peak memory, GiB |", "|---|---|---|---|"]
    for way, said in _WAYS.items():
        one = found["ways"][way]
        lines.append(f"| {said} | {one['seconds']:.2f} | {one['seconds'] / base:.2f} | {one['peak_gib']:.2f} |")
    return [*lines, ""]


def _parts_of_the_student() -> str:
    scores = record(HERE / "student" / "scores.json")
    if not scores:
        return ""
    lines = ["## The student's parts, on held-out scenes", "", "| part | score | value |", "|---|---|---|"]
    lines += [f"| {part} | {name} | {value:.3f} |" for part, found in scores.items() for name, value in found.items()]
    return "\n".join(
        [
            *lines,
            "",
            "The rows of `llm` are about scenes written out, which the language model reads; a student is asked about pictures, and knows of them what its tower and projector tell. Of questions about written-out scenes chance is a half (of counting a quarter); a centred R² of 0 is the mean map's.",
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
            f"{len(results.repeated)} rows (an arm and a seed or a student, a kind of question; several to a run) were made a second time from nothing, "
            f"pictures and features included: in {sum(results.repeated)} of them every question was answered as before."
        )
    if results.left_out:
        lines.append(f"{results.left_out} rows of earlier settings are kept in the file and are not shown.")
    return "\n".join([*lines, "", plan["cost"], ""])
