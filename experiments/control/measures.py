"""What is measured of a steered row: the next-token distribution beside the unsteered one, and the text.

Of the distribution after the prompt, in float64 (nats, probabilities as fractions):

    kl           KL(unsteered ‖ steered) = Σ p log(p / q), over the whole vocabulary
    entropy      of the steered distribution
    p_right      probability of the first token of the right answer, over the whole vocabulary
    p_wrong      the same of the other answers together; NaN where no others are compared
    p_answers    p_right + p_wrong: the mass on the answer set
    share_right  p_right / p_answers: the right answer's part of it
    choice       the answer whose first token is the most probable (restricted choice); a tie is not the right answer's

Of the text: whether it is right (experiments/tasks/item_answers.py, from the first `judged` tokens, as many for vectors
and random directions), and repeated pairs of tokens. Knows nothing about vectors or cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.study.item_texts import Reader, answer_tokens
from experiments.tasks.alignment import ids_of
from experiments.tasks.item_answers import read_answer, repetition
from experiments.tasks.items import Item
from lm.text import to_text

__all__ = ["Compared", "compared_answers", "distribution", "judged_length", "text_measures"]

CHUNK = 64
"""Rows whose distributions are held in float64 at once."""
BEYOND = 1
"""Tokens behind the longest answer that are read: they tell where its last word ends."""


@dataclass(frozen=True)
class Compared:
    """The answers that are compared for each item.

    Attributes:
        names: per item, the answers; the right one first.
        tokens: (item, answer) their first tokens, -1 where an item has fewer.
    """

    names: list[tuple[str, ...]]
    tokens: Tensor


def compared_answers(reader: Reader, items: Sequence[Item], everyone: Sequence[str] = ()) -> Compared:
    """The answers that each item is compared with.

    Args:
        reader: of the items.
        items: asked.
        everyone: every different answer of the task; empty: each item's own choices. An item without choices has its
            right answer alone.

    Raises:
        ValueError: two answers of an item share their first token with this tokenizer.
    """
    ids, names, tokens = ids_of(reader.model.tokenizer), [], []
    for item in items:
        answers = tuple(dict.fromkeys((item.answer, *(everyone or item.choices))))
        names.append(answers)
        if len(answers) > 1:
            tokens.append(list(answer_tokens(reader, item, answers).values()))
        else:
            tokens.append([ids(reader.before(item) + item.answer)[0]])
    widest = max(map(len, tokens))
    padded = torch.tensor([row + [-1] * (widest - len(row)) for row in tokens])
    return Compared(names, padded)


def distribution(logits: Tensor, reference: Tensor, answers: Tensor) -> dict[str, np.ndarray]:
    """Measures of next-token distributions.

    Args:
        logits: (row, vocab) steered.
        reference: (row, vocab) unsteered.
        answers: (row, answer) token ids, the right one first, -1 for none.

    Returns:
        kl, entropy, p_right, p_wrong, p_answers, share_right, all (row,) float64; chosen (row,) index of the answer
        with the largest logit.
    """
    parts = [
        _distribution(logits[i : i + CHUNK], reference[i : i + CHUNK], answers[i : i + CHUNK])
        for i in range(0, len(logits), CHUNK)
    ]
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _distribution(logits: Tensor, reference: Tensor, answers: Tensor) -> dict[str, Tensor]:
    log_q = torch.log_softmax(logits.double(), dim=-1)
    log_p = torch.log_softmax(reference.double(), dim=-1)
    answers = answers.to(log_q.device)
    there = answers >= 0
    log_answers = log_q.gather(1, answers.clamp(min=0)).masked_fill(~there, float("-inf"))
    p = log_answers.exp()
    right, wrong = p[:, 0], p[:, 1:].sum(1)
    alone = ~there[:, 1:].any(1)
    wrong = wrong.masked_fill(alone, float("nan"))
    together = right + wrong
    nobody = together == 0
    best, place = log_answers[:, 1:].max(1) if answers.shape[1] > 1 else (torch.full_like(right, -np.inf), None)
    chosen = torch.zeros_like(answers[:, 0]) if place is None else torch.where(best >= log_answers[:, 0], place + 1, 0)
    return {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0),
        "entropy": torch.special.entr(log_q.exp()).sum(-1),
        "p_right": right,
        "p_wrong": wrong,
        "p_answers": together,
        "share_right": torch.where(nobody, torch.nan, right / together),
        "chosen": chosen,
    }


def judged_length(reader: Reader, items: Sequence[Item], limit: int) -> int:
    """How many of at most `limit` tokens are read to judge a text; the same for every row of a run.

    Words and letters stand at the beginning of a text, so as many tokens as the longest answer has and BEYOND more are
    enough; a number may stand at its end.
    """
    if any(item.kind == "number" for item in items):
        return limit
    ids = ids_of(reader.model.tokenizer)
    longest = max(len(ids(reader.before(item) + item.answer)) for item in items)
    return min(limit, longest + BEYOND)


def text_measures(
    reader: Reader, items: Sequence[Item], rows: Sequence[int], tokens: Sequence[Sequence[int]], judged: int,
    whole: bool,
) -> Mapping[str, Any]:  # fmt: skip
    """Columns of what was written.

    Args:
        reader: of the items.
        items: asked.
        rows: (row,) index of each row's item.
        tokens: (row,) ids that were written.
        judged: how many of them are read for the answer.
        whole: as much was written as the run's limit allows, so repetition means something; else it is NaN.
    """
    tokenizer = reader.model.tokenizer
    texts = [to_text(tokenizer, ids) for ids in tokens]
    known: dict[tuple[int, str], Any] = {}
    read = []
    for row, ids, text in zip(rows, tokens, texts, strict=True):
        begun = text if len(ids) <= judged else to_text(tokenizer, ids[:judged])
        if (row, begun) not in known:
            known[row, begun] = read_answer(items[row], begun)
        read.append(known[row, begun])
    return {
        "text": texts,
        "prediction": [one.prediction for one in read],
        "parsed": [one.parsed for one in read],
        "correct": [one.correct for one in read],
        "n_tokens": [len(ids) for ids in tokens],
        "repetition": [repetition(ids) if whole else np.nan for ids in tokens],
    }
