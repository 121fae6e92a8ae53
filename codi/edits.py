"""Edits of many rows at once: which directions there are, what each row asks for, and what an edit does to a tensor.

An `EditTable` holds directions, `Branches` says which row edits which latent of which prompt with what coefficient;
`Edits` applies the rows of one batch. What is rounded, and when: an edit is computed in float32 (float64 for a float64
model) and rounded once to the model's dtype, as a write to the cache would be; `applied_norm` is the norm of the
difference that is left after that rounding.

Knows nothing about how rows are decoded: that is branches.py and engines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from codi.interventions import Intervention
from codi.parts import Parts
from codi.protocol import UserError
from codi.rope import rotate
from lm.terms import KeyFrame, Space

__all__ = [
    "Branches",
    "EditTable",
    "Edits",
    "SlotEdit",
    "VectorEdit",
    "arithmetic",
    "distinct_rows",
    "has_edit",
    "one_of",
    "upload",
    "wide",
]


def one_of(name: str, value: str, kind: object) -> None:
    """Refuse a word that is not one of a literal type's."""
    if value not in get_args(kind):
        raise UserError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")


# --- What is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditTable:
    """The directions that branches point to.

    Attributes:
        space: "kv" (cache slot of a latent), "embedding" (z_k) or "hidden" (h_{k-1}, before it is projected into z_k).
        keys, values: (direction, layer, kv_head, d_head), kv space; None leaves that part alone. Zeros leave a layer or
            kv-head alone.
        vectors: (direction, d_model), embedding and hidden space.
        keys_frame: "content": keys are un-rotated and are rotated to the position of the slot they are added to;
            "raw": they are added as they are.
    """

    space: Space
    keys: Tensor | None = None
    values: Tensor | None = None
    vectors: Tensor | None = None
    keys_frame: KeyFrame = "content"

    def __post_init__(self) -> None:
        one_of("space", self.space, Space)
        one_of("keys_frame", self.keys_frame, KeyFrame)
        if self.space == "kv":
            if self.vectors is not None or (self.keys is None and self.values is None):
                raise UserError("an EditTable of space 'kv' takes keys, values or both, and no vectors")
            for name, tensor in (("keys", self.keys), ("values", self.values)):
                if tensor is not None and tensor.dim() != 4:
                    raise UserError(f"{name} must be (direction, layer, kv_head, d_head), got {tuple(tensor.shape)}")
            if self.keys is not None and self.values is not None and self.keys.shape != self.values.shape:
                raise UserError(f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} differ in shape")
        elif self.vectors is None or self.keys is not None or self.values is not None:
            raise UserError(f"an EditTable of space {self.space!r} takes vectors, and no keys or values")
        elif self.vectors.dim() != 2:
            raise UserError(f"vectors must be (direction, d_model), got {tuple(self.vectors.shape)}")

    def __len__(self) -> int:
        """Number of directions."""
        return len(next(tensor for tensor in (self.keys, self.values, self.vectors) if tensor is not None))

    @cached_property
    def same(self) -> tuple[Tensor, Tensor]:
        """(direction,) the first direction that is the same but for its sign, itself if there is none; (direction,)
        1.0 or -1.0, what that one is to be multiplied by. Both on the CPU, computed when first asked for."""
        flat = torch.cat([x.flatten(1) for x in (self.keys, self.values, self.vectors) if x is not None], dim=1)
        first, sign = torch.arange(len(self)), torch.ones(len(self), dtype=torch.float64)
        if not flat.numel():
            return first, sign
        largest, at = flat.abs().max(dim=1)
        own = flat.gather(1, at[:, None])[:, 0].sign().double().cpu()
        alike = number_rows([largest.double().cpu(), at.cpu()])  # may be the same: only these are compared whole
        leader = torch.full((len(self),), len(self)).scatter_reduce(0, alike, first, "amin")[alike]
        follows = (leader != first).nonzero()[:, 0]
        ratio = own[follows] * own[leader[follows]]
        turned = flat[leader[follows].to(flat.device)] * ratio.to(flat)[:, None]
        equal = (flat[follows.to(flat.device)] == turned).all(1).cpu() & (ratio != 0)
        first[follows[equal]], sign[follows[equal]] = leader[follows[equal]], ratio[equal]
        return first, sign

    def to(self, device: str | torch.device, dtype: torch.dtype) -> EditTable:
        """The table on another device, in another dtype."""
        tensors = (self.keys, self.values, self.vectors)
        keys, values, vectors = (None if x is None else x.to(device, dtype) for x in tensors)
        return EditTable(self.space, keys, values, vectors, self.keys_frame)


