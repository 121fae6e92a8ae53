r"""The number grammar: what counts as a number in a data-set field and in the text of a model, one for both.

    written as                                  read as
    1,234.5  1{,}234.5  1\,234.5  1'234.5       1234.5: groups of three (also U+00A0, U+202F, U+2009, _)
    1.5e3  1.5 \times 10^{3}  2^{10}  10⁵       1500, 1500, 1024, 100000
    -5  −5  –5  ($5)  -$5  $-5  €-5             -5: the minus in its Unicode forms, where it is a sign and not a range
    1/2  2 1/2  ½  2½  \frac{1}{2}  2\frac12    0.5, 2.5: one number
    12%  12 pens  5 m^2  12 H2O                 12, 12, 5, 12: signs and units are left out, and so are their digits
    3,5                                         two numbers in a text, refused in a field; 3.5 with `decimal_comma`
    3.5  1.234                                  with `decimal_comma` in a text 3.5 (its point groups nothing), 1234

The answer in a text is the last number, unless a \boxed{…} or a "#### n" says which one it is. A field holds one number
with nothing around it but a currency, a percent sign or one unit.

Values are exact fractions. A number that cannot be held in MAX_DIGITS digits has no value (None).
Knows nothing about problems or records. The published rule is another one: see experiments/tasks/answers.py.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

__all__ = ["MAX_DIGITS", "Number", "OutOfRange", "answer_in", "as_number", "find_numbers", "read_number", "shown"]

MAX_DIGITS = 10_000
"""Longer numbers, and powers of ten beyond it, have no value."""

_MARKERS = 100  # of a text, the last ones are looked at: more of them are noise, and would take their square in time

_MINUS = "-\u2212\u2013\u2010\u2011\ufe63\uff0d"
_DASHES = "\u2013\u2010\u2011"  # also stand between the ends of a range
_SLASHES = ("/", "\u2044")
_LETTER = "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u052f\u2126\u212b"  # no ideographs
_VULGAR = "\u00bc-\u00be\u2150-\u215e\u2189"
_ASCII = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b" + _MINUS, "0123456789-" + "-" * len(_MINUS)
)
_CODES = "USD|EUR|GBP|INR|JPY|CNY|CHF|CAD|AUD|NZD|KRW|BRL|MXN|SEK|NOK|DKK|PLN|Rs"
_SIGN_OF_CURRENCY = (
    r"(?:US|AU|CA|NZ|HK|[ACRS]|\\)?\$|[\u00a2\u00a3\u00a5\u20a6\u20a9\u20aa\u20ab\u20ac\u20b1\u20b4\u20b9\u20ba\u20bd]"
)
_EXPONENT = rf"[{_MINUS}+]?\d+"
_POWER_OF = rf"\s?\^\s?(?:\{{\s*(?P<braced>{_EXPONENT})\s*\}}|(?P<bare>{_EXPONENT}))"
_RAISED = "(?P<raised>\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)"

_CURRENCY_BEFORE = re.compile(rf"(?:{_SIGN_OF_CURRENCY}|(?<![{_LETTER}])(?:{_CODES})\.?)\s?$")
_SCIENTIFIC = re.compile(rf"[eE](?P<e>{_EXPONENT})(?!\w)")
_TIMES_TEN = re.compile(rf"\s?(?:[\u00d7x*\u00b7]|\\times|\\cdot)\s?10\s?(?:{_POWER_OF}|{_RAISED})")
_POWER = re.compile(rf"{_POWER_OF}|{_RAISED}")
_FRACTION_COMMAND = re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*")
_COMMAND_OR_OPERATOR = re.compile(rf"(?:\\[A-Za-z]+|(?<=[\d)])[xX]|(?<![{_LETTER}])(?:{_CODES}))$")
_INDEX_OR_EXPONENT = re.compile(rf"(?:\^\{{?\s?[{_MINUS}+]?|(?:[^\W_]|[)}}])_\{{?)$")
_ONE_LETTER = re.compile(f"[{_LETTER}]")
_ONE_VULGAR = re.compile(f"[{_VULGAR}]")
_OPENING, _CLOSING = re.compile(rf"\s*\{{\s*(?P<sign>[{_MINUS}+]?)"), re.compile(r"\s*\}")
_BRACE = re.compile(r"[{}]")
_BOX = re.compile(r"\\f?boxed\s*\{")
_MARKER = re.compile(rf"{_BOX.pattern}|(?<!#)####(?!#)")

_L = r"[^\W\d_]"
_ONE_UNIT = rf"{_L}+(?:\^?[{_MINUS}]?\d|[\u00b2\u00b3])?"
_UNIT = re.compile(
    rf"\s*\\?%|\s*(?:{_SIGN_OF_CURRENCY})|\s*\u00b0(?!\s?{_L})"
    r"|\s*\\(?:text|mathrm|textbf)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?"
    rf"|\s+(?:(?:square|cubic|sq\.?|cu\.?)\s+)?\u00b0?(?P<apart>(?:{_ONE_UNIT})+(?:[/\u00b7]{_ONE_UNIT})*)"
    rf"|\s*[\u00b0'\"\u2032\u2033]?\s?(?P<close>{_ONE_UNIT}(?:[/\u00b7]{_ONE_UNIT})*)"
)
_NO_UNITS = {
    *("dozen", "dozens", "score", "hundred", "thousand", "million", "millions", "billion", "billions", "trillion"),
    *("k", "mn", "mio", "bn", "half", "halves", "third", "thirds", "quarter", "quarters", "pi"),
    *("e", "n", "x", "y", "z", "and", "or", "to", "of", "plus", "minus", "times", "over", "per", "by"),
}
"""Words after a number that change it, or that say it is not all: refused in a field."""


class OutOfRange(ValueError):
    """A number that is one, but that no float holds (tables hold floats)."""


@dataclass(frozen=True)
class Number:
    """A number in a text, from `start` to `end` with its sign and currency; value None: too large or too small."""

    value: Fraction | None
    start: int
    end: int


class _Notation:
    """Patterns of one notation: decimal points (1,234.5) or decimal commas (1.234,5).

    Where commas are decimal a point is too if it cannot separate thousands: 3.5, 0.125, 1234.567.
    """

    def __init__(self, decimal_comma: bool) -> None:
        self.points = ",." if decimal_comma else "."
        comma = r"(?:,|\{,\})"
        point, group = (rf"(?(group){comma}|(?:{comma}|\.))", r"\.") if decimal_comma else (r"\.", r"\{,\}|,\\!|,")
        groups = rf"{group}|\\,|[\u00a0\u202f\u2009'\u2019_]"
        grouped = rf"[1-9]\d{{0,2}}(?P<group>{groups})\d{{3}}(?:(?P=group)\d{{3}})*(?!\d)"
        self.plain = re.compile(rf"(?P<whole>{grouped}|\d+)(?:{point}(?P<decimals>\d+))?|[{self.points}](?P<only>\d+)")
        self.start = re.compile(rf"\d|(?<!\d)[{self.points}]\d|\\[dtc]?frac(?![A-Za-z])|[{_VULGAR}]")


_POINTS, _COMMAS = _Notation(False), _Notation(True)
_ATTACHED = re.compile(r"\d+(?:[.,]\d+)*")
_POINT_AS_DECIMAL = re.compile(r"\d*\.(?!\d{3}(?!\d))\d+|(?<!\d)0\.\d+|\d{4,}\.\d+|(?<!\d)\.\d+")
_NEITHER_GROUP_NOR_POINT = re.compile(r"(?<![\d.,])\d+(?:\.\d{3})*,\d+(?![\d,])")


def find_numbers(text: str, decimal_comma: bool = False) -> list[Number]:
    """Every number in the text, in order.

    Args:
        text: anything.
        decimal_comma: read "1.234,5" as 1234.5, and no longer "1,234.5".
    """
    notation = _COMMAS if decimal_comma else _POINTS
    found: list[Number] = []
    place = 0
    while match := notation.start.search(text, place):
        begin = match.start()
        if match[0][0] in notation.points and begin and (text[begin - 1] == "." or _is_letter(text[begin - 1])):
            begin += 1  # "Rs.5", "approx.5", "...5": the point belongs to what stands before
        if text[begin].isdecimal() and _is_attached(text, begin):
            attached = _ATTACHED.match(text, begin)
            place = attached.end() if attached else begin + 1
            continue
        read = _unsigned(text, begin, notation)
        if read is None:
            place = match.end()
            continue
        value, end = read
        number = _signed(text, begin, end, value)
        found.append(number)
        place = max(number.end, begin + 1)
    return found


def answer_in(text: str, decimal_comma: bool = False) -> Number | None:
    r"""The number that a text gives as its answer, or None where there is no number in it.

    That is what the last \boxed{…} or "#### n" with a number in it says; without one, the last number.
    """
    numbers = find_numbers(text, decimal_comma)
    if not numbers:
        return None
    for marker in reversed(list(_MARKER.finditer(text))[-_MARKERS:]):
        if marker[0][0] == "#":
            after = next((number for number in numbers if number.start >= marker.end()), None)
            if after is not None and not text[marker.end() : after.start].strip(" \t\r\n$*_"):
                return after
        else:
            close = _closing(text, marker.end())
            inside = [number for number in numbers if marker.end() <= number.start and number.end <= close]
            if inside:
                number = inside[-1]
                if number.value is not None and _has_sign(text, marker.start()):
                    return replace(number, value=-number.value)
                return number
    return numbers[-1]


def read_number(text: str, decimal_comma: bool = False) -> Fraction:
    """The number that a field holds, alone or with a currency, a percent sign or one unit.

    Of a longer text the field is what stands after its last "####", and of that what stands in its last box. Whatever
    this reads, `answer_in` reads as the same number.

    Raises:
        ValueError: the field holds no number, several, or more than a number; the message says what is wrong with it
            (no field, file or record is named: that is for the caller).
    """
    field, negative = text.rsplit("####", 1)[-1], False
    if boxes := list(_BOX.finditer(field)):
        box = boxes[-1]
        negative = _has_sign(field, box.start())
        field = field[box.end() : _closing(field, box.end())]
    numbers = find_numbers(field, decimal_comma)
    if not numbers:
        raise ValueError("there is no number in it")
    if not decimal_comma and (comma := _decimal_comma(field)):
        written = comma.replace(".", "").replace(",", ".")
        raise ValueError(
            f"{shown(comma)} has a decimal comma or a group that is not three digits: write {written[:40]}, "
            "or say that commas are decimal (--decimal-comma)"
        )
    if decimal_comma and (point := _POINT_AS_DECIMAL.search(field)):
        raise ValueError(f"{shown(point[0])} has a decimal point where commas are decimal: write it with a comma")
    if len(numbers) > 1:
        raise ValueError(f"there are {len(numbers)} numbers in it")
    number = numbers[0]
    before, after = field[: number.start].strip(" \t\r\n$*"), field[number.end :]
    unit = _UNIT.match(after)
    word = (unit["apart"] or unit["close"] or "") if unit else ""
    if word.lower() in _NO_UNITS or word in ("M", "B", "T"):
        raise ValueError(f"{word!r} after the number may change it: write the number in digits")
    rest = after[unit.end() if unit else 0 :].strip(" \t\r\n$*.")
    if before not in ("", "%") or rest:
        raise ValueError("there is more than a number in it")
    if number.value is None:
        raise OutOfRange("the number is too large or too small")
    return -number.value if negative else number.value


def as_number(value: Fraction) -> int | float:
    """The number as an int where it is whole, as a float elsewhere.

    Raises:
        OutOfRange: no finite float is near it (tables hold floats), or it is not 0 and its float is.
    """
    try:
        rounded = float(value)
    except OverflowError:
        raise OutOfRange("the number is too large: no float holds it") from None
    if rounded == 0 and value != 0:
        raise OutOfRange("the number is too small: no float but 0 is near it")
    return int(value) if value.denominator == 1 else rounded


def shown(value: Any, length: int = 40) -> str:
    """A value for a message: one line, not too long, without half characters."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    text = value if isinstance(value, str) else str(Decimal(value)) if whole else repr(value)
    short = text if len(text) <= length else text[:length] + "\u2026"
    if not isinstance(value, str):
        return short
    return repr(short) if short.isprintable() else ascii(short)


