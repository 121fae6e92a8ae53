"""The control commands from options to results, on tiny random models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from simulated_control import trials as simulated
from word_models import WORDS, colour_file, word_model

from experiments.control import derive, show, sweep, transfer
from experiments.control.cells import cells, choose, choose_both, effects, validation_table
from experiments.control.options import (
    DeriveOptions,
    ShowOptions,
    SweepOptions,
    TransferOptions,
    parse_alphas,
    parse_layers,
    parse_methods,
)
from experiments.control.plan import make_plan, parts
from experiments.control.trials import vectors_at
from experiments.control.vectors import Making, contrast_texts, make_vectors
from experiments.statistics.clusters import Settings
from experiments.study.item_texts import Reader
from experiments.study.parts import Workbench, run_here
from experiments.study.run import run_study
from experiments.tasks.items import Item
from lm.generate import generate
from lm.model import LanguageModel
from steering.vector_files import load_vector

QUICK: dict[str, Any] = {"resamples": 100, "permutations": 100}


def options_for(folder: Path, **changes: Any) -> SweepOptions:
    given: dict[str, Any] = {
        "task": str(colour_file(folder / "colours.jsonl")), "derivation": 10, "validation": 6, "limit": 12,
        "alphas": ("-1:1:0.5",), "draws": 3, "shuffled": 1, "max_new_tokens": 4, "out": folder / "run", **QUICK,
    }  # fmt: skip
    return SweepOptions(**{**given, **changes})


def table_of(options: SweepOptions, model: LanguageModel, split: str = "test") -> pd.DataFrame:
    prompts = options.load_items(options.seed, model.tokenizer)
    plan, bench = make_plan(options, model, prompts), Workbench(model, prompts)
    mine = [part for part in parts(plan) if part.belongs_to == split]
    return pd.concat([part.run(bench) for part in mine], ignore_index=True)


# --- The trial table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_alpha_0_is_the_unsteered_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, options = word_model(kind), options_for(tmp_path, layers=("all",))
    table = table_of(options, model)
    vector = table[table["kind"] == "vector"]
    still = vector[vector["alpha"] == 0]
    assert (still["kl"] == 0).all() and (vector[vector["alpha"] != 0]["kl"] > 0).all()
    items = options.load_items(0, model.tokenizer).test
    written = generate(model, [item.question for item in items], 4).texts
    plain = table[table["kind"] == "none"].set_index("prompt_id")
    assert len(plain) == len(items) == 12
    assert [plain.loc[item.prompt_id, "text"] for item in items] == written
    columns = ["prompt_id", "text", "entropy", "p_right", "p_wrong", "correct", "choice"]
    for layer in range(1, model.n_layers + 1):
        same = still[still["layer"] == layer][columns].set_index("prompt_id").sort_index()
        pd.testing.assert_frame_equal(same, plain[columns[1:]].sort_index())


def test_cells_of_the_grid(tmp_path: Path) -> None:
    model = word_model()
    options = options_for(tmp_path, methods=("contrastive", "reading"), layers=("1-2",))
    table, chosen_on = table_of(options, model), table_of(options, model, "validation")
    counts = table.groupby(["kind", "method"], observed=True)["prompt_id"].size() / 12
    assert dict(counts) == {
        ("none", ""): 1, ("vector", "contrastive"): 2 * 5, ("vector", "reading"): 2 * 5,
        ("random", "contrastive"): 2 * 2 * 3, ("random", "reading"): 2 * 2 * 3, ("shuffled", "contrastive"): 2 * 2,
    }  # fmt: skip
    assert set(chosen_on["kind"]) == {"none", "vector"} and not set(chosen_on["prompt_id"]) & set(table["prompt_id"])
    moved = table[table["alpha"] != 0]
    spread = moved.assign(size=moved["alpha"].abs()).groupby(["method", "layer", "size"], observed=True)["norm"]
    assert (spread.max() / spread.min() - 1 < 1e-5).all()  # controls are as long as the vector
    assert table["share_right"].between(0, 1).all()
    assert np.allclose(table["p_answers"], table["p_right"] + table["p_wrong"])
    assert (table["choice_correct"] == (table["choice"] == table["answer"])).all()


def test_random_directions_differ_and_do_not_depend_on_parts(tmp_path: Path) -> None:
    model, options = word_model(), options_for(tmp_path)
    prompts = options.load_items(0, model.tokenizer)
    setup = make_plan(options, model, prompts).setup
    bench = Workbench(model, prompts)
    first, second = (vectors_at(Workbench(model, prompts), setup, 2) for _ in range(2))
    assert all(torch.equal(first[key][2], second[key][2]) for key in first)
    draws = torch.stack([first["random", "contrastive", i][2] for i in range(3)])
    unit = draws / draws.norm(dim=1, keepdim=True)
    assert float((unit @ unit.T - torch.eye(3)).abs().max()) < 0.7
    assert list(bench.once(vectors_at, setup, 1)) == list(first)


def test_equal_scales(tmp_path: Path) -> None:
    model = word_model()
    names = ("reading", "contrastive")
    as_is, norm = (
        table_of(options_for(tmp_path, methods=names, alphas=("-0.1", "0.1"), scale=scale), model)
        for scale in ("as-is", "equal-norm")
    )  # fmt: skip

    def of(table: pd.DataFrame, method: str, column: str) -> float:
        rows = table[(table["kind"] == "vector") & (table["method"] == method) & (table["alpha"] == 0.1)]
        return float(rows[column].mean())

    assert abs(of(as_is, "reading", "norm") / of(as_is, "contrastive", "norm") - 1) > 0.01
    assert of(norm, "reading", "norm") == pytest.approx(of(norm, "contrastive", "norm"), rel=1e-5)
    options = options_for(tmp_path, methods=names, alphas=("-0.1", "0.1"), scale="equal-kl", validation=12)
    kl = table_of(options, model, "validation")
    apart = abs(of(as_is, "reading", "kl") / of(as_is, "contrastive", "kl") - 1)
    assert abs(of(kl, "reading", "kl") / of(kl, "contrastive", "kl") - 1) < min(0.1, apart)
    assert of(kl, "reading", "coefficient") == pytest.approx(0.1)
    assert abs(of(kl, "contrastive", "coefficient") - 0.1) > 1e-3


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_sweep_from_options_to_result(tmp_path: Path) -> None:
    model, options = word_model(), options_for(tmp_path, layers=("all",), methods=("all",))
    result = sweep.run(options, model)
    assert result.claims is not None and [claim.name[:2] for claim in result.claims] == ["R1", "R2", "R3", "R4", "R5"]
    assert result.claims["R1 (beyond random)"].verdict == "not testable"  # three draws
    made = {Path(file).name for figure in result.figures for file in figure.files}
    assert {"curves-layer-2.png", "map-contrastive.png", "norms.pdf"} <= made
    text = result.markdown()
    assert "12 test items" in text and "random directions" in text and "Chosen on validation items" in text
    table = result.tables["cells"]
    assert len(table) == 4 * model.n_layers * 5 and {"coherent", "coherent_shown", "norm"} <= set(table)
    again = sweep.run(options, model)
    assert again.markdown() == text


def test_an_interrupted_run_ends_in_the_same_table(tmp_path: Path) -> None:
    model, options = word_model(), options_for(tmp_path)
    whole = run_study(sweep.STUDY, options, model)

    def stop_early(todo: Sequence[Any], bench: Workbench) -> Any:
        for number, done in enumerate(run_here(todo, bench)):
            if number == 2:
                raise KeyboardInterrupt
            yield done

    other = dataclasses.replace(options, out=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run_study(sweep.STUDY, other, model, executor=stop_early)
    assert len(list((other.out / "trials").iterdir())) == 2
    resumed = run_study(sweep.STUDY, other, model)
    for name in ("trials/part-test-layer-02-000.parquet", "effects.csv", "cells.csv", "claims.csv"):
        assert (other.out / name).read_bytes() == (options.out / name).read_bytes(), name
    assert resumed.claims is not None and whole.claims is not None
    assert resumed.claims.markdown() == whole.claims.markdown()


def test_vectors_are_made_read_shown_and_refused(tmp_path: Path) -> None:
    model, options = word_model(), options_for(tmp_path, methods=("contrastive",))
    making = DeriveOptions(task=options.task, derivation=10, methods=("all",), out=tmp_path / "made")
    found = derive.run(making, model)
    files = sorted(path.name for path in (making.out / "vectors").iterdir())
    assert "contrastive.safetensors" in files and "reading.gguf" in files and len(files) == 8
    assert found.tables["norms"]["halves"].between(-1, 1).all()
    one = load_vector(making.out / "vectors" / "contrastive.safetensors", model)
    shown = show.run(ShowOptions(vectors=making.out, out=tmp_path / "shown", top=3), model)
    tokens = shown.tables["tokens"]
    assert len(tokens) == 4 * model.n_layers * 2 * 3
    best = tokens[(tokens["method"] == "contrastive") & (tokens["layer"] == 3) & (tokens["sign"] == 1)].iloc[0]
    with torch.no_grad():
        logits = model.logits(model.final_norm(one[3][None]))[0]
    assert int(best["token_id"]) == int(logits.argmax())
    assert best["logit"] == pytest.approx(float(logits.max()), rel=1e-4)
    cosine = shown.tables["cosines_layers"]
    assert cosine[cosine["layer"] == cosine["other"]]["cosine"].to_numpy() == pytest.approx(1)

    # a sweep with these files steers exactly as one that makes them from the same items
    given = dataclasses.replace(options, vectors=making.out / "vectors" / "contrastive.safetensors", shuffled=0)
    own, read = table_of(dataclasses.replace(options, shuffled=0), model), table_of(given, model)
    columns = ["kind", "alpha", "draw", "kl", "text"]
    assert making_agrees(options, making, model)
    pd.testing.assert_frame_equal(own[columns], read[columns])
    with pytest.raises(ValueError, match="made with another model") as error:
        make_plan(given, word_model(seed=1, weights_hash="b" * 64), options.load_items(0, model.tokenizer))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no vectors at"):
        dataclasses.replace(options, model="checkpoints/tiny", vectors=tmp_path / "nowhere").check_inputs()


def making_agrees(options: SweepOptions, making: DeriveOptions, model: LanguageModel) -> bool:
    """Both take their vectors from the same items."""
    first = options.load_items(0, model.tokenizer).derivation
    second = dataclasses.replace(making, validation=options.validation, limit=options.limit)
    return first == second.load_items(0, model.tokenizer).derivation


# --- Vectors ----------------------------------------------------------------------------------------------------------

ITEMS = [Item(f"i{i}", "t", f"what colour is thing {i}?", WORDS[i % 4], choices=WORDS) for i in range(12)]


def test_pairs_of_texts(tmp_path: Path) -> None:
    model = word_model()
    reader = Reader.of(model, ITEMS)
    positive, negative = contrast_texts(reader, ITEMS, "swapped")
    assert positive[1] == "what colour is thing 1? blue" and negative[1] == "what colour is thing 1? red"
    _, letters = contrast_texts(reader, ITEMS, "letters", seed=3)
    assert {len(text) for text in letters} == {75} and len(set(letters)) == 12
    assert letters == contrast_texts(reader, ITEMS, "letters", seed=3)[1]
    right, wrong = contrast_texts(reader, ITEMS, "failures")  # a random model fails
    written = generate(model, [item.question for item in ITEMS], 32).texts
    assert len(right) == len(wrong) <= 12 and all(text.startswith("what colour is thing") for text in wrong)
    assert any(w.split()[-1] in text for w, text in zip(wrong, written, strict=False))
    with_example = Reader.of(model, ITEMS[1:], ITEMS[:1], "One word.")
    assert with_example.text(ITEMS[1]) == ("what colour is thing 0? One word. red\n\nwhat colour is thing 1? One word.")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"positive": "a", "negative": "b"}\n{"positive": "c", "negative": "d"}\n')
    assert contrast_texts(reader, [], "given", pairs=str(pairs)) == (["a", "c"], ["b", "d"])
    pairs.write_text('{"positive": "a"}\n')
    with pytest.raises(ValueError, match="line 1: a pair has the texts positive and negative"):
        contrast_texts(reader, [], "given", pairs=str(pairs))


def test_items_that_the_model_never_fails_on_are_no_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = word_model()
    monkeypatch.setattr("experiments.control.vectors._own_answers", lambda reader, items: [""] * len(items))
    with pytest.raises(ValueError, match="the model fails on 0 of 12 derivation items"):
        make_vectors(model, ITEMS, Making(("contrastive",), "failures"))


def test_readings_need_no_negatives_and_shuffled_pairs_are_of_contrasts_only() -> None:
    model = word_model()
    made = make_vectors(model, ITEMS, Making(("reading", "contrastive"), shuffled=2))
    assert set(made.shuffled) == {("contrastive", 0), ("contrastive", 1)} and made.n_pairs == 12
    norms = made.vectors["contrastive"].norms()
    assert made.shuffled["contrastive", 1].norms() == pytest.approx(norms, rel=1e-5)


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_tables_of_a_known_effect() -> None:
    def effect(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
        if kind != "vector":
            return {"kl": alpha**2}
        return {"correct": 0.3 * alpha, "p_right": 0.2 * alpha, "entropy": -0.5 * alpha, "kl": alpha**2}

    settings = Settings(resamples=200, permutations=200)
    test, validation = simulated(effect), simulated(effect, split="validation", seed=1)
    found = effects(test, settings)
    own = found[found["outcome"] == "correct"].set_index("alpha")
    assert own.loc[1.0, "difference"] == pytest.approx(0.3, abs=0.06) and own.loc[1.0, "q"] < 0.01
    assert own.loc[0.0, ["difference", "lower", "upper", "draws"]].tolist() == [0, 0, 0, 0] and own.loc[0.0, "q"] == 1
    assert own.loc[1.0, "p_above"] == pytest.approx(1 / 21) and own.loc[-1.0, "p_below"] == pytest.approx(1 / 21)
    assert own.loc[1.0, "random_mean"] == own.loc[-1.0, "random_mean"] == pytest.approx(own.loc[0.0, "mean"])
    table = cells(found, test).set_index("alpha")
    assert table["coherent_shown"].tolist() == [False, False, False, True, True]
    chosen = validation_table(validation)
    choice, both = choose(chosen), choose_both(chosen)
    assert (choice.alpha, choice.layer, choice.tied) == (1.0, 2, 0)
    assert both is not None and both.alpha == 0.5  # the worse sign of 0.5 is better than that of 1


def test_ties_go_to_the_larger_probability() -> None:
    def flat(kind: str, layer: int, alpha: float, draw: int) -> dict[str, float]:
        return {"p_right": -0.2 * (alpha - 0.5) ** 2, "kl": alpha**2}

    choice = choose(validation_table(simulated(flat, split="validation", accuracy=1.0)))
    assert choice.alpha == 0.5 and choice.tied == 3


# --- Transfer ---------------------------------------------------------------------------------------------------------


def test_transfer_from_options_to_result(tmp_path: Path) -> None:
    model = word_model()
    (tmp_path / "a").mkdir()
    first = colour_file(tmp_path / "a" / "first.jsonl")
    records = [
        {"question": f"which colour has thing {i}?", "answer": WORDS[(i + 1) % 4], "choices": list(WORDS),
         "id": f"second-{i}"}
        for i in range(30)
    ]  # fmt: skip
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(map(json.dumps, records)))
    options = TransferOptions(
        tasks=(str(first), str(second)), derivation=8, validation=6, limit=8, draws=3, max_new_tokens=3,
        alphas=("-1", "1"), out=tmp_path / "run", **QUICK,
    )  # fmt: skip
    result = transfer.run(options, model)
    table = result.tables["transfer"]
    one = table[(table["outcome"] == "correct") & table["own"]]
    assert len(one) == 4 and set(zip(one["source"], one["target"], strict=True)) == {
        (a, b) for a in options.tasks for b in options.tasks
    }
    assert one["n"].tolist() == [8] * 4 and (one["draws"] == 3).all()
    assert result.claims is not None and len(result.claims) == 2
    assert [Path(figure.files[0]).name for figure in result.figures] == ["transfer.png"]
    with pytest.raises(ValueError, match="share their question"):
        transfer.run(dataclasses.replace(options, tasks=(str(first), str(colour_file(tmp_path / "copy.jsonl", 36))),
                                         out=tmp_path / "other"), model)  # fmt: skip


@pytest.mark.parametrize(
    ("own", "other", "verdicts"),
    [
        (0.3, 0.3, ["held", "held"]),
        (0.3, 0.0, ["held", "not held"]),
        (0.0, 0.3, ["not held", "not testable"]),
    ],
)
def test_the_claim_of_transfer(own: float, other: float, verdicts: list[str]) -> None:
    frames, choices = [], {}
    for source in "ab":
        for target in "ab":
            size = own if source == target else other

            def effect(kind: str, layer: int, alpha: float, draw: int, size: float = size) -> dict[str, float]:
                return {"correct": size * alpha if kind == "vector" else 0.0, "kl": 0.1}

            frame = simulated(effect, n=400, alphas=(-1.0, 0.0, 1.0), seed=ord(target))
            frame["prompt_id"] = frame["cluster"] = target + frame["prompt_id"]
            frames.append(frame.assign(source=source, target=target))
        choices[source] = choose(validation_table(frames[-1].assign(split="validation")))
        choices[source] = dataclasses.replace(choices[source], alpha=1.0)
    test = pd.concat(frames, ignore_index=True)
    claims = transfer.transfer_claim(test, choices, Settings(resamples=500, permutations=100))
    assert [claim.verdict for claim in claims] == verdicts
    table = transfer.matrix(test, choices, ["a", "b"], Settings(resamples=200, permutations=100))
    crossed = table[(table["outcome"] == "correct") & table["own"] & (table["source"] != table["target"])]
    assert crossed["difference"].to_numpy() == pytest.approx(other, abs=0.06)


# --- Options ----------------------------------------------------------------------------------------------------------


def test_lists_as_a_person_writes_them() -> None:
    assert parse_alphas(("-1:1:0.5",)) == (-1, -0.5, 0, 0.5, 1)
    assert len(parse_alphas(("-1:1:0.1",))) == 21 and parse_alphas(("0.3,2", "-1")) == (-1, 0, 0.3, 2)
    assert parse_layers(("middle",), 30, 15) == (15,) and parse_layers(("2-4,7", "3"), 9) == (2, 3, 4, 7)
    assert parse_layers(("all",), 3) == (1, 2, 3)
    assert parse_methods(("all",)) == ("reading", "contrastive", "pca-contrast", "pca-reading")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas": ("0",)}, "alphas must hold a number other than 0"),
        ({"alphas": ("1:0:0.1",)}, "a range of alphas goes up"),
        ({"alphas": ("x",)}, "alphas must be numbers such as"),
        ({"alphas": ("inf",)}, "alphas must be finite"),
        ({"layers": ("0",)}, "layers must be in numbers from 1"),
        ({"layers": ()}, "layers must name at least one"),
        ({"methods": ("mean",)}, "methods must be among reading"),
        ({"methods": ("reading", "reading")}, "names one twice"),
        ({"negatives": "given"}, "--pairs FILE and --negatives given go together"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SweepOptions(**change)
    assert "\n" not in str(error.value)


def test_layers_that_the_model_does_not_have(tmp_path: Path) -> None:
    model = word_model()
    options = options_for(tmp_path, layers=("4",))
    with pytest.raises(ValueError, match=r"layers must be in 1\.\.3"):
        make_plan(options, model, options.load_items(0, model.tokenizer))
    with pytest.raises(ValueError, match="two or more different ones"):
        TransferOptions(tasks=("babi-15",))
    with pytest.raises(ValueError, match="transfer takes one layer"):
        TransferOptions(layers=("1-3",))
    with pytest.raises(ValueError, match="unknown task"):
        TransferOptions(model="checkpoints/tiny", tasks=("babi-15", "nothing")).check_inputs()
