"""`docs/results.md` from the rows of the experiment: tables, intervals, plots, and what was fixed beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import MAIN, numbers
from comparisons import Compared, Comparison, corrections, difference, families
from plots import plot, plot_students
from recorded import Results, load, record, title
from report_choices import layers, precisions
from report_confirmation import confirmation, confirmed
from report_endpoint import (
    FEWEST_FOR_INTERVAL,
    advice,
    endpoint,
    endpoint_of,
    summary,
    targets,
    untrained,
    within,
)
from report_students import representations, verdict
from report_tables import about_arm, accuracies, headroom_table, percent, progress

HERE = Path(__file__).parent


def write(folder: Path, out: Path, fixed: Path = HERE / "plan.json") -> None:
    """Write the page from a folder of results and the plan, and its pictures into `images/` beside the page.

    Raises:
        ValueError: where the plan's families of comparisons are not those that are corrected here.
    """
    plan = record(fixed)
    results, again = load(folder), load(folder / "confirmation", seeds=numbers(plan["confirmation"]["seeds"]))
    images = out.parent / "images"
    parts = [_HEAD, summary(results, plan), confirmed(again, plan), verdict(results), _WHAT, _missing(results, plan)]
    parts += [advice(results, again, plan), endpoint(results, plan)]
    if plot(results, plan, images / "results.png", also=[("random", "tokens")]):
        parts.append("![differences by seed](images/results.png)\n")
    if told := confirmation(again, plan):
        parts.append(told)
        if plot(again, plan["confirmation"], images / "confirmation.png", also=[("map", "embedding")]):
            parts.append("![differences of the second experiment by seed](images/confirmation.png)\n")
    corrected = corrections(results, plan)
    parts += [
        untrained(results, plan),
        progress(results, plan),
        targets(results, plan),
        _sensitivity(results, plan, corrected),
    ]
    parts += [_fixed(plan), _controls(results, plan, corrected)]
    parts += [_budgets(results, plan), accuracies(results), _rest(results, plan)]
    parts += [layers(results, plan, corrected), precisions(results, plan, corrected)]
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
seeds of one of the two experiments. Intervals are about other seeds and other pictures of this world, then, and not about other worlds or teachers.
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
        cells = "| – | – | –" if compared is None else f"| {difference(compared)}"
        lines.append(f"| `{arm}` | {found.seeds} | {percent(found)} {cells} |")
    feed = corrected.get(("feed", "none", *where))
    if feed is not None and feed.estimate.low <= 0:
        lines += [
            "",
            "`feed` does not pass: what the features hold of depth is not used as an input here, so only `oracle` shows that an effect could be seen.",
        ]
    return "\n".join([*lines, "", *headroom_table(results, plan["endpoint"]["question"])])


def _controls(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    """What the embedding losses are to arms that are not the endpoint's."""
    lines = [
        "## Controls", "",
        "The arm `embedding` minus others, at the endpoint's questions; nothing here was fixed as a success beforehand.", "",
        "| `embedding` minus | what that is | difference (points) | 95 % interval | p, corrected | paired seeds |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in families(plan)["controls"]:
        found, about = corrected.get(one), about_arm(one[1])
        cells = "– | – | – | fewer than 2" if found is None else f"{difference(found)} | {found.estimate.seeds}"
        lines.append(f"| `{one[1]}` | {about} | {cells} |")
    return "\n".join([*lines, ""])


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
