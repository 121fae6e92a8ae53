"""From decoded text to a number, and from number to right or wrong.

The answer is the last number in the text, the rule of the published CODI evaluation. Text without a number has no
answer (None: wrong, and counted apart), where the published code takes infinity. Two readings differ from the published
pattern (`-?\\d+\\.?\\d*` after dropping every comma): a comma is dropped only where it separates thousands, and a minus
sign belongs to a number only where no digit, letter or bracket stands before it, so "10-7" ends in 7, not -7.

Source of the rule: extract_answer_number in test.py of github.com/zhenyi4/codi (Shen et al. 2025, arXiv 2502.21074).
"""

from __future__ import annotations

import math
import re

__all__ = ["extract_answer", "is_correct", "numbers_in", "parse_number"]

_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
TOLERANCE = 1e-9
"""Relative: for rounding in sums such as 0.1 + 0.2, not for answers that are nearly right."""


def numbers_in(text: str) -> list[float]:
    """Every number in the text, in order; thousands separators are understood, other commas separate numbers."""
    return [float(match.replace(",", "").replace("\u2212", "-")) for match in _NUMBER.findall(text)]


def extract_answer(text: str) -> float | None:
    """The last number in the text, or None where there is none (or where it is too large for a float)."""
    numbers = numbers_in(text)
    return numbers[-1] if numbers and math.isfinite(numbers[-1]) else None


def is_correct(text: str, answer: int | float) -> bool:
    """Whether the last number of the text is the answer; text without a number is wrong."""
    prediction = extract_answer(text)
    return prediction is not None and math.isclose(prediction, answer, rel_tol=TOLERANCE, abs_tol=1e-9)


def parse_number(value: object) -> int | float | None:
    """The number that a data-set field holds, whole numbers as int; None where the field is not one finite number.

    Unlike `extract_answer` the whole field must be the number: "18", "$1,200", 51.0, "12 %", but not "about 12 or 13".
    """
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        text = value.strip().strip("$%\u20ac\u00a3 ").replace(",", "").replace("\u2212", "-")
        if re.fullmatch(r"[-+]?\d+", text):
            return int(text)
        try:
            value = float(text)
        except ValueError:
            return None
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value
