"""The functional rift: what a model would say without context against what the context says, layer by layer.

At a token t the *pretraining prior* is the model's own continuation of t when it stands alone; the *in-context prior*
are the tokens that followed t at its earlier occurrences in the text. The logit lens (final norm and unembedding on the
residual stream of a layer) gives each of them a probability at every layer; where the second overtakes the first is the
*crossing depth*. A position counts only where both priors exist and share no token.

Knows nothing about tasks or kinds of positions: a caller averages the rows that it calls one kind. Intervals come from
resampling items: `crossing_depth` takes arrays and is cheap. Source: Dutta et al. 2024, arXiv 2402.18312 (crossing at
half depth).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.cache import build_cache
from lm.errors import UserError
from lm.forward import feed
from lm.model import LanguageModel
from lm.residual import read_residual
from lm.text import EncodedBatch, left_padded

__all__ = ["Rift", "context_prior", "crossing_depth", "pretraining_prior", "rift"]


@dataclass(frozen=True)
class Rift:
    """Probabilities of both priors at the positions where they can be told apart.

    Attributes:
        item, position: (row,) text, and token of the text from 0.
        pretraining, context: (row, layer 0..n_layers) probability of the prior's tokens by the logit lens.
    """

    item: Tensor
    position: Tensor
    pretraining: Tensor
    context: Tensor

    def by_item(self, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Means over the (chosen) positions of each item: (item,) numbers, (item, layer) of both priors.

        Args:
            chosen: (row,) bool, the positions of one kind; None: all.
        """
        rows = torch.ones(len(self.item), dtype=torch.bool) if chosen is None else chosen.bool()
        items = self.item[rows].unique()
        means = [
            torch.stack([values[rows & (self.item == i)].mean(0) for i in items])
            if len(items)
            else values.new_zeros(0, values.shape[1])
            for values in (self.pretraining, self.context)
        ]
        return items, means[0], means[1]


@torch.no_grad()
def pretraining_prior(
    model: LanguageModel, tokens: Sequence[int], before: Sequence[int] = (), top: int = 1, batch_size: int = 64
) -> dict[int, tuple[int, ...]]:
    """The model's own most probable continuations of single tokens.

    Args:
        model: the model.
        tokens: ids.
        before: ids before the token, such as the one that begins every text; nothing else is context.
        top: how many continuations.
        batch_size: tokens at once; changes nothing.
    """
    if top < 1:
        raise UserError(f"top must be 1 or more, got {top}")
    distinct = sorted(set(tokens))
    found: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(distinct), batch_size):
        part = distinct[start : start + batch_size]
        batch = left_padded([[*before, token] for token in part], model.pad_id).to(model.device)
        last = feed(model, model.embed(batch.input_ids), build_cache(), batch.attention_mask, batch.positions).last
        best = model.logits(last[:, -1]).topk(top, dim=-1).indices
        found |= {token: tuple(row) for token, row in zip(part, best.tolist(), strict=True)}
    return found


def context_prior(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """For every position of a text the tokens that followed its token at earlier occurrences, distinct, in order."""
    followers: dict[int, list[int]] = {}
    found: list[tuple[int, ...]] = []
    for i, token in enumerate(ids):
        if i:
            known = followers.setdefault(ids[i - 1], [])
            if token not in known:
                known.append(token)
        found.append(tuple(followers.get(token, ())))
    return found


@torch.no_grad()
def rift(
    model: LanguageModel,
    batch: EncodedBatch,
    prior: Mapping[int, Sequence[int]],
    chosen: Tensor | None = None,
    batch_size: int = 1,
) -> Rift:
    """Probabilities of both priors at every layer.

    Args:
        model: the model.
        batch: the texts.
        prior: token id -> its pretraining prior; positions of other tokens do not count.
        chosen: (item, column) bool, columns of `batch` that count; None: all.
        batch_size: texts at once; bounds memory and changes nothing.

    Raises:
        ValueError: `chosen` of another shape.
    """
    mask = batch.attention_mask.bool().cpu()
    if chosen is not None and chosen.shape != mask.shape:
        raise UserError(f"chosen must be {tuple(mask.shape)} like the batch, got {tuple(chosen.shape)}")
    item: list[int] = []
    position: list[int] = []
    pretraining: list[Tensor] = []
    context: list[Tensor] = []
    for start in range(0, len(batch), batch_size):
        rows = list(range(start, min(start + batch_size, len(batch))))
        states = read_residual(model, batch.select(torch.tensor(rows, device=batch.input_ids.device)), "all")
        for row in rows:
            first = int((~mask[row]).sum())
            ids = batch.input_ids[row, first:].tolist()
            for place, followers in enumerate(context_prior(ids)):
                own = tuple(prior.get(ids[place], ()))
                if not own or not followers or set(own) & set(followers):
                    continue
                if chosen is not None and not bool(chosen[row, first + place]):
                    continue
                x = states[row - start, first + place]
                said = model.logits(model.final_norm(x)).double().softmax(-1)  # (layer, vocab)
                item.append(row)
                position.append(place)
                pretraining.append(said[:, list(own)].sum(-1).cpu())
                context.append(said[:, list(followers)].sum(-1).cpu())
    empty = torch.zeros(0, model.n_layers + 1, dtype=torch.float64)
    return Rift(
        torch.tensor(item, dtype=torch.long),
        torch.tensor(position, dtype=torch.long),
        torch.stack(pretraining) if pretraining else empty,
        torch.stack(context) if context else empty,
    )


def crossing_depth(pretraining: Tensor, context: Tensor, rows: Tensor | None = None) -> Tensor:
    """Layer at which the in-context prior overtakes the pretraining prior for good, of means over items.

    The layer is interpolated between the last one where the pretraining prior leads and the next; 0 where it never
    leads, nan where it leads (or ties) to the end.

    Args:
        pretraining, context: (item, layer) probabilities.
        rows: (resample, item) items of each resample; None: the items themselves.

    Returns:
        (resample,) layers, or () without `rows`.

    Raises:
        ValueError: arrays of different shapes, or no items.
    """
    if pretraining.shape != context.shape or pretraining.dim() != 2 or not len(pretraining):
        raise UserError(
            f"both priors must be (item, layer) with at least one item, got {tuple(pretraining.shape)} and "
            f"{tuple(context.shape)}"
        )
    gap = (context - pretraining).double()
    mean = (gap[None] if rows is None else gap[rows]).mean(1)  # (resample, layer)
    layers = torch.arange(mean.shape[1], dtype=torch.float64)
    behind = mean <= 0
    last = torch.where(behind, layers, torch.tensor(-1.0)).max(-1).values.long()
    follows = (last + 1).clamp(max=mean.shape[1] - 1)
    low = mean.gather(1, last.clamp(min=0)[:, None])[:, 0]
    high = mean.gather(1, follows[:, None])[:, 0]
    step = torch.where(high > low, -low / (high - low).clamp(min=1e-300), torch.zeros_like(low))
    depth = last + step
    depth = torch.where(last < 0, torch.zeros_like(depth), depth)
    depth = torch.where(last == mean.shape[1] - 1, torch.full_like(depth, torch.nan), depth)
    return depth[0] if rows is None else depth
