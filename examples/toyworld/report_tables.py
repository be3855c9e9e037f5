"""Tables of `docs/results.md` that lay arms beside each other: right answers, and what training ended at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from arms import ARMS, MAIN
from recorded import Results, order, title
from significance import Estimate
from trivial import FADED

_ABOUT = {
    "random": "embedding losses, features of an untrained network: no knowledge of depth, but the picture's colours, and in them the cue",
    "feed": "no loss, the teacher's features as inputs (a map's 36 vectors), at test time too",
}
"""What an arm is, in the words of what was learnt about it; `Arm.about` is part of a row's digest."""


def about_arm(arm: str) -> str:
    """Say what an arm is."""
    return _ABOUT.get(arm, ARMS[arm].about)


def percent(found: Estimate) -> str:
    """An accuracy with its interval; two seeds have none, and one has that over its pictures."""
    if found.seeds == 2:
        return f"{found.value:.1f}"
    return f"{found.value:.1f} ({max(found.low, 0):.0f}–{min(found.high, 100):.0f})"


def progress(results: Results, plan: Mapping[str, Any]) -> str:
    """What training ended at: no difference in answers says little of losses that taught nothing."""
    budget = plan["endpoint"]["budget"]
    table = progress_table(results, budget)
    lines = ["## Did the losses do anything?", ""]
    if not table:
        return "\n".join([*lines, "No run has kept what its losses ended at yet.", ""])
    lines += [
        f"What training ended at (its last tenth of steps), means over seeds, of runs with {budget} questions. R² is that of the embedding predictions, centred: 0 is the mean map of the arm's own targets, "
        "the trivial baseline, and 1 the targets themselves, which differ between arms, as do the captions of `oracle`; it says what the predictors reach, which fine-tuning does not use. –: no such loss.", "",
    ]  # fmt: skip
    return "\n".join([*lines, *table, ""])


def progress_table(results: Results, budget: int) -> list[str]:
    """Lay out what the losses of each arm ended at; nothing where no run kept it."""
    ended = {arm: results.ended[arm, budget] for arm in ARMS if (arm, budget) in results.ended}
    if not ended:
        return []
    lines = [
        "| arm | seeds | pretraining: next-token loss | embedding R² by block | fine-tuning: next-token loss |",
        "|---|---|---|---|---|",
    ]
    for arm, by_seed in ended.items():
        names = dict.fromkeys(name for one in by_seed.values() for name in one)
        mean = {name: float(np.mean([one[name] for one in by_seed.values() if name in one])) for name in names}
        text, tuned = (f"{mean[name]:.3f}" if name in mean else "–" for name in ("text", "tune_text"))
        layers = sorted(name for name in mean if "." in name)
        r2 = ", ".join(f"{name.replace('.', ' ')}: {mean[name]:.3f}" for name in layers) or "–"
        lines.append(f"| `{arm}` | {len(by_seed)} | {text} | {r2} | {tuned} |")
    return lines


def accuracies(results: Results) -> str:
    """Write the tables of right answers, one for each number of questions to fine-tune on."""
    parts = []
    for budget in sorted({budget for _, budget, _, _ in results.right}):
        lines = [
            f"## Accuracy after {budget} questions",
            "",
            "Percent, with 95 % intervals over seeds and images, of one seed over images alone. **Rows are not to be compared with each other**: arms have unlike numbers of seeds, and of the same seeds and questions "
            "much cancels. Only paired differences compare: those to `tokens` stand in “The rest”. `ood`: pictures whose only cue is contact (what stands lower is closer), which no question to train on was about; pictures with that cue are among the captions. It is not depth seen by another cue: there the cells' mean colours answer more than on `test` (“Could it see an effect?”), perhaps as what stands higher has the sky around it.",
            "",
        ]
        parts.append("\n".join([*lines, *accuracy_table(results, budget), ""]))
    return "\n".join(parts)


def accuracy_table(results: Results, budget: int) -> list[str]:
    """Lay out what each arm answers of each kind, below chance and what rules answer that look for no depth."""
    kinds = sorted({(split, kind) for _, b, split, kind in results.right if b == budget}, key=order)
    arms = [arm for arm in MAIN if any(a == arm and b == budget for a, b, _, _ in results.right)]
    lines = ["| arm | seeds | " + " | ".join(title(place) for place in kinds) + " |"]
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
        cells = " | ".join(percent(e) if e else "" for e in found)
        lines.append(f"| `{arm}`: {about_arm(arm)} | {seeds} | {cells} |")
    counts = ", ".join(f"{title(p)} {len(results.images[p])}" for p in kinds)
    return [*lines, "", f"Questions: {counts}."]


def headroom_table(results: Results, kind: str) -> list[str]:
    """Lay out what could be read of depth, were the things found; nothing where it was not measured."""
    if not results.headroom:
        return []
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
