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
attend to one shared prefix, and a row owns only the slots in which it differs (see `lm.cache.BranchCache`).

What is rounded, and when: an edit is computed in float32 (float64 for a float64 model) and rounded once to the model's
dtype, as a write to the cache would be. Both engines see the same rounded slot; `applied_norm` is the norm of the
difference that is left after that rounding.

Knows nothing about tasks, means or files: directions come from steering/, answers go to experiments/::

    table = EditTable("kv", keys=dk, values=dv, keys_frame="content")
    branches = Branches(prompt, latent, direction, key_coefficient, value_coefficient)
    decode_branches(model, run, table, branches, timing="early-exit").texts
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codi.decode import default_new_tokens
from codi.edits import Branches, EditTable, distinct_rows, has_edit, one_of, wide
from codi.engines import Decoded, Job, decode_clones, decode_shared
from codi.parts import Parts
from codi.protocol import UserError
from codi.rollout import LatentRollout
from lm.generate import as_lists
from lm.terms import Engine, Timing
from lm.text import to_text

__all__ = ["BranchAnswers", "decode_branches"]


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


@torch.no_grad()
def decode_branches(
    model: Parts,
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
    job = Job.of(model, run, table, timing, limit, keep_first_logits)
    model.check_length(job.longest)
    batch = _BatchSize(job.rows_that_fit(engine) if batch_size is None else batch_size)
    size = len(branches)
    out = _Collected(size, limit)

    if drafts is None:
        drafts = size <= _FEW_ROWS["cuda" if model.device.type == "cuda" else "cpu"]
    drafts = drafts and engine == "shared"
    edited = has_edit(branches, table)
    kind, unedited, n_computed = _unedited(job, branches, edited, drafts, engine, batch)
    rows = (~edited).nonzero()[:, 0]
    out.put(rows, unedited.pick(kind[rows]))
    rows = edited.nonzero()[:, 0]
    if len(rows):
        firsts = repeats = torch.arange(len(rows))
        if engine == "shared" and table is not None:
            firsts, repeats = distinct_rows(branches.select(rows), table)
        chosen = rows[firsts]
        part = _Collected(len(chosen), limit)
        tried = unedited.tokens[kind[chosen]] if drafts else None
        _decode_all(job, branches.select(chosen), tried, engine, batch, part)
        out.put(rows, part.pick(repeats))
        n_computed += len(chosen)

    tokens, finished = as_lists(out.tokens, model.end_ids)
    texts = {ids: to_text(model.tokenizer, ids) for ids in set(map(tuple, tokens))}
    return BranchAnswers(
        tokens=tokens,
        texts=[texts[tuple(ids)] for ids in tokens],
        finished=finished,
        first_token=out.tokens[:, 0],
        applied_norm=out.applied_norm,
        first_logits=out.first_logits,
        batch_size=batch.used,
        n_computed=n_computed,
    )


_FEW_ROWS = {"cpu": 64, "cuda": 2048}  # up to here a pass costs more than its rows
_ROWS_WORTH_A_DRAFT = 4  # an unedited answer is computed as a draft if at least this many edited rows can use it


def _unedited(
    job: Job, branches: Branches, edited: Tensor, drafts: bool, engine: Engine, batch: _BatchSize
) -> tuple[Tensor, _Collected, int]:
    """Answers without an edit: (row,) the kind of each row, and the answer of every kind that is wanted.

    Rows of one kind (the same prompt and exit) have the same answer without an edit. Wanted are those of rows that have
    no edit, and drafts that enough edited rows can use.
    """
    size, n = len(branches), job.run.n_latents
    exits = torch.full((size,), n)
    if job.timing == "early-exit":
        exits = wide(branches.latent).max(1).values
    kinds, kind = torch.unique(branches.prompt * (n + 1) + exits, return_inverse=True)
    first_row = torch.full((len(kinds),), size).scatter_reduce(0, kind, torch.arange(size), "amin")
    wanted = torch.zeros(len(kinds), dtype=torch.bool)
    wanted[kind[~edited]] = True
    if drafts:
        wanted |= torch.bincount(kind[edited], minlength=len(kinds)) >= _ROWS_WORTH_A_DRAFT
    unedited = _Collected(len(kinds), job.max_new_tokens)
    computed = wanted.nonzero()[:, 0]
    if len(computed):
        part = _Collected(len(computed), job.max_new_tokens)
        _decode_all(job, branches.select(first_row[computed]).without_edit(), None, engine, batch, part)
        unedited.put(computed, part.pick(torch.arange(len(computed))))
    return kind, unedited, len(computed)


def _check(
    model: Parts,
    run: LatentRollout,
    table: EditTable | None,
    branches: Branches,
    timing: Timing,
    engine: Engine,
    max_new_tokens: int | None,
    batch_size: int | None,
) -> None:
    one_of("timing", timing, Timing)
    one_of("engine", engine, Engine)
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


@dataclass
class _BatchSize:
    """Rows at once: what the caller allows, or memory, halved whenever that was too much."""

    size: int
    used: int = 0

    def halve(self, rows: int) -> None:
        self.size = max(1, rows // 2)


class _Collected:
    """Answers of all rows, in the caller's order, on the CPU."""

    def __init__(self, size: int, max_new_tokens: int) -> None:
        self.tokens = torch.full((size, max_new_tokens), -1)
        self.applied_norm = torch.zeros(size, dtype=torch.float64)
        self.first_logits: Tensor | None = None

    def put(self, rows: Tensor, part: Decoded) -> None:
        self.tokens[rows] = part.tokens.cpu()
        self.applied_norm[rows] = part.applied_norm.cpu()
        if part.first_logits is not None:
            logits = part.first_logits.cpu()
            if self.first_logits is None:
                self.first_logits = logits.new_zeros(len(self.tokens), logits.shape[1])
            self.first_logits[rows] = logits

    def pick(self, rows: Tensor) -> Decoded:
        logits = None if self.first_logits is None else self.first_logits[rows]
        return Decoded(self.tokens[rows], self.applied_norm[rows], logits)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "memory" in str(error) and "alloc" in str(error)


def _decode_all(
    job: Job, branches: Branches, drafts: Tensor | None, engine: Engine, batch: _BatchSize, out: _Collected
) -> None:
    """Sort rows so that those that share a prefix are neighbours, and decode them batch by batch."""
    latents = wide(branches.latent).sort(dim=1).values
    base = job.run.n_latents + 1
    code = (latents * base ** torch.arange(latents.shape[1])).sum(1)
    _, signature = torch.unique(code, return_inverse=True)
    first = torch.full((int(signature.max()) + 1,), len(branches))
    signatures = latents[first.scatter_reduce(0, signature, torch.arange(len(branches)), "amin")]
    lengths = job.run.prompt_lengths.cpu()
    key = signature * (int(lengths.max()) + 1) + lengths[branches.prompt]
    order = (key * len(job.run) + branches.prompt).argsort(stable=True)
    decode = decode_shared if engine == "shared" else decode_clones
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
