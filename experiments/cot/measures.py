"""What is measured of every text: the answer, the chain before it, its length, and whether it repeats itself.

A text has a *chain* if at least one valid intermediate step stands before its answer. What follows an answer that was
given at once (answers.py) stands behind it. What is a valid step depends on the question, and is checked, not taken
from the wording:

    numbers, letters   an equation of written figures whose two sides are equal (tasks/chains.py); one that ends in the
                       answer itself does not stand before it
    True or False      a statement of the question, or what follows from the statements and steps before it
    other words        a fact of the story, or the conclusion of its argument; the conclusion alone is the answer
                       written out, not a step towards it. A fact counts once.

Steps of multiple-choice questions without equations cannot be checked; `sentences`, which are counted for every text,
say how much stands before the answer. Words, n-grams of 4 words and bytes are those of tasks/chains.py.

Knows nothing about models or how a text came about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from experiments.cot.answers import Reading, is_truth, read
from experiments.study.folder import TEXT
from experiments.tasks.chains import compression_ratio, repetition, score_arithmetic, score_ontology, words_in
from experiments.tasks.item_sets import family_of
from experiments.tasks.items import Item

__all__ = ["CONDITION", "MEASURES", "OUTCOMES", "TRIALS", "measured", "request", "trial_rows"]

MEASURES: dict[str, pa.DataType] = {
    "text": pa.string(), "tokens": pa.int32(), "finished": pa.bool_(), "prediction": pa.string(),
    "parsed": pa.bool_(), "correct": pa.bool_(), "chain": pa.bool_(), "steps": pa.int16(), "valid_steps": pa.int16(),
    "sentences": pa.int16(), "words": pa.int32(), "repetition": pa.float64(), "compression": pa.float64(),
}  # fmt: skip
"""Columns of a text; tokens written, the end of text not counted; prediction is "" where no answer can be read."""
OUTCOMES = ("chain", "correct", "parsed", "valid_steps", "sentences", "words", "tokens", "repetition", "compression")
"""Measures that have means."""
CONDITION = ("prompt", "way", "vector", "layer", "coefficient")
"""What was done: the sentence behind the question ("neutral": none, "direct", "steps"), the way of steering ("":
none, "continuous", "single"), the vector ("": none, "all", "held-out", "random", "shuffled"), where, how much."""
TRIALS = pa.schema(
    [
        ("prompt", TEXT), ("way", TEXT), ("vector", TEXT), ("layer", pa.int16()), ("coefficient", pa.float64()),
        ("draw", pa.int32()), ("set", TEXT), ("family", TEXT), ("prompt_id", pa.string()), ("cluster", pa.string()),
        ("answer", pa.string()), *MEASURES.items(),
    ]
)  # fmt: skip
"""One row per question, condition and draw."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_UNIT = re.compile(r"\d+ (?:(?:more|new|other|others) )?([a-z]+)", re.IGNORECASE)


def request(item: Item, sentence: str) -> str:
    """A question and the sentence behind it ("": none), on a line of its own behind questions of several lines."""
    question = item.question.strip()
    if not sentence.strip():
        return question
    return f"{question}{chr(10) if chr(10) in question else ' '}{sentence.strip()}"


def measured(item: Item, text: str) -> dict[str, Any]:
    """The measures of a text: MEASURES but for text, tokens and finished."""
    reading = read(item, text)
    steps, valid, chain = _steps(item, text, reading)
    before = text if reading.at is None else text[: reading.at]
    return {
        "prediction": reading.prediction or "",
        "parsed": reading.parsed,
        "correct": reading.correct,
        "chain": chain,
        "steps": steps,
        "valid_steps": valid,
        "sentences": sum(bool(words_in(part)) and part.strip()[-1] in ".!?" for part in _SENTENCE_END.split(before)),
        "words": len(words_in(text)),
        "repetition": repetition(text),
        "compression": compression_ratio(text),
    }


def _steps(item: Item, text: str, reading: Reading) -> tuple[int, int, bool]:
    """Steps before the answer, those that are valid, and whether they make a chain."""
    if is_truth(item):
        found = score_ontology(item.question, text)
        return found.steps, found.valid_steps, found.is_chain
    if item.kind in ("number", "letter") or not item.chain:
        at: int | None = len(text) if reading.at is None else reading.at
        if item.kind == "number" and reading.at != 0:
            at = None  # the last number; nothing stands before an answer at once
        score = score_arithmetic(text, at, _units(item))
        return score.steps, score.valid_steps, reading.parsed and score.valid_steps > 0
    return _facts(item, text[: reading.at], reading.parsed)


def _units(item: Item) -> tuple[str, ...]:
    """Words that stand behind a figure in the question, in both numbers: what is counted in it."""
    words = {word.lower() for word in _UNIT.findall(item.question)}
    return tuple(sorted(words | {f"{word}s" for word in words} | {word.removesuffix("s") for word in words}))


def _facts(item: Item, before: str, parsed: bool) -> tuple[int, int, bool]:
    """Sentences before the answer; the story's facts, and the conclusion, that stand in them."""
    plain = _plain(before)
    conclusion = item.chain[-1]
    facts = {_plain(sentence) for sentence in (*_SENTENCE_END.split(item.question), *item.chain[:-1])
             if not sentence.rstrip().endswith("?")} - {_plain(conclusion)}  # fmt: skip
    stated = sum(fact in plain for fact in facts)
    valid = stated + (_plain(conclusion) in plain)
    sentences = [part for part in _SENTENCE_END.split(before) if words_in(part) and part.strip()[-1] in ".!?"]
    return max(len(sentences), valid), valid, parsed and stated > 0


def _plain(sentence: str) -> str:
    """Words of a sentence between blanks, so that one is found in a longer one as a whole."""
    return f" {' '.join(words_in(sentence))} "


def trial_rows(
    items: Sequence[Item], texts: Sequence[str], tokens: Sequence[int], finished: Sequence[bool],
    conditions: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:  # fmt: skip
    """Rows of a trial table.

    Args:
        items, texts, tokens, finished: (row,) question, what was written, how many tokens, whether it came to its end.
        conditions: (row,) the columns of CONDITION and draw.
    """
    records = [
        {
            **condition,
            "set": item.task,
            "family": family_of(item.task),
            "prompt_id": item.prompt_id,
            "cluster": item.cluster or item.prompt_id,
            "answer": item.answer,
            "text": text,
            "tokens": number,
            "finished": done,
            **measured(item, text),
        }
        for item, text, number, done, condition in zip(items, texts, tokens, finished, conditions, strict=True)
    ]
    return pd.DataFrame(records, columns=TRIALS.names)
