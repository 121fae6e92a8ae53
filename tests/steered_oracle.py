"""Steering written apart from lm: one text at a time, no cache, no padding, the whole text anew for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EditGiven = tuple[int, Tensor, float, str, bool]
"""layer (1..n_layers), vector (d_model,), coefficient, positions, normalise."""


def columns_of(positions: str, prompt: int, length: int) -> list[int]:
    """Tokens 0..length-1 that are edited, when the first `prompt` of them are the prompt."""
    return {
        "all": list(range(length)),
        "prompt": list(range(prompt)),
        "generated": list(range(prompt, length)),
        "last": [prompt - 1],
        "once": [prompt] if length > prompt else [],
        "answer": list(range(prompt - 1, length)),
    }[positions]


def logits_of(base: Any, blocks: Any, ids: Sequence[int], prompt: int, edits: Sequence[EditGiven]) -> Tensor:
    """(vocab,) logits after the last token."""

    def hook(layer: int) -> Any:
        def change(module: Any, args: Any, output: Any) -> Any:
            x = (output if isinstance(output, Tensor) else output[0]).clone()
            for at, vector, coefficient, positions, normalise in edits:
                for column in columns_of(positions, prompt, len(ids)) if at == layer else ():
                    before = x[0, column]
                    after = before + coefficient * vector
                    x[0, column] = after * (before.norm() / after.norm()) if normalise else after
            return x if isinstance(output, Tensor) else (x, *output[1:])

        return change

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks, start=1)]
    with torch.no_grad():
        found: Tensor = base(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return found


def write(
    base: Any, blocks: Any, ids: Sequence[int], edits: Sequence[EditGiven], limit: int, ends: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """Greedy tokens before any of `ends`, and the logits at the first of them."""
    written: list[int] = []
    first = None
    for _ in range(limit):
        logits = logits_of(base, blocks, [*ids, *written], len(ids), edits)
        first = logits if first is None else first
        token = int(logits.argmax())
        if token in ends:
            break
        written.append(token)
    assert first is not None
    return written, first
