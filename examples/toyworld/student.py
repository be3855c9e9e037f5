"""The toy world's student: a CLIP tower that sees presence but little depth, and a Llama that has read of that world.

    python examples/toyworld/student.py train OUT [vision llm]     trains and scores (minutes on a core)
    python examples/toyworld/student.py score OUT                  scores what is there on held-out scenes

`vision` learns which coloured shape a patch shows and where the patch is, and nothing else; how much of the depth its
patch tokens tell is measured with a ridge. `llm` learns to answer about scenes that are written out as words
(`language.written`); it is accepted only if it answers 95 % of those held out. `olatrain compose` joins them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import language
import numpy as np
import torch
from fitting import CLIP_MEAN, CLIP_STD, fit, nearest, write_json
from PIL import Image
from scenes import COLOURS, SHAPES, Picture, Scene, Split, make_scene, render
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIDE, PATCH = 96, 16
BICUBIC = 3
GRID = SIDE // PATCH
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
TRAINING, HELD_OUT = 10_000, 400
"""Scenes that both learn from, and that scores are taken on."""
VARIANTS = 6
"""Forms of each training text, in which choices are exchanged and hints are given."""
LEARNT: tuple[Split, ...] = ("haze", "train")
UNSEEN: tuple[Split, ...] = ("haze-test", "test")
FIRST = 200_000
"""Number of the first training scene: none of those that the questions or captions of a run are about."""
FRESH = FIRST + 100_000
"""The first of the scenes that nothing was chosen by: the recipe was found by looking at those held out."""
ACCEPTED = 0.95
"""Least share of right answers about written-out scenes."""
LITTLE_DEPTH = (0.3, 0.6)
"""Centred R² of depth that the tower's patch tokens may have."""
SHAPES_TOLD = 0.8
"""Least share of patches whose shape can be read from the tower: one that does not see things sees no depth of them."""
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
IGNORED = -100


@dataclass(frozen=True)
class World:
    """Scenes in the forms that the two are trained on."""

    pixels: Tensor
    """(N, 3, 96, 96) normalised."""
    present: Tensor
    """(N, 24): which names show."""
    names: Tensor
    """(N, 36) int64: which name a patch shows most of, 24 where things cover less than a seventh of it."""
    inverse_depth: Tensor
    """(N, 36): mean over each patch, 1/m."""
    texts: list[list[tuple[str, str, str]]]
    """Of each scene, turns of (kind, what is asked, what is answered), the first behind the scene itself."""


def make_world(splits: Sequence[Split], first: int, count: int, *, seed: int) -> World:
    """Draw as many scenes of each split, `count` in all, and write their texts."""
    rng = np.random.default_rng(seed)
    balance = language.Balance()
    pixels, present, patches, depths, texts = [], [], [], [], []
    for number in range(count):
        scene = make_scene(splits[number % len(splits)], first + number)
        picture = render(scene)
        pixels.append(squashed(picture))
        names = {thing.name for thing in language.shown(scene, picture)}
        present.append(torch.tensor([name in names for name in NAMES]).float())
        patches.append(patch_names(scene, picture))
        fine = torch.from_numpy(nearest(picture.inverse_depth, SIDE))
        depths.append(fine.reshape(GRID, PATCH, GRID, PATCH).mean(dim=(1, 3)).flatten())
        turns = [
            ("caption", language.DESCRIBE, language.caption(scene, picture)),
            ("caption", language.DESCRIBE_DEPTH, language.caption(scene, picture, distances=True)),
            ("caption", language.DESCRIBE_COLUMN, language.columns(scene, picture)),
        ]
        turns.pop(int(rng.integers(3)))
        turns += [
            (q.kind, q.prompt + language.SUFFIX, q.letter) for q in language.questions(scene, picture, rng, balance)
        ]
        rng.shuffle(turns)
        kind, text, answer = turns[0]
        texts.append([(kind, f"Scene : {language.written(scene, picture)} .\n{text}", answer), *turns[1:]])
    return World(torch.stack(pixels), torch.stack(present), torch.stack(patches), torch.stack(depths), texts)


