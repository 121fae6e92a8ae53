"""The tables of a sweep against hand-computed numbers, other implementations and simulated grids of known truth."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats
from simulated_sweep import simulate_trials
from statsmodels.stats.anova import anova_lm

from experiments.statistics.clusters import Settings
from experiments.study.edits.cells import CELL_COLUMNS, cell_statistics, control_statistics
from experiments.study.edits.pairing import mirror
from experiments.sweep import recompute
from experiments.sweep.analysis import analyse
from experiments.sweep.options import StatsOptions
from experiments.sweep.structure import (
    marginal_effects,
    rank_consistency,
    rank_correlations,
    sign_symmetry,
    variance_shares,
)

FAST = Settings(resamples=300, permutations=300)


@pytest.fixture(scope="module")
def trials() -> pd.DataFrame:
    effects = {(1, 2, 1.0, 3): 0.8, (2, 3, -1.0, 2): -0.7}
    return simulate_trials(
        pairs=6, latents=(2, 3), sizes=(0.5, 1.0), draws=20, prompts=60, clusters=30, effects=effects
    )


@pytest.fixture(scope="module")
def cells(trials: pd.DataFrame) -> pd.DataFrame:
    return cell_statistics(trials, FAST)


def one(cells: pd.DataFrame, source: int, target: int, coefficient: float, latent: int) -> pd.Series:
    keys = {"source": source, "target": target, "coefficient": coefficient, "latent": latent}
    found = cells[np.logical_and.reduce([cells[key] == value for key, value in keys.items()])]
    assert len(found) == 1
    return found.iloc[0]


def table(rows: list[tuple], **fixed: object) -> pd.DataFrame:
    """Trials written out by hand: (control, source, target, coefficient, draw, latent, prompt, correct)."""
    names = ["control", "source", "target", "coefficient", "draw", "latent", "prompt_id", "correct"]
    frame = pd.DataFrame(rows, columns=names)
    defaults = {"space": "kv", "part": "both", "timing": "cached", "n_latents": 6, "parsed": True, "applied_norm": 1.0}
    for name, value in (defaults | fixed).items():
        frame[name] = value
    frame["cluster"] = frame["prompt_id"].str[0]
    return frame


def by_hand() -> pd.DataFrame:
    """Prompts a1 a2 | b1 | c1 in clusters a b c. Unsteered right: a1, b1. Edited (1, 2, +1) at latent 4: all."""
    rows: list[tuple] = []
    for prompt, before, after in (("a1", 1, 1), ("a2", 0, 1), ("b1", 1, 1), ("c1", 0, 1)):
        rows.append(("none", 0, 0, 0.0, -1, 0, prompt, bool(before)))
        rows.append(("direction", 1, 2, 1.0, -1, 4, prompt, bool(after)))
    for draw, right in enumerate(({"a1"}, {"a1", "b1"}, {"a1", "b1", "c1"}, {"a1", "a2", "b1", "c1"})):
        rows += [("random", 1, 2, 1.0, draw, 4, prompt, prompt in right) for prompt in ("a1", "a2", "b1", "c1")]
    return table(rows)


# ------------------------------------------------------------------------------------------------ numbers by hand


def test_a_cell_computed_by_hand() -> None:
    cell = one(cell_statistics(by_hand(), FAST), 1, 2, 1.0, 4)
    assert (cell.accuracy, cell.baseline, cell.difference) == (1.0, 0.5, 0.5)
    assert (cell.gained, cell.lost, cell.n, cell.n_clusters, cell.unparsed) == (2, 0, 4, 3, 0)
    assert cell.mcnemar_p == pytest.approx(0.5)  # two flips, both up: 2 * 1/4
    assert cell.p == pytest.approx(0.5)  # clusters a and c gain one each: of 4 sign assignments 2 are as extreme
    # draws 1/4, 2/4, 3/4, 4/4; one ties with the cell
    assert cell.random_mean == pytest.approx(0.625)
    assert cell.random_rank == 1.5
    assert cell.random_p == pytest.approx(min(1, 2 * 2 / 5))
    t = (1.0 - 0.625) / np.sqrt(np.var([0.25, 0.5, 0.75, 1.0], ddof=1) * (1 + 1 / 4))
    assert cell.random_t_p == pytest.approx(2 * scipy_stats.t.sf(t, 3))
    assert cell.over_random == pytest.approx(0.375)
    assert cell.verdict == "none"


# ------------------------------------------------------------------------------------------------ corrected levels


def test_verdicts_hold_their_level_and_need_both_comparisons() -> None:
    """Whole tables. Null: edits are like random directions. Then edits that only beat the baseline, as draws do too."""
    settings = Settings(resamples=100, permutations=100)
    false = 0
    for seed in range(30):
        null = simulate_trials(
            pairs=5,
            latents=(1, 2),
            sizes=(1.0,),
            draws=8,
            prompts=48,
            clusters=24,
            flip=0.25,
            seed=seed,
            timing="cached",
        )
        cells = cell_statistics(null, settings, mirrored=False)
        false += (cells["verdict"] != "none").any()
    assert scipy_stats.binomtest(false, 30, 0.05, alternative="greater").pvalue > 0.01

    shared = simulate_trials(pairs=5, latents=(1, 2), sizes=(1.0,), draws=20, prompts=90, clusters=45, flip=0.02)
    hurt = shared["control"].isin(["direction", "random"])
    chance = np.random.default_rng(0).random(len(shared)) < 0.5
    shared["correct"] &= ~(hurt & chance)  # every edit of this norm destroys half of the answers
    cells = cell_statistics(shared, settings, mirrored=False)
    assert (cells["q"] < 0.05).all() and (cells["difference"] < 0).all()
    assert (cells["verdict"] == "none").all()


def test_real_effects_are_found_in_their_direction(cells: pd.DataFrame) -> None:
    assert one(cells, 1, 2, 1.0, 3).verdict == "improvement"
    assert one(cells, 2, 3, -1.0, 2).verdict == "harm"
    unique = cells[~cells["mirrored"]]
    assert (unique["verdict"] == "none").sum() == len(unique) - 2
    assert one(cells, 1, 2, 1.0, 3).fwer_p < 0.05 and one(cells, 1, 2, 1.0, 3).random_rank == 1
    assert one(cells, 2, 3, -1.0, 2).random_rank == 21
    assert (unique["verdict_q"] >= unique["q"] - 1e-12).all()


def test_without_random_draws_there_is_no_verdict(trials: pd.DataFrame) -> None:
    cells = cell_statistics(trials[trials["control"] != "random"], FAST)
    assert (cells["q"] < 0.05).any()
    assert (cells["verdict"] == "none").all()
    assert cells["random_mean"].isna().all() and (cells["random_draws"] == 0).all()


# ------------------------------------------------------------------------------------------------ pairing and mirrors


def test_mirrored_cells_are_the_same_edit(trials: pd.DataFrame, cells: pd.DataFrame) -> None:
    assert len(cells) == 2 * (~cells["mirrored"]).sum() == 2 * 6 * 2 * 4
    cell, image = one(cells, 1, 2, 1.0, 3), one(cells, 2, 1, -1.0, 3)
    assert image.mirrored and not cell.mirrored
    numbers = [name for name in CELL_COLUMNS if name not in ("source", "target", "coefficient", "mirrored")]
    pd.testing.assert_series_equal(cell[numbers], image[numbers], check_names=False)
    # a sweep that computes the other name, or both names, of every edit gives the same table: nothing is counted twice
    other = trials.copy()
    flip = other["control"] == "direction"
    other.loc[flip, ["source", "target"]] = other.loc[flip, ["target", "source"]].to_numpy()
    other.loc[flip, "coefficient"] *= -1
    pd.testing.assert_frame_equal(cell_statistics(other, FAST), cells)
    pd.testing.assert_frame_equal(cell_statistics(mirror(trials), FAST), cells)
    assert len(mirror(mirror(trials))) == len(mirror(trials))


def test_each_latent_is_paired_with_its_own_early_exit(trials: pd.DataFrame, cells: pd.DataFrame) -> None:
    unsteered = trials[trials["control"] == "none"]
    for latent, rows in unsteered.groupby("latent"):
        assert (cells.loc[cells["latent"] == latent, "baseline"] == rows["correct"].mean()).all()
    assert cells["baseline"].nunique() == 2  # and the two do differ


def test_the_paired_difference_is_not_the_difference_of_two_samples() -> None:
    """A prompt missing from a cell is missing from its baseline too."""
    trials = by_hand()
    trials = trials[~((trials["control"] == "direction") & (trials["prompt_id"] == "c1"))]
    cell = one(cell_statistics(trials, FAST), 1, 2, 1.0, 4)
    assert cell.n == 3 and cell.baseline == pytest.approx(2 / 3) and cell.difference == pytest.approx(1 / 3)
    assert cell.random_draws == 0  # draws on other prompts are no control


def test_unparsable_answers_are_wrong_and_counted() -> None:
    trials = by_hand()
    broken = (trials["control"] == "direction") & (trials["prompt_id"].isin(["a1", "c1"]))
    trials.loc[broken, ["correct", "parsed"]] = False
    cell = one(cell_statistics(trials, FAST), 1, 2, 1.0, 4)
    assert cell.unparsed == 2 and cell.accuracy == 0.5 and cell.n == 4


def test_order_of_rows_does_not_matter_and_recomputing_gives_the_same(trials: pd.DataFrame) -> None:
    first, again = analyse(trials, FAST), analyse(trials.sample(frac=1, random_state=1), FAST)
    for name in ("cells", "controls", "marginals", "correlations", "consistency", "variance", "symmetry"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(again, name))
    assert not first.cells.equals(analyse(trials, Settings(300, 300, seed=1)).cells)


def test_families_are_corrected_apart(trials: pd.DataFrame, cells: pd.DataFrame) -> None:
    noise = simulate_trials(
        pairs=6,
        latents=(2, 3),
        sizes=(0.5, 1.0),
        draws=20,
        prompts=60,
        clusters=30,
        space="embedding",
        part="both",
        seed=9,
    )
    both = cell_statistics(pd.concat([trials, noise], ignore_index=True), FAST)
    kv = both[both["space"] == "kv"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kv, cells)
    assert set(both["space"]) == {"kv", "embedding"}


def test_baseline_rows_of_another_space_serve(trials: pd.DataFrame, cells: pd.DataFrame) -> None:
    shared = trials.copy()
    shared.loc[shared["control"] == "none", ["space", "part"]] = "none"
    pd.testing.assert_frame_equal(cell_statistics(shared, FAST), cells)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda t: t.drop(columns="cluster"), "lacks the columns cluster"),
        (lambda t: t.iloc[:0], "empty"),
        (lambda t: t[t["control"] != "none"], "no baseline"),
        (lambda t: t[~((t["control"] == "none") & (t["latent"] == 3))], "no baseline with 3 latents"),
        (lambda t: t[~((t["control"] == "none") & (t["prompt_id"] == "p0003"))], "'p0003' has trials but no baseline"),
        (lambda t: pd.concat([t, t.tail(5)]), "appears twice"),
        (lambda t: t.assign(control=t["control"].replace("random", "randon")), "unknown control 'randon'"),
        (lambda t: t.assign(correct=t["correct"].where(t.index > 3, None)), "missing values in correct"),
        (lambda t: t.assign(cluster=[f"c{i % 7}" for i in range(len(t))]), "belongs to several clusters"),
    ],
)
def test_a_broken_table_is_refused_in_one_line(trials: pd.DataFrame, break_it, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        analyse(break_it(trials), FAST)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ structure of the grid


def test_controls_table(trials: pd.DataFrame) -> None:
    patched = simulate_trials(
        pairs=3, latents=(2, 3), sizes=(1.0,), draws=5, prompts=40, clusters=20, patches=("patch-norm",)
    )
    table = control_statistics(patched, FAST)
    assert set(table["control"]) == {"none", "random", "patch-norm"}
    level = table[(table["control"] == "random") & (table["latent"] == 3)].iloc[0]
    rows = patched[(patched["control"] == "random") & (patched["latent"] == 3)]
    assert level.accuracy == pytest.approx(rows["correct"].mean())
    assert level.n_draws == 15 and level.n == 40
    assert level.unparsed == pytest.approx((~rows["parsed"]).mean())
    assert level.draw_lower < level.accuracy < level.draw_upper
    assert (table["accuracy_lower"] <= table["accuracy"]).all() and (table["accuracy"] <= table["accuracy_upper"]).all()
    before = table[(table["control"] == "none") & (table["latent"] == 3)].iloc[0]
    assert level.difference == pytest.approx(level.accuracy - before.accuracy)


def test_marginal_effects_are_means_over_the_pairs(cells: pd.DataFrame, trials: pd.DataFrame) -> None:
    table = marginal_effects(trials, FAST)
    at_one = table[(table["role"] == "A") & (table["coefficient"] == 1.0)]
    chosen = at_one[(at_one["label"] == 2) & (at_one["latent"] == 3)]
    expected = cells[(cells["source"] == 2) & (cells["coefficient"] == 1.0) & (cells["latent"] == 3)]
    assert chosen["difference"].item() == pytest.approx(expected["difference"].mean())
    assert chosen["n_cells"].item() == len(expected)
    assert (table["lower"] <= table["difference"]).all() and (table["difference"] <= table["upper"]).all()
    # one cell has one interval, whichever table it is in
    single = cells[(cells["source"] == 6) & (cells["target"] == 1) & (cells["coefficient"] == 1.0)]
    rows = at_one[(at_one["label"] == 6) & (at_one["latent"] > 0)]
    assert len(rows) == 2 and (rows["n_cells"] == 1).all()
    for row in rows.itertuples():
        there = single[single["latent"] == row.latent].iloc[0]
        assert (row.lower, row.upper) == pytest.approx((there.lower, there.upper))


def grid_trials(effect, prompts: int = 40, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """All 30 ordered pairs at c = 1, six positions, a cluster per prompt; `effect(a, b, latent)`: share put right."""
    rng = np.random.default_rng(seed)
    rows: list[tuple] = [("none", 0, 0, 0.0, -1, 0, f"{n:03d}", False) for n in range(prompts)]
    for a, b in itertools.permutations(range(1, 7), 2):
        for latent in range(1, 7):
            right = (np.arange(prompts) < effect(a, b, latent) * prompts) ^ (rng.random(prompts) < noise)
            rows += [("direction", a, b, 1.0, -1, latent, f"{n:03d}", bool(r)) for n, r in enumerate(right)]
    frame = table(rows)
    frame["cluster"] = frame["prompt_id"]
    return frame


def test_rank_consistency_is_one_for_one_order_and_small_for_none() -> None:
    same = grid_trials(lambda a, b, latent: (a * 6 + b) / 60)
    result = rank_consistency(same, FAST).iloc[0]
    assert result.kendall_w == pytest.approx(1.0) and result.mean_spearman == pytest.approx(1.0)
    assert result.p == pytest.approx(1 / 301) and result.n_pairs == 30 and result.n_positions == 6
    assert rank_correlations(same)["spearman"].to_numpy() == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    shuffled = {key: rng.random() for key in itertools.product(range(1, 7), range(1, 7), range(1, 7))}
    none = grid_trials(lambda a, b, latent: shuffled[a, b, latent])
    result = rank_consistency(none, FAST).iloc[0]
    assert result.p > 0.05 and abs(result.mean_spearman) < 0.15
    correlations = rank_correlations(none)
    values = cell_statistics(none, FAST, mirrored=True)
    wide = values[values["coefficient"] == 1].pivot(index=["source", "target"], columns="latent", values="difference")
    expected = scipy_stats.spearmanr(wide.to_numpy()).statistic
    np.testing.assert_allclose(correlations["spearman"].to_numpy().reshape(6, 6), expected, atol=1e-12)


def test_rank_permutation_allows_for_pairs_that_share_a_latent() -> None:
    """Effects that depend on A alone, a new order at each position: pairs are far from independent, yet p is fair."""
    p_values = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        order = {latent: rng.permutation(6) for latent in range(1, 7)}
        grid = grid_trials(lambda a, b, latent, order=order: order[latent][a - 1] / 6, prompts=12)
        p_values.append(rank_consistency(grid, Settings(100, 199)).iloc[0].p)
    low = int((np.array(p_values) <= 0.1).sum())
    assert scipy_stats.binomtest(low, 60, 0.1, alternative="greater").pvalue > 0.01


def test_variance_shares_agree_with_statsmodels_and_name_the_source() -> None:
    by_position = grid_trials(lambda a, b, latent: latent / 10, prompts=60, noise=0.05)
    by_pair = grid_trials(lambda a, b, latent: (a * 6 + b) / 60, prompts=60, noise=0.05)
    for trials, source in ((by_position, "position"), (by_pair, "pair")):
        table = variance_shares(trials, FAST).set_index("term")
        assert table["share"].sum() == pytest.approx(1.0)
        assert table["share"].idxmax() == source and table.loc[source, "share"] > 0.8
        cells = cell_statistics(trials, FAST)
        cells = cells[cells["coefficient"] == 1.0].assign(pair=lambda t: t["source"] * 10 + t["target"])
        anova = anova_lm(smf.ols("difference ~ C(pair) + C(latent)", cells).fit())
        assert table.loc["pair", "sum_of_squares"] == pytest.approx(anova.loc["C(pair)", "sum_sq"])
        assert table.loc["position", "f"] == pytest.approx(anova.loc["C(latent)", "F"])
        assert table.loc["position", "f_p"] == pytest.approx(anova.loc["C(latent)", "PR(>F)"])


def test_pure_noise_is_called_noise() -> None:
    table = variance_shares(grid_trials(lambda a, b, latent: 0.5, prompts=80, noise=0.2), FAST).set_index("term")
    assert table.loc["noise", "share"] > 0.75


def test_sign_symmetry() -> None:
    effects = {(1, 2, 1.0, 2): 0.8, (1, 2, -1.0, 2): 0.8, (1, 3, 1.0, 2): 0.8}
    trials = simulate_trials(pairs=5, latents=(2,), sizes=(1.0,), prompts=80, clusters=40, flip=0.02, effects=effects)
    table = sign_symmetry(cell_statistics(trials, FAST))
    assert len(table) == 5
    assert table.loc[table["both_improve"], ["source", "target"]].to_numpy().tolist() == [[1, 2]]


def test_nothing_happens_anywhere() -> None:
    """A model that answers everything right, edits that change nothing: no warning, no NaN where a number is due."""
    trials = simulate_trials(pairs=3, latents=(1, 2), sizes=(1.0,), draws=3, prompts=10, clusters=5)
    trials["correct"] = trials["parsed"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = analyse(trials, FAST)
    cells = result.cells
    assert not cells.drop(columns=[c for c in cells if c.startswith(("covariance", "shuffled"))]).isna().any().any()
    assert (cells[["p", "q", "fwer_p", "random_p", "random_t_p"]] == 1).all().all()
    assert (cells["lower"] == 0).all() and (cells["upper"] == 0).all() and (cells["accuracy_lower"] == 1).all()
    assert (result.variance["share"] == 0).all()
    assert result.consistency["kendall_w"].isna().all()


def test_one_prompt_and_one_pair_are_enough_to_run() -> None:
    trials = simulate_trials(pairs=1, latents=(3,), sizes=(1.0,), draws=2, prompts=1, clusters=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = analyse(trials, FAST)
    assert (result.cells["lower"] == -1).all() and (result.cells["upper"] == 1).all()
    only_controls = trials[trials["control"] != "direction"]
    assert analyse(only_controls, FAST).cells.empty


# ------------------------------------------------------------------------------------------------ files


def test_a_run_folder_is_recomputed_from_its_trials_alone(trials: pd.DataFrame, tmp_path: Path, capsys) -> None:
    (tmp_path / "trials").mkdir()
    half = len(trials) // 2
    trials.iloc[:half].to_parquet(tmp_path / "trials" / "part-00000.parquet")
    trials.iloc[half:].to_parquet(tmp_path / "trials" / "part-00001.parquet")
    recompute.main(StatsOptions(tmp_path, resamples=300, permutations=300))
    assert "baseline" in capsys.readouterr().out.lower()
    written = pd.read_parquet(tmp_path / "cells.parquet")
    pd.testing.assert_frame_equal(written, cell_statistics(trials, FAST))
    first = (tmp_path / "cells.csv").read_bytes()
    recompute.main(StatsOptions(tmp_path))  # the settings are those of the folder
    assert (tmp_path / "cells.csv").read_bytes() == first
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"
    assert recompute.settings_of(tmp_path) == FAST
    assert recompute.settings_of(tmp_path, StatsOptions(tmp_path, seed=5)) == Settings(300, 300, seed=5)
    (tmp_path / "statistics" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        recompute.settings_of(tmp_path)


def test_a_folder_without_trials_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no trials"):
        recompute.load_trials(tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        recompute.load_trials(tmp_path / "nowhere")
