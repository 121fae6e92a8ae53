"""The number grammar (experiments/tasks/numbers.py): a table of strings, and properties of what it reads.

Every row of the table is read twice, as the text of a model and as a data-set field: the two never give two numbers.
"""

from __future__ import annotations

import math
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks.answers import extract_answer, field_number, is_correct, parse_number
from experiments.tasks.numbers import MAX_DIGITS, OutOfRange, answer_in, find_numbers, read_number, shown

SAME = object()
HALF = Fraction(1, 2)

# text, the number that a model gives with it (None: no number), the number as a field (None: refused; SAME: the same)
TABLE: list[tuple[str, Fraction | int | float | None, object]] = [
    # plain numbers
    ("18", 18, SAME),
    (" 18\n", 18, SAME),
    ("-18", -18, SAME),
    ("+18", 18, SAME),
    ("007", 7, SAME),
    ("18.", 18, SAME),
    ("18.50", Fraction(37, 2), SAME),
    (".5", HALF, SAME),
    ("-.5", -HALF, SAME),
    ("-0", 0, SAME),
    ("The answer is: 18.", 18, None),
    ("<<7+5=12>>12", 12, None),
    ("x=.5", HALF, None),
    ("...5", 5, None),
    ("12:30", 30, None),
    ("**12**", 12, SAME),
    ("__12__", 12, None),
    ("\\n5", 5, None),
    ("\u7b54\u6848\u662f18\u3002", 18, None),  # ideographs stand directly before numbers
    ("\u7b54\u6848\u662f-18", -18, None),
    ("", None, None),
    ("twelve", None, None),
    ("-", None, None),
    # thousands, in groups of three
    ("1,234", 1234, SAME),
    ("1,234,567.50", Fraction(2469135, 2), SAME),
    ("1{,}234", 1234, SAME),
    ("1\\,234", 1234, SAME),
    ("1,\\!234", 1234, SAME),
    ("1\u00a0234", 1234, SAME),
    ("1\u202f234\u202f567", 1234567, SAME),
    ("1\u2009234", 1234, SAME),
    ("1'234'567", 1234567, SAME),
    ("1\u2019234", 1234, SAME),
    ("1_000", 1000, SAME),
    ("1,2000", 2000, None),
    ("1,234,56", 56, None),
    ("1234,567", 567, None),
    ("1 234", 234, None),  # a blank may as well stand between two numbers
    ("1,234'567", 567, None),
    # decimal commas: refused in a field, two numbers in a text
    ("3,5", 5, None),
    ("12,34", 34, None),
    ("0,500", 500, None),
    ("1.234,56", 56, None),
    ("1.234.567", 567, None),
    # exponents and powers
    ("1e3", 1000, SAME),
    ("1.5E+3", 1500, SAME),
    ("2e-2", Fraction(1, 50), SAME),
    ("2e\u22122", Fraction(1, 50), SAME),
    ("1.5\u00d710^3", 1500, SAME),
    ("1 \\times 10^{3}", 1000, SAME),
    ("2*10^5", 200000, SAME),
    ("2^{10}", 1024, SAME),
    ("10^-2", Fraction(1, 100), SAME),
    ("10\u2075", 100000, SAME),
    ("10\u207b\u00b2", Fraction(1, 100), SAME),
    ("1e3x", 1, None),
    ("1e999999999", None, None),
    # currency before and after the sign
    ("$5", 5, SAME),
    ("-$5", -5, SAME),
    ("$-5", -5, SAME),
    ("($5)", -5, SAME),
    ("-($5)", -5, SAME),
    ("Balance: ($5)", -5, None),
    ("five dollars ($5)", 5, None),
    ("-\u20ac5", -5, SAME),
    ("\u20ac-5", -5, SAME),
    ("5 \u20ac", 5, SAME),
    ("\\$5", 5, SAME),
    ("$-5$", -5, SAME),
    ("US$1,200", 1200, SAME),
    ("USD5", 5, SAME),
    ("5 USD", 5, SAME),
    ("Rs. 500", 500, SAME),
    ("Rs.500", 500, SAME),
    # minus and other dashes
    ("\u22125", -5, SAME),
    ("\u20135", -5, SAME),
    ("\u20105", -5, SAME),
    ("\u20115", -5, SAME),
    ("\ufe635", -5, SAME),
    ("\uff0d5", -5, SAME),
    ("= -7", -7, None),
    ("(-7)", -7, None),
    ("10-7", 7, None),
    ("10\u22127", 7, None),
    ("3\u20135", 5, None),
    ("3 \u20135", 5, None),
    ("pages 3\u20115", 5, None),
    ("3 \u2013 5", 5, None),
    ("x-5", 5, None),
    # percent
    ("50%", 50, SAME),
    ("50 %", 50, SAME),
    ("50\\%", 50, SAME),
    ("%5", 5, SAME),
    # fractions are one number
    ("1/2", HALF, SAME),
    ("-1/2", -HALF, SAME),
    ("2 1/2", Fraction(5, 2), SAME),
    ("-2 1/2", Fraction(-5, 2), SAME),
    ("10/4", Fraction(5, 2), SAME),
    ("\u00bd", HALF, SAME),
    ("2\u00bd", Fraction(5, 2), SAME),
    ("1\u20442", HALF, SAME),
    ("\\frac{1}{2}", HALF, SAME),
    ("\\dfrac{3}{4}", Fraction(3, 4), SAME),
    ("\\frac12", HALF, SAME),
    ("-\\frac{1}{2}", -HALF, SAME),
    ("\\frac{-1}{2}", -HALF, SAME),
    ("2\\frac{1}{2}", Fraction(5, 2), SAME),
    ("\\frac{1{,}000}{3}", Fraction(1000, 3), SAME),
    ("1/2/2020", 2020, None),  # a date
    ("24/7/365", 365, None),
    ("1/0", 0, None),
    ("2 10/5", 2, None),
    ("6/2=3", 3, None),
    # boxes and ####
    ("\\boxed{12} because 7 and 5", 12, SAME),
    ("7+5 = \\boxed{12}.", 12, SAME),
    ("so $-\\boxed{5}$", -5, SAME),
    ("\\boxed{-5 \\text{ cm}}", -5, SAME),
    ("10-\\boxed{5}", 5, SAME),
    ("3 #### \\boxed{\\$5}", 5, SAME),
    ("\\boxed{12}", 12, SAME),
    ("$\\boxed{\\frac{1}{2}}$", HALF, SAME),
    ("\\boxed{x=3} of 4", 3, None),
    ("\\boxed{none} 3", 3, None),
    ("\\boxed{3", 3, SAME),
    ("#### 12 (7 and 5)", 12, None),
    ("7+5=12\n#### 12", 12, SAME),
    ("#### -$3", -3, SAME),
    ("#### \u20135", -5, SAME),
    ("#### Step 2 gives 7", 7, None),
    # units
    ("5 m^2", 5, SAME),
    ("5 m\u00b2", 5, SAME),
    ("5 m2", 5, SAME),
    ("12 H2O", 12, SAME),
    ("12 km2", 12, SAME),
    ("km2", None, None),
    ("CO2", None, None),
    ("x_1 = 5", 5, None),
    ("x_{12}", None, None),
    ("9 s^{-1}", 9, None),
    ("v2.5", None, None),
    ("12 pens", 12, SAME),
    ("5 square meters", 5, SAME),
    ("5km/h", 5, SAME),
    ("12 \u00b0C", 12, SAME),
    ("12\\text{ cm}", 12, SAME),
    ("3x4=12", 12, None),
    ("3 million", 3, None),
    ("12 dozen", 12, None),
    ("12k", 12, None),
    ("12 or 13", 13, None),
]


