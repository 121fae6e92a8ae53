"""Tests of paired answers against enumeration, independent implementations and simulated grids of known truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar

from experiments.statistics.paired import against_draws, benjamini_hochberg, max_statistic_p, mcnemar_p, sign_flip_p

# ------------------------------------------------------------------------------------------------ numbers by hand


def test_sign_flip_p_by_enumeration() -> None:
    rng = np.random.default_rng(0)
    sums = rng.integers(-3, 4, size=(30, 8))
    signs = np.array(list(itertools.product([-1, 1], repeat=8)))
    expected = (np.abs(signs @ np.abs(sums).T) >= np.abs(sums.sum(1))).mean(0)
    np.testing.assert_allclose(sign_flip_p(sums), expected, atol=1e-12)


def test_with_one_prompt_per_cluster_the_sign_flip_test_is_mcnemar_s() -> None:
    rng = np.random.default_rng(1)
    sums = rng.integers(-1, 2, size=(40, 25))
    gained, lost = (sums > 0).sum(1), (sums < 0).sum(1)
    ours = mcnemar_p(gained, lost)
    np.testing.assert_allclose(sign_flip_p(sums), ours, atol=1e-12)
    theirs = [mcnemar([[0, g], [b, 0]], exact=True).pvalue for g, b in zip(gained, lost, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert mcnemar_p(np.array([0]), np.array([0]))[0] == 1.0


def test_prompts_that_move_together_count_once() -> None:
    """Ten gains in two clusters are two observations: McNemar is sure, the clustered test is not."""
    sums = np.array([[5, 5, 0, 0]])
    assert mcnemar_p(np.array([10]), np.array([0]))[0] < 0.01
    assert sign_flip_p(sums)[0] == pytest.approx(0.5)


def test_max_statistic_of_one_cell_is_its_own_test() -> None:
    sums = np.random.default_rng(2).integers(-2, 3, size=(1, 20)) + np.array([[1] * 6 + [0] * 14])
    corrected = max_statistic_p(sums, permutations=20_000, seed=0)[0]
    assert corrected == pytest.approx(sign_flip_p(sums)[0], abs=0.01)


def test_max_statistic_lies_between_the_plain_p_and_bonferroni() -> None:
    """Copies of one cell need no correction at all; independent cells need nearly Bonferroni's."""
    row = np.array([1] * 9 + [-1] * 2 + [0] * 9)
    plain = sign_flip_p(row[None])[0]
    copies = max_statistic_p(np.tile(row, (50, 1)), permutations=5000, seed=0)
    np.testing.assert_allclose(copies, plain, atol=0.02)
    rng = np.random.default_rng(0)
    other = rng.choice([-1, 1], size=(50, 20))
    mixed = max_statistic_p(np.vstack([row, other]), permutations=5000, seed=0)
    assert mixed[0] > 3 * plain


def test_step_down_order_is_kept() -> None:
    sums = np.random.default_rng(4).integers(-2, 3, size=(60, 15))
    p = max_statistic_p(sums, permutations=500, seed=0)
    statistic = np.abs(sums.sum(1)) / np.sqrt((sums**2).sum(1))
    assert (np.diff(p[np.argsort(-statistic)]) >= 0).all()
    assert p.min() >= 1 / 501 and p.max() <= 1


# ------------------------------------------------------------------------------------------------ corrected levels


def dependent_null(rng: np.random.Generator, cells: int = 60, clusters: int = 40, size: int = 2) -> np.ndarray:
    """(cell, cluster) sums of a grid in which no edit does anything but flip answers both ways.

    Cells share the unsteered answers, and prompts of one cluster are flipped together half of the time.
    """
    before = rng.random((clusters, size)) < rng.beta(3, 2, size=(clusters, 1))
    after = rng.random((cells, clusters, size)) < rng.beta(3, 2, size=(1, clusters, 1))
    moved = rng.random((cells, clusters, 1)) < 0.5
    after = np.where(moved, after[:, :, :1], after)
    # exchangeable: the label "edited" or "unsteered" of a cluster is a coin
    swap = rng.random((1, clusters, 1)) < 0.5
    return np.where(swap, before[None] * 1 - after, after * 1 - before[None]).sum(2)