def squashed(picture: Picture) -> Tensor:
    """Return a picture as the tower sees it, (3, 96, 96) float32."""
    rgb = np.array(picture.image().resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    values = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255.0
    return (values - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def patch_names(scene: Scene, picture: Picture) -> Tensor:
    """Return which name each patch shows most of, (36,) int64."""
    fine = nearest(picture.segments, SIDE).reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
    found = torch.full((GRID * GRID,), len(NAMES))
    for place, patch in enumerate(fine.reshape(GRID * GRID, -1)):
        counts = np.bincount(patch, minlength=2 + len(scene.things))[2:]
        if len(counts) and counts.max() * 7 >= patch.size:
            found[place] = NAMES.index(scene.things[int(counts.argmax())].name)
    return found


def drawn_worlds(cache: Path) -> tuple[World, World]:
    """Return the scenes to learn from and those held out, drawn once and kept."""
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        both = make_world(LEARNT, FIRST, TRAINING, seed=1), make_world(UNSEEN, FIRST, HELD_OUT, seed=2)
        torch.save([vars(world) for world in both], cache)
    first, second = torch.load(cache, weights_only=True)
    return World(**first), World(**second)


# ---------------------------------------------------------------- vision


def vision_config(width: int = 64) -> CLIPVisionConfig:
    """Return a CLIP tower of so many channels and 4 layers: 36 patch tokens from 96 × 96 pixels."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=32,
        hidden_act="quick_gelu",
    )


def train_vision(out: Path, world: World, steps: int, batch: int = 64, *, width: int = 64) -> None:
    """Train the tower to tell of each patch which colour and shape it shows and where it is, and nothing else."""
    torch.manual_seed(11)
    tower = CLIPVisionModel(vision_config(width))
    sizes = [len(COLOURS) + 1, len(SHAPES) + 1, GRID, GRID]
    head = nn.Linear(tower.config.hidden_size, sum(sizes))
    both = nn.ModuleList([tower, head])
    weight = torch.tensor([1.0] * len(SHAPES) + [0.3])
    rows, columns = (one.flatten().repeat(batch) for one in torch.meshgrid(*[torch.arange(GRID)] * 2, indexing="ij"))

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(12_000_000 + step)  # a continuation draws what it would have drawn
        chosen = torch.randint(len(world.pixels), (batch,), generator=generator)
        pixels, names = world.pixels[chosen], world.names[chosen]
        if step % 2:  # a mirror changes no name
            pixels, names = pixels.flip(-1), names.reshape(-1, GRID, GRID).flip(-1).flatten(1)
        colours = torch.where(names < len(NAMES), names // len(SHAPES), len(COLOURS)).flatten()
        shapes = torch.where(names < len(NAMES), names % len(SHAPES), len(SHAPES)).flatten()
        states = tower(pixels, output_hidden_states=True).hidden_states
        total = torch.zeros(())
        for layer in (-2, -1):
            colour, shape, row, column = head(states[layer][:, 1:]).flatten(0, 1).split(sizes, dim=1)
            total = total + functional.cross_entropy(colour, colours)
            total = total + functional.cross_entropy(shape, shapes, weight=weight)
            total = total + 0.1 * (functional.cross_entropy(row, rows) + functional.cross_entropy(column, columns))
        return total

    fit(both, loss, steps, lr=2e-3, out=out)
    tower.save_pretrained(out)
    processor = {
        "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": False, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor", "image_std": CLIP_STD, "resample": BICUBIC,
        "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE},
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", processor)


@torch.no_grad()
def patch_tokens(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Return what LLaVA reads of pictures: (N, 36, channels)."""
    found = [tower(part, output_hidden_states=True).hidden_states[-2][:, 1:] for part in torch.split(pixels, 200)]
    return torch.cat(found)


def score_vision(folder: Path, world: World, held_out: World) -> dict[str, float]:
    """Return how well names and depth can be read linearly from the patch tokens, on held-out scenes.

    `names AP`: mean average precision of a name's presence, of a logistic readout of the tokens' maximum and mean.
    `depth R²`: a ridge from a patch token and its place to the inverse depth of its patch, centred: 0 is the mean map.
    `shape of a patch`, `column R²`: what a ridge reads from the token of a patch that shows a thing, its place unknown.
    """
    tower = CLIPVisionModel.from_pretrained(folder)
    tokens, unseen = patch_tokens(tower, world.pixels), patch_tokens(tower, held_out.pixels)
    pooled = [torch.cat([t.amax(dim=1), t.mean(dim=1), torch.ones(len(t), 1)], dim=1) for t in (tokens, unseen)]
    readout = ridge(pooled[0], world.present)
    scores = pooled[1] @ readout
    shape, column = _told_of_things(tokens, world, unseen, held_out)
    return {
        "depth R² (centred)": depth_r2(tokens, world.inverse_depth, unseen, held_out.inverse_depth),
        "names AP": average_precision(scores, held_out.present),
        "names AP by chance": float(held_out.present.mean()),
        "shape of a patch": shape,
        "shape of a patch by chance": _most_frequent(held_out.names % len(SHAPES), held_out.names < len(NAMES)),
        "column R²": column,
    }


def depth_r2(tokens: Tensor, depth: Tensor, unseen: Tensor, truth: Tensor) -> float:
    """Return the centred R² of `truth` (M, P), read by a ridge from `unseen` (M, P, C) and the place of each token.

    The ridge is fitted on `tokens` (N, P, C) with `depth` (N, P); 0 is that one's mean map.
    """
    mean = depth.mean(dim=0)
    weights = ridge(_rows(tokens), (depth - mean).flatten()[:, None])
    predicted = (_rows(unseen) @ weights).reshape(len(unseen), -1)
    return 1.0 - float(((truth - mean - predicted) ** 2).sum()) / float(((truth - mean) ** 2).sum())


def _told_of_things(tokens: Tensor, world: World, unseen: Tensor, held_out: World) -> tuple[float, float]:
    """Return of patches that show a thing: the share whose shape a ridge reads, and the R² of their column."""
    showing, other = (one.names < len(NAMES) for one in (world, held_out))
    places = torch.arange(GRID).repeat(GRID).float()
    x, y = (torch.cat([t[m], torch.ones(int(m.sum()), 1)], dim=1) for t, m in ((tokens, showing), (unseen, other)))
    shapes = functional.one_hot(world.names[showing] % len(SHAPES), len(SHAPES)).float()
    columns, truth = (places.expand(len(m), -1)[m] for m in (showing, other))
    right = (y @ ridge(x, shapes)).argmax(1) == held_out.names[other] % len(SHAPES)
    left = (y @ ridge(x, columns[:, None]))[:, 0] - truth
    return float(right.float().mean()), 1.0 - float((left**2).sum() / ((truth - truth.mean()) ** 2).sum())


def _most_frequent(kinds: Tensor, counted: Tensor) -> float:
    """Return the share of the kind that is most frequent."""
    found = torch.bincount(kinds[counted])
    return float(found.max() / found.sum())


def _rows(tokens: Tensor) -> Tensor:
    """(N, P, C) → (N·P, C + P): each token beside a one-hot of its place."""
    places = torch.eye(tokens.shape[1]).expand(len(tokens), -1, -1)
    return torch.cat([tokens, places], dim=2).flatten(0, 1)


def ridge(inputs: Tensor, targets: Tensor, strength: float = 1.0) -> Tensor:
    """Return the weights (C, T) of a linear map from (N, C) to (N, T)."""
    x, y = inputs.double(), targets.double()
    gram = x.T @ x + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weights: Tensor = torch.linalg.solve(gram, x.T @ y)
    return weights.float()


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the mean over columns of the average precision."""
    found = []
    for column in range(truth.shape[1]):
        order = scores[:, column].argsort(descending=True)
        right = truth[order, column]
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        found.append(float((precision * right).sum() / right.sum().clamp(min=1)))
    return sum(found) / len(found)


# ---------------------------------------------------------------- llm


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words; a thing's name is one, and so is the sentence that ends each question."""
    words = [BOS, EOS, PAD, UNK, *language.vocabulary()]
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNK))
    names = "|".join(COLOURS) + r")\ (?:" + "|".join(SHAPES)
    sentence = language.SUFFIX.strip().replace(" ", r"\ ").replace(".", r"\.")
    pattern = Regex(rf"{sentence}|\([A-D]\)|(?:{names})(?![\w-])|[\w-]+|[^\s\w]")
    own.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=own, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK, model_max_length=512
    )


