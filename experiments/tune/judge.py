"""Answers of the reasoner's tasks, judged: right or wrong, at once or with a chain, and whether it is the right chain.

The answer of a text is its last number, or the last of the answers to be expected that stands in it as a word of its
own; the same rule for every model, also for one that was not trained to end with the answer. A chain has at least one
valid step before the answer: an equation that holds, a statement of the question, or what follows from some.

Knows nothing about models.
"""

from __future__ import annotations

import re
from typing import Any

from experiments.tasks.answers import extract_answer, is_correct
from experiments.tasks.chains import score_arithmetic, score_ontology
from experiments.tasks.items import Item
from experiments.tasks.prontoqa import split_sentences

__all__ = ["judged"]


def judged(item: Item, text: str) -> dict[str, Any]:
    """What is said of one text.

    Returns:
        parsed: an answer was found; correct: it is right; at_once: the text is one word; chain: it has a valid step
        before the answer; gold: it is the chain and the answer of the item, word by word; words: its length.
    """
    found = _answer(item, text)
    right = is_correct(text, int(item.answer)) if item.kind == "number" else found == item.answer
    return {
        "parsed": found is not None,
        "correct": found is not None and right,
        "at_once": len(text.split()) == 1,
        "chain": _has_chain(item, text),
        "gold": text.split() == " ".join([*item.chain, item.answer]).split(),
        "words": len(text.split()),
    }


def _answer(item: Item, text: str) -> str | float | None:
    if item.kind == "number":
        return extract_answer(text)
    named = re.findall(rf"\b(?:{'|'.join(map(re.escape, item.choices))})\b", text)
    return named[-1] if named else None


def _has_chain(item: Item, text: str) -> bool:
    if item.kind == "number":
        return score_arithmetic(text).is_chain
    if item.task.startswith("ontology"):
        return score_ontology(item.question, text).is_chain
    known = {sentence.lower() for sentence in split_sentences(f"{item.question} {' '.join(item.chain)}")}
    return any(sentence.lower() in known for sentence in split_sentences(text))
