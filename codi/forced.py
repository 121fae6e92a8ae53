"""Answers that are given: what the model says at every position of them, and how far two models of it lie apart.

Where decode.py lets a run answer, this asks what it thinks of an answer that it is made to give, in one pass. Knows
nothing about right or wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codi.interventions import Intervention, seen_at
from codi.parts import Parts
from codi.protocol import UserError
from codi.rollout import LatentRollout
from lm.cache import clone_cache
from lm.forward import feed

__all__ = ["divergence", "forced"]


@torch.no_grad()
def forced(
    model: Parts,
    run: LatentRollout,
    tokens: Sequence[Sequence[int]],
    interventions: Sequence[Intervention] = (),
    hidden_states: bool = False,
    attentions: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the model says at every position of given answers, after the run.

    Args:
        model: the model.
        run: rollout that kept its cache; not changed.
        tokens: per row an answer without its end of text (the unedited run's own answer, usually).
        interventions: of which `edit_mask` with k = n_latents + 1 applies.
        hidden_states, attentions: also return them, at the last end-of-thought token (attentions need eager attention).

    Returns:
        log-probabilities (row, position, vocab) float32 in nats for the answer's tokens and the end of text;
        (row, position) bool, True where an answer has that position;
        hidden states (row, layer, d_model) and attentions (row, layer, head, key position) at the end-of-thought token,
        or None.

    Raises:
        ValueError: a run without its cache, or more positions than the model has.
    """
    if run.past_key_values is None:
        raise UserError("the run must have kept its cache: rollout(..., keep=(..., 'cache'))")
    size, device = len(run), run.states.device
    after = list(model.protocol.after_latents)
    longest = max(len(answer) for answer in tokens) + 1
    fed = torch.full((size, len(after) + longest - 1), model.protocol.eos_id, device=device)
    there = torch.zeros(size, longest, dtype=torch.bool, device=device)
    for row, answer in enumerate(tokens):
        fed[row, : len(after)] = torch.tensor(after, device=device)
        fed[row, len(after) : len(after) + len(answer)] = torch.tensor(list(answer), dtype=torch.long, device=device)
        there[row, : len(answer) + 1] = True
    mask = torch.cat((run.attention_mask, torch.ones_like(fed, dtype=torch.bool)), dim=1)
    seen = seen_at(model, run.n_latents + 1, mask, interventions)
    first = run.first_position + run.n_latents
    positions = first[:, None] + torch.arange(fed.shape[1], device=device)
    model.check_length(int(positions.max()) + 1)
    cache = clone_cache(run.past_key_values)
    step = feed(model, model.embed(fed), cache, seen, positions, hidden_states=hidden_states, attentions=attentions)
    at = len(after) - 1
    logp = model.logits(step.last[:, at:]).float().log_softmax(-1)
    layers = None if step.hidden_states is None else step.hidden_states[:, at]
    weights = None if step.attentions is None else step.attentions[:, at]
    return logp, there, layers, weights


def divergence(before: Tensor, after: Tensor, there: Tensor) -> Tensor:
    """KL(before || after) of the answer's distribution along the answer that was forced, in nats, 0 or more.

    Sum over the positions of the forced answer (its end of text included) of the KL divergence between the two
    next-token distributions. It is part of the full KL over all answers: the part along that answer.

    Args:
        before, after: (row, position, vocab) log-probabilities from `forced`.
        there: (row, position) which positions count.

    Returns:
        (row,) float64.
    """
    a, b = before.double(), after.double()
    each = (a.exp() * (a - b)).sum(-1).clamp_min(0)
    return torch.where(there, each, torch.zeros_like(each)).sum(1)
