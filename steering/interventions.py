"""Where coefficients become edits of a running model. Edits that put given values in are in replacements.py.

Two forms of the same edit:

- `AddDirection` / `ReplaceLatent`, interventions of a rollout, one edit at a time:
  `model.rollout(batch, interventions=[…])`;
- `edit_table` and `branches`, many edits of one finished rollout, for `codi.branches.decode_branches`, which applies
  the coefficients of its rows itself.

Knows nothing about where directions come from or what becomes of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codi import Intervention, LatentRollout
from codi.edits import Branches, EditTable
from codi.interventions import Slot
from codi.rope import rotate
from lm.terms import PARTS, Part, Space
from steering.directions import Direction

__all__ = ["AddDirection", "Edit", "ReplaceLatent", "branches", "coefficients_of", "edit_table"]


def coefficients_of(
    coefficient: float, part: str = "both", key_scale: float = 1.0, value_scale: float = 1.0
) -> tuple[float, float]:
    """Coefficients of the keys and of the values that one coefficient stands for.

    Args:
        coefficient: of the direction; 1.0 adds one whole mean difference.
        part: "keys" or "values" leaves the other one alone.
        key_scale, value_scale: factors for keys and values apart.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    return (
        coefficient * key_scale if part != "values" else 0.0,
        coefficient * value_scale if part != "keys" else 0.0,
    )


