"""experiments.show: the answers behind a cell of a sweep, by either name of the edit, and summaries of other runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from codi import CodiModel
from experiments import cli
from experiments.show.cells import CHANGES, cells_of, listing, there
from experiments.show.options import ShowOptions
from experiments.show.run import shown
from experiments.study.edits.trials import read_trials
from experiments.study.folder import RunFolder
from experiments.study.prompts_file import FILE, questions_of
from experiments.study.result import Result, Section
from experiments.sweep.options import SweepOptions
from experiments.sweep.run import sweep


@pytest.fixture(scope="module")
def run(codi_model: CodiModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of seconds in two spaces and two timings."""
    options = SweepOptions(
        out=tmp_path_factory.mktemp("show") / "run", task="arithmetic", limit=6, min_steps=1, max_steps=1, derivation=8,
        draws=2, pairs=("1-2", "3-1"), latents=("1", "3"), coefficients=("-1", "4"), max_new_tokens=2,
        timing=("cached", "early-exit"), part_prompts=4,
    )  # fmt: skip
    return sweep(options, codi_model).path


def test_a_cell_is_that_of_the_trial_table(run: Path) -> None:
    """Oracle: the whole table in pandas. (3, 1, c) is kept as (1, 3, -c)."""
    trials = read_trials(run)
    cells = cells_of(run, (3, 1), 3, 4.0)
    assert [(cell.space, cell.part, cell.timing) for cell in cells] == [
        (space, "both", timing) for space in ("embedding", "kv") for timing in ("cached", "early-exit")
    ]
    flips = 0
    for cell in cells:
        here = trials[(trials["space"] == cell.space) & (trials["timing"] == cell.timing)]
        edited = here[(here["source"] == 1) & (here["target"] == 3) & (here["control"] == "direction")]
        edited = edited[(edited["coefficient"] == -4) & (edited["latent"] == 3)].set_index("prompt_id")
        plain = here[(here["control"] == "none") & here["latent"].isin((0, 3))].set_index("prompt_id")
        found = cell.answers.set_index("prompt_id")
        assert len(found) == len(edited) == 6
        for name, column, table in (
            ("steered", "text", edited), ("unsteered", "text", plain), ("is_right", "correct", edited),
            ("was_right", "correct", plain), ("answer", "answer", edited),
        ):  # fmt: skip
            assert found[name].astype(str).to_dict() == table[column].astype(str).to_dict(), name
        place = [CHANGES.index(change) for change in cell.answers["change"]]
        assert place == sorted(place)  # flips first
        assert sum(cell.count(change) for change in CHANGES) == 6
        flips += 6 - cell.count("same")
    assert flips  # the edit did something, so the order was tried
    other = cells_of(run, (1, 3), 3, -4.0)
    pd.testing.assert_frame_equal(other[0].answers, cells[0].answers)
    another = cells_of(run, (3, 1), 3, -1.0)
    assert any(not a.answers["steered"].equals(b.answers["steered"]) for a, b in zip(another, cells, strict=True))


