"""Every study of latents takes any problem whose intermediate values are known: polynomials and a file of one's own.

A toy model of random weights answers nothing: what is tested is that the studies run, say what they asked, and refuse
what cannot be asked."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from codi import CodiModel
from experiments.alternation.options import AlternationOptions
from experiments.latents.options import (
    AnchorsOptions,
    NecessityOptions,
    PatchOptions,
    ProbesOptions,
    TransferOptions,
)
from experiments.lens.options import DetectOptions
from experiments.tasks import load_task

TOY = {"limit": 10, "resamples": 100, "permutations": 100, "batch_size": 64, "max_new_tokens": 2}
STUDIES = {
    "experiments.latents.patch.run": PatchOptions(**TOY, derivation=30, draws=1, families=("values",)),
    "experiments.latents.transfer": TransferOptions(**TOY, derivation=30, draws=1),
    "experiments.latents.anchors": AnchorsOptions(**TOY, derivation=30, draws=1, shuffles=20),
    "experiments.latents.necessity": NecessityOptions(
        **TOY, derivation=12, draws=1, all_subsets=False
    ),
}  # fmt: skip
"""Studies that draw donors or means from other prompts, small."""


@pytest.fixture
def eager(tiny_model) -> CodiModel:  # type: ignore[no-untyped-def]
    return tiny_model("llama", "answer-only", attention="eager")


@pytest.mark.parametrize("name", STUDIES)
def test_polynomials(name: str, eager: CodiModel, tmp_path: Path) -> None:
    study = importlib.import_module(name).STUDY
    options = replace(STUDIES[name], task="polynomial", min_steps=2, max_steps=3, out=tmp_path / "run")
    options.check_inputs()
    result = study.run(options, eager, study.prompts(options, eager))
    assert result.tables and "prompts" in result.text
    records = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert all("Modulo 50." in record["question"] for record in records)


def test_probes_of_polynomials(eager: CodiModel, tmp_path: Path) -> None:
    study = importlib.import_module("experiments.latents.probes").STUDY
    options = ProbesOptions(
        task="polynomial", min_steps=2, max_steps=2, limit=40, out=tmp_path / "run", resamples=100, spaces=("z",),
        folds=3, shuffles=1, control_draws=1,
    )  # fmt: skip
    result = study.run(options, eager, study.prompts(options, eager))
    assert {"step1", "answer", "operand1", "operand2", "operand3"} <= set(next(iter(result.tables.values()))["target"])
    assert "polynomial, split test" in result.text


@pytest.mark.parametrize("options", [AlternationOptions, DetectOptions])
def test_alternation_and_lens_ask_for_them(options: type, eager: CodiModel) -> None:
    own = {"read": ("plain",)} if options is DetectOptions else {"derivation": 6}
    asked = options(task="polynomial:m=31,b=2", limit=6, **own)
    asked.check_inputs()
    split = asked.load_split(0, known_steps=1) if options is AlternationOptions else asked.load_problems(0)
    assert all("Modulo 31." in problem.question for problem in split.evaluation) and len(split.evaluation) == 6


def test_steps_of_a_file(eager: CodiModel, tmp_path: Path) -> None:
    """What the generator knows of its problems is read from the text of their steps."""
    file = tmp_path / "own.jsonl"
    problems = load_task("arithmetic", limit=60, min_steps=3, max_steps=3)
    lines = [json.dumps({"question": p.question, "steps": p.steps, "answer": p.answer}) for p in problems]
    file.write_text("\n".join(lines) + "\n")
    study = importlib.import_module("experiments.latents.patch.run").STUDY
    options = replace(STUDIES["experiments.latents.patch.run"], task=str(file), out=tmp_path / "run")
    result = study.run(options, eager, study.prompts(options, eager))
    assert {1, 2} == set(result.tables["values_propagated"]["step"])
