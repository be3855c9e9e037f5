"""Losses against arithmetic in plain Python, and the invariances that training relies on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from olatrain.losses import (
    Counts,
    LossConfig,
    LossReport,
    Regression,
    Targets,
    compute_losses,
    count,
    info_nce_loss,
    next_token_loss,
    regression_loss,
    smooth_l1_loss,
    supervised_positions,
)

GENERATOR = torch.Generator().manual_seed(0)
PREDICTED = torch.randn(5, 2, 2, 3, generator=GENERATOR)
VALUES = torch.randn(5, 2, 2, 3, generator=GENERATOR) * 2
ROWS = torch.tensor([10, 11, 12, 13, 14])
ALL = torch.ones(5, dtype=torch.bool)
SCALE = torch.tensor(2.0)


def smooth_l1(p: np.ndarray, t: np.ndarray) -> float:
    d = np.abs(p - t)
    return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())


def nce(prediction: Tensor, target: Tensor, negatives: list[Tensor], scale: float) -> float:
    def cosine(a: Tensor, b: Tensor) -> float:
        x, y = a.double().flatten().numpy(), b.double().flatten().numpy()
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    positive = math.exp(scale * cosine(prediction, target))
    return -math.log(positive / (positive + sum(math.exp(scale * cosine(prediction, n)) for n in negatives)))


def targets(valid: Tensor = ALL, rows: Tensor = ROWS, values: Tensor = VALUES) -> Targets:
    return Targets.local(values, valid, rows)


def test_smooth_l1_is_the_sum_over_valid_items_of_their_mean() -> None:
    valid = torch.tensor([True, False, True, True, False])
    got = smooth_l1_loss(PREDICTED, targets(valid))
    expected = sum(smooth_l1(PREDICTED[i].numpy(), VALUES[i].numpy()) for i in (0, 2, 3))
    assert got.total.item() == pytest.approx(expected, rel=1e-6)
    assert got.count.item() == 3


def test_info_nce_scores_valid_items_against_valid_negatives() -> None:
    valid = torch.tensor([True, False, True, True, False])
    got = info_nce_loss(PREDICTED, targets(valid), SCALE)
    expected = sum(
        nce(PREDICTED[i], VALUES[i], [VALUES[j] for j in (0, 2, 3) if j != i], math.exp(2.0)) for i in (0, 2, 3)
    )
    assert got.total.item() == pytest.approx(expected, rel=1e-5)
    assert got.count.item() == 3


def test_two_uses_of_one_image_are_not_each_others_negatives() -> None:
    values = VALUES.clone()
    values[3] = values[0]
    rows = torch.tensor([10, 11, 12, 10, 14])
    got = info_nce_loss(PREDICTED, targets(rows=rows, values=values), SCALE)
    expected = sum(
        nce(PREDICTED[i], values[i], [values[j] for j in range(5) if rows[j] != rows[i]], math.exp(2.0))
        for i in range(5)
    )
    assert got.total.item() == pytest.approx(expected, rel=1e-5)


def test_the_temperature_is_learned_and_clamped_at_100() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    info_nce_loss(PREDICTED, targets(), scale).total.backward()
    step = 1e-3
    numeric = sum(
        sign * nce(PREDICTED[i], VALUES[i], [VALUES[j] for j in range(5) if j != i], math.exp(2.0 + sign * step))
        for i in range(5)
        for sign in (1, -1)
    ) / (2 * step)
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(numeric, rel=1e-3)
    large = info_nce_loss(PREDICTED, targets(), torch.tensor(9.0)).total
    assert torch.equal(large, info_nce_loss(PREDICTED, targets(), torch.tensor(math.log(100.0) + 1)).total)
    at_limit = nce(PREDICTED[0], VALUES[0], [VALUES[j] for j in range(1, 5)], 100.0)
    alone = Targets(VALUES, ALL, ROWS, torch.tensor([0]))
    assert info_nce_loss(PREDICTED[:1], alone, torch.tensor(9.0)).total.item() == pytest.approx(at_limit, rel=1e-4)


def test_targets_carry_no_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    prediction = PREDICTED.clone().requires_grad_()
    info_nce_loss(prediction, targets(values=values), SCALE).total.backward()
    assert values.grad is None
    assert prediction.grad is not None


# --- text ---

VOCABULARY = 7
LOGITS = torch.randn(2, 5, VOCABULARY, generator=GENERATOR)
LABELS = torch.tensor([[-100, 3, 1, -100, 2], [0, -100, -100, 6, 4]])
NEVER = (5, 6)


def text_by_hand(never: tuple[int, ...], skip: set[tuple[int, int]]) -> float:
    total = 0.0
    for b in range(2):
        for position in range(1, 5):
            label = int(LABELS[b, position])
            if label == -100 or (b, position) in skip:
                continue
            scores = {v: math.exp(LOGITS[b, position - 1, v].item()) for v in range(VOCABULARY) if v not in never}
            total -= math.log(scores[label] / sum(scores.values()))
    return total


def test_next_token_loss_leaves_the_ids_out_of_the_softmax() -> None:
    got = next_token_loss(LOGITS, LABELS, NEVER)
    # label 6 is such an id itself: nothing to predict. The label at position 0 is never predicted.
    assert got.total.item() == pytest.approx(text_by_hand(NEVER, {(1, 3)}), rel=1e-5)
    assert got.count.item() == 4
    plain = next_token_loss(LOGITS, LABELS, ())
    assert plain.total.item() == pytest.approx(text_by_hand((), set()), rel=1e-5)
    assert plain.count.item() == 5
    expected = torch.nn.functional.cross_entropy(LOGITS[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    assert plain.mean.item() == pytest.approx(expected.item(), rel=1e-6)


def test_only_the_positions_needed_give_the_same_loss() -> None:
    keep = supervised_positions(LABELS)
    assert keep.tolist() == [0, 1, 2, 3]
    assert supervised_positions(torch.tensor([[-100, -100, 4, -100]])).tolist() == [1]
    assert supervised_positions(torch.full((2, 3), -100)).tolist() == [0]
    sparse = LABELS.clone()
    sparse[:, 1] = -100
    keep = supervised_positions(sparse)
    assert keep.tolist() == [1, 2, 3]
    whole = next_token_loss(LOGITS, sparse, NEVER)
    part = next_token_loss(LOGITS[:, keep], sparse, NEVER, keep=keep)
    assert torch.allclose(whole.total, part.total)
    assert whole.count == part.count


# --- together ---


def losses(prediction: Tensor, given: Targets, counts: Counts, logits: Tensor, labels: Tensor) -> LossReport:
    return compute_losses(
        LossConfig(),
        counts,
        logits=logits,
        labels=labels,
        never_predicted=NEVER,
        predictions={("depth", 1): prediction, ("depth", 3): prediction * 0.5},
        targets={"depth": given},
        logit_scales={"depth": SCALE},
    )


def test_the_parts_add_up_with_the_published_weights() -> None:
    given = targets()
    report = losses(PREDICTED, given, count(LABELS, {"depth": given}, NEVER), LOGITS, LABELS)
    expected = text_by_hand(NEVER, {(1, 3)}) / 4
    for factor in (1.0, 0.5):
        smooth = sum(smooth_l1(factor * PREDICTED[i].numpy(), VALUES[i].numpy()) for i in range(5)) / 5
        contrast = (
            sum(nce(PREDICTED[i], VALUES[i], [VALUES[j] for j in range(5) if j != i], math.exp(2.0)) for i in range(5))
            / 5
        )
        expected += 0.5 * (smooth + 0.3 * contrast)
    assert report.loss.item() == pytest.approx(expected, rel=1e-5)
    assert set(report.smooth_l1) == set(report.contrastive) == {("depth", 1), ("depth", 3)}


def test_weights_apply_by_teacher() -> None:
    given = targets()
    counts = count(LABELS, {"depth": given}, NEVER)
    config = LossConfig(text=0.0, teachers={"depth": 2.0}, contrastive=0.0)
    report = compute_losses(
        config,
        counts,
        logits=LOGITS,
        labels=LABELS,
        never_predicted=NEVER,
        predictions={("depth", 1): PREDICTED},
        targets={"depth": given},
        logit_scales={"depth": SCALE},
    )
    assert report.loss.item() == pytest.approx(2.0 * report.smooth_l1["depth", 1].mean.item(), rel=1e-6)


def test_a_batch_split_over_ranks_gives_the_loss_and_gradient_of_the_whole() -> None:
    """Uneven shares: 1 sample and 2 items on one rank, 1 sample and 3 items on the other, one item masked."""
    valid = torch.tensor([True, True, False, True, True])
    whole_targets = targets(valid)
    counts = count(LABELS, {"depth": whole_targets}, NEVER)
    prediction, logits = PREDICTED.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    whole = losses(prediction, whole_targets, counts, logits, LABELS)
    whole.loss.backward()

    shares = (([0, 1], slice(0, 1)), ([2, 3, 4], slice(1, 2)))
    part_prediction, part_logits = PREDICTED.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    total, tokens, items = 0.0, 0, 0
    for own, samples in shares:
        given = Targets(VALUES, valid, ROWS, torch.tensor(own))
        local = count(LABELS[samples], {"depth": given}, NEVER)
        tokens += int(local.tokens)
        items += int(local.items["depth"])
        report = losses(part_prediction[own], given, counts, part_logits[samples], LABELS[samples])
        report.loss.backward()
        total += report.loss.item()
    assert (tokens, items) == (int(counts.tokens), int(counts.items["depth"])) == (4, 4)
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    assert prediction.grad is not None
    assert logits.grad is not None
    torch.testing.assert_close(part_prediction.grad, prediction.grad)
    torch.testing.assert_close(part_logits.grad, logits.grad)

    # with its own targets only, a rank has fewer negatives: the loss is another one
    narrow = 0.0
    for own, samples in shares:
        given = Targets.local(VALUES[own], valid[own], ROWS[own])
        narrow += losses(PREDICTED[own], given, counts, LOGITS[samples], LABELS[samples]).loss.item()
    assert narrow < total - 0.01


@pytest.mark.parametrize("rubbish", [0.0, 1e30, math.nan, math.inf])
def test_a_masked_item_is_as_if_it_were_left_out(rubbish: float) -> None:
    valid = torch.tensor([True, True, False, True, True])
    values = VALUES.clone()
    values[2] = rubbish
    prediction = PREDICTED.clone().requires_grad_()
    given = targets(valid, values=values)
    report = losses(prediction, given, count(LABELS, {"depth": given}, NEVER), LOGITS, LABELS)
    report.loss.backward()

    without = PREDICTED[valid].clone().requires_grad_()
    left = Targets.local(VALUES[valid], torch.ones(4, dtype=torch.bool), ROWS[valid])
    expected = losses(without, left, count(LABELS, {"depth": left}, NEVER), LOGITS, LABELS)
    expected.loss.backward()
    assert report.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert prediction.grad is not None
    assert (prediction.grad[2] == 0).all()
    torch.testing.assert_close(prediction.grad[valid], without.grad)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine"])
def test_no_distance_is_counted_of_a_masked_item(kind: Regression) -> None:
    """The cosine of two zeroed vectors is 0, so its distance is not: there the mask alone keeps it out."""
    valid = torch.tensor([True, True, False, True, False])
    left = Targets.local(VALUES[valid], torch.ones(3, dtype=torch.bool), ROWS[valid])
    got, expected = regression_loss(kind, PREDICTED, targets(valid)), regression_loss(kind, PREDICTED[valid], left)
    assert got.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert got.count == expected.count == 3


@pytest.mark.parametrize("items", [5, 0])
def test_nothing_valid_is_exactly_zero_with_zero_gradient(items: int) -> None:
    prediction = PREDICTED[:items].clone().requires_grad_()
    logits = LOGITS.clone().requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    labels = torch.full_like(LABELS, -100)
    values = torch.full_like(VALUES[:items], math.nan)
    given = Targets.local(values, torch.zeros(items, dtype=torch.bool), ROWS[:items])
    report = compute_losses(
        LossConfig(),
        count(labels, {"depth": given}, NEVER),
        logits=logits,
        labels=labels,
        never_predicted=NEVER,
        predictions={("depth", 1): prediction},
        targets={"depth": given},
        logit_scales={"depth": scale},
    )
    assert report.loss.item() == 0.0
    assert report.text.mean.item() == report.smooth_l1["depth", 1].mean.item() == 0.0
    report.loss.backward()
    for tensor in (prediction, logits, scale):
        assert tensor.grad is not None
        assert (tensor.grad == 0).all()


def test_autocast_does_not_lower_the_precision_of_the_losses() -> None:
    given = targets()
    counts = count(LABELS, {"depth": given}, NEVER)
    expected = losses(PREDICTED, given, counts, LOGITS, LABELS).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses(PREDICTED, given, counts, LOGITS, LABELS).loss, expected)