def llm_config(words: int) -> LlamaConfig:
    """Return a Llama of 64 channels and 4 layers."""
    return LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.1,  # about one over the root of the width: with 0.02 so narrow a model starts mute
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def tokenise(tokenizer: Any, texts: list[list[tuple[str, str, str]]]) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Return ids and labels (N, L), in the turns of a student without a chat template; and each answer's kind."""
    rows, marks, kinds = [], [], []
    for turns in texts:
        ids: list[int] = [tokenizer.bos_token_id]
        labels: list[int] = [IGNORED]
        for _, asked, answer in turns:
            question = tokenizer(f"USER: {asked} ASSISTANT:", add_special_tokens=False)["input_ids"]
            reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids += question + reply
            labels += [IGNORED] * len(question) + reply
        rows.append(ids)
        marks.append(labels)
        kinds.append([kind for kind, _, _ in turns])
    length = max(map(len, rows))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return padded, torch.tensor([row + [IGNORED] * (length - len(row)) for row in marks]), kinds


def renamings(tokenizer: Any, generator: torch.Generator) -> Tensor:
    """Return ids by id: colours and shapes change their names throughout, so that a scene is many scenes."""
    vocabulary = tokenizer.get_vocab()
    colours, shapes = list(COLOURS), list(SHAPES)
    colour = dict(zip(colours, [colours[n] for n in torch.randperm(len(colours), generator=generator)], strict=True))
    shape = dict(zip(shapes, [shapes[n] for n in torch.randperm(len(shapes), generator=generator)], strict=True))
    both = colour | shape
    table = torch.arange(len(vocabulary))
    for word, number in vocabulary.items():
        for mark in (" ", "-"):
            parts = word.split(mark)
            renamed = mark.join(both.get(part, part) for part in parts)
            if parts[0] in both and renamed in vocabulary:
                table[number] = vocabulary[renamed]
    return table


