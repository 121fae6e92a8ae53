"""codi pca: components against scikit-learn, planted parity, and the study end to end on models of known wiring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_model, planted_split
from sklearn.decomposition import PCA

from experiments.latents.pca.run import Config, _parity_interval, parity_share, principal_components, run
from experiments.statistics.clusters import Settings, expanded_percentile


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
    np.testing.assert_allclose(_parity_interval(scores, divisions, clusters, settings), np.ravel(expected), atol=1e-12)
    assert np.isnan(_parity_interval(scores[:, :1], [()], clusters, settings)).all()


def test_study_on_a_planted_model(tmp_path: Path) -> None:
    options = {"draws": 4, "resamples": 100, "permutations": 100, "where_pairs": 6, "where_prompts": 12}
    config = Config(out=tmp_path / "run", limit=None, task="planted", **options)  # type: ignore[arg-type]
    result = run(config, planted_model("latents", attention="eager"), planted_split())
    where = result.tables["where"].set_index(["condition", "measure"])["mean"]
    # nothing after a latent reads the slots but the answer: the next latents do not see a KV edit
    assert where["kv direction", "h_last"] == pytest.approx(0, abs=1e-4)
    # on average latents differ in the address that their keys hold; the contents in their values are blurred and stay
    # below the threshold of the block that reads them: a KV edit acts through the keys, an embedding edit not at all
    assert where["keys direction", "kl"] > 10 * where["values direction", "kl"]
    assert where["kv direction", "kl"] > 10 * where["embedding direction", "kl"]
    assert where["embedding direction", "eot_0"] == pytest.approx(0, abs=1e-4)  # the token itself is the same
    verdicts = {claim.name: claim.verdict for claim in result.claims or ()}
    assert {"S4 (baseline)", "S5 (named cells)", "S7 (z)", "S8"} <= verdicts.keys()
    cells = result.tables["cells"]
    assert not (cells["verdict"] == "improvement").any()  # it cannot be better than always right or hopeless
    assert sorted(p.name for p in (result.path / "figures").glob("*.png")) == [
        "components.png", "variance-steering.png", "where.png",
    ]  # fmt: skip


def test_refuses_impossible_options() -> None:
    with pytest.raises(ValueError, match="where-pairs"):
        Config(where_pairs=0)
