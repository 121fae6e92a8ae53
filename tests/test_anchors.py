"""codi anchors: planted latents are anchors, their edges are found, and nothing is found where nothing is carried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_model, planted_split

from experiments.latents.anchors import Config, receiver_heads, run
from experiments.study.shared import Result
from steering.replacements import HideSlots


def found(out: Path, carrier: str) -> Result:
    config = Config(out=out, draws=1, resamples=200, permutations=500, shuffles=200, task="planted")
    return run(config, planted_model(carrier, attention="eager"), planted_split())  # type: ignore[arg-type]


def test_planted_latents_are_anchors(tmp_path: Path) -> None:
    result = found(tmp_path / "run", "latents")
    tables = result.tables
    for level in ("vector", "slot"):
        importance = tables["importance_kl"].set_index("condition")
        flips = tables["importance_flip"].set_index("condition")
        for k in range(1, 7):
            row, flip = importance.loc[f"{level} unmatched {k}"], flips.loc[f"{level} unmatched {k}"]
            assert row["reference_mean"] == pytest.approx(0, abs=1e-4)  # the same key changes nothing
            assert (row["difference"] > 0.5 and row["q"] < 0.05) == (k in (2, 4)), (level, k)
            assert (flip["difference"] > 0.5) == (k in (2, 4))
    edges = tables["edges_kl"].set_index("condition")["mean"]
    carried = {name for name, kl in edges.items() if kl > 0.5}
    # the answer reads latents 2 and 4; latent 1 and latent 3 read the prompt
    assert carried == {
        *("2 > answer", "4 > answer", "2 > all", "4 > all"),
        *("prompt > 1", "prompt > 3", "question > 1", "question > 3"),
    }
    heads = tables["heads"].set_index(["layer", "head"])
    assert heads.loc[(1, 1), "top"] == 2 and heads.loc[(1, 2), "top"] == 4
    assert (heads.loc[1, "q"] < 0.05).all() and (heads.loc[2, "q"] > 0.05).all()


def test_nothing_carried_gives_nulls(tmp_path: Path) -> None:
    tables = found(tmp_path / "run", "prompt").tables
    assert (tables["importance_flip"]["difference"] == 0).all()
    assert tables["importance_kl"]["difference"].abs().max() < 1e-4
    edges = tables["edges_kl"].set_index("condition")["mean"]
    assert edges["prompt > answer"] > 0.5
    assert edges["question > answer"] > 0.5
    assert edges.drop(["prompt > answer", "question > answer"]).max() < 1e-4


def test_hidden_slots() -> None:
    """Row 0 hides column 4 from latent 2 only, row 1 from everybody later, row 2 the prompt, row 3 nothing, row 4 the
    question."""
    question = torch.tensor([[1, 3]] * 5)
    hide = HideSlots(torch.tensor([4, 4, -2, -1, -3]), torch.tensor([2, 0, 2, 2, 2]), 4, question)
    first, second, third = (hide.edit_mask(k, torch.ones(5, 4 + k, dtype=torch.bool)) for k in (1, 2, 3))
    assert first.all()  # latent 1 itself, whose slot is column 4
    assert (~second).nonzero().tolist() == [[0, 4], [1, 4], *([2, i] for i in range(4)), [4, 1], [4, 2]]
    assert (~third).nonzero().tolist() == [[1, 4]]


def test_receiver_heads_hold_their_level() -> None:
    """Shares without a preference are called receivers at the stated rate; one preferred latent is found."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(6), size=(40, 10, 12))
    table = receiver_heads(weights, 200, rng)
    assert (table["p"] < 0.05).mean() < 0.12
    weights[:, 0, 0, 2] += 1
    table = receiver_heads(weights, 200, rng)
    assert table.loc[0, "top"] == 3 and table.loc[0, "p"] < 0.01


def test_needs_eager_attention(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eager"):
        run(Config(out=tmp_path / "run"), planted_model(), planted_split())