# --- One number ---


def _unsigned(text: str, begin: int, notation: _Notation) -> tuple[Fraction | None, int] | None:
    """Value and end of the number that begins here; None where it is none."""
    if text[begin] == "\\":
        return _command(text, begin, notation)
    if not text[begin].isdecimal() and text[begin] not in notation.points:
        return _vulgar(text[begin]), begin + 1
    plain = notation.plain.match(text, begin)
    if plain is None:
        return None
    value, end = _value(plain), plain.end()
    if power := _SCIENTIFIC.match(text, end) or _TIMES_TEN.match(text, end):
        factor = _raise(Fraction(10), _exponent(power))
        return (None if value is None or factor is None else value * factor), power.end()
    if power := _POWER.match(text, end):
        return _raise(value, _exponent(power)), power.end()
    if fraction := _slashed(text, begin, end, notation):
        below, stop = fraction
        return (None if value is None or below is None else value / below), stop
    if plain["decimals"] is None and plain["whole"] and (mixed := _mixed(text, end, notation)):
        part, stop = mixed
        return (None if value is None else value + part), stop
    return value, end


def _value(plain: re.Match[str]) -> Fraction | None:
    whole = re.sub(r"\D", "", plain["whole"] or "0")
    decimals = plain["decimals"] or plain["only"] or ""
    if len(whole) + len(decimals) > MAX_DIGITS:
        return None
    return Fraction(Decimal(f"{whole}.{decimals}" if decimals else whole))


