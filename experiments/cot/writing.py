"""Answers under a chain-of-thought vector, written by the shared engine of steered cells (lm/steered.py).

Continuous steering adds c times the vector at every token that the model writes and (unless asked otherwise) at the
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
from lm.model import LanguageModel
from lm.steered import Cell, steer_cells
from lm.terms import EditPositions
from lm.text import EncodedBatch
from steering.control_vectors import ControlVector

__all__ = ["Answer", "Steering", "likelihoods", "positions_of", "write"]


@dataclass(frozen=True)
class Steering:
    """How texts are steered.

    Attributes:
        layer: 1..n_layers.
        vector: that is added; None: none, the model as it is.
        coefficient: multiple of it.
    """

    layer: int = 1
    vector: ControlVector | None = None
    coefficient: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What was written: text, number of tokens before the end of text, whether that end came."""

    text: str
    tokens: int
    finished: bool


def positions_of(way: str, continuous: ContinuousTokens, single: SingleTokens) -> EditPositions:
    """Tokens that a way of steering edits, in the engine's words, which are those of the options."""
    return continuous if way == "continuous" else single


def write(
    model: LanguageModel,
    texts: Sequence[str],
    steerings: Sequence[Steering],
    positions: EditPositions,
    max_new_tokens: int,
    *,
    batch_size: int,
    seen: Callable[[int], object] = lambda rows: None,
) -> list[list[Answer]]:
    """Greedy answers of every text under every steering.

    Args:
        model: the model.
        texts: of `LanguageModel.text_of`.
        steerings: one or more.
        positions: tokens that are edited.
        max_new_tokens: longest answer.
        batch_size: rows at once.
        seen: called with the number of rows done since the last call.

    Returns:
        (steering, text).
    """
    vectors = torch.zeros(len(steerings), model.n_layers + 1, model.d_model)
    cells = []
    for index, one in enumerate(steerings):
        if one.vector is not None:
            vectors[index, one.layer] = one.vector[one.layer]
        cells.append(Cell(one.layer, index, one.coefficient if one.vector is not None else 0.0))
    found: dict[tuple[int, int], Answer] = {}
    for rows in steer_cells(
        model, model.encode(list(texts)), vectors, cells, positions, max_new_tokens=max_new_tokens, keep_logits=False,
        batch_size=batch_size,
    ):  # fmt: skip
        for place, key in enumerate(zip(rows.cells.tolist(), rows.rows.tolist(), strict=True)):
            found[key] = Answer(rows.texts[place], len(rows.tokens[place]), rows.finished[place])
        seen(len(rows))
    return [[found[cell, text] for text in range(len(texts))] for cell in range(len(cells))]


@torch.no_grad()
def likelihoods(
    model: LanguageModel,
    texts: Sequence[str],
    continuations: Sequence[Sequence[int]],
    steering: Steering,
    positions: EditPositions,
    *,
    batch_size: int,
) -> list[float]:
    """Log-probability of a continuation of every text, in nats, summed over its tokens.

    Args:
        model: the model.
        texts: of `LanguageModel.text_of`.
        continuations: (text,) token ids, at least one each; they count as generated.
        steering: of all of them.
        positions: tokens that are edited.
        batch_size: rows at once.
    """
    edits = []
    if steering.vector is not None:
        edits = [ResidualEdit(steering.layer, steering.vector[steering.layer], steering.coefficient, positions)]
    edits = [edit.to(model.device) for edit in edits]
    found = [0.0] * len(texts)
    for chosen, part in model.encode(list(texts)).parts(batch_size):
        places = chosen.tolist()
        sums = _sums(model, part, [list(continuations[i]) for i in places], edits)
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
