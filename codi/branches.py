"""Branches: thousands of edited variants of one rollout, decoded to full greedy answers.

A *branch* is one row: a prompt of the run, the latent whose cache slot (or embedding, or hidden state) is edited, a
direction of an `EditTable` and a coefficient. Different prompts, latents, directions and coefficients share a batch.
When the edit happens is the `timing`:

==============  ==================================================================================================
early-exit      latents 1..k only; edit at latent k; end of thought; answer
continue        edit at latent k, compute latents k+1..n on the edited past; end of thought; answer
cached          all n latents first, then edit slot k (from the edited z_k, in embedding and hidden space); answer
==============  ==================================================================================================

Two engines give the same answers. "clones" is the plain reference: every row gets a copy of its prompt's cache, the
copy is edited and goes through `rollout` and `decode_answers`. "shared" never copies a cache: all rows of a prompt
attend to one shared prefix, and a row owns only the slots in which it differs (see `codi.cache.BranchCache`).

What is rounded, and when: an edit is computed in float32 (float64 for a float64 model) and rounded once to the model's
dtype, as a write to the cache would be. Both engines see the same rounded slot; `applied_norm` is the norm of the
difference that is left after that rounding.

Knows nothing about tasks, means or files: directions come from steering/, answers go to experiments/::

    table = EditTable("kv", keys=dk, values=dv, keys_frame="content")
    branches = Branches(prompt, latent, direction, key_coefficient, value_coefficient)
    decode_branches(model, run, table, branches, timing="early-exit").texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import torch
from torch import Tensor

from codi.cache import BranchCache, branch_attention, read_slots, replace_slot
from codi.decode import decode_answers, default_new_tokens, exclude, most_probable, to_text
from codi.protocol import UserError
from codi.rollout import Intervention, LatentRollout, feed, rollout
from codi.rope import rotate

if TYPE_CHECKING:
    from codi.model import CodiModel

__all__ = ["BranchAnswers", "Branches", "EditTable", "Engine", "Space", "Timing", "decode_branches"]

Space = Literal["kv", "embedding", "hidden"]
Timing = Literal["early-exit", "continue", "cached"]
Engine = Literal["shared", "clones"]
Frame = Literal["content", "raw"]


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
    keys_frame: Frame = "content"

    def __post_init__(self) -> None:
        _one_of("space", self.space, Space)
        _one_of("keys_frame", self.keys_frame, Frame)
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
        alike = _number([largest.double().cpu(), at.cpu()])  # may be the same: only these are compared whole
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


@dataclass(frozen=True)
class BranchAnswers:
    """Greedy answers of branches, in the order of the rows.

    Attributes:
        tokens: per row, the ids before the end of text (which is not included).
        texts: the same as text.
        finished: per row, whether the end of text came before the limit.
        first_token: (row,) first token chosen, the end of text included.
        applied_norm: (row,) norm of what was really added, after rounding to the model's dtype: over layers, kv-heads,
            keys and values in kv space; over d_model otherwise; 0 without an edit.
        first_logits: (row, vocab) at the first answer position, nothing excluded, on the CPU; None if not asked for.
        batch_size: rows that were computed at once.
        n_computed: rows that were computed; the rest repeat one of them.
    """

    tokens: list[list[int]]
    texts: list[str]
    finished: list[bool]
    first_token: Tensor
    applied_norm: Tensor
    first_logits: Tensor | None = None
    batch_size: int = 0
    n_computed: int = 0


# --- What an edit is --------------------------------------------------------------------------------------------------


def _one_of(name: str, value: str, kind: object) -> None:
    if value not in get_args(kind):
        raise UserError(f"{name} must be one of {', '.join(map(repr, get_args(kind)))}, got {value!r}")


@dataclass(frozen=True)
class _Edits:
    """Edits of the rows of one batch, on the model's device; all rows edit the same latents."""

    model: CodiModel
    table: EditTable | None
    latents: tuple[int, ...]
    direction: Tensor  # (row, edit)
    key_coefficient: Tensor
    value_coefficient: Tensor
    replace: Tensor
    squared: Tensor  # (row,) float64, grows: what was really applied

    @classmethod
    def of(cls, model: CodiModel, table: EditTable | None, branches: Branches, latents: tuple[int, ...]) -> _Edits:
        device, dtype = model.device, _arithmetic(model)
        order = _wide(branches.latent).argsort(dim=1)  # as in `latents`

        def sorted_(tensor: Tensor) -> Tensor:
            return _wide(tensor).gather(1, order)

        assert branches.replace is not None
        return cls(
            model,
            table,
            latents,
            _upload(sorted_(branches.direction), device),
            _upload(sorted_(branches.key_coefficient).to(dtype), device),
            _upload(sorted_(branches.value_coefficient).to(dtype), device),
            _upload(sorted_(branches.replace), device),
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


class _VectorEdit(Intervention):
    """The edits of embedding and hidden space as an intervention of a rollout."""

    def __init__(self, edits: _Edits, space: Space) -> None:
        self._edits = edits
        self._space = space

    def edit_hidden(self, k: int, h: Tensor) -> Tensor:
        return self._edits.vector(k, h) if self._space == "hidden" and k in self._edits.latents else h

    def edit_embedding(self, k: int, z: Tensor) -> Tensor:
        return self._edits.vector(k, z) if self._space == "embedding" and k in self._edits.latents else z


class _SlotEdit(Intervention):
    """Edits of cache slots that the rollout itself computes, as an intervention."""

    def __init__(self, edits: _Edits, first_position: Tensor) -> None:
        self._edits = edits
        self._first_position = first_position

    def edit_kv(self, k: int, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if k not in self._edits.latents:
            return keys, values
        return self._edits.slot(k, self._first_position + k - 1, keys, values, layer)


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _arithmetic(model: CodiModel) -> torch.dtype:
    return torch.float64 if model.dtype == torch.float64 else torch.float32


# --- Decoding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_branches(
    model: CodiModel,
    run: LatentRollout,
    table: EditTable | None,
    branches: Branches,
    *,
    timing: Timing = "early-exit",
    max_new_tokens: int | None = None,
    engine: Engine = "shared",
    drafts: bool | None = None,
    batch_size: int | None = None,
    keep_first_logits: bool = False,
) -> BranchAnswers:
    """Greedy answers of many edited variants of one rollout.

    Rows without an edit (direction -1, or only coefficients of 0) are computed once per prompt (and exit) and repeated.
    So are, by the shared engine, rows that ask for the same edit: the same row again, or its mirror, direction B-A with
    coefficient -c beside A-B with c.

    Args:
        model: the model.
        run: rollout of all prompts that kept its cache; not modified.
        table: the directions; None if no row has an edit.
        branches: the rows, in any order.
        timing: when the edit happens, see above.
        max_new_tokens: at most this many tokens per answer; None: `default_new_tokens`.
        engine: "shared" prefixes or cache "clones"; the same answers.
        drafts: shared engine: check the answer of the unedited prompt in one pass and decode only rows that disagree.
            Does not change answers. Saves passes and wastes the tokens of rows that disagree, so it pays where a pass
            costs more than its rows; None: where there are that few rows.
        batch_size: most rows at once; None: what memory allows. Halved when memory runs out. Does not change answers.
        keep_first_logits: also return the logits at the first answer position.

    Raises:
        ValueError: rows that point outside the run or the table, a table of other sizes than the model's, or an edit
            with a coefficient other than 0 that changed nothing.
    """
    _check(model, run, table, branches, timing, engine, max_new_tokens, batch_size)
    assert branches.replace is not None
    limit = default_new_tokens(model) if max_new_tokens is None else max_new_tokens
    job = _Job.of(model, run, table, timing, limit, keep_first_logits)
    model.check_length(job.longest)
    batch = _BatchSize(job.rows_that_fit(engine) if batch_size is None else batch_size)
    size = len(branches)
    out = _Collected(size, limit)

    if drafts is None:
        drafts = size <= _FEW_ROWS["cuda" if model.device.type == "cuda" else "cpu"]
    # Rows of one kind have the same answer without an edit.
    edited = _has_edit(branches, table)
    exits = torch.full((size,), run.n_latents)
    if timing == "early-exit":
        exits = _wide(branches.latent).max(1).values
    kinds, kind = torch.unique(branches.prompt * (run.n_latents + 1) + exits, return_inverse=True)
    first_row = torch.full((len(kinds),), size).scatter_reduce(0, kind, torch.arange(size), "amin")
    wanted = torch.zeros(len(kinds), dtype=torch.bool)
    wanted[kind[~edited]] = True
    if drafts and engine == "shared":
        wanted |= torch.bincount(kind[edited], minlength=len(kinds)) >= _ROWS_WORTH_A_DRAFT
    unedited = _Collected(len(kinds), limit)
    computed = wanted.nonzero()[:, 0]
    if len(computed):
        part = _Collected(len(computed), limit)
        _decode_all(job, branches.select(first_row[computed]).without_edit(), None, engine, batch, part)
        unedited.put(computed, part.pick(torch.arange(len(computed))))
        rows = (~edited).nonzero()[:, 0]
        out.put(rows, unedited.pick(kind[rows]))
    rows = distinct = edited.nonzero()[:, 0]
    if len(rows):
        repeats = torch.arange(len(rows))
        if engine == "shared" and table is not None:
            firsts, repeats = _distinct(branches.select(rows), table)
            distinct = rows[firsts]
        part = _Collected(len(distinct), limit)
        tried = unedited.tokens[kind[distinct]] if drafts and engine == "shared" else None
        _decode_all(job, branches.select(distinct), tried, engine, batch, part)
        out.put(rows, part.pick(repeats))

    ended = out.tokens == model.protocol.eos_id
    lengths = (out.tokens.ge(0) & ~ended).sum(1)
    tokens = [ids[:length] for ids, length in zip(out.tokens.tolist(), lengths.tolist(), strict=True)]
    texts = {ids: to_text(model, ids) for ids in set(map(tuple, tokens))}
    return BranchAnswers(
        tokens=tokens,
        texts=[texts[tuple(ids)] for ids in tokens],
        finished=ended.any(1).tolist(),
        first_token=out.tokens[:, 0],
        applied_norm=out.applied_norm,
        first_logits=out.first_logits,
        batch_size=batch.used,
        n_computed=len(computed) + len(distinct),
    )


_FEW_ROWS = {"cpu": 64, "cuda": 2048}  # up to here a pass costs more than its rows
_WORTH_KEEPING = 0.9  # a batch is packed anew when less than this share of it is still being decoded
_ROWS_WORTH_A_DRAFT = 4  # an unedited answer is computed as a draft if at least this many edited rows can use it


def _wide(tensor: Tensor) -> Tensor:
    """(row,) or (row, edit) to (row, edit)."""
    return tensor[:, None] if tensor.dim() == 1 else tensor


def _number(columns: Sequence[Tensor]) -> Tensor:
    """(row,) numbers that are equal exactly where rows are equal in all columns, each (row,); 0, 1, … in some order."""
    number, count = torch.zeros(len(columns[0]), dtype=torch.long), 1
    for column in columns:
        values, place = torch.unique(column, return_inverse=True)
        if count * len(values) >= 2**62:  # number again from 0, before numbers get too large
            present, number = torch.unique(number, return_inverse=True)
            count = len(present)
        number, count = number * len(values) + place, count * len(values)
    return torch.unique(number, return_inverse=True)[1]


def _distinct(branches: Branches, table: EditTable) -> tuple[Tensor, Tensor]:
    """Rows (distinct,) that ask for different things, the first of each; (row,) which of these each row repeats."""
    first, sign = table.same
    order = _wide(branches.latent).argsort(dim=1)
    asked = (getattr(branches, field.name) for field in fields(branches)[1:])
    latent, direction, key, value, replace = (_wide(x).gather(1, order) for x in asked)
    idle, index = direction < 0, direction.clamp(min=0)
    used = (table.keys is not None, table.keys is None or table.values is not None)
    key, value = (  # + 0.0: no negative zeros
        (x * sign[index]).masked_fill(idle, 0.0) + 0.0 if part else torch.zeros_like(x)
        for x, part in zip((key, value), used, strict=True)
    )
    columns = [branches.prompt]
    for column in (latent, first[index].masked_fill(idle, -1), replace, key, value):
        columns += column.unbind(1)
    repeats = _number(columns)
    rows = torch.full((int(repeats.max()) + 1,), len(branches))
    return rows.scatter_reduce(0, repeats, torch.arange(len(branches)), "amin"), repeats


def _has_edit(branches: Branches, table: EditTable | None) -> Tensor:
    """(row,) whether a row differs from its prompt at all."""
    if table is None:
        return torch.zeros(len(branches), dtype=torch.bool)
    assert branches.replace is not None
    asked = branches.replace
    if table.values is not None or table.vectors is not None:
        asked = asked | (branches.value_coefficient != 0)
    if table.keys is not None:
        asked = asked | (branches.key_coefficient != 0)
    return _wide(asked & (branches.direction >= 0)).any(1)


def _check(
    model: CodiModel,
    run: LatentRollout,
    table: EditTable | None,
    branches: Branches,
    timing: Timing,
    engine: Engine,
    max_new_tokens: int | None,
    batch_size: int | None,
) -> None:
    _one_of("timing", timing, Timing)
    _one_of("engine", engine, Engine)
    if run.past_key_values is None:
        raise UserError("the run must have kept its cache: rollout(..., keep=(..., 'cache'))")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number is not None and (isinstance(number, bool) or number < 1):
            raise UserError(f"{name} must be 1 or more, got {number}")
    limits = {"prompt": (0, len(run) - 1), "latent": (1, run.n_latents), "direction": (-1, -1)}
    if table is not None:
        limits["direction"] = (-1, len(table) - 1)
        sizes: dict[str, tuple[int, ...]] = {
            "keys": (model.n_layers, model.n_kv_heads, model.d_head),
            "vectors": (model.d_model,),
        }
        sizes["values"] = sizes["keys"]
        for name, expected in sizes.items():
            tensor = getattr(table, name)
            if tensor is not None and tensor.shape[1:] != expected:
                raise UserError(f"{name} of the table must be (direction, *{expected}), got {tuple(tensor.shape)}")
    if not len(branches):
        return
    for name, (low, high) in limits.items():
        values = getattr(branches, name)
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise UserError(f"{name} of a branch must be in {low}..{high}, got {least if least < low else most}")
    assert branches.replace is not None
    if table is not None and table.space == "kv" and bool(branches.replace.any()):
        raise UserError("replace is for embedding and hidden space; in kv space edits are added")
    if branches.latent.dim() == 2 and branches.latent.shape[1] > 1:
        ordered = branches.latent.sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise UserError("the latents of one branch must differ")
        if timing == "cached" and table is not None and table.space != "kv":
            raise UserError(f"timing 'cached' in {table.space} space edits one latent per row, got {ordered.shape[1]}")


@dataclass(frozen=True)
class _Job:
    """What all batches of one call share."""

    model: CodiModel
    run: LatentRollout
    table: EditTable | None
    timing: Timing
    max_new_tokens: int
    keep_first_logits: bool
    visible: Tensor  # (prompt, position) bool, on the CPU
    first_position: Tensor  # (prompt,) position id of latent 1, on the CPU

    @classmethod
    def of(
        cls,
        model: CodiModel,
        run: LatentRollout,
        table: EditTable | None,
        timing: Timing,
        max_new_tokens: int,
        keep_first_logits: bool,
    ) -> _Job:
        run = run if run.states.device == model.device else run.to(model.device)
        table = None if table is None else table.to(model.device, _arithmetic(model))
        visible = torch.ones_like(run.attention_mask) if model.mask == "published" else run.attention_mask
        return cls(
            model, run, table, timing, max_new_tokens, keep_first_logits, visible.cpu(), run.first_position.cpu()
        )

    @property
    def space(self) -> Space:
        return "kv" if self.table is None else self.table.space

    @property
    def longest(self) -> int:
        """Positions that the longest text can take."""
        new = self.run.n_latents + len(self.model.protocol.after_latents) + self.max_new_tokens - 1
        return int(self.first_position.max()) + new

    def rows_that_fit(self, engine: Engine) -> int:
        """Rows at once that memory allows, bounded by what still makes a batch faster."""
        model, config = self.model, self.model.base.config
        size = model.dtype.itemsize
        slot = 2 * model.n_layers * model.n_kv_heads * model.d_head
        length = self.run.attention_mask.shape[1] + self.max_new_tokens
        if engine == "clones":
            held = 3 * slot * length * size  # the copy, and a second and third one while it grows or shrinks
            tokens, most = 1, 256
        else:
            held = 4 * slot * self.max_new_tokens * max(size, 4)
            tokens = len(model.protocol.after_latents) + 4
            most = 16384 if model.device.type == "cuda" else 1024 * torch.get_num_threads()
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * model.d_model
        passing = tokens * (8 * model.d_model + 3 * inner) * max(size, 4) + tokens * 4 * model.n_heads * length * 4
        passing += 3 * model.vocab_size * 4
        return max(1, min(most, free_memory(model.device) // 2 // (held + passing)))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


@dataclass
class _BatchSize:
    """Rows at once: what the caller allows, or memory, halved whenever that was too much."""

    size: int
    used: int = 0

    def halve(self, rows: int) -> None:
        self.size = max(1, rows // 2)


@dataclass(frozen=True)
class _Decoded:
    """Answers of one batch: tokens (row, token) with the end of text, -1 after it; applied_norm (row,)."""

    tokens: Tensor
    applied_norm: Tensor
    first_logits: Tensor | None


class _Collected:
    """Answers of all rows, in the caller's order, on the CPU."""

    def __init__(self, size: int, max_new_tokens: int) -> None:
        self.tokens = torch.full((size, max_new_tokens), -1)
        self.applied_norm = torch.zeros(size, dtype=torch.float64)
        self.first_logits: Tensor | None = None

    def put(self, rows: Tensor, part: _Decoded) -> None:
        self.tokens[rows] = part.tokens.cpu()
        self.applied_norm[rows] = part.applied_norm.cpu()
        if part.first_logits is not None:
            logits = part.first_logits.cpu()
            if self.first_logits is None:
                self.first_logits = logits.new_zeros(len(self.tokens), logits.shape[1])
            self.first_logits[rows] = logits

    def pick(self, rows: Tensor) -> _Decoded:
        logits = None if self.first_logits is None else self.first_logits[rows]
        return _Decoded(self.tokens[rows], self.applied_norm[rows], logits)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "memory" in str(error) and "alloc" in str(error)


def _decode_all(
    job: _Job, branches: Branches, drafts: Tensor | None, engine: Engine, batch: _BatchSize, out: _Collected
) -> None:
    """Sort rows so that those that share a prefix are neighbours, and decode them batch by batch."""
    latents = _wide(branches.latent).sort(dim=1).values
    base = job.run.n_latents + 1
    code = (latents * base ** torch.arange(latents.shape[1])).sum(1)
    _, signature = torch.unique(code, return_inverse=True)
    first = torch.full((int(signature.max()) + 1,), len(branches))
    signatures = latents[first.scatter_reduce(0, signature, torch.arange(len(branches)), "amin")]
    lengths = job.run.prompt_lengths.cpu()
    key = signature * (int(lengths.max()) + 1) + lengths[branches.prompt]
    order = (key * len(job.run) + branches.prompt).argsort(stable=True)
    decode = _decode_shared if engine == "shared" else _decode_clones
    for index, chosen in enumerate(signatures.tolist()):
        waiting = order[signature[order] == index]
        while len(waiting):
            parts = -(-len(waiting) // batch.size)
            rows = waiting[: -(-len(waiting) // parts)]
            failed = False
            try:
                part = decode(job, branches.select(rows), tuple(chosen), None if drafts is None else drafts[rows])
            except RuntimeError as error:
                if not _out_of_memory(error) or len(rows) == 1:
                    raise
                failed = True
            if failed:  # outside the handler, so that what the failed batch held is free again
                batch.halve(len(rows))
                if job.model.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            out.put(rows, part)
            batch.used = max(batch.used, len(rows))
            waiting = waiting[len(rows) :]


# --- Engine: clones ---------------------------------------------------------------------------------------------------


def _decode_clones(job: _Job, branches: Branches, latents: tuple[int, ...], drafts: Tensor | None) -> _Decoded:
    """A copy of the prompt's cache for every row, edited, then decoded like any other run."""
    model, timing = job.model, job.timing
    n, first, last = job.run.n_latents, latents[0], latents[-1]
    edits = _Edits.of(model, job.table, branches, latents)
    exit_ = last if timing == "early-exit" else n

    if job.space != "kv":
        change = _VectorEdit(edits, job.space)
        before = job.run.truncate(first - 1).select(branches.prompt)
        run = rollout(model, before, first if timing == "cached" else exit_, [change], keep=("cache",))
        if timing == "cached":
            full = job.run.select(branches.prompt)
            _replace(full, first, *_slot(run, first))
            run = full
    elif timing == "continue":
        before = job.run.truncate(first).select(branches.prompt)
        position = before.first_position
        _replace(before, first, *edits.slot(first, position + first - 1, *_slot(before, first)))
        run = rollout(model, before, n, [_SlotEdit(edits, position)], keep=("cache",))
    else:
        run = job.run.truncate(exit_).select(branches.prompt)
        for k in latents:
            _replace(run, k, *edits.slot(k, run.first_position + k - 1, *_slot(run, k)))

    applied = edits.applied_norm()
    answers = decode_answers(model, run, job.max_new_tokens, keep_first_logits=job.keep_first_logits)
    tokens = torch.full((len(branches), job.max_new_tokens), -1)
    for row, (ids, done) in enumerate(zip(answers.tokens, answers.finished, strict=True)):
        ids = ids + [model.protocol.eos_id] * done
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return _Decoded(tokens, applied, answers.first_logits)


def _slot(run: LatentRollout, latent: int) -> tuple[Tensor, Tensor]:
    """Keys and values (row, layer, kv_head, d_head) of a latent's cache slot."""
    assert run.past_key_values is not None
    at = run.prompt_width + latent - 1
    keys, values = read_slots(run.past_key_values, at, at + 1)
    return keys[:, 0], values[:, 0]


def _replace(run: LatentRollout, latent: int, keys: Tensor, values: Tensor) -> None:
    """Put a slot into the cache of a run that nobody else holds."""
    assert run.past_key_values is not None
    for layer in range(keys.shape[1]):
        replace_slot(run.past_key_values, layer, run.prompt_width + latent - 1, keys[:, layer], values[:, layer])


# --- Engine: shared prefixes ------------------------------------------------------------------------------------------


def _decode_shared(job: _Job, branches: Branches, latents: tuple[int, ...], drafts: Tensor | None) -> _Decoded:
    """One prefix per prompt; rows own the slots of their edited latents and of whatever they compute themselves."""
    model, run, timing = job.model, job.run, job.timing
    assert run.past_key_values is not None
    device = model.device
    n, first, last = run.n_latents, latents[0], latents[-1]
    exit_ = last if timing == "early-exit" else n
    edits = _Edits.of(model, job.table, branches, latents)
    prompt = _upload(branches.prompt, device)
    position = run.first_position[prompt]  # of latent 1

    # Which latents are own slots from the start, which does the branch compute, which stay in the shared prefix?
    if job.space == "kv":
        given = (first,) if timing == "continue" else latents
        computed = range(first + 1, n + 1) if timing == "continue" else range(0)
        shared = range(1, first) if timing == "continue" else [k for k in range(1, exit_ + 1) if k not in latents]
    else:
        given = ()
        computed = range(first, first + 1) if timing == "cached" else range(first, exit_ + 1)
        shared = [k for k in range(1, n + 1) if k != first] if timing == "cached" else range(1, first)

    shared_latents = torch.tensor(list(shared), dtype=torch.long)
    columns = torch.cat((torch.arange(run.prompt_width), run.prompt_width - 1 + shared_latents))
    prompts, groups = torch.unique_consecutive(branches.prompt, return_inverse=True)
    visible = job.visible[prompts][:, columns]
    seen = visible.any(0)
    columns, visible = columns[seen], visible[:, seen]
    first_positions = job.first_position[prompts] - run.prompt_width
    cache = BranchCache(run.past_key_values, prompts, columns, visible, groups, first_positions, job.longest)

    for k in given:
        keys, values = _slot(run, k)
        cache.append(*edits.slot(k, position + k - 1, keys[prompt], values[prompt]), position + k - 1)
    with branch_attention(model.decoder, cache):
        pending: tuple[Tensor, Tensor] | None = None  # a latent that is fed together with the end-of-thought token
        h = run.states[prompt, first - 1 if job.space != "kv" else first]
        for k in computed:
            if job.space == "hidden" and k in latents:
                h = edits.vector(k, h)
            z = model.project(h)
            if job.space == "embedding" and k in latents:
                z = edits.vector(k, z)
            slot_edit = job.space == "kv" and k in latents
            if k == computed[-1] and not slot_edit:
                pending = (z[:, None], (position + k - 1)[:, None])
                break
            h = _feed(model, z[:, None], cache, (position + k - 1)[:, None])[:, 0]
            if slot_edit:
                keys, values = (x.to(model.dtype) for x in cache.read_own(-1))
                cache.write_own(-1, *edits.slot(k, position + k - 1, keys, values))
        hidden = None
        if pending is not None and timing == "cached":
            hidden = _upload(columns >= run.prompt_width + first, device)  # the new z_k does not see those after it
        tokens, logits = _answer(job, cache, pending, hidden, position + exit_, drafts)
    return _Decoded(tokens, edits.applied_norm(), logits)  # read last: the host waits for it


def _feed(model: CodiModel, embeddings: Tensor, cache: BranchCache, positions: Tensor) -> Tensor:
    """Last states (row, token, d_model) of tokens that the cache grows by."""
    cache.positions = positions
    return feed(model, embeddings, cache, None, positions).last


def _answer(
    job: _Job,
    cache: BranchCache,
    pending: tuple[Tensor, Tensor] | None,
    hidden_columns: Tensor | None,
    position: Tensor,
    drafts: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Greedy answers of all rows of a branch cache: the draft is checked in one pass, the rest is decoded token by
    token.

    Args:
        pending: embedding (row, 1, d_model) and position id (row, 1) of a latent to feed just before the end-of-thought
            tokens, or None.
        hidden_columns: (column,) columns of the prefix that this latent cannot see.
        position: (row,) position id of the first end-of-thought token.
        drafts: (row, token) tokens to try, the end of text included, -1 after it.

    Returns:
        tokens (row, max_new_tokens) with the end of text, -1 after it; first logits (row, vocab) or None.
    """
    model, limit = job.model, job.max_new_tokens
    device, eos, size = model.device, model.protocol.eos_id, len(position)
    after = torch.tensor(model.protocol.after_latents, device=device)
    tried = torch.empty(size, 0, dtype=torch.long)
    if drafts is not None:
        # The last token of a draft is only checked; nothing follows it.
        tried = drafts[:, :-1].where(drafts[:, 1:] >= 0, -1)
        tried = tried[:, : int(tried.ge(0).sum(1).max())]
    checked = _upload(tried, device)
    fed = torch.cat((after.expand(size, -1), checked.clamp(min=0)), dim=1)
    embeddings = model.embed(fed)
    positions = position[:, None] + torch.arange(fed.shape[1], device=device)
    if pending is not None:
        embeddings = torch.cat((pending[0], embeddings), dim=1)
        positions = torch.cat((pending[1], positions), dim=1)
    cache.hidden_from_first_token = hidden_columns
    states = _feed(model, embeddings, cache, positions)[:, -1 - checked.shape[1] :]  # they predict tokens 0, 1, …
    cache.hidden_from_first_token = None

    tokens = torch.full((size, limit), -1, dtype=torch.long, device=device)
    first_logits = None
    going = torch.arange(size, device=device)  # rows whose draft has been right so far
    for step in range(checked.shape[1] + 1):
        logits = model.logits(states[going, step])
        if step == 0 and job.keep_first_logits:
            first_logits = logits
        chosen = most_probable(exclude(model, logits))
        tokens[going, step] = chosen
        if step < checked.shape[1]:
            going = going[chosen == checked[going, step]]
            if len(going) == 0:
                break

    count = tokens.ge(0).sum(1)
    latest = tokens.gather(1, count[:, None] - 1)[:, 0]
    alive = ((latest != eos) & (count < limit)).nonzero()[:, 0]
    if len(alive) and checked.shape[1]:
        # Tokens of a draft that were fed but not chosen are no part of the past.
        ahead = torch.arange(checked.shape[1], device=device)
        cache.hide_own(ahead[None, :] >= (count - 1)[:, None])
    rows = torch.arange(size, device=device)  # the row of `tokens` that each row of the cache is
    while len(alive):
        if len(alive) < _WORTH_KEEPING * len(rows):
            cache.select(alive)
            rows, alive = rows[alive], torch.arange(len(alive), device=device)
        # Finished rows that are still in the cache are fed something and not read.
        at = count[rows].clamp(max=limit - 1)
        positions = (position[rows] + len(after) - 1 + at)[:, None]
        states = _feed(model, model.embed(tokens[rows, at - 1][:, None]), cache, positions)[:, 0]
        read = rows[alive]
        chosen = most_probable(exclude(model, model.logits(states[alive])))
        tokens[read, count[read]] = chosen
        count[read] += 1
        alive = alive[(chosen != eos) & (count[read] < limit)]
    return tokens, first_logits
