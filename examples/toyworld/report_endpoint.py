"""The parts of `docs/results.md` on the endpoint: what came out, the verdict, and what the comparisons mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from arms import ARMS
from recorded import Results, order, title
from significance import Estimate, holm, seeds_needed

Where = tuple[int, str, str]
"""Budget, split, kind."""


def endpoint_of(plan: Mapping[str, Any]) -> Where:
    """Return where the endpoint is."""
    end = plan["endpoint"]
    return int(end["budget"]), str(end["split"]), str(end["question"])


def paired(results: Results, plan: Mapping[str, Any]) -> list[int]:
    """Return the seeds that every arm of the endpoint has: no other counts in it."""
    return results.seeds([plan["endpoint"]["arm"], *plan["endpoint"]["against"]], *endpoint_of(plan))


def differences(results: Results, plan: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the endpoint's differences by the arm that is taken away; none below two seeds."""
    seeds = paired(results, plan)
    found = {
        other: results.difference(plan["endpoint"]["arm"], other, *endpoint_of(plan), seeds=seeds)
        for other in plan["endpoint"]["against"]
    }
    return {other: e for other, e in found.items() if e is not None}


def summary(results: Results, plan: Mapping[str, Any]) -> str:
    """Say what came out, for a reader who stops there."""
    found, seeds = differences(results, plan), paired(results, plan)
    if len(seeds) < plan["endpoint"]["seeds_for_a_verdict"]:
        return f"**Nothing is decided yet**: a verdict takes {plan['endpoint']['seeds_for_a_verdict']} paired seeds, and there are {len(seeds)}.\n"
    where = endpoint_of(plan)
    share = {
        arm: 100 * float(results.values(arm, *where, seeds).mean())
        for arm in ("embedding", *plan["endpoint"]["against"])
    }
    lines = [
        f"**The criterion that was fixed beforehand is {'met' if met(results, plan) else 'not met'}.** Over {len(seeds)} paired seeds, supervising hidden states with the depth teacher's features while the projector is pretrained "
        f"gave {share['embedding']:.1f} % right answers to “which is closer” (chance 50), task tokens without a loss {share['tokens']:.1f} %: {points(found['tokens'])}; over features of other images it is {points(found['shuffled'])}. "
        f"Over features of a network that was **never trained** ({share['random']:.1f} %) it is {points(found['random'])}" + _of_random(found["random"]),
        _plain(results, plan),
        _other_targets(results, plan),
    ]  # fmt: skip
    lines += [
        _price(results, plan, seeds),
        "Weights of the losses and the number of steps were chosen with another seed and other questions because the effect showed there.",
    ]
    return "\n".join([*filter(None, lines), ""])


def _of_random(found: Estimate) -> str:
    if found.low > 0:
        return "."
    return (
        ": so the endpoint does **not** show that what the teacher learnt is what helps. A possible reason, not tested by it: such features hold the picture's colours, and in these the only cue of the pictures that are asked about (haze) stands "
        "(how well depth is read from each: “Could it see an effect?”)."
    )


def _plain(results: Results, plan: Mapping[str, Any]) -> str:
    """The same over plain training, with the published weights, and beside what needs no training of a student."""
    where = endpoint_of(plan)
    over = {
        "next tokens alone, no task tokens (`none`)": "none",
        "the same for one and a half times the steps (`longer`)": "longer",
        "task tokens without a loss for a quarter of the steps (`short`, which answers relations far worse)": "short",
    }
    found = {said: results.difference("embedding", arm, *where) for said, arm in over.items()}
    told = [f"over {said} {points(e)}, {e.seeds} seeds" for said, e in found.items() if e is not None]
    lines = [f"With other arms beside it (descriptive): {'; '.join(told)}."] if told else []
    if (published := results.difference("published", "tokens", *where)) is not None:
        lines.append(
            f"With the published weights of the losses nothing is gained: {points(published)} over task tokens without a loss, {published.seeds} seeds; their predictions end below the mean map (“Did the losses do anything?”)."
        )
    if (tower := results.headroom.get("the student's tower")) is not None:
        read = 100 * tower[where[1]]
        lines.append(
            f"Beside it: a linear regression that is given the places of the two things reads {read:.1f} % from the frozen tower."
        )
    return " ".join(lines)