def test_draws_and_a_choice_of_families(run: Path) -> None:
    (one,) = cells_of(run, (1, 2), 1, -1.0, draw=1, only={"space": "kv", "timing": "cached", "part": None})
    trials = read_trials(run)
    rows = trials[(trials["control"] == "random") & (trials["draw"] == 1) & (trials["source"] == 1)]
    rows = rows[(rows["target"] == 2) & (rows["latent"] == 1) & (rows["coefficient"] == 1)]
    rows = rows[(rows["space"] == "kv") & (rows["timing"] == "cached")].set_index("prompt_id")
    assert one.answers.set_index("prompt_id")["steered"].to_dict() == rows["text"].astype(str).to_dict()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (((5, 2), 1, 1.0), "no pair 2-5; there are: pair 1-2, 1-3 (or the other way round)"),
        (((1, 2), 2, 1.0), "no latent 2; there are: latent 1, 3"),
        (((1, 2), 1, 0.5), "no coefficient 0.5; there are: coefficient ±1, ±4"),
        (((1, 3), 1, 4.0), "pair 1-3 was run with coefficients -4, +1, at latents 1, 3, got +4 and 1"),
        (((1, 2), 1, 1.0, 7), "no draw 7; there are: draw 0, 1"),
        (((1, 2), 1, 1.0, None, {"space": "hidden"}), "no space hidden; there are: space embedding, kv"),
        (((1, 2), 1, 1.0, None, {"timing": "continue"}), "no timing continue; there are: timing cached, early-exit"),
    ],
)
def test_unknown_cells_are_refused_with_what_is_there(run: Path, given: tuple, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        cells_of(run, *given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_printed(run: Path) -> None:
    options = ShowOptions(run, pair="3-1", latent=3, coefficient=4, space="kv", timing="cached")
    text = shown(options)
    assert text.startswith("## A3−B1 · c = +4 · latent 3 · kv (both) · cached")
    questions = questions_of(run)
    assert len(questions) == 14  # 6 that are asked, 8 that directions come from
    for question in [questions[prompt] for prompt in cells_of(run, (3, 1), 3, 4.0)[0].answers["prompt_id"]]:
        assert " ".join(question.split()[:5]) in text
    assert text.count("gold ") == 6 and "gold 1" in text and text.count("unsteered ") == 7
    assert shown(ShowOptions(run, pair="3-1", latent=3, coefficient=4, space="kv", limit=2)).count("gold ") == 4
    assert "and 4 more: --limit None lists all" in shown(ShowOptions(run, pair="3-1", latent=3, coefficient=4, limit=2))


def test_folders_of_early_versions_are_read(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    (old / FILE).unlink()
    text = shown(ShowOptions(old, pair="3-1", latent=3, coefficient=4))
    assert text.endswith("holds no questions: its own command, given again, adds prompts.jsonl.")
    assert text.count("gold ") == 24
    (old / FILE).write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl is damaged"):
        shown(ShowOptions(old, pair="3-1", latent=3, coefficient=4))


def test_prompts_are_written_once_with_every_side(run: Path) -> None:
    records = [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").splitlines()]
    assert [record["side"] for record in records] == ["evaluation"] * 6 + ["derivation"] * 8
    assert all(record["question"] and record["steps"] and record["cluster"] for record in records)
    assert set(read_trials(run)["prompt_id"].astype(str)) == {r["id"] for r in records if r["side"] == "evaluation"}


def test_summaries(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text('{"identity": {"study": "necessity"}}')
    with pytest.raises(ValueError, match=r"a run of `codi necessity`, has no result\.json yet: run its command to"):
        shown(ShowOptions(tmp_path))
    result = Result("necessity", "Necessity", "codi necessity", "tiny", tmp_path, (Section("All of them."),))
    result.write(RunFolder(tmp_path).write)
    cli.main(["show", str(tmp_path)])
    assert "All of them." in capsys.readouterr().out
    for arguments, says in (
        ([str(tmp_path), "--pair", "1-2", "--latent", "1", "--coefficient", "1"], "run of `codi necessity`: cells"),
        ([str(run), "--pair", "1-2"], "--latent and --coefficient must be given too"),
        ([str(run), "--pair", "one"], "pair must look like 5-2 (A-B), got 'one'"),
        ([str(run), "--coefficient", "0"], "coefficient must be a number other than 0"),
        ([str(run / "nowhere")], "no run folder"),
        ([str(run / "trials")], "is not a run folder: it has no manifest.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["show", *arguments])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and says in printed.err and printed.err.count("\n") == 1, printed.err
    with pytest.raises(ValueError, match="codi stats .* makes it from the trials"):
        shown(ShowOptions(run))


def test_lists_in_words(run: Path) -> None:
    assert there(run)["pair"] == ["1-2", "1-3"] and there(run)["draw"] == [0, 1]
    assert listing("latent", [1, 2, 3]) == "1..3" and listing("latent", [1, 3]) == "1, 3"
    assert listing("draw", []) == "none"
