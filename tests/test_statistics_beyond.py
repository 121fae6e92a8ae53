"""A condition against its draws: hand-computed numbers, both sources of chance, and the four verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.beyond import Beyond, beyond_draws, fewest_draws, judge_beyond
from experiments.statistics.clusters import Settings

SETTINGS = Settings(resamples=2000)


def test_estimate_and_rank_by_hand() -> None:
    own = np.array([1.0, 1, 0, 1])
    draws = np.array([[1.0, 0], [0, 0], [0, 1], [1, 1]])
    found = beyond_draws(own, draws, list("abcd"), SETTINGS)
    assert found.estimate == pytest.approx(0.75 - 0.5)
    assert found.p == pytest.approx(1 / 3) and (found.draws, found.n, found.n_clusters) == (2, 4, 4)
    tied = beyond_draws(np.array([1.0, 0, 0, 1]), draws, list("abcd"), SETTINGS)
    assert tied.p == 1.0  # ties count against it


def test_the_interval_knows_of_prompts_and_of_draws() -> None:
    rng = np.random.default_rng(0)
    own, clusters = (rng.random(400) < 0.6).astype(float), np.arange(400)
    level = rng.normal(0.5, 0.15, 20)  # draws that differ among themselves
    spread = (rng.random((400, 20)) < level).astype(float)
    alike = (rng.random((400, 20)) < 0.5).astype(float)
    wide, narrow = (beyond_draws(own, draws, clusters, SETTINGS) for draws in (spread, alike))
    assert wide.upper - wide.lower > 1.3 * (narrow.upper - narrow.lower)
    few = beyond_draws(own[:25], alike[:25], clusters[:25], SETTINGS)
    assert few.upper - few.lower > 2.5 * (narrow.upper - narrow.lower)


def test_no_effect_is_called_beyond_rarely() -> None:
    rng = np.random.default_rng(1)
    called = 0
    for seed in range(200):
        level = rng.normal(0.5, 0.05, 21)
        right = (rng.random((60, 21)) < level).astype(float)
        found = beyond_draws(right[:, 0], right[:, 1:], np.arange(60), Settings(resamples=400, seed=seed))
        called += judge_beyond(found, 0.02).verdict == "held"
    assert called <= 10


def test_agreement_has_width() -> None:
    found = beyond_draws(np.ones(13), np.ones((13, 20)), np.arange(13), SETTINGS)
    assert found.estimate == 0 and found.lower < -0.1 and found.upper > 0.1
    with pytest.raises(ValueError, match="one value and one or more draws"):
        beyond_draws(np.ones(3), np.ones((3, 0)), np.arange(3), SETTINGS)


@pytest.mark.parametrize(
    ("lower", "upper", "p", "draws", "verdict"),
    [
        (0.05, 0.2, 1 / 21, 20, "held"),
        (0.05, 0.2, 2 / 21, 20, "undecided"),
        (-0.05, 0.2, 1 / 21, 20, "undecided"),
        (-0.05, 0.01, 1 / 21, 20, "not held"),
        (0.05, 0.2, 1 / 19, 18, "not testable"),
    ],
)
def test_verdicts(lower: float, upper: float, p: float, draws: int, verdict: str) -> None:
    assert judge_beyond(Beyond((lower + upper) / 2, lower, upper, p, draws, 50, 50), 0.02).verdict == verdict
    assert fewest_draws(0.05) == 19 and fewest_draws(0.01) == 99
