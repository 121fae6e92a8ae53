"""Training a CODI model: a teacher that writes its chain of thought, then self-distillation into latents.

One model plays both parts. For every problem, with the question computed once and shared,

    teacher   question · written chain of thought · end of thought · answer
    student   question · begin of thought · n latents · end of thought · answer

    loss = CE(student's answer) + f · KD + g · CE(teacher's chain and answer) + d · CE(direct answer)

KD = mean over the n_layers + 1 hidden states of SmoothL1(student, stop-gradient teacher) / std(teacher) at the token
just before the first answer token. In protocols with a named end-of-thought token that token ends the written chain
too, and the two are compared there. LoRA and the projection are trained; the base weights are frozen.

The latent loop is `codi.rollout.rollout`, with gradients. Knows nothing about tasks, files or devices: problems come in
as text, and the loop over steps (experiments/train.py) belongs to the caller.

Source: Shen et al. 2025, CODI, arXiv 2502.21074 (loss and settings).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any
from typing import Protocol as Shape

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codi.parts import Parts
from codi.rollout import Prefill, prefill, rollout
from lm.cache import clone_cache, select_cache
from lm.forward import Step, feed
from lm.text import EncodedBatch, left_padded

__all__ = ["DistillationLoss", "MergedLora", "TeacherLoss", "TrainingBatch", "collate", "cosine_schedule"]


class Example(Shape):
    """What a training problem must offer: question, written chain of thought, answer text."""

    @property
    def question(self) -> str: ...

    @property
    def chain(self) -> str: ...

    @property
    def answer_text(self) -> str: ...


@dataclass
class TrainingBatch:
    """Token ids of one batch of problems.

    Attributes:
        prefix: question and the protocol tokens that every part shares, left padded.
        verbal, verbal_mask, verbal_read: (batch, position) what the teacher reads after the prefix, right padded; which
            of it is real; and the position (batch,) of its last token before the answer.
        latent: tokens fed before latent 1, after the prefix (the same for every problem).
        answer, answer_mask, answer_read: as verbal, for what the student reads after its latents.
        direct, direct_mask: as verbal, for the direct answer.
        step_read: (batch, step) position in `verbal` of the token before the result of each step; -1 where there is no
            such step.
        verbal_start, direct_start, answer_start: number of leading tokens in each that are given, not predicted.
    """

    prefix: EncodedBatch
    verbal: Tensor
    verbal_mask: Tensor
    verbal_read: Tensor
    latent: Tensor
    answer: Tensor
    answer_mask: Tensor
    answer_read: Tensor
    direct: Tensor
    direct_mask: Tensor
    step_read: Tensor
    verbal_start: int
    answer_start: int
    direct_start: int

    def __len__(self) -> int:
        return len(self.verbal)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch on another device."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.__dict__.items()}
        return TrainingBatch(**moved)


def _right_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def collate(problems: Sequence[Example], model: Parts) -> TrainingBatch:
    """Tokenize problems for `TeacherLoss` and `DistillationLoss`.

    Args:
        problems: at least one; `chain` is the written chain of thought, `answer_text` what stands after it.
        model: for its tokenizer and protocol.

    Raises:
        ValueError: no problems.
    """
    if not problems:
        raise ValueError("a training batch needs at least one problem, got none")
    protocol, tokenizer = model.protocol, model.tokenizer
    shared = commonprefix([protocol.before_latents, protocol.before_verbal, protocol.before_direct])
    questions = tokenizer([p.question for p in problems])["input_ids"]
    prefixes = [[*ids, *shared] for ids in questions]
    chains = tokenizer([p.chain for p in problems], add_special_tokens=False)["input_ids"]
    answers = tokenizer([p.answer_text for p in problems], add_special_tokens=False)["input_ids"]
    end = [protocol.eos_id]
    # In protocols with a bare-number answer the end-of-thought token also ends a written chain.
    bridge = [protocol.eot_id] if protocol.answer_style == "number" else []
    lead = list(protocol.before_verbal[len(shared) :])
    verbal = [[*lead, *c, *bridge, *a, *end] for c, a in zip(chains, answers, strict=True)]
    # The token whose state is distilled stands just before the first answer token that carries the number.
    ahead = [0 if bridge else _lead_length(tokenizer, p.answer_text) for p in problems]
    verbal_read = [len(lead) + len(c) + len(bridge) - 1 + s for c, s in zip(chains, ahead, strict=True)]
    after = list(protocol.after_latents)
    answer = [[*after, *a, *end] for a in answers]
    before_direct = list(protocol.before_direct[len(shared) :])
    direct = [[*before_direct, *a, *end] for a in answers]

    verbal_ids, verbal_mask = _right_padded(verbal, protocol.pad_id)
    answer_ids, answer_mask = _right_padded(answer, protocol.pad_id)
    direct_ids, direct_mask = _right_padded(direct, protocol.pad_id)
    return TrainingBatch(
        prefix=left_padded(prefixes, protocol.pad_id),
        verbal=verbal_ids,
        verbal_mask=verbal_mask,
        verbal_read=torch.tensor(verbal_read),
        latent=torch.tensor(protocol.before_latents[len(shared) :]),
        answer=answer_ids,
        answer_mask=answer_mask,
        answer_read=torch.tensor([len(after) - 1 + s for s in ahead]),
        direct=direct_ids,
        direct_mask=direct_mask,
        step_read=_step_ends(tokenizer, [p.chain for p in problems], len(lead)),
        verbal_start=len(lead),
        answer_start=len(after),
        direct_start=len(before_direct),
    )


def _step_ends(tokenizer: Any, chains: Sequence[str], lead: int) -> Tensor:
    """(row, step) place of the token before each result of chains such as "<<7+5=12>>", counted from `lead`; -1: none.

    A chain in which some result does not begin a token of its own counts as having no steps, as does every chain of a
    tokenizer that reports no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        return torch.full((len(chains), 1), -1)
    rows: list[list[int]] = []
    for chain in chains:
        encoded = tokenizer(chain, add_special_tokens=False, return_offsets_mapping=True)
        starts = {begin: i for i, (begin, _) in enumerate(encoded["offset_mapping"])}
        places = [starts.get(found.end(), 0) for found in re.finditer(r"=(?=[^=<>]+>>)", chain)]
        rows.append([lead + place - 1 for place in places] if all(places) else [])
    width = max(1, *map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def _lead_length(tokenizer: Any, answer_text: str) -> int:
    """Tokens of "The answer is: 42" before those of the number."""
    words, colon, _ = answer_text.rpartition(":")
    return len(tokenizer(words + colon, add_special_tokens=False)["input_ids"]) if colon else 0


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


class DistillationLoss(nn.Module):
    """The CODI loss.

    Args:
        model: its base carries trainable LoRA weights (`codi.lora.add_lora`), its projection is trained.
        n_latents: latents between question and answer, 1 or more.
        kd_weight: f (published: 20 for Llama, 1 for GPT-2).
        teacher_weight: g (published: 1).
        teacher_fraction: share of the problems in each batch (the first) whose written chain the teacher term sees,
            0..1; the distillation target is computed for all of them. Below 1 the term is an unbiased estimate at less
            cost.
        direct_weight: d, of the direct answers (0 in the original family).
        direct_fraction: share of the problems in each batch that the direct term sees, 0..1.
        merged: compute with merged weights (see `MergedLora`).
        compute_dtype: of the merged weights.
        step_weight: weight of the step term, which is no part of published CODI (0 there): the state that becomes
            latent k is to predict what the teacher predicts where it writes the result of step k (of the last step, if
            k is more). Can be set between steps, to guide the start of training only.

    Source: Shen et al. 2025, arXiv 2502.21074, section 3.
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
        self.lora = MergedLora(model.base, compute_dtype) if merged else None

    def forward(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Losses "student", "distillation", "teacher", "direct", "step" (each unweighted) and "total"."""
        if self.lora is not None:
            self.lora.refresh()
        model = self.model
        n = len(batch)
        everything = torch.arange(n, device=batch.verbal.device)
        start = prefill(model, batch.prefix, keep=())

        # The teacher: all problems give a target, the first of them a loss too.
        n_taught = max(1, round(self.teacher_fraction * n))
        rows = everything[:n_taught]
        last, target = self._teacher(start, batch, rows)
        teacher = _cross_entropy(
            model, last, batch.verbal[rows], batch.verbal_mask[rows], batch.verbal_start, start.state[rows]
        )
        written = last.detach()
        if n_taught < n:
            with torch.no_grad():
                more, others = self._teacher(start, batch, everything[n_taught:])
            written, target = torch.cat((written, more)), torch.cat((target, others))

        before = _after_prefix(model, start, batch.latent)
        run = rollout(model, before, self.n_latents, keep=("cache",))
        step = _tail(
            model,
            run.past_key_values,
            run.attention_mask,
            run.first_position + self.n_latents,
            batch.answer,
            batch.answer_mask,
            True,
        )
        student = _cross_entropy(model, step.last, batch.answer, batch.answer_mask, batch.answer_start, None)
        assert step.hidden_states is not None
        learnt = step.hidden_states[everything, batch.answer_read].float()
        distance = F.smooth_l1_loss(learnt, target, reduction="none").mean(dim=(0, 2))
        distillation = (distance / target.std(dim=(0, 2)).clamp_min(1e-6)).mean()

        losses = {"student": student, "distillation": distillation, "teacher": teacher}
        total = student + self.kd_weight * distillation + self.teacher_weight * teacher
        if self.step_weight:
            losses["step"] = self._steps(run.states[:, :-1], written, batch.step_read)
            total = total + self.step_weight * losses["step"]
        n_direct = round(self.direct_fraction * n)
        if self.direct_weight and n_direct:
            losses["direct"] = _direct(model, start, batch, n_direct)
            total = total + self.direct_weight * losses["direct"]
        return {**losses, "total": total}

    def _steps(self, latents: Tensor, written: Tensor, step_read: Tensor) -> Tensor:
        """Cross-entropy (nats) of what the states that become latents (row, latent, d_model) predict against what the
        teacher's states (row, position, d_model) predict before the result of a step."""
        n_steps = (step_read >= 0).sum(1)
        rows = (n_steps > 0).nonzero()[:, 0]
        if not len(rows):
            return latents.sum() * 0.0
        k = torch.arange(latents.shape[1], device=latents.device)
        step = torch.minimum(k, n_steps[rows, None] - 1)
        places = step_read[rows].gather(1, step)
        states = written[rows[:, None], places]
        with torch.no_grad():
            targets = self.model.logits(states).float().softmax(-1)
        logits = self.model.logits(latents[rows]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))

    def _teacher(self, start: Prefill, batch: TrainingBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Last states (row, position, d_model) along the written chain, and the states to be matched, without gradient,
        (row, layer, d_model)."""
        part = start if len(rows) == len(batch) else start.select(rows)
        step = _tail(
            self.model,
            part.cache,
            part.attention_mask,
            part.next_position,
            batch.verbal[rows],
            batch.verbal_mask[rows],
            True,
        )
        assert step.hidden_states is not None
        read = step.hidden_states[torch.arange(len(rows), device=rows.device), batch.verbal_read[rows]]
        return step.last, read.detach().float()


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


class MergedLora:
    """Compute LoRA layers with their merged weight, W + scale · B A, formed once per training step.

    Same function and same gradients as the two-branch form; for small models, whose rank is not small beside d_model,
    half the arithmetic. Gradients reach A and B through the product. Without effect on what is saved.

    Args:
        base: model with LoRA layers.
        dtype: in which the merged weights are used.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.layers: list[Any] = [m for m in base.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        if not self.layers:
            raise ValueError("the model has no LoRA layers to merge")
        for layer in self.layers:
            layer.forward = _MergedForward(layer)
        self.refresh()

    def refresh(self) -> None:
        """Form the merged weights from the present LoRA weights, in float32."""
        with torch.autocast(self.layers[0].base_layer.weight.device.type, enabled=False):
            for layer in self.layers:
                weight = layer.base_layer.weight
                delta = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
                layer.forward.weight = (
                    weight + (delta.T if delta.shape != weight.shape or _transposed(layer) else delta)
                ).to(self.dtype)

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            del layer.forward


def _transposed(layer: Any) -> bool:
    """GPT-2's Conv1D holds its weight as (in, out)."""
    return type(layer.base_layer).__name__ == "Conv1D"


class _MergedForward:
    def __init__(self, layer: Any) -> None:
        self.bias = layer.base_layer.bias
        self.transposed = _transposed(layer)
        self.weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x, self.weight.T if self.transposed else self.weight, bias)


def cosine_schedule(step: int, n_steps: int, warmup: float = 0.03, floor: float = 0.0) -> float:
    """Learning-rate factor at a step: linear warm-up over a share of the steps, then half a cosine down to `floor`."""
    ramp = max(1, round(warmup * n_steps))
    if step < ramp:
        return (step + 1) / ramp
    progress = torch.tensor((step - ramp) / max(1, n_steps - ramp)).clamp(0, 1)
    return float(floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.pi * progress)))
