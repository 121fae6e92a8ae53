"""codi cot at toy size: a run and its pieces, resumed to the same tables; refusals in one line; the engine below."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments import cli
from experiments.commands import COMMANDS
from experiments.cot import derive, eval, grid, run, show  # noqa: A004
from experiments.cot.options import CotRunOptions, DeriveOptions, EvalOptions, GridOptions, ShowOptions
from experiments.cot.places import CHOICE, ITEMS, SHUFFLED, VECTOR
from experiments.cot.vectors import Vectors, folder_hash, read_choice, refuse_used
from experiments.cot.writing import Steering, likelihoods, write
from experiments.study.result import Result
from experiments.tasks.item_sets import load_sets
from experiments.tasks.item_sources import Sizes
from lm.edits import ResidualEdit
from lm.generate import generate
from lm.model import LanguageModel
from lm.residual import read_residual
from lm.text import left_padded
from steering.control_vectors import ControlVector

DATA = Path(__file__).resolve().parent / "data"
SETS = ("ontology-1", "babi-16", "arithmetic")
SMALL: dict[str, Any] = {
    "sets": SETS, "derivation": 3, "validation": 2, "test": 3, "max_new_tokens": 5, "resamples": 100,
    "permutations": 100, "device": "cpu",
}  # fmt: skip
CELLS: dict[str, Any] = {"layers": (1, 2), "coefficients": (1.0, 4.0)}
Make = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def finished(language_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole `codi cot run`."""
    out = tmp_path_factory.mktemp("cot") / "run"
    run.run(CotRunOptions(out=out, **SMALL, **CELLS), language_model())
    return out


def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# --- A whole run ------------------------------------------------------------------------------------------------------


def test_a_run_is_three_folders_and_one_result(finished: Path) -> None:
    whole = Result.read(finished)
    three = ["The vector", "Where and how much", "What it does"]
    assert [section.heading for section in whole.sections if section.heading in three] == three
    assert whole.claims is not None and len(whole.claims) == 22
    for figure in whole.figures:
        assert all((finished / file).is_file() for file in figure.files) and figure.caption
    assert len(whole.tables["eval/levels"]) and (finished / "eval" / "samples.md").is_file()
    assert "codi cot run" in whole.command and whole.markdown() == Result.read(finished).markdown()
    for name in ("derive", "grid", "eval"):
        assert Result.read(finished / name).study == f"cot {name}"


def test_an_interrupted_run_goes_on_to_the_same_tables(finished: Path, tmp_path: Path, language_model: Make) -> None:
    """Parts, vectors and results of all three are deleted here and there; what is left is not computed again."""
    place = copied(finished, tmp_path)
    for gone in ("derive/trials/part-means-babi-16.parquet", "derive/result.json", f"derive/{VECTOR}",
                 "grid/trials/part-single-2.parquet", f"grid/{CHOICE}", "eval/trials/part-continuous.parquet",
                 "eval/result.json", "result.json"):  # fmt: skip
        (place / gone).unlink()
    said: list[str] = []
    run.run(CotRunOptions(out=place, **SMALL, **CELLS), language_model(), said.append)
    computed = [line.strip().split(":")[0] for line in said if " rows in " in line]
    assert computed == ["means-babi-16", "single-2", "continuous"]
    before, after = Result.read(finished), Result.read(place)
    for name in before.tables:
        pd.testing.assert_frame_equal(before.tables[name], after.tables[name])
    assert folder_hash(finished / "derive") == folder_hash(place / "derive")
    assert read_choice(finished / "grid") == read_choice(place / "grid")


def test_batches_change_nothing_that_is_written(finished: Path, tmp_path: Path, language_model: Make) -> None:
    found = run.run(CotRunOptions(out=tmp_path / "run", batch_size=3, **SMALL, **CELLS), language_model())
    pd.testing.assert_frame_equal(
        found.tables["eval/levels"].reset_index(drop=True),
        Result.read(finished).tables["eval/levels"].fillna({"way": "", "vector": ""}),
        check_dtype=False, check_categorical=False,
    )  # fmt: skip


def test_the_trials_hold_every_condition_of_every_question(finished: Path) -> None:
    trials = pd.concat([pd.read_parquet(path) for path in (finished / "eval" / "trials").glob("*.parquet")])
    assert trials.groupby(["prompt", "way", "vector", "coefficient", "draw"], observed=True).size().eq(9).all()
    assert set(trials["prompt"]) == {"neutral", "direct", "steps"}
    chosen = read_choice(finished / "grid")
    for way, (layer, c) in chosen.items():
        own = trials[trials["way"] == way]
        assert set(own["layer"]) == {layer} and {c, -c} <= set(own["coefficient"])
        assert {"all", "held-out", "random", "shuffled"} == set(own["vector"])
        assert sorted(own[own["vector"] == "random"]["draw"].unique()) == [0, 1, 2, 3, 4]


