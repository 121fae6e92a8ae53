"""The printed summary: every number in it is in the tables, and it says plainly when nothing survives."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated_sweep import simulate_trials

from experiments.statistics.clusters import Settings
from experiments.statistics.words import interval, p_number
from experiments.sweep import summary as report
from experiments.sweep.analysis import Analysis, analyse

FAST = Settings(resamples=200, permutations=200)
SMALL: dict = {"pairs": 4, "latents": (2, 3), "sizes": (1.0,), "prompts": 60, "clusters": 30, "draws": 40}


def page(analysis: Analysis) -> str:
    text = report.summary(analysis)
    assert "nan" not in text.lower().replace("unanswered", "")
    return text


def test_it_reports_what_was_put_in() -> None:
    effects = {(1, 2, 1.0, 3): 0.9, (1, 3, -1.0, 2): -0.9}
    analysis = analyse(simulate_trials(**SMALL, effects=effects), FAST)
    text = page(analysis)
    assert "1 improvement, 1 harm** of 16 cells" in text
    best, worst = text.split("Best:")[1].split("Worst:")
    assert best.splitlines()[1].startswith("- A1−B2 · c = +1 · latent 3:") and "improvement" in best
    assert worst.splitlines()[1].startswith("- A1−B3 · c = −1 · latent 2:") and "**harm**" in worst
    cell = analysis.cells.sort_values("difference").iloc[-1]
    assert f"{100 * cell['accuracy']:.1f} %, {100 * cell['difference']:+.1f} points" in best
    for latent in (2, 3):
        levels = analysis.controls[analysis.controls["control"] == "none"]
        base = levels[levels["latent"] == latent].iloc[0]
        assert f"{100 * base['accuracy']:.1f} [" in text.split("baseline (unsteered)")[1].splitlines()[0]
    assert "Nothing survives" not in text and "none of 8 that were run with both" in text
    assert "60 prompts in 30 clusters" in text


def test_it_says_when_nothing_survives() -> None:
    text = page(analyse(simulate_trials(**SMALL), FAST))
    assert "0 improvements, 0 harms** of 16 cells" in text
    assert "**Nothing survives correction**" in text
    text = page(analyse(simulate_trials(**SMALL, effects={(1, 3, -1.0, 2): -0.9}), FAST))
    assert "**No improvement survives correction.**" in text and "Nothing survives" not in text


def test_without_controls_or_directions_it_claims_nothing() -> None:
    trials = simulate_trials(**SMALL, effects={(1, 2, 1.0, 3): 0.9})
    text = page(analyse(trials[trials["control"] != "random"], FAST))
    assert "No random directions were run" in text and "no random draws" in text and "**improvement**" not in text
    text = page(analyse(trials[trials["control"] != "direction"], FAST))
    assert "No direction was run" in text and "random directions" in text


def test_a_table_is_a_table() -> None:
    """Every row of the levels has as many columns as the header (a bar inside a cell would break it)."""
    trials = simulate_trials(**SMALL, controls=("random", "shuffled"), patches=("patch-norm",), timing="cached")
    rows = [line for line in page(analyse(trials, FAST)).splitlines() if line.startswith("|")]
    assert len(rows) == 6 and {row.count("|") for row in rows} == {4}
    assert "edited latent" in rows[0]


def test_it_says_where_the_figures_are(tmp_path: Path) -> None:
    analysis = analyse(simulate_trials(**SMALL), FAST)
    assert f"codi plot {tmp_path}" in report.summary(analysis, tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").touch()
    assert f"1 in {tmp_path / 'figures'}" in report.summary(analysis, tmp_path)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.500"), (0.00012, "1e−4"), (float("nan"), "unknown"), (1e-12, "1e−12")]
)
def test_p_values_in_words(value: float, text: str) -> None:
    assert p_number(value) == text


def test_no_negative_zero() -> None:
    assert report.percent(-0.0001, sign=True) == "0.0" and report.percent(-0.012, sign=True) == "−1.2"


def test_a_number_that_nothing_bounds_has_no_interval():
    row = {"mean": 1.0, "lower": float("-inf"), "upper": float("inf")}
    assert interval(row, scale=1) == "1.0 (no interval)"
    assert interval({**row, "lower": 0.5, "upper": 2.0}, scale=1) == "1.0 [0.5, 2.0]"
