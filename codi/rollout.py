"""THE latent loop: prompt, then n projected states fed back, with everything each latent computed in the open.

    h_0 = last state (after the final norm) at the begin-of-thought token
    z_k = prj(h_{k-1})        the embedding fed at latent k, k = 1..n
    h_k = last state that results at latent k

One code path for every base model. Attention mask and position ids are carried from the prompt through the latents (and
by decode.py through the answer), so a prompt gives the same numbers alone and in a left-padded batch.

Knows nothing about answers or files. Use through the model::

    run = model.rollout(model.encode(["question"]), n_latents=6)
    run.hidden_states                      # (batch, latent, layer, d_model)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from codi.interventions import Intervention, Slot, check_interventions, overrides, seen_at
from codi.parts import Parts
from lm.cache import (
    build_cache,
    cache_length,
    clone_cache,
    crop_cache,
    read_slots,
    replace_slot,
    select_cache,
    to_device,
)
from lm.forward import Edit, feed
from lm.text import EncodedBatch, Rows

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["KEEP", "LatentRollout", "Prefill", "prefill", "rollout"]

KEEP = ("embeddings", "hidden_states", "keys", "values", "cache")
"""What a rollout keeps by default."""
KEEP_CHOICES = (*KEEP, "attentions", "prompt_hidden_states")


@dataclass(frozen=True)
class Prefill:
    """A prompt that has been computed: the start of a rollout, or of an answer without latents.

    Attributes:
        state: (batch, d_model) last state of the last prompt token; h_0 for a prompt encoded with a latent thought.
        cache: prompt keys and values. Whoever continues works on a clone.
        attention_mask: (batch, position) bool.
        prompt_lengths: (batch,) real tokens.
        next_position: (batch,) position id of whatever is fed next.
        bot_hidden_states: (batch, layer 0..n_layers, d_model) at the last prompt token, or None if not asked for.
        prompt_hidden_states: (batch, position, layer, d_model), or None if not asked for.
    """

    state: Tensor
    cache: DynamicCache
    attention_mask: Tensor
    prompt_lengths: Tensor
    next_position: Tensor
    bot_hidden_states: Tensor | None = None
    prompt_hidden_states: Tensor | None = None

    def __len__(self) -> int:
        return self.state.shape[0]

    def select(self, rows: Rows) -> Prefill:
        """The given rows of the batch, in that order, repeats allowed."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.state.device)
        return Prefill(
            state=self.state[index],
            cache=select_cache(self.cache, index),
            attention_mask=self.attention_mask[index],
            prompt_lengths=self.prompt_lengths[index],
            next_position=self.next_position[index],
            bot_hidden_states=None if self.bot_hidden_states is None else self.bot_hidden_states[index],
            prompt_hidden_states=None if self.prompt_hidden_states is None else self.prompt_hidden_states[index],
        )


