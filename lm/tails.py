"""Rows that differ from the last token of a text on: the text before it is shared, in all layers.

    with Tail(model, stem, layer, rows, editing, "shared") as tail:
        write_tokens(model, tail.past, tail.states, …)

The last token is run through the blocks above a layer only, once per row; what stands before it is one cache per text
("shared", `lm.cache.BranchCache`) or a copy of it per row ("clones", for models whose attention does more than that
cache knows).

Knows nothing about grids.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lm.cache import BranchCache, branch_attention, clone_cache, crop_cache, select_cache
from lm.edits import Editing
from lm.generate import OwnPast, SharedPast
from lm.model import LanguageModel
from lm.partial import Stem, feed_above, feed_kept, join_caches
from lm.terms import Engine
from lm.text import EncodedBatch

__all__ = ["Tail", "can_share", "extend"]


def can_share(model: LanguageModel) -> bool:
    """Whether `BranchCache` can do the model's attention: exchangeable, no capped scores, no sinks."""
    base: Any = model.base
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None
    sinks = any(name.endswith(".sinks") for name, _ in base.named_parameters())
    return bool(getattr(base, "_supports_attention_backend", False)) and not capped and not sinks


def extend(model: LanguageModel, stem: Stem, tokens: Tensor) -> Stem:
    """Texts with one more token (text,) each, unedited: residual stream of that token only, caches of the whole."""
    batch = stem.batch
    mask = torch.cat((batch.attention_mask.bool(), torch.ones_like(tokens, dtype=torch.bool)[:, None]), dim=1)
    longer = EncodedBatch(torch.cat((batch.input_ids, tokens[:, None]), dim=1), mask)
    cache = clone_cache(stem.cache)
    positions = longer.positions[:, -1:]
    kept, last = feed_kept(model, model.embed(tokens[:, None]), cache, mask, positions, set(stem.residual))
    return Stem(longer, kept, cache, last)


class Tail:
    """Rows with their last token edited, ready to go on; to be entered while they are used.

    Args:
        model: the model.
        stem: of the texts, run to the top.
        layer: of the edit; blocks above it are run.
        rows: (row,) the text of every row, ascending, on the model's device.
        editing: of the rows, at the last token of the stem.
        engine: a prefix per text, or a copy per row.
        longest: no position id will reach this.

    Attributes:
        past: of the rows, last token included, with `editing`.
        states: (row, 1, d_model) last states of that token.
    """

    past: OwnPast | SharedPast
    states: Tensor

    def __init__(
        self,
        model: LanguageModel,
        stem: Stem,
        layer: int,
        rows: Tensor,
        editing: Editing,
        engine: Engine,
        longest: int,
    ) -> None:
        self._model, self._stem, self._layer, self._rows = model, stem, layer, rows
        self._editing, self._engine, self._longest = editing, engine, longest
        self._inside = ExitStack()

    def __enter__(self) -> Tail:
        if self._engine == "shared":
            self._share()
        else:
            self._clone()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inside.close()

    def _feed(self, cache: Any, mask: Tensor | None) -> None:
        x = self._stem.residual[self._layer][self._rows, -1:]
        positions = self._stem.batch.positions[self._rows, -1:]
        edit = self._editing.next(1)
        self.states = feed_above(self._model, self._layer, x, cache, mask, positions, edit)

    def _clone(self) -> None:
        whole = select_cache(self._stem.cache, self._rows)
        width = self._stem.batch.input_ids.shape[1]
        mask = self._stem.batch.attention_mask[self._rows].bool()
        cache = crop_cache(whole, width - 1)  # the blocks below take their last slot back afterwards
        self._feed(cache, mask)
        self.past = OwnPast(self._model, join_caches(whole, cache, self._layer), mask, editing=self._editing)

    def _share(self) -> None:
        batch = self._stem.batch
        mask, width = batch.attention_mask.bool().cpu(), batch.input_ids.shape[1]
        cache = BranchCache(
            self._stem.cache,
            prompts=torch.arange(len(mask)),
            columns=torch.arange(width - 1),
            visible=mask[:, : width - 1],
            groups=self._rows.cpu(),
            first_positions=mask.sum(dim=1) - width,
            longest=self._longest,
        )
        cache.positions = batch.positions[self._rows, -1:]
        for block, entry in enumerate(self._stem.cache.layers[: self._layer]):
            kept: Any = entry
            cache.update(kept.keys[self._rows, :, -1:], kept.values[self._rows, :, -1:], block)
        self._inside.enter_context(branch_attention(self._model.decoder, cache))
        self._feed(cache, None)
        self.past = SharedPast(self._model, cache, self._editing)
