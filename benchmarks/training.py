"""How fast is training? Problems per second of three ways to take steps of CODI training on the same problems.

(a) published   as the published trainer does it: the teacher's whole text twice (once without gradient for the
                targets, once with), the question again for the student, padded in the order in which the problems come,
                logits of every position of every pass, LoRA in two branches with dropout, sdpa attention
(b) same loss   `codi train` with the same terms: the question once for both, the teacher once, logits where they are
                needed, problems of similar length together, grouped attention
(c) preset      `codi train` as it is set for this model. tiny: merged LoRA, 60 % of the chains taught. smollm2: targets
                of a frozen teacher found once; their time is added, divided by the passes of the preset

for the shapes of checkpoints/tiny (arithmetic) and checkpoints/smollm2 (word problems; left out if it is not there), in
bfloat16 autocast, optimiser included; by wall time, and by processor time for machines that others use. Prints a table
and writes benchmarks/results/training.json::

    python -m benchmarks.training                          # some minutes on two CPU cores
    python -m benchmarks.training --models tiny --steps 4
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codi.batches import collate
from codi.lora import add_lora
from codi.model import CodiModel
from codi.targets import Targets, find_targets
from codi.training import DistillationLoss
from experiments.tasks import endless
from experiments.tasks.problem import Problem
from experiments.train.data import micro_batches, text_of
from experiments.train.model import build_model, freeze_in_bfloat16
from experiments.train.options import Resolved, TrainOptions, resolve
from lm.cache import GROUPED_ATTENTION
from lm.text import left_padded

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training.json"
SMOLLM2 = ROOT / "checkpoints" / "smollm2"
MODELS = ("tiny", "smollm2")
WAYS = ("published", "same loss", "preset")
DROPOUT = 0.1


def options_of(name: str, batch_size: int, micro_batch: int) -> Resolved:
    """What `codi train` would be asked for."""
    given: dict[str, Any] = {"batch_size": batch_size, "micro_batch": micro_batch}
    if name == "smollm2":
        given |= {"init": str(SMOLLM2), "preset": "smollm2", "data": "word-problems"}
    return resolve(TrainOptions(**given))


def model_of(config: Resolved, attention: str, dropout: float, device: str) -> CodiModel:
    """The model with fresh LoRA weights, as it is before distillation."""
    torch.manual_seed(0)
    model = build_model(config, attention)[0]
    add_lora(model.base, config.lora_r, config.lora_alpha, dropout)
    if config.init:
        freeze_in_bfloat16(model.base)
    model.base.to(device).train()
    model.prj.to(device).train()
    return model


# --- (a) --------------------------------------------------------------------------------------------------------------


def _right(rows: Sequence[Sequence[int]], device: torch.device, fill: int) -> tuple[Tensor, Tensor]:
    """Ids, and the same as labels: padding does not count."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)
    labels = torch.tensor([[*row, *[-100] * (width - len(row))] for row in rows], device=device)
    return ids, labels


def published_loss(model: CodiModel, problems: Sequence[Problem], config: Resolved) -> Tensor:
    """CE + f · KD + CE of the teacher, every part a pass over its own whole text."""
    texts = [text_of(problem, model.protocol.answer_style, config.last_step) for problem in problems]
    protocol, tokenizer, base, device = model.protocol, model.tokenizer, model.base, model.device
    question = tokenizer([text.question for text in texts])["input_ids"]
    chain = tokenizer([text.chain for text in texts], add_special_tokens=False)["input_ids"]
    answer = tokenizer([text.answer_text for text in texts], add_special_tokens=False)["input_ids"]
    answer = [[*ids, protocol.eos_id] for ids in answer]
    written = [[*q, *protocol.before_verbal, *c, protocol.eot_id] for q, c in zip(question, chain, strict=True)]
    reference, labels = _right([[*w, *a] for w, a in zip(written, answer, strict=True)], device, protocol.pad_id)
    for row, (q, w) in enumerate(zip(question, written, strict=True)):
        labels[row, : len(q) + len(protocol.before_verbal)] = -100
        assert len(w) <= labels.shape[1]
    with torch.no_grad():
        target = base(input_ids=reference, output_hidden_states=True).hidden_states
    graded = base(input_ids=reference, output_hidden_states=True)

    prefix = left_padded([[*q, *protocol.before_latents] for q in question], protocol.pad_id).to(device)
    out = base(
        input_ids=prefix.input_ids, attention_mask=prefix.attention_mask, use_cache=True, output_hidden_states=True
    )
    for _ in range(config.n_latents):
        z = model.project(out.hidden_states[-1][:, -1:])
        out = base(inputs_embeds=z, past_key_values=out.past_key_values, use_cache=True, output_hidden_states=True)
    after = list(protocol.after_latents)
    ids, wanted = _right([[*after, *a] for a in answer], device, protocol.pad_id)
    wanted[:, : len(after)] = -100
    out = base(
        inputs_embeds=model.embed(ids), past_key_values=out.past_key_values, use_cache=True, output_hidden_states=True
    )
    index, at = torch.arange(len(texts)), torch.tensor([len(w) - 1 for w in written])
    distance = torch.stack(
        [
            F.smooth_l1_loss(mine[:, len(after) - 1].float(), (to := theirs[index, at].float())) / to.std()
            for mine, theirs in zip(out.hidden_states, target, strict=True)
        ]
    ).mean()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    return cross_entropy(out.logits, wanted) + config.kd_weight * distance + cross_entropy(graded.logits, labels)


