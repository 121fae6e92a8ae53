"""Heads in the open: what every head hands to the output projection, what it attends to, what the parts add.

z of a head is its weighted sum of values, before the output projection W_O: (…, head, d_head). Query heads are what is
read and replaced; with grouped queries several of them share one key/value head, and `Heads.groups` says which. Parts
are found by structure (the attention of a block is its child of that name that holds linear layers, the output
projection its last linear layer of n_heads · d_head inputs and d_model outputs) and checked by running a few tokens:
what the projection gives must be what the attention hands on. Everything is done by hooks that are gone afterwards,
also after an error.

Numbering: blocks 1..n_layers as in `lm`, heads from 0; index b of an axis `block` belongs to block b + 1. A *set of
heads* is a bool tensor (block, head).

Knows nothing about texts beyond their tokens, or about what is done with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm.cache import build_cache, cache_length, read_slots
from lm.errors import UserError
from lm.forward import feed, tapped
from lm.model import LanguageModel
from lm.text import EncodedBatch

__all__ = ["Change", "Heads", "Reading", "See", "head_sets"]

Change = Callable[[int, Tensor], Tensor]
"""(block, z (batch, position, head, d_head) or MLP output (batch, position, d_model)) -> what to go on with."""
See = Callable[[int, Tensor], None]
"""The same without an answer."""


@dataclass(frozen=True)
class Reading:
    """What one pass over texts showed; what was not asked for is None.

    Attributes:
        logits: (batch, vocab) after the last token, or (batch, chosen, vocab).
        z: (batch, position, block, head, d_head).
        mlp: (batch, position, block, d_model), what the MLPs add.
        residual: (batch, position, layer 0..n_layers, d_model), the last one before the final norm.
        patterns: (batch, block, head, query, key) attention; padding keys have 0.
        values: (batch, position, block, kv_head, d_head).
    """

    logits: Tensor
    z: Tensor | None = None
    mlp: Tensor | None = None
    residual: Tensor | None = None
    patterns: Tensor | None = None
    values: Tensor | None = None


class Heads:
    """A model whose heads, MLPs and residual streams are read and replaced.

    Args:
        model: any causal language model of `lm`.

    Attributes:
        model: as given.
        attentions, projections: attention module and output projection of every block.
        n_blocks, n_heads, d_head: sizes.
        groups: query heads of every key/value head.

    Raises:
        ValueError: an attention or output projection that cannot be found, or does more than it should.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.n_blocks, self.n_heads, self.d_head = model.n_layers, model.n_heads, model.d_head
        per_group = model.n_heads // model.n_kv_heads
        self.groups = tuple(tuple(range(first, first + per_group)) for first in range(0, model.n_heads, per_group))
        self.attentions = tuple(self._attention(number) for number in range(1, self.n_blocks + 1))
        self.projections = tuple(self._projection(number) for number in range(1, self.n_blocks + 1))
        self._check()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model.name!r}, {self.n_blocks} blocks of {self.n_heads} heads)"

    # Parts

    def _named(self, number: int, what: tuple[str, ...]) -> list[nn.Module]:
        return [
            child
            for name, child in self.model.blocks[number - 1].named_children()
            if any(word in name.lower() for word in what) and any(_is_linear(m) for m in child.modules())
        ]

    def _attention(self, number: int) -> nn.Module:
        found = self._named(number, ("attn", "attention"))
        if len(found) != 1:
            raise UserError(
                f"{len(found)} attention modules found in block {number} of {self.model.name}, expected one child with "
                "linear layers that has 'attn' or 'attention' in its name"
            )
        return found[0]

    def _projection(self, number: int) -> nn.Module:
        width = self.n_heads * self.d_head
        fitting = [
            module
            for module in self.attentions[number - 1].modules()
            if _is_linear(module) and _sizes(module) == (width, self.model.d_model)
        ]
        if not fitting:
            raise UserError(
                f"no output projection found in block {number} of {self.model.name}: the attention has no linear layer "
                f"from {width} (heads × width of a head) to {self.model.d_model}"
            )
        return fitting[-1]

    @property
    def mlps(self) -> tuple[nn.Module, ...]:
        """MLP of every block.

        Raises:
            ValueError: blocks whose MLP is not one module.
        """
        found = []
        for number in range(1, self.n_blocks + 1):
            modules = self._named(number, ("mlp", "feed_forward", "ffn"))
            if len(modules) != 1:
                raise UserError(
                    f"{len(modules)} MLPs found in block {number} of {self.model.name}, expected one child of the "
                    "block that is called mlp, feed_forward or ffn"
                )
            found.append(modules[0])
        return tuple(found)

    @torch.no_grad()
    def _check(self) -> None:
        """Run a few arbitrary tokens: attention hands on what the projection gives, as the first of two."""
        seen: dict[tuple[str, int], Any] = {}

        def note(what: str, number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                seen[what, number] = output

            return hook

        handles = []
        try:
            for number in range(1, self.n_blocks + 1):
                handles.append(self.attentions[number - 1].register_forward_hook(note("attention", number)))
                handles.append(self.projections[number - 1].register_forward_hook(note("projection", number)))
            ids = torch.arange(4, device=self.model.device)[None]
            batch = EncodedBatch(ids, torch.ones_like(ids, dtype=torch.bool))
            feed(self.model, self.model.embed(ids), build_cache(), batch.attention_mask, batch.positions)
        finally:
            for handle in handles:
                handle.remove()
        for number in range(1, self.n_blocks + 1):
            whole, projected = seen.get(("attention", number)), seen.get(("projection", number))
            if not (isinstance(whole, tuple) and len(whole) == 2 and isinstance(projected, Tensor)):
                raise UserError(f"the attention of block {number} of {self.model.name} does not return two things")
            if not torch.equal(whole[0], projected):
                raise UserError(
                    f"the attention of block {number} of {self.model.name} changes what its output projection gives: "
                    "its heads cannot be replaced before it"
                )

    def output_weights(self, block: int) -> Tensor:
        """W_O of a block as (head, d_head, d_model): z of a head times its matrix is what the head adds."""
        self.check_block(block)
        module = self.projections[block - 1]
        weight: Any = module.weight
        matrix = weight if isinstance(module, Conv1D) else weight.T
        return matrix.detach().unflatten(0, (self.n_heads, self.d_head))

    def output_bias(self, block: int) -> Tensor:
        """(d_model,) what the output projection of a block adds whatever its heads say."""
        self.check_block(block)
        bias: Any = self.projections[block - 1].bias
        if bias is None:
            return torch.zeros(self.model.d_model, device=self.model.device, dtype=self.model.dtype)
        return bias.detach()

    def written(self, block: int, z: Tensor) -> Tensor:
        """What every head of a block adds to the residual stream, (…, head, d_model), of z (…, head, d_head)."""
        return torch.einsum("...hk,hkd->...hd", z, self.output_weights(block).to(z.dtype))

    def check_block(self, block: int) -> None:
        """Raise ValueError for a block that the model does not have."""
        if not 1 <= block <= self.n_blocks:
            raise UserError(f"block must be in 1..{self.n_blocks}, got {block}")

    # Reading and replacing

    @contextmanager
    def tapped(
        self,
        change: Change | None = None,
        see: See | None = None,
        change_mlp: Change | None = None,
        see_mlp: See | None = None,
    ) -> Iterator[None]:
        """While inside, z of every block passes through `change` and is then shown to `see`; the outputs of the MLPs
        likewise. Afterwards the model is as before."""
        handles = []
        shape = (self.n_heads, self.d_head)

        def before(block: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
                z = args[0].unflatten(-1, shape)
                changed = z if change is None else change(block, z)
                if see is not None:
                    see(block, changed)
                return None if changed is z else (changed.flatten(-2), *args[1:])

            return hook

        def after(block: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                changed = output if change_mlp is None else change_mlp(block, output)
                if see_mlp is not None:
                    see_mlp(block, changed)
                return None if changed is output else changed

            return hook

        try:
            if change is not None or see is not None:
                for block, module in enumerate(self.projections, start=1):
                    handles.append(module.register_forward_pre_hook(before(block)))
            if change_mlp is not None or see_mlp is not None:
                for block, module in enumerate(self.mlps, start=1):
                    handles.append(module.register_forward_hook(after(block)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(
        self,
        batch: EncodedBatch,
        change: Change | None = None,
        change_mlp: Change | None = None,
        *,
        at: Tensor | None = None,
        z: bool = False,
        mlp: bool = False,
        residual: bool = False,
        patterns: bool | Sequence[int] = False,
        values: bool = False,
    ) -> Reading:
        """One pass over texts.

        Args:
            batch: left-padded texts.
            change, change_mlp: what to replace; see `Change`. What is read has been replaced already.
            at: (batch, chosen) columns of the batch after which logits are wanted; None: the last.
            z, mlp, residual, values: whether they are kept.
            patterns: attention of all queries (True), or of these columns of the batch; needs eager attention.

        Raises:
            ValueError: patterns of a model that was not loaded with eager attention, or a text that is too long.
        """
        model = self.model
        if patterns is not False and model.attention != "eager":
            raise UserError(
                f"attention patterns need a model loaded with attention='eager', this one has {model.attention!r}"
            )
        batch = batch.to(model.device)
        model.check_length(int(batch.lengths.max()))
        kept: dict[str, list[Tensor]] = {"z": [], "mlp": [], "residual": [], "patterns": []}

        def keep(name: str) -> See:
            return lambda number, x: kept[name].append(x)

        mask = batch.attention_mask.bool()
        cache = build_cache()
        with (
            self.tapped(change, keep("z") if z else None, change_mlp, keep("mlp") if mlp else None),
            self._patterns(patterns, kept["patterns"]),
            tapped(model.blocks, see=keep("residual") if residual else None),
        ):
            last = feed(model, model.embed(batch.input_ids), cache, mask, batch.positions).last
        wanted = last[:, -1] if at is None else last[torch.arange(len(last))[:, None], at.to(model.device)]
        return Reading(
            logits=model.logits(wanted),
            z=torch.stack(kept["z"], dim=2) if z else None,
            mlp=torch.stack(kept["mlp"], dim=2) if mlp else None,
            residual=torch.stack(kept["residual"], dim=2) if residual else None,
            patterns=torch.stack(kept["patterns"], dim=1) if patterns is not False else None,
            values=read_slots(cache, 0, cache_length(cache))[1] if values else None,
        )

    @contextmanager
    def _patterns(self, queries: bool | Sequence[int], kept: list[Tensor]) -> Iterator[None]:
        """Collect attention weights (batch, head, query, key) block by block."""
        handles = []

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            weights = output[1]
            kept.append(weights if queries is True else weights[:, :, list(queries)])  # type: ignore[arg-type]

        try:
            if queries is not False:
                handles = [module.register_forward_hook(hook) for module in self.attentions]
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    weight: Any = module.weight
    first, second = weight.shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def head_sets(heads: Heads, chosen: Sequence[tuple[int, int]]) -> Tensor:
    """The set of the given (block, head) as a bool tensor (block, head).

    Raises:
        ValueError: a block or head that the model does not have.
    """
    found = torch.zeros(heads.n_blocks, heads.n_heads, dtype=torch.bool)
    for block, head in chosen:
        heads.check_block(block)
        if not 0 <= head < heads.n_heads:
            raise UserError(f"head must be in 0..{heads.n_heads - 1}, got {head}")
        found[block - 1, head] = True
    return found
