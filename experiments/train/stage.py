"""One stage of training: optimise the trainable weights of a loss, log every term of every step, go on after a stop.

The state file {stage}.pt and log.csv are in the run folder. Knows nothing about how the model was made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from codi.batches import collate
from codi.model import CodiModel
from codi.targets import Targets
from codi.training import DistillationLoss, cosine_schedule
from experiments.study.steps import StepLog, load_state, save_state
from experiments.tasks.problem import Problem
from experiments.train.data import micro_batches, problems_of_step, text_of
from experiments.train.options import Resolved, micro_batch_of

__all__ = ["Stage", "guidance", "run_stage"]


@dataclass(frozen=True)
class Stage:
    """How a stage is optimised (AdamW, cosine schedule)."""

    name: str
    n_steps: int
    lr: float
    """Highest learning rate."""
    weight_decay: float
    betas: tuple[float, float]


def guidance(step: int, n_steps: int, until: float = 0.75) -> float:
    """Share of the step term's weight: 1 for two thirds of `until` (a share of the stage), then falling to 0 at it."""
    return min(1.0, max(0.0, 3 * (1 - step / n_steps / until))) if until else 0.0


def run_stage(
    stage: Stage,
    loss: nn.Module,
    model: CodiModel,
    config: Resolved,
    data: Sequence[Problem] | None,
    held_out: Sequence[Problem],
    accelerator: Accelerator,
    targets: Targets | None = None,
) -> None:
    """Optimise the trainable weights of `loss`, from the last state file on."""
    weights = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    optimizer: Any = torch.optim.AdamW(
        list(weights.values()), lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay
    )
    state_file = config.out / f"{stage.name}.pt"
    first = load_state(state_file, weights, optimizer)
    if first >= stage.n_steps:
        return
    wrapped, optimizer = accelerator.prepare(loss, optimizer)
    main = accelerator.is_main_process
    progress = tqdm(
        range(first, stage.n_steps), initial=first, total=stage.n_steps, desc=stage.name, unit="step", mininterval=5,
        disable=not main,
    )  # fmt: skip
    log = StepLog(config.out / "log.csv", stage.name, first) if main else None
    loss.train()  # dropouts act
    for step in progress:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * cosine_schedule(step, stage.n_steps)
        if isinstance(loss, DistillationLoss):
            loss.step_weight = config.step_weight * guidance(step, stage.n_steps, config.step_until)
        problems = problems_of_step(config, data, stage.name, step, stage.n_steps)
        with torch.random.fork_rng():  # what is drawn here changes nothing that is drawn later
            torch.manual_seed(_seed_of(config, stage.name, step, accelerator.process_index))
            sums = _gradients(wrapped, model, config, problems, accelerator, targets)
        norm = accelerator.clip_grad_norm_(list(weights.values()), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if log is not None:
            log.write(stage.name, step + 1, sums, float(norm), time.perf_counter() - started)
            progress.set_postfix({k: f"{v:.3f}" for k, v in sums.items()}, refresh=False)
        last = step + 1 == stage.n_steps
        if main and (last or (step + 1) % config.save_every == 0):
            save_state(state_file, step + 1, weights, optimizer)
        if main and config.eval_every and (last or (step + 1) % config.eval_every == 0):
            if isinstance(loss, DistillationLoss) and loss.lora is not None:
                loss.lora.refresh()
            loss.eval()
            with accelerator.autocast():
                progress.write(f"{stage.name} step {step + 1}: {_accuracies(model, held_out, stage.name)}")
            loss.train()
    loss.eval()


def _seed_of(config: Resolved, stage: str, step: int, rank: int) -> int:
    """What dropout draws in a step is a function of these, so that a run that was stopped goes on as if it had not."""
    return int.from_bytes(hashlib.sha256(f"{config.seed}-{stage}-{step}-{rank}".encode()).digest()[:7])


def _gradients(
    wrapped: nn.Module,
    model: CodiModel,
    config: Resolved,
    problems: Sequence[Problem],
    accelerator: Accelerator,
    targets: Targets | None = None,
) -> dict[str, float]:
    """Gradients of one step, added up over this process's micro-batches; the terms of the loss, as means over them."""
    micro_batch = micro_batch_of(config, accelerator.num_processes)
    shares = config.batch_size // (micro_batch * accelerator.num_processes)
    sums: dict[str, float] = {}
    parts = list(micro_batches(problems, micro_batch, accelerator.process_index, accelerator.num_processes))
    for i, part in enumerate(parts):
        texts = [text_of(p, model.protocol.answer_style, config.last_step) for p in part]
        batch = collate(texts, model, steps=bool(config.decoder_weight)).to(accelerator.device)
        if targets is not None:
            batch = targets.put(batch, [p.prompt_id for p in part])
        with accelerator.accumulate() if i == len(parts) - 1 else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                losses = wrapped(batch)
            accelerator.backward(losses["total"] / shares)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / shares
    return sums


def _accuracies(model: CodiModel, held_out: Sequence[Problem], stage: str) -> str:
    """Accuracies on held-out problems, in words."""
    modes: list[tuple[str, dict[str, Any]]] = [("written chain", {"mode": "verbal"}), ("direct", {"mode": "direct"})]
    if stage == "distillation":
        modes += [(f"{n} latents", {"mode": "latent", "n_latents": n}) for n in (0, 3, model.n_latents)]
    words = []
    for name, options in modes:
        texts = model.answer([p.question for p in held_out], **options)
        right = sum(p.is_answered_by(text) for text, p in zip(texts, held_out, strict=True))
        words.append(f"{name} {right / len(held_out):.3f}")
    return ", ".join(words) + f" (n = {len(held_out)})"
