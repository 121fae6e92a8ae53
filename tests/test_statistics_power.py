"""What a run could have found: by hand, and by running the rule at its own threshold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.statistics.calibration import extremes, maximum_p, typical_variance
from experiments.statistics.power import Design, against_baseline, against_draws, detectable, power_words

CELLS, PROMPTS = 24, 100
STRATA = np.tile(np.arange(4), 6)
BLOCKS = np.repeat(np.arange(6), 4)
SIZES = np.tile([0.5, 0.5, 2.0, 2.0], 6)


def accuracies(draws: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    harm = rng.exponential(np.where(SIZES > 1, 0.3, 0.01)[:, None], size=(CELLS, 1 + draws))
    return np.round(np.clip(0.8 - harm, 0, 1) * PROMPTS) / PROMPTS


def design(wrong: int = 20, tests: int = CELLS) -> Design:
    return Design.of(np.arange(PROMPTS) >= wrong, np.arange(PROMPTS), tests=tests)


def test_against_the_baseline_by_hand() -> None:
    assert against_baseline(design(tests=540), "gain") == 14  # 0.5 ** 13 = 1.2e-4 > 0.05 / 540 = 9.3e-5 > 0.5 ** 14
    assert against_baseline(design(wrong=13, tests=540), "gain") is None
    assert against_baseline(design(tests=1), "harm") == 5
    assert against_baseline(design(tests=1), "gain", opposed=1) == 7  # 8 of 8 flips: P(X >= 7) = 9 / 256
    assert against_baseline(design(wrong=0), "gain") is None
    shared = Design.of(np.arange(PROMPTS) >= 20, np.minimum(np.arange(PROMPTS), 90) // 10)
    assert (shared.n_clusters, shared.wrong_clusters, shared.right_clusters) == (10, 2, 8)


@pytest.mark.parametrize("tail", ["gain", "harm"])
@pytest.mark.parametrize("groups", [None, SIZES])
def test_the_rule_passes_at_the_threshold_and_not_one_prompt_before(tail: str, groups: np.ndarray | None) -> None:
    values = accuracies(79)
    values[:, 0] = values[:, 1:].mean(1)  # no cell has an effect of its own
    need = against_draws(values, 1 / PROMPTS, tail, strata=STRATA, blocks=BLOCKS, groups=groups)  # type: ignore[arg-type]
    assert np.isfinite(need).any()
    step = 1 / PROMPTS if tail == "gain" else -1 / PROMPTS
    typical = typical_variance(values, STRATA)
    for cell in range(CELLS):
        for accuracy, passes in ((need[cell], True), (need[cell] - step, False)):
            if np.isnan(accuracy):
                accuracy, passes = (1.0 if tail == "gain" else 0.0), False
            if not 0 <= accuracy <= 1:
                continue
            trial = values.copy()
            trial[cell, 0] = accuracy
            extreme = extremes(trial, 1 / PROMPTS, tail, typical=typical)  # type: ignore[arg-type]
            extreme[np.arange(CELLS) != cell, 0] = -99.0
            assert (maximum_p(extreme, BLOCKS, groups=groups).p[cell] <= 0.05) == passes


def test_table_says_per_size_what_could_be_found_and_that_three_draws_find_nothing() -> None:
    table = detectable(accuracies(79), design(), SIZES, strata=STRATA, blocks=BLOCKS, apart=True)
    gain = {row["group"]: row for row in table[table["tail"] == "gain"].to_dict("records")}
    assert gain[0.5]["both_points"] == pytest.approx(max(gain[0.5]["baseline_points"],
                                                             gain[0.5]["draws_points"]))  # fmt: skip
    assert gain[0.5]["baseline_points"] == pytest.approx(0.09)  # 0.5 ** 9 = 0.00195 <= 0.05 / 24 = 0.00208
    assert gain[0.5]["passes"] == 1 and gain[0.5]["can_survive"]
    harm = {row["group"]: row for row in table[table["tail"] == "harm"].to_dict("records")}
    assert harm[0.5]["both_points"] < 0 and harm[2.0]["passes"] < harm[0.5]["passes"]  # draws do much
    assert "could be found: +9.0 points" in power_words(gain[0.5])

    few = detectable(accuracies(3), design(), SIZES, strata=STRATA, blocks=BLOCKS)
    assert not few["can_survive"].any() and (few["passes"] == 0).all()
    assert power_words(few.iloc[0]) == "Nothing can survive: 3 draws allow no p below 0.25; 19 are needed for 0.05."
    apart = detectable(accuracies(20), design(), SIZES, blocks=BLOCKS, apart=True)
    assert "39 are needed" in power_words(apart.iloc[0])  # two families: twice as many
    none = detectable(accuracies(3)[:, :1], design(), SIZES)
    assert not none["can_survive"].any() and isinstance(none, pd.DataFrame)
    ceiling = detectable(accuracies(79), design(wrong=3), SIZES, blocks=BLOCKS)
    assert "No improvement could be found: too few clusters" in power_words(ceiling.iloc[0])
