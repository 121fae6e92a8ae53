"""How values and words are spelled in a model's vocabulary, and where a spelling stands among the most probable tokens.

A number is spelled with and without a leading space, tokens that are only space are skipped, and the better spelling
counts. A number of several tokens counts by its first token (rule "first") or only if all of its tokens are among the k
(rule "all"); single-token numbers are the same under both.

Knows nothing about prompts, lenses or layers. Used by every study that looks for values in what a model would say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from codi import CodiModel

__all__ = [
    "NEVER",
    "number_spellings",
    "number_tokens",
    "ranks",
    "spelling_table",
    "token_text",
    "with_absent",
    "word_spellings",
]

NEVER = 127
"""Rank of what is not among the most probable tokens."""


def _spellings(tokenizer: Any, forms: Iterable[str]) -> list[tuple[int, ...]]:
    found = []
    for form in forms:
        ids = list(tokenizer(form, add_special_tokens=False)["input_ids"])
        while len(ids) > 1 and not tokenizer.decode([ids[0]]).strip():
            ids = ids[1:]  # a space that is a token of its own says nothing about the number
        if ids:
            found.append(tuple(ids))
    return list(dict.fromkeys(found))


def number_spellings(tokenizer: Any, value: int | float) -> list[tuple[int, ...]]:
    """Token ids of a number, without and with a leading space, without duplicates."""
    text = str(int(value)) if float(value).is_integer() else f"{value:g}"
    return _spellings(tokenizer, (text, " " + text))


def word_spellings(tokenizer: Any, word: str) -> list[tuple[int, ...]]:
    """Token ids of a word with and without leading space and capital."""
    return _spellings(tokenizer, (word, " " + word, word.capitalize(), " " + word.capitalize()))


def spelling_table(spellings: Sequence[Sequence[tuple[int, ...]]], rule: Literal["first", "all"]) -> Tensor:
    """(value, spelling, token) ids, −1 where there is none; one token per spelling under rule "first"."""
    shortened = [[ids[:1] if rule == "first" else ids for ids in forms] for forms in spellings]
    n_forms = max(map(len, shortened))
    n_tokens = max(len(ids) for forms in shortened for ids in forms)
    table = torch.full((len(shortened), n_forms, n_tokens), -1)
    for i, forms in enumerate(shortened):
        for j, ids in enumerate(forms):
            table[i, j, : len(ids)] = torch.tensor(ids)
    return table


def with_absent(table: Tensor) -> Tensor:
    """The table with one more row that has no spelling: index −1."""
    return torch.cat([table, torch.full_like(table[:1], -1)])


def ranks(top: Tensor, wanted: Tensor) -> Tensor:
    """Rank of spelled values among the most probable tokens.

    Args:
        top: (row, k) token ids, most probable first.
        wanted: (row, value, spelling, token) ids, −1 where there is none.

    Returns:
        (row, value) int64: 1..k, the best spelling's worst token; NEVER if no spelling is wholly among the k.
    """
    equal = wanted[..., None] == top[:, None, None, None, :]
    place = torch.where(equal.any(-1), equal.int().argmax(-1) + 1, NEVER)
    absent = wanted == -1
    place = place.masked_fill(absent, 0).amax(dim=-1)  # worst token of a spelling; padding never is
    place = place.masked_fill(absent.all(dim=-1), NEVER)
    return place.amin(dim=-1)


def number_tokens(model: CodiModel) -> np.ndarray:
    """(vocab,) whether a token is a whole number, with or without spaces around it."""
    known = min(len(model.tokenizer), model.vocab_size)
    texts = model.tokenizer.batch_decode([[i] for i in range(known)])
    found = np.zeros(model.vocab_size, bool)
    found[:known] = [text.strip().isascii() and text.strip().isdigit() for text in texts]
    return found


def token_text(model: CodiModel, token: int) -> str:
    """Text of one token, unprintable characters escaped; "<id>" where an id alone is no text (part of a character, or
    unknown to the tokenizer)."""
    text = str(model.tokenizer.decode([token])) if token < len(model.tokenizer) else "\ufffd"
    if "\ufffd" in text:
        return f"<{token}>"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
