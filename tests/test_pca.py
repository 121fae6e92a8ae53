"""codi pca: components against scikit-learn, planted parity, and the study end to end on models of known wiring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted import planted_model, planted_split
from sklearn.decomposition import PCA

from codi import load_codi
from experiments.latents.options import PcaOptions
from experiments.latents.pca.claims import _better_together
from experiments.latents.pca.components import principal_components
from experiments.latents.pca.parity import parity_interval, parity_share
from experiments.latents.pca.run import STUDY, run
from experiments.statistics.clusters import Settings, expanded_percentile
from experiments.study.claims import Claim
from experiments.study.edits.words import singles
from experiments.study.manifest import fingerprint
from experiments.study.result import Result
from experiments.study.run import study_identity

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("rows, features", [(40, 7), (6, 30)])
def test_components_are_those_of_scikit_learn(rows: int, features: int) -> None:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, features + 1)
    ours, theirs = principal_components(x, 4), PCA(4).fit(x.numpy())
    np.testing.assert_allclose(ours.shares, theirs.explained_variance_ratio_)
    np.testing.assert_allclose(np.abs(ours.vectors.numpy() @ theirs.components_.T), np.eye(4), atol=1e-9)
    np.testing.assert_allclose(ours.scores(x, 4).var(0), ours.variances)


def test_parity_share_by_hand() -> None:
    """Odd latents at -1, even at +1: all variance lies between them, a ninth of it between 1, 2, 3 and 4, 5, 6."""
    scores = np.tile(np.array([-1.0, 1.0] * 3)[None, :, None], (5, 1, 1))
    assert parity_share(scores, (1, 3, 5)) == pytest.approx(1)
    assert parity_share(scores, (1, 2, 3)) == pytest.approx(1 / 9)
    assert parity_share(np.ones((5, 6, 2)), (1, 3, 5)) == 0


def test_interval_of_the_parity_lead_is_that_of_prompts_drawn_again() -> None:
    """By sums over clusters, against putting the prompts of every drawn cluster together; clusters of unequal size."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(8), [3, 1, 2, 5, 2, 4, 1, 2])
    scores = rng.normal(size=(20, 4, 2)) + np.array([0.5, -0.5, 0.5, -0.5])[None, :, None] + clusters[:, None, None] / 4
    divisions, settings = [(1, 3), (1, 2), (1, 4)], Settings(resamples=150)
    again = []
    for weight in settings.weights(8).astype(int):
        rows = np.repeat(np.arange(20), weight[clusters])
        shares = [parity_share(scores[rows], group) for group in divisions]
        again.append(shares[0] - max(shares[1:]))
    expected = expanded_percentile(np.array(again)[:, None], 8)
    np.testing.assert_allclose(parity_interval(scores, divisions, clusters, settings), np.ravel(expected), atol=1e-12)
    assert np.isnan(parity_interval(scores[:, :1], [()], clusters, settings)).all()


def test_study_on_a_planted_model(tmp_path: Path) -> None:
    options = {"draws": 4, "resamples": 100, "permutations": 100, "where_pairs": 6, "where_prompts": 12}
    chosen = PcaOptions(out=tmp_path / "run", limit=None, task="planted", **options)  # type: ignore[arg-type]
    result = run(chosen, planted_model("latents", attention="eager"), planted_split())
    means = result.tables["where"].set_index(["edit", "control", "measure", "layer"])["mean"]

    def where(edit: str, measure: str, layer: int = -1) -> float:
        return means[edit, "direction", measure, layer]

    # nothing after a latent reads the slots but the answer: the next latents do not see a KV edit
    assert where("kv", "h_last") == pytest.approx(0, abs=1e-4)
    # on average latents differ in the address that their keys hold; the contents in their values are blurred and stay
    # below the threshold of the block that reads them: a KV edit acts through the keys, an embedding edit not at all
    assert where("keys", "kl") > 10 * where("values", "kl")
    assert where("kv", "kl") > 10 * where("embedding", "kl")
    assert where("embedding", "eot", 0) == pytest.approx(0, abs=1e-4)  # the token itself is the same
    verdicts = {claim.name: claim.verdict for claim in result.claims or ()}
    assert {"S4 (baseline)", "S5 (named cells)", "S7 (z)", "S8"} <= verdicts.keys()
    cells = result.tables["cells"]
    # the best cell gains nothing, which 12 clusters cannot tell from a gain of two points
    assert verdicts["S4 (baseline)"] == verdicts["S5 (any)"] == "undecided"
    # nor could any cell have a verdict with 4 draws that thirty directions share; all together, p is never below 1 / 5
    few = "o single cell can be judged: 4 draws, shared by 30 directions, allow no family-wise p below 0.88, 570 are"
    assert f"**N{few} needed for 0.05.**" in result.text
    notes = {claim.name: claim.note for claim in result.claims or ()}
    assert notes["S5 (any)"].startswith(f"n{few} needed for 0.05: ") and "above the baseline alone" in notes["S5 (any)"]
    assert verdicts["S5 (together)"] == "undecided" and "smallest p that 4 draws" in notes["S5 (together)"]
    assert set(result.tables["evidence"]["draws"]) == {4} and len(result.tables["evidence"]) == 6  # 3 spaces, 2 tails
    assert Result.read(result.path).markdown() == result.text
    assert not (cells["verdict"] == "improvement").any()  # it cannot be better than always right or hopeless
    assert sorted(p.name for p in (result.path / "figures").glob("*.png")) == [
        "components.png", "variance-steering.png", "where.png",
    ]  # fmt: skip


def test_all_cells_together_decide_what_no_single_one_can() -> None:
    """Held by a small p of the aggregate, whatever single cells may; never not held: not found is not absent."""
    row = {"space": "kv", "tail": "gain", "cells": 360, "draws": 20, "shared": 30, "least_p": 0.6, "needed_draws": 570}
    row |= {"last": 60, "last_expected": 12.0, "last_families_lower": 0, "last_families_upper": 40, "last_p": 1 / 21}
    rates = pd.DataFrame({"prompt_id": ["a", "a", "b"], "cluster": ["x", "x", "y"]})

    def claim(**other: object) -> Claim:
        return _better_together(pd.DataFrame([row | other]), rates, Settings())

    assert (claim().verdict, claim().n, claim().n_clusters) == ("held", 2, 2)
    assert claim().estimate == pytest.approx(48 / 360)
    assert claim(last_p=0.3).verdict == claim(last=0, last_p=1.0).verdict == "undecided"
    assert singles(row, 0.05) and "570" in singles(row, 0.05)
    assert singles(row | {"draws": 570, "least_p": 0.05}, 0.05) == ""


def test_refuses_impossible_options() -> None:
    with pytest.raises(ValueError, match="where-pairs"):
        PcaOptions(where_pairs=0)


def test_identity_is_that_of_earlier_runs() -> None:
    """Fingerprint of a run folder with all options at their defaults, written before the study was data."""
    model = load_codi(ROOT / "checkpoints" / "tiny")
    options = PcaOptions()
    identity = study_identity(options, model, STUDY.prompts(options, model))
    assert fingerprint(identity) == "507942e74fc10486732450ba5565dc76497c156a3a53ae13b6abe04009867a65"
