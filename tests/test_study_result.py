"""result.json: what was written is what is read, and what is printed comes from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from experiments.study.claims import Claim, ClaimsTable
from experiments.study.folder import RunFolder
from experiments.study.result import FigureFiles, Result, Section


def result(path: Path) -> Result:
    claims = ClaimsTable([
        Claim("C1", "peaks", "acc(5)", "held", 0.1, 0.05, 0.2, 40, 4),
        Claim("S3", "therefore", "–", "not testable", note="no such token"),
    ])  # fmt: skip
    return Result(
        study="necessity",
        title="Necessity of latents",
        command="codi necessity --draws 1",
        model="tiny",
        path=path,
        sections=(Section("40 prompts."), Section("0: 1.0\n\n| a |\n|---|\n| b |", "How many")),
        tables={"levels": pd.DataFrame({"kind": ["", "NA"], "mean": [0.1 + 0.2, math.nan], "n": [1, 2]})},
        figures=(
            FigureFiles("b", ("figures/b.png", "figures/b.pdf"), "Accuracy."),
            FigureFiles("a", ("figures/a.png",)),
        ),
        claims=claims,
    )


def test_written_and_read(tmp_path: Path) -> None:
    folder, made = RunFolder(tmp_path), result(tmp_path)
    folder.write_table("levels", made.tables["levels"])
    made.write(folder.write)
    assert not list(tmp_path.glob("*.partial"))
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["claims"][1]["estimate"] is None and record["command"] == "codi necessity --draws 1"
    assert record["tables"] == [{"name": "levels", "file": "levels.csv", "rows": 2, "columns": ["kind", "mean", "n"]}]
    read = Result.read(tmp_path)
    assert (read.study, read.title, read.command, read.model) == (made.study, made.title, made.command, made.model)
    assert (read.sections, read.figures, read.path) == (made.sections, made.figures, made.path)
    assert read.claims is not None and math.isnan(read.claims["S3"].estimate)
    assert read.claims["C1"] == made.claims["C1"]  # type: ignore[index]
    assert list(read.tables) == ["levels"] and read.tables["levels"]["mean"][0] == 0.1 + 0.2
    assert read.markdown() == made.markdown() == (tmp_path / "summary.md").read_text(encoding="utf-8").rstrip("\n")


def test_what_is_printed(tmp_path: Path) -> None:
    lines = result(tmp_path).markdown().split("\n\n")
    assert lines[:3] == ["# Necessity of latents: tiny", "40 prompts.", "**How many.** 0: 1.0"]
    assert "## Published claims" in lines and lines[-1] == (
        f"Tables and trials: {tmp_path}; figures (PNG and PDF): a.png, b.png."
    )
    bare = Result("x", "X", "codi x", "tiny", tmp_path)
    assert bare.text == f"# X: tiny\n\nTables and trials: {tmp_path}; figures (PNG and PDF): none."


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no result.json"),
        ("{", "is damaged"),
        ("[]", "another version"),
        ('{"format": 99}', "another version"),
    ],
)
def test_no_result(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        Result.read(tmp_path)
