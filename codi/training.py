"""Training a CODI model: a teacher that writes its chain of thought, then self-distillation into latents.

One model plays both parts. For every problem, with the question computed once and shared,

    teacher   question · written chain of thought · end of thought · answer
    student   question · begin of thought · n latents · end of thought · answer

    loss = CE(student's answer) + f · KD + g · CE(teacher's chain and answer) + d · CE(direct answer)

KD = mean over the n_layers + 1 hidden states of SmoothL1(student, stop-gradient teacher) / std(teacher) at the token
just before the first answer token. In protocols with a named end-of-thought token that token ends the written chain
too, and the two are compared there. LoRA and the projection are trained; the base weights are frozen.

Two further terms guide single latents, neither of them part of published CODI: the step term (step_latents.py) and an
auxiliary decoder (decoder.py). What the teacher gives can also have been found beforehand (targets.py).

The latent loop is `codi.rollout.rollout`, with gradients. Knows nothing about tasks, files or devices: problems come in
as token ids (batches.py), and the loop over steps (experiments/train) belongs to the caller.

Source: Shen et al. 2025, CODI, arXiv 2502.21074 (loss and settings).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codi.batches import TrainingBatch
from codi.decoder import StepDecoder
from codi.merged import MergedLora
from codi.parts import Parts
from codi.rollout import Prefill, prefill, rollout
from codi.step_latents import SILENT, parse_step_latents
from lm.cache import clone_cache, select_cache
from lm.errors import UserError
from lm.forward import Step, feed

__all__ = ["DistillationLoss", "TeacherLoss", "cosine_schedule", "teacher_states"]


def _tail(
    model: Parts,
    cache: Any,
    mask: Tensor,
    next_position: Tensor,
    ids: Tensor,
    ids_mask: Tensor,
    hidden_states: bool = False,
) -> Step:
    """Feed right-padded ids after a past; the past's cache is not modified."""
    positions = next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)
    seen = torch.cat((mask, ids_mask), dim=1)
    return feed(model, model.embed(ids), clone_cache(cache), seen, positions, hidden_states=hidden_states)


def _cross_entropy(
    model: Parts, last: Tensor, ids: Tensor, ids_mask: Tensor, start: int, ahead: Tensor | None
) -> Tensor:
    """Mean cross-entropy (nats) of the tokens from `start` on.

    `last` (batch, position, d_model) holds the states of `ids`; `ahead` (batch, d_model) the state just before them,
    needed when start = 0.
    """
    if start == 0:
        assert ahead is not None, "the first token is predicted from the state before it"
        states, targets, wanted = torch.cat((ahead[:, None], last[:, :-1]), dim=1), ids, ids_mask
    else:
        states, targets, wanted = last[:, start - 1 : -1], ids[:, start:], ids_mask[:, start:]
    logits = model.base.get_output_embeddings()(states[wanted])
    return F.cross_entropy(logits.float(), targets[wanted])