@dataclass(frozen=True)
class Branches:
    """One row per trial. Every field is (row,), or (row, edit) where rows edit several latents; plain lists are taken
    too.

    Attributes:
        prompt: (row,) row of the run.
        latent: latents to edit, 1..n. With several, they must differ within a row, and "early-exit" stops after the
            last.
        direction: index into the EditTable, or -1: no edit.
        key_coefficient: multiples of the table's keys that are added; unused in embedding and hidden space.
        value_coefficient: multiples of the table's values, or of its vectors.
        replace: embedding and hidden space: coefficient · vector replaces z_k (h_{k-1}) instead of being added.
    """

    prompt: Tensor
    latent: Tensor
    direction: Tensor
    key_coefficient: Tensor
    value_coefficient: Tensor
    replace: Tensor | None = None

    def __post_init__(self) -> None:
        prompt = torch.as_tensor(self.prompt, dtype=torch.long).cpu()
        if prompt.dim() != 1:
            raise UserError(f"prompt must be (row,), got {tuple(prompt.shape)}")
        object.__setattr__(self, "prompt", prompt)
        latent = torch.as_tensor(self.latent, dtype=torch.long).cpu()
        if latent.dim() not in (1, 2) or latent.shape[0] != len(prompt) or latent.shape[1:] == (0,):
            raise UserError(f"latent must be (row,) or (row, edit) with {len(prompt)} rows, got {tuple(latent.shape)}")
        object.__setattr__(self, "latent", latent)
        kinds = {"direction": torch.long, "key_coefficient": torch.float64, "value_coefficient": torch.float64}
        for name, dtype in kinds.items():
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=dtype).cpu())
        replace = torch.zeros_like(latent, dtype=torch.bool) if self.replace is None else self.replace
        object.__setattr__(self, "replace", torch.as_tensor(replace, dtype=torch.bool).cpu())
        for field in fields(self)[2:]:
            tensor = getattr(self, field.name)
            if tensor.shape != latent.shape:
                raise UserError(f"{field.name} must be {tuple(latent.shape)} like latent, got {tuple(tensor.shape)}")
        if not torch.isfinite(self.key_coefficient).all() or not torch.isfinite(self.value_coefficient).all():
            raise UserError("coefficients must be finite")

    def __len__(self) -> int:
        return len(self.prompt)

    def select(self, rows: Tensor | Sequence[int]) -> Branches:
        """The given rows, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Branches(*(getattr(self, field.name)[index] for field in fields(self)))

    def without_edit(self) -> Branches:
        """The same rows, unedited."""
        zeros = torch.zeros_like(self.key_coefficient)
        return Branches(self.prompt, self.latent, torch.full_like(self.direction, -1), zeros, zeros)


# --- What an edit is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """Edits of the rows of one batch, on the model's device; all rows edit the same latents."""

    model: Parts
    table: EditTable | None
    latents: tuple[int, ...]
    direction: Tensor  # (row, edit)
    key_coefficient: Tensor
    value_coefficient: Tensor
    replace: Tensor
    squared: Tensor  # (row,) float64, grows: what was really applied

    @classmethod
    def of(cls, model: Parts, table: EditTable | None, branches: Branches, latents: tuple[int, ...]) -> Edits:
        """The edits that rows ask for, of one batch whose rows edit the given latents, ascending."""
        device, dtype = model.device, arithmetic(model)
        order = wide(branches.latent).argsort(dim=1)  # as in `latents`

        def sorted_(tensor: Tensor) -> Tensor:
            return wide(tensor).gather(1, order)

        assert branches.replace is not None
        return cls(
            model,
            table,
            latents,
            upload(sorted_(branches.direction), device),
            upload(sorted_(branches.key_coefficient).to(dtype), device),
            upload(sorted_(branches.value_coefficient).to(dtype), device),
            upload(sorted_(branches.replace), device),
            torch.zeros(len(branches), dtype=torch.float64, device=device),
        )

    def slot(
        self, latent: int, positions: Tensor, keys: Tensor, values: Tensor, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Edited cache slot of a latent; keys, values (row, layer, kv_head, d_head), or (row, kv_head, d_head) of one
        layer 1..n_layers; positions (row,) position ids of the slot."""
        if self.table is None:
            return keys, values
        edit = self.latents.index(latent)
        chosen = self.direction[:, edit]
        index = chosen.clamp(min=0)
        axes = (slice(None),) + (None,) * (keys.dim() - 1)
        edited = []
        parts = (
            (keys, self.table.keys, self.key_coefficient[:, edit]),
            (values, self.table.values, self.value_coefficient[:, edit]),
        )
        for old, directions, coefficient in parts:
            if directions is None:
                edited.append(old)
                continue
            delta = directions[index] if layer is None else directions[index, layer - 1]
            if directions is self.table.keys and self.table.keys_frame == "content":
                delta = rotate(delta, positions[axes[:-1]], self.model)
            scale = coefficient.masked_fill(chosen < 0, 0.0)[axes]
            new = (old.to(delta.dtype) + scale * delta).to(old.dtype)
            self._applied(new, old, delta.dtype)
            edited.append(new)
        return edited[0], edited[1]

    def vector(self, latent: int, x: Tensor) -> Tensor:
        """Edited z_k or h_{k-1}, (row, d_model)."""
        if self.table is None:
            return x
        assert self.table.vectors is not None
        edit = self.latents.index(latent)
        chosen = self.direction[:, edit]
        step = self.value_coefficient[:, edit, None] * self.table.vectors[chosen.clamp(min=0)]
        old = x.to(step.dtype)
        new = torch.where(self.replace[:, edit, None], step, old + step)
        new = torch.where(chosen[:, None] < 0, old, new).to(x.dtype)
        self._applied(new, x, step.dtype)
        return new

    def _applied(self, new: Tensor, old: Tensor, dtype: torch.dtype) -> None:
        change = (new.to(dtype) - old.to(dtype)).flatten(1)
        self.squared.add_(torch.linalg.vector_norm(change, dim=1, dtype=torch.float64).square())

    def applied_norm(self) -> Tensor:
        """(row,) float64 on the CPU.

        Raises:
            ValueError: an edit with a coefficient other than 0 changed nothing.
        """
        norm = self.squared.sqrt().cpu()
        if self.table is not None:
            asked = torch.zeros_like(self.direction, dtype=torch.bool)
            if self.table.keys is not None:
                asked |= self.key_coefficient != 0
            if self.table.keys is None or self.table.values is not None:
                asked |= self.value_coefficient != 0
            asked &= self.direction >= 0
            idle = (asked.any(1).cpu() & (norm == 0)).nonzero()[:, 0]
            if len(idle):
                row = int(idle[0])
                raise UserError(
                    f"direction {int(self.direction[row].max())} at latent {self.latents[-1]} has a coefficient other "
                    f"than 0 but changed nothing in {self.model.dtype}: it is zero or too small"
                )
        return norm


class VectorEdit(Intervention):
    """The edits of embedding and hidden space as an intervention of a rollout."""

    def __init__(self, edits: Edits, space: Space) -> None:
        self._edits = edits
        self._space = space

    def edit_hidden(self, k: int, h: Tensor) -> Tensor:
        return self._edits.vector(k, h) if self._space == "hidden" and k in self._edits.latents else h

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        return self._edits.vector(k, z) if self._space == "embedding" and k in self._edits.latents else z


class SlotEdit(Intervention):
    """Edits of cache slots that the rollout itself computes, as an intervention."""

    def __init__(self, edits: Edits, first_position: Tensor) -> None:
        self._edits = edits
        self._first_position = first_position

    def edit_kv(self, k: int, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if k not in self._edits.latents:
            return keys, values
        return self._edits.slot(k, self._first_position + k - 1, keys, values, layer)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def arithmetic(model: Parts) -> torch.dtype:
    """In which edits are computed."""
    return torch.float64 if model.dtype == torch.float64 else torch.float32


# --- Which rows are the same ------------------------------------------------------------------------------------------


def wide(tensor: Tensor) -> Tensor:
    """(row,) or (row, edit) to (row, edit)."""
    return tensor[:, None] if tensor.dim() == 1 else tensor


def number_rows(columns: Sequence[Tensor]) -> Tensor:
    """(row,) numbers that are equal exactly where rows are equal in all columns, each (row,); 0, 1, … in some order."""
    number, count = torch.zeros(len(columns[0]), dtype=torch.long), 1
    for column in columns:
        values, place = torch.unique(column, return_inverse=True)
        if count * len(values) >= 2**62:  # number again from 0, before numbers get too large
            present, number = torch.unique(number, return_inverse=True)
            count = len(present)
        number, count = number * len(values) + place, count * len(values)
    return torch.unique(number, return_inverse=True)[1]


def distinct_rows(branches: Branches, table: EditTable) -> tuple[Tensor, Tensor]:
    """Rows (distinct,) that ask for different things, the first of each; (row,) which of these each row repeats."""
    first, sign = table.same
    order = wide(branches.latent).argsort(dim=1)
    asked = (getattr(branches, field.name) for field in fields(branches)[1:])
    latent, direction, key, value, replace = (wide(x).gather(1, order) for x in asked)
    idle, index = direction < 0, direction.clamp(min=0)
    used = (table.keys is not None, table.keys is None or table.values is not None)
    key, value = (  # + 0.0: no negative zeros
        (x * sign[index]).masked_fill(idle, 0.0) + 0.0 if part else torch.zeros_like(x)
        for x, part in zip((key, value), used, strict=True)
    )
    columns = [branches.prompt]
    for column in (latent, first[index].masked_fill(idle, -1), replace, key, value):
        columns += column.unbind(1)
    repeats = number_rows(columns)
    rows = torch.full((int(repeats.max()) + 1,), len(branches))
    return rows.scatter_reduce(0, repeats, torch.arange(len(branches)), "amin"), repeats


def has_edit(branches: Branches, table: EditTable | None) -> Tensor:
    """(row,) whether a row differs from its prompt at all."""
    if table is None:
        return torch.zeros(len(branches), dtype=torch.bool)
    assert branches.replace is not None
    asked = branches.replace
    if table.values is not None or table.vectors is not None:
        asked = asked | (branches.value_coefficient != 0)
    if table.keys is not None:
        asked = asked | (branches.key_coefficient != 0)
    return wide(asked & (branches.direction >= 0)).any(1)
