"""codi polynomial: every claim is decided both ways on planted trials, and the study runs on a toy model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from codi import CodiModel
from experiments.polynomial.claims import best_place, claims_of
from experiments.polynomial.measures import READERS, hidden_columns
from experiments.polynomial.options import PolynomialOptions
from experiments.polynomial.plan import Other, Plan
from experiments.polynomial.run import STUDY, conclude, tables_of
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import row_of
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.prompts import Asked
from experiments.tasks import load_task

PLAN = Plan(
    hops=(2, 3, 4, 5), asked=(Asked("2 hops", (0, 0), (0, 0)),) * 4, m=50, b=7, prime=False, n_latents=3, n_layers=2,
    hidden=150, folds=3, seed=0, batch_size=8, max_new_tokens=None, settings=Settings(resamples=300),
)  # fmt: skip
END = PLAN.n_latents + 1


def planted(
    states: dict[tuple[int, int], float],
    end: float = 0.9,
    middle: float = 0.05,
    accuracy: float = 0.9,
    direct: float = 0.1,
    by_latents: float = 0.9,
    n: int = 150,
) -> dict[str, pd.DataFrame]:
    """Trials in which states[hops, state] is the share read at latent 1 (by probe) and little is read elsewhere.

    Args:
        states: 0.05 where nothing is said.
        end, middle: the answer at the end of thought, last layer and middle layer.
        accuracy: unedited.
        direct, by_latents: accuracy with the last input hidden from the answer, and from the latents.
        n: prompts of each number of hops and side.
    """  # fmt: skip
    rng = np.random.default_rng(0)
    reads, answers = [], []
    for hops in PLAN.hops:
        for side in ("evaluation", "derivation"):
            ids = [f"{side}-{hops}-{i}" for i in range(n)]
            for state in range(1, hops + 1):
                for place in range(END + 1):
                    for method, layer in (("lens", 0), ("lens", 1), ("lens", 2), ("probe", -1)):
                        share = states.get((hops, state), 0.05) if (place, method) == (1, "probe") else 0.05
                        if place == END and state == hops and method == "lens":
                            share = {0: 0.02, 1: middle, 2: end}[layer]
                        given = {"side": side, "hops": hops, "state": state, "method": method, "place": place,
                                 "layer": layer}  # fmt: skip
                        read = (rng.random(n) < share).astype(float)
                        reads.append(pd.DataFrame({**given, "prompt_id": ids, "cluster": ids, "read": read}))
        ids = [f"evaluation-{hops}-{i}" for i in range(n)]
        tried = [(-1, "")] + [(t, reader) for t in range(hops + 1) for reader in READERS]
        for number, reader in tried:
            share = {"latents": by_latents, "answer": direct}[reader] if number == hops else accuracy
            given = {"hops": hops, "number": number, "reader": reader}
            answers.append(pd.DataFrame({**given, "prompt_id": ids, "cluster": ids, "correct": rng.random(n) < share}))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in (("reads", reads), ("answers", answers))}


PUBLISHED = {(2, 1): 0.71, (3, 1): 0.7, (3, 2): 0.7, (4, 1): 0.1, (4, 3): 0.6, (5, 1): 0.05, (5, 4): 0.5}
"""Shares that are read as the paper has it."""


def verdicts(claims: ClaimsTable) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in claims}


def test_a_model_as_it_was_published() -> None:
    found = verdicts(claims_of(PLAN, planted(PUBLISHED)))
    assert found.pop("P5") == "not testable" and set(found.values()) == {"held"}
    assert set(found) == {
        "P1 (2 hops, s1)", "P1 (3 hops, s1)", "P1 (3 hops, s2)", "P2 (2 hops)", "P2 (3 hops)", "P3 (place)",
        "P3 (depth)", "P4 (4 hops)", "P4 (5 hops)",
    }  # fmt: skip


def test_a_model_of_another_kind() -> None:
    """Little is read but the answer in the latents, the first states of long problems, and inputs by the latents."""
    states = {(4, 1): 0.6, (4, 3): 0.1, (5, 1): 0.5, (5, 4): 0.1} | {(hops, hops): 0.9 for hops in PLAN.hops}
    trials = planted(states, middle=0.9, direct=0.9, by_latents=0.1)
    found = verdicts(claims_of(PLAN, trials))
    assert found.pop("P5") == "not testable" and set(found.values()) == {"not held"}


def test_each_claim_is_its_own() -> None:
    early = claims_of(PLAN, planted(PUBLISHED | {(3, 1): 0.2}))
    assert verdicts(early)["P1 (3 hops, s1)"] == "not held" and verdicts(early)["P1 (3 hops, s2)"] == "held"
    assert verdicts(claims_of(PLAN, planted(PUBLISHED, by_latents=0.1)))["P2 (2 hops)"] == "undecided"
    claim = claims_of(PLAN, planted(PUBLISHED))["P1 (2 hops, s1)"]
    assert claim.estimate == pytest.approx(0.71, abs=0.1) and "read at h_1, last layer, by probe" in claim.note


def test_what_cannot_be_asked_is_not_testable() -> None:
    weak = claims_of(PLAN, planted(PUBLISHED, accuracy=0.02))
    assert (
        set(verdicts(weak).values()) == {"not testable"} and "right: too little to explain" in weak["P4 (4 hops)"].note
    )
    short = replace(PLAN, hops=(2, 3), asked=PLAN.asked[:2])
    trials = {name: table[table["hops"] <= 3] for name, table in planted(PUBLISHED).items()}
    found = claims_of(short, trials)
    assert found["P4 (5 hops)"].verdict == "not testable" and found["P4 (5 hops)"].note == "5 hops were not asked"
    assert found["P3 (place)"].verdict == "held" and "one has m = 50 (composite)" in found["P5"].note


def test_prime_moduli_against_a_run_of_the_other_kind() -> None:
    trials = planted(PUBLISHED, accuracy=0.9)

    def claim(right: int, prime: bool = True) -> Claim:
        other = Other(97, prime, ((2, right, 150), (3, right, 150)))
        return claims_of(replace(PLAN, other=other), trials)["P5"]

    assert claim(60).verdict == "held" and claim(60).estimate == pytest.approx(-0.5, abs=0.05)
    assert claim(150).verdict == "not held" and claim(135).verdict == "undecided"
    assert "2, 3 hops" in claim(60).note and claim(60).n == 600
    assert claim(60, prime=False).verdict == "not testable" and "both moduli are composite" in claim(60, False).note


def test_the_place_is_chosen_on_other_prompts() -> None:
    trials = planted(PUBLISHED)
    reads = trials["reads"]
    lucky = (reads["side"] == "evaluation") & (reads["place"] == 3) & (reads["method"] == "lens")
    reads.loc[lucky, "read"] = 1.0  # chance of the tested prompts
    assert best_place(reads, 2, 1, PLAN.latents) == {"hops": 2, "state": 1, "method": "probe", "place": 1, "layer": -1}


def test_tables_and_words() -> None:
    trials = planted(PUBLISHED)
    tables = tables_of(PLAN, trials)
    assert row_of(tables["reads"], {"hops": 3, "state": 2, "within": "thought"})["mean"] == pytest.approx(0.7, abs=0.1)
    change = {who: row_of(tables["hidden"], {"hops": 2, "number": 2, "reader": who}) for who in READERS}
    assert change["answer"]["difference"] == pytest.approx(-0.8, abs=0.1)
    assert abs(change["latents"]["difference"]) < 0.1
    found = conclude(PLAN, trials)
    text = "\n".join(section.text for section in found.sections)
    assert "After 3 latents:\n\n| hops |" in text and "| 150 |" in text
    assert "s3 (answer)" in text and "modulo 50 (composite)" in text and "h_1, last layer, by probe" in text
    assert found.figures is not None and set(found.figures()) == {"reads"}


def test_columns_of_the_numbers(codi_model: CodiModel) -> None:
    problems = load_task("polynomial", limit=5, min_steps=3, max_steps=3)
    batch = codi_model.encode([problem.question for problem in problems])
    prefill = codi_model.prefill(batch, keep=())
    width = prefill.attention_mask.shape[1]
    columns = hidden_columns(codi_model, problems, width, prefill.prompt_lengths.tolist())
    assert columns.shape[:2] == (5, 4)
    for row, problem in enumerate(problems):
        for number, value in enumerate(problem.numbers):
            ids = [batch.input_ids[row, column].item() for column in columns[row, number].tolist() if column >= 0]
            assert codi_model.tokenizer.decode(ids).strip() == str(value)


def test_it_runs_on_a_model(codi_model: CodiModel, tmp_path: Path) -> None:
    options = PolynomialOptions(
        task="polynomial:m=5,b=1", min_steps=3, max_steps=4, limit=20, choosing=20, hidden=4, folds=3, resamples=100,
        max_new_tokens=1, out=tmp_path / "run",
    )  # fmt: skip
    options.check_inputs()
    result = STUDY.run(options, codi_model, STUDY.prompts(options, codi_model))
    assert result.claims is not None and result.claims["P5"].verdict == "not testable"
    assert "one has m = 5 (prime)" in result.claims["P5"].note and (result.path / "figures" / "reads.png").exists()
    grid = result.tables["grid"]
    assert set(grid["place"]) == set(range(codi_model.n_latents + 2)) and set(grid["hops"]) == {3, 4}
    lines = (result.path / "prompts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 80
    other = replace(options, task="polynomial:m=6,b=1", against=tmp_path / "run", out=tmp_path / "other")
    other.check_inputs()
    claims = STUDY.run(other, codi_model, STUDY.prompts(other, codi_model)).claims
    assert claims is not None and claims["P5"].n == 80 and "m = 6 here, 5 there; 3, 4 hops" in claims["P5"].note


def test_refusals() -> None:
    for options, says in (
        ({"min_steps": 1}, "min-steps must be in 2..5 hops, got 1"),
        ({"max_steps": None}, "max-steps must be in 2..5 hops, got None"),
        ({"min_steps": 4, "max_steps": 3}, "min-steps must not exceed max-steps"),
        ({"folds": 2}, "folds must be at least 3"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            PolynomialOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="asks the task 'polynomial', .* got 'templates'; codi probes"):
        PolynomialOptions(task="templates").check_inputs()
