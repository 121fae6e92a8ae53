"""codi patch: what planted latents carry is found by every kind of patch, and nothing where nothing is carried."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import planted_model, planted_split

from experiments.latents.patch.run import Config, run
from experiments.study.shared import Result


def patched(out: Path, carrier: str) -> Result:
    config = Config(out=out, draws=1, resamples=200, permutations=200, task="planted")
    return run(config, planted_model(carrier), planted_split(2))  # type: ignore[arg-type]


def test_planted_values_are_read(tmp_path: Path) -> None:
    found = patched(tmp_path / "run", "latents").tables
    means = found["means"].set_index(["condition", "reference"])
    for latent in range(1, 7):
        # the mean of the same key is the prompt's own content; that of another key is wrong where something is carried
        assert means.loc[(f"same key {latent}", "none"), "difference"] == 0
        change = means.loc[(f"other key {latent}", f"same key {latent}")]
        assert (change["difference"] < -0.5 and change["fwer_p"] < 0.05) == (latent in (2, 4))
    for step, carrier in ((1, 2), (2, 4)):
        for scope in ("same template", "other templates"):
            for state in ("vector", "residual"):
                for latent in range(1, 7):
                    name = f"target step{step} {scope} {state} {latent}"
                    row = found["values_local"].set_index("condition").loc[name]
                    expected = 1.0 if latent == carrier else 0.0
                    if state == "residual" and latent == carrier - 1:
                        expected = 1.0  # its h_k is what latent `carrier` is projected from
                    assert row["mean"] - row["reference_mean"] == pytest.approx(expected, abs=0.1), (row, latent)
    donor = found["interchange_correct"].set_index("condition")
    moved = {name: found[f"interchange_{name}_hit"].set_index("condition") for name in ("step1_local", "step2_local")}
    for latent in range(1, 7):
        lost = donor.loc[f"other values {latent}", "difference"]
        assert (lost < -0.5) == (latent in (2, 4))
        assert donor.loc[f"twin slot {latent}", "difference"] == 0  # the control
        assert donor.loc[f"other keys {latent}", "difference"] == 0  # keys carry no content in this model
    assert moved["step1_local"].loc["other slot 2", "mean"] > 0.5 > moved["step1_local"].loc["other slot 4", "mean"]
    assert moved["step2_local"].loc["other slot 4", "mean"] > 0.5 > moved["step2_local"].loc["other slot 2", "mean"]
    whole = found["interchange_donor"].set_index("condition")
    assert whole.loc["operation slot all", "mean"] == 1 and whole.loc["twin slot all", "reference_mean"] < 0.5


def test_nothing_carried_gives_nulls(tmp_path: Path) -> None:
    result = patched(tmp_path / "run", "prompt")
    for name in ("values_hit", "interchange_donor", "interchange_correct"):
        table = result.tables[name]
        if name == "interchange_donor":
            table = table[table["condition"].str.startswith(("other", "operation"))]
            assert (table["mean"] == 0).all()
        else:
            assert (table["difference"] == 0).all() and (table["q"] == 1).all()
    verdicts = {claim.name: claim.verdict for claim in result.claims or ()}
    assert verdicts["C3"] == "not held"
    assert verdicts["C5 (same template, vector)"] == "not held"


def test_refuses_prompts_of_another_form(tmp_path: Path) -> None:
    from experiments.tasks.problem import Problem
    from experiments.tasks.split import Split

    other = Problem("p", "addition t0 a1 b1", 2, cluster="1")
    with pytest.raises(ValueError, match="of the form"):
        run(Config(out=tmp_path / "run"), planted_model(), Split((other,), (other,)))