def test_family_wise_error_holds_on_null_grids() -> None:
    rng = np.random.default_rng(7)
    simulations, alpha = 250, 0.1
    false, uncorrected = 0, 0
    for seed in range(simulations):
        sums = dependent_null(rng)
        false += max_statistic_p(sums, permutations=199, seed=seed).min() <= alpha
        uncorrected += sign_flip_p(sums).min() <= alpha
    assert scipy_stats.binomtest(int(false), simulations, alpha, alternative="greater").pvalue > 0.01
    assert false >= simulations * alpha / 4  # not by never rejecting
    assert uncorrected > 0.5 * simulations  # the control: without correction almost every grid has a false finding


def test_false_discovery_rate_holds_on_null_and_mixed_grids() -> None:
    rng = np.random.default_rng(8)
    for real in (0, 15):
        proportions, found = [], 0.0
        for _ in range(150):
            sums = dependent_null(rng)
            # true effects: the edit turns one more answer of a cluster right, in half of the clusters
            sums[:real] += rng.random((real, sums.shape[1])) < 0.5
            q = benjamini_hochberg(sign_flip_p(sums))
            rejected = q <= 0.1
            proportions.append(rejected[real:].sum() / max(rejected.sum(), 1))
            found += rejected[:real].mean() if real else 0
        error = np.mean(proportions)
        assert error <= 0.1 + 2.5 * np.std(proportions) / np.sqrt(len(proportions))
        if real:
            assert found / 150 > 0.3  # and it does find things


# ------------------------------------------------------------------------------------------------ against draws


def test_against_draws_by_hand() -> None:
    """Draws 1/4 .. 4/4, the cell tied to the best; one draw; none; a pool of cells that share their draws."""
    draws = np.array([0.25, 0.5, 0.75, 1.0])
    found = against_draws(
        np.array([1.0, 0.5, 0.5, 0.0]), [draws, np.array([0.25]), np.array([]), draws], np.full(4, 4),
        pools=["a", "b", "a", "a"], sets=[0, 1, -1, 0],
    )  # fmt: skip
    assert found.draws.tolist() == [4, 1, 0, 4]
    np.testing.assert_array_equal(found.mean, [0.625, 0.25, np.nan, 0.625])
    np.testing.assert_array_equal(found.rank, [1.5, 1.0, np.nan, 5.0])
    np.testing.assert_allclose(found.p, [2 * 2 / 5, 1.0, np.nan, 2 / 5])
    spread = np.sqrt(np.var(draws, ddof=1) * (1 + 1 / 4))
    expected = [2 * scipy_stats.t.sf(abs(value - 0.625) / spread, 3) for value in (1.0, 0.0)]
    np.testing.assert_allclose(found.t_p, [expected[0], np.nan, np.nan, expected[1]])
    with pytest.raises(ValueError, match="one entry per cell"):
        against_draws(np.ones(2), [draws], np.ones(2), pools=[0, 0], sets=[0, 0])


def test_spread_is_pooled_once_per_set_and_never_under_half_a_prompt() -> None:
    wide, narrow = np.array([0.0, 1.0]), np.array([0.5, 0.5])
    found = against_draws(np.ones(3), [wide, narrow, wide], np.full(3, 10), pools=[0, 0, 0], sets=[0, 1, 0])
    pooled = 0.5 / 2  # squares 0.5 and 0, one degree of freedom each; the set that comes twice counts once
    assert found.t_p[1] == pytest.approx(2 * scipy_stats.t.sf(0.5 / np.sqrt(pooled * 1.5), 1))
    alone = against_draws(np.ones(1), [narrow], np.full(1, 10), pools=[0], sets=[0])
    assert alone.t_p[0] == pytest.approx(2 * scipy_stats.t.sf(0.5 / np.sqrt(0.05**2 * 1.5), 1))
