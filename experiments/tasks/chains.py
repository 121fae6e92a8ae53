"""Scoring of a written chain of thought: steps that are right, length, repetition.

An arithmetic step is an equation of written parts ("48/2 = 24", "3 × 4 + 2 = 14", "<<5*6=30>>", "20% of 50 = 10") of
which one has an operation; it is valid if both sides are exactly equal (rational arithmetic: "1/3 = 0.33" is not). A %
between two figures or brackets is the remainder ("(3*4+7)%50=19", "8 % 5 = 3"), any other per cent. In
"5 + 3 = 8 * 2 = 16" there are two equations, of which the first is wrong. Words between figures end an equation, unless
they are named as units ("3 apples + 4 apples = 7 apples"); letters other than an x between two figures make algebra,
which is not read.

A text is a chain if it has at least one valid step before its answer: the step must end before the answer begins, so
that the equation that states the answer is not an intermediate step of its own.

A step of an ontology's chain is valid if it is one of the question's statements, or follows from one rule (stated, or a
valid step before) and one fact (likewise).

Knows nothing about models. Lengths are in words; n-grams are of words; compression is of the UTF-8 bytes by zlib.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from experiments.tasks.ontology import Sentence
from experiments.tasks.prontoqa import parse_sentences, split_sentences

__all__ = [
    "FIGURE", "ChainScore", "Equation", "OntologyStep", "compression_ratio", "equations", "ontology_steps",
    "repetition", "score_arithmetic", "score_ontology", "value_of", "words_in",
]  # fmt: skip

_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "\u00a0": " "})
FIGURE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_REMAINDER = r"(?:%(?=[\d(])|(?<=\s)%(?=\s[\d(]))"
_OPERATION = rf"(?:\*\*?|[-+/^]|x(?=\s*[$€£(]?\d)|{_REMAINDER})"
_PART = rf"(?:[-+(]\s*)*[$€£]?(?:{FIGURE})%?\)*(?:\s*{_OPERATION}\s*(?:[-+(]\s*)*[$€£]?(?:{FIGURE})%?\)*)*"
_EQUATION = re.compile(rf"(?<![\w.)])(?P<parts>{_PART}(?:\s*=\s*{_PART})+)")
_TOKEN = re.compile(rf"\s*({FIGURE}|[-+*/()^%]|mod)")
_LARGEST_POWER = 64
NGRAM = 4
"""Words of the n-grams whose repetition is measured by default."""


@dataclass(frozen=True)
class Equation:
    """A step "left = right" of a text.

    Attributes:
        left, right: as written.
        start, end: characters in the text.
        valid: both sides can be computed and are exactly equal.
    """

    left: str
    right: str
    start: int
    end: int
    valid: bool


@dataclass(frozen=True)
class OntologyStep:
    """A sentence of a chain: what it says, and why it is right.

    Attributes:
        text: as written, without its full stop.
        valid: "stated", "inferred", or "" for neither.
    """

    text: str
    valid: Literal["stated", "inferred", ""]


@dataclass(frozen=True)
class ChainScore:
    """What can be said about one generated text.

    Attributes:
        steps: steps before the answer.
        valid_steps: those of them that are right.
        is_chain: at least one valid step before the answer.
        parsed: an answer was found.
        words: length of the whole text in words.
        repetition: share of its n-grams that occurred before, 0..1.
        compression: bytes after compression by zlib / bytes before; small for a text that repeats itself.
    """

    steps: int
    valid_steps: int
    is_chain: bool
    parsed: bool
    words: int
    repetition: float
    compression: float


def score_arithmetic(text: str, answer_at: int | None = None, units: Sequence[str] = ()) -> ChainScore:
    """Score of a chain of equations.

    Args:
        text: what the model wrote.
        answer_at: character at which its answer begins; None: the last number of the text, if there is one. A text that
            has no number has no answer.
        units: words that are left out between figures, such as "apples".

    Raises:
        ValueError: answer_at outside the text.
    """
    found = equations(text, units)
    if answer_at is None:
        figures = list(re.finditer(FIGURE, text))
        answer_at = figures[-1].start() if figures else None
    elif not 0 <= answer_at <= len(text):
        raise ValueError(f"the answer must begin within the {len(text)} characters of the text, got {answer_at}")
    before = [equation for equation in found if answer_at is None or equation.end <= answer_at]
    return _score(text, len(before), sum(equation.valid for equation in before), answer_at is not None)


def score_ontology(question: str, text: str) -> ChainScore:
    """Score of a chain about an ontology; the answer is the first True or False that stands as a word of its own.

    Args:
        question: statements, and after them "True or false: …" (what follows is not a statement).
        text: what the model wrote.
    """
    answer = re.search(r"\b(?:True|False)\b", text)
    steps = ontology_steps(question, text if answer is None else text[: answer.start()])
    return _score(text, len(steps), sum(bool(step.valid) for step in steps), answer is not None)


def _score(text: str, steps: int, valid: int, parsed: bool) -> ChainScore:
    return ChainScore(
        steps=steps,
        valid_steps=valid,
        is_chain=parsed and valid > 0,
        parsed=parsed,
        words=len(words_in(text)),
        repetition=repetition(text),
        compression=compression_ratio(text),
    )


def equations(text: str, units: Sequence[str] = ()) -> list[Equation]:
    """Every equation of a text, in order; see this module for what counts.

    Args:
        text: any.
        units: words that are left out between figures; positions are still those of the text.
    """
    plain = re.sub(r"(?<=%) of ", " *  ", text.translate(_SIGNS))
    for unit in units:
        plain = re.sub(rf"\b{re.escape(unit)}\b", lambda found: " " * len(found[0]), plain, flags=re.IGNORECASE)
    found = []
    for match in _EQUATION.finditer(plain):
        parts, at = [], match.start("parts")
        for part in match["parts"].split("="):
            parts.append((part, at, at + len(part)))
            at += len(part) + 1
        for (left, start, _), (right, _, end) in pairwise(parts):
            if not re.search(r"[\d)%]\s*(?:\*|[-+/^x])", left + " " + right) and not any(
                re.search(rf"[\d)]\s*{_REMAINDER}", side) for side in (left, right)
            ):
                continue  # "x = 5 = 5" and "12 = 12" say nothing
            if any(side.count("(") != side.count(")") for side in (left, right)):
                continue  # the beginning of a side was no figure, as in "f(2) = 3"
            a, b = value_of(left), value_of(right)
            start += len(left) - len(left.lstrip())
            end -= len(right) - len(right.rstrip())
            found.append(Equation(left.strip(), right.strip(), start, end, a is not None and a == b))
    return found


def value_of(expression: str) -> Fraction | None:
    """Exact value of an expression of figures, + - * / ^ **, x as a sign of multiplication, per cent, remainders (0 or
    more for a positive modulus) and brackets.

    Returns:
        The value; None where the expression cannot be read, divides by zero or has an exponent that is not a whole
        number of at most 64.
    """
    plain = expression.translate(_SIGNS).replace("**", "^").replace("x", "*")
    plain = re.sub(r"[$€£]", "", plain)
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", plain)
    plain = re.sub(rf"(?<=[\d)]){_REMAINDER}|(?<=[\d)])\s+{_REMAINDER}", "mod", plain)
    tokens, at = [], 0
    while at < len(plain.rstrip()):
        match = _TOKEN.match(plain, at)
        if match is None:
            return None
        tokens.append(match[1])
        at = match.end()
    try:
        reader = _Reader(tokens)
        value = reader.sum()
        return value if reader.at == len(tokens) else None
    except (ZeroDivisionError, SyntaxError):
        return None


class _Reader:
    """Recursive descent over the tokens of an expression; SyntaxError where it is none."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.at = tokens, 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.power()
        while (sign := self.peek()) in ("*", "/", "mod"):
            self.take()
            other = self.power()
            value = value * other if sign == "*" else value / other if sign == "/" else value % other
        return value

    def power(self) -> Fraction:
        if self.peek() in ("+", "-"):
            return -self.power() if self.take() == "-" else self.power()
        value = self.atom()
        if self.peek() == "^":
            self.take()
            exponent = self.power()
            if exponent.denominator != 1 or abs(exponent) > _LARGEST_POWER:
                raise SyntaxError("exponent")
            return value ** int(exponent)
        return value

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.sum()
            if self.take() != ")":
                raise SyntaxError("bracket")
        elif re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", token):
            value = Fraction(token if token[0] != "." else "0" + token)
        else:
            raise SyntaxError(token)
        if self.peek() == "%":
            self.take()
            value /= 100
        return value


