"""codi circuit-latents: what heads write adds up, comes from where it is read, and a whole run on the shipped model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from circuit_model import rows

from codi import load_codi
from codi.decode import decode_answers
from experiments.circuit import latent_trials
from experiments.circuit.latent_trials import (
    _members,
    _thoughts,
    latent_ablated,
    latent_sources,
    latent_writers,
    writing_heads,
)
from experiments.circuit.latents import STUDY, make_tables
from experiments.circuit.options import LatentCircuitOptions
from experiments.statistics.clusters import Settings
from experiments.study.parts import Workbench
from experiments.study.run import run_study
from lm.cache import clone_cache

TINY = Path(__file__).resolve().parent.parent / "checkpoints/tiny"


def options(out: Path = Path("runs/x"), **given) -> LatentCircuitOptions:
    return LatentCircuitOptions(
        out=out, model=str(TINY), task="arithmetic", limit=10, batch_size=4, draws=2, resamples=200, **given
    )


@pytest.fixture(scope="module")
def model():
    return load_codi(TINY, attention="eager")


@pytest.fixture(scope="module")
def bench(model) -> Workbench:
    return Workbench(model, options().load_problems(0, model.protocol.question_suffix))


def test_contributions_add_up_and_the_logit_is_that_of_the_answer(model, bench):
    writers, sources = (make(bench, seed=0, batch_size=4) for make in (latent_writers, latent_sources))
    heads = model.n_layers * model.n_heads
    assert len(writers) % heads == 0 and len(sources) == len(writers) * (model.n_latents + 2)
    by = sources.groupby(["item", "block", "head"], sort=False)
    np.testing.assert_allclose(by["written"].sum().to_numpy(), writers["contribution"].to_numpy(), atol=1e-5)
    np.testing.assert_allclose(by["attention"].sum().to_numpy(), 1, atol=1e-5)
    problems = bench.prompts.evaluation
    item = int(writers["item"].iloc[0])
    run = model.rollout(model.encode([problems[item].question]), model.n_latents, keep=("cache",))
    said = decode_answers(model, run, keep_first_logits=True)
    assert said.first_logits is not None and abs(float(said.texts[0]) - float(problems[item].answer)) < 1e-6
    logits = said.first_logits[0].double()
    logits = logits.masked_fill(~torch.isfinite(logits), 0.0)
    expected = float(logits[said.tokens[0][0]] - logits.mean())
    assert writers[writers["item"] == item]["total"].iloc[0] == pytest.approx(expected, abs=1e-3)


def test_every_key_has_one_source_and_a_latent_its_slot(model, bench):
    thought = bench.once(_thoughts, 4)[0]
    found = _members(thought, model.n_latents)
    past = thought.run.attention_mask
    assert (found.sum(-1)[:, : past.shape[1]] == past.double()).all() and (found.sum(-1)[:, past.shape[1] :] == 1).all()
    for latent in range(1, model.n_latents + 1):
        assert found[..., latent].nonzero()[:, 1].tolist() == [thought.run.prompt_width + latent - 1] * len(past)
    assert (found[..., -1].sum(1) == 1 + len(thought.fed)).all()


def test_a_latent_without_values_writes_nothing(model, bench, monkeypatch):
    """Values of latent 3 are taken out of the cache: its share is gone, that of the others is not."""
    real = latent_trials._read

    def emptied(heads, thought, change=None):
        cache = clone_cache(thought.run.past_key_values)
        for layer in cache.layers:
            layer.values = layer.values.clone()
            layer.values[:, :, thought.run.prompt_width + 2] = 0
        return real(heads, replace_cache(thought, cache), change)

    def replace_cache(thought, cache):
        from dataclasses import replace

        return replace(thought, run=replace(thought.run, past_key_values=cache))

    plain = latent_sources(bench, seed=0, batch_size=4)
    monkeypatch.setattr(latent_trials, "_read", emptied)
    table = latent_sources(Workbench(model, bench.prompts), seed=0, batch_size=4)
    loud = table.groupby("latent")["written"].apply(lambda values: values.abs().max())
    assert loud[3] == 0 and (loud.drop(3) > 0).all()
    assert plain.groupby("latent")["written"].apply(lambda values: values.abs().max())[3] > 0


def test_silencing_nothing_changes_nothing_and_everything_does(model, bench):
    table = latent_ablated(bench, seed=0, batch_size=4, n=4, draws=2)
    by = table.groupby("silenced")["probability"].mean()
    assert set(table["silenced"]) == {"none", "writers", "random", "all"} and set(table["item"] % 2) == {1}
    assert table[table["silenced"] == "none"]["right"].all() and by["all"] < by["none"] - 0.1
    assert table[table["silenced"] == "writers"]["heads"].unique().tolist() == [4]


def test_tables_by_hand():
    """Item 0: question 3, latent 2: 1, of a logit of 8; item 1: latent 2 alone."""
    said = rows("item cluster block head contribution alone total",
                (0, "a", 1, 0, 4.0, 0.5, 8.0), (1, "b", 1, 0, 2.0, 0.5, 8.0),
                (0, "a", 2, 0, 0.0, 0.1, 8.0), (1, "b", 2, 0, 0.0, 0.1, 8.0))  # fmt: skip
    parts = {(0, "question", 0): 3.0, (0, "latent", 2): 1.0, (1, "question", 0): -1.0, (1, "latent", 2): 3.0}
    sources = rows("item cluster block head source latent attention written",
                   *[(item, "ab"[item], block, 0, source, latent, 0.5, value * (block == 1))
                     for (item, source, latent), value in parts.items() for block in (1, 2)])  # fmt: skip
    ablated = rows("item cluster silenced heads draw right probability", (1, "b", "none", 0, -1, True, 0.9))
    found = make_tables({"writers": said, "sources": sources, "ablated": ablated}, 1, Settings(resamples=200))
    assert found["writers"].loc[0, ["block", "share"]].tolist() == [1, 0.375]
    share = found["sources"].set_index("source")["mean"]
    assert share["question"] == 0.375 and share["latent"] == 0.625
    assert found["pathways"].loc[0, "mean"] == 1.5 and found["ablation"].loc[0, "accuracy"] == 1
    assert writing_heads(said, 1, (2, 1)).tolist() == [[True], [False]]


def test_a_whole_run_and_its_continuation(model, bench, tmp_path):
    found = run_study(STUDY, options(tmp_path), model, bench.prompts)
    assert (tmp_path / "figures/latent_writers.png").is_file()
    table = pd.read_csv(tmp_path / "sources.csv")
    assert len(table) == model.n_latents + 2 and table["mean"].sum() == pytest.approx(1)
    assert "latent 6" in found.markdown() and "inf" not in found.markdown()
    assert run_study(STUDY, options(tmp_path), model, bench.prompts).markdown() == found.markdown()
