"""Control vectors from pairs of texts: every method and every layer out of one pass over the model.

    pairs = fit_contrasts(model, right, wrong)                 # states at the last token of every text
    pairs.vector("contrastive"), pairs.vector("pca-contrast", centred=False)
    pairs = fit_runs(model, slow, fast, tokens="generated")    # means over the tokens of the model's own answers
    pairs.vector("contrastive")                                # the chain-of-thought vector

With x+ and x- the states of a pair at one layer, and d = x+ - x-:

method         direction
reading        mean of x+
contrastive    mean of d
pca-contrast   first principal component of d
pca-reading    first principal component of x+

Every pair weighs the same, however long its texts are. Reading and contrastive vectors are not normalised. A principal
component has no sign of its own: it gets the one for which the positive text of most pairs lies further along it than
the negative one. Published vectors are centred (the mean is taken away first, so what all pairs share is lost) and
their signs are arbitrary.

Sources: Højer, Jarvis, Heinrich 2025, arXiv 2504.19483; Zhang, Viteri 2025, arXiv 2409.14026.

Knows nothing about tasks, or what makes a text positive.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from codi import __version__
from lm.errors import UserError
from lm.model import LanguageModel
from lm.residual import Tokens, read_residual
from lm.terms import VECTOR_METHODS, RunTokens, VectorMethod, VectorScale
from lm.text import EncodedBatch, left_padded
from steering.control_vectors import ControlVector, VectorOrigin
from steering.directions import generator

__all__ = ["PairStatistics", "Written", "fit_contrasts", "fit_runs", "origin_of", "pooled"]

VOTERS = 512
"""Pairs whose votes fix the sign once there are too many to keep: a uniform sample of them."""


def origin_of(model: LanguageModel) -> VectorOrigin:
    """What a vector of this model says about it."""
    kind = str(model.base.config.get_text_config().model_type)
    made_by = f"codi-steering {__version__}"
    return VectorOrigin(model.name, model.weights_hash, kind, model.n_layers, made_by=made_by)


class _Moments:
    """Mean and second moment of rows (row, layer, d_model), in float64 on the CPU.

    Rows are kept while there are no more of them than `keep`; from then on d_model² sums per layer and a uniform sample
    of the rows, so memory does not grow.
    """

    def __init__(self, keep: int, seed: int) -> None:
        self.count = 0
        self._keep, self._seed = keep, seed
        self._sum: Tensor | None = None
        self._gram: Tensor | None = None
        self._kept: list[Tensor] = []
        self._keys: list[float] = []

    def add(self, rows: Tensor, indices: Sequence[int]) -> None:
        self.count += len(rows)
        self._sum = rows.sum(0) if self._sum is None else self._sum + rows.sum(0)
        if self._gram is not None:
            self._gram += torch.einsum("nld,nle->lde", rows, rows)
        self._kept.append(rows)
        self._keys += [generator(self._seed, "voter", index).random() for index in indices]
        if self._gram is None and self.count > self._keep:
            all_rows = self.kept
            self._gram = torch.einsum("nld,nle->lde", all_rows, all_rows)
        if self._gram is not None and len(self._keys) > VOTERS:
            chosen = np.argsort(self._keys, kind="stable")[:VOTERS].tolist()
            self._kept, self._keys = [self.kept[chosen]], [self._keys[i] for i in chosen]

    @property
    def kept(self) -> Tensor:
        """(row, layer, d_model) all rows, or a sample of them."""
        return torch.cat(self._kept)

    @property
    def mean(self) -> Tensor:
        """(layer, d_model)."""
        assert self._sum is not None
        return self._sum / self.count

    def principal(self, layer: int, centred: bool) -> tuple[Tensor, float]:
        """Unit vector (d_model,) of the first principal component at an index of the layer axis, and its share of the
        variance; ValueError where there is none."""
        offset = self.mean[layer] if centred else torch.zeros_like(self.mean[layer])
        if self._gram is None:
            rows = self.kept[:, layer]
            raw = float(rows.square().sum())
            rows = rows - offset
            wide = len(rows) < rows.shape[1]
            matrix = rows @ rows.T if wide else rows.T @ rows
        else:
            rows, wide = torch.empty(0), False
            raw = float(self._gram[layer].trace())
            matrix = self._gram[layer] - self.count * torch.outer(offset, offset)
        total = float(matrix.trace())
        if total <= 1e-20 * raw or total <= 0:
            raise UserError("a principal component needs two or more pairs that differ, and these do not")
        last = len(matrix) - 1
        values, vectors = eigh(matrix.numpy(), subset_by_index=[last, last])
        direction = torch.from_numpy(np.ascontiguousarray(vectors[:, 0]))
        direction = rows.T @ direction if wide else direction
        return direction / direction.norm(), float(values[0]) / total


class PairStatistics:
    """Adds states of pairs batch by batch; `vector` and `shuffled` can be asked for at any time.

    Args:
        origin: of the vectors: the model, which tokens, of what texts (`n`, `method` and what follows are set here).
        layers: that the rows are of, in their order.
        draws: shuffled vectors to collect.
        seed: of these.
        keep: pairs that are kept as they are; None: as many as the model is wide, where sums begin to be smaller.
    """

    def __init__(
        self, origin: VectorOrigin, layers: Sequence[int], draws: int = 0, seed: int = 0, keep: int | None = None
    ) -> None:
        if draws < 0:
            raise UserError(f"draws must be 0 or more, got {draws}")
        self._origin, self._layers, self._draws, self._seed, self._keep = origin, tuple(layers), draws, seed, keep
        self._positive: _Moments | None = None
        self._difference: _Moments | None = None
        self._swapped: Tensor | None = None

    @property
    def n(self) -> int:
        """Pairs added."""
        return 0 if self._positive is None else self._positive.count

    def update(self, positive: Tensor, negative: Tensor | None, indices: Sequence[int]) -> None:
        """Add pairs.

        Args:
            positive, negative: (pair, layer, d_model) states; negative None: readings only, then in every update.
            indices: number of every pair, on which its shuffling depends (not on batches).

        Raises:
            ValueError: shapes that do not fit each other or the layers, or negatives only sometimes.
        """
        x = positive.detach().double().cpu()
        if x.dim() != 3 or x.shape[1] != len(self._layers) or len(x) != len(indices) or not len(x):
            wanted = f"({len(indices)}, {len(self._layers)}, d_model)"
            raise UserError(f"states must be {wanted}, one or more pairs, got {tuple(x.shape)}")
        if self._positive is not None and (negative is None) != (self._difference is None):
            raise UserError("either every pair has a negative text or none has")
        keep = x.shape[2] if self._keep is None else self._keep
        if self._positive is None:
            self._positive = _Moments(keep, self._seed)
        self._positive.add(x, indices)
        if negative is None:
            return
        d = x - negative.detach().double().cpu()
        if self._difference is None:
            self._difference = _Moments(keep, self._seed)
        self._difference.add(d, indices)
        if self._draws:
            signs = [generator(self._seed, "swap", i).choice([-1.0, 1.0], self._draws) for i in indices]
            swapped = torch.einsum("nk,nld->kld", torch.from_numpy(np.stack(signs)), d)
            self._swapped = swapped if self._swapped is None else self._swapped + swapped

    def vector(self, method: VectorMethod, *, centred: bool = True, scale: VectorScale = "mean") -> ControlVector:
        """The control vector of a method, see this module.

        Args:
            method: "reading", "contrastive", "pca-contrast" or "pca-reading".
            centred: PCA after the mean was taken away (published), or of the states as they are.
            scale: of principal components, "mean": as long as the mean (of d, of x+) is, so that coefficients mean
                about the same as for the other methods; "unit": 1.

        Raises:
            ValueError: an unknown name, nothing added, a contrast without negative texts, or a principal component of
                pairs that do not differ.
        """
        if method not in VECTOR_METHODS:
            raise UserError(f"method must be one of {', '.join(VECTOR_METHODS)}, got {method!r}")
        if scale not in get_args(VectorScale):
            raise UserError(f"scale must be one of {', '.join(get_args(VectorScale))}, got {scale!r}")
        contrast = method in ("contrastive", "pca-contrast")
        moments = self._moments(contrast, f"the method {method}")
        origin = replace(self._origin, method=method, n=moments.count)
        mean = moments.mean
        if not method.startswith("pca"):
            return ControlVector({layer: mean[i] for i, layer in enumerate(self._layers)}, origin)
        directions, explained = {}, {}
        for i, layer in enumerate(self._layers):
            direction, share = moments.principal(i, centred)
            direction = direction * self._sign(direction, i)
            directions[layer] = direction * (float(mean[i].norm()) if scale == "mean" else 1.0)
            explained[layer] = share
        return ControlVector(directions, replace(origin, centred=centred, scale=scale, explained=explained))

    def shuffled(self, draw: int, like: ControlVector) -> ControlVector:
        """The mean difference after the two texts of each pair were swapped by the toss of a coin, with the norms of
        `like`: what the same states give where nobody knows which text is the positive one.

        Args:
            draw: 0-based.
            like: vector to match, layer by layer.

        Raises:
            ValueError: a draw that was not collected, or no negative texts.
        """
        count = self._moments(True, "a shuffled vector").count
        if not 0 <= draw < self._draws:
            raise UserError(f"{self._draws} shuffled vectors were collected, numbered from 0, got {draw}")
        assert self._swapped is not None
        mean = self._swapped[draw] / count
        origin = replace(self._origin, method="shuffled", n=count)
        found = ControlVector({layer: mean[i] for i, layer in enumerate(self._layers)}, origin)
        return found.only(like.layers).scaled(like)

    def _moments(self, contrast: bool, what: str) -> _Moments:
        if self._positive is None:
            raise UserError("a control vector needs at least one pair, none was added")
        if not contrast:
            return self._positive
        if self._difference is None:
            raise UserError(f"{what} needs negative texts, none were given")
        return self._difference

    def _sign(self, direction: Tensor, layer: int) -> float:
        """1 or -1: the majority of pairs (of texts, where there are no negatives); in a tie the mean decides."""
        moments = self._difference or self._positive
        assert moments is not None
        along = moments.kept[:, layer] @ direction
        votes = int((along > 0).sum() - (along < 0).sum())
        return -1.0 if votes < 0 or (votes == 0 and float(moments.mean[layer] @ direction) < 0) else 1.0


# --- From texts -------------------------------------------------------------------------------------------------------


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
            states.append(read_residual(model, part, tokens, some, pairs._layers))
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
