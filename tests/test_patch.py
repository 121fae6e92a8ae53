"""codi patch: what planted latents carry is found by every kind of patch, and nothing where nothing is carried."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from planted import planted_model, planted_split

from codi import load_codi
from experiments.latents.options import PatchOptions
from experiments.latents.patch.interchange import moved
from experiments.latents.patch.means import UNEDITED, replaced
from experiments.latents.patch.plan import make_plan
from experiments.latents.patch.run import STUDY, parts, run
from experiments.latents.patch.values import patched
from experiments.statistics.effects import row_of
from experiments.study.manifest import fingerprint
from experiments.study.parts import Workbench
from experiments.study.result import Result
from experiments.study.run import study_identity
from experiments.tasks.problem import Problem
from experiments.tasks.split import Split

ROOT = Path(__file__).resolve().parent.parent
EVERY = range(1, 7)


def found_by_patching(out: Path, carrier: str) -> Result:
    options = PatchOptions(out=out, draws=1, resamples=200, permutations=200, task="planted")
    return run(options, planted_model(carrier), planted_split(2))  # type: ignore[arg-type]


def test_planted_values_are_read(tmp_path: Path) -> None:
    result = found_by_patching(tmp_path / "run", "latents")
    found = result.tables
    assert result.claims is not None and result.claims["C3"].verdict == "not held"  # it is latents 2 and 4
    assert Result.read(result.path).markdown() == result.text
    assert set(found["sizes"]["table"]) == {name for name in found if "matters" in found[name]}
    assert "answers every prompt right: an improvement cannot be seen" in result.text.split("Mean patching")[0]
    assert result.text.count("the whole interval beyond the size that matters: ") == 4  # below every kind of table
    means = found["means"]
    for latent in range(1, 7):
        # the mean of the same key is the prompt's own content; that of another key is wrong where something is carried
        assert row_of(means, replaced("same key", [latent]), UNEDITED)["difference"] == 0
        change = row_of(means, replaced("other key", [latent]), replaced("same key", [latent]))
        assert (change["difference"] < -0.5 and change["fwer_p"] < 0.05) == (latent in (2, 4))
        assert change["matters"] == (latent in (2, 4))
    for step, carrier in ((1, 2), (2, 4)):
        for scope in ("same template", "other templates"):
            for state in ("vector", "residual"):
                for latent in range(1, 7):
                    row = row_of(found["values_local"], patched("target", step, scope, state, latent))
                    expected = 1.0 if latent == carrier else 0.0
                    if state == "residual" and latent == carrier - 1:
                        expected = 1.0  # its h_k is what latent `carrier` is projected from
                    assert row["mean"] - row["reference_mean"] == pytest.approx(expected, abs=0.1), (row, latent)
    donor = found["interchange_correct"]
    for latent in range(1, 7):
        lost = row_of(donor, moved("other", ("values", -1), [latent]))["difference"]
        assert (lost < -0.5) == (latent in (2, 4))
        assert row_of(donor, moved("twin", ("slot", -1), [latent]))["difference"] == 0  # the control
        # keys carry no content in this model
        assert row_of(donor, moved("other", ("keys", -1), [latent]))["difference"] == 0
    share = {
        (name, latent): row_of(found[f"interchange_{name}_hit"], moved("other", ("slot", -1), [latent]))["mean"]
        for name in ("step1_local", "step2_local")
        for latent in (2, 4)
    }
    assert share["step1_local", 2] > 0.5 > share["step1_local", 4]
    assert share["step2_local", 4] > 0.5 > share["step2_local", 2]
    whole = found["interchange_donor"]
    assert row_of(whole, moved("operation", ("slot", -1), EVERY))["mean"] == 1
    assert row_of(whole, moved("twin", ("slot", -1), EVERY))["reference_mean"] < 0.5


def test_nothing_carried_gives_nulls(tmp_path: Path) -> None:
    result = found_by_patching(tmp_path / "run", "prompt")
    for name in ("values_hit", "interchange_donor", "interchange_correct"):
        table = result.tables[name]
        if name == "interchange_donor":
            table = table[table["kind"].isin(("other", "operation"))]
            assert (table["mean"] == 0).all()
        else:
            assert (table["difference"] == 0).all() and (table["q"] == 1).all() and not table["matters"].any()
    verdicts = {claim.name: claim.verdict for claim in result.claims or ()}
    # nothing moved in 24 clusters: that neither confirms the claims nor excludes effects of their size
    assert verdicts["C3"] == "undecided"
    assert verdicts["C5 (same template, vector)"] == "undecided"


def test_problems_of_another_form(tmp_path: Path) -> None:
    """Any two steps and their sum: the answer is what the chain gives from the patched step on, and C5 says why not."""
    one, other = planted_split(2).derivation, planted_split(2).evaluation
    split = Split(tuple(map(chain, one)), tuple(map(chain, other)))
    options = PatchOptions(out=tmp_path / "run", draws=1, resamples=200, permutations=200, task="planted")
    result = run(options, planted_model("latents"), split)  # type: ignore[arg-type]
    found = result.tables
    for step, carrier in ((1, 2), (2, 4)):
        for scope in ("same template", "other templates"):
            for latent in range(1, 7):
                row = row_of(found["values_propagated"], patched("target", step, scope, "vector", latent))
                assert row["difference"] == pytest.approx(float(latent == carrier), abs=0.1), (row, latent)
        share = {k: row_of(found[f"interchange_step{step}_propagated_hit"], moved("other", ("slot", -1), [k]))["mean"]
                 for k in (2, 4)}  # fmt: skip
        assert share[carrier] > 0.5 > share[6 - carrier]
    assert "interchange_step1_local_hit" not in found and "operation" not in set(found["interchange_correct"]["kind"])
    assert row_of(found["means"], replaced("same key", [2]), UNEDITED)["difference"] == 0
    assert row_of(found["means"], replaced("other key", [2]), UNEDITED)["difference"] < -0.5
    assert result.claims is not None and result.claims["C5"].verdict == "not testable"
    assert "not all of the form (X±Y)·Z + (X±Y)" in result.text and "donor's step 2 carried through" in result.text
    assert sorted(p.name for p in (result.path / "figures").glob("*.png")) == [
        "interchange.png", "means.png", "values.png",
    ]  # fmt: skip


def chain(problem: Problem) -> Problem:
    """The same prompt as if nothing but its two values and their sum were known of it."""
    a, b, total = problem.intermediates
    steps = (f"{a}+0={a}", f"{b}+0={b}", f"{a}+{b}={total}")
    return replace(problem, steps=steps, numbers=(), operation="", uses=((0, 0), (0, 0), (1, 2)))


def test_refuses_prompts_without_known_steps(tmp_path: Path) -> None:
    for other in (Problem("p", "addition t0 a1 b1", 2), Problem("p", "?", 2, steps=("1+1=2",), intermediates=(2,))):
        with pytest.raises(ValueError, match="patching needs prompts with 2 or more known steps, 'p' has"):
            run(PatchOptions(out=tmp_path / "run"), planted_model(), Split((other,), (other,)))
    with pytest.raises(ValueError, match="give --min-steps 2"):
        options = PatchOptions(task="arithmetic", limit=30, derivation=30)
        STUDY.prompts(options, planted_model())


def test_families() -> None:
    PatchOptions(task="arithmetic").check_inputs()
    with pytest.raises(ValueError, match="families must be among means, values, interchange, got noise"):
        PatchOptions(families=("means", "noise"))


def test_identity_is_that_of_earlier_runs() -> None:
    """Fingerprint of a run folder with all options at their defaults, written before the study was data."""
    model = load_codi(ROOT / "checkpoints" / "tiny")
    options = PatchOptions()
    identity = study_identity(options, model, STUDY.prompts(options, model))
    assert fingerprint(identity) == "61f41f70c6b062a309a9d94e4eb23ccd79b2c38ff705a21a34b8ac6b026b8c23"


def test_parts_are_plain_data(tmp_path: Path) -> None:
    """A part is computed the same by whoever has it, the model and the prompts."""
    model, prompts = planted_model(), planted_split(2)
    plan = make_plan(PatchOptions(draws=1, task="planted"), model, prompts)
    part = pickle.loads(pickle.dumps(parts(plan)[0]))
    frame = part.run(Workbench(model, prompts))
    assert set(frame) == set(part.schema.names)
    pd.testing.assert_frame_equal(frame, parts(plan)[0].run(Workbench(model, prompts)))
