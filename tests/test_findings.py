"""codi findings: the studies run as their own commands, the page keeps a person's words, refusals are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.page import findings
from experiments.page.findings import MARKER, Config, Study, claims_table, demoted, options, section, write_page

STUDY = Study("early-exit", ("early-exit",), "Answering after each latent.", ("early-exit",))


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_every_study_is_a_command_with_defaults_of_its_own() -> None:
    from experiments.cli import COMMANDS

    for study in findings.STUDIES:
        assert study.command[0] in COMMANDS
        assert study.reads is None or study.reads[1] in [one.name for one in findings.STUDIES]
    assert options(Config(), STUDY) == []
    lens = next(study for study in findings.STUDIES if study.name == "lens-show")
    assert options(Config(out=Path("a"), seed=3), lens) == ["--seed", "3", "--lens", "a/lens"]


def test_one_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the model in the box: what the page says is what the command prints, and the figure lies beside it."""
    quick = Study("early-exit", ("early-exit", "--limit", "6", "--derivation", "8", "--resamples", "100",
                                 "--permutations", "100"), "…", ("early-exit",))  # fmt: skip
    wrong = Study("patch", ("patch", "--limit", "0"), "…")
    monkeypatch.setattr(findings, "STUDIES", (quick, wrong))
    page = tmp_path / "page.md"
    put(tmp_path, "page.md", f"# My words\n\nkept\n\n{MARKER}\nof last week\n")
    findings.main(Config(model="checkpoints/tiny", out=tmp_path / "runs", page=page))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# My words\n\nkept\n") and "of last week" not in text
    printed = (tmp_path / "runs" / "early-exit" / "printed.md").read_text(encoding="utf-8")
    assert printed.splitlines()[0].startswith("# Early exit") and "\n### Early exit" in text
    assert (tmp_path / "page" / "early-exit-early-exit.png").stat().st_size > 1000
    assert "Not run on this model: limit must be at least 1, got 0" in text
    assert "C1 (jump)" in text.split("## `codi")[0]  # the table of claims on top
    with pytest.raises(ValueError, match="early-exit"):  # another seed in the same folder: refused, and nothing is lost
        findings.main(Config(model="checkpoints/tiny", out=tmp_path / "runs", page=page, seed=1))
    assert (tmp_path / "runs" / "early-exit" / "printed.md").read_text(encoding="utf-8") == printed
    assert page.read_text(encoding="utf-8") == text


def test_a_page_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "notes.md", "my notes")
    with pytest.raises(ValueError, match="choose another --page"):
        findings.main(Config(out=tmp_path, page=tmp_path / "notes.md"))
    assert (tmp_path / "notes.md").read_text() == "my notes"
    with pytest.raises(ValueError, match="no study: 'patches'"):
        Config(only=("patches",))


def test_plain_text_is_fenced_and_tables_are_not() -> None:
    text = "held-out KL\nlayer  1  2\n\n| claim | number |\n|---|---|\n| S1 | 2 |\n"
    assert demoted(text) == "```text\nheld-out KL\nlayer  1  2\n```\n\n| claim | number |\n|---|---|\n| S1 | 2 |"
    assert demoted("# Title\n\n## Part\n**bold**") == "### Title\n\n#### Part\n**bold**"


def test_claims_of_all_studies_in_one_table(tmp_path: Path) -> None:
    rows = [
        {"name": "C9", "statement": "it rains", "measured": "drops", "verdict": "held", "estimate": 0.5, "lower": 0.4,
         "upper": 0.6, "n": 10, "n_clusters": 5, "note": ""},
        {"name": "C8", "statement": "it snows", "measured": "flakes", "verdict": "not testable", "estimate": None,
         "lower": None, "upper": None, "n": 0, "n_clusters": 0, "note": "too warm"},
    ]  # fmt: skip
    put(tmp_path, "patch/claims.json", json.dumps(rows))
    table = claims_table(Config(out=tmp_path))
    assert table[2] == "| `patch` | C9 | it rains | 0.500 [0.400, 0.600], n = 10 in 5 clusters | **held** |"
    assert table[3] == "| `patch` | C8 | it snows | – | **not testable** |"
    assert section(STUDY, Config(out=tmp_path)) == []  # not run: not on the page
    put(tmp_path, "early-exit/refused.txt", "no numbers here\n")
    config = Config(out=tmp_path, page=tmp_path / "page.md")
    write_page(config)
    assert "Not run on this model: no numbers here" in config.page.read_text(encoding="utf-8")
