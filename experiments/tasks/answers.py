"""From decoded text to a number, and from number to right or wrong, under one of two rules.

"common", the default: the number that experiments/tasks/numbers.py finds to be the answer, as in data-set fields.
"published": the last number in the text, as the published CODI evaluation has it, but for two readings that differ from
the published pattern (`-?\\d+\\.?\\d*` after dropping every comma): a comma is dropped only where it separates
thousands, and a minus sign belongs to a number only where no digit, letter or bracket stands before it, so "10-7" ends
in 7, not -7.

Under both, text without a number has no answer (None: wrong, and counted apart), where the published code takes
infinity. The numbers of a question are those of the published pattern, so that clusters and splits stay what they were.

Source of the published rule: extract_answer_number in test.py of github.com/zhenyi4/codi (Shen et al. 2025, arXiv
2502.21074).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from typing import get_args

from experiments.tasks.numbers import OutOfRange, answer_in, as_number, read_number
from lm.terms import AnswerRule

__all__ = [
    "COMMON", "Reading", "extract_answer", "field_number", "is_correct", "numbers_in", "parse_number",
    "written_numbers",
]  # fmt: skip

_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
TOLERANCE = 1e-9
"""Relative: for rounding in sums such as 0.1 + 0.2, not for answers that are nearly right."""


@dataclass(frozen=True)
class Reading:
    """How the answer to a problem is read from a text; the two are given together wherever answers are judged.

    Attributes:
        rule: see this module.
        decimal_comma: of "common": "3,5" is 3.5, and "1.234" is 1234.
    """

    rule: AnswerRule = "common"
    decimal_comma: bool = False

    def number(self, text: str) -> float | None:
        """`extract_answer` by this reading."""
        return extract_answer(text, self.rule, self.decimal_comma)

    def agrees(self, text: str, answer: int | float) -> bool:
        """`is_correct` by this reading."""
        return is_correct(text, answer, self.rule, self.decimal_comma)

    def record(self) -> dict[str, str | bool]:
        """For a manifest: only what is not the default."""
        found: dict[str, str | bool] = {} if self.rule == "common" else {"answers": self.rule}
        return found | ({"decimal_comma": True} if self.decimal_comma else {})


COMMON = Reading()
"""The default."""


def written_numbers(text: str) -> list[str]:
    """Every number in the text by the published pattern, in order, as `float` reads it ("1,200" gives "1200")."""
    return [match.replace(",", "").replace("\u2212", "-") for match in _NUMBER.findall(text)]


def numbers_in(text: str) -> list[float]:
    """Values of `written_numbers`; infinite where a number is too large for a float."""
    return [float(number) for number in written_numbers(text)]


def extract_answer(text: str, rule: AnswerRule = "common", decimal_comma: bool = False) -> float | None:
    """The number that the text gives as its answer.

    Args:
        text: decoded answer.
        rule: see this module.
        decimal_comma: of "common": read "3,5" as 3.5.

    Returns:
        The answer, or None where there is no number (or where it is too large for a float).

    Raises:
        ValueError: unknown rule.
    """
    if _checked(rule) == "published":
        number = next(reversed(numbers_in(text)), None)
        return number if number is not None and math.isfinite(number) else None
    found = answer_in(text, decimal_comma)
    if found is None or found.value is None:
        return None
    try:
        return float(found.value)
    except OverflowError:
        return None


def is_correct(text: str, answer: int | float, rule: AnswerRule = "common", decimal_comma: bool = False) -> bool:
    """Whether the text gives the answer; text without a number is wrong.

    Whole numbers are compared exactly, whatever their size; others to TOLERANCE. The published rule compares floats.
    """
    if isinstance(answer, float) and not math.isfinite(answer):
        return False
    if _checked(rule) == "published":
        prediction = extract_answer(text, rule)
        try:
            return prediction is not None and math.isclose(prediction, answer, rel_tol=TOLERANCE, abs_tol=1e-9)
        except OverflowError:  # an answer that no float holds
            return False
    found = answer_in(text, decimal_comma)
    if found is None or found.value is None:
        return False
    whole = isinstance(answer, Integral)
    wanted = Fraction(int(answer) if whole else answer)
    if whole and found.value.denominator == 1:
        return found.value == wanted
    bound = max(Fraction(TOLERANCE) * max(abs(found.value), abs(wanted)), Fraction(TOLERANCE))
    return abs(found.value - wanted) <= bound


def parse_number(value: object, decimal_comma: bool = False) -> int | float | None:
    """The number that a data-set field holds, whole numbers as int; None where the field is not one finite number.

    Unlike `extract_answer` the whole field must be the number: "18", "$1,200", 51.0, "12 %", "1/2", but not "about 12"
    or "12 or 13". `experiments.tasks.numbers.read_number` says what is wrong with a field.
    """
    try:
        return field_number(value, decimal_comma)
    except ValueError:
        return None


def field_number(value: object, decimal_comma: bool = False) -> int | float:
    """As `parse_number`, for a reader that has to say what is wrong.

    Raises:
        ValueError: not one finite number; the message says why, and leaves file, record and field to the caller.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise ValueError(f"it must be a number, got {type(value).__name__}")
    if isinstance(value, str):
        return as_number(read_number(value, decimal_comma))
    if isinstance(value, int):
        return as_number(Fraction(value))
    if not (math.isfinite(value) if isinstance(value, float) else value.is_finite()):
        raise ValueError("the number is not finite")
    if isinstance(value, Decimal) and value and abs(value.adjusted()) > 400:
        raise OutOfRange("the number is too large or too small: no float is near it")
    return as_number(Fraction(value))


def _checked(rule: AnswerRule) -> AnswerRule:
    if rule not in get_args(AnswerRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(AnswerRule))}, got {rule!r}")
    return rule
