"""What a text answers, by the kind of the item; repetition against numbers counted by hand."""

from __future__ import annotations

import pytest

from experiments.tasks.answers import COMMON, Reading
from experiments.tasks.item_answers import read_answer, repetition
from experiments.tasks.items import Item, ItemSplits

WORD = Item("a", "t", "q", "Mary", "word", ("Mary", "Tom"))
NUMBER = Item("b", "t", "q", "18", "number")
LETTER = Item("c", "t", "q", "B", "letter", ("A", "B", "C"))


@pytest.mark.parametrize("text", [" Mary", "Mary.", '"Mary" is', " **Mary**, who", "mary", "\n (Mary)", "Mary's"])
def test_words_that_are_right(text: str) -> None:
    assert read_answer(WORD, text).correct


@pytest.mark.parametrize(
    ("text", "prediction"), [("Tom.", "Tom"), ("to Mary", "to"), ("Maryland", "Maryland"), ("Mar", "Mar"), (" ", "")]
)
def test_words_that_are_wrong(text: str, prediction: str) -> None:
    found = read_answer(WORD, text)
    assert (found.correct, found.prediction, found.parsed) == (False, prediction, bool(prediction))


def test_an_answer_of_two_words() -> None:
    item = Item("d", "t", "q", "New York")
    assert read_answer(item, "New York, of course").correct
    assert read_answer(item, "New Jersey, of course").prediction == "New Jersey"


def test_numbers() -> None:
    assert read_answer(NUMBER, "9 + 9 = 18").correct and read_answer(NUMBER, "The answer is 18.0").correct
    found = read_answer(NUMBER, "The answer is 17.")
    assert (found.correct, found.prediction) == (False, "17")
    assert not read_answer(NUMBER, "none").parsed
    with pytest.raises(ValueError, match="is no number"):
        read_answer(Item("e", "t", "q", "many", "number"), "1")


@pytest.mark.parametrize("text", ["B", "B.", "(B) because", " B) x", "It is (A)? No, (B)", "the answer is B"])
def test_letters_that_are_right(text: str) -> None:
    assert read_answer(LETTER, text).correct


def test_letters_that_are_wrong() -> None:
    assert read_answer(LETTER, "A, not B").prediction == "A"
    for text in ("Because", "D", "none of them"):
        assert not read_answer(LETTER, text).parsed


def test_repetition() -> None:
    assert repetition([1, 2, 1, 2, 1]) == 1 - 2 / 4
    assert repetition([1, 2, 3, 4]) == 0 and repetition([7]) == 0 and repetition([]) == 0
    assert repetition([5, 5, 5, 5], 1) == 0.75
    with pytest.raises(ValueError, match="size must be 1"):
        repetition([1], 0)


def test_numbers_by_the_rule_that_the_items_came_with() -> None:
    splits = ItemSplits(test=(NUMBER,), derivation=(Item("c", "t", "another", "18", "number"),))
    assert splits.read_by(COMMON) is splits
    (published,) = splits.read_by(Reading("published")).test
    text = "#### 18 (and not 5)"
    assert read_answer(NUMBER, text).correct and not read_answer(published, text).correct
    assert read_answer(published, text).prediction == "5"
    assert splits.read_by(Reading("published")).record() == splits.record()  # the rule is no part of the items