def test_the_table_is_long_enough() -> None:
    assert len({text for text, _, _ in TABLE}) == len(TABLE) >= 80


@pytest.mark.parametrize(("text", "number", "field"), TABLE, ids=[ascii(text) for text, _, _ in TABLE])
def test_what_a_string_says(text: str, number: Fraction | None, field: object) -> None:
    found = answer_in(text)
    assert (found.value if found else None) == number
    assert extract_answer(text) == (None if number is None else float(number))
    if field is SAME:
        assert number is not None and read_number(text) == number
        assert parse_number(text) == (int(number) if Fraction(number).denominator == 1 else float(number))
    else:
        with pytest.raises(ValueError) as caught:
            read_number(text)
        assert "\n" not in str(caught.value)
        assert parse_number(text) is None


def test_decimal_commas_are_hinted_at_and_an_option() -> None:
    for text, point in (("3,5", "3.5"), ("1.234,56", "1234.56"), ("0,500", "0.500"), ("$3,5", "3.5")):
        with pytest.raises(ValueError, match=f"write {point}, or say that commas are decimal"):
            read_number(text)
        assert read_number(text, decimal_comma=True) == Fraction(Decimal(point))
        assert extract_answer(f"also 1, then {text}.", decimal_comma=True) == float(point)
    assert read_number("1.234.567", decimal_comma=True) == 1234567
    assert is_correct("3,5", 3.5, decimal_comma=True) and not is_correct("3,5", 3.5)
    for field in ("3.5", "0.125", "1234.567", ".5", "$3.5"):
        with pytest.raises(ValueError, match="has a decimal point where commas are decimal"):
            read_number(field, decimal_comma=True)


