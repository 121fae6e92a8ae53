"""codi circuit: tables by hand, subtasks that are what they say, and a whole run of a tiny model, continued."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from circuit_model import count_all_as_right, make_circuit_model

from circuits.heads import Heads
from circuits.patching import patch
from experiments.circuit import trials
from experiments.circuit.items import make_ontologies, subtasks
from experiments.circuit.options import CircuitOptions
from experiments.circuit.run import STUDY
from experiments.circuit.tables import chosen_table, effect_table, prediction_table
from experiments.circuit.trials import PREDICTIONS
from experiments.statistics.clusters import Settings
from experiments.study.run import run_study
from lm.model import LanguageModel


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_circuit_model()


def options(out: Path, **given) -> CircuitOptions:
    sizes = {"limit": 3, "hops": 1, "demonstrations": 1, "resamples": 200, "permutations": 200, "held_out": 2,
             "traced": 2, "mixing_texts": 8, "draws": 2, "positions": "all"}  # fmt: skip
    return CircuitOptions(**{"out": out, "what": ("effects",), **sizes, **given})


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
    count_all_as_right(monkeypatch)
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


def test_one_item_has_words_in_place_of_an_interval(model, tmp_path, monkeypatch):
    """One right item of a subtask: an effect, but no interval and none in the summary."""
    from experiments.circuit import trials

    real = trials._subtasks_of

    def first_right(bench, item, where):
        found, table = real(bench, item, where)
        return found, table.assign(right=item == 0)

    monkeypatch.setattr(trials, "_subtasks_of", first_right)
    ontologies = make_ontologies(options(tmp_path), model.tokenizer)
    found = run_study(STUDY, options(tmp_path / "one", step=3), model, ontologies)
    table = pd.read_csv(tmp_path / "one/effects.csv")
    assert len(table) and table[["lower", "upper"]].isna().all(axis=None) and (table["n"] == 1).all()
    assert "(one item: no interval)" in found.markdown() and "inf]" not in found.markdown()


def test_heads_chosen_on_half_of_the_items_are_measured_on_the_other():
    """A head that always recovers is found on the other half; heads that are large once are not."""
    rng = np.random.default_rng(0)
    real, lucky = [], []
    for item in range(8):
        for head in range(20):
            kl = 1.0 if head else 0.2
            luck = 1.0 - 0.8 * float(head == item + 10)
            about = {"item": item, "subtask": 5, "kind": "induction", "block": 1, "head": head, "kl_corrupted": 1.0}
            real.append({**about, "kl": kl + 0.01 * rng.normal()})
            lucky.append({**about, "kl": luck})
    settings = Settings(resamples=200)
    found = chosen_table(pd.DataFrame(real), settings).set_index("heads")["effect"]
    assert found["chosen"] == pytest.approx(0.8 / 5, abs=0.02) and found["random"] == pytest.approx(0.8 / 20, abs=0.02)
    found = chosen_table(pd.DataFrame(lucky), settings).set_index("heads")["effect"]
    assert found["chosen"] < 0.02 < effect_table(pd.DataFrame(lucky), settings)["effect"].nlargest(5).mean()


def test_p_of_effects_is_small_for_a_head_that_always_recovers_only():
    rng = np.random.default_rng(1)
    rows = [
        {"item": item, "subtask": 5, "kind": "induction", "block": 1, "head": head, "kl_corrupted": 1.0,
         "kl": 0.5 if head == 3 else 1 + 0.2 * rng.normal()}
        for item in range(12) for head in range(10)
    ]  # fmt: skip
    p = effect_table(pd.DataFrame(rows), Settings(resamples=200, permutations=2000)).set_index("head")["p"]
    assert p[3] < 0.02 and (p.drop(3) > 0.05).all()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="--what takes different parts of effects, knockout"):
        CircuitOptions(out=tmp_path, what=("rift", "rift"))
    with pytest.raises(ValueError, match=r"--hops must be in 1\.\.4, got 5"):
        CircuitOptions(out=tmp_path, hops=5)
    with pytest.raises(ValueError, match="limit must be at least 2, got 1"):
        CircuitOptions(out=tmp_path, limit=1)


def test_all_parts_of_a_run_and_its_files(model, tmp_path, monkeypatch):
    """Every part, with every word counted as right: tables, figures, claims and the tree are there, twice the same."""
    count_all_as_right(monkeypatch)
    everything = options(tmp_path / "all", what=CircuitOptions.what, positions="last")
    ontologies = make_ontologies(everything, model.tokenizer)
    assert len(ontologies.held_out) == len(ontologies.unseen) == 2 and len(ontologies.one_hop) == 3
    found = run_study(STUDY, everything, model, ontologies)
    names = {path.name for path in (tmp_path / "all/figures").glob("*.png")}
    assert names == {f"{name}.png" for name in ("effects", "knockout", "pathways", "mixing", "rift", "flow_tree")}
    tree = json.loads((tmp_path / "all/flow_tree.json").read_text())
    assert {node["kind"] for node in tree["nodes"]} == {"head", "token"} and tree["graph"]["target_text"].strip()
    assert found.claims is not None and len(found.claims) == 8
    kept = pd.read_csv(tmp_path / "all/kept.csv")
    whole = kept[kept["circuit"] == "whole"]
    assert (whole["agreement"] == 1).all() and {"held-out", "unseen"} == set(kept["set"])
    assert {"reasoning", "copy", "decision", "random", "none"} < set(kept["circuit"])
    for part in (tmp_path / "all/trials").glob("part-kept-*.parquet"):
        part.unlink()

    def patched_again(*arguments, **given):
        raise AssertionError("heads are ranked by the effects of the run folder, not by new ones")

    monkeypatch.setattr(trials, "patch", patched_again)
    again = run_study(STUDY, everything, model, ontologies)
    assert again.markdown() == found.markdown()
    next((tmp_path / "all/trials").glob("part-effects-*.parquet")).unlink()
    with pytest.raises(AssertionError, match="not by new ones"):
        run_study(STUDY, everything, model, ontologies)


def test_a_part_alone_needs_no_other(model, tmp_path):
    """The rift alone: no words of other lexicons are made, and claims about the rest cannot be tested."""
    alone = options(tmp_path / "rift", what=("rift",))
    ontologies = make_ontologies(alone, model.tokenizer)
    assert not ontologies.held_out and not ontologies.reference and not ontologies.mixing[0]
    found = run_study(STUDY, alone, model, ontologies)
    assert {path.stem for path in (tmp_path / "rift").glob("*.csv")} == {"predictions", "rift", "crossing", "claims"}
    assert found.claims is not None and found.claims["W1 (writers)"].note == "this run has no writers"