def ontology_steps(question: str, chain: str) -> list[OntologyStep]:
    """Every sentence of a chain, checked against the question and the valid sentences before it.

    Args:
        question: statements; what follows "True or false:" is not one. Text before "### Input:" is left out.
        chain: sentences, without the answer.
    """
    stated = re.split(r"true or false:", question.rsplit("### Input:", 1)[-1], flags=re.IGNORECASE)[0]
    statements, steps = split_sentences(stated), split_sentences(chain)
    parsed = parse_sentences([*statements, *steps])
    known = {_meaning(sentence) for sentence in parsed[: len(statements)] if sentence is not None}
    given = frozenset(known)
    found = []
    for text, sentence in zip(steps, parsed[len(statements) :], strict=True):
        if sentence is None:
            found.append(OntologyStep(text, ""))
            continue
        meaning = _meaning(sentence)
        subject, thing, negated = meaning
        inferred = any(s == subject and not no and (middle, thing, negated) in known for s, middle, no in known)
        kind: Literal["stated", "inferred", ""] = "stated" if meaning in given else "inferred" if inferred else ""
        if kind:
            known.add(meaning)
        found.append(OntologyStep(text, kind))
    return found


def _meaning(sentence: Sentence) -> tuple[str, str, bool]:
    """What a sentence says, in small letters: words and sign (a word's kind depends on how it is written)."""
    return sentence.subject.text.lower(), sentence.object.text.lower(), sentence.negated


def words_in(text: str) -> list[str]:
    """Words and figures of a text in small letters."""
    return re.findall(r"\w+(?:['’]\w+)?", text.lower())


def repetition(text: str, n: int = NGRAM) -> float:
    """Share of a text's word n-grams that occurred in it before: 0 for no repetition or for fewer than n words, towards
    1 for one n-gram over and over.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    words = words_in(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(text: str) -> float:
    """Bytes after compression / bytes before (zlib, level 9); above 1 for very short texts, 1 for an empty one."""
    data = text.encode("utf-8")
    return len(zlib.compress(data, 9)) / len(data) if data else 1.0