def test_a_model_may_write_points_where_the_file_has_commas() -> None:
    """A point that cannot separate thousands is decimal: never the digits behind it alone."""
    for text, value in (
        ("3.5", 3.5), ("so 12.50 $", 12.5), ("0.125", 0.125), ("1234.567", 1234.567), (".5", 0.5), ("1.2345", 1.2345),
        ("1.234", 1234), ("1.234.567,25", 1234567.25), ("12.", 12), ("-3.5e2", -350), ("Rs.5", 5), ("3.5/2", 1.75),
    ):  # fmt: skip
        assert extract_answer(text, decimal_comma=True) == value, text
    assert extract_answer("1,234.5") == 1234.5


def test_numbers_too_large_are_neither_crashes_nor_wrong() -> None:
    for digits in (400, 5000):
        text = "9" * digits
        whole = int(Decimal(text))
        assert answer_in(text).value == whole and extract_answer(text) is None
        assert is_correct(text, whole) and not is_correct(text, whole - 1) and not is_correct("5", whole)
        assert not is_correct("5", whole, "published") and not is_correct(text, 5, "published")
        with pytest.raises(OutOfRange, match="too large"):
            field_number(text)
        with pytest.raises(OutOfRange, match="too large"):
            field_number(whole)
    assert answer_in("9" * (MAX_DIGITS + 1)).value is None
    for text in ("1e400", "1e99999", "-1e400", Decimal("1e999999999"), "2^9999", "1e-400"):
        with pytest.raises(OutOfRange):
            field_number(text)
    for value in (math.nan, math.inf, Decimal("NaN")):
        with pytest.raises(ValueError, match="not finite"):
            field_number(value)
    assert not is_correct("5", math.inf) and not is_correct("5", math.nan)


def test_whole_numbers_are_compared_exactly() -> None:
    assert not is_correct("10000000001", 10000000000)
    assert is_correct("10,000,000,000", 10000000000)
    assert is_correct("10000000001", 10000000000, "published")  # to nine figures, as the published code's floats
    assert is_correct("12345678901234567890", 12345678901234567890)
    assert is_correct("1/3", 1 / 3) and is_correct("0.3", 0.1 + 0.2) and not is_correct("0.33", 1 / 3)


def test_the_published_rule_is_named() -> None:
    for text, published, grammar in (
        ("#### 12 (7 and 5)", 5, 12),
        ("1/2", 2, 0.5),
        ("5 m^2", 2, 5),
        ("\u20135", 5, -5),
        ("1e3", 3, 1000),
    ):
        assert extract_answer(text, "published") == published
        assert extract_answer(text, "common") == extract_answer(text) == grammar
    with pytest.raises(ValueError, match="rule must be one of common, published, got 'last'"):
        extract_answer("1", "last")  # type: ignore[arg-type]


def test_places_and_messages() -> None:
    text = "pay -$5 of 1,200 now"
    assert [text[number.start : number.end] for number in find_numbers(text)] == ["-$5", "1,200"]
    assert shown("a\nb") == "'a\\nb'" and shown("\ud83c") == "'\\ud83c'"
    assert shown("x" * 99) == repr("x" * 40 + "\u2026") and shown(10**5000).startswith("1000")
    assert shown(True) == "True"


