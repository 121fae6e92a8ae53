"""codi early-exit: planted latents give their exit, calibration by hand, thresholds chosen on other prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import planted_model, planted_split

from experiments.latents.early_exit import (
    STUDY,
    after,
    calibration,
    chosen_threshold,
    fixed,
    make_plan,
    policies,
    policy,
    run,
    stops_at,
)
from experiments.latents.options import EarlyExitOptions
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import row_of, weighed


def trials(right: list[list[int]], confidence: list[list[float]]) -> pd.DataFrame:
    """(prompt, latent) tables as a trial table; wrong answers are all different."""
    rows = []
    for i, (good, sure) in enumerate(zip(right, confidence, strict=True)):
        for k, (one, p) in enumerate(zip(good, sure, strict=True)):
            text = "7" if one else f"{i}{k}"
            rows.append({"prompt_id": f"p{i}", "cluster": f"c{i}", "n_latents": k, "text": text,
                         "template": "", "parsed": True, "correct": bool(one), "confidence": p})  # fmt: skip
    return pd.DataFrame(rows)


def test_the_planted_model_is_done_after_latent_4(tmp_path: Path) -> None:
    config = EarlyExitOptions(out=tmp_path / "run", resamples=200, permutations=200, draws=2, task="planted")
    found = run(config, planted_model("latents"), planted_split())
    assert [row_of(found.tables["exits"], after(k))["mean"] for k in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    agreement = found.tables["agreement"].set_index("n_latents")["mean"]
    assert agreement[4] == 1 and agreement[3] == 0
    cost = found.tables["cost"]
    assert row_of(cost, policy("oracle"))["mean"] == 4 and row_of(cost, fixed(6))["mean"] == 6
    steps = found.tables["steps"].set_index("n_latents")
    assert steps.loc[4, "fwer_p"] < 0.05 and (steps.drop(4)["p"] == 1).all()


def judged(accuracy: list[float], many: int) -> dict[str, str]:
    """Verdicts of C1 on made-up answers after 0..6 latents."""
    rng = np.random.default_rng(2)
    right = (rng.random((many, 7)) < accuracy).astype(int).tolist()
    table = trials(right, [[0.5] * 7] * many)
    plan = make_plan(EarlyExitOptions(resamples=500, permutations=100, draws=2), planted_model(), planted_split())
    claims = STUDY.conclude(plan, {"exits": table, "derivation": table}).claims or ()
    return {claim.name: claim.verdict for claim in claims}


def test_every_verdict_can_come_out() -> None:
    base = [0.1, 0.2, 0.3, 0.4]
    assert judged([*base, 0.5, 0.9, 0.6], 400) == {"C1 (jump)": "held", "C1 (sixth)": "held"}
    assert judged([*base, 0.9, 0.5, 0.9], 400) == {"C1 (jump)": "not held", "C1 (sixth)": "not held"}
    assert judged([*base, 0.5, 0.55, 0.57], 50) == {"C1 (jump)": "undecided", "C1 (sixth)": "undecided"}
    assert judged([*base, 1.0, 1.0, 1.0], 400) == {"C1 (jump)": "not testable", "C1 (sixth)": "not testable"}


def test_a_star_needs_a_size() -> None:
    """A gain in every third prompt has one, none has none."""
    gained = compare_gain(0.3, 400)
    assert gained["matters"] and gained["q"] < 0.05
    assert not compare_gain(0.0, 400)["matters"]


def compare_gain(share: float, many: int) -> dict:
    rng = np.random.default_rng(4)
    table = trials([[0, int(gain)] for gain in rng.random(many) < share], [[0.5, 0.5]] * many)
    return row_of(weighed(table, [(after(1), after(0))], ["n_latents"], settings=Settings(resamples=300))[0], after(1))


def test_calibration_by_hand() -> None:
    """Two answers at 0.9, one right; two at 0.3, none right: |1 - 1.8| and |0 - 0.6| over 4 = 0.35."""
    table = trials([[1], [0], [0], [0]], [[0.9], [0.9], [0.3], [0.3]])
    found, bins = calibration(table, Settings(resamples=100))
    assert found["ece"][0] == pytest.approx(0.35)
    assert found["brier"][0] == pytest.approx((0.01 + 0.81 + 0.09 + 0.09) / 4)
    assert found["auroc"][0] == pytest.approx((1 + 1 + 0.5) / 3)
    assert bins["n"].tolist() == [2, 2] and bins["accuracy"].tolist() == [0, 0.5]


def test_interval_of_the_calibration_error_is_over_clusters() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random(30)
    table = trials((rng.random((30, 1)) < 0.5).astype(int).tolist(), sure[:, None].tolist())
    wide = calibration(table.assign(cluster=[f"c{i // 6}" for i in range(30)]), Settings(resamples=400))[0].iloc[0]
    narrow = calibration(table, Settings(resamples=400))[0].iloc[0]
    assert (narrow["n_clusters"], wide["n_clusters"]) == (30, 5) and narrow["ece"] == pytest.approx(wide["ece"])
    assert 0 <= narrow["ece_lower"] < narrow["ece_upper"] <= 1
    alone = calibration(table.assign(cluster="c"), Settings(resamples=400))[0].iloc[0]
    assert (alone["ece_lower"], alone["ece_upper"]) == (0, 1)  # one cluster says nothing about spread


def test_threshold_comes_from_the_derivation_prompts() -> None:
    good = trials([[0, 1, 1], [1, 1, 1], [0, 0, 1]], [[0.2, 0.8, 0.9], [0.8, 0.9, 0.9], [0.1, 0.4, 0.9]])
    threshold = chosen_threshold(good, 0.0)
    assert 0.4 < threshold <= 0.8
    assert stops_at(good, threshold).tolist() == [1, 0, 2]
    stopped, used = policies(good, good, allowed_loss=0.0, patience=1, draws=50, seed=0)
    assert used == threshold
    means = stopped.groupby(["policy", "n_latents", "shuffled"], as_index=False)[["correct", "latents"]].mean()
    chosen, control = row_of(means, policy("confidence")), row_of(means, policy("confidence", shuffled=True))
    assert chosen["correct"] == row_of(means, fixed(2))["correct"] == 1 and chosen["latents"] == 1
    # the control: the same number of latents, dealt out to other prompts, loses
    assert control["latents"] == 1 and control["correct"] < 0.9
    # confidence that says nothing saves nothing
    blind = trials([[0, 1], [0, 1]], [[0.9, 0.1], [0.9, 0.1]])
    assert np.isinf(chosen_threshold(blind, 0.0)) and stops_at(blind, np.inf).tolist() == [1, 1]


def test_refuses_impossible_options() -> None:
    with pytest.raises(ValueError, match="allowed-loss"):
        EarlyExitOptions(allowed_loss=1.5)
    with pytest.raises(ValueError, match="patience"):
        EarlyExitOptions(patience=0)
