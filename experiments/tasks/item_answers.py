"""From a generated text to right or wrong, by the kind of the item's answer; and how much a text repeats itself.

    word    the text begins with the answer: blanks, quotes, stars and brackets before it and the case of letters do not
            count, and no letter or digit may follow ("Mary." and "**mary**" are Mary, "Maryland" and "to Mary" are not)
    number  by the item's own reading: the number grammar of the data sets, or the published rule (answers.py)
    letter  a letter of the choices at the beginning ("B.", "(B) …"), else the last one in brackets, else the one after
            "answer is"

A text in which no answer of its kind is found is wrong and counts as not read. Knows nothing about models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.tasks.answers import parse_number
from experiments.tasks.items import Item

__all__ = ["ReadAnswer", "read_answer", "repetition"]

_LEAD = re.compile(r"^[\s\"'`*_(\[“‘]*")
_BEGINS = re.compile(r"^\W*([A-Z])\b(?!')")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_SAID = re.compile(r"answer(?: is|:)\s*\W*([A-Z])\b", re.IGNORECASE)


@dataclass(frozen=True)
class ReadAnswer:
    """What a text says.

    Attributes:
        prediction: the answer that was read, "" if none was found.
        correct: it is the item's.
    """

    prediction: str
    correct: bool

    @property
    def parsed(self) -> bool:
        """Whether an answer was found."""
        return bool(self.prediction)


def read_answer(item: Item, text: str) -> ReadAnswer:
    """The answer that a generated text gives to an item.

    Raises:
        ValueError: a number is asked for and the item's own answer is none.
    """
    if item.kind == "number":
        return _number(item, text)
    if item.kind == "letter":
        found = _letter(text, item.choices)
        return ReadAnswer(found, found == item.answer)
    begun = _LEAD.sub("", text)
    wanted = item.answer.strip()
    after = begun[len(wanted) : len(wanted) + 1]
    if begun[: len(wanted)].casefold() == wanted.casefold() and not after.isalnum():
        return ReadAnswer(wanted, True)
    words = begun.split()[: max(1, len(wanted.split()))]
    return ReadAnswer(" ".join(words).rstrip(".,;:!?\"'`*_)]”’"), False)


def _number(item: Item, text: str) -> ReadAnswer:
    answer = parse_number(item.answer)
    if answer is None:
        raise ValueError(f"{item.prompt_id}: the answer {item.answer!r} is no number")
    found = item.reading.number(text)
    return ReadAnswer("" if found is None else f"{found:.12g}", item.reading.agrees(text, answer))


def _letter(text: str, letters: Sequence[str]) -> str:
    first = _BEGINS.match(text)
    found = [first[1]] if first else _BRACKETED.findall(text)[-1:] or _SAID.findall(text)[-1:]
    return next((one.upper() for one in found if not letters or one.upper() in letters), "")


def repetition(tokens: Sequence[object], size: int = 2) -> float:
    """Share of a text's runs of `size` tokens that it has had before: 0 nothing is repeated, towards 1 a loop.

    Args:
        tokens: ids or words.
        size: 1 or more.

    Returns:
        1 − different runs / runs; 0 where the text is shorter than one run.
    """
    if size < 1:
        raise ValueError(f"size must be 1 or more, got {size}")
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
