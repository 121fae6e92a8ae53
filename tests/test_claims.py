"""Claims: the rule of the verdict, a table that refuses what it cannot back, and files that can be read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from experiments.statistics.equivalence import judge_presence
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.folder import RunFolder


@pytest.mark.parametrize(
    ("lower", "upper", "bounds", "verdict"),
    [
        (0.01, 0.2, {"above": 0.0}, "held"),
        (0.0, 0.2, {"above": 0.0}, "undecided"),  # touches the bound
        (-0.1, 0.2, {"above": 0.0}, "undecided"),
        (-0.2, -0.1, {"above": 0.0}, "not held"),
        (-0.2, -0.1, {"below": 0.0}, "held"),
        (-0.2, 0.1, {"below": 0.0}, "undecided"),
        (-0.01, 0.01, {"above": -0.02, "below": 0.02}, "held"),
        (-0.03, 0.01, {"above": -0.02, "below": 0.02}, "undecided"),
        (0.03, 0.05, {"above": -0.02, "below": 0.02}, "not held"),
        (math.nan, math.nan, {"above": 0.0}, "not testable"),
    ],
)
def test_a_claim_is_held_only_if_the_whole_interval_is_on_its_side(
    lower: float, upper: float, bounds: dict[str, float], verdict: str
) -> None:
    assert judge_presence(lower, upper, **bounds).verdict == verdict


def test_judge_refuses_a_rule_without_bound_and_a_reversed_interval() -> None:
    with pytest.raises(ValueError, match="needs a bound"):
        judge_presence(0.0, 1.0)
    with pytest.raises(ValueError, match="must not exceed"):
        judge_presence(1.0, 0.0, above=0.0)


def test_a_verdict_needs_its_number_and_a_missing_test_its_reason() -> None:
    with pytest.raises(ValueError, match="needs the number"):
        Claim("C1", "accuracy peaks at 5", "acc(5)", "held")
    with pytest.raises(ValueError, match="say in note why"):
        Claim("C1", "accuracy peaks at 5", "acc(5)", "not testable")
    with pytest.raises(ValueError, match="verdict must be one of"):
        Claim("C1", "accuracy peaks at 5", "acc(5)", "perhaps", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in the table already"):
        ClaimsTable([Claim("C1", "a", "b", "held", 1.0), Claim("C1", "a", "b", "held", 1.0)])


def test_a_zero_has_no_sign() -> None:
    claim = Claim("C1", "a", "b", "undecided", 0.0, -0.0002, 0.3, 12, 12)
    assert claim.number == "0.000 [0.000, 0.300], n = 12 in 12 clusters"
    assert Claim("C1", "a", "b", "held", -0.5, -math.inf, -0.1, 12).number == "-0.500 [-inf, -0.100], n = 12"


def test_table_prints_and_reads_back(tmp_path: Path) -> None:
    table = ClaimsTable([
        Claim("C1", "accuracy peaks at 5 | latents", "acc(5) − acc(6)", "not held", -0.0104, -0.02, 0.01, 40, 4),
        Claim("S3", "therefore at odd latents", "–", "not testable", note="no such token"),
    ])  # fmt: skip
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + 2 + 1 + 1 and "5 \\| latents" in lines[2]  # the bar is escaped
    assert "-0.010 [-0.020, 0.010], n = 40 in 4 clusters" in lines[2] and "| – |" in lines[3]
    assert lines[-1] == "- S3: no such token"
    paths = table.write(RunFolder(tmp_path / "new").write)
    assert [path.name for path in paths] == ["claims.csv", "claims.json", "claims.md"]
    read = pd.read_csv(paths[0])
    assert read["name"].tolist() == ["C1", "S3"] and read["estimate"][0] == -0.0104 and math.isnan(read["estimate"][1])
    records = json.loads(paths[1].read_text(encoding="utf-8"))
    assert records[1]["estimate"] is None and records[0]["n_clusters"] == 4
