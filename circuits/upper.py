"""The upper blocks only: many variants of a few texts, from the place on where they differ.

A variant replaces something in one block. Nothing below that block and nothing before the first edited token changes,
so neither is computed again: the tokens before are a prefix of keys and values that all variants of a text share, the
states of the tokens after come from one pass, and the blocks above run for all variants in one batch. Exact: the
numbers are those of a whole pass, up to the order of sums.

`Ground` is that one pass over texts that end alike many tokens after their prefixes; `Upper` runs variants over it
(`lm.partial` passes by the blocks below). An attention or MLP whose output is known already is replaced for the time of
a pass; afterwards, also after an error, it is as before.

Knows nothing about what is replaced, or why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuits.heads import Heads, See
from lm.cache import BranchCache, branch_attention, build_cache, cache_length, clone_cache
from lm.errors import UserError
from lm.forward import feed, tapped
from lm.partial import feed_above

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["Ground", "Upper", "replaced_forward", "shared_prefixes"]


def shared_prefixes(cache: DynamicCache, mask: Tensor, rows: Tensor, ends: Tensor) -> tuple[DynamicCache, Tensor]:
    """Prefixes of texts, moved so that all of them end in the last column.

    Args:
        cache: of whole texts.
        mask: (text, position) bool, True at their tokens; padding on the left.
        rows: (prefix,) which text.
        ends: (prefix,) column of the text after the last one that belongs to the prefix; 0: nothing does.

    Returns:
        cache and mask of the prefixes, max(ends) columns.
    """
    width = int(ends.max())
    columns = torch.arange(width, device=ends.device)[None] - width + ends[:, None]
    inside = columns >= 0
    columns = columns.clamp(min=0)

    def moved(x: Tensor) -> Tensor:  # (text, kv_head, position, d_head)
        return x.transpose(1, 2)[rows[:, None], columns].transpose(1, 2)

    layers: list[Any] = cache.layers
    found = build_cache((moved(layer.keys), moved(layer.values)) for layer in layers)
    return found, inside & mask.to(ends.device)[rows[:, None], columns]


class Ground:
    """One pass over the last tokens of texts, everything kept that variants start from.

    Args:
        heads: of the model.
        prefix: keys and values of what comes before; only read.
        mask: (text, column) bool, True at tokens of the prefix.
        ids: (text, token) the last tokens of the texts.

    Attributes:
        x: (text, token, layer 0..n_layers, d_model) residual stream.
        z: (text, token, block, head, d_head).
        mlp: (text, token, block, d_model), only where asked for.
        logits: (text, vocab) after the last token.
        prefix, mask: as given.
        grown: keys and values of prefix and tokens.
        positions: (text, token) position ids.
    """

    @torch.no_grad()
    def __init__(self, heads: Heads, prefix: DynamicCache, mask: Tensor, ids: Tensor, mlp: bool = False) -> None:
        model = heads.model
        self.heads, self.prefix, self.mask = heads, prefix, mask
        before = mask.sum(dim=1, keepdim=True)
        self.positions = before + torch.arange(ids.shape[1], device=ids.device)[None]
        model.check_length(int(self.positions.max()) + 1)
        kept: dict[str, list[Tensor]] = {"x": [], "z": [], "mlp": []}

        def keep(name: str) -> See:
            return lambda number, value: kept[name].append(value)

        self.grown = clone_cache(prefix)
        whole = torch.cat((mask, torch.ones_like(ids, dtype=torch.bool)), dim=1)
        with (
            heads.tapped(see=keep("z"), see_mlp=keep("mlp") if mlp else None),
            tapped(model.blocks, see=keep("x")),
        ):
            last = feed(model, model.embed(ids), self.grown, whole, self.positions).last
        self.x, self.z = torch.stack(kept["x"], dim=2), torch.stack(kept["z"], dim=2)
        self.mlp = torch.stack(kept["mlp"], dim=2) if mlp else None
        self.logits = model.logits(last[:, -1])

    def __len__(self) -> int:
        return self.x.shape[0]

    def upper(self, variants: int, tokens: int) -> Upper:
        """The upper blocks for so many variants of every text, over its last `tokens` tokens."""
        n = self.x.shape[1]
        if not 1 <= tokens <= n:
            raise UserError(f"variants must differ in the last 1..{n} tokens, got {tokens}")
        if tokens == n:
            return Upper(self.heads, self.prefix, self.mask, self.positions, variants)
        mask = torch.cat((self.mask, torch.ones_like(self.positions[:, : n - tokens], dtype=torch.bool)), dim=1)
        return Upper(self.heads, self.grown, mask, self.positions[:, n - tokens :], variants)


class _Passing(BranchCache):
    """Branches whose tokens are all fed in one pass, again and again: nothing of them is kept."""

    def feeding(self, positions: Tensor) -> None:
        """Take note of the position ids (row, token) of what is fed next."""
        self.positions = positions
        self._own_positions = self._to_tiles(positions)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new_keys, new_values = (self._to_tiles(x).transpose(1, 2).to(self.dtype) for x in (keys, values))
        return new_keys, new_values


class Upper:
    """The upper blocks for some variants of each of some texts: rows, the variants of a text side by side.

    Args:
        heads: of the model.
        prefix: keys and values that all variants of a text share; columns beyond those of `mask` are not seen.
        mask: (text, column) bool, True at tokens of the prefix.
        positions: (text, token) position ids of the tokens that variants run.
        variants: of every text.
    """

    def __init__(self, heads: Heads, prefix: DynamicCache, mask: Tensor, positions: Tensor, variants: int) -> None:
        texts, columns = mask.shape
        assert columns <= cache_length(prefix) or columns == 0, "a mask wider than the prefix"
        self.heads, self.model, self.variants = heads, heads.model, variants
        _ = self.model.block_outputs  # found out by a pass of its own, which must not go through branches
        self.text = torch.arange(texts, device=mask.device).repeat_interleave(variants)
        self.positions = positions[self.text]
        visible = mask.cpu()
        self._cache = _Passing(
            prefix,
            torch.arange(texts),
            torch.arange(columns),
            visible,
            self.text.cpu(),
            visible.sum(dim=1) - columns,
            int(positions.max()) + 1,
        )

    @torch.no_grad()
    def from_z(self, block: int, x: Tensor, z: Tensor, mlp: Tensor | None = None) -> Tensor:
        """Logits of variants in what heads of a block say.

        Args:
            block: 1..n_blocks.
            x: (row, token, d_model) residual stream that enters the block.
            z: (row, token, head, d_head).
            mlp: (row, token, d_model), put for the block's MLP output; None: computed.

        Returns:
            (row, vocab) after the last token.
        """
        self.heads.check_block(block)
        projected = self.heads.projections[block - 1](z.flatten(-2))
        if block == self.heads.n_blocks:  # nobody reads the other tokens any more
            x, projected = x[:, -1:], projected[:, -1:]
            mlp = None if mlp is None else mlp[:, -1:]
        with ExitStack() as stack:
            attend = self.heads.attentions[block - 1]
            stack.enter_context(replaced_forward(attend, lambda *a, **k: (projected, None)))
            if mlp is not None:
                stack.enter_context(replaced_forward(self.heads.mlps[block - 1], lambda *a, **k: mlp))
            return self._run(block, x)

    @torch.no_grad()
    def from_residual(self, layer: int, x: Tensor) -> Tensor:
        """Logits (row, vocab) of variants of the residual stream (row, token, d_model) of a layer 0..n_layers."""
        if layer == self.heads.n_blocks:
            return self.model.logits(self.model.final_norm(x[:, -1]))
        return self._run(layer + 1, x)

    @torch.no_grad()
    def _run(self, first: int, x: Tensor) -> Tensor:
        """Run blocks from `first` on over the residual stream that enters it."""
        positions = self.positions[:, -x.shape[1] :]
        self._cache.feeding(positions)
        with branch_attention(self.model.decoder, self._cache):
            last = feed_above(self.model, first - 1, x, self._cache, None, positions)
        return self.model.logits(last[:, -1])


@contextmanager
def replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While inside, a module computes something else."""
    own = module.__dict__.get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own  # type: ignore[method-assign]