@pytest.mark.parametrize(
    "piece",
    [
        "1,",
        "1/",
        "1 ",
        "1.",
        "(",
        "$",
        "-",
        "1-",
        "\\frac{",
        "\\boxed{",
        "#### ",
        "#### x 5 ",
        "1e",
        "2^",
        "km2",
        "1,234,",
        "x_{",
    ],
)
def test_long_texts_take_no_square_of_time(piece: str) -> None:
    start = time.perf_counter()
    answer_in(piece * 20_000), parse_number(piece * 20_000)
    assert time.perf_counter() - start < 10  # a second or less; a square of 20,000 takes minutes


# --- Properties ---

steady = settings(derandomize=True, database=None, deadline=None, max_examples=150)

WHOLE = st.integers(-(10**20), 10**20)
SEPARATORS = (",", "{,}", "\\,", ",\\!", "\u00a0", "\u202f", "\u2009", "'", "\u2019", "_")
MINUS = "-\u2212\u2013\u2010\u2011\ufe63\uff0d"


@st.composite
def written(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number written in one of many styles, and its value."""
    value = Fraction(draw(WHOLE))
    text = str(abs(int(value)))
    if draw(st.booleans()):
        text = f"{abs(int(value)):,}".replace(",", draw(st.sampled_from(SEPARATORS)))
    style = draw(st.sampled_from(("whole", "decimal", "exponent", "fraction", "mixed", "command")))
    sign = 1 if value >= 0 else -1
    if style == "decimal":
        decimals = draw(st.text("0123456789", min_size=1, max_size=6))
        text += "." + decimals
        value += sign * Fraction(int(decimals), 10 ** len(decimals))
    elif style == "exponent":
        exponent = draw(st.integers(-9, 9))
        text += f"{draw(st.sampled_from('eE'))}{exponent}"
        value *= Fraction(10) ** exponent
    elif style in ("fraction", "command"):
        below = draw(st.integers(1, 999))
        text = f"{text}/{below}" if style == "fraction" else rf"\frac{{{text}}}{{{below}}}"
        value /= below
    elif style == "mixed":
        below = draw(st.integers(2, 99))
        above = draw(st.integers(1, below - 1))
        text += f" {above}/{below}"
        value += sign * Fraction(above, below)
    minus = draw(st.sampled_from(MINUS)) if value < 0 else ""
    money = draw(st.sampled_from(("", "", "$", "\u20ac", "\\$")))
    text = money + minus + text if draw(st.booleans()) else minus + money + text
    return text + draw(st.sampled_from(("", "", "%", ".", " pens", " m^2"))), value


@steady
@given(written())
def test_a_number_in_many_styles_reads_back(case: tuple[str, Fraction]) -> None:
    text, value = case
    assert read_number(text) == value
    for around in ("{}", "The answer is {}", "so 7+5, that is: {}", "9 #### {}", "\\boxed{{{}}} not 3", "1\n{}\n"):
        found = answer_in(around.format(text))
        assert found is not None and found.value == value, around


@steady
@given(
    st.text(max_size=40) | st.text("0123456789.,-/\\{}^_$%()e #'\u00a0\u2013\u00bd\u00b2x", max_size=25), st.booleans()
)
def test_any_text_is_read_or_refused(text: str, decimal_comma: bool) -> None:
    numbers = find_numbers(text, decimal_comma)
    ends = [place for number in numbers for place in (number.start, number.end)]
    assert ends == sorted(ends) and all(0 <= place <= len(text) for place in ends)
    assert all(number.start < number.end for number in numbers)
    found = answer_in(text, decimal_comma)
    assert found in numbers if numbers else found is None
    extract_answer(text), extract_answer(text, "published")
    try:
        field = read_number(text, decimal_comma)
    except ValueError as error:
        assert "\n" not in str(error)
    else:  # a field and a text never give two numbers
        assert found is not None and found.value == field
        assert is_correct(text, int(field) if field.denominator == 1 else float(field), decimal_comma=decimal_comma)


@steady
@given(st.text("0123456789<>=+-* ", max_size=60))
def test_the_rules_agree_on_what_the_shipped_model_writes(text: str) -> None:
    assert extract_answer(text) == extract_answer(text, "published")


@steady
@given(WHOLE, WHOLE)
def test_one_whole_number_is_right_for_itself_only(number: int, other: int) -> None:
    assert is_correct(str(number), number)
    assert is_correct(f"The answer is: {number:,}", number)
    assert is_correct(str(number), other) == (number == other)
