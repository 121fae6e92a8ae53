"""From text to number to right or wrong (experiments/tasks/answers.py)."""

from __future__ import annotations

import math
import re

import pytest

from experiments.tasks.answers import extract_answer, is_correct, numbers_in, parse_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", 18),
        (" 18\n", 18),
        ("The answer is: 18.", 18),
        ("<<16-3-4=9>><<9*2=18>>18", 18),
        ("<<3-10=-7>>-7", -7),
        ("-7", -7),
        ("= -7", -7),
        ("\u22127", -7),
        ("10-7", 7),  # the published pattern reads -7
        ("$1,234,567.50", 1234567.5),
        ("first 3, then 5", 5),
        ("3,5", 5),  # the published pattern reads 35
        ("12,34", 34),
        ("x=.5", 0.5),
        ("-.5", -0.5),
        ("3.", 3),
        ("12%", 12),
        ("007", 7),
    ],
)
def test_the_last_number_is_the_answer(text: str, expected: float) -> None:
    assert extract_answer(text) == expected
    assert is_correct(text, expected)
    assert not is_correct(text, expected + 1)


@pytest.mark.parametrize("text", ["", "   ", "no idea", "-", ".", "twelve", "9" * 400])
def test_text_without_a_number_has_no_answer_and_is_wrong(text: str) -> None:
    assert extract_answer(text) is None
    assert not is_correct(text, 0)


def test_agrees_with_the_published_rule_where_it_is_meant_to() -> None:
    """Independent oracle: the published pattern, on texts without lists or unspaced subtractions."""
    texts = ["The answer is: 42", "42", "-3.5", "<<7+5=12>> <<12*2=24>> #### 24", "it is 1,200 dollars", "about 7 or 8"]
    for text in texts:
        published = float(re.findall(r"-?\d+\.?\d*", text.replace(",", ""))[-1])
        assert extract_answer(text) == published


def test_numbers_in_order() -> None:
    assert numbers_in("16 eggs, 3 eaten, $2.50 each, 1,000 left") == [16, 3, 2.5, 1000]
    assert numbers_in("16-3-4=9") == [16, 3, 4, 9]


def test_tolerance_is_for_decimal_text_only() -> None:
    assert is_correct("0.3", 0.1 + 0.2)
    assert is_correct("13.6", 13.6)
    assert not is_correct("13.6001", 13.6)
    assert not is_correct("999999", 1000000)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("18", 18), (" 2,125", 2125), ("$1,200", 1200), (51.0, 51), ("51.0", 51), (13.6, 13.6), ("25%", 25), (-3, -3)],
)
def test_a_field_that_is_a_number(value: object, expected: float) -> None:
    parsed = parse_number(value)
    assert parsed == expected
    assert isinstance(parsed, int) == float(expected).is_integer()


@pytest.mark.parametrize("value", [None, "", "about 12", "12 or 13", True, math.nan, math.inf, "nan", [3], "3-4"])
def test_a_field_that_is_not_one_number(value: object) -> None:
    assert parse_number(value) is None
