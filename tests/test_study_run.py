"""The road from options to result: what is interrupted goes on, foreign folders are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from planted import planted_model, planted_split

from codi import CodiModel
from experiments import cli
from experiments.figures.style import new_figure
from experiments.study.answers import answer_table, judged, latents_in, set_of, trial_schema
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.folder import RunFolder
from experiments.study.options import StudyOptions
from experiments.study.parts import Part, Workbench
from experiments.study.result import Result, Section
from experiments.study.run import Findings, Study, Trials, fill, read_trials, run_study
from experiments.study.thoughts import derivation_bank, derivation_means, evaluation_thoughts
from experiments.tasks.split import Split

DATA = Path(__file__).parent / "data"
ROWS = trial_schema(latent=pa.int16(), draw=pa.int32())
computed: list[int] = []
stop_at: list[int] = []


@dataclass(frozen=True)
class ToyOptions(StudyOptions):
    """A study for the tests."""

    COMMAND: ClassVar[str] = "toy"
    latents: int = 3
    """How many."""


@dataclass(frozen=True)
class ToyPlan:
    latents: int
    seed: int


def plan(options: ToyOptions, model: CodiModel, prompts: Split) -> ToyPlan:
    if options.latents > model.n_latents:
        raise ValueError(f"latents must be at most {model.n_latents}, got {options.latents}")
    return ToyPlan(options.latents, options.seed)


def parts(plan: ToyPlan) -> list[Part]:
    return [
        Part(f"answers-{k}", answers, {"latent": k}, plan.seed, ROWS, table="answers")
        for k in range(1, plan.latents + 1)
    ]


def answers(bench: Workbench, *, latent: int, seed: int) -> pd.DataFrame:
    if latent in stop_at:
        raise KeyboardInterrupt
    computed.append(latent)
    problems = bench.prompts.evaluation
    return answer_table(problems, range(len(problems)), [str(latent)] * len(problems), latent=latent, draw=-1)


def conclude(plan: ToyPlan, trials: Trials) -> Findings:
    table = trials["answers"].groupby("latent")["correct"].mean().reset_index()

    def figures() -> dict[str, object]:
        figure, axes = new_figure()
        axes[0, 0].plot(table["latent"], table["correct"])
        return {"toy": figure}

    claims = ClaimsTable([Claim("T1", "toys work", "mean", "held", 1.0)])
    return Findings([Section("Well.")], {"by-latent": table}, figures, {"toy": "By latent."}, claims, {"a.txt": b"b"})  # type: ignore[arg-type]


TOY = Study(
    options=ToyOptions,
    title="Toy",
    prompts=lambda options, suffix: planted_split(),
    plan=plan,
    parts=parts,
    conclude=conclude,
)


@pytest.fixture(autouse=True)
def nothing_yet() -> None:
    computed.clear()
    stop_at.clear()


def test_from_options_to_result(tmp_path: Path) -> None:
    said: list[str] = []
    found = run_study(TOY, ToyOptions(out=tmp_path / "run"), planted_model(), say=said.append)
    assert computed == [1, 2, 3] and said[0].startswith("starting toy: checkpoints/tiny, ")
    assert [line.split(":")[0].strip() for line in said[1:]] == ["answers-1", "answers-2", "answers-3"]
    assert found.tables["by-latent"]["latent"].tolist() == [1, 2, 3] and found.command.startswith("codi toy --out")
    assert found.figures[0].files == ("figures/toy.png", "figures/toy.pdf") and found.figures[0].caption == "By latent."
    names = {path.relative_to(found.path).as_posix() for path in found.path.rglob("*") if path.is_file()}
    assert names == {
        ".lock", "manifest.json", "prompts.jsonl", "result.json", "summary.md", "by-latent.csv", "a.txt",
        "figures/toy.png", "figures/toy.pdf", "claims.csv", "claims.json", "claims.md", "trials/part-answers-1.parquet",
        "trials/part-answers-2.parquet", "trials/part-answers-3.parquet",
    }  # fmt: skip
    assert Result.read(found.path).text == found.text
    before = {name: (found.path / name).read_bytes() for name in names - {"manifest.json"}}
    again = run_study(TOY, ToyOptions(out=tmp_path / "run"), planted_model())
    assert computed == [1, 2, 3] and again.text == found.text
    assert {name: (found.path / name).read_bytes() for name in before} == before  # the figures too


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    stop_at.append(2)
    with pytest.raises(KeyboardInterrupt):
        run_study(TOY, ToyOptions(out=tmp_path / "run"), planted_model(), say=said.append)
    assert "the same command goes on" in said[-1] and computed == [1]
    stop_at.clear()
    run_study(TOY, ToyOptions(out=tmp_path / "run"), planted_model(), say=said.append)
    assert computed == [1, 2, 3]


def test_a_stored_part_with_other_columns_or_damage_is_computed_anew(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run_study(TOY, ToyOptions(out=out), planted_model())
    folder = RunFolder(out)
    folder.fingerprint = folder.manifest()["fingerprint"]
    old = folder.read_parts(["answers-2"]).drop(columns="latent").assign(condition="latent 2")
    folder.write_part("answers-2", old)
    folder.part_path("answers-3").write_bytes(b"not parquet")
    again = run_study(TOY, ToyOptions(out=out), planted_model())
    assert computed == [1, 2, 3, 2, 3]
    pd.testing.assert_frame_equal(first.tables["by-latent"], again.tables["by-latent"])


def test_what_does_not_fit_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latents must be at most 6, got 7"):
        run_study(TOY, ToyOptions(out=tmp_path / "run", latents=7), planted_model())
    assert not (tmp_path / "run").exists()


def test_an_executor_may_give_parts_in_any_order(tmp_path: Path) -> None:
    def backwards(parts: Sequence[Part], bench: Workbench) -> object:
        for part in reversed(parts):
            yield part, part.run(bench)

    found = run_study(TOY, ToyOptions(out=tmp_path / "run"), planted_model(), executor=backwards)  # type: ignore[arg-type]
    assert computed == [3, 2, 1] and found.tables["by-latent"]["latent"].tolist() == [1, 2, 3]


def test_a_worker_gets_a_recipe_only_if_the_model_was_loaded_from_options(tmp_path: Path) -> None:
    recipes: list[Any] = []

    def spy(parts: Sequence[Part], bench: Workbench) -> object:
        recipes.append(bench.recipe)
        for part in parts:
            yield part, part.run(bench)

    run_study(TOY, ToyOptions(out=tmp_path / "a"), planted_model(), executor=spy)  # type: ignore[arg-type]
    run_study(TOY, ToyOptions(out=tmp_path / "b", mask="published"), executor=spy)  # type: ignore[arg-type]
    assert recipes[0] is None and recipes[1].arguments["mask"] == "published"


def test_what_a_run_folder_has_takes_the_place_of_computing_it() -> None:
    bench = Workbench(planted_model(), planted_split())
    known = Workbench(planted_model(), planted_split()).once(derivation_means)
    bench.put(known, derivation_means)
    assert bench.once(derivation_means) is known


def test_fill_and_read_trials_by_table(tmp_path: Path) -> None:
    folder, bench = RunFolder(tmp_path / "run"), Workbench(planted_model(), planted_split())
    with folder.open({"study": "toy"}, {}):
        fill(folder, parts(ToyPlan(2, 0)), bench)
    table = read_trials(folder, parts(ToyPlan(2, 0)))["answers"]
    assert table["latent"].tolist() == sorted(table["latent"]) and set(table["latent"]) == {1, 2}


def test_judged_rows_and_sets_of_latents() -> None:
    found = judged(["2", "none", "9", "2"], [2, 2, 2, 3])
    assert found["correct"].tolist() == [True, False, False, False]
    assert found["parsed"].tolist() == [True, False, True, True] and np.isnan(found["prediction"][1])
    assert set_of((1, 3)) == 5 and latents_in(5) == (1, 3) and latents_in(0) == () and set_of(()) == 0


def test_what_parts_share() -> None:
    bench = Workbench(planted_model(), planted_split())
    assert bench.once(derivation_means) is bench.once(derivation_means)
    thoughts = bench.once(evaluation_thoughts, ("embeddings",))
    assert thoughts.problems == bench.prompts.evaluation and thoughts.run.embeddings is not None
    assert len(bench.once(derivation_bank).problems) == len(bench.prompts.derivation)


# --- Every command on a folder that is not its own ---

LM = ["--model", "checkpoints/tiny"]  # a folder that is there; nothing loads it
WRITERS: dict[str, list[str]] = {
    "sweep": ["sweep", "--limit", "8", "--derivation", "8"],
    "lens train": ["lens", "train"],
    "lens show": ["lens", "show", "--read", "plain"],
    "lens detect": ["lens", "detect", "--read", "plain", "--limit", "8"],
    "lens difference": ["lens", "difference", "--read", "plain", "--limit", "8"],
    "eval": ["eval", "--limit", "8"],
    "train": ["train"],
    "lens transfer": ["lens", "transfer", "--limit", "8"],
    "lens causal": ["lens", "causal", "--limit", "8"],
    "necessity": ["necessity"],
    "alternation": ["alternation"],
    "probes": ["probes"],
    "patch": ["patch", "--limit", "8", "--derivation", "24"],
    "transfer": ["transfer", "--limit", "8", "--derivation", "24"],
    "anchors": ["anchors", "--limit", "8", "--derivation", "24"],
    "early-exit": ["early-exit", "--limit", "8", "--derivation", "24"],
    "pca": ["pca", "--limit", "8", "--derivation", "24"],
    "polynomial": ["polynomial", "--limit", "20"],
    "circuit": ["circuit", *LM],
    "circuit-latents": ["circuit-latents"],
    "tune": ["tune", *LM],
    "reasoner": ["reasoner"],
    "cot derive": ["cot", "derive", *LM],
    "cot show": ["cot", "show", *LM],
    "cot run": ["cot", "run", *LM],
    "control derive": ["control", "derive", *LM],
    "control sweep": ["control", "sweep", *LM],
    "control show": ["control", "show", *LM],
    "control transfer": ["control", "transfer", *LM],
}
READERS = {"ask", "findings", "findings-language", "plot", "published", "show", "stats"}
"""Commands that write a run folder, and those that write none or work in folders of other commands."""


def test_every_command_that_writes_a_folder_is_listed() -> None:
    named = {words.split()[0] for words in WRITERS}
    assert named == cli.COMMANDS.keys() - READERS


@pytest.mark.parametrize("name", WRITERS)
def test_a_foreign_folder_is_refused_with_the_difference(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (DATA / f"manifest_{'necessity' if name == 'sweep' else 'sweep'}.json").read_bytes()
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*WRITERS[name], "--out", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"`codi {name}`" in error
    assert "is a run of `codi necessity`" in error or "is a run of `codi sweep`" in error
    assert (tmp_path / "manifest.json").read_bytes() == content
    assert json.loads(content)["fingerprint"]


@pytest.mark.parametrize("name", ["alternation", "probes"])
def test_a_folder_of_early_runs_without_identity_is_refused_and_left_as_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """These two commands wrote manifests of their own kind before there was one run folder."""
    early = json.dumps({"options": {"task": "templates"}, "checkpoint_hash": "", "versions": {}})
    (tmp_path / "manifest.json").write_text(early, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--out", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and "it has no identity; choose another --out" in error[0]
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == early