class TeacherLoss(nn.Module):
    """Cross-entropy of written chains and their answers, and of direct answers for part of the problems.

    Args:
        model: its base weights are trained, all of them.
        direct_fraction: share of the problems (the first of each batch) that are answered directly instead, 0..1.
    """

    def __init__(self, model: Parts, direct_fraction: float = 0.1) -> None:
        super().__init__()
        if not 0 <= direct_fraction < 1:
            raise ValueError(f"direct_fraction must be in 0..1 (1 excluded), got {direct_fraction}")
        self.model = model
        self.base = model.base  # registered, so that an optimiser and an accelerator see the weights
        self.direct_fraction = direct_fraction

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Losses "teacher", "direct" and "total" (weighted by their share of the problems), in nats."""
        model = self.model
        start = prefill(model, batch.prefix, keep=())
        n_direct = round(self.direct_fraction * len(batch))
        losses = {}
        rows = torch.arange(n_direct, len(batch), device=batch.verbal.device)
        part = start.select(rows) if n_direct else start
        step = _tail(
            model, part.cache, part.attention_mask, part.next_position, batch.verbal[rows], batch.verbal_mask[rows]
        )
        losses["teacher"] = _cross_entropy(
            model, step.last, batch.verbal[rows], batch.verbal_mask[rows], batch.verbal_start, part.state
        )
        losses["total"] = losses["teacher"]
        if n_direct:
            losses["direct"] = _direct(model, start, batch, n_direct)
            share = n_direct / len(batch)
            losses["total"] = (1 - share) * losses["teacher"] + share * losses["direct"]
        return losses


def _direct(model: Parts, start: Prefill, batch: TrainingBatch, n: int) -> Tensor:
    """Cross-entropy of the direct answers of the first n problems, from the shared prefix."""
    rows = torch.arange(n, device=batch.direct.device)
    ids, mask = batch.direct[rows], batch.direct_mask[rows]
    cache = select_cache(start.cache, rows)
    step = _tail(model, cache, start.attention_mask[rows], start.next_position[rows], ids, mask)
    return _cross_entropy(model, step.last, ids, mask, batch.direct_start, start.state[rows])


def teacher_states(model: Parts, start: Prefill, batch: TrainingBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the teacher gives along the written chain of some rows of a batch.

    Args:
        model: the teacher.
        start: the computed prefixes of the whole batch.
        batch: the batch.
        rows: (row,) of it.

    Returns:
        last: (row, position, d_model) last states along chain and answer.
        target: (row, layer, d_model) float32, the states to be matched, without gradient.
        steps: (row, step, d_model) last states before the result of each step, without gradient; those of steps that
            a row does not have are no numbers of it.
    """
    part = start if len(rows) == len(batch) else start.select(rows)
    step = _tail(
        model, part.cache, part.attention_mask, part.next_position, batch.verbal[rows], batch.verbal_mask[rows], True
    )
    assert step.hidden_states is not None
    index = torch.arange(len(rows), device=rows.device)
    read = step.hidden_states[index, batch.verbal_read[rows]]
    steps = step.last[index[:, None], batch.step_read[rows].clamp(min=0)]
    return step.last, read.detach().float(), steps.detach()


