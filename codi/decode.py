"""Answers: end of thought after a run, then tokens until the end of text, greedy or sampled.

Rows that are finished leave the batch, logits are computed only where they are read, and the cache of the run that was
passed in is left as it was. Attention mask and position ids go on where the rollout stopped. Branches over a shared
prefix are in branches.py. Knows nothing about right or wrong::

    run = model.rollout(model.encode(["question"]))
    decode_answers(model, run).texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from codi.cache import clone_cache, select_cache
from codi.protocol import UserError
from codi.rollout import Intervention, LatentRollout, Prefill, feed, overrides

if TYPE_CHECKING:
    from codi.model import CodiModel

__all__ = ["Answers", "answer", "decode_answers", "default_new_tokens", "exclude", "most_probable", "to_text"]


@dataclass(frozen=True)
class Answers:
    """Decoded answers of one batch.

    Attributes:
        tokens: per row, the ids before the end of text (which is not included).
        texts: the same as text, special tokens left out.
        finished: per row, whether the end of text came before the limit.
        first_logits: (batch, vocab) at the first answer position, nothing excluded; None if not asked for.
    """

    tokens: list[list[int]]
    texts: list[str]
    finished: list[bool]
    first_logits: Tensor | None = None


def default_new_tokens(model: CodiModel, mode: Literal["latent", "direct", "verbal"] = "latent") -> int:
    """Longest answer waited for: 256 tokens with a written chain, else 16 for a bare number, 64 for a sentence."""
    if mode == "verbal":
        return 256
    return 16 if model.protocol.answer_style == "number" else 64


def exclude(model: CodiModel, logits: Tensor) -> Tensor:
    """Logits (…, vocab) with the protocol's excluded ids at -inf; a new tensor if there are any."""
    if not model.protocol.excluded_logits:
        return logits
    index = torch.tensor(model.protocol.excluded_logits, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


def most_probable(logits: Tensor) -> Tensor:
    """(row,) index of the largest of each row's logits (row, vocab), the first if several are; as argmax, but faster.

    On CPUs argmax visits numbers one by one (bfloat16: longer than the product that made them). The largest number of
    each block of 64 is found many at a time, and only the best block is searched.
    """
    rows, vocab = logits.shape
    whole = vocab // _BLOCK * _BLOCK
    if logits.device.type != "cpu" or not whole or not rows:
        return logits.argmax(dim=-1)
    blocks = logits[:, :whole].unflatten(1, (-1, _BLOCK))
    largest, block = blocks.amax(dim=2).max(dim=1)
    index = blocks[torch.arange(rows), block].argmax(dim=1) + block * _BLOCK
    if whole < vocab:
        value, last = logits[:, whole:].max(dim=1)
        index = torch.where(value > largest, last + whole, index)
    return index


_BLOCK = 64


def to_text(model: CodiModel, tokens: Sequence[int]) -> str:
    """Text of answer tokens; special tokens and ids that the tokenizer does not know are left out."""
    known = [token for token in tokens if token < len(model.tokenizer)]
    return str(model.tokenizer.decode(known, skip_special_tokens=True))


def _choose(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    if uniform is None:
        return most_probable(logits)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    drawn = uniform.to(logits.device).double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def decode_answers(
    model: CodiModel,
    run: LatentRollout | Prefill,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    interventions: Sequence[Intervention] = (),
    keep_first_logits: bool = False,
    uniforms: Tensor | None = None,
) -> Answers:
    """Decode the answers that follow a run.

    After a rollout the protocol's end-of-thought tokens are fed first. After a prefill (a prompt encoded for a direct
    or verbal answer) decoding starts at once. The run and its cache are not modified.

    Args:
        model: the model.
        run: a rollout that kept its cache, or a prefill.
        max_new_tokens: at most this many tokens per answer; None: `default_new_tokens`.
        temperature: 0 is greedy; otherwise logits are divided by it and tokens are drawn.
        generator: source of the draws (on the CPU); each row uses its own uniform numbers, so an answer does not depend
            on when its neighbours finish.
        interventions: of which `edit_mask` with k = n_latents + 1 applies.
        keep_first_logits: also return the logits at the first answer position.
        uniforms: (batch, max_new_tokens) in [0, 1), instead of a generator.

    Raises:
        ValueError: a run without its cache, a temperature below 0, drawing without generator or uniforms.
    """
    if max_new_tokens is None:
        max_new_tokens = default_new_tokens(model)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or more, got {temperature}")
    size = len(run)
    if temperature == 0:
        uniforms = None
    elif uniforms is None:
        if generator is None:
            raise UserError("a temperature above 0 needs a seeded generator or uniforms")
        uniforms = torch.rand(size, max_new_tokens, generator=generator, dtype=torch.float64)
    elif uniforms.shape != (size, max_new_tokens):
        raise UserError(f"uniforms must be ({size}, {max_new_tokens}), got {tuple(uniforms.shape)}")

    mask = run.attention_mask
    if isinstance(run, LatentRollout):
        if run.past_key_values is None:
            raise UserError("the run must have kept its cache: rollout(..., keep=(..., 'cache'))")
        cache = clone_cache(run.past_key_values)
        position = run.first_position + run.n_latents
        answer_k = run.n_latents + 1
        fed = torch.tensor(model.protocol.after_latents, device=mask.device).expand(size, -1)
    else:
        cache = clone_cache(run.cache)
        position = run.next_position
        answer_k = 1
        fed = torch.empty(size, 0, dtype=torch.long, device=mask.device)
    masked = overrides(interventions, "edit_mask")
    eos = model.protocol.eos_id
    tokens: list[list[int]] = [[] for _ in range(size)]
    finished = [False] * size
    first_logits = None
    alive = torch.arange(size, device=mask.device)

    for step in range(max_new_tokens):
        if fed.shape[1]:
            mask = torch.cat((mask, mask.new_ones(size, fed.shape[1])), dim=1)
            seen: Tensor | None = mask
            if model.mask == "published":
                seen = torch.ones_like(mask) if masked else None
            if masked and seen is not None:
                for i in interventions:
                    seen = i.edit_mask(answer_k, seen)
            positions = position[:, None] + torch.arange(fed.shape[1], device=mask.device)
            model.check_length(int(positions.max()) + 1)
            last = feed(model, model.embed(fed), cache, None if seen is None else seen[alive], positions[alive]).last[
                :, -1
            ]
            position = position + fed.shape[1]
        else:
            assert isinstance(run, Prefill)
            last = run.state
        logits = model.logits(last)
        if step == 0 and keep_first_logits:
            first_logits = logits
        chosen = _choose(exclude(model, logits).float(), temperature, _column(uniforms, alive, step))
        ended = chosen == eos
        for row, token, done in zip(alive.tolist(), chosen.tolist(), ended.tolist(), strict=True):
            if done:
                finished[row] = True
            else:
                tokens[row].append(token)
        if bool(ended.any()):
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            alive, chosen = alive[going], chosen[going]
            if step + 1 < max_new_tokens:
                cache = select_cache(cache, going)
        fed = chosen[:, None]
    return Answers(tokens, [to_text(model, row) for row in tokens], finished, first_logits)


def _column(uniforms: Tensor | None, rows: Tensor, step: int) -> Tensor | None:
    return None if uniforms is None else uniforms[rows.to(uniforms.device), step]


@torch.no_grad()
def answer(
    model: CodiModel,
    texts: Sequence[str],
    n_latents: int = 6,
    mode: Literal["latent", "direct", "verbal"] = "latent",
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    batch_size: int = 64,
    interventions: Sequence[Intervention] = (),
) -> list[str]:
    """Answer questions in batches of similar length; answers come back in the order of the questions.

    Args:
        model: the model.
        texts: questions, used as they are (no suffix is added).
        n_latents: latents, 0 or more; used in mode "latent" only.
        mode: "latent" thoughts, "direct" (no thought), "verbal" (the model writes its chain first, in the answer).
        max_new_tokens: at most this many tokens per answer; None: `default_new_tokens` of the mode.
        temperature: 0 is greedy; above 0 a seed is needed.
        seed: of the draws. An answer depends on seed and place in `texts`, not on batch_size.
        batch_size: prompts at once.
        interventions: of the rollout and the answer; they see the rows of one batch at a time.
    """
    if not texts:
        return []
    if isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    limit = default_new_tokens(model, mode) if max_new_tokens is None else max_new_tokens
    uniforms = None
    if temperature > 0:
        if seed is None:
            raise UserError("a temperature above 0 needs a seed")
        if limit >= 1:
            generator = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(len(texts), limit, generator=generator, dtype=torch.float64)
    batch = model.encode(texts, thought=mode)
    order = batch.lengths.sort(stable=True).indices
    answers = [""] * len(texts)
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        part = batch.select(rows)
        width = int(part.lengths.max())
        part = type(part)(part.input_ids[:, -width:], part.attention_mask[:, -width:])
        begun = model.prefill(part, interventions, keep=())
        run = begun if mode != "latent" else model.rollout(begun, n_latents, interventions, keep=("cache",))
        chosen = None if uniforms is None else uniforms[rows.cpu()]
        found = decode_answers(model, run, limit, temperature, None, interventions, uniforms=chosen)
        for row, text in zip(rows.tolist(), found.texts, strict=True):
            answers[row] = text
    return answers
