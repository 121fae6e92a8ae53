"""Reading the residual stream of texts: at the last token, averaged over chosen tokens, or everywhere.

Layers are those of `lm`: 0 is what enters the first block, l what block l hands on, here without exception before the
final norm (also the last one). What is not asked for is never kept, so reading the last token of long texts takes
little memory. `mean_residual` streams batches into means in float64.

Knows nothing about what the texts are or what becomes of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lm.cache import build_cache
from lm.errors import UserError
from lm.forward import feed, tapped
from lm.model import LanguageModel
from lm.text import EncodedBatch

__all__ = ["StreamingMean", "Tokens", "mean_residual", "read_residual"]

Tokens = Literal["last", "mean", "all"]


@torch.no_grad()
def read_residual(
    model: LanguageModel,
    batch: EncodedBatch,
    tokens: Tokens = "last",
    chosen: Tensor | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Residual stream of texts.

    Args:
        model: the model.
        batch: the texts.
        tokens: "last" (of every text), "mean" (over the chosen tokens) or "all".
        chosen: (batch, position) bool, which tokens "mean" is taken over; None: every real one.
        layers: of 0..n_layers, in the order of the result; None: all.

    Returns:
        (batch, layer, d_model) in the model's dtype for "last", float64 for "mean"; (batch, position, layer, d_model)
        for "all", where padding holds numbers without meaning.

    Raises:
        ValueError: an unknown name, layers that the model does not have, tokens chosen that are padding, or none in
            some row.
    """
    if tokens not in get_args(Tokens):
        raise UserError(f"tokens must be one of {', '.join(get_args(Tokens))}, got {tokens!r}")
    wanted = tuple(range(model.n_layers + 1)) if layers is None else tuple(layers)
    for layer in wanted:
        if not 0 <= layer <= model.n_layers:
            raise UserError(f"layer must be in 0..{model.n_layers}, got {layer}")
    batch = batch.to(model.device)
    mask = batch.attention_mask.bool()
    weights = mask if chosen is None else chosen.to(model.device).bool()
    if weights.shape != mask.shape:
        raise UserError(f"chosen must be {tuple(mask.shape)} like the batch, got {tuple(weights.shape)}")
    if bool((weights & ~mask).any()):
        raise UserError("chosen tokens must be tokens of the text, some of them are padding")
    if tokens == "mean" and not bool(weights.any(dim=1).all()):
        raise UserError("a mean needs at least one chosen token in every text")
    share = weights.double() / weights.sum(dim=1, keepdim=True).clamp(min=1)
    read: dict[int, Tensor] = {}

    def see(layer: int, x: Tensor) -> None:
        if layer not in wanted:
            return
        if tokens == "mean":
            read[layer] = torch.einsum("bp,bpd->bd", share, x.double())
        else:
            read[layer] = x[:, -1] if tokens == "last" else x

    model.check_length(int(batch.lengths.max()))
    with tapped(model.blocks, see=see):
        feed(model, model.embed(batch.input_ids), build_cache(), mask, batch.positions)
    return torch.stack([read[layer] for layer in wanted], dim=-2)


class StreamingMean:
    """Mean of rows that come batch by batch, in float64 on the CPU; nothing else of them is kept."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Add rows (row, …), all of the same shape as before."""
        total = values.detach().double().sum(dim=0).cpu()
        if self._sum is not None and self._sum.shape != total.shape:
            raise UserError(f"rows must be {tuple(self._sum.shape)} as before, got {tuple(total.shape)}")
        self._sum = total if self._sum is None else self._sum + total
        self.count += len(values)

    @property
    def mean(self) -> Tensor:
        """(…) float64; ValueError before any row was added."""
        if self._sum is None or not self.count:
            raise UserError("a mean needs at least one row, none was added")
        return self._sum / self.count


def mean_residual(
    model: LanguageModel,
    batch: EncodedBatch,
    tokens: Tokens = "last",
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Mean residual stream over texts, every text weighing the same.

    Args:
        model: the model.
        batch: all of the texts.
        tokens: "last" or "mean" (over a text's real tokens).
        layers: of 0..n_layers; None: all.
        batch_size: texts at once; does not change the mean.

    Returns:
        (layer, d_model) float64 on the CPU.
    """
    if tokens == "all":
        raise UserError("a mean over texts needs one state per text: tokens must be last or mean, got 'all'")
    mean = StreamingMean()
    for _, part in batch.parts(batch_size):
        mean.add(read_residual(model, part, tokens, layers=layers))
    return mean.mean
