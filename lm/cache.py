"""The only file that touches transformers' cache and attention interfaces.

Key-value caches are :class:`transformers.DynamicCache` objects whose layers hold `keys` and `values`, each
(batch, kv_head, position, d_head), keys after the rotary rotation. Every cache here is a *full* one, also for models
with sliding windows (their masks do the windowing), so a slot can be addressed by its position.

A cache that was passed in is never modified: growth concatenates and edits write new tensors, so a clone may share its
tensors with the original until one of them changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

__all__ = [
    "BRANCH_ATTENTION",
    "BranchCache",
    "branch_attention",
    "build_cache",
    "cache_length",
    "clone_cache",
    "crop_cache",
    "read_slots",
    "replace_slot",
    "select_cache",
    "to_device",
]


# --- Plain caches -----------------------------------------------------------------------------------------------------


def build_cache(layers: Iterable[tuple[Tensor, Tensor]] = ()) -> DynamicCache:
    """A full cache, empty or filled with one (keys, values) pair per layer, each (batch, kv_head, position, d_head)."""
    cache = DynamicCache()
    for keys, values in layers:
        if keys.shape != values.shape or keys.dim() != 4:
            raise ValueError(
                "keys and values must both be (batch, kv_head, position, d_head), "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(_filled(layer).keys, _filled(layer).values) for layer in cache.layers]


def _filled(layer: Any) -> Any:
    """The layer itself (transformers' annotations allow kinds of layers without keys; `build_cache` makes none)."""
    assert layer.keys is not None, "an empty cache layer has no slots"
    return layer


def cache_length(cache: DynamicCache) -> int:
    """Positions held by the cache."""
    return int(cache.get_seq_length())


def clone_cache(cache: DynamicCache, copy: bool = False) -> DynamicCache:
    """A cache that can grow or be edited without touching `cache`.

    Tensors are shared until one of the two changes, because neither growth nor the edits of this module write in place.
    `copy=True` copies the tensors as well, for code that does.
    """
    if copy:
        return build_cache((keys.clone(), values.clone()) for keys, values in _pairs(cache))
    return build_cache(_pairs(cache))


def select_cache(cache: DynamicCache, rows: Tensor | Sequence[int]) -> DynamicCache:
    """The cache of the given rows of the batch, in that order, repeats allowed."""
    pairs = _pairs(cache)
    if not pairs:
        return build_cache()
    index = torch.as_tensor(rows, dtype=torch.long, device=pairs[0][0].device)
    return build_cache((keys.index_select(0, index), values.index_select(0, index)) for keys, values in pairs)


def crop_cache(cache: DynamicCache, length: int) -> DynamicCache:
    """The first `length` positions of the cache."""
    if not 0 <= length <= cache_length(cache):
        raise ValueError(f"length must be in 0..{cache_length(cache)}, got {length}")
    return build_cache((keys[:, :, :length], values[:, :, :length]) for keys, values in _pairs(cache))


def read_slots(cache: DynamicCache, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Keys and values of positions start..stop-1, each (batch, position, layer, kv_head, d_head), copied."""
    keys = torch.stack([keys[:, :, start:stop] for keys, _ in _pairs(cache)])
    values = torch.stack([values[:, :, start:stop] for _, values in _pairs(cache)])
    return keys.permute(1, 3, 0, 2, 4).contiguous(), values.permute(1, 3, 0, 2, 4).contiguous()


def replace_slot(cache: DynamicCache, layer: int, position: int, keys: Tensor, values: Tensor) -> None:
    """Put new keys and values, each (batch, kv_head, d_head), into one slot of one layer (0-based) of this cache.

    The tensors of the cache are replaced, not written, so clones that shared them keep the old numbers.
    """
    entry = _filled(cache.layers[layer])
    shape = (*entry.keys.shape[:2], entry.keys.shape[3])
    if keys.shape != shape or values.shape != shape:
        raise ValueError(
            f"keys and values of a slot must be (batch, kv_head, d_head) = {shape}, "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    new_keys, new_values = entry.keys.clone(), entry.values.clone()
    new_keys[:, :, position] = keys
    new_values[:, :, position] = values
    entry.keys, entry.values = new_keys, new_values


def to_device(cache: DynamicCache, device: str | torch.device) -> DynamicCache:
    """The cache on another device."""
    return build_cache((keys.to(device), values.to(device)) for keys, values in _pairs(cache))


# --- Branches: many rows over shared prefixes -------------------------------------------------------------------------

BRANCH_ATTENTION = "lm_branches"
"""Name under which the attention of branches is registered with transformers."""

_SPARE = 4  # columns behind the prefix, for the scores of a row's own slots
_THIN = 8  # own slots up to which they are added up one by one
_WIDEST_TILE = 256
_TILE_OVERHEAD = 24  # a tile costs about as much as this many more rows: its copy of the prefix


def _tile_width(sizes: Tensor) -> int:
    """Rows per tile for groups of the given sizes: the width with the least padding and copying."""
    largest = int(sizes.max())
    widths = sorted({-(-largest // parts) for parts in range(-(-largest // _WIDEST_TILE), min(largest, 64) + 1)} | {1})
    candidates = torch.tensor(widths)
    tiles = (-(-sizes[None, :] // candidates[:, None])).sum(1)
    return widths[int((tiles * (candidates + _TILE_OVERHEAD)).argmin())]


def _spare(keys: Tensor, n: int) -> Tensor:
    """Keys (tile, kv_head, column, d_head) with n columns of zeros behind them."""
    return nn.functional.pad(keys, (0, 0, 0, n))


class BranchCache:
    """Keys and values of a batch of branches: prefixes that rows share, and the few slots that each row owns.

    Rows come sorted by group; the rows of a group see the same prefix: columns of one prompt's cache. Slots in which a
    row differs are left out of the prefix, and the row's own version of them joins the softmax instead, so an edited
    cache never exists. Groups are cut into *tiles* of equal width over one copy of the prefix each; the shared part of
    attention is one matrix product per tile and kv-head, without repeating keys for the heads that share them.

    Speaks the part of transformers' cache protocol that decoders use (`update`, `get_seq_length`, `get_query_offset`,
    `get_mask_sizes`) and works only inside `branch_attention(decoder, cache)`.

    Layout: prefix (tile, kv_head, column, d_head), own slots (tile, kv_head, place, slot, d_head), both in the dtype
    in which attention is computed: float32, or float64 for a float64 model. What gets here has been rounded to the
    model's dtype, as in any cache. A few columns of zeros follow the keys of a prefix, so that the product with it
    leaves room for the scores of own slots and the softmax runs over both without their being joined first.

    Args:
        cache: of the prompts; only read.
        prompts: (group,) row of `cache` that each group shares.
        columns: (column,) positions of `cache` that branches see.
        visible: (group, column) bool, False at padding.
        groups: (row,) group of every row, ascending.
        first_positions: (group,) position id of column 0; negative where that is padding.
        longest: no position id will reach this: sliding windows of this length or more hide nothing.
        All tensors on the CPU.

    Attributes:
        positions: (row, token) position ids of the tokens fed next; to be set before they are fed.
        hidden_from_first_token: (column,) bool or None: columns that the first of the tokens fed next cannot see.
    """

    def __init__(
        self,
        cache: DynamicCache,
        prompts: Tensor,
        columns: Tensor,
        visible: Tensor,
        groups: Tensor,
        first_positions: Tensor,
        longest: int,
    ) -> None:
        pairs = _pairs(cache)
        device = pairs[0][0].device
        self.device = device
        self.dtype = torch.float64 if pairs[0][0].dtype == torch.float64 else torch.float32
        self.n_kv_heads = int(pairs[0][0].shape[1])
        self.n_columns = len(columns)
        self.longest = longest
        self.positions = torch.empty(len(groups), 0, dtype=torch.long, device=device)
        self.hidden_from_first_token: Tensor | None = None
        tile_group = self._lay_out(groups)
        at = (prompts[tile_group].to(device)[:, None], columns.to(device)[None, :])
        self._prefix = [(_spare(self._gather(keys, at), _SPARE), self._gather(values, at)) for keys, values in pairs]
        self._bias: Tensor | None = None  # (tile · kv_head, 1, column): -inf at padding
        if not bool(visible.all()):
            bias = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -torch.inf)
            bias = nn.functional.pad(bias, (0, _SPARE))
            self._bias = bias[tile_group].to(device)[:, None].repeat_interleave(self.n_kv_heads, 0)
        self._column_positions = (first_positions[:, None] + columns)[tile_group].to(device)
        self._own_positions = self._to_tiles(self.positions)
        self._own: list[tuple[Tensor, Tensor] | None] = [None] * len(pairs)
        self._own_bias: Tensor | None = None  # (tile, place, slot): -inf at slots that are no part of the row's past

    def _gather(self, x: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        # Indices (tile, column) into (batch, position, kv_head, d_head): one copy per tile, none per row.
        return x.transpose(1, 2)[at].to(self.dtype).transpose(1, 2).contiguous()

    # Tiles

    def _lay_out(self, groups: Tensor) -> Tensor:
        """Cut groups into tiles; returns the group of each tile."""
        present, sizes = torch.unique_consecutive(groups, return_counts=True)
        width = _tile_width(sizes)
        tiles = -(-sizes // width)
        first_place = (tiles.cumsum(0) - tiles) * width
        first_row = sizes.cumsum(0) - sizes
        places = torch.arange(len(groups)) + (first_place - first_row).repeat_interleave(sizes)
        self.groups, self.width, self.n_tiles = groups, width, int(tiles.sum())
        self._tile_group = present.repeat_interleave(tiles)
        self._places: Tensor | None = None  # (row,) place of each row, None if every place is taken
        self._fill: Tensor | None = None  # (place,) row of each place, some row where there is none
        if self.n_tiles * width != len(groups):
            fill = torch.zeros(self.n_tiles * width, dtype=torch.long)
            fill[places] = torch.arange(len(groups))
            self._places, self._fill = places.to(self.device), fill.to(self.device)
        return self._tile_group

    def _to_tiles(self, x: Tensor) -> Tensor:
        """(row, …) to (tile, place, …)."""
        x = x if self._fill is None else x.index_select(0, self._fill)
        return x.unflatten(0, (self.n_tiles, self.width))

    def _to_rows(self, x: Tensor) -> Tensor:
        """(tile, place, …) to (row, …)."""
        x = x.flatten(0, 1)
        return x if self._places is None else x.index_select(0, self._places)

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, ascending: finished branches leave the batch."""
        own = [None if pair is None else [self._to_rows(x.transpose(1, 2))[rows] for x in pair] for pair in self._own]
        own_bias = None if self._own_bias is None else self._to_rows(self._own_bias)[rows]
        own_positions = self._to_rows(self._own_positions)[rows]
        old = self._tile_group
        tile_group = self._lay_out(self.groups[rows.cpu()])
        source = torch.searchsorted(old, tile_group)  # the first old tile of the same group
        if not torch.equal(source, torch.arange(len(old))):
            index = source.to(self.device)
            self._prefix = [(keys[index], values[index]) for keys, values in self._prefix]
            if self._bias is not None:
                self._bias = self._bias.unflatten(0, (len(old), -1))[index].flatten(0, 1)
            self._column_positions = self._column_positions[index]
        for layer, pair in enumerate(own):
            if pair is not None:
                keys, values = (self._to_tiles(x).transpose(1, 2).contiguous() for x in pair)
                self._own[layer] = (keys, values)
        self._own_bias = None if own_bias is None else self._to_tiles(own_bias)
        self._own_positions = self._to_tiles(own_positions)

    # Own slots

    def __len__(self) -> int:
        """Rows."""
        return len(self.groups)

    @property
    def n_own(self) -> int:
        """Own slots of a row."""
        return 0 if self._own[0] is None else int(self._own[0][0].shape[3])

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append slots (row, kv_head, slot, d_head) to one layer; returns all own slots of that layer, in tiles."""
        new_keys, new_values = (self._to_tiles(x).transpose(1, 2).to(self.dtype) for x in (keys, values))
        old = self._own[layer_idx]
        if old is not None:
            new_keys, new_values = torch.cat((old[0], new_keys), dim=3), torch.cat((old[1], new_values), dim=3)
        self._own[layer_idx] = (new_keys, new_values)
        if layer_idx == 0:
            self._own_positions = torch.cat((self._own_positions, self._to_tiles(self.positions)), dim=2)
            if self._own_bias is not None:
                self._own_bias = nn.functional.pad(self._own_bias, (0, keys.shape[2]))
        return new_keys, new_values

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Give every row one more own slot, (row, layer, kv_head, d_head) each, with position ids (row,)."""
        self.positions = positions[:, None]
        for layer in range(keys.shape[1]):
            self.update(keys[:, layer, :, None], values[:, layer, :, None], layer)

    def read_own(self, slot: int) -> tuple[Tensor, Tensor]:
        """Keys and values (row, layer, kv_head, d_head) of an own slot, -1 the newest."""
        pairs = [pair for pair in self._own if pair is not None]
        keys, values = (torch.stack([pair[i][..., slot, :] for pair in pairs], dim=3) for i in (0, 1))
        return self._to_rows(keys.permute(0, 2, 3, 1, 4)), self._to_rows(values.permute(0, 2, 3, 1, 4))

    def write_own(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values (row, layer, kv_head, d_head) into an own slot."""
        for layer, pair in enumerate(self._own):
            assert pair is not None, "there is no own slot to write"
            for old, new in zip(pair, (keys, values), strict=True):
                old[..., slot, :] = self._to_tiles(new[:, layer]).transpose(1, 2)

    def hide_own(self, hidden: Tensor) -> None:
        """Leave some of the newest own slots out of the past of their rows; hidden (row, slot) bool."""
        if self._own_bias is None:
            self._own_bias = torch.zeros(self.n_tiles, self.width, self.n_own, dtype=self.dtype, device=self.device)
        new = nn.functional.pad(hidden, (self.n_own - hidden.shape[1], 0))
        self._own_bias = self._own_bias.masked_fill(self._to_tiles(new), -torch.inf)

    def _make_room(self, layer: int, n_slots: int) -> None:
        """Columns behind the prefix for at least n_slots scores."""
        keys, values = self._prefix[layer]
        if keys.shape[2] < n_slots:
            self._prefix[layer] = (_spare(keys, n_slots - keys.shape[2] + _SPARE), values)
        if self._bias is not None and self._bias.shape[2] < n_slots:
            self._bias = nn.functional.pad(self._bias, (0, n_slots - self._bias.shape[2] + _SPARE))

    # transformers' cache protocol

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before the tokens fed next."""
        return self.n_columns + self.n_own

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the first token fed next."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys seen while `query_length` tokens are fed, and the index of the first of them."""
        return self.get_seq_length(layer_idx) + query_length, 0

    # Attention

    def attend(
        self,
        query: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        layer: int,
        scaling: float,
        window: int | None = None,
    ) -> Tensor:
        """softmax(scaling · q · [prefix keys | own keys]) · [prefix values | own values].

        Args:
            query: (row, head, token, d_head).
            own_keys, own_values: from `update`.
            layer: 0-based.
            window: positions that a token sees, itself included; None: all.

        Returns:
            (row, token, head, d_head) in the dtype of the query.
        """
        n_heads, n_tokens, d_head = query.shape[1:]
        tiles, width, n_kv = self.n_tiles, self.width, self.n_kv_heads
        per_kv = n_heads // n_kv
        n_columns, n_own = self.n_columns, own_keys.shape[3]
        n_slots = n_columns + n_own
        self._make_room(layer, n_slots)
        keys, values = (x.flatten(0, 1) for x in self._prefix[layer])

        q = torch.empty(tiles, n_kv, width, per_kv, n_tokens, d_head, dtype=self.dtype, device=query.device)
        q.copy_(self._to_tiles(query).unflatten(2, (n_kv, per_kv)).transpose(1, 2))
        # Shared part: one product per tile and kv-head; padding enters as the matrix that is added to.
        scores = torch.baddbmm(
            q.new_zeros(()) if self._bias is None else self._bias[..., :n_slots],
            q.view(tiles * n_kv, -1, d_head),
            keys[:, :n_slots].transpose(1, 2),
            beta=0 if self._bias is None else 1,
            alpha=scaling,
        )
        if self.hidden_from_first_token is not None:
            first = scores.view(-1, n_tokens, n_slots)[:, 0, :n_columns]
            first.masked_fill_(self.hidden_from_first_token, -torch.inf)
        # Own part: a few slots per row, the tokens just fed in causal order.
        q = q.view(tiles, n_kv, width, per_kv * n_tokens, d_head)
        own = torch.matmul(q, own_keys.transpose(3, 4)).mul_(scaling).unflatten(3, (per_kv, n_tokens))
        if n_tokens > 1:
            later = torch.ones(n_tokens, n_own, dtype=torch.bool, device=query.device).triu(n_own - n_tokens + 1)
            own.masked_fill_(later, -torch.inf)
        if self._own_bias is not None:
            own += self._own_bias[:, None, :, None, None, :]
        if window is not None and window < self.longest:
            newest = self._own_positions[:, :, -n_tokens:, None]
            out = newest - self._column_positions[:, None, None] >= window  # (tile, place, token, column)
            shared = scores.view(tiles, n_kv, width, per_kv, n_tokens, n_slots)[..., :n_columns]
            shared.masked_fill_(out[:, None, :, None], -torch.inf)
            out = newest - self._own_positions[:, :, None] >= window
            own.masked_fill_(out[:, None, :, None], -torch.inf)

        scores[..., n_columns:] = own.view(tiles * n_kv, -1, n_own)
        weights = scores.softmax(dim=-1)
        output = torch.bmm(weights[..., :n_columns], values).view(q.shape)
        own = weights[..., n_columns:].view(*q.shape[:-1], n_own)
        if n_own > _THIN:
            output += torch.matmul(own, own_values)
        else:  # as a batched product of such thin matrices this takes several times as long
            for slot in range(n_own):
                output.addcmul_(own[..., slot, None], own_values[..., slot, None, :])
        output = output.unflatten(3, (per_kv, n_tokens)).permute(0, 2, 4, 1, 3, 5)
        return self._to_rows(output.reshape(tiles, width, n_tokens, n_heads, d_head).to(query.dtype))


_ACTIVE: ContextVar[BranchCache] = ContextVar("branch cache in use")


@contextmanager
def branch_attention(decoder: nn.Module, cache: BranchCache) -> Iterator[None]:
    """While inside, the decoder attends through `cache`, which must be passed to it as `past_key_values`; afterwards
    its configured attention is back. The model's code stays as it is.
    """
    config: Any = decoder.config
    configured = config._attn_implementation
    token = _ACTIVE.set(cache)
    config._attn_implementation = BRANCH_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = configured
        _ACTIVE.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    cache = _ACTIVE.get()
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"branch attention does not know {name!r}: use engine='clones' with this model")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache.attend(query, key, value, layer, scale, sliding_window), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The branch cache knows what is visible; transformers needs to build no mask."""


AttentionInterface.register(BRANCH_ATTENTION, _attend)
AttentionMaskInterface.register(BRANCH_ATTENTION, _no_mask)


# --- Attention for training -------------------------------------------------------------------------------------------

GROUPED_ATTENTION = "lm_grouped"
"""Eager attention that does not repeat key/value heads: the backward pass of grouped-query attention copies less."""


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling · q kᵀ + mask) v, the query heads of one key/value head as rows of one product.

    query (batch, head, token, d_head), key and value (batch, kv_head, position, d_head), mask additive.
    """
    batch, heads, tokens, d_head = query.shape
    kv_heads = key.shape[1]
    rows = query.reshape(batch, kv_heads, -1, d_head)
    scale = d_head**-0.5 if scaling is None else scaling
    scores = torch.matmul(rows, key.transpose(2, 3)).view(batch, kv_heads, -1, tokens, key.shape[2]) * scale
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, : key.shape[2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    output = torch.matmul(weights.view(batch, kv_heads, -1, key.shape[2]), value)
    return output.view(batch, heads, tokens, d_head).transpose(1, 2).contiguous(), weights.flatten(1, 2)


AttentionInterface.register(GROUPED_ATTENTION, _grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, eager_mask)
