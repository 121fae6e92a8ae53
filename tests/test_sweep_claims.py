"""Does steering ever help: held where an edit helps beyond random directions, and not said where nothing could show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from simulated_sweep import simulate_trials

from experiments.statistics.clusters import Settings
from experiments.study.claims import Claim
from experiments.study.edits.claims import best_cell, never_better, some_better
from experiments.sweep.analysis import analyse

FAST = Settings(resamples=200, permutations=200)
SMALL: dict[str, Any] = {"pairs": 4, "latents": (2, 3), "sizes": (1.0,), "prompts": 60, "clusters": 60, "draws": 40}
HELPS = {(1, 2, 1.0, 3): 0.9}


def claims(**changes: Any) -> list[Claim]:
    return list(analyse(simulate_trials(**{**SMALL, "timing": "cached", **changes}), FAST).claims)


def test_an_edit_that_helps_is_found_and_none_is_not() -> None:
    found, none = claims(effects=HELPS), claims()
    assert [claim.name for claim in found] == ["S5 (kv, cached)"]
    assert found[0].verdict == "held" and "1 of 16 cells are improvements after correction" in found[0].note
    cells = analyse(simulate_trials(**SMALL, timing="cached", effects=HELPS), FAST).cells
    assert found[0].estimate == pytest.approx(cells["difference"].max())
    assert found[0].lower < found[0].estimate < found[0].upper and found[0].family == 16
    assert none[0].verdict == "undecided" and "0 of 16 cells are improvements" in none[0].note  # 60 prompts: too few
    assert "would have been found in the median cell at |c| = 1" in none[0].note
    large = claims(prompts=2000, clusters=2000, flip=0.0)
    assert large[0].verdict == "not held" and large[0].upper <= 0.02


def test_embedding_is_the_other_claim_and_parts_have_names() -> None:
    never, ever = (
        claims(space="embedding", effects=HELPS),
        claims(space="embedding", prompts=2000, clusters=2000, flip=0.0),
    )
    assert never[0].name == "S4 (embedding, cached)" and never[0].verdict == "not held"
    assert ever[0].verdict == "held"
    assert claims(part="keys", timing="early-exit")[0].name == "S5 (kv keys, early-exit)"
    assert claims(space="hidden")[0].name == "helps (hidden, cached)"


def test_without_directions_draws_or_room_nothing_is_claimed() -> None:
    trials = simulate_trials(**SMALL, timing="cached", effects=HELPS)
    assert not len(analyse(trials[trials["control"] != "direction"], FAST).claims)
    alone = list(analyse(trials[trials["control"] != "random"], FAST).claims)[0]
    assert alone.verdict == "undecided" and "no single cell can be judged" in alone.note
    full = simulate_trials(**SMALL, timing="cached")
    full["correct"] = True
    claim = list(analyse(full, FAST).claims)[0]
    assert claim.verdict == "not testable" and "ceiling" in claim.note


def test_the_interval_is_that_of_the_largest_gain_of_any_cell() -> None:
    """Two cells, one of which gains in every second prompt: its interval is at least as wide as alone."""
    rng = np.random.default_rng(0)
    gains = np.stack([rng.random(200) < 0.5, rng.random(200) < 0.01], axis=1).astype(float)
    cells = pd.DataFrame({"verdict": ["none", "none"], "gain_q": [0.001, 1.0], "baseline": [0.3, 0.4]})
    evidence = {"least_p": 0.01, "draws": 40, "shared": 2, "needed_draws": 38}
    best = best_cell(gains, np.arange(200), cells, evidence, FAST, "kv space")
    alone = best_cell(gains[:, :1], np.arange(200), cells[:1], evidence, FAST, "kv space")
    assert best.row["estimate"] == gains[:, 0].mean() and best.cells == 2 and best.lowest == 0.3 and not best.few
    assert best.row["lower"] <= alone.row["lower"] and best.row["upper"] >= alone.row["upper"] and not alone.corrected
    assert never_better("n", "never", best).verdict == "not held"
    assert some_better("s", "some", best).verdict == "undecided"  # far above the baseline, not beyond random directions
    none = np.zeros((40, 1))
    wide, bounded = (best_cell(none, np.arange(40), cells[:1], evidence, FAST, "x", share) for share in (None, [0.0]))
    assert (
        wide.row["lower"] < bounded.row["lower"] == 0.0 and wide.row["upper"] == bounded.row["upper"] > 0
    )  # nothing to lose
    few = best_cell(gains, np.arange(200), cells, {**evidence, "least_p": 0.6}, FAST, "kv space")
    assert "the rest is judged in X" in some_better("s", "some", few, elsewhere="X").note
    assert "; more" in some_better("s", "some", few, "more").note
