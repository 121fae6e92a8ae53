"""The only file that touches transformers' cache and attention interfaces.

Key-value caches are :class:`transformers.DynamicCache` objects whose layers hold `keys` and `values`, each
(batch, kv_head, position, d_head), keys after the rotary rotation. Every cache here is a *full* one, also for models
with sliding windows (their masks do the windowing), so a slot can be addressed by its position.

A cache that was passed in is never modified: growth concatenates and edits write new tensors, so a clone may share its
tensors with the original until one of them changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = [
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
