"""codi cot: answers as the harness reads them, chains that are checked step by step, sets of questions side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.cot.answers import choice_problem, read
from experiments.cot.measures import MEASURES, TRIALS, measured, request, trial_rows
from experiments.tasks.choices import read_mmlu
from experiments.tasks.item_sets import family_of, load_sets, name_of
from experiments.tasks.item_sources import Sizes, item_of_choice
from experiments.tasks.items import Item
from experiments.tasks.letters import flexible_letter, flexible_number, is_right, is_right_number

DATA = Path(__file__).resolve().parent / "data"
SUM = Item(
    "sum", "arithmetic", "Ben keeps 6 hens. Then each hen brings 4 others. How many hens are there now?", "30",
    "number", chain=("6 * 4 = 24.", "6 + 24 = 30."),
)  # fmt: skip
TRUTH = Item(
    "truth", "ontology-1", "Gorps are fast. Sam is gorp. Tel is slow. True or false: Sam is fast.", "True", "word",
    ("True", "False"), chain=("Sam is gorp.", "Gorps are fast.", "Sam is fast."),
)  # fmt: skip
STORY = Item(
    "story", "babi-15", "Mice are afraid of cats. Cats are afraid of wolves. Emily is a mouse. Jo is a cat. "
    "What is emily afraid of?", "cat", "word", ("cat", "mouse", "wolf"),
    chain=("Emily is a mouse.", "Mice are afraid of cats.", "Emily is afraid of cats."),
)  # fmt: skip
COLOUR = Item(
    "colour", "babi-16", "Lily is a frog. Tom is a frog. Tom is green. What color is Lily?", "green", "word",
    chain=("Lily is a frog.", "Tom is a frog.", "Tom is green.", "Lily is green."),
)  # fmt: skip


@pytest.mark.parametrize(
    ("item", "text", "chain", "valid", "correct"),
    [
        (SUM, "30", False, 0, True),
        (SUM, "6 * 4 = 24. 6 + 24 = 30. 30", True, 2, True),
        (SUM, "6 hens * 4 others = 24 hens, so the answer is 31.", True, 1, False),
        (SUM, "6 * 4 = 25. The answer is 30.", False, 0, True),  # the step is wrong
        (SUM, "6 + 24 = 30", False, 0, True),  # the equation states the answer, nothing stands before it
        (SUM, "Let us think step by step. There are many hens, so 30.", False, 0, True),  # words are no steps
        (TRUTH, "True", False, 0, True),
        (TRUTH, "Sam is gorp. Gorps are fast. Sam is fast. True", True, 3, True),
        (TRUTH, "Sam is slow. False", False, 0, False),
        (TRUTH, "True. Sam is gorp. Gorps are fast.", False, 0, True),  # after the answer
        (TRUTH, "Sam is gorp. Gorps are fast.", False, 2, False),  # no answer, no chain
        (STORY, "cat", False, 0, True),
        (STORY, "Emily is afraid of cats.", False, 0, True),  # the answer in a sentence
        (STORY, "Emily is afraid of cats. cat", False, 1, True),  # the conclusion alone
        (STORY, "Emily is a mouse. Mice are afraid of cats. Emily is afraid of cats. cat", True, 3, True),
        (STORY, "Emily is a mouse. Emily is a mouse. Emily is a mouse. cat", True, 1, True),  # a fact counts once
        (STORY, "We know that Emily is a mouse, so it must be the wolves.", True, 1, False),
        (STORY, "Emily is a wolf. cat", False, 0, True),
        (STORY, " cat. Emily is a mouse. Mice are afraid of cats. wolf. wolf.", False, 0, True),  # answered at once
        (STORY, "mouse\nEmily is a mouse. Mice are afraid of cats. cat", False, 0, False),
        (STORY, "mice are afraid of cats. Emily is a mouse. cat", True, 2, True),  # a fact, no answer
        (SUM, " 31. 6 * 4 = 24, 6 + 24 = 30, 30", False, 0, True),
        (SUM, "6 * 4 = 24, 6 + 24 = 30. 30", True, 2, True),
        (SUM, "6.5 is no answer. 6 * 4 = 24. 30", True, 1, True),
        (COLOUR, "Lily is a frog. Tom is a frog. Tom is green. Lily is green. green", True, 4, True),
        (COLOUR, "blue", False, 0, False),
    ],
)  # fmt: skip
def test_chains_are_valid_steps_before_the_answer(
    item: Item, text: str, chain: bool, valid: int, correct: bool
) -> None:
    found = measured(item, text)
    assert (found["chain"], found["valid_steps"], found["correct"]) == (chain, valid, correct)


def test_degenerate_texts_are_seen() -> None:
    loop, plain = "the hen is a hen and so " * 12 + "30", "6 * 4 = 24. 6 + 24 = 30. 30"
    assert measured(SUM, loop)["repetition"] > 0.8 and measured(SUM, loop)["compression"] < 0.3
    assert measured(SUM, plain)["repetition"] == 0 and measured(SUM, plain)["compression"] > 0.7
    empty = measured(SUM, "")
    assert not empty["parsed"] and not empty["chain"] and empty["words"] == 0 and empty["prediction"] == ""


TEXTS = (
    "", "B", "(B)", "The answer is (C).", "So it is Pumice, when dry", "(A) no, rather (B)", "Answer: D",
    "I do not know", "12", "$1,200.50", "so 7. And then 1,000.", "the answer is 18.0", "-3", "...",
)  # fmt: skip


def test_the_same_answers_as_the_harness_on_the_same_texts() -> None:
    """Letters and numbers go through the functions of letters.py that follow its tasks, word for word."""
    problem = read_mmlu(DATA / "geology_dev.csv")[0]
    item = item_of_choice(problem, "mmlu")
    assert (item.texts, item.answer) == (problem.choices, problem.label)
    assert choice_problem(item).choices == problem.choices
    number = Item("n", "gsm8k", "How many?", "1000", "number")
    seen = set()
    for text in TEXTS:
        letter = flexible_letter(text, problem)
        assert (read(item, text).prediction, read(item, text).correct) == (letter, is_right(letter, problem)), text
        found = flexible_number(text)
        assert (read(number, text).prediction, read(number, text).correct) == (found, is_right_number(found, "1000"))
        seen |= {letter, found}
    assert {None, "B", "C", "12"} <= seen  # the texts tell something apart
    several = replace(item, answer="A", accepted=("B",))
    assert read(several, "(B)").correct and read(several, "(A)").correct and not read(several, "(C)").correct
    bare = replace(item, texts=())
    assert read(bare, "The answer is B, I think").prediction == "B" and read(bare, "A dog").prediction is None


def test_free_answers_are_whole_texts() -> None:
    free = Item("f", "bigbench", "A colour?", "blue", accepted=("grey",))
    assert read(free, "blue.").correct and read(free, "grey").correct
    assert not read(free, "It is blue").correct and not read(free, "").parsed


def test_requests_and_rows() -> None:
    assert request(SUM, "") == SUM.question and request(SUM, " Steps. ") == SUM.question + " Steps."
    assert request(replace(SUM, question="a\n(A) b"), "Steps.") == "a\n(A) b\nSteps."
    condition = {"prompt": "neutral", "way": "", "vector": "", "layer": -1, "coefficient": 0.0, "draw": -1}
    table = trial_rows([SUM, STORY], ["30", "cat"], [1, 1], [True, False], [condition] * 2)
    assert list(table.columns) == TRIALS.names and set(MEASURES) <= set(table.columns)
    assert table["family"].tolist() == ["arithmetic", "babi"] and table["finished"].tolist() == [True, False]


# --- Sets -------------------------------------------------------------------------------------------------------------

SETS = ("ontology-1", "babi-15", "arithmetic")


def test_parts_of_several_sets_share_nothing() -> None:
    found = load_sets(SETS, SETS, (*SETS, f"mmlu:{DATA / 'geology_test.csv'}"), Sizes(4, 3, 5))
    assert {item.task for item in found.derivation} == set(SETS) and len(found.derivation) == 12
    assert len(found.validation) == 9 and len(found.test) == 17  # the file has two questions
    traits = [
        {item.question for item in part} | {f"cluster {item.cluster}" for item in part if item.cluster}
        for part in found.parts.values()
    ]
    assert not traits[0] & traits[1] and not traits[0] & traits[2] and not traits[1] & traits[2]
    assert len({item.prompt_id for item in found.test}) == 17
    assert all(item.cluster.startswith(f"{item.task}/") for item in found.test)  # no cluster reaches over sets
    again = load_sets(SETS, SETS, (*SETS, f"mmlu:{DATA / 'geology_test.csv'}"), Sizes(4, 3, 5))
    assert again == found and load_sets(SETS, (), SETS, Sizes(4, 0, 5), seed=1).test != found.test


def test_names_and_families_of_sets() -> None:
    assert [family_of(name) for name in ("ontology-3", "babi-15", "arithmetic", "gsm8k")] == [
        "ontology", "babi", "arithmetic", "gsm8k"
    ]  # fmt: skip
    assert name_of("babi-15:unseen") == "babi-15" and name_of("openai/gsm8k") == "gsm8k"
    assert name_of("agieval:hails/agieval-sat-math") == "agieval-sat-math" and name_of("mmlu:cais/mmlu") == "mmlu"
    assert name_of("bigbench:bench/strange_stories/task.json") == "bigbench-strange_stories"


def test_a_set_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="two sets for test are called 'babi-15'"):
        load_sets((), (), ("babi-15", "babi-15:unseen"), Sizes(0, 0, 2))
