"""codi necessity: planted latents are found, a model whose latents carry nothing gives nulls, Shapley values add up."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import planted_model, planted_split

from experiments.latents.necessity import STUDY, make_plan, run, shapley
from experiments.latents.necessity_measures import KINDS, after, replaced, subsets
from experiments.latents.options import NecessityOptions
from experiments.statistics.effects import row_of
from experiments.study.answers import set_of
from experiments.study.result import Result


def config(out: Path, **options: object) -> NecessityOptions:
    return NecessityOptions(out=out, draws=1, resamples=200, permutations=200, **options)  # type: ignore[arg-type]


def test_planted_latents_are_needed_and_the_others_are_not(tmp_path: Path) -> None:
    model = planted_model("latents")
    found = run(config(tmp_path / "run"), model, planted_split())
    effects = found.tables["effects"]
    for kind in ("mean", "coordinate"):  # the others lack the ballast without which the toy's layer norms break
        for latent in range(1, 7):
            loss = row_of(effects, replaced(kind, (latent,)))["difference"]
            assert (loss < -0.5) == (latent in (2, 4)), (kind, latent, loss)
    assert [row_of(found.tables["counts"], after(k))["mean"] for k in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    shares = found.tables["shapley"].query("kind == 'mean'").set_index("latent")
    assert sorted(shares.index[shares["q"] < 0.05]) == [2, 4]
    assert shares["value"].sum() == pytest.approx(-row_of(effects, replaced("mean", range(1, 7)))["difference"])
    # keeping 2 and 4 alone is enough
    assert row_of(found.tables["levels"], replaced("mean", (1, 3, 5, 6)))["mean"] == 1
    verdicts = {claim.name: claim.verdict for claim in found.claims or ()}
    # 12 clusters without a loss cannot show that none is above two points; everything is right after 4 latents
    assert verdicts["C4 (coordinate)"] == "undecided" and verdicts["C1 (jump)"] == "not testable"
    assert sorted(p.name for p in (found.path / "figures").glob("*.png")) == ["necessity.png", "subsets.png"]
    assert Result.read(found.path).markdown() == found.text


def test_latents_that_carry_nothing_are_not_needed(tmp_path: Path) -> None:
    found = run(config(tmp_path / "run"), planted_model("prompt"), planted_split())
    effects = found.tables["effects"]
    effects = effects[effects["kind"].isin(["mean", "coordinate"])]
    assert len(effects) == 126
    assert (effects["difference"] == 0).all() and (effects["p"] == 1).all()
    assert (found.tables["shapley"]["q"] == 1).all()


def answers(right: dict[tuple[str, int], float], many: int, rng: np.random.Generator) -> pd.DataFrame:
    """Trials of `many` clusters of one prompt: share that is right per (mode or kind, number or set)."""
    rows = [
        {"name": name, "number": number, "prompt_id": f"p{i}", "cluster": f"c{i}", "template": "t", "draw": -1,
         "correct": bool(rng.random() < share), "parsed": True}
        for (name, number), share in right.items() for i in range(many)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def judged(after_k: list[float], lasts: float, many: int, out: Path) -> dict[str, str]:
    """Verdicts of the claims on made-up answers: accuracy after 0..6 latents, and with the last two replaced."""
    plan = make_plan(config(out, all_subsets=False), planted_model(), planted_split())
    rng = np.random.default_rng(3)
    modes = {("latent", k): share for k, share in enumerate(after_k)} | {("direct", -1): 0.5, ("verbal", -1): 0.5}
    counted = answers(modes, many, rng).rename(columns={"name": "mode", "number": "n_latents"})
    tried = {(kind, set_of(one)): 0.9 for kind in KINDS for one in [(k,) for k in range(1, 7)] + PREFIXES}
    tried |= {(kind, set_of((5, 6))): lasts for kind in KINDS}
    edited = answers({("none", 0): 1.0} | tried, many, rng).rename(columns={"name": "kind", "number": "replaced"})
    claims = STUDY.conclude(plan, {"counts": counted, "replacements": edited}).claims or ()
    return {claim.name: claim.verdict for claim in claims}


PREFIXES = [tuple(range(1, k + 1)) for k in range(2, 7)]


def test_every_verdict_can_come_out(tmp_path: Path) -> None:
    good = judged([0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.9], lasts=1.0, many=400, out=tmp_path)
    assert good["C1 (jump)"] == "held" and good["C4 (norm)"] == "held"
    bad = judged([0.1, 0.2, 0.3, 0.4, 0.9, 0.3, 0.9], lasts=0.6, many=400, out=tmp_path)
    assert bad["C1 (jump)"] == "not held" and bad["C1 (sixth)"] == "not held" and bad["C4 (norm)"] == "not held"
    few = judged([0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.56], lasts=0.99, many=40, out=tmp_path)
    assert few["C1 (jump)"] == few["C1 (sixth)"] == few["C4 (norm)"] == "undecided"
    same = judged([0.0] * 5 + [1.0] * 2, lasts=1.0, many=400, out=tmp_path)
    assert same["C1 (sixth)"] == "not testable"  # everything is right with five


def test_shapley_by_hand() -> None:
    """Two latents, right only while latent 1 or latent 2 is left: each has half of the loss of 1."""
    outcomes = pd.DataFrame({set_of(()): [1.0], set_of((1,)): [1.0], set_of((2,)): [1.0], set_of((1, 2)): [0.0]})
    assert shapley(outcomes, 2).to_numpy().tolist() == [[0.5, 0.5]]


def test_shapley_is_efficient_and_ignores_a_latent_without_effect() -> None:
    rng = np.random.default_rng(0)
    worth = {chosen: rng.random() for size in range(4) for chosen in itertools.combinations((1, 2, 4), size)}
    columns = {set_of(chosen): [worth[tuple(k for k in chosen if k != 3)]] for chosen in [(), *subsets(4)]}
    values = shapley(pd.DataFrame(columns), 4).iloc[0]
    assert values[3] == pytest.approx(0)
    assert values.sum() == pytest.approx(worth[()] - worth[1, 2, 4])


def test_continues_and_refuses(tmp_path: Path) -> None:
    model, split = planted_model(), planted_split()
    options = {"all_subsets": False}
    first = run(config(tmp_path / "run", **options), model, split)
    said: list[str] = []
    again = run(config(tmp_path / "run", **options), model, split, said.append)
    assert said[0].startswith("continuing") and len(said) == 1  # nothing was computed again
    pd.testing.assert_frame_equal(first.tables["effects"], again.tables["effects"])
    with pytest.raises(ValueError, match="other options"):
        run(config(tmp_path / "run", all_subsets=False, seed=1), model, split)
