"""Answers under a chain-of-thought vector: rows of prompts, each with its own steering, written in common batches.

Continuous steering adds c times the vector at every token that the model writes, and (unless asked otherwise) at the
last token of the prompt, which predicts the first one; single steering adds it once, while the prompt is read, and the
cache carries it on. Also the likelihood of given continuations under the same steering, for scoring without a text.

Knows nothing about items, answers or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.cot.options import ContinuousTokens, SingleTokens
from lm.cache import build_cache
from lm.edits import Editing, ResidualEdit
from lm.forward import feed
from lm.generate import Generated, generate
from lm.model import LanguageModel
from lm.terms import EditPositions
from lm.text import EncodedBatch

__all__ = ["Steering", "edits_of", "likelihoods", "write"]

_CONTINUOUS: dict[ContinuousTokens, tuple[EditPositions, ...]] = {
    "answer": ("last", "generated"),
    "generated": ("generated",),
    "all": ("all",),
}


@dataclass(frozen=True)
class Steering:
    """How one row is steered.

    Attributes:
        positions: of the edits, see `positions_of`; empty: not at all.
        layer: 1..n_layers.
        vector: (d_model,).
        coefficient: multiple of it.
    """

    positions: tuple[EditPositions, ...] = ()
    layer: int = 0
    vector: Tensor | None = None
    coefficient: float = 0.0

    @classmethod
    def continuous(cls, layer: int, vector: Tensor, coefficient: float, tokens: ContinuousTokens) -> Steering:
        """Steering of every token that is written."""
        return cls(_CONTINUOUS[tokens], layer, vector, coefficient)

    @classmethod
    def single(cls, layer: int, vector: Tensor, coefficient: float, tokens: SingleTokens) -> Steering:
        """Steering of the prompt alone, which is read once."""
        return cls((tokens,), layer, vector, coefficient)


def edits_of(rows: Sequence[Steering], d_model: int) -> list[ResidualEdit]:
    """One edit per layer and kind of tokens that occurs; rows of others have coefficient 0 in it."""
    places = sorted({(row.layer, position) for row in rows for position in row.positions})
    edits = []
    for layer, position in places:
        here = [row.layer == layer and position in row.positions for row in rows]
        vectors, coefficients = torch.zeros(len(rows), d_model), torch.zeros(len(rows))
        for at, (row, own) in enumerate(zip(rows, here, strict=True)):
            if own:
                assert row.vector is not None
                vectors[at], coefficients[at] = row.vector, row.coefficient
        edits.append(ResidualEdit(layer, vectors, coefficients, position))
    return edits


def write(
    model: LanguageModel,
    texts: Sequence[str],
    rows: Sequence[Steering],
    max_new_tokens: int,
    *,
    batch_size: int,
    seen: Callable[[int], object] = lambda rows: None,
) -> Generated:
    """Greedy answers, in the order of the texts.

    Args:
        model: the model.
        texts: of `LanguageModel.text_of`.
        rows: (text,) how each is steered.
        max_new_tokens: longest answer.
        batch_size: rows at once.
        seen: called with the number of rows done since the last call.
    """
    tokens: list[list[int]] = [[] for _ in texts]
    written, finished = [""] * len(texts), [False] * len(texts)
    # Rows of similar length and the same place side by side: less padding, fewer edits per batch.
    lengths = model.encode(list(texts)).lengths.tolist()
    order = sorted(range(len(texts)), key=lambda i: (rows[i].layer, rows[i].positions, lengths[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        edits = edits_of([rows[i] for i in chosen], model.d_model)
        found = generate(
            model, [texts[i] for i in chosen], max_new_tokens, edits=edits, batch_size=batch_size
        )
        for place, i in enumerate(chosen):
            tokens[i], written[i], finished[i] = found.tokens[place], found.texts[place], found.finished[place]
        seen(len(chosen))
    return Generated(tokens, written, finished)


@torch.no_grad()
def likelihoods(
    model: LanguageModel,
    texts: Sequence[str],
    continuations: Sequence[Sequence[int]],
    rows: Sequence[Steering],
    *,
    batch_size: int,
) -> list[float]:
    """Log-probability of a continuation of every text, in nats, summed over its tokens.

    Args:
        model: the model.
        texts: of `LanguageModel.text_of`.
        continuations: (text,) token ids, at least one each.
        rows: (text,) how each is steered; the continuation counts as generated.
        batch_size: rows at once.
    """
    found = [0.0] * len(texts)
    for chosen, part in model.encode(list(texts)).parts(batch_size):
        places = chosen.tolist()
        own = [list(continuations[i]) for i in places]
        edits = edits_of([rows[i] for i in places], model.d_model)
        sums = _sums(model, part, own, [edit.to(model.device) for edit in edits])
        for i, value in zip(places, sums.tolist(), strict=True):
            found[i] = value
    return found


def _sums(
    model: LanguageModel, part: EncodedBatch, continuations: list[list[int]], edits: Sequence[ResidualEdit]
) -> Tensor:
    """(row,) summed log-probabilities: the prompts are read, then the continuations, padded behind."""
    mask, cache, width = part.attention_mask.bool(), build_cache(), part.input_ids.shape[1]
    editing = Editing(edits, prompt=width)
    first = feed(model, model.embed(part.input_ids), cache, mask, part.positions, editing.next(width, mask)).last
    longest = max(map(len, continuations))
    ids = torch.tensor([row + [model.pad_id] * (longest - len(row)) for row in continuations], device=mask.device)
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in continuations], device=mask.device)
    states = first[:, -1:]
    if longest > 1:
        model.check_length(width + longest - 1)
        mask = torch.cat((mask, real[:, :-1].bool()), dim=1)
        positions = part.positions[:, -1:] + torch.arange(1, longest, device=mask.device)
        edit = editing.next(longest - 1, mask)
        rest = feed(model, model.embed(ids[:, :-1]), cache, mask, positions, edit).last
        states = torch.cat((states, rest), dim=1)
    scores = torch.log_softmax(model.logits(states).double(), dim=-1).gather(2, ids[..., None])[..., 0]
    return (scores * real).sum(dim=1)