_OTHER_TARGETS = {
    "cells": "the picture's own colours, 16 means a cell, in which nothing is learnt",
    "map": "the depth that the teacher tells, 16 means a cell: how far, and so where things are",
    "map-untrained": "what one that was never trained tells, in that form",
    "own": "features of the student's own tower",
}


def _other_targets(results: Results, plan: Mapping[str, Any]) -> str:
    """Which other targets help: what knows of depth and what only shows the picture."""
    found = {arm: results.difference(arm, "tokens", *endpoint_of(plan)) for arm in _OTHER_TARGETS}
    told = [f"{_OTHER_TARGETS[arm]}: {points(e)}, {e.seeds} seeds" for arm, e in found.items() if e is not None]
    if not told:
        return ""
    said = f"Other targets, over task tokens without a loss (added later, descriptive): {'; '.join(told)}."
    learnt = results.difference("map", "map-untrained", *endpoint_of(plan))
    if learnt is None:
        return said
    verdict = (
        "so in this form one trained network's answer helps more than one untrained network's"
        if learnt.low > 0
        else "so in this form neither does it show"
    )
    return f"{said} The trained teacher's answer gave {points(learnt)} over the untrained one's ({learnt.seeds} seeds): {verdict}."


def _price(results: Results, plan: Mapping[str, Any], seeds: list[int]) -> str:
    """What it costs: the loss on captions, and the kinds of question that need no depth."""
    budget, split, _ = endpoint_of(plan)
    said = []
    ended = [results.ended.get((arm, budget), {}) for arm in ("tokens", "embedding")]
    if all("text" in one.get(seed, {}) for one in ended for seed in seeds):
        before, after = (float(np.mean([one[seed]["text"] for seed in seeds])) for one in ended)
        said.append(
            f"The next-token loss on captions, those trained on, ended at {after:.3f} with the losses and {before:.3f} without."
        )
    apart = {
        kind: e
        for kind in ("colour", "count", "relation")
        if (e := results.difference("embedding", "tokens", budget, split, kind, seeds=seeds)) is not None
    }
    if apart:
        told = ", ".join(f"{kind} {_interval(e)}" for kind, e in apart.items())
        said.append(f"Kinds of question that need no depth changed by: {told} points over `tokens`.")
    return " ".join(said)


FEWEST_FOR_INTERVAL = 3
"""Seeds; of two, how near they happen to lie decides how wide an interval is."""


def within(e: Estimate) -> str:
    """Say an interval, or that there is none."""
    return f"{e.low:+.1f} to {e.high:+.1f}" if e.seeds >= FEWEST_FOR_INTERVAL else f"{e.seeds} seeds: none"


def _interval(e: Estimate) -> str:
    return f"{e.value:+.1f} ({within(e)})"


def points(e: Estimate) -> str:
    """Say a difference in points, with its interval."""
    return f"{e.value:+.1f} points ({within(e) if e.seeds >= FEWEST_FOR_INTERVAL else 'no interval'})"


def endpoint(results: Results, plan: Mapping[str, Any]) -> str:
    """Write the endpoint's table and the verdict."""
    return "\n".join(["## The endpoint", "", *decided(results, plan), ""])


def decided(results: Results, plan: Mapping[str, Any]) -> list[str]:
    """Lay out an endpoint's differences, the verdict by what was fixed, and what the columns mean."""
    end = plan["endpoint"]
    found, seeds = differences(results, plan), paired(results, plan)
    if not found:
        return [f"Not enough was run yet: a difference takes two paired seeds of all arms, and there are {len(seeds)}."]
    lines = [f"| `{end['arm']}` minus | difference (points) | 95 % interval | SD over seeds | paired seeds | seeds that show it in 80 of 100 trials, were this its size and spread |", "|---|---|---|---|---|---|"]  # fmt: skip
    for other, e in found.items():
        number = seeds_needed(e) if e.value > 0 else float("nan")
        needed = "–" if np.isnan(number) else "∞" if np.isinf(number) else f"{number:.0f}"
        lines.append(
            f"| `{other}` | {e.value:+.1f} | {e.low:+.1f} to {e.high:+.1f} | {e.spread:.1f} | {e.seeds} | {needed} |"
        )
    note = (
        "–: fewer than five seeds, or no advantage; ∞: more seeds do not show it, more pictures might. Size and spread are as uncertain as the interval says: the number is of the order of what was taken, no more. "
        "What two runs of one seed differ by (“Precision”) is a part of the spread: pairing by seed takes little of it away."
    )
    return [*lines, "", _verdict(found, len(seeds), end), "", note]