def _exponent(power: re.Match[str]) -> str:
    return next(part for part in power.groups() if part).translate(_ASCII)


def _raise(base: Fraction | None, exponent: str) -> Fraction | None:
    """base ** exponent; None where that is too long, or 0 to a negative power."""
    digits = exponent.lstrip("+-")
    if base is None or len(digits.lstrip("0")) > 5:
        return None
    power = int(exponent)
    length = max(base.numerator.bit_length(), base.denominator.bit_length())
    if length * abs(power) > 3.4 * MAX_DIGITS or (base == 0 and power < 0):
        return None
    return base**power


def _slashed(text: str, begin: int, end: int, notation: _Notation) -> tuple[Fraction | None, int] | None:
    """What a number is divided by ("/2" of "1/2"), and where that ends; dates such as 1/2/2020 are no fractions."""
    if text[end : end + 1] not in _SLASHES or _is_slashed(text, begin - 1, begin - 2):
        return None
    below = notation.plain.match(text, end + 1)
    if below is None or below["whole"] is None:
        return None
    value = _value(below)
    chained = _is_slashed(text, below.end(), below.end() + 1)
    return None if chained or value == 0 else (value, below.end())


def _is_slashed(text: str, slash: int, digit: int) -> bool:
    return min(slash, digit) >= 0 and text[slash : slash + 1] in _SLASHES and text[digit : digit + 1].isdecimal()


