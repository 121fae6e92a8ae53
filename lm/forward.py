"""One forward pass over some embeddings, with the residual stream in the open: read it, edit it, leave no trace.

Blocks are tapped by hooks that are gone when the pass is over, also after an error. Numbering is that of `lm`: layer 0
is what enters the first block, layer l what block l hands on.

Knows nothing about texts: embeddings, mask and positions come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm.model import LanguageModel

if TYPE_CHECKING:
    from transformers import DynamicCache

    from lm.cache import BranchCache

__all__ = ["Edit", "Step", "feed", "tapped"]

Edit = Callable[[int, Tensor], Tensor]
"""(layer, residual stream (batch, position, d_model)) -> the residual stream to go on with."""


@contextmanager
def tapped(
    blocks: nn.ModuleList, edit: Edit | None = None, see: Callable[[int, Tensor], None] | None = None
) -> Iterator[None]:
    """While inside: every block's output passes through `edit`, and what enters the first block and what every block
    hands on (edited) is shown to `see`. Afterwards the model is as before.

    Args:
        blocks: of the model.
        edit: called with layers 1..n_layers.
        see: called with layers 0..n_layers; the last one is not normed yet.
    """

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        assert see is not None
        see(0, args[0] if args else given["hidden_states"])

    def after(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x = output if isinstance(output, Tensor) else output[0]
            changed = x if edit is None else edit(layer, x)
            if see is not None:
                see(layer, changed)
            if changed is x:
                return None
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        return hook

    handles = []
    try:
        if see is not None:
            handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        if see is not None or edit is not None:
            handles += [module.register_forward_hook(after(layer)) for layer, module in enumerate(blocks, start=1)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Step:
    """Output of `feed`: last state (batch, position, d_model), normed; on request hidden states (batch, position,
    layer, d_model) and attentions (batch, position, layer, head, key position)."""

    last: Tensor
    hidden_states: Tensor | None
    attentions: Tensor | None


def feed(
    model: LanguageModel,
    embeddings: Tensor,
    cache: DynamicCache | BranchCache,
    mask: Tensor | None,
    positions: Tensor,
    edit: Edit | None = None,
    hidden_states: bool = False,
    attentions: bool = False,
) -> Step:
    """Run the decoder over some embeddings; `cache` grows by them.

    Args:
        model: the model.
        embeddings: (batch, position, d_model).
        cache: the past; its tensors are replaced, never written.
        mask: (batch, past + position) bool, True at keys that may be seen, or None: all of them.
        positions: (batch, position) position ids.
        edit: called as edit(layer 1..n_layers, residual stream), returns the residual stream to go on with.
        hidden_states: also return them: layer 0..n_layers, the last one after the final norm.
        attentions: also return them (needs eager attention).
    """
    record: list[Tensor] = []

    def see(layer: int, x: Tensor) -> None:
        if layer < model.n_layers:
            record.append(x)

    with tapped(model.blocks, edit, see if hidden_states else None):
        output = model.decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            output_attentions=attentions,
        )
    stacked = torch.stack([*record, output.last_hidden_state], dim=2) if hidden_states else None
    weights = torch.stack(output.attentions, dim=1).permute(0, 3, 1, 2, 4) if attentions else None
    return Step(output.last_hidden_state, stacked, weights)