def met(results: Results, plan: Mapping[str, Any]) -> bool | None:
    """Whether an endpoint's criterion is met; None with too few seeds for a verdict."""
    if len(paired(results, plan)) < plan["endpoint"]["seeds_for_a_verdict"]:
        return None
    return all(e.low > 0 for e in differences(results, plan).values())


def _verdict(found: Mapping[str, Estimate], seeds: int, end: Mapping[str, Any]) -> str:
    above = [f"`{other}`" for other, e in found.items() if e.low > 0]
    below = [f"`{other}`" for other, e in found.items() if e.high < 0]
    holds = [f"`{other}`" for other, e in found.items() if e.low <= 0 <= e.high]
    if seeds < end["seeds_for_a_verdict"]:
        return f"**No verdict yet**: it takes {end['seeds_for_a_verdict']} paired seeds of all arms, and there are {seeds}."
    if not below and not holds:
        return f"**Success** as it was fixed: all {len(above)} intervals lie above 0."
    told = [
        f"the interval against {', '.join(names)} {said}"
        for names, said in ((above, "lies above 0"), (holds, "holds 0"), (below, "lies below 0"))
        if names
    ]
    return f"**No success** as it was fixed: {'; '.join(told)}."


def untrained(results: Results, plan: Mapping[str, Any]) -> str:
    """Show by kind of question how far the untrained teacher goes with the trained one."""
    budget, _, _ = endpoint_of(plan)
    seeds = paired(results, plan)
    kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=order)
    rows = []
    for arm, other in (("embedding", "shuffled"), ("random", "shuffled"), ("embedding", "random")):
        found = [results.difference(arm, other, budget, *place, seeds=seeds) for place in kinds]
        if all(e is not None for e in found):
            cells = " | ".join(_interval(e) for e in found if e is not None)
            rows.append(f"| `{arm}` − `{other}` | {cells} |")
    if not rows:
        return ""
    return "\n".join(
        [
            "## The teacher that was never trained", "",
            f"Differences in points over the {len(seeds)} seeds of the endpoint, with 95 % intervals, by kind of question; all but those of depth are descriptive.", "",
            "| | " + " | ".join(title(place) for place in kinds) + " |", "|---|" + "---|" * len(kinds), *rows, "",
            "There is one trained and one untrained teacher: intervals are about seeds and pictures, and say nothing of other trainings or other random weights. How much of depth each one's features hold stands under “Could it see an effect?”.",
            "",
        ]
    )  # fmt: skip


_READ = {
    "embedding": "the teacher's features", "random": "the untrained teacher's features", "own": "the student's tower",
    "cells": "the colours of `cells`", "map": "what the teacher answers", "map-untrained": "what an untrained teacher answers",
}  # fmt: skip
"""Targets, by what `headroom.py` calls what it reads depth from."""
_HEADS = {"depth": "layer norm, then linear–ReLU–linear", "clip": "layer norm", "cells": "linear", "depthmap": "linear"}


def p_value(value: float) -> str:
    """Say a p-value."""
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def _read(results: Results, plan: Mapping[str, Any], arm: str) -> str:
    """Say what a regression that is given the places reads of depth from an arm's targets."""
    share = results.headroom.get(_READ.get(arm, ""), {}).get(plan["endpoint"]["split"])
    return "–" if share is None else f"{100 * share:.1f}"


