"""codi anchors: planted latents are anchors, their edges are found, and nothing is found where nothing is carried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted import planted_model, planted_split

from experiments.latents.anchors import claims_of, make_plan, run, tables_of, words
from experiments.latents.anchors_measures import (
    KINDS,
    _edges,
    edge,
    hidden_latent,
    receiver_heads,
    receivers,
    resampled_at,
)
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


def test_anchors_are_what_matters_and_not_what_is_significant() -> None:
    """Latents 1 and 5 move the answer; the others do so by 0.003 nats, which is significant and nothing else."""
    trials = made_up({1: (2.0, 0.9), 5: (1.0, 0.3)}, noise=0.0)
    plan = make_plan(AnchorsOptions(resamples=500, permutations=500), planted_model(attention="eager"), planted_split())
    tables = tables_of(plan, trials)
    kl = tables["importance_kl"]
    kl = kl[(kl["level"] == "vector") & (kl["kind"] == "unmatched")].set_index("latent")
    assert (kl["q"] < 0.05).all() and kl.index[kl["matters"]].tolist() == [1, 5]
    shown = {section.heading: section.text for section in words(plan, tables, "")}
    assert "vector: 1, 5; slot: 1, 5." in shown["Anchors"] and "could have been told from none" in shown["Anchors"]
    lines = [line for line in shown["Importance"].splitlines() if line.startswith("|")][2:]
    assert [("*" in line) for line in lines] == [True, False, False, False, True, False]
    assert "no edge between latents" in shown["Dependencies"] and "nats could have been told" in shown["Dependencies"]


def test_every_verdict_can_come_out() -> None:
    def verdicts(moved: dict[int, tuple[float, float]], noise: float, many: int = 200) -> dict[str, str]:
        trials = made_up(moved, noise, many)
        claims = claims_of(plan, tables_of(plan, trials), trials["resampling"])
        return {claim.name: claim.verdict for claim in claims}

    options = AnchorsOptions(resamples=500, permutations=100)
    plan = make_plan(options, planted_model(attention="eager"), planted_split())
    some = verdicts({3: (1.0, 0.5), 5: (1.0, 0.5)}, noise=0.0)
    assert some["C3 (resampled)"] == "held" and some["C4 (noise 6)"] == "held"
    others = verdicts({1: (1.0, 0.8), 6: (1.0, 0.8)}, noise=0.5)
    assert others["C3 (resampled)"] == "not held" and others["C4 (noise 6)"] == "not held"
    few = verdicts({3: (1.0, 0.05)}, noise=0.0, many=12)
    assert few["C3 (resampled)"] == few["C4 (noise 6)"] == "undecided"
    short = claims_of(replace(plan, n_latents=4), tables_of(replace(plan, n_latents=4), made_up({}, 0.0)),
                      made_up({}, 0.0)["resampling"])  # fmt: skip
    assert short["C3 (resampled)"].verdict == "not testable" and short["C4 (noise 4)"].verdict == "held"


def made_up(moved: dict[int, tuple[float, float]], noise: float, many: int = 120) -> dict[str, pd.DataFrame]:
    """Trials of six latents: KL and share of flips by latent of another key; every wording of a cluster moves a bit
    differently; noise: share of flips under noise."""
    rng = np.random.default_rng(0)
    prompts = [{"prompt_id": f"p{i}", "cluster": f"c{i // 3}", "template": f"t{i % 3}", "draw": 0, "correct": True,
                "parsed": True} for i in range(3 * many)]  # fmt: skip
    rows = []
    for prompt in prompts:
        rows.append({**prompt, "level": "", "kind": "none", "latent": 0, "kl": 0.0, "flip": False})
        wording = 0.2 * (int(prompt["template"][1]) - 1)
        for level, kind in KINDS:
            for k in range(1, 7):
                kl, flips = moved.get(k, (0.003, 0.0)) if kind == "unmatched" else (0.0, 0.0)
                flips = noise if kind == "noise" else flips
                kl = max(0.0, kl * (1 + wording + 0.1 * rng.normal()))
                rows.append({**prompt, "level": level, "kind": kind, "latent": k, "kl": kl,
                             "flip": bool(rng.random() < flips)})  # fmt: skip
    edges = [
        {**prompt, **one, "draw": -1, "kl": 0.01 * rng.random(), "flip": False, "change": 0.1 * rng.random()}
        for prompt in prompts for one, _ in _edges(6, 1)
    ]  # fmt: skip
    heads = receiver_heads(rng.dirichlet(np.ones(6), size=(20, 1, 2)), 50, rng).assign(preference=0.0, size=0.1)
    return {"resampling": pd.DataFrame(rows), "suppression": pd.DataFrame(edges), "heads": heads}


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


def test_a_receiver_prefers_by_more_than_wording_does() -> None:
    table = pd.DataFrame({"q": [0.01, 0.01, 0.5], "preference": [0.3, 0.05, 0.3], "size": [0.1, 0.1, 0.1]})
    assert receivers(table).tolist() == [True, False, False]


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