def take_published(model: CodiModel, problems: Sequence[Problem], config: Resolved) -> None:
    """Gradients of one batch, micro-batches in the order of the problems."""
    size = config.micro_batch
    for at in range(0, len(problems), size):
        published_loss(model, problems[at : at + size], config).backward()


# --- (b) and (c) ------------------------------------------------------------------------------------------------------


def loss_of(model: CodiModel, config: Resolved) -> DistillationLoss:
    """The loss as `codi train` makes it, without its direct term."""
    return DistillationLoss(
        model, config.n_latents, config.kd_weight, config.teacher_weight, config.teacher_fraction, 0.0, 0.0,
        config.merged, torch.bfloat16, config.step_weight,
    )  # fmt: skip


def take(loss: DistillationLoss, problems: Sequence[Problem], config: Resolved, targets: Targets | None) -> None:
    """Gradients of one batch, as experiments/train/stage.py takes them."""
    for part in micro_batches(problems, config.micro_batch, 0, 1):
        texts = [text_of(problem, loss.model.protocol.answer_style, config.last_step) for problem in part]
        batch = collate(texts, loss.model).to(loss.model.device)
        if targets is not None:
            batch = targets.put(batch, [problem.prompt_id for problem in part])
        loss(batch)["total"].backward()


# --- Measuring --------------------------------------------------------------------------------------------------------


def seconds_per_step(
    model: CodiModel, batches: Sequence[Sequence[Problem]], gradients: Callable[[Sequence[Problem]], None]
) -> tuple[float, float]:
    """Median wall time and processor time of a step; the first one warms up and does not count."""
    weights = [p for module in (model.base, model.prj) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    times = []
    for batch in batches:
        began, worked = time.perf_counter(), time.process_time()
        with torch.autocast(model.device.type, torch.bfloat16):
            gradients(batch)
        torch.nn.utils.clip_grad_norm_(weights, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began, time.process_time() - worked))
    wall, processor = torch.tensor(times[1:]).median(dim=0).values.tolist()
    return wall, processor


def measured(
    way: str, config: Resolved, batches: Sequence[Sequence[Problem]], device: str
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds (wall time, processor time) per step, and per problem for targets that are found once."""
    grouped = GROUPED_ATTENTION if device == "cpu" else "sdpa"
    if way == "published":
        model = model_of(config, "sdpa", DROPOUT, device)
        return seconds_per_step(model, batches, lambda batch: take_published(model, batch, config)), (0.0, 0.0)
    if way == "same loss":
        config = replace(
            config, teacher_weight=1.0, teacher_fraction=1.0, merged=False, step_weight=0.0, frozen_teacher=False
        )
    model = model_of(config, grouped, 0.0, device)
    targets, spent = None, (0.0, 0.0)
    if config.frozen_teacher:
        problems = [problem for batch in batches for problem in batch]
        texts = [text_of(problem, model.protocol.answer_style, config.last_step) for problem in problems]
        began, worked = time.perf_counter(), time.process_time()
        with torch.autocast(device, torch.bfloat16):
            names = [problem.prompt_id for problem in problems]
            targets = find_targets(model, texts, names, 4 * config.micro_batch, torch.bfloat16)
        n = len(problems)
        spent = (time.perf_counter() - began) / n, (time.process_time() - worked) / n
    loss = loss_of(model, config)
    return seconds_per_step(model, batches, lambda batch: take(loss, batch, config, targets)), spent


def compare(name: str, steps: int, batch_size: int, micro_batch: int, device: str) -> dict[str, Any]:
    """Problems per second of every way, on the same problems."""
    config = options_of(name, batch_size, micro_batch)
    stream = endless(config.data, "benchmark", "train", config.last_weights)
    batches = [list(islice(stream, batch_size)) for _ in range(steps + 1)]
    rates: dict[str, list[float]] = {}
    passes = config.steps * config.batch_size / config.problems if config.problems else 1.0
    for way in WAYS:
        found, targets = measured(way, config, batches, device)
        rates[way] = [1 / (step / batch_size + once / passes) for step, once in zip(found, targets, strict=True)]
        print(
            f"  {name:8} {way:10} {rates[way][0]:8.2f} problems/s {rates[way][1]:8.2f} per processor second", flush=True
        )
    return {
        "model": name, "batch_size": batch_size, "micro_batch": micro_batch, "steps": steps, "passes": passes,
        "problems_per_second": {way: rate[0] for way, rate in rates.items()},
        "problems_per_processor_second": {way: rate[1] for way, rate in rates.items()},
        "times": {way: rates[way][0] / rates["published"][0] for way in WAYS[1:]},
        "times_by_processor": {way: rates[way][1] / rates["published"][1] for way in WAYS[1:]},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--steps", type=int, default=3, help="steps that count, after one to warm up")
    parser.add_argument("--batch-size", type=int, default=32, help="problems per step")
    parser.add_argument("--micro-batch", type=int, default=16, help="problems computed at once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    names = [name for name in options.models if name != "smollm2" or (SMOLLM2 / "config.json").exists()]
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} threads, {options.device}, load before {load:.1f}")
    found = [compare(name, options.steps, options.batch_size, options.micro_batch, options.device) for name in names]
    for one in found:
        times = ", ".join(
            f"{way} {ratio:.2f} × (by processor time {one['times_by_processor'][way]:.2f} ×)"
            for way, ratio in one["times"].items()
        )
        print(f"  {one['model']:8} against published: {times}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"threads": torch.get_num_threads(), "device": options.device, "load": load, "models": found}
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
