"""Control vectors from pairs of texts: every method and every layer out of one pass over the model.

    pairs = fit_contrasts(model, right, wrong)                 # states at the last token of every text
    pairs.vector("contrastive"), pairs.vector("pca-contrast", centred=False)
    pairs = fit_runs(model, slow, fast, tokens="generated")    # means over the tokens of the model's own answers
    pairs.vector("contrastive")                                # the chain-of-thought vector

What the methods are stands in pair_statistics.py. Every pair weighs the same, however long its texts are.

Sources: Højer, Jarvis, Heinrich 2025, arXiv 2504.19483; Zhang, Viteri 2025, arXiv 2409.14026.

Knows nothing about tasks, or what makes a text positive.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from codi import __version__
from lm.errors import UserError
from lm.model import LanguageModel
from lm.residual import Tokens, read_residual
from lm.terms import RunTokens
from lm.text import EncodedBatch, left_padded
from steering.control_vectors import ControlVector, VectorOrigin
from steering.pair_statistics import PairStatistics

__all__ = ["Written", "fit_contrasts", "fit_runs", "origin_of", "pooled"]


def origin_of(model: LanguageModel) -> VectorOrigin:
    """What a vector of this model says about it."""
    kind = str(model.base.config.get_text_config().model_type)
    made_by = f"codi-steering {__version__}"
    return VectorOrigin(model.name, model.weights_hash, kind, model.n_layers, made_by=made_by)


@dataclass(frozen=True)
class Written:
    """An answer as the model wrote it: token ids of the prompt, and of what it wrote after it."""

    prompt: Sequence[int]
    written: Sequence[int]


def fit_contrasts(
    model: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    draws: int = 0,
    seed: int = 0,
    seen: Callable[[int], None] | None = None,
) -> PairStatistics:
    """States at the last token of every text, which is never padding.

    Args:
        model: that reads.
        positive, negative: texts as they are (with the answer: the last token is the answer's last); text i of both is
            a pair. negative None: readings only.
        layers: of 1..n_layers; None: all.
        batch_size: pairs at once; changes nothing but rounding.
        draws, seed: shuffled vectors to collect, and their seed.
        seen: called with the number of pairs done since the last call.

    Raises:
        ValueError: no texts, not as many of the one as of the other, or layers that the model does not have.
    """
    if negative is not None and len(negative) != len(positive):
        raise UserError(f"positive and negative texts must be as many, got {len(positive)} and {len(negative)}")
    first, second = model.encode(positive), None if negative is None else model.encode(negative)
    digest = _digest([list(positive), None if negative is None else list(negative)])
    origin = replace(origin_of(model), tokens="last", data_digest=digest)
    pairs = PairStatistics(origin, _layers(model, layers), draws, seed)
    _read_pairs(model, pairs, (first, None), None if second is None else (second, None), "last", batch_size, seen)
    return pairs


def fit_runs(
    model: LanguageModel,
    first: Sequence[Written],
    second: Sequence[Written],
    tokens: RunTokens = "generated",
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    draws: int = 0,
    seed: int = 0,
    seen: Callable[[int], None] | None = None,
) -> PairStatistics:
    """Means over chosen tokens of two answers to every question, such as a slow and an immediate one.

    Answer i of both is a pair. Every question weighs the same, however long its answers are (means over tokens first,
    then over questions). The paper does not say which tokens it reads; the choice is kept in the vector.

    Args:
        model: that reads.
        first, second: answers, tokens and all; `second` is taken away from `first`.
        tokens: "generated" (what was written), "all" (prompt and what was written) or "last-prompt" (the last token of
            the prompt; nothing that was written is read).
        layers, batch_size, draws, seed, seen: as in `fit_contrasts`.

    Raises:
        ValueError: no answers, not as many first as second ones, an unknown name, or an answer without such a token.

    Source: Zhang, Viteri 2025, arXiv 2409.14026.
    """
    if tokens not in get_args(RunTokens):
        raise UserError(f"tokens must be one of {', '.join(get_args(RunTokens))}, got {tokens!r}")
    if len(first) != len(second) or not first:
        raise UserError(f"both sides need one answer per question, got {len(first)} and {len(second)}")
    digest = _digest([[list(map(int, (*run.prompt, -1, *run.written))) for run in side] for side in (first, second)])
    origin = replace(origin_of(model), tokens=tokens, data_digest=digest)
    pairs = PairStatistics(origin, _layers(model, layers), draws, seed)
    sides = [_chosen(model, side, tokens) for side in (first, second)]
    _read_pairs(model, pairs, sides[0], sides[1], "mean", batch_size, seen)
    return pairs


def _chosen(model: LanguageModel, runs: Sequence[Written], tokens: RunTokens) -> tuple[EncodedBatch, Tensor]:
    """Answers as a batch, and (batch, position) which of their tokens are read."""
    rows, flags = [], []
    for index, run in enumerate(runs):
        before, after = len(run.prompt), len(run.written)
        if not before or (tokens == "generated" and not after):
            lacking = "token in its prompt" if not before else "written token"
            raise UserError(f"answer {index + 1} has no {lacking}: tokens={tokens!r} cannot be read")
        shown = after if tokens != "last-prompt" else 0
        rows.append([*run.prompt, *run.written[:shown]])
        start = {"generated": before, "all": 0, "last-prompt": before - 1}[tokens]
        flags.append([0] * start + [1] * (before + shown - start))
    return left_padded(rows, model.pad_id), left_padded(flags, 0).input_ids.bool()


def _read_pairs(
    model: LanguageModel,
    pairs: PairStatistics,
    first: tuple[EncodedBatch, Tensor | None],
    second: tuple[EncodedBatch, Tensor | None] | None,
    tokens: Tokens,
    batch_size: int,
    seen: Callable[[int], None] | None,
) -> None:
    """Read both sides in batches of pairs of similar length, and add them."""
    if isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    lengths = first[0].lengths if second is None else torch.maximum(first[0].lengths, second[0].lengths)
    for rows in lengths.sort(stable=True).indices.split(batch_size):
        states = []
        for batch, chosen in (first,) if second is None else (first, second):
            part = batch.select(rows)
            width = int(part.lengths.max())
            part = EncodedBatch(part.input_ids[:, -width:], part.attention_mask[:, -width:])
            some = None if chosen is None else chosen[rows][:, -width:]
            states.append(read_residual(model, part, tokens, some, pairs.layers))
        pairs.update(states[0], states[1] if second is not None else None, rows.tolist())
        if seen is not None:
            seen(len(rows))


def _layers(model: LanguageModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    wanted = tuple(range(1, model.n_layers + 1)) if layers is None else tuple(layers)
    for layer in wanted:
        if not 1 <= layer <= model.n_layers:
            raise UserError(f"layers of a control vector must be in 1..{model.n_layers}, got {layer}")
    return wanted


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def pooled(vectors: Sequence[ControlVector]) -> ControlVector:
    """Mean of vectors, each weighing as much as the pairs that it was derived from: of several data sets, the vector of
    their union ("reading" and "contrastive" exactly, not principal components); without one of them, of the others.

    Raises:
        ValueError: no vectors, of different methods, tokens, layers or models, principal components, or vectors that do
            not say how many pairs they are of.
    """
    if not vectors:
        raise UserError("at least one vector is needed, got none")
    a = vectors[0].origin
    counts = []
    for vector in vectors:
        b = vector.origin
        if (b.method, b.tokens, vector.layers) != (a.method, a.tokens, vectors[0].layers):
            raise UserError("only vectors of one method, one choice of tokens and the same layers can be pooled")
        if not b.n or b.method not in ("reading", "contrastive"):
            raise UserError(f"only means over pairs can be pooled, got {b.method!r} of {b.n} pairs")
        counts.append(b.n)
    total = vectors[0] * (counts[0] / sum(counts))
    for vector, n in zip(vectors[1:], counts[1:], strict=True):
        total = total + vector * (n / sum(counts))
    digest = _digest([vector.origin.data_digest for vector in vectors])
    return ControlVector(total.directions, replace(a, n=sum(counts), data_digest=digest))
