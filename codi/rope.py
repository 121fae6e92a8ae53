"""Rotary positions of keys: turn them to a position, or back to position 0.

Cached keys hold the rotation of the position they were written at. A mean of keys over prompts of different length
blurs them, so directions are formed from un-rotated ("content") keys and rotated to the slot they are added to. The
frequencies and the scale are those of the model itself, also when a checkpoint rounds them. Bases with absolute
positions (GPT-2) do not rotate: for them both functions return their input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.model import LanguageModel

__all__ = ["rotate", "unrotate"]


def _rotary(model: LanguageModel) -> tuple[Tensor, float] | None:
    module = getattr(model.decoder, "rotary_emb", None)
    if module is None:
        return None
    kind = getattr(module, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"rope type {kind!r} changes its frequencies with the length of the text and cannot be undone")
    return module.inv_freq, float(module.attention_scaling)


def _turn(x: Tensor, positions: Tensor, frequencies: Tensor, scale: float, sign: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The model multiplies float32 positions and frequencies; do the same, so that angles agree to the last bit.
    angles = positions.to(x.device, torch.float32)[..., None] * frequencies.to(x.device, torch.float32)
    angles = angles.to(dtype)
    cos, sin = angles.cos() * scale, sign * angles.sin() * scale
    half = frequencies.numel()
    first, second, rest = x.to(dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x.dtype)


def rotate(x: Tensor, positions: Tensor | int, model: LanguageModel) -> Tensor:
    """Rotate un-rotated keys (or queries) to `positions`, as the model does before it caches them.

    Args:
        x: (…, d_head).
        positions: position ids that broadcast to the leading axes of x.
        model: whose frequencies and scale to use.

    Returns:
        (…, d_head) in x's dtype; x itself for a base without rotary positions.

    Source: Su et al. 2021, arXiv 2104.09864, in the half-split layout of the Hugging Face models.
    """
    rotary = _rotary(model)
    if rotary is None:
        return x
    return _turn(x, torch.as_tensor(positions), rotary[0], rotary[1], 1)


def unrotate(x: Tensor, positions: Tensor | int, model: LanguageModel) -> Tensor:
    """Undo `rotate`: keys as cached at `positions` become content keys, as if written at position 0 with scale 1."""
    rotary = _rotary(model)
    if rotary is None:
        return x
    return _turn(x, torch.as_tensor(positions), rotary[0], 1.0 / rotary[1], -1)
