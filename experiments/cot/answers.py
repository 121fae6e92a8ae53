"""From what a model wrote to an answer, and to where in the text it begins; the rules of lm-evaluation-harness where it
has one.

    kind of item          answer                                          as in the harness's task
    number                the last number, compared as a text             gsm8k_cot_zeroshot (flexible-extract)
    letter                the last "(B)", else the choice quoted last,    mmlu_flan_cot_zeroshot (flexible-extract)
                          else the last letter after a colon
    word, nothing known   the whole text must be the answer               bigbench_*_generate_until
    word, True or False   the first True or False                         – (no such task)
    word, other choices   the choice named last, also in the plural       – (no such task)

A text whose first sentence is nothing but an answer ("sheep. Sheep are …", "29. 29 + 8 = 37") was answered at once:
whatever it writes afterwards stands behind the answer, `at` is 0; of words that answer counts. Numbers are still read
as the harness reads them, from the end.

Where a lettered item does not say what its choices are: the last "(B)", else the letter after "answer is".

An answer that cannot be read is None and counts as wrong. Knows nothing about chains (measures.py) or models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.tasks.babi import VOCABULARIES
from experiments.tasks.choices import ChoiceProblem
from experiments.tasks.items import Item
from experiments.tasks.letters import exact_text, flexible_letter, flexible_number, is_right, is_right_number

__all__ = ["Reading", "choice_problem", "is_truth", "read"]

_TRUTH = re.compile(r"\b(?:True|False)\b")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_SAID = re.compile(r"answer(?: is|:)\s*\W*([A-Z])\b", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"\W*-?\d+(?:,\d{3})*(?:\.\d+)?\s*(?:[.!?,;](?!\d)|\n|$)")
_FIGURES = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_PLURALS = {one: many for words in VOCABULARIES.values() for one, many in words.fearing}


@dataclass(frozen=True)
class Reading:
    """An answer as it was read.

    Attributes:
        prediction: the answer; None: there is none.
        correct: it is right.
        at: character at which it begins, for what stands before it; None where there is no answer.
    """

    prediction: str | None
    correct: bool
    at: int | None

    @property
    def parsed(self) -> bool:
        """Whether there is an answer."""
        return self.prediction is not None


def is_truth(item: Item) -> bool:
    """Whether an item asks for True or False."""
    return set(item.choices) == {"True", "False"}


def read(item: Item, text: str) -> Reading:
    """The answer that a text gives to an item."""
    if item.kind == "number":
        return _number(item, text)
    if item.kind == "letter":
        return _letter(item, text)
    if is_truth(item):
        found = _TRUTH.search(text)
        return (
            Reading(None, False, None) if found is None else Reading(found[0], found[0] == item.answer, found.start())
        )
    if not item.choices and not item.chain:
        right = exact_text(text.strip(), (item.answer, *item.accepted))
        return Reading(text.strip() or None, right, 0 if text.strip() else None)
    return _named(item, text)


def choice_problem(item: Item) -> ChoiceProblem:
    """A lettered item as the harness's rules want it."""
    right = (item.answer, *item.accepted)
    answers = tuple(item.texts[item.choices.index(letter)] for letter in right)
    return ChoiceProblem(item.prompt_id, item.question, item.texts, right, answers)


def _number(item: Item, text: str) -> Reading:
    found = flexible_number(text)
    places = list(_FIGURES.finditer(text))
    at = None if found is None else places[-1].start() if places and not _BARE_NUMBER.match(text) else 0
    return Reading(found, is_right_number(found, item.answer), at)


def _letter(item: Item, text: str) -> Reading:
    bracketed = list(_BRACKETED.finditer(text))
    said = bracketed or list(_SAID.finditer(text))
    at = said[-1].start() if said else len(text)
    if item.texts:
        problem = choice_problem(item)
        letter = flexible_letter(text, problem)
        return Reading(letter, is_right(letter, problem), None if letter is None else at)
    letter = said[-1][1].upper() if said else None
    return Reading(letter, letter in (item.answer, *item.accepted), None if letter is None else at)


def _named(item: Item, text: str) -> Reading:
    """The choice that is named last."""
    names = {name.lower(): choice for choice in item.choices or (item.answer,) for name in _forms(choice)}
    any_name = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = list(re.finditer(rf"\b(?:{any_name})\b", text, flags=re.IGNORECASE))
    if not found:
        return Reading(None, False, None)
    at_once = re.match(rf"\W*({any_name})\s*(?:[.!?,;]|\n|$)", text, flags=re.IGNORECASE)
    name, at = (found[-1][0], found[-1].start()) if at_once is None else (at_once[1], 0)
    choice = names[name.lower()]
    return Reading(choice, choice in (item.answer, *item.accepted), at)


def _forms(word: str) -> tuple[str, str]:
    """A word and its plural."""
    return word, _PLURALS.get(word, f"{word}s")