@torch.no_grad()
def compose_words(model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Start each word as the sum of what it is made of: `red cross` of `red` and `cross`, `x1y2` of a column and a row.

    Otherwise each of the hundreds of words would have to be learnt on its own to be of that colour.
    """
    rows = model.model.embed_tokens.weight
    known = tokenizer.get_vocab()
    fresh: dict[str, Tensor] = defaultdict(lambda: 0.1 * torch.randn(rows.shape[1]))
    for word, number in known.items():
        parts = language.parts(word)
        if len(parts) > 1:
            rows[number] = torch.stack([rows[known[part]] if part in known else fresh[part] for part in parts]).sum(0)
    model.lm_head.weight.copy_(rows)


def varied(turns: list[tuple[str, str, str]], rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return turns whose two choices are exchanged, half of the time, and half of their names hinted at.

    Without the first which letter is right is learnt by heart, scene by scene. The hints say what the written scene
    does, a distance or a column, or which choice is right, so that each step of an answer is learnt on its own too.
    """
    cells = re.findall(r"x(\d)y\d (\w+)-(\w+)-(\d)", turns[0][1])
    level = {f"{colour} {shape}": f"at-{number}" for _, colour, shape, number in cells}
    found: dict[str, list[int]] = defaultdict(list)
    for column, colour, shape, _ in cells:
        found[f"{colour} {shape}"].append(int(column))
    column = {name: f"in-{round(float(np.mean(numbers)))}" for name, numbers in found.items()}
    hints: dict[str, list[dict[str, str]]] = {"depth": [level], "relation": [column], "distance": [column, level]}
    names = re.compile("|".join(sorted(level, key=len)) or "$^")
    changed = []
    for kind, text, answer in turns:
        scene, mark, question = text.rpartition(" .\n") if text.startswith("Scene") else ("", "", text)
        choices = re.search(r"\(A\) (.+) \(B\) ([^()]+)(?=\nAnswer)", question)
        if kind in language.KINDS and choices and "(C)" not in question:
            first = answer
            if rng.random() < 0.5:
                exchanged = f"(A) {choices[2]} (B) {choices[1]}"
                question = question.replace(choices[0], exchanged)
                answer = "B" if answer == "A" else "A"
            for hint in hints.get(kind, []):
                given = {name: value for name, value in hint.items() if rng.random() < 0.5}
                question = names.sub(partial(_told, given), question)
            if kind in ("relation", "colour") and rng.random() < 0.5:
                right = choices[1] if first == "A" else choices[2]
                question = question.replace(" ?", f" {right} ?", 1)
        changed.append((kind, f"{scene}{mark}{question}", answer))
    return changed


def _told(hint: dict[str, str], name: re.Match[str]) -> str:
    return f"{name[0]} {hint[name[0]]}" if name[0] in hint else name[0]


def train_llm(out: Path, world: World, steps: int, batch: int = 32) -> None:
    """Train the Llama on scenes written out, questions and answers; the answers count most."""
    torch.manual_seed(13)
    tokenizer = make_tokenizer()
    rng = np.random.default_rng(13)
    texts = [varied(turns, rng) for _ in range(VARIANTS) for turns in world.texts]
    ids, labels, _ = tokenise(tokenizer, texts)
    words = "|".join(COLOURS)
    pattern = re.compile(rf"(at|in)-\d|left|right|{words}")
    hint = torch.tensor([number for word, number in tokenizer.get_vocab().items() if pattern.fullmatch(word)])
    offered = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(["(A)", "(B)"]))).roll(1, dims=1)
    labels = torch.where(torch.isin(ids, hint) & ~offered, ids, labels)
    model = LlamaForCausalLM(llm_config(len(tokenizer)))
    compose_words(model, tokenizer)

    by_length = (ids != tokenizer.pad_token_id).sum(dim=1).argsort()  # a batch of like lengths has little padding
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(language.LETTERS)))

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(14_000_000 + step)
        first = int(torch.randint(len(ids) - batch + 1, (), generator=generator))
        chosen = by_length[first : first + batch]
        table = renamings(tokenizer, generator)
        words, answers = table[ids[chosen]], labels[chosen]
        length = int((words != tokenizer.pad_token_id).sum(dim=1).max())
        words, answers = words[:, :length], answers[:, :length]
        hidden = model.model(input_ids=words).last_hidden_state[:, :-1]
        supervised = answers[:, 1:] != IGNORED
        # padding is on the right, where nothing that counts looks
        said = words[:, 1:][supervised]
        each = functional.cross_entropy(model.lm_head(hidden[supervised]), said, reduction="none")
        choice = torch.isin(said, letters)
        return each[~choice].mean() + each[choice].sum() / choice.sum().clamp(min=1)

    fit(model, loss, steps, lr=3e-3, out=out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def score_llm(folder: Path, held_out: World) -> dict[str, float]:
    """Return how many questions about written-out scenes are answered rightly, by kind; a caption word by word."""
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = make_tokenizer()
    ids, labels, kinds = tokenise(tokenizer, held_out.texts)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(ids), 100):
        words, answers = ids[start : start + 100], labels[start : start + 100]
        said = model(input_ids=words).logits[:, :-1].argmax(-1)
        for row, truth, asked in zip(said, answers[:, 1:], kinds[start : start + 100], strict=True):
            ends = [-1, *(truth == tokenizer.eos_token_id).nonzero().flatten().tolist()]
            for kind, first, end in zip(asked, ends[:-1], ends[1:], strict=True):
                part = slice(first + 1, end)
                counted = truth[part] != IGNORED
                right[kind].append(bool((row[part][counted] == truth[part][counted]).all()))
    found = {kind: float(np.mean(right[kind])) for kind in language.KINDS}
    answered = [value for kind in language.KINDS for value in right[kind]]
    whole = {"captions": float(np.mean(right["caption"])), "all questions": float(np.mean(answered))}
    return {**{str(kind): value for kind, value in found.items()}, **whole}


