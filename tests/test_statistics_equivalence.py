"""Three-way verdicts: each answer can be given, absence needs precision, and a family is corrected together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments.statistics.clusters import cluster_weights
from experiments.statistics.equivalence import family_level, judge_absence, judge_presence, simultaneous, widened


def test_absence_has_three_answers() -> None:
    assert judge_absence(-0.02, 0.03, 0.05).verdict == "held"
    assert judge_absence(0.06, 0.2, 0.05).verdict == "not held"
    assert judge_absence(-0.2, -0.05, 0.05).verdict == "not held"
    undecided = judge_absence(-0.1, 0.1, 0.05)
    assert undecided.verdict == "undecided" and undecided.words == "undecided at this power"
    assert judge_absence(0.01, 0.04, 0.05).verdict == "held"  # significant, but too small to matter


def test_one_sided_absences_look_at_their_own_side() -> None:
    assert judge_absence(-0.5, 0.01, 0.05, side="above").verdict == "held"  # "never beats": harm is no objection
    assert judge_absence(-0.5, -0.1, 0.05, side="below").verdict == "not held"  # "no harm"
    assert judge_absence(-0.01, 0.5, 0.05, side="below").verdict == "held"
    assert judge_absence(0.2, 0.5, 0.05, side="above").verdict == "not held"


def test_presence_has_three_answers_where_the_old_rule_had_two() -> None:
    assert judge_presence(0.1, 0.3, above=0.0).verdict == "held"
    assert judge_presence(-0.1, 0.3, above=0.0).verdict == "undecided"
    assert judge_presence(-0.3, -0.1, above=0.0).verdict == "not held"
    assert judge_presence(0.4, 0.6, above=0.3, below=0.7).verdict == "held"
    assert judge_presence(0.4, 0.8, above=0.3, below=0.7).verdict == "undecided"
    assert judge_presence(0.75, 0.8, above=0.3, below=0.7).verdict == "not held"


def test_no_verdict_by_an_interval_without_width_or_on_a_ceiling() -> None:
    for judged in (judge_absence(0.0, 0.0, 0.05), judge_presence(1.0, 1.0, above=0.9)):
        assert judged.verdict == "not testable" and "no width" in judged.reason
    assert judge_absence(math.nan, math.nan, 0.05).reason == "nothing was measured"
    assert judge_absence(-0.01, 0.01, 0.05, mark="ceiling").verdict == "not testable"
    marked = judge_presence(0.95, 0.999, above=0.9, mark="ceiling")
    assert marked.verdict == "held" and marked.words == "held (rests on a ceiling)"
    for wrong in (
        lambda: judge_absence(0, 1, 0.0),
        lambda: judge_presence(0, 1),
        lambda: judge_presence(1, 0, above=0),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_bonferroni_level_and_tails_that_the_resamples_cannot_resolve() -> None:
    assert family_level(0.95, 60) == pytest.approx(1 - 0.05 / 60)
    rng = np.random.default_rng(0)
    resampled = rng.normal(0.5, 0.1, size=(2000, 1))
    lower, upper = widened(np.array([0.5]), resampled, 400, family_level(0.95, 60))
    z = scipy_stats.norm.isf(0.05 / 120)
    np.testing.assert_allclose([lower[0], upper[0]], [0.5 - z * 0.1, 0.5 + z * 0.1], atol=0.02)
    assert upper[0] > resampled.max() - 0.1  # beyond what a percentile of 2,000 resamples can say
    percentile = widened(np.array([0.5]), resampled, 400, 0.95)
    np.testing.assert_allclose([float(side[0]) for side in percentile], [0.304, 0.696], atol=0.01)
    clipped = widened(np.array([0.95]), resampled + 0.45, 400, family_level(0.95, 60), bounds=(0.0, 1.0))
    assert clipped[1][0] == 1.0
    assert [float(side[0]) for side in widened(np.array([0.5]), resampled, 1, 0.95, (0.0, 1.0))] == [0.0, 1.0]


def test_simultaneous_intervals_cover_all_claims_together_and_single_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    runs, clusters, claims = 200, 25, 12
    together = single = 0
    for _ in range(runs):
        values = rng.normal(size=(clusters, 1)) * 0.5 + rng.normal(size=(clusters, claims))
        resampled = cluster_weights(clusters, 400, int(rng.integers(1 << 30))) @ values / clusters
        lower, upper = simultaneous(values.mean(0), resampled, clusters)
        together += bool(((lower <= 0) & (upper >= 0)).all())
        low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
        single += bool(((low <= 0) & (high >= 0)).all())
    assert together / runs >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / runs)
    assert single / runs < 0.75  # the control


def test_simultaneous_leaves_open_what_it_cannot_say() -> None:
    resampled = np.random.default_rng(2).normal(size=(300, 4))
    resampled[:, 1] = 0.3
    estimate = np.array([0.0, 0.3, np.nan, 0.0])
    lower, upper = simultaneous(estimate, resampled, np.array([20, 20, 20, 1]))
    assert lower[1] == upper[1] == 0.3 and np.isnan(lower[2])  # no width: exact bounds or no verdict
    assert (lower[3], upper[3]) == (-np.inf, np.inf) and lower[0] < 0 < upper[0]