# --- The vector -------------------------------------------------------------------------------------------------------


def test_the_vector_is_the_mean_over_questions_of_means_over_tokens(
    finished: Path, tmp_path: Path, language_model: Make
) -> None:
    """Against states read one text at a time; leaving a family out is the mean of the others; greedy, so that the texts
    can be written again."""
    model = language_model()
    options = DeriveOptions(out=tmp_path / "run", temperature=0.0, **SMALL)
    derive.run(options, model)
    own = Vectors.read(tmp_path / "run", model)
    items = options.load_splits(0, model.tokenizer).derivation
    differences: dict[str, list[Tensor]] = {}
    for item in items:
        means = []
        for sentence in (options.steps_text, options.direct_text):
            batch = model.encode([model.text_of(f"{item.question} {sentence}")])
            written = generate(model, batch, 5).tokens[0]
            if written:
                text = left_padded([[*batch.input_ids[0].tolist(), *written]], 0)
                states = read_residual(model, text, "all", layers=range(1, model.n_layers + 1))[0]
                means.append(states[-len(written) :].double().mean(0))
        if len(means) == 2:
            differences.setdefault(item.task.split("-")[0], []).append(means[0] - means[1])
    every = torch.stack([one for group in differences.values() for one in group])
    assert own.whole.origin.n == len(every) > 3
    torch.testing.assert_close(own.whole.tensor().double(), every.mean(0), atol=2e-4, rtol=1e-3)
    rest = torch.stack([one for name, group in differences.items() if name != "babi" for one in group])
    torch.testing.assert_close(own.without["babi"].tensor().double(), rest.mean(0), atol=2e-4, rtol=1e-3)
    assert len(own.shuffled) == 2
    for draw in own.shuffled:
        np.testing.assert_allclose(list(draw.norms().values()), list(own.whole.norms().values()), rtol=1e-4)
        assert not torch.allclose(draw.tensor(), own.whole.tensor())
    assert folder_hash(tmp_path / "run") != folder_hash(finished / "derive")  # drawn answers give another vector


def test_a_question_with_an_empty_answer_is_left_out(tmp_path: Path, language_model: Make, monkeypatch: Any) -> None:
    model = language_model()
    first = {"done": False}

    def cut(*given: Any, **named: Any) -> Any:
        found = generate(*given, **named)
        if not first["done"]:
            found.tokens[0].clear()
            first["done"] = True
        return found

    monkeypatch.setattr(derive, "generate", cut)
    found = derive.run(DeriveOptions(out=tmp_path / "run", temperature=0.0, **{**SMALL, "sets": SETS[:1]}), model)
    sets = found.tables["sets"].iloc[0]
    assert sets["questions"] - sets["pairs"] >= 1 and "left out" in found.sections[0].text
    assert not list((tmp_path / "run" / "vectors").glob("without-*"))  # there is one family only


@pytest.mark.parametrize("tokens", ["all", "last-prompt"])
def test_other_tokens_are_read_and_said(tokens: Any, tmp_path: Path, language_model: Make) -> None:
    out = tmp_path / "run"
    derive.run(DeriveOptions(out=out, tokens=tokens, shuffles=0, **{**SMALL, "sets": SETS[:2]}), language_model())
    found = Vectors.read(out)
    assert found.whole.origin.tokens == tokens and not found.shuffled and set(found.without) == {"ontology", "babi"}


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_a_vector_of_another_model_is_refused(finished: Path, tmp_path: Path, language_model: Make) -> None:
    model, more = language_model(), {**SMALL, **CELLS, "vectors": finished / "derive"}
    other = LanguageModel(model.base, model.tokenizer, name="other", weights_hash="1" * 64)
    place = copied(finished, tmp_path) / "derive"
    vector = Vectors.read(place).whole
    from steering.vector_files import save_vector

    save_vector(place / VECTOR, ControlVector(vector.directions, replace(vector.origin, model_hash="2" * 64)))
    with pytest.raises(ValueError, match="weights"):
        grid.run(GridOptions(out=tmp_path / "grid", **{**more, "vectors": place}), other)
    with pytest.raises(ValueError, match=r"layer 3 of 2|width|layers"):
        grid.run(GridOptions(out=tmp_path / "grid", **more), language_model("gpt2"))


