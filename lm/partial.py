"""Part of a forward pass: the blocks below a layer once per text, the blocks above it once per row.

    stem = below(model, batch, layers=15)                       # residual stream at layer 15, caches of blocks 1..15
    last = above(model, stem, 15, rows, edit=edit)              # blocks 16.. for many rows, each of one of the texts

Exact for any decoder whose blocks hand on nothing but the residual stream (and their caches): what is left out is
passed by, the rest is the model's own code under its own masks. For the time of a pass, blocks that are left out hand
on what they are given, or the residual stream that the pass begins with; afterwards the model is as before.

Knows nothing about what is edited or why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm.cache import build_cache
from lm.errors import UserError
from lm.forward import Edit, tapped
from lm.model import LanguageModel
from lm.text import EncodedBatch, Rows

if TYPE_CHECKING:
    from transformers import DynamicCache

    from lm.cache import BranchCache

__all__ = ["Stem", "above", "below", "feed_above"]


@contextmanager
def _passed_by(model: LanguageModel, layers: Sequence[int], x: Tensor | None = None) -> Iterator[None]:
    """While inside, the blocks of these layers compute nothing: they hand on x, or what they are given."""
    n_outputs = model.block_outputs

    def forward(*args: Any, **given: Any) -> Any:
        handed = (args[0] if args else given["hidden_states"]) if x is None else x
        return handed if n_outputs == 0 else (handed, *[None] * (n_outputs - 1))

    changed: list[tuple[dict[str, Any], Any]] = []
    try:
        for layer in layers:
            own = vars(model.blocks[layer - 1])
            changed.append((own, own.get("forward")))
            own["forward"] = forward
        yield
    finally:
        for own, before in changed:
            if before is None:
                del own["forward"]
            else:
                own["forward"] = before


@dataclass(frozen=True)
class Stem:
    """What a pass over texts has left for others to go on from.

    Attributes:
        batch: the texts, on the model's device.
        residual: by layer, (text, position, d_model) of the residual stream there, before the final norm.
        cache: keys and values of the blocks that were run.
        last: (text, position, d_model) states after the final norm; None if the pass did not go to the top.
    """

    batch: EncodedBatch
    residual: Mapping[int, Tensor]
    cache: DynamicCache
    last: Tensor | None


def below(model: LanguageModel, batch: EncodedBatch, layers: int | Sequence[int], *, to_top: bool = False) -> Stem:
    """Run texts up to the highest of some layers, and keep the residual stream at each of them.

    Args:
        model: the model.
        batch: the texts.
        layers: of 0..n_layers.
        to_top: go on to the last layer and the final norm.

    Raises:
        ValueError: no layers, or one that the model does not have.
    """
    wanted = {layers} if isinstance(layers, int) else set(layers)
    for layer in wanted:
        _check_layer(model, layer)
    if not wanted and not to_top:
        raise UserError("below needs at least one layer, got none")
    batch = batch.to(model.device)
    model.check_length(int(batch.lengths.max()))
    cache = build_cache()
    left_out = [] if to_top else range(max(wanted) + 1, model.n_layers + 1)
    with _passed_by(model, left_out):
        kept, last = feed_kept(
            model, model.embed(batch.input_ids), cache, batch.attention_mask.bool(), batch.positions, wanted
        )
    return Stem(batch, kept, cache, last if to_top else None)


def feed_kept(
    model: LanguageModel,
    embeddings: Tensor,
    cache: DynamicCache | BranchCache,
    mask: Tensor | None,
    positions: Tensor,
    layers: set[int],
) -> tuple[dict[int, Tensor], Tensor]:
    """As `lm.forward.feed`: the residual stream at some layers of 0..n_layers, not normed, and the last states."""
    kept: dict[int, Tensor] = {}

    def see(layer: int, x: Tensor) -> None:
        if layer in layers:
            kept[layer] = x

    with tapped(model.blocks, see=see if layers else None):
        last = _run(model, embeddings, cache, mask, positions)
    return kept, last


def feed_above(
    model: LanguageModel,
    layer: int,
    x: Tensor,
    cache: DynamicCache | BranchCache | None,
    mask: Tensor | None,
    positions: Tensor,
    edit: Edit | None = None,
) -> Tensor:
    """Run the blocks above a layer over the residual stream there.

    Args:
        model: the model.
        layer: 0..n_layers; blocks layer + 1.. are run.
        x: (row, position, d_model) what block `layer` has handed on (0: what enters the first block).
        cache: the past of the blocks that are run, grows by x; those of the others are left as they are. Its first
            entry must hold as many positions as theirs. None: no past, and nothing is kept.
        mask: (row, past + position) bool, True at keys that may be seen, or None: all of them.
        positions: (row, position) position ids.
        edit: called as edit(layer.., residual stream), also with x itself where layer is 1 or more.

    Returns:
        (row, position, d_model) last states, after the final norm.
    """
    _check_layer(model, layer)

    def at_or_above(at: int, stream: Tensor) -> Tensor:
        return stream if edit is None or at < layer else edit(at, stream)

    def enter(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((x, *args[1:]), given) if args else (args, {**given, "hidden_states": x})

    handle = model.blocks[0].register_forward_pre_hook(enter, with_kwargs=True) if layer == 0 else None
    try:
        with (
            _passed_by(model, range(1, layer + 1), x),
            tapped(model.blocks, None if edit is None else at_or_above),
        ):
            return _run(model, x, cache, mask, positions)
    finally:
        if handle is not None:
            handle.remove()


def above(
    model: LanguageModel,
    stem: Stem,
    layer: int,
    rows: Rows | None = None,
    *,
    x: Tensor | None = None,
    edit: Edit | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Go on from the residual stream of some texts: the blocks above a layer, once for every row.

    Args:
        model: the model.
        stem: of `below`, with that layer.
        layer: 0..n_layers; blocks layer + 1.. are run.
        rows: (row,) the text of every row; None: each text once.
        x: (row, position, d_model) a residual stream to go on from instead of the texts' own.
        edit: as in `feed_above`.
        cache: an empty cache that gets the keys and values of the blocks that are run; None: they are not kept.

    Returns:
        (row, position, d_model) last states, after the final norm; without meaning at padding.

    Raises:
        ValueError: a layer that the stem does not have.
    """
    if x is None:
        if layer not in stem.residual:
            raise UserError(f"layer must be one that was kept ({', '.join(map(str, stem.residual))}), got {layer}")
        x = stem.residual[layer]
        x = x if rows is None else x[torch.as_tensor(rows, dtype=torch.long, device=x.device)]
    batch = stem.batch if rows is None else stem.batch.select(rows)
    return feed_above(model, layer, x, cache, batch.attention_mask.bool(), batch.positions, edit)


def join_caches(lower: DynamicCache, upper: DynamicCache, layer: int) -> DynamicCache:
    """One cache: blocks 1..layer of the first, those above of the second."""
    entries: list[Any] = [*lower.layers[:layer], *upper.layers[layer:]]
    return build_cache((entry.keys, entry.values) for entry in entries)


def _check_layer(model: LanguageModel, layer: int) -> None:
    if isinstance(layer, bool) or not 0 <= layer <= model.n_layers:
        raise UserError(f"layer must be in 0..{model.n_layers}, got {layer}")


def _run(
    model: LanguageModel,
    embeddings: Tensor,
    cache: DynamicCache | BranchCache | None,
    mask: Tensor | None,
    positions: Tensor,
) -> Tensor:
    last: Tensor = model.decoder(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return last
