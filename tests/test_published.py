"""codi published: end to end on golden-size models laid out like the hub's; its table of accuracies; no connection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import cli
from experiments.page import published
from experiments.page.comparison import Column
from experiments.page.findings import arguments
from experiments.page.markdown import Found
from experiments.page.published import accuracies, entries_of, fetch
from experiments.page.published_options import PublishedOptions
from experiments.page.reported import REPORTED
from experiments.page.studies import DATA_SETS, PUBLISHED_STUDIES, Entry
from experiments.study.folder import RunFolder
from experiments.study.result import Result

GOLDEN = Path(__file__).resolve().parent / "golden"
COPIES = {
    "CODI-gpt2": "gpt2_original/checkpoint", "gpt2": "gpt2_original/base",
    "codi_llama1b-answer_only": "llama_answer_only/checkpoint", "Llama-3.2-1B-Instruct": "llama_answer_only/base",
}  # fmt: skip
MODELS = ("zen-E/CODI-gpt2", "bcywinski/codi_llama1b-answer_only")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Checkpoints, base models and a data set under the last parts of their hub ids, as `hf download` has them."""
    folder = tmp_path / "copies"
    for name, source in COPIES.items():
        shutil.copytree(GOLDEN / source, folder / name)
    (folder / "gsm8k").mkdir()
    record = {"question": "Tom has {} pens and buys 3 more. How many pens?", "answer": "{} + 3 = <<{}+3={}>>\n#### {}"}
    lines = []
    for n in range(4, 10):
        answer = record["answer"].format(n, n, n + 3, n + 3)
        lines.append(json.dumps({"question": record["question"].format(n), "answer": answer}))
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_end_to_end_on_golden_size_models(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both masks and one grid, of two models: the pages are written, a second call computes nothing again."""
    small = ("--pairs", "1-2", "--latents", "5", "--draws", "2", "--derivation", "8", "--no-plots")
    grid = Entry("grid", ("sweep", "--task", "templates", *small, "--coefficients", "1"), "The grid.")
    asked = [entry for entry in PUBLISHED_STUDIES if entry.name.startswith("gsm8k-")]
    monkeypatch.setattr(published, "PUBLISHED_STUDIES", (*asked, grid))
    words = ["published", "--model", *MODELS, "--local", str(local), "--device", "cpu", "--dtype", "float32"]
    words += ["--limit", "4", "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "page.md")]
    cli.main(words)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.index("## Accuracy") < text.index("## Models") < text.index("## Claims by model")
    rows = [line for line in text.splitlines() if line.startswith("| CODI-gpt2 | gsm8k")]
    assert [row.split("|")[3].strip() for row in rows] == ["carried", "carried", "published", "published"]
    assert "| 4 | 43.7 % [1] | -43.7 | **undecided** |" in rows[0]  # of four answers little can be said
    assert "| CODI-gpt2 | svamp | carried | – | – | – | – | not run yet |" in text
    assert "| codi_llama1b-answer_only | gsm8k | published | 0.0 [0.0," in text
    assert "issue 17" in text and "no reported accuracy on these data sets was found" in text
    assert "S5 (kv, cached)" in text and "[CODI-gpt2](page-CODI-gpt2.md)" in text
    folder = tmp_path / "runs" / "CODI-gpt2-gsm8k-published"
    options = json.loads((folder / "manifest.json").read_text())["identity"]["options"]
    assert (options["mask"], options["answers"], options["latents"]) == ("published", "published", [6])
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("part-*.parquet")}
    assert len(parts) == 2 * (2 + 2)  # two models: an answer table for each mask, a grid in each of two spaces
    capsys.readouterr()
    cli.main(words)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text


def test_without_a_connection_it_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(published, "compare", lambda *given: pytest.fail("something was run"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["published", "--out", str(tmp_path / "runs"), "--page", str(tmp_path / "p.md")])
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("looking for")]
    assert stopped.value.code == 2 and len(error) == 1
    assert "zen-E/CODI-llama3.2-1b-Instruct is not a folder here and the Hugging Face hub cannot be reached" in error[0]
    assert not (tmp_path / "runs").exists() and not (tmp_path / "p.md").exists()


def test_a_data_set_that_is_not_there_is_named_before_anything_runs(local: Path, tmp_path: Path) -> None:
    options = PublishedOptions(model=MODELS, local=local)
    shutil.rmtree(local / "gsm8k")
    (local / "gsm8k").mkdir()
    each = [published._options_of(options, model) for model in MODELS]
    assert [one.base for one in each] == [str(local / "gpt2"), str(local / "Llama-3.2-1B-Instruct")]
    with pytest.raises(ValueError, match=f"data set '{local / 'gsm8k'}' cannot be loaded"):
        fetch(each, entries_of(options), ("gsm8k-carried",))
    with pytest.raises(ValueError, match="local must be a folder"):
        PublishedOptions(local=tmp_path / "nowhere").check_inputs()


def test_what_is_run_and_on_what() -> None:
    names = [entry.name for entry in PUBLISHED_STUDIES]
    assert names[:8] == [f"{data}-{mask}" for data in DATA_SETS for mask in ("carried", "published")]
    assert {"grid-legacy", "grid", "lens", "necessity", "pca"} <= set(names) and "sweep" not in names
    assert entries_of(PublishedOptions()) == list(PUBLISHED_STUDIES)  # nothing here: all by hub id
    assert {one.data for one in REPORTED} <= DATA_SETS.keys() and all(0 < one.accuracy < 1 for one in REPORTED)
    assert all(one.source for one in REPORTED)
    given = arguments(PublishedOptions().on(MODELS[0]), Entry("necessity", ("necessity",), "?").on(MODELS[0]))
    out = ["--out", "runs/published/CODI-gpt2-necessity"]
    assert given == ["--dtype", "bfloat16", "--model", MODELS[0], *out]  # not the default of the study
    for entry in PUBLISHED_STUDIES[:10]:  # every word of the commands is an option that exists
        cli.parse(entry.options, list(entry.command[1:]), "codi")


def test_an_accuracy_beside_what_was_reported(tmp_path: Path) -> None:
    def found(name: str, accuracy: float, half: float) -> Found:
        table = pd.DataFrame({
            "mode": "latent", "n_latents": 6, "n_steps": [-1, 2], "accuracy": [accuracy, 0.9],
            "lower": [accuracy - half, 0.8], "upper": [accuracy + half, 1.0], "n": [1319, 100],
        })  # fmt: skip
        folder = RunFolder(tmp_path / name)
        folder.write_table("accuracy", table)
        Result("eval", "Accuracy", "codi eval", "x", folder.path, tables={"accuracy": table}).write(folder.write)
        return Found(Entry(f"CODI-gpt2-{name}", ("eval", name), "?"), Result.read(folder.path))

    def verdicts(*known: Found) -> list[str]:
        lines = accuracies([Column("zen-E/CODI-gpt2", tmp_path / "p.md", known)])
        return [line for line in lines if line.startswith("| CODI-gpt2") and "not run yet" not in line]

    given: list[Any] = verdicts(found("gsm8k-carried", 0.43, 0.027), found("multiarith-carried", 0.80, 0.02))
    assert len(given) == 3  # GSM8K has two figures, the paper's and another run's
    assert "43.0 [40.3, 45.7] % | 1,319 | 43.7 % [1] | -0.7 | **as reported** |" in given[0]
    assert "43.1 % [2], another run" in given[1] and "**not as reported**" in given[2]
    assert "**undecided**" in verdicts(found("gsm-hard-carried", 0.13, 0.03))[0]
