"""Predictors against a resampler written out here in plain arithmetic, and what each of them may read."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from student_support import HIDDEN, IMAGE_ID, PAD_ID, task_tokens
from torch import Tensor

from olaschema.errors import ConfigError
from olatrain.predictors import Predictor, PredictorBank, PredictorConfig, published_predictor
from olatrain.tokens import Items, TaskTokens, locate

TOKENS = task_tokens()
GEN = PredictorConfig(shape=(6,), layers=(3,), width=6, heads=2, head_width=4)
DEPTH = PredictorConfig(shape=(2, 2, 10), layers=(2, 3), width=HIDDEN, heads=2, head_width=4, intermediate=True)
IMAGE = [IMAGE_ID] * 4
LATENTS = {"gen": torch.randn(2, HIDDEN), "depth": torch.randn(4, HIDDEN)}


def bank(tokens: TaskTokens = TOKENS, **settings: object) -> PredictorBank:
    made = PredictorBank({"gen": GEN, "depth": DEPTH}, tokens, hidden_size=HIDDEN, seed=0, **settings)  # type: ignore[arg-type]
    with torch.no_grad():  # norms that are not the identity
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("1.0.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def layout(*rows: list[int], tokens: TaskTokens = TOKENS) -> Items:
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return locate(tokens, input_ids, mask)


def row(before: int, after: int) -> list[int]:
    return [5] * before + IMAGE + list(TOKENS.flat) + [7] * after


def states(batch: int, length: int, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(batch, length, HIDDEN, generator=generator) for n in (2, 3)}


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def by_hand(predictor: Predictor, context: Tensor, queries: Tensor, config: PredictorConfig) -> Tensor:
    """One item's prediction (N, C) from the states it may read (S, D) and its queries (N, D)."""
    w = {name: value.detach() for name, value in predictor.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    x = linear(context, "projector.proj_in")
    z = linear(queries, "projector.proj_in")
    a = "projector.layers.0.0"
    normed_x, normed_z = norm(x, w, f"{a}.norm1"), norm(z, w, f"{a}.norm2")
    q = linear(normed_z, f"{a}.to_q")
    kv = linear(torch.cat((normed_x, normed_z)), f"{a}.to_kv")
    inner = config.heads * config.head_width
    k, v = kv[:, :inner], kv[:, inner:]
    outs = []
    for h in range(config.heads):
        part = slice(h * config.head_width, (h + 1) * config.head_width)
        scores = (q[:, part] @ k[:, part].T) / math.sqrt(config.head_width)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outs.append(weights @ v[:, part])
    z = z + linear(torch.cat(outs, dim=-1), f"{a}.to_out")
    f = linear(norm(z, w, "projector.layers.0.1.0"), "projector.layers.0.1.1")
    f = f * 0.5 * (1 + torch.erf(f / math.sqrt(2)))
    z = z + linear(f, "projector.layers.0.1.3")
    out = norm(linear(z, "projector.proj_out"), w, "projector.norm_out")
    if config.intermediate:
        out = linear(linear(out, "linear_1.0").clamp(min=0), "linear_1.2")
    return out


@pytest.mark.parametrize("context", ["image", "prompt", "all"])
def test_predictions_equal_the_arithmetic_written_out(context: str) -> None:
    made = bank(context=context)
    items = layout(row(2, 3), row(1, 1))
    taps = states(2, 13)
    predictions = made(taps, items, LATENTS)
    assert {key: tuple(value.shape) for key, value in predictions.items()} == {
        ("gen", 3): (2, 6),
        ("depth", 2): (2, 2, 2, 10),
        ("depth", 3): (2, 2, 2, 10),
    }
    for item, (before, after) in enumerate(((2, 3), (1, 1))):
        image = list(range(before, before + 4))
        own = {"gen": [before + 4, before + 5], "depth": [before + 6, before + 7]}
        text_before = [] if context == "image" else list(range(before))
        text_after = list(range(before + 8, before + 8 + after)) if context == "all" else []
        for (teacher, layer), predicted in predictions.items():
            state = taps[layer][item]
            seen = state[text_before + image + own[teacher] + text_after]
            queries = LATENTS["depth"] if teacher == "depth" else state[own["gen"]].mean(0, keepdim=True)
            expected = by_hand(made.head(teacher, layer), seen, queries, made.configs[teacher])
            torch.testing.assert_close(predicted[item].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_predictors_read_every_task_token_of_their_own_in_the_format_emb() -> None:
    """A map's four vectors stand in the sequence; the vector's queries are the mean of its two states, no more."""
    every = TaskTokens.model_validate(
        TOKENS.model_dump() | {"task_format": "emb", "ids": {"gen": (60, 61), "depth": (62, 63, 64, 65)}}
    )
    made = bank(every)
    items = layout([5, *IMAGE, *every.flat, 7], tokens=every)
    taps = states(1, 12)
    for (teacher, layer), predicted in made(taps, items, LATENTS).items():
        state = taps[layer][0]
        seen = state[[0, 1, 2, 3, 4, *((5, 6) if teacher == "gen" else (7, 8, 9, 10)), 11]]
        queries = LATENTS["depth"] if teacher == "depth" else state[[5, 6]].mean(0, keepdim=True)
        expected = by_hand(made.head(teacher, layer), seen, queries, made.configs[teacher])
        torch.testing.assert_close(predicted[0].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def changed(made: PredictorBank, items: Items, position: int) -> set[str]:
    """Teachers whose prediction of item 0 notices another state at `position`."""
    taps = states(2, 13)
    other = {layer: state.clone() for layer, state in taps.items()}
    for state in other.values():
        state[0, position] += 1.0
    first, second = made(taps, items, LATENTS), made(other, items, LATENTS)
    return {teacher for (teacher, layer), p in first.items() if not torch.equal(p[0], second[teacher, layer][0])}


@pytest.mark.parametrize(
    ("context", "text_before", "text_after"), [("image", False, False), ("prompt", True, False), ("all", True, True)]
)
def test_predictors_read_only_what_the_context_allows(context: str, text_before: bool, text_after: bool) -> None:
    made = bank(context=context)
    items = layout(row(2, 1), row(2, 3))  # the first sample is padded by two
    both = {"gen", "depth"}
    assert changed(made, items, 0) == (both if text_before else set())
    assert changed(made, items, 3) == both
    assert changed(made, items, 6) == {"gen"}
    assert changed(made, items, 9) == {"depth"}
    assert changed(made, items, 10) == (both if text_after else set())
    assert changed(made, items, 12) == set()  # padding


def test_padding_is_read_only_for_compatibility() -> None:
    items = layout(row(2, 1), row(2, 3))
    assert changed(bank(context="all", compat="ola"), items, 12) == {"gen", "depth"}
    assert changed(bank(context="prompt", compat="ola"), items, 12) == set()


def test_a_padded_sample_predicts_what_it_predicts_alone() -> None:
    made = bank()
    taps = states(2, 13)
    together = made(taps, layout(row(2, 1), row(2, 3)), LATENTS)
    alone = made({n: s[:1, :11] for n, s in taps.items()}, layout(row(2, 1)), LATENTS)
    for key, predicted in alone.items():
        torch.testing.assert_close(together[key][:1], predicted, rtol=1e-5, atol=1e-6)


def test_two_images_of_a_sample_predict_from_their_own() -> None:
    made = bank(context="image")
    double = IMAGE + list(TOKENS.flat) + IMAGE + list(TOKENS.flat)
    items = layout(double)
    taps = states(1, len(double))
    predictions = made(taps, items, LATENTS)
    # without text, each half alone is the same as a sample of one image
    for n, half in enumerate((slice(0, 8), slice(8, 16))):
        single = made({k: s[:, half] for k, s in taps.items()}, layout(double[:8]), LATENTS)
        for key, predicted in single.items():
            torch.testing.assert_close(predictions[key][n : n + 1], predicted, rtol=1e-5, atol=1e-6)


def test_teachers_in_another_order_read_their_own_tokens() -> None:
    swapped = task_tokens(("depth", "gen"))
    made, taps = bank(), states(1, 11)
    exchanged = bank(swapped)
    exchanged.load_state_dict(made.state_dict())
    ids = [5] * 2 + IMAGE + [*swapped.flat] + [7]
    one = made(taps, layout(row(2, 1)), LATENTS)
    # the same states, with the four at the task tokens exchanged as the layout exchanges them
    order = [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10]
    two = exchanged({n: s[:, order] for n, s in taps.items()}, layout(ids, tokens=swapped), LATENTS)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)


def test_without_task_tokens_predictors_own_their_latents_and_read_everything() -> None:
    none = task_tokens(size=0)
    configs = {
        "depth": PredictorConfig(shape=(2, 2, 10), layers=(2,), width=10, heads=2, head_width=4),
        "gen": PredictorConfig(shape=(6,), layers=(3,), width=6, heads=2, head_width=4),
    }
    made = PredictorBank(configs, none, hidden_size=HIDDEN, seed=0)
    resampler = made.head("depth", 2).projector
    assert resampler.latents is not None
    assert resampler.latents.shape == (1, 4, 10)
    items = layout([5, *IMAGE, 7], tokens=none)
    predictions = made(states(1, 6), items, {})
    assert predictions["depth", 2].shape == (1, 2, 2, 10)
    sum(p.sum() for p in predictions.values()).backward()  # type: ignore[union-attr]
    assert resampler.latents.grad is not None
    moved = states(1, 6)
    moved[2][:, 5] += 1.0
    assert not torch.equal(made(moved, items, {})["depth", 2], predictions["depth", 2])


def test_a_batch_of_text_predicts_nothing_and_gives_zero_gradients() -> None:
    made = bank()
    latents = {teacher: torch.nn.Parameter(value) for teacher, value in LATENTS.items()}
    predictions = made(states(2, 5), layout([5] * 5, [6] * 3), latents)
    assert all(len(p) == 0 for p in predictions.values())
    sum(p.sum() for p in predictions.values()).backward()  # type: ignore[union-attr]
    for name, parameter in made.heads.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name


def test_a_half_precision_student_is_read_in_the_predictors_precision() -> None:
    made, items, taps = bank(), layout(row(2, 1)), states(1, 11)
    half = {layer: state.bfloat16() for layer, state in taps.items()}
    exact = made({layer: state.float() for layer, state in half.items()}, items, LATENTS)
    for key, predicted in made(half, items, LATENTS).items():
        assert torch.equal(predicted, exact[key])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for key, predicted in made(half, items, LATENTS).items():
            assert (predicted - exact[key]).norm() < 0.03 * exact[key].norm()


def test_linear_2_and_3_are_kept_and_do_not_train() -> None:
    head = bank().head("depth", 2)
    trained = {name for name, p in head.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"projector", "linear_1"}
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {
        "projector", "linear_1", "linear_2", "linear_3"
    }  # fmt: skip


def test_names_and_shapes_are_those_of_published_checkpoints(request: pytest.FixtureRequest) -> None:
    golden = load_file(request.config.rootpath / "tests/golden/e2e_intermediate/model.safetensors")
    config = PredictorConfig(shape=(4, 4, 24), layers=(3,), width=64, head_width=8, intermediate=True)
    ours = {name: tuple(p.shape) for name, p in Predictor(config, 64, own_latents=False).state_dict().items()}
    prefix = "image_depth_heads.0."
    assert ours == {n.removeprefix(prefix): tuple(v.shape) for n, v in golden.items() if n.startswith(prefix)}


def test_published_settings() -> None:
    depth = published_predictor("depth", (24, 24, 1024), (18, 20), hidden_size=4096, tokens_per_teacher=8)
    assert (depth.width, depth.intermediate, depth.queries, depth.latents(8)) == (4096, True, 576, 576)
    assert (depth.heads, depth.head_width, depth.ff_mult, depth.blocks) == (4, 32, 1, 1)
    bare = published_predictor("depth", (24, 24, 1024), (18, 20), hidden_size=4096, tokens_per_teacher=0)
    assert bare.width == 1024
    seg = published_predictor("seg", (24, 24, 1536), (10, 18), hidden_size=4096, tokens_per_teacher=8)
    assert (seg.width, seg.intermediate, seg.latents(8)) == (1536, False, 576)
    gen = published_predictor("gen", (1024,), (12, 20), hidden_size=4096, tokens_per_teacher=8)
    assert (gen.width, gen.queries, gen.latents(8)) == (1024, 1, 8)


def test_teachers_of_few_channels_have_predictors_that_can_tell_them_apart() -> None:
    latents = published_predictor("sd-vae", (64, 64, 4), (18,), hidden_size=4096, tokens_per_teacher=8)
    assert (latents.width, latents.norm, latents.intermediate) == (4096, False, False)
    small = published_predictor("dinov2", (16, 16, 384), (18,), hidden_size=4096, tokens_per_teacher=8)
    assert (small.width, small.norm) == (384, True)
    # what the published layer norm makes of a map of one number a cell, whatever the image
    shape, given = (2, 2, 1), states(3, 9)[2]
    found = published_predictor("map", shape, (2,), hidden_size=HIDDEN, tokens_per_teacher=2)
    queries, mask = torch.randn(1, 4, HIDDEN), torch.ones(3, 9, dtype=torch.bool)
    for config, tells in ((found, True), (found.model_copy(update={"norm": True}), False)):
        predicted = Predictor(config, HIDDEN, own_latents=False)(given, queries, torch.arange(3), mask)
        assert (float(predicted.detach().std(dim=0).mean()) > 0.01) is tells
        assert predicted.shape == (3, 4, 1)


def test_a_seed_fixes_the_weights_and_disturbs_no_other_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one = PredictorBank({"gen": GEN}, TOKENS, hidden_size=HIDDEN, seed=1)
    assert torch.equal(torch.rand(1), expected)
    two = PredictorBank({"gen": GEN}, TOKENS, hidden_size=HIDDEN, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.logit_scales["gen"].item() == 2.0


def test_a_teacher_without_task_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="composed for gen, depth, not for seg"):
        PredictorBank({"seg": DEPTH}, TOKENS, hidden_size=HIDDEN, seed=0)
