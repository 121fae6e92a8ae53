"""The two engines behind branches: a copy of the prompt's cache per row, or one prefix that all its rows share.

`decode_clones` is the plain reference: every row gets a copy of its prompt's cache, the copy is edited and goes through
`rollout` and `decode_answers`. `decode_shared` never copies a cache: all rows of a prompt attend to one shared prefix,
and a row owns only the slots in which it differs (see `lm.cache.BranchCache`). Both see the same rounded slots and give
the same answers.

Knows one batch of rows that edit the same latents; sorting, batching and repeating are in branches.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from codi.decode import decode_answers
from codi.edits import Branches, Edits, EditTable, SlotEdit, VectorEdit, arithmetic, upload
from codi.parts import Parts
from codi.rollout import LatentRollout, rollout
from lm.cache import BranchCache, branch_attention, read_slots, replace_slot
from lm.generate import Rules, SharedPast, write_tokens
from lm.terms import Engine, Space, Timing

__all__ = ["Decoded", "Job", "decode_clones", "decode_shared", "free_memory"]

_WORTH_KEEPING = 0.9  # a batch is packed anew when less than this share of it is still being decoded


@dataclass(frozen=True)
class Job:
    """What all batches of one call share."""

    model: Parts
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
        model: Parts,
        run: LatentRollout,
        table: EditTable | None,
        timing: Timing,
        max_new_tokens: int,
        keep_first_logits: bool,
    ) -> Job:
        """The job of one call of `decode_branches`, on the model's device."""
        run = run if run.states.device == model.device else run.to(model.device)
        table = None if table is None else table.to(model.device, arithmetic(model))
        visible = torch.ones_like(run.attention_mask) if model.mask == "published" else run.attention_mask
        return cls(
            model, run, table, timing, max_new_tokens, keep_first_logits, visible.cpu(), run.first_position.cpu()
        )

    @property
    def space(self) -> Space:
        """What is edited."""
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


@dataclass(frozen=True)
class Decoded:
    """Answers of one batch: tokens (row, token) with the end of text, -1 after it; applied_norm (row,)."""

    tokens: Tensor
    applied_norm: Tensor
    first_logits: Tensor | None


# --- Engine: clones ---------------------------------------------------------------------------------------------------


def decode_clones(job: Job, branches: Branches, latents: tuple[int, ...], drafts: Tensor | None) -> Decoded:
    """A copy of the prompt's cache for every row, edited, then decoded like any other run."""
    model, timing = job.model, job.timing
    n, first, last = job.run.n_latents, latents[0], latents[-1]
    edits = Edits.of(model, job.table, branches, latents)
    exit_ = last if timing == "early-exit" else n

    if job.space != "kv":
        change = VectorEdit(edits, job.space)
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
        run = rollout(model, before, n, [SlotEdit(edits, position)], keep=("cache",))
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
    return Decoded(tokens, applied, answers.first_logits)


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


def decode_shared(job: Job, branches: Branches, latents: tuple[int, ...], drafts: Tensor | None) -> Decoded:
    """One prefix per prompt; rows own the slots of their edited latents and of whatever they compute themselves."""
    model, run, timing = job.model, job.run, job.timing
    assert run.past_key_values is not None
    device = model.device
    n, first, last = run.n_latents, latents[0], latents[-1]
    exit_ = last if timing == "early-exit" else n
    edits = Edits.of(model, job.table, branches, latents)
    prompt = upload(branches.prompt, device)
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
    past = SharedPast(model, cache)
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
            h = past.feed(z[:, None], (position + k - 1)[:, None])[:, 0]
            if slot_edit:
                keys, values = (x.to(model.dtype) for x in cache.read_own(-1))
                cache.write_own(-1, *edits.slot(k, position + k - 1, keys, values))
        hidden = None
        if pending is not None and timing == "cached":
            hidden = upload(columns >= run.prompt_width + first, device)  # the new z_k does not see those after it
        tokens, logits = _answer(job, past, pending, hidden, position + exit_, drafts)
    return Decoded(tokens, edits.applied_norm(), logits)  # read last: the host waits for it


def _answer(
    job: Job,
    past: SharedPast,
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
    model, device, size = job.model, job.model.device, len(position)
    after = torch.tensor(model.protocol.after_latents, device=device)
    tried = torch.empty(size, 0, dtype=torch.long)
    if drafts is not None:
        # The last token of a draft is only checked; nothing follows it.
        tried = drafts[:, :-1].where(drafts[:, 1:] >= 0, -1)
        tried = tried[:, : int(tried.ge(0).sum(1).max())]
    checked = upload(tried, device)
    fed = torch.cat((after.expand(size, -1), checked.clamp(min=0)), dim=1)
    embeddings = model.embed(fed)
    positions = position[:, None] + torch.arange(fed.shape[1], device=device)
    if pending is not None:
        embeddings = torch.cat((pending[0], embeddings), dim=1)
        positions = torch.cat((pending[1], positions), dim=1)
    past.cache.hidden_from_first_token = hidden_columns
    states = past.feed(embeddings, positions)[:, -1 - checked.shape[1] :]  # they predict tokens 0, 1, …
    past.cache.hidden_from_first_token = None

    rules = Rules(job.max_new_tokens, model.end_ids, model.protocol.excluded_logits)
    return write_tokens(
        model,
        past,
        states,
        position + len(after),
        rules,
        drafts=checked,
        packing=_WORTH_KEEPING,
        keep_first_logits=job.keep_first_logits,
    )
