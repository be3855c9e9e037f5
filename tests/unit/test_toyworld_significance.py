"""Intervals and p-values of the toy world's results, on tables of answers whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from toyworld_support import load, on_the_path

__all__ = ["on_the_path"]


def covered(seeds: int, of_seeds: float, of_images: float, of_rest: float, trials: int = 400) -> tuple[float, float]:
    """Of simulated tables with effects of these sizes: the share of intervals with the true mean 0, and of p < 5 %."""
    crossed = load("significance").crossed
    rng, images = np.random.default_rng(7), np.arange(60)
    values = rng.normal(0, 1, (trials, seeds, 1)) * of_seeds + rng.normal(0, 1, (trials, 1, len(images))) * of_images
    values = values + rng.normal(0, 1, (trials, seeds, len(images))) * of_rest
    found = [crossed(table, images) for table in values]
    return float(np.mean([e.low <= 0 <= e.high for e in found])), float(np.mean([e.p < 0.05 for e in found]))


@pytest.mark.parametrize("seeds", [1, 2, 5, 10])
@pytest.mark.parametrize(
    ("of_seeds", "of_images", "of_rest"),
    [(0, 0, 0.4), (0.02, 0, 0.4), (0, 0.3, 0.2), (0.02, 0.3, 0.3), (0.03, 0.1, 0.4), (0.3, 0.1, 0.1)],
)
def test_intervals_of_crossed_seeds_and_images_cover(
    seeds: int, of_seeds: float, of_images: float, of_rest: float
) -> None:
    share, rejected = covered(seeds, 0 if seeds == 1 else of_seeds, of_images, of_rest)
    assert 0.90 <= share <= 0.995
    assert rejected == pytest.approx(1 - share), "the p-value is that of the interval"


def test_two_seeds_that_differ_as_much_as_the_rest_hides_are_covered_least() -> None:
    assert 0.85 <= covered(2, 0.1, 0.2, 0.2, trials=800)[0] < 0.93


def test_the_error_is_that_of_the_mean_squares() -> None:
    crossed = load("significance").crossed
    table = np.array([[0.1, 0.4, 0.5, 0.2], [0.3, 0.9, 0.4, 0.4], [0.5, 0.7, 0.9, 0.6]])
    seeds, images = table.shape
    of_seed, of_image = images * table.mean(axis=1).var(ddof=1), seeds * table.mean(axis=0).var(ddof=1)
    whole = ((table - table.mean()) ** 2).sum()
    rest = (whole - of_seed * (seeds - 1) - of_image * (images - 1)) / 6  # sums of squares add up
    assert min(of_seed, of_image) > rest
    found = crossed(table, np.array(list("abcd")))
    assert found.value == pytest.approx(100 * table.mean())
    assert found.error == pytest.approx(100 * np.sqrt((of_seed + of_image - rest) / 12))
    assert found.of_images == pytest.approx(1e4 * (of_image - rest) / 12)
    assert found.spread == pytest.approx(100 * table.mean(axis=1).std(ddof=1))
    # a component estimated below 0 counts as 0: what one of seeds adds is not taken from what images say
    level = table - table.mean(axis=1, keepdims=True)
    assert crossed(level, np.arange(4)).error == pytest.approx(100 * np.sqrt(of_image / 12))
    flat = level - level.mean(axis=0)
    assert crossed(flat, np.arange(4)).error == pytest.approx(100 * np.sqrt(rest / 12))


def test_questions_of_one_image_count_together() -> None:
    crossed = load("significance").crossed
    rng = np.random.default_rng(2)
    table = (rng.random((6, 30)) < 0.6).astype(np.float64)
    once, twice = crossed(table, np.arange(30)), crossed(np.repeat(table, 2, axis=1), np.repeat(np.arange(30), 2))
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high))
    assert crossed(np.repeat(table, 2, axis=1), np.arange(60)).error < once.error
    # images with unlike numbers of questions: the mean stays that over questions
    groups = np.minimum(np.arange(30), 20)
    assert crossed(table, groups).value == pytest.approx(100 * table.mean())
    shuffled = rng.permutation(30)
    again = crossed(table[:, shuffled], groups[shuffled])
    assert (again.low, again.high) == pytest.approx((crossed(table, groups).low, crossed(table, groups).high))


def test_tables_that_leave_nothing_to_estimate() -> None:
    crossed = load("significance").crossed
    groups = np.array([0, 0, 0, 1, 2, 2])
    for seeds in (1, 5):
        sure = crossed(np.full((seeds, 6), 0.3), groups)
        assert (sure.value, sure.low, sure.high, sure.p) == pytest.approx((30.0, 30.0, 30.0, 0.0))
        assert crossed(np.zeros((seeds, 6)), groups).p == 1.0
    one_seed = crossed(np.array([[0.0, 1.0, 1.0, 1.0]]), np.arange(4))
    assert one_seed.error == pytest.approx(100 * 0.5 / 2)  # SD 0.5 of four images
    assert np.isnan([one_seed.spread, one_seed.of_images]).all()
    one_image = crossed(np.array([[0.0, 0.5], [0.5, 1.0], [1.0, 1.0]]), np.zeros(2))
    assert one_image.error == pytest.approx(100 * np.std([0.25, 0.75, 1.0], ddof=1) / 3**0.5)
    alone = crossed(np.array([[0.5, 1.0]]), np.zeros(2))
    assert (alone.value, alone.low, alone.high, alone.p) == (75.0, -np.inf, np.inf, 1.0)


def test_p_values_are_corrected_for_the_whole_family() -> None:
    holm = load("significance").holm
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.01, "not run": 1.0, "nor this": 1.0})["a"] == pytest.approx(0.03)


def test_the_seeds_needed_take_the_images_into_account() -> None:
    significance = load("significance")

    def needed(value: float, of_seeds: float, of_images: float, seeds: int = 5) -> float:
        error = (of_seeds**2 / seeds + of_images) ** 0.5
        found = significance.Estimate(value, 0, 0, seeds, of_seeds, error, of_images, 0.5)
        return float(significance.seeds_needed(found))

    rng = np.random.default_rng(0)
    for value, spread in ((7.5, 8.0), (7.5, 2.3), (1.0, 8.0)):
        number = int(needed(value, spread, 0.0))  # the images add nothing: Student's t test of so many seeds
        for seeds, least, most in ((number, 0.79, 1.0), (number - 1, 0.0, 0.81)):
            if seeds > 1:
                drawn = rng.normal(value, spread, (4000, seeds))
                assert least < float((ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()) < most
    assert needed(7.5, 8.0, 1.0) > needed(7.5, 8.0, 0.0)
    assert needed(2.0, 1.0, 1.0) == float("inf")
    assert np.isnan(needed(7.5, 8.0, 0.0, seeds=4))


def test_so_many_seeds_as_are_needed_find_the_difference() -> None:
    significance = load("significance")
    rng = np.random.default_rng(4)

    def table(seeds: int) -> Any:
        images = np.tile([0.1, -0.1], 40) * (79 / 80) ** 0.5  # the same pictures, of a variance of 0.1²
        answers = rng.normal(0, 0.05, (seeds, 1)) + images + rng.normal(0, 0.3, (seeds, 80))
        return answers - answers.mean() + 0.04

    needed = np.median([significance.seeds_needed(significance.crossed(table(400), np.arange(80))) for _ in range(3)])
    # (0.05² + 0.3² / 80) / ((0.04 / 2.8016)² − 0.1² / 80): what images add stays, what the rest adds goes down
    assert needed == pytest.approx(48, abs=6)


def test_rank_correlations_are_spearmans_and_what_a_third_explains_is_taken_out() -> None:
    from scipy.stats import spearmanr

    significance = load("significance")
    rng = np.random.default_rng(5)
    x, noise = rng.normal(size=60), rng.normal(size=60)
    found = significance.rank_correlation(x, x + noise)
    assert found.value == pytest.approx(spearmanr(x, x + noise).statistic)
    assert found.low < found.value < found.high
    # both follow a third and nothing else
    third = rng.normal(size=400)
    x, y = third + 0.3 * rng.normal(size=400), third + 0.3 * rng.normal(size=400)
    assert significance.rank_correlation(x, y).value > 0.8
    left = significance.rank_correlation(x, y, third)
    assert abs(left.value) < 0.2
    assert left.low < 0 < left.high
    # the partial correlation by its textbook formula
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((x, y), (x, third), (y, third)))
    assert left.value == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))
    apart = significance.rank_correlation(x, y, minus=rng.normal(size=400))
    assert apart.low > 0.5
    # ten students of which there are four copies each are no more than ten
    few, noise = rng.normal(size=10), rng.normal(size=10)
    groups = np.repeat(np.arange(10), 4)
    copies = [np.repeat(values, 4) for values in (few, few + noise)]
    alone = significance.rank_correlation(few, few + noise)
    together = significance.rank_correlation(*copies, groups=groups)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=0.05)


def test_students_of_one_tower_change_places_together() -> None:
    significance = load("significance")
    towers = np.repeat(np.arange(5), 3)
    x = np.repeat([0.1, 0.2, 0.3, 0.4, 0.5], 3)
    # 2 of the 120 orders of five towers are as far from 0 as that found: itself and its reverse
    assert significance.permutation_p(x, x, towers) == pytest.approx(2 / 120)
    # the same students as if each were of its own tower
    assert significance.permutation_p(x, x, np.arange(15)) < 2 / 120
    rng = np.random.default_rng(1)
    p = []
    for _ in range(60):  # nothing but towers: half of the p-values are below a half
        tower, other = rng.normal(size=(2, 5))
        p.append(significance.permutation_p(np.repeat(tower, 3), np.repeat(other, 3), towers))
    assert 0.3 < np.mean([value <= 0.5 for value in p]) < 0.7
    assert np.isnan(significance.permutation_p(np.ones(15), x, towers))
    # towers of unlike numbers of students do not change places: two pairs and two alone have four orders
    mixed, y = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert significance.permutation_p(mixed, y, [0, 0, 1, 1, 2, 3]) == pytest.approx(1 / 4)
    assert np.isnan(significance.permutation_p(x[:3], np.arange(3.0), [0, 0, 1]))