def _mixed(text: str, end: int, notation: _Notation) -> tuple[Fraction, int] | None:
    """The proper fraction after a whole number ("1/2" of "2 1/2"), and where it ends."""
    blank = text[end : end + 1] in (" ", "\u00a0")
    begin = end + 1 if blank else end
    first = text[begin : begin + 1]
    if not first:
        return None
    value: Fraction | None = None
    stop = begin
    if first == "\\":
        if (read := _command(text, begin, notation)) is not None:
            value, stop = read
    elif _ONE_VULGAR.match(first):
        value, stop = _vulgar(first), begin + 1
    elif blank and first.isdecimal() and (above := notation.plain.match(text, begin)) and above["decimals"] is None:
        if divided := _slashed(text, begin, above.end(), notation):
            numerator, below, stop = _value(above), divided[0], divided[1]
            value = None if numerator is None or below is None else numerator / below
    return (value, stop) if value is not None and 0 < value < 1 else None


def _vulgar(character: str) -> Fraction | None:
    above, below = unicodedata.normalize("NFKC", character).split("\u2044")
    return Fraction(int(above), int(below)) if below and int(below) else None


def _command(text: str, begin: int, notation: _Notation) -> tuple[Fraction | None, int] | None:
    r"""\frac{1}{2} and its kin."""
    command = _FRACTION_COMMAND.match(text, begin)
    if command is None:
        return None
    above = _argument(text, command.end(), notation)
    below = _argument(text, above[1], notation) if above else None
    if above is None or below is None or below[0] == 0:
        return None
    return (None if above[0] is None or below[0] is None else above[0] / below[0]), below[1]