@dataclass(frozen=True)
class LatentRollout:
    """What n latents computed. What was not asked for (`keep=`) is None.

    Attributes:
        states: (batch, n + 1, d_model) h_0..h_n, always kept (before any `edit_hidden`).
        attention_mask: (batch, prompt + latent) bool, True at real tokens.
        prompt_lengths: (batch,) real prompt tokens, the protocol's own included.
        first_position: (batch,) position id of latent 1; equals prompt_lengths, except with mask="published".
        embeddings: (batch, latent, d_model) z_1..z_n as fed.
        hidden_states: (batch, latent, layer 0..n_layers, d_model); layer 0 = what enters the first block (z_k, to which
            GPT-2 has added its position embedding), the last one is after the final norm: never norm it again.
        bot_hidden_states: (batch, layer 0..n_layers, d_model) at the begin-of-thought token; the last one is h_0.
        keys, values: (batch, latent, layer, kv_head, d_head) as cached (keys rotated).
        attentions: (batch, latent, layer, head, key position), zero at positions later than the query.
        prompt_hidden_states: (batch, position, layer 0..n_layers, d_model).
        past_key_values: cache of prompt and latents. Whoever continues works on a clone.
    """

    states: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    first_position: Tensor
    embeddings: Tensor | None = None
    hidden_states: Tensor | None = None
    bot_hidden_states: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    attentions: Tensor | None = None
    prompt_hidden_states: Tensor | None = None
    past_key_values: DynamicCache | None = None

    def __len__(self) -> int:
        return self.states.shape[0]

    @property
    def n_latents(self) -> int:
        """Latents that were fed."""
        return self.states.shape[1] - 1

    @property
    def prompt_width(self) -> int:
        """Positions of the padded prompt: the cache slot of latent k is prompt_width + k - 1."""
        return self.attention_mask.shape[1] - self.n_latents

    @property
    def latent_positions(self) -> Tensor:
        """(batch, latent) position id of every latent, as used by rotary or absolute positions."""
        steps = torch.arange(self.n_latents, device=self.first_position.device)
        return self.first_position[:, None] + steps

    def select(self, rows: Rows) -> LatentRollout:
        """The given rows of the batch, in that order, repeats allowed."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.states.device)
        cache = None if self.past_key_values is None else select_cache(self.past_key_values, index)
        return self._map(lambda tensor: tensor[index], cache)

    def to(self, device: str | torch.device) -> LatentRollout:
        """The run on another device."""
        cache = None if self.past_key_values is None else to_device(self.past_key_values, device)
        return self._map(lambda tensor: tensor.to(device), cache)

    def truncate(self, n_latents: int) -> LatentRollout:
        """The run as it was after its first `n_latents` latents (early exit); 0 leaves the prompt alone."""
        if not 0 <= n_latents <= self.n_latents:
            raise ValueError(f"n_latents must be in 0..{self.n_latents}, got {n_latents}")
        length = self.prompt_width + n_latents
        return replace(
            self,
            states=self.states[:, : n_latents + 1],
            attention_mask=self.attention_mask[:, :length],
            embeddings=_head(self.embeddings, n_latents),
            hidden_states=_head(self.hidden_states, n_latents),
            keys=_head(self.keys, n_latents),
            values=_head(self.values, n_latents),
            attentions=None if self.attentions is None else self.attentions[:, :n_latents, ..., :length],
            past_key_values=None if self.past_key_values is None else crop_cache(self.past_key_values, length),
        )

    def _map(self, change: Callable[[Tensor], Tensor], cache: DynamicCache | None) -> LatentRollout:
        values: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value for name, value in self.__dict__.items()
        }
        return LatentRollout(**{**values, "past_key_values": cache})


def _head(tensor: Tensor | None, n: int) -> Tensor | None:
    return None if tensor is None else tensor[:, :n]


# --- Prompt -----------------------------------------------------------------------------------------------------------


def prefill(
    model: Parts,
    batch: EncodedBatch,
    interventions: Sequence[Intervention] = (),
    keep: Collection[str] = ("hidden_states",),
) -> Prefill:
    """Compute the prompt once; rollouts that start from it compute latents only.

    Args:
        model: the model.
        batch: from `model.encode`.
        interventions: of which `edit_prompt_layer` and `edit_layer` with k = 0 (the last prompt token) apply.
        keep: "hidden_states" (of the last prompt token), "prompt_hidden_states" (of all).
    """
    batch = batch.to(model.device)
    mask = batch.attention_mask.bool()
    width = mask.shape[1]
    lengths = mask.sum(dim=1)
    positions = batch.positions
    if model.mask == "published":
        positions = torch.arange(width, device=mask.device).expand(len(batch), -1)
    next_position = positions[:, -1] + 1
    model.check_length(int(next_position.max()))

    embeddings = model.embed(batch.input_ids)
    for i in interventions:
        embeddings = i.edit_prompt_layer(0, embeddings)
    edit = _prompt_edit(interventions) if overrides(interventions, "edit_prompt_layer", "edit_layer") else None

    cache = build_cache()
    wanted = "hidden_states" in keep or "prompt_hidden_states" in keep
    step = feed(model, embeddings, cache, mask, positions, edit, hidden_states=wanted)
    hidden = step.hidden_states
    return Prefill(
        state=step.last[:, -1],
        cache=cache,
        attention_mask=mask,
        prompt_lengths=lengths,
        next_position=next_position,
        bot_hidden_states=None if hidden is None or "hidden_states" not in keep else hidden[:, -1],
        prompt_hidden_states=hidden if "prompt_hidden_states" in keep else None,
    )


def _prompt_edit(interventions: Sequence[Intervention]) -> Edit:
    def edit(layer: int, x: Tensor) -> Tensor:
        for i in interventions:
            x = i.edit_prompt_layer(layer, x)
            row = x[:, -1]
            changed = i.edit_layer(0, layer, row)
            if changed is not row:
                x = torch.cat((x[:, :-1], changed[:, None]), dim=1)
        return x

    return edit


# --- The loop ---------------------------------------------------------------------------------------------------------


def rollout(
    model: Parts,
    source: EncodedBatch | Prefill | LatentRollout,
    n_latents: int = 6,
    interventions: Sequence[Intervention] = (),
    keep: Collection[str] = KEEP,
) -> LatentRollout:
    """Feed latents 1..n_latents after a prompt, or go on with an earlier run.

    Args:
        model: the model.
        source: an encoded batch; a prefill; or a run that kept its cache, which is continued: its latents are taken as
            they are and latents run.n_latents + 1..n_latents are added.
        n_latents: latents in the result, 0 or more.
        interventions: applied in order at each hook point.
        keep: any of "embeddings", "hidden_states", "keys", "values", "cache", "attentions" (needs attention="eager"),
            "prompt_hidden_states". A continued run must have kept what is asked for.

    Raises:
        ValueError: n_latents out of range, an unknown name in keep, something to keep that the source has not kept, or
            an intervention that can never act.
    """
    _check_keep(model, keep)
    if isinstance(source, EncodedBatch):
        source = prefill(model, source, interventions, keep)
    earlier = source if isinstance(source, LatentRollout) else None
    done = 0 if earlier is None else earlier.n_latents
    if isinstance(n_latents, bool) or not isinstance(n_latents, int) or n_latents < done:
        raise ValueError(f"n_latents must be a whole number, {done} or more, got {n_latents!r}")
    check_interventions(interventions, done + 1, n_latents)
    start = _start(source, keep)

    cache = clone_cache(start.cache)
    mask = start.attention_mask
    width = mask.shape[1]
    model.check_length(int(start.next_position.max()) + n_latents - done)
    edit_layer = overrides(interventions, "edit_layer")
    new: dict[str, list[Tensor]] = {"states": [], "embeddings": [], "hidden_states": [], "attentions": []}

    h = start.state
    for k in range(done + 1, n_latents + 1):
        for i in interventions:
            h = i.edit_hidden(k, h)
        z = model.project(h)
        for i in interventions:
            z = i.edit_embedding(k, z)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        step = feed(
            model,
            z[:, None],
            cache,
            seen_at(model, k, mask, interventions),
            (start.next_position + (k - 1 - done))[:, None],
            _layer_edit(interventions, k) if edit_layer else None,
            hidden_states="hidden_states" in keep,
            attentions="attentions" in keep,
        )
        h = step.last[:, 0]
        if overrides(interventions, "edit_kv", "edit_slot"):
            slot = Slot(model, k, width + k - 1 - done, start.next_position + (k - 1 - done))
            _edit_slot(cache, slot, interventions)

        new["states"].append(h)
        if "embeddings" in keep:
            new["embeddings"].append(z)
        if step.hidden_states is not None:
            new["hidden_states"].append(step.hidden_states[:, 0])
        if step.attentions is not None:
            new["attentions"].append(step.attentions[:, 0])
    return _finished(model, start, earlier, new, cache, mask, keep)


def _check_keep(model: Parts, keep: Collection[str]) -> None:
    unknown = sorted(set(keep) - set(KEEP_CHOICES))
    if unknown:
        raise ValueError(f"keep may hold {', '.join(KEEP_CHOICES)}, got {', '.join(unknown)}")
    if "attentions" in keep and model.attention != "eager":
        raise ValueError(f"keeping attentions needs a model loaded with attention='eager', got {model.attention!r}")


def _finished(
    model: Parts,
    start: Prefill,
    earlier: LatentRollout | None,
    new: dict[str, list[Tensor]],
    cache: DynamicCache,
    mask: Tensor,
    keep: Collection[str],
) -> LatentRollout:
    """What the loop computed, joined to what an earlier run had."""
    done = 0 if earlier is None else earlier.n_latents
    keys, values = None, None
    if "keys" in keep or "values" in keep:
        keys, values = read_slots(cache, start.attention_mask.shape[1] - done, cache_length(cache))
    like = start.state
    states = torch.stack(new["states"], dim=1) if new["states"] else like.new_empty(len(mask), 0, like.shape[-1])
    return LatentRollout(
        states=torch.cat((start.state[:, None] if earlier is None else earlier.states, states), dim=1),
        attention_mask=mask,
        prompt_lengths=start.prompt_lengths,
        first_position=start.next_position - done,
        embeddings=_joined("embeddings", keep, earlier, new, (model.d_model,), states),
        hidden_states=_joined("hidden_states", keep, earlier, new, (model.n_layers + 1, model.d_model), states),
        bot_hidden_states=start.bot_hidden_states if "hidden_states" in keep else None,
        keys=keys if "keys" in keep else None,
        values=values if "values" in keep else None,
        attentions=_attentions(model, keep, earlier, new["attentions"], mask.shape[1], states),
        prompt_hidden_states=start.prompt_hidden_states if "prompt_hidden_states" in keep else None,
        past_key_values=cache if "cache" in keep else None,
    )


def _start(source: Prefill | LatentRollout, keep: Collection[str]) -> Prefill:
    """The state in which the next latent finds the model."""
    if isinstance(source, Prefill):
        start = source
    else:
        if source.past_key_values is None:
            raise ValueError("a run can be continued only if it kept its cache: keep=(..., 'cache')")
        lacking = [name for name in ("embeddings", "hidden_states", "attentions") if name in keep]
        lacking = [name for name in lacking if getattr(source, name) is None]
        if lacking:
            raise ValueError(f"keep={lacking[0]!r}: the run to continue did not keep it")
        start = Prefill(
            state=source.states[:, -1],
            cache=source.past_key_values,
            attention_mask=source.attention_mask,
            prompt_lengths=source.prompt_lengths,
            next_position=source.first_position + source.n_latents,
            bot_hidden_states=source.bot_hidden_states,
            prompt_hidden_states=source.prompt_hidden_states,
        )
    needed = {"hidden_states": start.bot_hidden_states, "prompt_hidden_states": start.prompt_hidden_states}
    for name, value in needed.items():
        if name in keep and value is None:
            raise ValueError(f"keep={name!r}: the prefill did not keep it, prefill with keep=({name!r},)")
    return start


def _layer_edit(interventions: Sequence[Intervention], k: int) -> Edit:
    def edit(layer: int, x: Tensor) -> Tensor:
        row = x[:, 0]
        changed = row
        for i in interventions:
            changed = i.edit_layer(k, layer, changed)
        return x if changed is row else changed[:, None]

    return edit


def _edit_slot(cache: DynamicCache, slot: Slot, interventions: Sequence[Intervention]) -> None:
    keys, values = read_slots(cache, slot.place, slot.place + 1)
    for layer in range(keys.shape[2]):
        old_keys, old_values = keys[:, 0, layer], values[:, 0, layer]
        new_keys, new_values = old_keys, old_values
        for i in interventions:
            new_keys, new_values = i.edit_slot(slot, layer + 1, new_keys, new_values)
        if new_keys is not old_keys or new_values is not old_values:
            replace_slot(cache, layer, slot.place, new_keys, new_values)


def _joined(
    name: str,
    keep: Collection[str],
    earlier: LatentRollout | None,
    new: dict[str, list[Tensor]],
    shape: tuple[int, ...],
    like: Tensor,
) -> Tensor | None:
    if name not in keep:
        return None
    parts = [] if earlier is None else [getattr(earlier, name)]
    parts.append(torch.stack(new[name], dim=1) if new[name] else like.new_empty(len(like), 0, *shape))
    return torch.cat(parts, dim=1)


def _attentions(
    model: Parts,
    keep: Collection[str],
    earlier: LatentRollout | None,
    new: list[Tensor],
    length: int,
    like: Tensor,
) -> Tensor | None:
    if "attentions" not in keep:
        return None
    old = [] if earlier is None or earlier.attentions is None else list(earlier.attentions.unbind(dim=1))
    if not old and not new:
        return like.new_empty(len(like), 0, model.n_layers, model.n_heads, length)
    rows = [nn.functional.pad(weights, (0, length - weights.shape[-1])) for weights in (*old, *new)]
    return torch.stack(rows, dim=1)
