"""The model card of an exported student: what it learned from, under which licences, and how well."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from olaschema.manifest import TeacherRecord
from olatrain.config import SourceSettings, TrainConfig
from olatrain.sidecar import SIDECAR_NAME
from olatrain.tokens import TaskTokens

# Where things were on one machine; the fingerprints have a table of their own.
_NOT_SHOWN = frozenset(
    ("student", "store", "sources", "conversations", "images", "out", "evaluation", "fingerprints", "device", "nproc",
     "workers", "keep_samples", "cache_dir", "cache_limit",
     "checkpoint_every", "keep_last", "log_every", "look_every", "trackers")
)  # fmt: skip


def model_card(
    *,
    name: str,
    config: TrainConfig,
    step: int,
    samples: str,
    teachers: Sequence[TeacherRecord],
    earlier: Sequence[TeacherRecord],
    origin: str | None,
    model: Any,
    tokens: TaskTokens,
    dtype: str,
    figures: dict[str, dict[str, Any]],
) -> str:
    """Write the card in Markdown. It names folders by their last part only: no path of the machine is in it."""
    base = config.student.resolve().name
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: other\ntags:\n- ola-distill\n---",
        f"# {name}",
        f"A {type(model).__name__} {_how(config)}. "
        f"It started from the student `{base}`{f', {origin},' if origin else ''} and trained "
        f"{', '.join(config.train)} for {step} steps of {config.batch} samples. Weights are {dtype}.",
        _use(tokens, config.feed),
        _data(config, samples, figures.get("start")),
        _teachers(config, teachers, earlier),
        _results(figures),
        "## Settings\n\n```json\n" + _settings(config) + "\n```",
        f"## Files\n\n`{SIDECAR_NAME}` holds latents, predictors, logit scales and what projects fed features, "
        "`ola.json` the ids of the task tokens. transformers reads neither; `olatrain run --student` goes on from "
        "them.",
    ]
    return "\n\n".join(parts) + "\n"


def _how(config: TrainConfig) -> str:
    fed = f"that is fed features of {', '.join(config.feed)} " if config.feed else ""
    if not config.teachers:
        return f"{fed}{'and ' if fed else 'that '}trained on the next token alone"
    teachers = ", ".join(config.teachers)
    of = {
        "none": f"features of {teachers} while it trained (the method of OLA-VLM, arXiv 2412.09585)",
        "shuffle": f"other images' features of {teachers} while it trained (a control arm)",
        "mean": f"the mean features of {teachers} while it trained (a control arm)",
        "self": f"its own initial vision tower's features in place of those of {teachers} while it trained "
        "(a control arm)",
    }[config.target_control]
    return f"{fed}{'and ' if fed else ''}whose hidden states were supervised with {of}"


def _use(tokens: TaskTokens, feed: Sequence[str]) -> str:
    what = (
        f"Behind each image the chat template puts {tokens.say()}; for structured content and for strings that hold "
        "`<image>` alike. "
        "Their ids are suppressed in generation."
        if tokens.flat
        else "It has no task tokens."
    )
    if feed:
        what += (
            f"\n\n**It needs features of {', '.join(feed)} of each image, which transformers does not give it.** The "
            "code above runs it as if each image had none, with vectors that only images without features have "
            f"trained. `olatrain eval --store` feeds it; the projectors are in `{SIDECAR_NAME}`.\n\n"
        )
    return f"""## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")
messages = [{{"role": "user", "content": "<image>\\nWhat is nearest to the camera?"}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```

{what} It was trained on pixels that the PIL image processor made; other backends give slightly different ones."""


def _data(config: TrainConfig, samples: str, start: dict[str, Any] | None) -> str:
    store = f"`{PurePosixPath(config.store).name}`" if config.store is not None else ""
    if config.sources:
        sources = "A mixture of " + ", ".join(map(_source, config.sources))
    elif config.conversations is None:
        sources = f"Packed training set {store}"
    else:
        sources = f"Conversations `{config.conversations.name}`" + (f", features {store}" if store else "")
    text = f"{sources}. Samples digest `{samples}`."
    if start is not None:
        text += (
            f" An epoch has {start['samples']} samples, {start['text_only']} of them text alone; "
            f"{start['left_out']} entries were not usable."
        )
        for teacher, found in (start["targets"] | start.get("fed", {})).items():
            what = "are fed" if teacher in config.feed else "have a target"
            text += f" {teacher}: {found['valid']} samples {what}, {sum(found['missing'].values())} without a feature."
    return f"## Data\n\n{text}"


def _source(source: SourceSettings) -> str:
    store = f"`{PurePosixPath(source.store).name}`" if source.store is not None else ""
    what = store if source.conversations is None else f"conversations `{source.conversations.name}`"
    features = f" with features {store}" if store and source.conversations is not None else ""
    return f"{what}{features} ({source.repeats} × an epoch)"


def _teachers(config: TrainConfig, teachers: Sequence[TeacherRecord], earlier: Sequence[TeacherRecord]) -> str:
    rows = []
    for name, record in zip(config.teachers, teachers, strict=False):  # fed ones follow
        trained = config.teachers[name]
        rows.append([*_licence(record), ", ".join(map(str, trained.layers)), f"{trained.weight:g}"])
    rows += [[*_licence(record), "fed", ""] for record in teachers[len(config.teachers) :]]
    rows += [[*_licence(record), "before this run", ""] for record in earlier]
    table = _table(["teacher", "source", "licence", "fingerprint", "layers", "weight"], rows)
    return (
        "## Teachers and their licences\n\nThis model learned from features of these models. Their licences may limit "
        "what it can be used for, as may those of its language model, its vision tower and the data.\n\n" + table
    )


def _licence(record: TeacherRecord) -> list[str]:
    fingerprint = record.fingerprint
    return [fingerprint.teacher, record.source, record.licence, f"`{fingerprint.digest()}`"]


def _results(figures: dict[str, dict[str, Any]]) -> str:
    event = "evaluation" if "evaluation" in figures else "train"
    if event not in figures:
        return "## Results\n\nThe run kept no metrics."
    found = figures[event]
    where = "samples held out" if event == "evaluation" else "the last training batch; no samples were held out"
    rows = []
    for teacher, measured in found["teachers"].items():
        for layer, values in measured.get("layers", {}).items():
            rows.append([teacher, layer, *_numbers(values)])
        if "mean_map" in measured:
            rows.append([teacher, "mean map", *_numbers({**measured["mean_map"], "r2": 0.0})])
    table = _table(["teacher", "layer", "smooth-L1", "contrastive", "cosine", "centred R²"], rows)
    return (
        f"## Results\n\nAt step {found['step']}, on {where}: next-token loss {found['text']:.4f}. "
        "The mean map, the mean of the training targets, knows nothing of any image: what is no better than it is "
        f"worth nothing.\n\n{table}"
    )


def _numbers(values: dict[str, Any]) -> list[str]:
    wanted = ("smooth_l1", "contrastive", "cosine", "r2")
    return ["–" if values[name] is None else f"{values[name]:.4f}" for name in wanted]


def _settings(config: TrainConfig) -> str:
    shown = {name: value for name, value in config.model_dump(mode="json").items() if name not in _NOT_SHOWN}
    return json.dumps(shown, indent=1, sort_keys=True)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
