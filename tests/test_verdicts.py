"""Verdicts on cells: level on skewed nulls, what they rest on, what could have been found, and how it is said."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_sweep import simulate_trials

from experiments.statistics.calibration import least_draws
from experiments.statistics.clusters import Settings
from experiments.statistics.power import Design, against_baseline
from experiments.study.edits.cells import cell_statistics
from experiments.study.edits.pairing import families
from experiments.study.edits.verdicts import compared, judge_cells
from experiments.sweep import recompute
from experiments.sweep.analysis import analyse
from experiments.sweep.calibrate import IN_USE, NORMAL, calibration
from experiments.sweep.options import StatsOptions
from experiments.sweep.summary import summary

FAST = Settings(resamples=100, permutations=100)
SMALL: dict = {"pairs": 4, "latents": (2, 3), "sizes": (1.0,), "prompts": 60, "clusters": 30, "draws": 40}


def skewed(seed: int, draws: int = 40, pairs: int = 4, prompts: int = 80) -> pd.DataFrame:
    """Directions that are random ones, most of which do nothing while few destroy most answers; +c and -c of a pair
    meet the same draws."""
    rng = np.random.default_rng(seed)
    rows: list[tuple] = []
    before = rng.random(prompts) < 0.8
    frail = rng.permuted(np.linspace(0, 1, prompts))  # the order in which prompts break

    def add(control: str, pair: tuple[int, int], c: float, draw: int, latent: int, right: np.ndarray) -> None:
        rows.extend((control, *pair, c, draw, latent, f"p{i:03d}", bool(r)) for i, r in enumerate(right))

    add("none", (0, 0), 0.0, -1, 0, before)
    for number in range(pairs):
        pair = (1, 2 + number)
        vectors = [("direction", 1.0, -1), ("direction", -1.0, -1), *(("random", 1.0, draw) for draw in range(draws))]
        for control, c, draw in vectors:
            broken = 1 - np.exp(-rng.lognormal(-2.5, 1.5))
            for latent in (1, 2, 3):
                noise = rng.normal(0, 0.05, prompts)
                add(control, pair, c, draw, latent, before & (frail + noise > broken * latent / 3))
    names = ["control", "source", "target", "coefficient", "draw", "latent", "prompt_id", "correct"]
    table = pd.DataFrame(rows, columns=names).assign(space="kv", part="both", timing="cached", n_latents=6)
    return table.assign(parsed=True, applied_norm=1.0, cluster=table["prompt_id"])


# --- Level ------------------------------------------------------------------------------------------------------------


def test_on_skewed_nulls_the_level_holds_where_the_normal_rule_breaks_it() -> None:
    """Whole tables in which every direction is one more random direction."""
    runs, found, normal = 60, 0, 0
    for seed in range(runs):
        (family,) = families(skewed(seed))
        judged = judge_cells(family, FAST)
        found += (judged.columns["verdict"] != "none").any()
        table = calibration([family], FAST).query("tail == 'harm'").set_index("rule") if seed < 12 else None
        if table is not None:
            assert table.loc[IN_USE, "share"] <= 0.1
            normal += table.loc[NORMAL, "with_any"]
    assert found <= 60 * 0.05 + 2.5 * np.sqrt(60 * 0.05 * 0.95)
    assert normal / (12 * 40) > 0.15  # three times what was promised


def test_a_direction_that_is_worse_than_all_draws_is_found_on_the_same_table() -> None:
    trials = skewed(0)
    worst = (trials["control"] == "direction") & (trials["target"] == 3) & (trials["coefficient"] == 1.0)
    trials.loc[worst, "correct"] = False
    cells = cell_statistics(trials, FAST, mirrored=False)
    harmed = cells[cells["verdict"] == "harm"]
    assert len(harmed) and (harmed["target"] == 3).all() and (harmed["coefficient"] == 1.0).all()
    assert (harmed["effect"] == 1).all() and (cells.loc[cells["verdict"] == "none", "effect"] == 0).all()
    assert (harmed["verdict_q"] == np.fmax(harmed["loss_q"], harmed["beyond_harm_p"])).all()
    few = cell_statistics(trials[trials["draw"] < 20], FAST, mirrored=False)
    assert (few["verdict"] == "none").all()  # two directions share them: no p below 2 / 22


# --- What it rests on -------------------------------------------------------------------------------------------------


def test_directions_of_a_pair_share_its_draws_and_pooled_ones_serve_all() -> None:
    trials = simulate_trials(**SMALL)
    (family,) = families(trials)
    (one,) = compared(family, family.of("direction"), 0.05)
    assert one.values.shape == (16, 41) and len(np.unique(one.pools)) == 4 and len(np.unique(one.blocks)) == 8
    evidence = judge_cells(family, FAST).evidence
    assert [(row["tail"], row["shared"], row["needed_draws"]) for row in evidence] == [("gain", 2, 38), ("harm", 2, 38)]
    assert evidence[0]["null_families"] == 40 and evidence[0]["least_p"] == pytest.approx(2 / 42)
    random = trials["control"] == "random"
    pooled = pd.concat([trials[~random], trials[random & (trials["target"] == 2)].assign(source=0, target=0)])
    (family,) = families(pooled)
    row = judge_cells(family, FAST).evidence[0]
    assert row["shared"] == 8 and row["least_p"] == pytest.approx(8 / 48)
    assert row["needed_draws"] == least_draws(0.05, shared=8) == 152


def test_the_maximum_is_taken_within_each_size_when_there_are_draws_enough() -> None:
    shape = {**SMALL, "pairs": 1, "latents": (3,), "sizes": (0.5, 1.0), "prompts": 40}
    for draws, apart in ((78, False), (79, False), (80, True)):  # 2 sizes: 78 needed, and 2 more that can play
        (family,) = families(simulate_trials(**{**shape, "draws": draws}))
        row = judge_cells(family, FAST).evidence[0]
        assert row["apart"] == apart, draws
        assert row["least_p"] == pytest.approx((2 if apart else 1) * 2 / (2 + draws))


def test_cells_of_one_edit_are_one_effect() -> None:
    trials = simulate_trials(**{**SMALL, "sizes": (0.5, 1.0), "flip": 0.1, "timing": "cached"})
    rng = np.random.default_rng(0)
    ids = np.array(sorted(trials["prompt_id"].unique()))
    groups = np.array_split(rng.permutation(ids), 2)
    for target, c, prompts in ((2, 1.0, groups[0]), (2, 0.5, groups[0]), (3, -1.0, groups[1])):
        hit = (trials["control"] == "direction") & (trials["target"] == target) & (trials["coefficient"] == c)
        trials.loc[hit & trials["prompt_id"].isin(prompts), "correct"] = False
    analysis = analyse(trials, FAST)
    unique = analysis.cells[~analysis.cells["mirrored"]]
    worse = unique[unique["verdict"] == "harm"]
    assert len(worse) >= 4 and worse.groupby("target")["effect"].nunique().eq(1).all()
    assert set(worse["effect"]) == {1, 2} and set(worse["target"]) == {2, 3}
    assert f"{len(worse)} harms are 2 different edits" in summary(analysis)


def test_every_latent_has_the_room_of_its_own_baseline() -> None:
    trials = simulate_trials(**SMALL)
    (family,) = families(trials)
    judged = judge_cells(family, FAST)
    assert [row["latents"] for row in judged.visibility] == ["2", "3"]
    for row in judged.visibility:
        base = trials[(trials["control"] == "none") & (trials["latent"] == int(row["latents"]))]
        design = Design.of(base["correct"].to_numpy(), base["cluster"].to_numpy(), tests=16)
        assert row["baseline"] == base["correct"].mean() and row["gain_clusters"] == design.wrong_clusters
        assert against_baseline(design, "gain") == judged.power.query("tail == 'gain'")["baseline_clusters"].item()
    assert judged.power["can_survive"].all() and judged.power["draws"].eq(40).all()


# --- How it is said ---------------------------------------------------------------------------------------------------


def test_no_improvement_is_said_only_with_what_could_have_been_found() -> None:
    for trials in (simulate_trials(**SMALL), simulate_trials(**SMALL, effects={(1, 3, -1.0, 2): -0.9}), skewed(3)):
        text = summary(analyse(trials, FAST))
        claim = re.search(r"(Nothing|No improvement) survives correction", text)
        assert claim and re.search(r"\|c\| = 1: (Smallest|No) improvement", text[claim.end() :])
        assert re.search(r"\|c\| = 1: (Smallest|No) harm", text[claim.end() :])
        assert "40 such families" in text and "rank last among their draws" in text


def test_with_three_draws_nothing_can_survive() -> None:
    text = summary(analyse(simulate_trials(**{**SMALL, "draws": 3}, effects={(1, 2, 1.0, 3): 0.9}), FAST))
    assert "Nothing can survive: 3 draws allow no p below 0.4; 38 are needed for 0.05" in text
    assert "survives correction" not in text and "**improvement**" not in text


@pytest.mark.parametrize(("value", "says"), [(True, "an improvement cannot be seen"), (False, "a harm cannot be seen")])
def test_floors_and_ceilings_come_first_and_ties_have_no_best(value: bool, says: str) -> None:
    trials = simulate_trials(**SMALL)
    trials["correct"], trials["parsed"] = value, True
    text = summary(analyse(trials, FAST))
    family = text.split("## kv")[1]
    assert says in family.split("| exit after")[0] and family.count(says) == 1
    assert "Best: none to name, 16 cells share 0.0 points." in text and "Worst: none to name" in text
    assert re.search(rf"No {'improvement' if value else 'harm'} could be found", text)
    one = trials[(trials["target"] <= 2) & (trials["latent"] == 2) & (trials["coefficient"] >= 0)]
    assert "The only cell:\n- A1−B2 · c = +1 · latent 2" in summary(analyse(one, FAST))
    trials["parsed"] = value
    if not value:
        assert "No unsteered answer has a number" in summary(analyse(trials, FAST))


def test_words_are_defined_before_they_are_used() -> None:
    text = summary(analyse(simulate_trials(**{**SMALL, "timing": "cached"}), FAST))
    words, rest = text.split("## Words")[1].split("## kv", 1)
    for word in ("c:", "Cell:", "Cluster:", "Rank:", "q:", "Family-wise:", "Beyond p:", "Cached:"):
        assert word in words
    assert "Early exit" not in text and "neither list need contain the other" in rest


def test_the_calibration_experiment_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trials").mkdir()
    skewed(1).to_parquet(tmp_path / "trials" / "part-0.parquet")
    options = StatsOptions(tmp_path, resamples=100, permutations=100, calibrate=True)
    recompute.main(options)
    printed = capsys.readouterr().out
    assert "## Calibration" in printed and "Promised: anything at all in at most 5 % of the families." in printed
    table = pd.read_csv(tmp_path / "statistics" / "calibration.csv")
    assert len(table) == 4 and (table["families"] == 40).all() and set(table["rule"]) == {IN_USE, NORMAL}
    counts = table["counts"].str.split().map(lambda words: [int(word) for word in words])
    assert (counts.map(lambda numbers: sum(number > 0 for number in numbers)) == table["with_any"]).all()
    assert printed.startswith((tmp_path / "summary.md").read_text(encoding="utf-8").rstrip())
