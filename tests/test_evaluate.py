"""`codi eval`: the same answers as one at a time, right counts, honest intervals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from codi import CodiModel
from experiments import cli
from experiments.evaluate.accuracy import accuracy_table, markdown
from experiments.evaluate.options import EvalOptions
from experiments.study.modes import evaluate
from experiments.study.result import Result
from experiments.tasks import Problem, extract_answer

TEXTS = ["3+4=?", "Tom has 12 pens and buys 30 more. How many pens?", "9-2", "1 2 3 4 5 6 7 8 9 10 11?", "x", "8*8*8"]
PROBLEMS = [
    Problem(f"p{i}", text, i, steps=("1+1=2",) * (i % 2 + 1), cluster=f"c{i // 2}") for i, text in enumerate(TEXTS)
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_one_problem_and_one_condition(codi_model: CodiModel, temperature: float) -> None:
    found = evaluate(codi_model, PROBLEMS, latents=(4, 0, 2), max_new_tokens=5, temperature=temperature, batch_size=4)
    conditions = list(dict.fromkeys(zip(found["mode"], found["n_latents"], strict=True)))
    assert conditions == [("latent", 0), ("latent", 2), ("latent", 4), ("direct", -1), ("verbal", -1)]
    for mode, count in conditions:
        rows = found[(found["mode"] == mode) & (found["n_latents"] == count)]
        alone = codi_model.answer(
            TEXTS, n_latents=max(count, 0), mode=mode, max_new_tokens=5, temperature=temperature, seed=0, batch_size=1
        )
        assert rows["text"].tolist() == alone
        assert rows["prompt_id"].tolist() == [problem.prompt_id for problem in PROBLEMS]
    texts = found.groupby("prompt_id")["text"].nunique()
    assert texts.max() > 1  # conditions do differ, so that the comparison above says something


def test_the_batch_size_changes_nothing(codi_model: CodiModel) -> None:
    tables = [evaluate(codi_model, PROBLEMS, latents=(3,), max_new_tokens=4, batch_size=size) for size in (1, 6)]
    pd.testing.assert_frame_equal(*tables)


def test_right_wrong_and_unparsed(codi_model: CodiModel) -> None:
    first = evaluate(codi_model, PROBLEMS, modes=("latent",), latents=(6,), max_new_tokens=6)
    predictions = [extract_answer(text) for text in first["text"]]
    # now ask with the very answers the model gave for every second problem
    known = [
        Problem(f"p{i}", text, int(predictions[i]) if i % 2 == 0 and predictions[i] is not None else 10**9 + i)
        for i, text in enumerate(TEXTS)
    ]
    second = evaluate(codi_model, known, modes=("latent",), latents=(6,), max_new_tokens=6)
    expected = [
        i % 2 == 0 and predictions[i] is not None and predictions[i] == int(predictions[i]) for i in range(len(TEXTS))
    ]
    assert second["correct"].tolist() == expected
    assert second["parsed"].tolist() == [prediction is not None for prediction in predictions]
    assert second["prediction"].isna().tolist() == [prediction is None for prediction in predictions]


def test_progress_counts_every_answer_and_memory_errors_halve_the_batch(
    codi_model: CodiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    plain = evaluate(codi_model, PROBLEMS, latents=(1, 2), max_new_tokens=3)
    prefill, sizes = CodiModel.prefill, []

    def short_of_memory(self: CodiModel, batch, *arguments, **options):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return prefill(self, batch, *arguments, **options)

    monkeypatch.setattr(CodiModel, "prefill", short_of_memory)
    made: list[int] = []
    halved = evaluate(codi_model, PROBLEMS, latents=(1, 2), max_new_tokens=3, batch_size=8, advance=made.append)
    pd.testing.assert_frame_equal(plain, halved)
    assert sum(made) == len(plain) == 4 * len(PROBLEMS)
    assert sizes == [6, 4] + [2] * 9  # 8 -> 4 -> 2, then three batches for each of three modes


def test_no_problems(codi_model: CodiModel) -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        evaluate(codi_model, [])


def answers(correct: list[bool], clusters: list[int], steps: list[int] | None = None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "mode": "latent", "n_latents": 6, "prompt_id": range(len(correct)), "cluster": clusters, "correct": correct,
            "n_steps": steps or 1, "parsed": True,
        }
    )  # fmt: skip


def test_interval_is_as_wide_as_the_clusters_are_few() -> None:
    correct = [True, True, True, False] * 50
    alone = accuracy_table(answers(correct, list(range(200)))).iloc[0]
    shared = accuracy_table(answers(sorted(correct), [i // 10 for i in range(200)])).iloc[0]
    for row in (alone, shared):
        assert row["accuracy"] == 0.75 and row["lower"] < 0.75 < row["upper"]
    assert (alone["n_clusters"], shared["n_clusters"]) == (200, 20)
    # independent problems: close to the normal interval 0.75 +- 1.96 sqrt(0.75 * 0.25 / 200) = 0.75 +- 0.060
    assert alone["upper"] - alone["lower"] == pytest.approx(0.12, abs=0.015)
    assert shared["upper"] - shared["lower"] > 2 * (alone["upper"] - alone["lower"])


def test_all_right_or_all_wrong_still_has_an_interval() -> None:
    """Clopper-Pearson by hand: 0 of 10 clusters, upper = 1 - 0.025 ** (1 / 10) = 0.3085."""
    wrong = accuracy_table(answers([False] * 20, [i // 2 for i in range(20)])).iloc[0]
    assert (wrong["accuracy"], wrong["lower"]) == (0, 0) and wrong["upper"] == pytest.approx(0.3085, abs=1e-4)
    right = accuracy_table(answers([True] * 20, [i // 2 for i in range(20)])).iloc[0]
    assert (right["accuracy"], right["upper"]) == (1, 1) and right["lower"] == pytest.approx(0.6915, abs=1e-4)


def test_by_number_of_steps() -> None:
    table = accuracy_table(answers([True, False, True, True], [0, 1, 2, 3], steps=[1, 1, 3, 3]))
    assert table["n_steps"].tolist() == [-1, 1, 3]
    assert table["accuracy"].tolist() == [0.75, 0.5, 1.0]
    assert table["n"].tolist() == [4, 2, 2]
    text = markdown(table)
    assert text.splitlines()[0] == "| mode | latents | all (n=4) | 1 step (n=2) | 3 steps (n=2) | no number |"
    assert text.splitlines()[2].startswith("| latent | 6 | 0.750 [") and len(text.splitlines()) == 3


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()  # what making the checkpoint said
    code = 0
    options = ["--model", str(folder / "checkpoint"), "--base", str(folder / "base"), "--device", "cpu"]
    try:
        cli.main(["eval", *options, *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_command_prints_and_writes_the_same_table(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"question": text, "answer": i}) for i, text in enumerate(TEXTS)))
    out, rows = tmp_path / "new" / "table.json", tmp_path / "new" / "answers.csv"
    options = ["--task", str(prompts), "--latents", "0", "6", "--modes", "latent", "direct", "--max-new-tokens", "4"]
    code, printed, err = run(capsys, tiny_checkpoint(), *options, "--out", str(out), "--write-answers", str(rows))
    assert code == 0, err
    lines = [line for line in printed.splitlines() if line.startswith("| latent |") or line.startswith("| direct |")]
    assert len(lines) == 3
    report = json.loads(out.read_text())
    assert [row["n_latents"] for row in report["accuracy"]] == [0, 6, -1]
    assert report["options"]["task"] == str(prompts) and len(report["checkpoint_hash"]) == 64
    assert report["protocol"]["name"] == "answer-only"
    written = pd.read_csv(rows, keep_default_na=False)
    assert len(written) == 3 * len(TEXTS)
    for row in report["accuracy"]:
        mine = written[(written["mode"] == row["mode"]) & (written["n_latents"] == row["n_latents"])]
        assert np.isclose((mine["correct"].astype(str) == "True").mean(), row["accuracy"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.csv", "table.json"]


def test_suffix_of_the_protocol_is_asked_unless_turned_off(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"question": "3+4?", "answer": 7}]))
    asked: list[str] = []
    encode = CodiModel.encode

    def listen(self: CodiModel, texts: list[str], *arguments: str, **options: str):
        asked.extend(texts)
        return encode(self, texts, *arguments, **options)

    monkeypatch.setattr(CodiModel, "encode", listen)
    options = ["--task", str(prompts), "--modes", "direct", "--max-new-tokens", "2"]
    run(capsys, tiny_checkpoint(), *options)
    with_suffix = asked[-1]
    run(capsys, tiny_checkpoint(), *options, "--no-suffix")
    assert with_suffix == "3+4? Output only the answer and nothing else." and asked[-1] == "3+4?"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--task", "nope"), "unknown task 'nope': no such file or folder; allowed: arithmetic"),
        (("--task", "arithmetic", "--split", "valid"), "split must be one of"),
        (("--latents", "-1"), "latents must be 0 or more, got -1"),
        (("--latents", "six"), "cannot read 'six'"),
        (("--temperature", "-1"), "temperature must be 0 (greedy) or more"),
        (("--batch-size", "0"), "batch-size must be at least 1"),
        (("--out", "table.xlsx"), "out must end in .json or .csv"),
        (("--out", "/dev/null/table.csv"), "/dev/null"),
        (("--task", "arithmetic", "--limit", "3", "--model", "no/such/folder/here"), "no/such/folder/here"),
    ],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], says: str, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, tiny_checkpoint(), *options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and says in err, err


def test_configuration_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one of"):
        EvalOptions(modes=())
    with pytest.raises(ValueError, match=r"answers must end in \.csv"):
        EvalOptions(write_answers=Path("a.json"))


def test_a_folder_is_a_run_like_any_other(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers as without one; result.json; goes on; other options are refused with the difference."""
    folder, rows, table = tmp_path / "run-1.5", tmp_path / "rows.csv", tmp_path / "table.csv"
    options = ["--limit", "6", "--latents", "0", "2", "--max-new-tokens", "3", "--seed", "3"]
    code, printed, err = run(capsys, tiny_checkpoint(), *options, "--out", str(folder), "--write-answers", str(rows))
    assert code == 0, err
    result = Result.read(folder)
    assert printed == result.markdown() + "\n" and result.study == "eval"
    assert "arithmetic, split test, 6 problems in 6 clusters" in printed
    assert {path.stem for path in (folder / "trials").iterdir()} == {
        "part-answers-latent", "part-answers-direct", "part-answers-verbal",
    }  # fmt: skip
    files, others = tiny_checkpoint(), tmp_path / "others.csv"
    code, alone, err = run(capsys, files, *options, "--out", str(table), "--write-answers", str(others))
    assert code == 0, err
    assert table.read_bytes() == (folder / "accuracy.csv").read_bytes()
    assert rows.read_bytes() == (tmp_path / "others.csv").read_bytes()
    assert alone.strip() in printed  # the folder's last line apart
    modified = (folder / "trials" / "part-answers-latent.parquet").stat().st_mtime_ns
    assert run(capsys, files, *options, "--out", str(folder), "--batch-size", "2")[0] == 0
    assert (folder / "trials" / "part-answers-latent.parquet").stat().st_mtime_ns == modified
    code, out, err = run(capsys, files, *options, "--out", str(folder), "--temperature", "1")
    assert (code, out) == (2, "") and "options.temperature: 0.0 -> 1.0" in err and err.count("\n") == 1
