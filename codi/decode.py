"""Answers: end of thought after a run, then tokens until the end of text, greedy or sampled.

The token loop is that of `lm.generate`; here stands what a run is followed by. Attention mask and position ids go on
where the rollout stopped, and the cache of the run that was passed in is left as it was. Branches over a shared prefix
are in branches.py, answers that are given in forced.py. Knows nothing about right or wrong::

    run = model.rollout(model.encode(["question"]))
    decode_answers(model, run).texts
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from codi.interventions import Intervention, check_answer_interventions, overrides, seen_at
from codi.parts import Parts
from codi.protocol import UserError
from codi.rollout import LatentRollout, Prefill, prefill, rollout
from lm.generate import Generated, OwnPast, Rules, as_lists, write_tokens
from lm.terms import AnswerMode
from lm.text import to_text

__all__ = ["answer", "decode_answers", "default_new_tokens"]


def default_new_tokens(model: Parts, mode: AnswerMode = "latent") -> int:
    """Longest answer waited for: 256 tokens with a written chain, else 16 for a bare number, 64 for a sentence."""
    if mode == "verbal":
        return 256
    return 16 if model.protocol.answer_style == "number" else 64


@torch.no_grad()
def decode_answers(
    model: Parts,
    run: LatentRollout | Prefill,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    interventions: Sequence[Intervention] = (),
    keep_first_logits: bool = False,
    uniforms: torch.Tensor | None = None,
) -> Generated:
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
    limit = default_new_tokens(model) if max_new_tokens is None else max_new_tokens
    protocol, size = model.protocol, len(run)
    rules = Rules.of(size, limit, model.end_ids, protocol.excluded_logits, temperature, generator, uniforms)
    n_latents = run.n_latents if isinstance(run, LatentRollout) else 0
    cache = run.past_key_values if isinstance(run, LatentRollout) else run.cache
    if cache is None:
        raise UserError("the run must have kept its cache: rollout(..., keep=(..., 'cache'))")
    past = OwnPast(model, cache, run.attention_mask, lambda mask: seen_at(model, n_latents + 1, mask, interventions))
    if isinstance(run, LatentRollout):
        after = torch.tensor(protocol.after_latents, device=run.attention_mask.device).expand(size, -1)
        position = run.first_position + n_latents
        positions = position[:, None] + torch.arange(after.shape[1], device=after.device)
        states = past.feed(model.embed(after), positions)[:, -1:]
        position = position + after.shape[1]
    else:
        states, position = run.state[:, None], run.next_position
    written, first_logits = write_tokens(model, past, states, position, rules, keep_first_logits=keep_first_logits)
    tokens, finished = as_lists(written, rules.end_ids)
    return Generated(tokens, [to_text(model.tokenizer, row) for row in tokens], finished, first_logits)


@torch.no_grad()
def answer(
    model: Parts,
    texts: Sequence[str],
    n_latents: int = 6,
    mode: AnswerMode = "latent",
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
        interventions: of the rollout and the answer; they see the rows of one batch at a time, sorted by length.

    Raises:
        ValueError: a temperature without a seed, or an intervention that would never act or is `row_by_row`.
    """
    check_answer_interventions(interventions, n_latents if mode == "latent" else 0, mode)
    if not texts:
        return []
    limit = default_new_tokens(model, mode) if max_new_tokens is None else max_new_tokens
    uniforms = None
    if temperature > 0:
        if seed is None:
            raise UserError("a temperature above 0 needs a seed")
        if limit >= 1:
            generator = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(len(texts), limit, generator=generator, dtype=torch.float64)
    at_end = [i for i in interventions if overrides([i], "edit_run")]
    during = [i for i in interventions if i not in at_end]
    answers = [""] * len(texts)
    for rows, part in model.encode(texts, thought=mode).parts(batch_size):
        run: LatentRollout | Prefill = prefill(model, part, interventions, keep=())
        if mode == "latent":
            run = rollout(model, run, n_latents, during, keep=("cache",))
            for i in at_end:
                run = i.edit_run(model, run)
        chosen = None if uniforms is None else uniforms[rows.cpu()]
        found = decode_answers(model, run, limit, temperature, None, interventions, uniforms=chosen)
        for row, text in zip(rows.tolist(), found.texts, strict=True):
            answers[row] = text
    return answers
