"""Exact bounds: by hand, against an independent implementation, and never an interval of no width."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from experiments.statistics.clusters import bootstrap_interval, cluster_weights
from experiments.statistics.exact import (
    agreeing,
    clopper_pearson,
    never_zero_width,
    other_share,
    rare,
    share_difference,
)


def test_clopper_pearson_by_hand_and_against_statsmodels() -> None:
    lower, upper = clopper_pearson(0, 13)
    assert lower == 0 and upper == pytest.approx(1 - 0.025 ** (1 / 13)) == pytest.approx(0.24705, abs=1e-5)
    lower, upper = clopper_pearson(13, 13)
    assert upper == 1 and lower == pytest.approx(0.025 ** (1 / 13))
    counts = np.arange(21)
    lower, upper = clopper_pearson(counts, 20, 0.9)
    other = np.array([proportion_confint(k, 20, alpha=0.1, method="beta") for k in counts])
    np.testing.assert_allclose(lower, other[:, 0], atol=1e-12)
    np.testing.assert_allclose(upper, other[:, 1], atol=1e-12)
    assert [float(side) for side in clopper_pearson(0, 0)] == [0.0, 1.0]
    with pytest.raises(ValueError, match="successes must lie in 0..n"):
        clopper_pearson(3, 2)


def test_all_right_all_wrong_and_no_difference_get_width_and_the_others_keep_theirs() -> None:
    counts = np.ones((4, 13))
    sums = np.stack([np.ones(13), np.zeros(13), np.r_[np.ones(12), 0.0], np.full(13, 0.0)])
    weights = cluster_weights(13, 500, 0)
    lower, upper = bootstrap_interval(sums, counts, weights=weights, bounds=(0.0, 1.0))
    assert (upper - lower == 0).tolist() == [True, True, False, True]  # the control: what the bootstrap says
    new_lower, new_upper, replaced = never_zero_width(lower, upper, sums, counts, bounds=(0.0, 1.0))
    share = 1 - 0.025 ** (1 / 13)
    assert replaced.tolist() == [True, True, False, True]
    np.testing.assert_allclose([new_lower[0], new_upper[0]], [1 - share, 1.0])
    np.testing.assert_allclose([new_lower[1], new_upper[1]], [0.0, share])
    assert (new_lower[2], new_upper[2]) == (lower[2], upper[2])
    assert (new_upper > new_lower).all()


def test_a_difference_is_bounded_by_what_the_baseline_leaves() -> None:
    sums, counts = np.zeros((2, 200)), np.ones((2, 200))
    zero = np.zeros(2)
    share = 1 - 0.025 ** (1 / 200)
    baseline = np.array([0.795, 1.0])
    lower, upper, _ = never_zero_width(zero, zero, sums, counts, bounds=(-baseline, 1 - baseline))
    np.testing.assert_allclose(lower, -share * baseline)
    np.testing.assert_allclose(upper, share * (1 - baseline))
    assert upper[1] == 0 and lower[1] < 0  # at a ceiling nothing can be gained, but something can be lost
    wide_lower, wide_upper, _ = never_zero_width(zero, zero, sums, counts)
    np.testing.assert_allclose([wide_lower, wide_upper], [[-share] * 2, [share] * 2])
    nats, above, _ = never_zero_width(zero, zero, sums, counts, bounds=(-np.inf, np.inf))
    assert np.isinf(nats).all() and np.isinf(above).all()


def test_one_cluster_says_nothing_and_clusters_may_differ_in_size() -> None:
    sums, counts = np.array([[3.0, 0.0], [2.0, 4.0], [1.0, 4.0]]), np.array([[3.0, 0.0], [2.0, 4.0], [2.0, 4.0]])
    assert agreeing(sums, counts).tolist() == [True, True, False]
    lower, upper, replaced = never_zero_width(np.ones(3), np.r_[1.0, 1, 2], sums, counts, bounds=(0.0, 1.0))
    assert (lower[0], upper[0]) == (0.0, 1.0) and replaced.tolist() == [True, True, False]
    assert lower[1] == pytest.approx(0.025**0.5)


def test_coverage_where_one_in_thirty_clusters_differs() -> None:
    """The interval of agreeing samples must hold the truth in 95 % of all samples (together with the others' miss)."""
    rng = np.random.default_rng(0)
    truth, clusters = 29 / 30, 20
    sums = (rng.random((2000, clusters)) < truth).astype(float)
    lower, upper, replaced = never_zero_width(sums.mean(1) - 1e-3, sums.mean(1) + 1e-3, sums, np.ones_like(sums),
                                              bounds=(0.0, 1.0))  # fmt: skip
    agree = sums.all(1)
    assert replaced[agree].all() and agree.mean() > 0.4
    assert ((lower <= truth) & (truth <= upper))[agree].all()
    assert float(other_share(clusters)) > 1 - truth
    assert scipy_stats.binom.pmf(0, clusters, float(other_share(clusters))) == pytest.approx(0.025)


def test_rare_differences_are_clopper_pearson_for_shares_and_squares_for_changes() -> None:
    counts = np.ones((4, 60))
    sums = np.stack([np.r_[np.zeros(2), np.ones(58)], np.zeros(60), np.r_[-np.ones(3), np.ones(1), np.zeros(56)],
                     np.r_[np.zeros(30), np.ones(30)]])  # fmt: skip
    low, high = np.array([0.0, -1, -1, 0]), np.ones(4)
    lower, upper = rare(sums, counts, bounds=(low, high))
    exact = clopper_pearson(58, 60)
    assert lower[0] == pytest.approx(float(exact[0])) and upper[0] == pytest.approx(float(exact[1]))
    share = 1 - 0.025 ** (1 / 60)
    assert (lower[1], upper[1]) == pytest.approx((-share, share))  # as never_zero_width
    lost, gained = clopper_pearson(3, 60), clopper_pearson(1, 60)
    down = np.hypot(float(lost[1]) - 3 / 60, 1 / 60 - float(gained[0]))
    up = np.hypot(float(gained[1]) - 1 / 60, 3 / 60 - float(lost[0]))
    assert (lower[2], upper[2]) == pytest.approx((-2 / 60 - down, -2 / 60 + up))
    assert np.isnan([lower[3], upper[3]]).all()  # half of them: not rare
    nats = rare(np.r_[np.zeros(58), 0.3, 0.2][None], counts[:1], bounds=(0.0, np.inf))
    assert 0.0 < nats[0][0] < 0.5 / 60 and nats[1][0] == np.inf
    assert np.isnan(rare(np.arange(8.0)[None], counts[:1, :8], bounds=(0.0, np.inf))).all()  # no commonest value


def test_rare_intervals_cover_where_resampled_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    for lost, gained in ((0.03, 0.0), (0.04, 0.01), (0.02, 0.02)):
        draws = rng.random((1500, 80))
        sums = np.where(draws < lost, -1.0, np.where(draws > 1 - gained, 1.0, 0.0))
        counts = np.ones_like(sums)
        lower, upper = rare(sums, counts)
        known = ~np.isnan(lower)
        truth = gained - lost
        covered = ((lower <= truth) & (truth <= upper))[known].mean()
        low, high = bootstrap_interval(sums, counts, weights=cluster_weights(80, 400, 0))
        assert known.mean() > 0.95 and covered >= 0.95
        assert ((low <= truth) & (truth <= high))[known].mean() < covered


def test_rare_intervals_cover_when_clusters_differ_by_parts() -> None:
    """Clusters change by a third or two thirds (means over draws): the end of the scale is not what they could be."""
    rng = np.random.default_rng(2)
    sums = rng.choice([0.0, 1 / 3, 2 / 3], p=[0.93, 0.05, 0.02], size=(1500, 66))
    truth = 0.05 / 3 + 0.02 * 2 / 3
    lower, upper = rare(sums, np.ones_like(sums), bounds=(0.0, 1.0))
    known = ~np.isnan(lower)
    assert known.mean() > 0.9 and ((lower <= truth) & (truth <= upper))[known].mean() >= 0.95
    two, three = (np.r_[np.full(number, 1 / 3), np.zeros(66 - number)][None] for number in (2, 3))
    ends = [float(rare(row, np.ones((1, 66)), bounds=(0.0, 1.0))[1][0]) for row in (two, three)]
    assert ends[0] > 0.08 > ends[1]  # two say nothing about how far others lie, three do


def test_differences_of_two_shares() -> None:
    """Near Newcombe's interval with Wilson's bounds, never inside it by much; it turns round with its arguments."""
    for first, second in (((50, 80), (20, 90)), ((3, 40), (9, 35)), ((70, 70), (0, 60))):
        lower, upper = share_difference(first, second)
        low, high = confint_proportions_2indep(*first, *second, method="newcomb", compare="diff")
        assert lower == pytest.approx(low, abs=0.03) and upper == pytest.approx(high, abs=0.03)
        assert share_difference(second, first) == pytest.approx((-upper, -lower))
        assert lower < first[0] / first[1] - second[0] / second[1] <= upper <= 1
    rng = np.random.default_rng(3)
    one, two = rng.binomial(60, 0.7, 800), rng.binomial(40, 0.9, 800)
    bounds = [share_difference((int(a), 60), (int(b), 40)) for a, b in zip(one, two, strict=True)]
    assert np.mean([lower <= -0.2 <= upper for lower, upper in bounds]) >= 0.95
