"""codi circuit: tables by hand, subtasks that are what they say, and a whole run of a tiny model, continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from word_tokenizers import merging_tokenizer

from circuits.heads import Heads
from circuits.patching import patch
from experiments.circuit.items import make_ontologies, subtasks
from experiments.circuit.options import CircuitOptions
from experiments.circuit.run import STUDY, effect_table, prediction_table
from experiments.circuit.trials import PREDICTIONS
from experiments.statistics.clusters import Settings
from experiments.study.run import run_study
from experiments.tasks.ontology_text import generate
from experiments.tasks.ontology_words import TRAINING, plural_of
from lm.model import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A random model with a token for every form of every word."""
    words = [
        " " + form for noun in TRAINING.concepts for one in (noun, plural_of(noun)) for form in (one, one.capitalize())
    ]
    words += [" " + word for word in (*TRAINING.entities, *TRAINING.properties)]
    texts = [" ".join(words) for _ in range(3)] + [item.text for item in generate(4, TRAINING, 1, demonstrations=1)]
    tokenizer = merging_tokenizer(texts, vocabulary=2000)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config), tokenizer, name="tiny")


def options(out: Path, **given) -> CircuitOptions:
    return CircuitOptions(out=out, limit=3, hops=1, demonstrations=1, resamples=200, **given)


def test_subtasks_are_what_they_say(model, tmp_path):
    """Clean text up to the word; corrupted in the exchanged word only; both words by their first tokens."""
    ontologies = make_ontologies(options(tmp_path), model.tokenizer)
    assert ontologies.record()["n_items"] == 3 and ontologies.about() == "3 ontologies"
    item = ontologies.items[0]
    found = subtasks(item, ontologies.lexicon, model.tokenizer, "last")
    assert [one.number for one in found] == list(range(7))
    kinds = ["decision", "copy", "decision", "copy", "decision", "induction", "answer"]
    assert [one.kind for one in found] == kinds
    for one in found:
        decoded = model.tokenizer.decode(one.probe.clean)
        assert decoded == item.prefix(one.number)
        target = model.tokenizer.decode([one.probe.target])
        assert target.strip() and item.cut(one.number).target.startswith(target.strip())
        differing = [a != b for a, b in zip(one.probe.clean, one.probe.corrupted, strict=True)]
        assert 1 <= sum(differing) <= 4 and one.probe.target != one.probe.other
    answer = found[-1].probe
    both = {model.tokenizer.decode([i]).strip() for i in (answer.target, answer.other)}
    assert all(any(word.startswith(one) for word in ("True", "False")) for one in both) and len(both) == 2
    with_mention = subtasks(item, ontologies.lexicon, model.tokenizer, "chain")
    assert 0 < len(with_mention) < len(found), "not every word was in the chain before"


def test_effect_table_by_hand():
    rows = [
        {"item": item, "subtask": 1, "kind": "copy", "block": 1, "head": head, "kl_corrupted": whole, "kl": kl}
        for item, whole, values in ((0, 1.0, (0.5, 1.0)), (1, 3.0, (0.0, 3.0)))
        for head, kl in enumerate(values)
    ]
    found = effect_table(pd.DataFrame(rows), Settings(resamples=200)).set_index("head")
    assert found["effect"].tolist() == [3.5 / 4, 0]  # not the mean of 1/2 and 1
    assert found.loc[0, "lower"] <= 3.5 / 4 <= found.loc[0, "upper"] and found.loc[1, "upper"] == 0
    assert (found["n"] == 2).all()


def test_prediction_table_by_hand():
    rows = [(0, 1, "copy", True, 0.5, 10, 4), (1, 1, "copy", False, 0.1, 12, 6), (0, 2, "answer", True, 1.0, 20, 1)]
    trials = pd.DataFrame(rows, columns=PREDICTIONS.names)
    found = prediction_table(trials, Settings(resamples=200)).set_index("subtask")
    assert found["mean"].tolist() == [0.5, 1] and found["n"].tolist() == [2, 1]
    assert found.loc[1, "probability"] == pytest.approx(0.3) and found.loc[1, "tokens_run"] == 5


def test_a_whole_run_and_its_continuation(model, tmp_path):
    """A random model predicts no word: nothing is patched, and the summary says so; a second run only reads."""
    ontologies = make_ontologies(options(tmp_path), model.tokenizer)
    plain = run_study(STUDY, options(tmp_path / "a"), model, ontologies)
    predicted = pd.read_csv(tmp_path / "a/predictions.csv")
    assert predicted["subtask"].tolist() == list(range(7)) and not predicted["mean"].any()
    assert "nothing to patch" in plain.markdown() and pd.read_csv(tmp_path / "a/effects.csv").empty
    assert (tmp_path / "a/result.json").is_file() and (tmp_path / "a/effects.csv").is_file()
    again = run_study(STUDY, options(tmp_path / "a"), model, ontologies)
    assert again.markdown() == plain.markdown() and "3 ontologies of 1 hops" in plain.markdown()


def test_effects_of_the_run_are_those_of_the_engine(model, tmp_path, monkeypatch):
    """With every item counted as right: the table is the engine's effect of the same probes."""
    from experiments.circuit import trials

    real = trials._subtasks_of

    def all_right(bench, item, where):
        found, table = real(bench, item, where)
        return found, table.assign(right=True)

    monkeypatch.setattr(trials, "_subtasks_of", all_right)
    ontologies = make_ontologies(options(tmp_path), model.tokenizer)
    run_study(STUDY, options(tmp_path / "b", step=2), model, ontologies)
    found = pd.read_csv(tmp_path / "b/effects.csv")
    assert sorted(found["block"].unique()) == [1, 3] and len(found) == 7 * 2 * 4
    probes = [
        one.probe
        for item in ontologies.items
        for one in subtasks(item, ontologies.lexicon, model.tokenizer, "last")
        if one.number == 5
    ]
    expected = patch(Heads(model), probes, blocks=[1, 3]).effect().flatten()
    effect = found[found["subtask"] == 5].sort_values(["block", "head"])["effect"].to_numpy()
    np.testing.assert_allclose(effect, expected.numpy(), atol=1e-4)
    assert (tmp_path / "b/figures/effects.png").is_file()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"--hops must be in 1\.\.4, got 5"):
        CircuitOptions(out=tmp_path, hops=5)
    with pytest.raises(ValueError, match="limit must be at least 2, got 1"):
        CircuitOptions(out=tmp_path, limit=1)
