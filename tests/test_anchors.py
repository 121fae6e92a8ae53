"""codi anchors: planted latents are anchors, their edges are found, and nothing is found where nothing is carried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_model, planted_split

from experiments.latents.anchors import run
from experiments.latents.anchors_measures import edge, hidden_latent, receiver_heads, resampled_at
from experiments.latents.options import AnchorsOptions
from experiments.statistics.effects import row_of
from experiments.study.result import Result
from steering.replacements import HideSlots


def found(out: Path, carrier: str) -> Result:
    config = AnchorsOptions(out=out, draws=1, resamples=200, permutations=500, shuffles=200, task="planted")
    return run(config, planted_model(carrier, attention="eager"), planted_split())  # type: ignore[arg-type]


def test_planted_latents_are_anchors(tmp_path: Path) -> None:
    result = found(tmp_path / "run", "latents")
    tables = result.tables
    for level in ("vector", "slot"):
        for k in range(1, 7):
            chosen = resampled_at(level, "unmatched", k)
            row, flip = row_of(tables["importance_kl"], chosen), row_of(tables["importance_flip"], chosen)
            assert row["reference_mean"] == pytest.approx(0, abs=1e-4)  # the same key changes nothing
            assert (row["difference"] > 0.5 and row["q"] < 0.05) == (k in (2, 4)), (level, k)
            assert (flip["difference"] > 0.5) == (k in (2, 4))
    edges = tables["edges_kl"]
    carried = edges.loc[edges["mean"] > 0.5, ["hidden", "source", "reader", "target"]].to_dict("records")
    # the answer reads latents 2 and 4; latent 1 and latent 3 read the prompt
    expected = [hidden_latent(k, reader) for k in (2, 4) for reader in ("answer", "all")]
    expected += [edge(source, k) for k in (1, 3) for source in ("prompt", "question")]
    assert len(carried) == len(expected) and all(one in carried for one in expected)
    heads = tables["heads"].set_index(["layer", "head"])
    assert heads.loc[(1, 1), "top"] == 2 and heads.loc[(1, 2), "top"] == 4
    assert (heads.loc[1, "q"] < 0.05).all() and (heads.loc[2, "q"] > 0.05).all()
    assert Result.read(result.path).markdown() == result.text


def test_nothing_carried_gives_nulls(tmp_path: Path) -> None:
    tables = found(tmp_path / "run", "prompt").tables
    assert (tables["importance_flip"]["difference"] == 0).all()
    assert tables["importance_kl"]["difference"].abs().max() < 1e-4
    edges = tables["edges_kl"]
    read = edges["hidden"].isin(["prompt", "question"]) & (edges["reader"] == "answer")
    assert row_of(edges, edge("prompt", "answer"))["mean"] > 0.5
    assert row_of(edges, edge("question", "answer"))["mean"] > 0.5
    assert read.sum() == 2 and edges.loc[~read, "mean"].max() < 1e-4


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
        run(AnchorsOptions(out=tmp_path / "run"), planted_model(), planted_split())