def _argument(text: str, begin: int, notation: _Notation) -> tuple[Fraction | None, int] | None:
    if text[begin : begin + 1].isdecimal():
        return Fraction(int(text[begin])), begin + 1
    opening = _OPENING.match(text, begin)
    plain = notation.plain.match(text, opening.end()) if opening else None
    closing = _CLOSING.match(text, plain.end()) if plain else None
    if opening is None or plain is None or closing is None:
        return None
    value = _value(plain)
    negative = opening["sign"] not in ("", "+")
    return (-value if negative and value is not None else value), closing.end()


# --- What stands around a number ---


def _is_attached(text: str, begin: int) -> bool:
    """Whether these digits belong to a unit, a variable, an index or an exponent: km2, H2O, x_1, m^2, s^{-1}."""
    before = text[max(0, begin - 24) : begin]
    if _INDEX_OR_EXPONENT.search(before):
        return True
    return _is_letter(before[-1:]) and _COMMAND_OR_OPERATOR.search(before) is None


def _is_letter(character: str) -> bool:
    """Of an alphabet that puts blanks between words: ideographs stand directly before numbers."""
    return _ONE_LETTER.match(character) is not None


def _signed(text: str, begin: int, end: int, value: Fraction | None) -> Number:
    """The number with its currency, its sign and the brackets of a negative amount."""
    start, negative = begin, False
    currency = _CURRENCY_BEFORE.search(text, max(0, begin - 8), begin)
    if currency:
        start = currency.start()
    if start and text[start - 1] in _MINUS and _is_sign(text, start - 1):
        negative, start = True, start - 1
        if sign_of := _CURRENCY_BEFORE.search(text, max(0, start - 8), start):
            start, currency = sign_of.start(), sign_of
    elif start and text[start - 1] == "+" and _is_sign(text, start - 1):
        start -= 1
    if start and text[start - 1] == "(" and text[end : end + 1] == ")":
        ahead = text[max(0, start - 200) : start - 1].rstrip()
        if start > 1 and text[start - 2] in _MINUS and _is_sign(text, start - 2):
            negative, start, end = not negative, start - 2, end + 1
        elif currency and not negative and (not ahead or ahead[-1] in ":=#{|"):
            negative, start, end = True, start - 1, end + 1
    return Number(-value if negative and value is not None else value, start, end)


def _is_sign(text: str, place: int) -> bool:
    """Whether the dash here is a sign: not subtraction (10-7), not a range (3–5, 3 –5)."""
    if place == 0:
        return True
    before = text[place - 1]
    if before.isdigit() or before in "_.)]}%":
        return False
    if _is_letter(before):
        return _COMMAND_OR_OPERATOR.search(text, max(0, place - 24), place) is not None
    if text[place] in _DASHES:
        return not text[max(0, place - 8) : place].rstrip(" \t\u00a0")[-1:].isdigit()
    return True


def _has_sign(text: str, place: int) -> bool:
    """Whether what begins here (a box) has a minus before it."""
    before = len(text[max(0, place - 8) : place].rstrip(" $"))
    sign = max(0, place - 8) + before - 1
    return before > 0 and text[sign] in _MINUS and _is_sign(text, sign)


def _closing(text: str, begin: int) -> int:
    """Where the brace that was opened before `begin` closes; the end of a text in which it does not."""
    depth = 1
    for match in _BRACE.finditer(text, begin):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _decimal_comma(field: str) -> str | None:
    """The part of a field in which a comma does not separate groups of three."""
    for suspect in _NEITHER_GROUP_NOR_POINT.finditer(field):
        if not re.fullmatch(r"[1-9]\d{0,2},\d{3}", suspect[0]):
            return suspect[0]
    return None
