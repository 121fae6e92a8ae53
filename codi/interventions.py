"""Hook points of a run: what may be changed while a model thinks, and the refusal of changes that could never act.

Knows nothing about the loop that calls the hooks (rollout.py) or about what is changed (steering).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codi.parts import Parts
from codi.protocol import UserError

if TYPE_CHECKING:
    from codi.rollout import LatentRollout

__all__ = ["Intervention", "Slot", "check_answer_interventions", "check_interventions", "overrides", "seen_at"]

LATENT_HOOKS = ("edit_hidden", "edit_embedding", "edit_kv", "edit_slot", "edit_run")
OTHER_HOOKS = ("edit_prompt_layer", "edit_layer", "edit_mask")
"""Hooks that also act on the prompt (k = 0) or the answer."""


@dataclass(frozen=True)
class Slot:
    """Where a cache slot is.

    Attributes:
        model: that wrote it.
        latent: whose it is, 1-based.
        place: column of the cache.
        positions: (batch,) position ids, as rotary or absolute positions used them.
    """

    model: Parts
    latent: int
    place: int
    positions: Tensor


class Intervention:
    """Hook points of a rollout. Every method gets values and returns values; the defaults return what they got.

    Subclass and override what you need. Never write into an argument: return a new tensor. Latents are numbered 1..n;
    k = 0 is the begin-of-thought token. Several interventions are applied in the order given. They leave no trace: the
    model, and a prefill or run that the rollout started from, are as before.

    The prompt is computed by `prefill`, so `edit_prompt_layer` and k = 0 take effect there; a rollout that starts from
    a finished prefill has no prompt left to edit.

    Attributes:
        latents: the only latents that it edits; a run that has none of them refuses it. None: it does not say.
        row_by_row: it holds values of the rows of one batch, so whoever sorts rows (`answer`) refuses it.
    """

    latents: tuple[int, ...] | None = None
    row_by_row: bool = False

    def edit_prompt_layer(self, layer: int, x: Tensor) -> Tensor:
        """Residual stream of the prompt (batch, position, d_model) after `layer` 1..n_layers (before the final norm);
        layer 0 = the input embeddings."""
        return x

    def edit_hidden(self, k: int, h: Tensor) -> Tensor:
        """h_{k-1} (batch, d_model) just before it is projected into z_k."""
        return h

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        """z_k (batch, d_model) before it is fed."""
        return z

    def edit_layer(self, k: int, layer: int, x: Tensor) -> Tensor:
        """Residual stream (batch, d_model) at latent k after `layer` 1..n_layers (before the final norm)."""
        return x

    def edit_kv(self, k: int, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Cache slot of latent k in `layer` 1..n_layers, keys and values (batch, kv_head, d_head), once latent k is
        done: whatever follows latent k sees the edit, latent k itself does not."""
        return keys, values

    def edit_slot(self, slot: Slot, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `edit_kv`, for edits that depend on where the slot is: keys that are rotated to its position, say."""
        return self.edit_kv(slot.latent, layer, keys, values)

    def edit_run(self, model: Parts, run: LatentRollout) -> LatentRollout:
        """A finished run (with its cache) just before its answer: the answer follows what is returned. Never write into
        the run's cache; `run.select` gives a copy. Only answers see it: a rollout refuses such an intervention."""
        return run

    def edit_mask(self, k: int, mask: Tensor) -> Tensor:
        """(batch, key position) bool, True where the query at latent k = 1..n may look; k = n + 1: every position of
        the answer. The padding is False already."""
        return mask


def overrides(interventions: Sequence[Intervention], *methods: str) -> bool:
    """Whether any of the interventions does something at any of these hook points."""
    return any(
        getattr(type(i), method) is not getattr(Intervention, method) for i in interventions for method in methods
    )


def check_interventions(interventions: Sequence[Intervention], first: int, last: int) -> None:
    """Refuse edits that a rollout of latents first..last would never apply.

    Raises:
        ValueError: an edit of other latents only, or one of finished runs.
    """
    for i in interventions:
        name = type(i).__name__
        if i.latents is not None and not any(first <= k <= last for k in i.latents):
            wanted = ", ".join(map(str, i.latents))
            here = "no latents" if last < first else f"latents {first}..{last}"
            raise UserError(f"{name} edits latent {wanted}, but this run computes {here}: it would never act")
        if overrides([i], "edit_run"):
            raise UserError(f"{name} edits a finished run, which only answers see: a rollout would never apply it")


def check_answer_interventions(interventions: Sequence[Intervention], n_latents: int, how: str) -> None:
    """Refuse edits that answers with `n_latents` latents would never apply, or would apply to the wrong rows.

    Args:
        interventions: of the answers.
        n_latents: latents that are fed; 0 for a direct or written answer.
        how: the mode of answering, for the message.

    Raises:
        ValueError: one that edits latents only where there are none, or other latents, or that is `row_by_row`.
    """
    for i in interventions:
        name = type(i).__name__
        if i.row_by_row:
            raise UserError(
                f"{name} holds values row by row, but answers are computed in batches sorted by length: "
                "use rollout and decode_answers on one batch"
            )
        if i.latents is not None:
            idle = not any(1 <= k <= n_latents for k in i.latents)
        else:
            idle = n_latents == 0 and overrides([i], *LATENT_HOOKS) and not overrides([i], *OTHER_HOOKS)
        if idle:
            what = "latents" if i.latents is None else f"latent {', '.join(map(str, i.latents))}"
            here = f"latents 1..{n_latents}" if n_latents else "no latents"
            raise UserError(f"{name} edits {what}, but a {how} answer has {here} here: it would never act")


def seen_at(model: Parts, k: int, mask: Tensor, interventions: Sequence[Intervention]) -> Tensor | None:
    """What the query at latent k = 1..n sees, k = n + 1: every position of the answer.

    Args:
        model: whose way with masks is followed.
        k: see above.
        mask: (batch, key position) bool, True at real tokens.
        interventions: of which `edit_mask` applies.

    Returns:
        (batch, key position) bool, or None: everything.
    """
    masked = overrides(interventions, "edit_mask")
    if model.mask == "published":
        if not masked:
            return None
        mask = torch.ones_like(mask)
    if masked:
        for i in interventions:
            mask = i.edit_mask(k, mask)
    return mask