def test_questions_are_not_used_twice(finished: Path, tmp_path: Path, language_model: Make) -> None:
    model = language_model()
    items = load_sets(SETS, SETS, SETS, Sizes(3, 2, 3), 0, model.tokenizer)
    refuse_used(finished / "derive", items.validation, "validation")
    refuse_used(finished / "grid", items.test, "test")
    with pytest.raises(ValueError, match="9 of 9 test questions share a text or a cluster with the derivation"):
        refuse_used(finished / "derive", items.derivation, "test")
    place = copied(finished, tmp_path)
    marks = json.loads((place / "eval" / ITEMS).read_text(encoding="utf-8"))
    (place / "grid" / ITEMS).write_text(json.dumps({**marks, "part": "validation"}), encoding="utf-8")
    with pytest.raises(ValueError, match="9 of 9 test questions share .* with the validation questions"):
        eval.run(EvalOptions(out=tmp_path / "again", vectors=place / "derive", grid=place / "grid", **SMALL), model)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["grid", "--vectors", "nowhere"], "there is no vector at nowhere/vectors/all.safetensors: run codi cot"),
        (["derive", "--sets", "babi-17"], "unknown task 'babi-17'"),
        (["grid", "--coefficients", "0", "1"], "coefficients must be above 0, got 0"),
        (["grid", "--coefficients", "1", "1"], "coefficients names one twice: 1, 1"),
        (["eval", "--margin", "1.5"], "margin must lie between 0 and 1, got 1.5"),
        (["derive", "--steps-text", " "], "steps-text must hold at least one word"),
        (["derive", "--direct-text", "a", "--steps-text", "a"], "steps-text and direct-text must differ"),
        (["derive", "--max-new-tokens", "1"], "max-new-tokens must be at least 2, got 1"),
        (["derive", "--tokens", "some"], "some"),
        (["jump"], "unknown command 'jump'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] != "jump":
        words = [*words, "--out", str(tmp_path / "run"), "--model", str(DATA)]
    with pytest.raises(SystemExit) as stopped:
        cli.run_command(COMMANDS["cot"], words, "codi cot")
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and says in lines[0], lines


def test_impossible_cells_are_refused(finished: Path, tmp_path: Path, language_model: Make) -> None:
    more = {**SMALL, "vectors": finished / "derive"}
    with pytest.raises(ValueError, match=r"layers must be in 1\.\.3, got 4"):
        grid.run(GridOptions(out=tmp_path / "grid", layers=(4,), **more), language_model())
    cells = {"continuous": (1, 1.0), "single": (9, 1.0)}
    with pytest.raises(ValueError, match="no layer 9"):
        eval.run(EvalOptions(out=tmp_path / "eval", **cells, **more), language_model())
    with pytest.raises(ValueError, match="the coefficient of single steering must be above 0, got -1"):
        eval.run(EvalOptions(out=tmp_path / "eval", **{**cells, "single": (1, -1.0)}, **more), language_model())
    with pytest.raises(ValueError, match="no choice at"):
        EvalOptions(grid=tmp_path, model=str(DATA), **{**more, "vectors": finished / "derive"}).check_inputs()
    (tmp_path / CHOICE).write_text('{"chosen": {"single": 1}}', encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged: run codi cot grid again"):
        read_choice(tmp_path)


def test_other_vectors_are_another_run(finished: Path, tmp_path: Path, language_model: Make) -> None:
    place = copied(finished, tmp_path)
    shutil.copy(place / "derive" / SHUFFLED.format(draw=0), place / "derive" / VECTOR)
    more = {**SMALL, **CELLS, "vectors": place / "derive", "out": place / "grid"}
    with pytest.raises(ValueError, match="other options"):
        grid.run(GridOptions(**more), language_model())


# --- The engine -------------------------------------------------------------------------------------------------------


def test_steered_answers_are_those_of_edited_generation(finished: Path, language_model: Make) -> None:
    """Continuous steering begins at the last token of the prompt, single steering ends with the prompt; −c is not c."""
    model = language_model()
    vector = Vectors.read(finished / "derive", model).whole
    texts = ["3+4=?", "A longer text, of more tokens."]
    for positions in ("answer", "generated", "prompt", "last"):
        found = write(model, texts, [Steering(2, vector, c) for c in (5.0, -5.0, 0.0)], positions, 6, batch_size=4)
        for cell, c in enumerate((5.0, -5.0, 0.0)):
            edit = ResidualEdit(2, vector[2], c, positions)
            plain = generate(model, texts, 6, edits=[edit])
            assert [one.text for one in found[cell]] == plain.texts
            assert [one.tokens for one in found[cell]] == list(map(len, plain.tokens))
    first = {p: write(model, texts, [Steering(2, vector, 40.0)], p, 1, batch_size=2)[0][1].text
             for p in ("answer", "generated")}  # fmt: skip
    none = write(model, texts, [Steering()], "answer", 1, batch_size=2)[0][1].text
    assert first["generated"] == none != first["answer"]


@pytest.mark.parametrize("positions", ["answer", "generated", "prompt", "all"])
def test_likelihoods_are_those_of_the_whole_text(positions: Any, finished: Path, language_model: Make) -> None:
    """Against one uncached pass over prompt and continuation, one text at a time."""
    model = language_model()
    vector = Vectors.read(finished / "derive", model).whole
    texts, continuations = ["3+4=?", "A longer text."], [[10, 20, 30], [40]]
    found = likelihoods(model, texts, continuations, Steering(2, vector, 3.0), positions, batch_size=2)
    plain = likelihoods(model, texts, continuations, Steering(), positions, batch_size=1)
    for i, (text, after) in enumerate(zip(texts, continuations, strict=True)):
        ids = model.encode([text]).input_ids[0].tolist()
        edited = {"answer": range(len(ids) - 1, 99), "generated": range(len(ids), 99), "prompt": range(len(ids)),
                  "all": range(99)}[positions]  # fmt: skip

        def change(module: Any, args: Any, output: Any, where: range = edited) -> Any:
            x = (output if isinstance(output, Tensor) else output[0]).clone()
            for column in range(x.shape[1]):
                if column in where:
                    x[0, column] += 3.0 * vector[2]
            return x if isinstance(output, Tensor) else (x, *output[1:])

        hook = model.blocks[1].register_forward_hook(change)
        with torch.no_grad():
            logits = model.base(input_ids=torch.tensor([[*ids, *after]]), use_cache=False).logits[0].double()
        hook.remove()
        logs = torch.log_softmax(logits, -1)
        wanted = sum(float(logs[len(ids) - 1 + k, token]) for k, token in enumerate(after))
        assert found[i] == pytest.approx(wanted, abs=1e-4)
        if len(after) > 1 or positions != "generated":
            assert found[i] != pytest.approx(plain[i], abs=1e-3)


@pytest.mark.parametrize("score", ["letters", "choices"])
def test_choices_by_likelihood(score: Any, finished: Path, tmp_path: Path, language_model: Make) -> None:
    """Every lettered question gets a letter, whatever was written; the others are read from their texts."""
    task = f"mmlu:{DATA / 'geology_test.csv'}"
    options = EvalOptions(
        out=tmp_path / "eval", vectors=finished / "derive", continuous=(1, 1.0), single=(2, 4.0), score=score,
        test_sets=("ontology-1", task), **SMALL,
    )  # fmt: skip
    eval.run(options, language_model())
    trials = pd.concat([pd.read_parquet(path) for path in (tmp_path / "eval" / "trials").glob("*.parquet")])
    letters = trials[trials["set"] == "mmlu"]
    assert letters["parsed"].all() and set(letters["prediction"]) <= set("ABCD") and len(letters)
    assert (letters["correct"] == (letters["prediction"] == letters["answer"])).all()
    assert not trials[trials["set"] == "ontology-1"]["parsed"].all()


# --- Looking at it ----------------------------------------------------------------------------------------------------


def test_show(finished: Path, tmp_path: Path, language_model: Make) -> None:
    model = language_model()
    options = ShowOptions(vectors=finished / "derive", texts=finished / "eval", out=tmp_path / "show", top=3, samples=2)
    found = show.run(options, model)
    table = found.tables["readings"]
    assert len(table) == model.n_layers * 2 * 3
    whole = Vectors.read(finished / "derive").whole
    for side, sign in (("+", 1.0), ("−", -1.0)):
        with torch.no_grad():
            logits = model.logits(model.final_norm(sign * whole[3]))
        own = table[(table["layer"] == 3) & (table["side"] == side)].sort_values("rank")
        assert own["token_id"].tolist() == logits.topk(3).indices.tolist()
    vectors = found.tables["vectors"]
    assert vectors[vectors["vector"] == "all"]["cosine"].tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert "no sentence" in found.markdown() and (tmp_path / "show" / "figures" / "vector.png").is_file()
    assert "Texts" not in show.run(replace(options, texts=tmp_path, out=tmp_path / "bare"), model).markdown()