class AddDirection(Intervention):
    """Adds coefficient × direction at one latent of a rollout, whatever prompts that starts from: content keys are
    rotated in the run, to the position that the slot has in each row.

    Args:
        direction: in any space. In kv space later latents and the answer see the edited slot, the latent itself does
            not.
        latent: where, 1-based.
        coefficient: 1.0 adds one whole mean difference; 0 changes nothing, bit for bit.
        part, key_scale, value_scale: kv space only, see `coefficients_of`.

    Raises:
        ValueError: latent below 1, or an unknown part.
    """

    def __init__(
        self,
        direction: Direction,
        latent: int,
        coefficient: float = 1.0,
        *,
        part: Part = "both",
        key_scale: float = 1.0,
        value_scale: float = 1.0,
    ) -> None:
        if latent < 1:
            raise ValueError(f"latent must be 1 or more, got {latent}")
        self.direction, self.latent, self.latents = direction, latent, (latent,)
        self.key_coefficient, self.value_coefficient = coefficients_of(coefficient, part, key_scale, value_scale)

    def _plus(self, x: Tensor, addend: Tensor, coefficient: float) -> Tensor:
        if coefficient == 0:
            return x
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (x.to(wide) + coefficient * addend.to(x.device, wide)).to(x.dtype)

    def edit_hidden(self, k: int, h: Tensor) -> Tensor:
        if k != self.latent or self.direction.space != "hidden":
            return h
        assert self.direction.vector is not None
        return self._plus(h, self.direction.vector, self.value_coefficient)

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        if k != self.latent or self.direction.space != "embedding":
            return z
        assert self.direction.vector is not None
        return self._plus(z, self.direction.vector, self.value_coefficient)

    def edit_slot(self, slot: Slot, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        direction = self.direction
        if slot.latent != self.latent or direction.keys is None or direction.values is None:
            return keys, values
        if self.key_coefficient:
            added = direction.keys[layer - 1].to(keys.device, torch.promote_types(keys.dtype, torch.float32))[None]
            if direction.keys_frame == "content":
                added = rotate(added.expand(len(keys), -1, -1), slot.positions[:, None], slot.model)
            keys = self._plus(keys, added, self.key_coefficient)
        return keys, self._plus(values, direction.values[layer - 1], self.value_coefficient)


class ReplaceLatent(Intervention):
    """Replaces z_k (embedding space) or h_{k-1} (hidden space) by a vector: random-latent patching.

    Args:
        direction: the vector, in embedding or hidden space.
        latent: where, 1-based.
        own_norm: rescale the vector to the norm of what it replaces, prompt by prompt (patch form iii).
    """

    def __init__(self, direction: Direction, latent: int, own_norm: bool = False) -> None:
        if direction.vector is None:
            raise ValueError("only a vector can replace a latent: space must be embedding or hidden, got kv")
        if latent < 1:
            raise ValueError(f"latent must be 1 or more, got {latent}")
        self.space, self.vector, self.latent, self.own_norm = direction.space, direction.vector, latent, own_norm
        self.latents = (latent,)

    def _replaced(self, x: Tensor) -> Tensor:
        vector = self.vector.to(x.device, torch.float32).expand(x.shape)
        if self.own_norm:
            vector = vector * (x.float().norm(dim=-1, keepdim=True) / vector.norm(dim=-1, keepdim=True))
        return vector.to(x.dtype)

    def edit_hidden(self, k: int, h: Tensor) -> Tensor:
        return self._replaced(h) if k == self.latent and self.space == "hidden" else h

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        return self._replaced(z) if k == self.latent and self.space == "embedding" else z


@dataclass(frozen=True)
class Edit:
    """One edit of a sweep, the same for every prompt.

    Attributes:
        latent: where, 1-based.
        direction: row of the edit table, -1: no edit (the baseline).
        coefficient: multiplies the direction.
        part, key_scale, value_scale: see `coefficients_of`.
        replace: the vector replaces the latent instead of being added (embedding and hidden space).
        own_norm: the coefficient is multiplied by the norm of the prompt's own latent (with unit vectors: form iii).
    """

    latent: int
    direction: int = -1
    coefficient: float = 0.0
    part: Part = "both"
    key_scale: float = 1.0
    value_scale: float = 1.0
    replace: bool = False
    own_norm: bool = False


def edit_table(directions: Sequence[Direction], device: str | torch.device = "cpu") -> EditTable:
    """Directions of one space, stacked, float32: what the rows of `branches` point to.

    Raises:
        ValueError: none given, or of different spaces or key frames.
    """
    kinds = {(direction.space, direction.keys_frame) for direction in directions}
    if len(kinds) != 1:
        raise ValueError(
            f"an edit table needs directions of one space and key frame, got {len(directions)} of {len(kinds)} kinds"
        )
    (space, frame) = kinds.pop()
    stacked = [
        torch.stack([block.float() for block in blocks]).to(device)
        for blocks in zip(*(direction.blocks() for direction in directions), strict=True)
    ]
    if space == "kv":
        return EditTable(space="kv", keys=stacked[0], values=stacked[1], vectors=None, keys_frame=frame)
    return EditTable(space=space, keys=None, values=None, vectors=stacked[0], keys_frame=frame)


def branches(edits: Sequence[Edit], run: LatentRollout, space: Space, prompts: Sequence[int] | None = None) -> Branches:
    """Every edit on every prompt of a run.

    Args:
        edits: what to try.
        run: finished rollout of the prompts (its embeddings kept where an edit has `own_norm` in embedding space).
        space: of the table that the edits point to.
        prompts: rows of the run's batch; None: all of them.

    Returns:
        Rows in the order prompt by prompt, each with all edits: row = prompt_index * len(edits) + edit_index.
    """
    rows = torch.arange(len(run)) if prompts is None else torch.as_tensor(prompts, dtype=torch.long)
    keys_values = [coefficients_of(e.coefficient, e.part, e.key_scale, e.value_scale) for e in edits]
    number = len(rows)

    def tiled(values: Sequence[float] | Sequence[int] | Sequence[bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).repeat(number)

    latent = tiled([e.latent for e in edits], torch.long)
    prompt = rows.repeat_interleave(len(edits))
    value_coefficient = tiled([v for _, v in keys_values], torch.float32)
    own_norm = tiled([e.own_norm for e in edits], torch.bool)
    if bool(own_norm.any()):
        if space == "embedding":
            if run.embeddings is None:
                raise ValueError("the run must have kept its embeddings: rollout(..., keep=(..., 'embeddings'))")
            own = run.embeddings
        else:
            own = run.states[:, :-1]
        norms = own.float().norm(dim=-1).cpu()[prompt, latent - 1]
        value_coefficient = torch.where(own_norm, value_coefficient * norms, value_coefficient)
    return Branches(
        prompt=prompt,
        latent=latent,
        direction=tiled([e.direction for e in edits], torch.long),
        key_coefficient=tiled([k if space == "kv" else 0.0 for k, _ in keys_values], torch.float32),
        value_coefficient=value_coefficient,
        replace=tiled([e.replace for e in edits], torch.bool),
    )