def targets(results: Results, plan: Mapping[str, Any]) -> str:
    """Lay the targets of all kinds beside each other: what they are, how much is about the image, what they do."""
    if not results.spread:
        return ""
    lines = [
        "## Which targets help?", "",
        "Losses scale a target by channel, so weights are equal; how much of it is about the image is not: the rest is its mean map, which a student learns without looking. "
        "What is read linearly, of depth order, is by a regression that is given the two things' places (“Could it see an effect?”; chance 50).", "",
        "| arm | channels | ends in | variance beyond the mean map | smooth-L1 of the mean map | cosine of two images | depth order read from it linearly, % | depth order minus `tokens`, points | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in (arm for arm in ARMS if arm in results.spread):
        told, head = results.spread[arm], _HEADS[ARMS[arm].teachers[0]]
        found = results.difference(arm, "tokens", *endpoint_of(plan))
        cells = "– | fewer than 2" if found is None else f"{_interval(found)} | {found.seeds}"
        lines.append(
            f"| `{arm}` | {told['channels']:.0f} | {head} | {told['beyond']:.2f} | {told['loss']:.3f} | {told['alike']:.2f} | {_read(results, plan, arm)} | {cells} |"
        )
    apart = {
        "`map` minus `cells`": ("map", "cells"), "`map` minus `map-untrained`": ("map", "map-untrained"),
        "`map` minus `embedding`": ("map", "embedding"), "`map` minus `random`": ("map", "random"),
        "`random` minus `cells`": ("random", "cells"),
    }  # fmt: skip
    pairs = {name: results.difference(arm, other, *endpoint_of(plan)) for name, (arm, other) in apart.items()}
    known = {name: e for name, e in pairs.items() if e is not None and e.seeds >= FEWEST_FOR_INTERVAL}
    if known:
        p = holm({name: e.p for name, e in known.items()})
        said = "; ".join(f"{name} {points(e)}, p {p_value(p[name])}, {e.seeds} seeds" for name, e in known.items())
        lines += [
            "",
            f"Paired with each other, at the endpoint's questions (p corrected for these {len(known)}, which were chosen after the endpoint had been seen, and seeds added after three): {said}.",
        ]
    if (e := known.get("`random` minus `cells`")) is not None:
        lines += [
            "",
            f"It was said before they ran that `cells` helps less than `random`: {'so it is' if e.low > 0 else 'that is not shown'}.",
        ]
    return "\n".join(
        [
            *lines, "",
            "`map` and `cells` have one shape of predictor, `embedding`, `random` and `shuffled` another, `own` a third. None of `map`, `cells` and `own` has a shuffled control in this experiment (`map` has one in the second). All of this was added after the endpoint had been seen, and is descriptive. "
            "`map` and `cells` come from plug-ins of this experiment (`examples/toyworld/targets`); the pipeline's own teacher `depth-map` gives what `map` is, on 24 × 24 cells.",
            "",
        ]
    )  # fmt: skip


def _asked_again(again: Results, plan: Mapping[str, Any]) -> str:
    """Say what the second experiment, which was fixed beforehand, gave for that target."""
    own = plan["confirmation"]
    found = differences(again, own)
    if met(again, own) is None:
        return ""
    told = "; ".join(f"{points(e)} over `{other}`" for other, e in found.items())
    return f" Asked once more, with all fixed beforehand and another teacher: {told} (“A second experiment”)."


def advice(results: Results, again: Results, plan: Mapping[str, Any]) -> str:
    """What to try with other data, each with the figure it rests on; `again` is the second experiment."""
    where = endpoint_of(plan)
    budget = where[0]

    def ended(arm: str) -> str:
        """Say the lowest and highest mean over seeds of the supervised blocks' R²."""
        rows = results.ended.get((arm, budget), {}).values()
        names = sorted({name for row in rows for name in row if "." in name})
        means = [sum(row[name] for row in rows) / len(rows) for name in names]
        return " and ".join(f"{mean:.2f}" for mean in means)

    weighed, published = ended("embedding"), ended("published")
    lines = ["## With your own data", "", "What a toy shows holds for the toy. What it gives reason to try:", ""]
    if weighed and published:
        lines.append(
            f"- **Look whether predictions pass the mean map** before anything else. With the published weights, the default, they ended at a centred R² of {published}; with "
            f"`--set teachers.depth.weight=4 --set contrastive=0.03 --set normalise=channel --set context=image`, which `embedding` has, at {weighed}. `olatrain run` says at its end where they do not."
        )
    lines.append(
        "- **Have the controls beside it**: the same run without a loss (`teachers.depth.weight=0`), with another image's features (`target_control=shuffle`), and with features of an untrained checkpoint. The last is the one that this page's losses did not pass."
    )
    if (e := results.difference("map", "embedding", *where)) is not None:
        lines.append(
            f"- **Try the depth map as target** (`--teacher depth-map`): {points(e)} over the features here, {e.seeds} seeds, seen after the endpoint, and on maps of 6 × 6 cells.{_asked_again(again, plan)}"
        )
    return "\n".join([*lines, ""])
