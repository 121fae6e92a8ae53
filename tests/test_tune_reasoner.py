"""`codi reasoner`: answers judged as told, three ways of asking the same questions, the card gets the run's numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import make_base, make_tokenizer

from experiments.statistics.effects import row_of
from experiments.tasks.reasoner import TASKS, generate
from experiments.tune import reasoner
from experiments.tune.judge import judged
from experiments.tune.options import ReasonerOptions
from lm.adapters import add_adapter, save_adapter
from lm.errors import UserError
from lm.load import load_lm
from lm.model import LanguageModel

ITEMS = reasoner.questions(4, 0).test


@pytest.mark.parametrize("task", TASKS)
def test_the_gold_text_is_right_and_a_chain(task: str) -> None:
    for item in [item for item in ITEMS if item.task == task]:
        whole = judged(item, " ".join([*item.chain, item.answer]))
        assert whole["correct"] and whole["chain"] and whole["gold"] and not whole["at_once"]
        bare = judged(item, item.answer)
        assert bare["correct"] and bare["at_once"] and not bare["chain"] and not bare["gold"]
        nothing = judged(item, "Well.")
        assert not (nothing["parsed"] or nothing["correct"] or nothing["chain"] or nothing["gold"])
        assert judged(item, "")["words"] == 0 and not judged(item, "")["at_once"]


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_answer_after_a_right_chain_is_wrong(task: str) -> None:
    for item in [item for item in ITEMS if item.task == task]:
        other = next((choice for choice in item.choices if choice != item.answer), "100000")
        found = judged(item, " ".join([*item.chain, other]))
        assert found["parsed"] and not found["correct"] and found["chain"] and not found["gold"]


def test_a_chain_needs_a_valid_step() -> None:
    sums = next(item for item in ITEMS if item.task == "arithmetic")
    assert not judged(sums, f"2 + 2 = 5. {sums.answer}")["chain"] and judged(sums, f"2 + 2 = 4. {sums.answer}")["chain"]
    animals = next(item for item in ITEMS if item.task == "babi-15")
    assert not judged(animals, f"Nobody is afraid. {animals.answer}")["chain"]
    assert judged(animals, f"{animals.chain[0].upper()} {animals.answer}")["chain"]
    ontology = next(item for item in ITEMS if item.task == "ontology-3")
    assert (
        not judged(ontology, "Nobody is wumpus. True")["chain"]
        and judged(ontology, f"{ontology.chain[0]} True")["chain"]
    )


def test_the_last_answer_that_is_named_counts() -> None:
    item = next(item for item in ITEMS if item.task == "ontology-1" and item.answer == "True")
    assert judged(item, "It is False? No: the statement is True.")["correct"]
    assert not judged(item, "True or False")["correct"] and not judged(item, "Truest")["parsed"]


def test_questions_are_held_out_and_the_same_in_every_way() -> None:
    assert reasoner.questions(4, 0).test == ITEMS and reasoner.questions(4, 1).test != ITEMS
    assert len(ITEMS) == 24 and len({item.question for item in ITEMS}) == 24
    direct = {sample.question for task in TASKS for sample in generate(4, 0, "test", task, "direct")}
    assert {item.question for item in ITEMS} == direct


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a tiny random model."""
    folder = tmp_path_factory.mktemp("models")
    make_base("llama").save_pretrained(folder / "base")
    make_tokenizer(named=False).save_pretrained(folder / "base")
    model = load_lm(str(folder / "base"))
    adapted = add_adapter(model.base, 2, 4)
    save_adapter(adapted, folder / "adapter", base=str(folder / "base"), base_hash=model.weights_hash, form="response")
    return folder / "adapter"


def options(adapter: Path, out: Path, **changes: object) -> ReasonerOptions:
    given = {"model": str(adapter), "out": out, "items": 3, "base_items": 2, "max_new_tokens": 3, "resamples": 100,
             "permutations": 100, "device": "cpu"}  # fmt: skip
    return ReasonerOptions(**{**given, **changes})  # type: ignore[arg-type]


def test_a_run(adapter: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"# Card\n\n{reasoner.BEGIN}\nold\n{reasoner.END}\n\nafter\n")
    result = reasoner.run(options(adapter, tmp_path / "run", card=card))
    trials = pd.read_parquet(tmp_path / "run" / "trials" / "part-model-direct.parquet")
    assert len(trials) == 18 and set(trials["task"]) == set(TASKS)
    rates = result.tables["rates"]
    assert set(rates["model"]) == {"model", "base"} and set(rates.loc[rates["model"] == "base", "n"]) == {2, 12}
    row = row_of(rates, {"model": "model", "mode": "direct", "temperature": 0.0, "measure": "chain", "task": "all"})
    assert row["n"] == 18 and row["mean"] == pytest.approx(trials["chain"].mean())
    assert len(result.tables["gains"]) == 14
    text = card.read_text()
    assert text.startswith("# Card") and text.endswith("after\n") and "old" not in text
    assert "\n| ontology-3 | " in text and f"Printed by `{result.command}`" in text
    assert "**base**, n = 2 of each task:\n\n| asked |" in text  # the table begins on a line of its own
    names = [f"part-model-{name}.parquet" for name in ("neutral", "neutral-sampled")]
    sampled = [pd.read_parquet(tmp_path / "run" / "trials" / name) for name in names]
    assert (sampled[0]["text"] != sampled[1]["text"]).any()


def test_a_model_that_is_no_adapter_is_asked_alone(adapter: Path, tmp_path: Path) -> None:
    result = reasoner.run(options(adapter.parent / "base", tmp_path / "run", base_items=2))
    assert set(result.tables["rates"]["model"]) == {"model"}


def test_cards_without_marks_are_refused(adapter: Path, tmp_path: Path, language_model: Callable[..., LanguageModel]):
    card = tmp_path / "README.md"
    for text in ("", reasoner.BEGIN, f"{reasoner.END} {reasoner.BEGIN}", f"{reasoner.BEGIN} {reasoner.END}" * 2):
        card.write_text(text)
        with pytest.raises(UserError, match="must have the marks"):
            options(adapter, tmp_path / "run", card=card).check_inputs()
    with pytest.raises(ValueError, match="no such file"):
        options(adapter, tmp_path / "run", card=tmp_path / "none.md").check_inputs()
    with pytest.raises(ValueError, match="items must be at least 2, got 1"):
        options(adapter, tmp_path / "run", items=1)