class DistillationLoss(nn.Module):
    """The CODI loss.

    Args:
        model: its base carries trainable LoRA weights (`codi.lora.add_lora`), its projection is trained.
        n_latents: latents between question and answer, 1 or more.
        kd_weight: f (published: 20 for Llama, 1 for GPT-2).
        teacher_weight: g (published: 1). With 0 the teacher is computed without gradient.
        teacher_fraction: share of the problems in each batch (the first) whose written chain the teacher term sees,
            0..1; the distillation target is computed for all of them. Below 1 the term is an unbiased estimate at less
            cost.
        direct_weight: d, of the direct answers (0 in the original family).
        direct_fraction: share of the problems in each batch that the direct term sees, 0..1.
        merged: compute with merged weights (see `MergedLora`).
        compute_dtype: of the merged weights.
        step_weight: weight of the step term, which is no part of published CODI (0 there): the state that becomes a
            latent is to predict what the teacher predicts where it writes the result of a step (of the last step, if
            there are fewer), or nothing. Can be set between steps, to guide the start of training only.
        step_latents: which latent learns which step, see `codi.step_latents`.
        decoder: reads latents and writes their steps (one that a problem does not have is left out, as published);
            None: none. It is trained along.
        decoder_weight: of its loss (published: 1).
        decoder_latents: which latent it is to read which step from, as step_latents.

    Source: Shen et al. 2025, arXiv 2502.21074, section 3; the decoder: Wei et al. 2025, arXiv 2509.20317.
    """

    def __init__(
        self,
        model: Parts,
        n_latents: int = 6,
        kd_weight: float = 20.0,
        teacher_weight: float = 1.0,
        teacher_fraction: float = 1.0,
        direct_weight: float = 1.0,
        direct_fraction: float = 0.1,
        merged: bool = True,
        compute_dtype: torch.dtype = torch.float32,
        step_weight: float = 0.0,
        step_latents: str = "same",
        decoder: StepDecoder | None = None,
        decoder_weight: float = 1.0,
        decoder_latents: str = "same",
    ) -> None:
        super().__init__()
        if n_latents < 1:
            raise ValueError(f"n_latents must be at least 1, got {n_latents}")
        if not 0 <= direct_fraction <= 1 or not 0 < teacher_fraction <= 1:
            raise ValueError(
                "direct_fraction must be in 0..1 and teacher_fraction in 0..1 (0 excluded), "
                f"got {direct_fraction} and {teacher_fraction}"
            )
        self.teacher_fraction = teacher_fraction
        self.model = model
        self.base, self.prj = model.base, model.prj
        self.n_latents = n_latents
        self.kd_weight, self.teacher_weight, self.direct_weight = kd_weight, teacher_weight, direct_weight
        self.direct_fraction = direct_fraction
        self.step_weight = step_weight
        self.guided = parse_step_latents(step_latents, n_latents)
        self.decoder, self.decoder_weight = decoder, decoder_weight
        self.read = parse_step_latents(decoder_latents, n_latents)
        self.lora = MergedLora(model.base, compute_dtype) if merged else None

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Losses "student", "distillation", "teacher", "direct", "step", "silent", "decoder" (each unweighted, those
        that there are) and "total"."""
        if self.lora is not None:
            self.lora.refresh()
        model, n = self.model, len(batch)
        start = prefill(model, batch.prefix, keep=())
        losses: dict[str, Tensor] = {}
        if batch.target is None:
            target, step_states = self._teacher(start, batch, losses)
        else:
            assert batch.step_states is not None, "targets that were found beforehand come with those of the steps"
            if self.teacher_weight:
                raise UserError("a teacher that is learned along has no targets beforehand: teacher_weight must be 0")
            target, step_states = batch.target.float(), batch.step_states

        before = _after_prefix(model, start, batch.latent)
        run = rollout(model, before, self.n_latents, keep=("cache",))
        position = run.first_position + self.n_latents
        past = run.past_key_values
        step = _tail(model, past, run.attention_mask, position, batch.answer, batch.answer_mask, hidden_states=True)
        losses["student"] = _cross_entropy(model, step.last, batch.answer, batch.answer_mask, batch.answer_start, None)
        assert step.hidden_states is not None
        learnt = step.hidden_states[torch.arange(n, device=target.device), batch.answer_read].float()
        distance = F.smooth_l1_loss(learnt, target, reduction="none").mean(dim=(0, 2))
        losses["distillation"] = (distance / target.std(dim=(0, 2)).clamp_min(1e-6)).mean()

        total = losses["student"] + self.kd_weight * losses["distillation"]
        if "teacher" in losses:
            total = total + self.teacher_weight * losses["teacher"]
        if self.step_weight:
            guidance = self._guidance(run.states, step_states, batch.step_read)
            total = total + self.step_weight * torch.stack(list(guidance.values())).sum()
            losses |= guidance
        if self.decoder is not None and self.decoder_weight:
            losses["decoder"] = self._decoded(run.states, batch)
            total = total + self.decoder_weight * losses["decoder"]
        n_direct = round(self.direct_fraction * n)
        if self.direct_weight and n_direct:
            losses["direct"] = _direct(model, start, batch, n_direct)
            total = total + self.direct_weight * losses["direct"]
        return {**losses, "total": total}

    def _teacher(self, start: Prefill, batch: TrainingBatch, losses: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The states to be matched, of all problems, and those before the results of steps (see `teacher_states`); the
        first problems give a loss too."""
        n = len(batch)
        everything = torch.arange(n, device=batch.verbal.device)
        if not self.teacher_weight:
            with torch.no_grad():
                return teacher_states(self.model, start, batch, everything)[1:]
        n_taught = max(1, round(self.teacher_fraction * n))
        rows = everything[:n_taught]
        last, target, steps = teacher_states(self.model, start, batch, rows)
        losses["teacher"] = _cross_entropy(
            self.model, last, batch.verbal[rows], batch.verbal_mask[rows], batch.verbal_start, start.state[rows]
        )
        if n_taught < n:
            with torch.no_grad():
                _, others, more = teacher_states(self.model, start, batch, everything[n_taught:])
            target, steps = torch.cat((target, others)), torch.cat((steps, more))
        return target, steps

    def _guidance(self, states: Tensor, step_states: Tensor, step_read: Tensor) -> dict[str, Tensor]:
        """The step term, in nats, for states (row, latent 0..n, d_model): "step", the cross-entropy of what those that
        become guided latents predict against what the teacher's (row, step, d_model) predict; "silent", KL(all tokens
        alike ‖ what they predict) of latents that are to say nothing."""
        n_steps = (step_read >= 0).sum(1)
        rows = (n_steps > 0).nonzero()[:, 0]
        if not len(rows):
            return {"step": states.sum() * 0.0}
        found: dict[str, Tensor] = {}
        speaking = [(latent, step) for latent, step in self.guided if step != SILENT]
        silent = [latent for latent, step in self.guided if step == SILENT]
        if speaking:
            latents, steps = (torch.tensor(each, device=rows.device) for each in zip(*speaking, strict=True))
            places = torch.minimum(steps - 1, n_steps[rows, None] - 1)
            with torch.no_grad():
                targets = self.model.logits(step_states[rows[:, None], places]).float().softmax(-1)
            logits = self.model.logits(states[rows][:, latents - 1]).float()
            found["step"] = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
        if silent:
            logits = self.model.logits(states[rows][:, torch.tensor(silent, device=rows.device) - 1]).float()
            found["silent"] = -logits.log_softmax(-1).mean() - math.log(logits.shape[-1])
        return found

    def _decoded(self, states: Tensor, batch: TrainingBatch) -> Tensor:
        """The decoder's loss (nats per token) on the latents that states (row, latent 0..n, d_model) become."""
        assert self.decoder is not None and batch.step_ids is not None and batch.step_mask is not None
        width = batch.step_ids.shape[1]
        pairs = [(latent, step) for latent, step in self.read if step != SILENT and step <= width]
        if not pairs:
            return states.sum() * 0.0
        latents, steps = (torch.tensor(each, device=states.device) for each in zip(*pairs, strict=True))
        ids, mask = batch.step_ids[:, steps - 1].flatten(0, 1), batch.step_mask[:, steps - 1].flatten(0, 1)
        there = mask.any(1)
        if not there.any():
            return states.sum() * 0.0
        fed = self.model.project(states[:, latents - 1]).flatten(0, 1)
        return self.decoder(self.model, fed[there], ids[there], mask[there])