# ---------------------------------------------------------------- command


def main() -> int:
    """Train or score; return the exit status, 1 where what was made is not accepted."""
    parser = argparse.ArgumentParser(description="The toy world's student.")
    parser.add_argument("action", choices=("train", "score"))
    parser.add_argument("folder", type=Path, help="folder that holds vision/ and llm/")
    parser.add_argument("names", nargs="*", default=[], help="which; all by default")
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--llm-steps", type=int, default=6000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.names or ["vision", "llm"]
    world, held_out = drawn_worlds(options.folder / "worlds.pt")
    scores: dict[str, dict[str, float]] = {}
    path = options.folder / "scores.json"
    if path.is_file():
        scores = json.loads(path.read_text(encoding="utf-8"))
    if "vision" in names:
        if options.action == "train":
            train_vision(options.folder / "vision", world, options.vision_steps)
        scores["vision"] = score_vision(options.folder / "vision", world, held_out)
    if "llm" in names:
        if options.action == "train":
            train_llm(options.folder / "llm", world, options.llm_steps)
        scores["llm"] = score_llm(options.folder / "llm", held_out)
        fresh = make_world(UNSEEN, FRESH, HELD_OUT, seed=3)
        scores["llm, fresh scenes"] = score_llm(options.folder / "llm", fresh)
    scores = {name: {key: round(value, 4) for key, value in found.items()} for name, found in scores.items()}
    write_json(path, scores)
    print(json.dumps(scores, indent=1, ensure_ascii=False))
    problems = []
    if "llm" in names and scores["llm, fresh scenes"]["all questions"] < ACCEPTED:
        problems.append(f"the language model answers less than {ACCEPTED:.0%} of the written-out scenes")
    if "vision" in names and not LITTLE_DEPTH[0] <= scores["vision"]["depth R² (centred)"] <= LITTLE_DEPTH[1]:
        problems.append("the tower's depth R² lies outside {} to {}".format(*LITTLE_DEPTH))
    if "vision" in names and scores["vision"]["shape of a patch"] < SHAPES_TOLD:
        problems.append(f"the tower tells the shape of less than {SHAPES_TOLD:.0%} of the patches")
    for problem in problems:
        print(f"not accepted: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
