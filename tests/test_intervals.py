# SPDX-License-Identifier: Apache-2.0
"""Intervals against likelihoods maximised by search, McNemar's test, and experiments in which the truth is known."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from nearsight.training.intervals import paired, tango, wilson

Z = norm.ppf(0.975)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (36, 37), (37, 37), (9413, 10000)])
def test_wilson_is_scipys(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((right / count, expected.low, expected.high), abs=1e-12)


def score(better, worse, count, difference):
    """Tango's statistic, with the likeliest shares under the difference found by search and not by its formula."""
    same = count - better - worse

    def unlikeliness(q):  # shares: q of worse, q + difference of better
        shares = np.array([q + difference, q, 1 - 2 * q - difference])
        return -np.sum(np.array([better, worse, same]) * np.log(np.clip(shares, 1e-300, None)))

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    q = minimize_scalar(unlikeliness, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (better - worse - count * difference) / np.sqrt(count * (2 * q + difference * (1 - difference)))


@pytest.mark.parametrize(("better", "worse", "count"), [(12, 2, 50), (2, 12, 50), (1, 3, 37), (30, 25, 360)])
def test_tangos_interval_ends_where_its_score_is_z(better, worse, count):
    found = tango(better, worse, count)
    assert score(better, worse, count, found.low) == pytest.approx(Z, abs=1e-4)
    assert score(better, worse, count, found.high) == pytest.approx(-Z, abs=1e-4)


def test_a_difference_is_told_from_zero_exactly_where_mcnemars_test_rejects():
    for better in range(20):
        for worse in range(20):
            rejects = (better - worse) ** 2 > Z**2 * (better + worse)
            assert tango(better, worse, 45).spans_zero is not rejects


@pytest.mark.parametrize("count", [3, 37])
def test_models_that_agree_on_every_image_may_differ_on_others(count):
    right = np.ones((1, count), dtype=bool)
    assert paired(right, right) == pytest.approx((0, -(Z**2) / (count + Z**2), Z**2 / (count + Z**2)))
    assert paired(np.repeat(right, 2, 0), np.repeat(right, 2, 0)).spans_zero


def test_three_images_tell_no_winner_however_many_seeds_repeat_them():
    for seeds in (1, 2, 5):
        assert paired(np.ones((seeds, 3), dtype=bool), np.zeros((seeds, 3), dtype=bool)).spans_zero
    assert not paired(np.ones((1, 37), dtype=bool), np.zeros((1, 37), dtype=bool)).spans_zero


def test_the_same_images_and_seeds_are_paired():
    """Two models that are wrong on many images, but on the same ones, are told apart by the few where they part."""
    hard = np.arange(400) % 2 == 0
    model, other = np.stack([hard, hard]), np.stack([hard, hard])
    other[:, :24:2] = False
    assert not paired(model, other).spans_zero
    assert paired(model, np.roll(other, 1, axis=1)).spans_zero  # as if other images had been shown


def test_what_moves_with_the_seed_is_no_difference():
    """On many images a seed's luck outweighs theirs: the interval has to know of it."""
    rng = np.random.default_rng(0)
    shares = np.array([[0.95], [0.90], [0.94]])
    lucky = rng.random((3, 20000)) < shares
    assert paired(lucky, rng.random((3, 20000)) < shares[::-1]).spans_zero
    steady = paired(lucky, rng.random((3, 20000)) < shares - 0.1)
    assert 0 < steady.low < 0.1 < steady.high


@pytest.mark.parametrize(("seeds", "images"), [(2, 37), (3, 500)])
def test_intervals_of_equal_models_span_zero_as_often_as_they_say(seeds, images):
    """Images of any difficulty, networks whose skill moves with the seed: at least 95 % of 200 experiments."""
    rng = np.random.default_rng(1)

    def answers(difficulty):
        skill = 2.2 + rng.normal(0, 0.2, (seeds, 1))
        return skill + difficulty + rng.normal(0, 0.4, images) + rng.logistic(0, 0.7, (seeds, images)) > 0

    spans = 0
    for _ in range(200):
        difficulty = rng.normal(0, 1.5, images)
        spans += paired(answers(difficulty), answers(difficulty)).spans_zero
    assert spans >= 184  # four standard deviations below 190 would be 178