def _after_prefix(model: Parts, start: Prefill, tokens: Tensor) -> Prefill:
    """The prefill that results when the protocol's remaining tokens (ending with begin of thought) follow the
    prefix."""
    if not len(tokens):
        return start
    n = len(start)
    ids = tokens.to(start.state.device).expand(n, -1)
    cache = clone_cache(start.cache)
    mask = torch.cat((start.attention_mask, torch.ones_like(ids, dtype=torch.bool)), dim=1)
    positions = start.next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)
    step = feed(model, model.embed(ids), cache, mask, positions)
    return Prefill(
        state=step.last[:, -1],
        cache=cache,
        attention_mask=mask,
        prompt_lengths=start.prompt_lengths + ids.shape[1],
        next_position=start.next_position + ids.shape[1],
        bot_hidden_states=None,
        prompt_hidden_states=None,
    )


def cosine_schedule(step: int, n_steps: int, warmup: float = 0.03, floor: float = 0.0) -> float:
    """Learning-rate factor at a step: linear warm-up over a share of the steps, then half a cosine down to `floor`."""
    ramp = max(1, round(warmup * n_steps))
    if step < ramp:
        return (step + 1) / ramp
    progress = torch.tensor((step - ramp) / max(1, n_steps - ramp)).clamp(0, 1)
    return float(floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.pi * progress)))
