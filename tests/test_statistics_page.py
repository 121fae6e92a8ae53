"""docs/statistics.md: every number of its cell is what its command gives, computed here with nothing but counting."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pandas as pd
import pytest

from experiments import cli
from experiments.study.edits.trials import read_trials

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "statistics.md"


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join(PAGE.read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of the page, in another folder."""
    line = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    codi sweep"))
    words = shlex.split(line)[1:]
    out = tmp_path_factory.mktemp("page") / "run"
    words[words.index("--out") + 1] = str(out)
    cli.main([*words, "--model", str(ROOT / "checkpoints" / "tiny")])
    return out


def test_the_cell_by_counting(page: str, run: Path) -> None:
    trials = read_trials(run)
    right = {
        control: rows.groupby("draw")["correct"].sum().tolist()
        for control, rows in trials.groupby("control", observed=True)
    }
    (before,), (after,), draws = right["none"], right["direction"], sorted(right["random"])
    assert f"right on {before} of 40 prompts, {before / 0.4:.1f} %" in page
    assert f"right on {after} of 40, {after / 0.4:.1f} %" in page
    wide = trials[trials["control"] != "random"].pivot(index="prompt_id", columns="control", values="correct")
    lost, gained = (wide["none"] & ~wide["direction"]).sum(), (~wide["none"] & wide["direction"]).sum()
    assert f"{gained} prompts gained, {lost} lost" in page and gained == 0
    assert f"0.5^{lost} = {0.5**lost:.1e}".replace("e-", "e-") in page and f"= {2 * 0.5**lost:.1e}" in page
    assert " ".join(f"{number / 0.4:.1f}" for number in draws) in page
    assert f"mean is {sum(draws) / len(draws) / 0.4:.1f} %" in page
    better, ties = sum(number > after for number in draws), sum(number == after for number in draws)
    assert f"{better} draws are better and one ties" in page and ties == 1
    assert f"so {1 + better + ties / 2:g} of {1 + len(draws)}" in page
    worse = sum(number <= after for number in draws)
    assert f"p = (1 + {worse}) / (1 + 40) = {(1 + worse) / 41:.3f}" in page
    nothing = sum(number == 0 for number in draws)
    assert f"p = {1 + nothing}/41 = {(1 + nothing) / 41:.3f}" in page and (1 + nothing) / 41 > 0.05
    needed = next(k for k in range(40) if 0.5**k <= 0.05)
    assert f"at least {needed} clusters gained (0.5^{needed} = {0.5**needed:.3f}" in page
    cell = pd.read_csv(run / "cells.csv").iloc[0]
    assert cell["beyond_harm_p"] == pytest.approx((1 + worse) / 41) and cell["verdict"] == "none"
    assert cell["loss_p"] == cell["loss_q"] == pytest.approx(0.5**lost)
    assert f"[{100 * cell['lower']:.1f}, {100 * cell['upper']:.1f}] points".replace("-", "−") in page


def test_the_general_numbers(page: str) -> None:
    assert f"u = {1 - 0.025 ** (1 / 13):.3f}: [{100 * 0.025 ** (1 / 13):.1f} %, 100 %]" in page
    assert 2 / (2 + 38) <= 0.05 < 2 / (2 + 37) and "38 draws per pair" in page
    assert 30 / (30 + 570) <= 0.05 < 30 / (30 + 569) and "570 where thirty" in page
    assert 3 * 2 / (2 + 118) <= 0.05 < 3 * 2 / (2 + 117) and "With 120 draws per pair or more" in page  # and 2 to play
    assert 1 - math.comb(37, 1) / math.comb(41, 1) == pytest.approx(4 / 41)
    assert 15 * 2 * 3 * 6 == 540
