"""The parts of `docs/results.md` on what can be chosen: supervised layers, and the form of stored features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from arms import LAYER_CHOICES, LAYERS, PRECISIONS, layers_arm
from comparisons import Compared, Comparison, difference, families
from recorded import Results
from report_endpoint import endpoint_of, points
from report_tables import percent

from olatrain.probe import LayerScore, suggest


def _against(
    results: Results, plan: Mapping[str, Any], arm: str, corrected: Mapping[Comparison, Compared], other: str
) -> str:
    """Cells of a table: seeds, accuracy at the endpoint's questions, and what is paired with `other`."""
    where = endpoint_of(plan)
    found = results.accuracy(arm, *where)
    if found is None:
        return "0 | | | | |"
    compared = corrected.get((arm, other, *where))
    cells = "– | – | –" if compared is None else difference(compared)
    return f"{found.seeds} | {percent(found)} | {cells} |"


def _over_tokens(results: Results, plan: Mapping[str, Any], arms: Mapping[str, str]) -> str:
    """Arms, by what they are called here, minus task tokens without a loss; nothing where no two seeds are paired."""
    found = {said: results.difference(arm, "tokens", *endpoint_of(plan)) for arm, said in arms.items()}
    told = [f"{said} {points(e)}, {e.seeds} seeds" for said, e in found.items() if e is not None]
    return f"Minus task tokens without a loss, described and not tested: {'; '.join(told)}." if told else ""


def _apart(plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared], family: str, reference: str) -> str:
    """Which of a family differ from what they are compared with after correction."""
    found = {one[0]: corrected[one] for one in families(plan)[family] if one in corrected}
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


def layers(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    """Write the part on which blocks to supervise."""
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
    if not any(one in corrected or results.accuracy(one[0], *one[2:]) for one in families(plan)["layers"]):
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


def precisions(results: Results, plan: Mapping[str, Any], corrected: Mapping[Comparison, Compared]) -> str:
    """Write the part on forms of stored features."""
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
