"""`codi train`: train a CODI model in one command, from scratch or from a published base model.

    codi train --out runs/train                                  # the recipe of checkpoints/tiny
    codi train --out runs/llama --init meta-llama/Llama-3.2-1B-Instruct --data zen-E/GSM8k-Aug --preset llama-1b
    accelerate launch --num_processes 8 -m experiments.train …   # the same on several GPUs

From scratch (no --init) a base model learns to write its chain of thought first (stage "teacher"); then LoRA weights
and the projection are distilled (stage "distillation", codi/training.py). Batches are a pure function of seed and step,
so an interrupted run goes on where it was: the same command continues. The run folder holds config.json, log.csv (every loss
term of every step), state files, and at the end `checkpoint/`, which load_codi reads.
"""

from __future__ import annotations

import copy
import csv
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from codi import UserError
from codi.cache import GROUPED_ATTENTION
from codi.checkpoint import add_lora, reference_state, save_checkpoint
from codi.model import CodiModel, Projection
from codi.protocol import answer_only, original
from codi.tokenizer import CODI_SPECIAL_TOKENS, build_tokenizer
from codi.training import DistillationLoss, TeacherLoss, collate, cosine_schedule
from experiments.tasks import arithmetic, is_correct, load_task, templates
from experiments.tasks.problem import Problem

__all__ = ["Config", "main"]

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    # Shen et al. 2025, section 4 and the published training scripts
    "llama-1b": dict(
        lora_r=128,
        lora_alpha=32,
        prj_dim=2048,
        lr=8e-4,
        weight_decay=0.1,
        clip=2.0,
        epochs=10,
        batch_size=128,
        micro_batch=16,
        kd_weight=20.0,
        teacher_fraction=1.0,
        direct_fraction=0.0,
        merged=False,
        teacher_steps=0,
    ),
    "gpt2": dict(
        lora_r=128,
        lora_alpha=32,
        prj_dim=768,
        lr=3e-3,
        weight_decay=0.1,
        clip=2.0,
        epochs=40,
        batch_size=128,
        micro_batch=32,
        kd_weight=1.0,
        teacher_fraction=1.0,
        direct_fraction=0.0,
        merged=False,
        teacher_steps=0,
    ),
}


@dataclass(frozen=True)
class Config:
    """Train a CODI model."""

    out: str = "runs/train"
    """Run folder; the same command continues an interrupted run in it."""
    preset: Literal["tiny", "llama-1b", "gpt2"] = "tiny"
    """Published settings for a base model (rank, rates, weights, epochs); they replace the defaults below where an
    option is
    left at its default. "tiny" is the recipe of checkpoints/tiny."""
    init: str = ""
    """Base model: folder or hub id; empty: a small Llama from scratch."""
    data: str = "arithmetic"
    """Training problems with written chains: "arithmetic" (endless), or a file or hub id that `codi eval` reads."""
    protocol: Literal["answer-only", "original", "original-eos"] = "answer-only"
    """Token order and answer style."""
    n_latents: int = 6
    """Latent steps between question and answer."""
    seed: int = 0
    """Of weights, problems and order."""

    d_model: int = 192
    """From scratch: width."""
    n_layers: int = 4
    """From scratch: blocks."""
    n_heads: int = 6
    """From scratch: attention heads."""
    n_kv_heads: int = 3
    """From scratch: key/value heads."""
    d_ffn: int = 512
    """From scratch: width of the MLP."""

    teacher_steps: int = 800
    """Steps of the teacher stage (0: none)."""
    teacher_lr: float = 2e-3
    """Highest learning rate of the teacher stage."""
    teacher_weight_decay: float = 0.05
    """Weight decay of the teacher stage."""
    steps: int = 3600
    """Steps of the distillation stage; with a finite data set use --epochs."""
    epochs: float = 0.0
    """Passes over a finite data set; 0: --steps counts."""
    lr: float = 1.5e-3
    """Highest learning rate of the distillation stage; cosine to zero after 3 % warm-up."""
    weight_decay: float = 0.05
    """Weight decay of the distillation stage."""
    clip: float = 2.0
    """Largest gradient norm."""
    batch_size: int = 128
    """Problems per optimiser step, over all processes."""
    micro_batch: int = 64
    """Problems computed at once by a process."""
    lora_r: int = 64
    """LoRA rank."""
    lora_alpha: float = 64.0
    """LoRA scale is alpha / r."""
    prj_dim: int = 384
    """Width of the projection."""
    kd_weight: float = 20.0
    """f: weight of the distillation term."""
    teacher_weight: float = 1.0
    """g: weight of the teacher term."""
    teacher_fraction: float = 0.5
    """Share of the problems whose written chain enters the teacher term (all give a distillation target)."""
    direct_weight: float = 0.2
    """Weight of the direct-answer term."""
    direct_fraction: float = 0.06
    """Share of the problems that are also (teacher stage: instead) answered directly."""
    first_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Arithmetic: relative frequency of 1..5-step problems at the first step of a stage…"""
    last_weights: tuple[float, ...] = (0.4, 0.8, 1.2, 1.3, 1.3)
    """… and from half of the stage on; linear in between."""
    merged: bool = True
    """Compute with merged LoRA weights: faster for small models (codi.training.MergedLora)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bfloat16 autocast or float32 throughout."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""
    save_every: int = 100
    """Steps between state files."""
    eval_every: int = 250
    """Steps between accuracies on held-out problems (0: never)."""
    eval_problems: int = 200
    """Held-out problems of each such accuracy."""


@dataclass(frozen=True)
class _Text:
    """A training problem as codi.training reads it."""

    question: str
    chain: str
    answer_text: str


def _text(problem: Problem, style: str) -> _Text:
    answer = f"{problem.answer:g}" if isinstance(problem.answer, float) else str(problem.answer)
    return _Text(problem.question, problem.chain, answer if style == "number" else f"The answer is: {answer}")


def _resolved(config: Config) -> Config:
    """The preset's values wherever an option was left at its default."""
    default = Config()
    changes = {k: v for k, v in PRESETS[config.preset].items() if getattr(config, k) == getattr(default, k)}
    config = replace(config, **changes)
    if config.batch_size % config.micro_batch:
        raise UserError(
            f"batch-size must be a multiple of micro-batch, got {config.batch_size} and {config.micro_batch}"
        )
    if config.init and config.preset == "tiny" and config.teacher_steps and config.data != "arithmetic":
        config = replace(config, teacher_steps=0)
    if not config.init and not config.teacher_steps:
        raise UserError("a model from scratch needs a teacher stage: give --teacher-steps > 0 or --init")
    return config


# --- Model ------------------------------------------------------------------------------------------------------------


def build_model(config: Config, attention: str) -> tuple[CodiModel, int, Any]:
    """The model before any training, the size of the base vocabulary (the CODI tokens follow), the base tokenizer."""
    tokenizer: Any
    base: Any
    if config.init:
        tokenizer = AutoTokenizer.from_pretrained(config.init)
        base = AutoModelForCausalLM.from_pretrained(config.init, dtype=torch.float32, attn_implementation=attention)
        vocabulary = max(int(base.get_input_embeddings().weight.shape[0]), len(tokenizer))
        base.resize_token_embeddings(vocabulary + len(CODI_SPECIAL_TOKENS), mean_resizing=False)
    else:
        chains = [">><<a", "a>>", "<<a"] * 500
        sentences = arithmetic.corpus_sentences() + templates.corpus_sentences()
        tokenizer = build_tokenizer([s for line in sentences for s in (line, line[1:])] + chains)
        vocabulary = len(tokenizer)
        base = LlamaForCausalLM(
            LlamaConfig(  # type: ignore[call-arg]  # attn_implementation is taken by the parent class
                vocab_size=vocabulary + len(CODI_SPECIAL_TOKENS),
                hidden_size=config.d_model,
                intermediate_size=config.d_ffn,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                attn_implementation=attention,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    base_tokenizer = copy.deepcopy(tokenizer)
    if config.protocol == "answer-only":
        pad, bot, eot = CODI_SPECIAL_TOKENS
        tokenizer.add_special_tokens({"pad_token": pad, "additional_special_tokens": [bot, eot]})
        ids = tokenizer.convert_tokens_to_ids([pad, bot, eot])
        protocol = answer_only(ids[0], ids[1], ids[2], tokenizer.eos_token_id)
        if not config.init:
            protocol = replace(protocol, question_suffix="")
    else:
        protocol = original(vocabulary, tokenizer.eos_token_id, with_eos=config.protocol == "original-eos")
    tokenizer.padding_side = "left"
    prj = Projection(base.config.hidden_size, config.prj_dim)
    return CodiModel(base, prj, tokenizer, protocol, n_latents=config.n_latents), vocabulary, base_tokenizer


def _frozen_base(model: CodiModel, vocabulary: int) -> Any:
    """The teacher as a base model of its own: weights rounded to bfloat16 (also in `model`), CODI tokens cut off."""
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    base = copy.deepcopy(model.base)
    base.resize_token_embeddings(vocabulary)
    return base.to(torch.bfloat16)


# --- Data -------------------------------------------------------------------------------------------------------------


def problems_of_step(
    config: Config, data: Sequence[Problem] | None, stage: str, step: int, n_steps: int
) -> list[Problem]:
    """The batch of one step: a pure function of its arguments."""
    if data is None:
        share = min(1.0, step / max(1, n_steps // 2))
        weights = [a + share * (b - a) for a, b in zip(config.first_weights, config.last_weights, strict=True)]
        stream = arithmetic.stream(seed=f"{config.seed}-{stage}-{step}", split="train", weights=weights)
        return [next(stream) for _ in range(config.batch_size)]
    per_epoch = max(1, len(data) // config.batch_size)
    epoch, index = divmod(step, per_epoch)
    order = list(range(len(data)))
    random.Random(f"{config.seed}-{stage}-{epoch}").shuffle(order)
    return [data[i] for i in order[index * config.batch_size : (index + 1) * config.batch_size]]


def micro_batches(problems: Sequence[Problem], config: Config, rank: int, n_ranks: int) -> Iterator[list[Problem]]:
    """This process's share of a batch, cut into micro-batches of similar length (less padding)."""
    order = sorted(problems, key=lambda p: len(p.question) + len(p.chain))
    for i in range(0, len(order), config.micro_batch):
        part = order[i : i + config.micro_batch][rank::n_ranks]
        # The direct-answer term sees the first problems of each micro-batch: any length, not the shortest.
        yield random.Random(len(part) + i).sample(part, len(part))


# --- One stage --------------------------------------------------------------------------------------------------------


def run_stage(
    stage: str,
    loss: nn.Module,
    model: CodiModel,
    config: Config,
    n_steps: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    data: Sequence[Problem] | None,
    held_out: Sequence[Problem],
    accelerator: Accelerator,
) -> None:
    """Optimise the trainable weights of `loss` for n_steps, from the last state file on."""
    folder = Path(config.out)
    weights = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=lr, betas=betas, weight_decay=weight_decay)
    state_file = folder / f"{stage}.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        first = int(state["step"])
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
    if first >= n_steps:
        return
    wrapped, optimizer = accelerator.prepare(loss, optimizer)
    progress = tqdm(
        range(first, n_steps),
        initial=first,
        total=n_steps,
        desc=stage,
        unit="step",
        mininterval=5,
        disable=not accelerator.is_main_process,
    )
    log = _Log(folder / "log.csv") if accelerator.is_main_process else None
    shares = config.batch_size // config.micro_batch
    for step in progress:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_schedule(step, n_steps)
        problems = problems_of_step(config, data, stage, step, n_steps)
        sums: dict[str, float] = {}
        parts = list(micro_batches(problems, config, accelerator.process_index, accelerator.num_processes))
        for i, part in enumerate(parts):
            batch = collate([_text(p, model.protocol.answer_style) for p in part], model).to(accelerator.device)
            with accelerator.accumulate() if i == len(parts) - 1 else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    losses = wrapped(batch)
                accelerator.backward(losses["total"] / shares)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / shares
        norm = accelerator.clip_grad_norm_(list(weights.values()), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        if log is not None:
            log.write(stage, step + 1, sums, float(norm), time.perf_counter() - started)
            progress.set_postfix({k: f"{v:.3f}" for k, v in sums.items()}, refresh=False)
        last = step + 1 == n_steps
        if accelerator.is_main_process and (last or (step + 1) % config.save_every == 0):
            raw = getattr(optimizer, "optimizer", optimizer)
            partial = state_file.with_suffix(".tmp")
            torch.save(
                {
                    "step": step + 1,
                    "weights": {k: v.detach().cpu() for k, v in weights.items()},
                    "optimizer": raw.state_dict(),
                },
                partial,
            )
            partial.replace(state_file)
        if accelerator.is_main_process and config.eval_every and (last or (step + 1) % config.eval_every == 0):
            if isinstance(loss, DistillationLoss) and loss.lora is not None:
                loss.lora.refresh()
            with accelerator.autocast():
                progress.write(f"{stage} step {step + 1}: {_accuracies(model, held_out, stage)}")


def _accuracies(model: CodiModel, held_out: Sequence[Problem], stage: str) -> str:
    """Accuracies on held-out problems, in words."""
    modes: list[tuple[str, dict[str, Any]]] = [("written chain", {"mode": "verbal"}), ("direct", {"mode": "direct"})]
    if stage == "distillation":
        modes += [(f"{n} latents", {"mode": "latent", "n_latents": n}) for n in (0, 3, model.n_latents)]
    words = []
    for name, options in modes:
        texts = model.answer([p.question for p in held_out], **options)
        right = sum(is_correct(text, p.answer) for text, p in zip(texts, held_out, strict=True))
        words.append(f"{name} {right / len(held_out):.3f}")
    return ", ".join(words) + f" (n = {len(held_out)})"


class _Log:
    """log.csv: one row per step and loss term."""

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        self.file = path.open("a", newline="")
        self.writer = csv.writer(self.file)
        if new:
            self.writer.writerow(["stage", "step", "term", "value", "gradient_norm", "seconds"])

    def write(self, stage: str, step: int, terms: dict[str, float], norm: float, seconds: float) -> None:
        for term, value in terms.items():
            self.writer.writerow([stage, step, term, f"{value:.6g}", f"{norm:.4g}", f"{seconds:.3f}"])
        self.file.flush()


# --- All of it --------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Train, and write `out/checkpoint`."""
    config = _resolved(config)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        k: v for k, v in asdict(config).items() if k not in ("threads", "save_every", "eval_every", "eval_problems")
    }
    settings = json.loads(json.dumps(settings))
    config_file = folder / "config.json"
    if config_file.exists() and json.loads(config_file.read_text()) != settings:
        before = json.loads(config_file.read_text())
        changed = [f"{k}: {before.get(k)} there, {v} here" for k, v in settings.items() if before.get(k) != v]
        raise UserError(
            f"{folder} holds a training run with other options ({'; '.join(changed)}); choose another --out"
        )
    config_file.write_text(json.dumps(settings, indent=2) + "\n")

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    cpu = config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if config.precision == "bf16" else "no")
    model, vocabulary, base_tokenizer = build_model(
        config, GROUPED_ATTENTION if cpu else "sdpa"
    )  # sdpa's masked backward is slow on CPUs
    model.base.to(accelerator.device)
    model.prj.to(accelerator.device)

    data, held_out, n_steps = _data(config, model)
    if config.teacher_steps:
        loss: nn.Module = TeacherLoss(model, config.direct_fraction)
        run_stage(
            "teacher",
            loss,
            model,
            config,
            config.teacher_steps,
            config.teacher_lr,
            config.teacher_weight_decay,
            (0.9, 0.95),
            data,
            held_out,
            accelerator,
        )
    base: Any
    if config.init and not config.teacher_steps:
        base = str(Path(config.init).resolve()) if Path(config.init).is_dir() else config.init
    else:
        base = _frozen_base(model, vocabulary)

    add_lora(model.base, config.lora_r, config.lora_alpha)
    model.base.to(accelerator.device)
    compute = torch.bfloat16 if config.precision == "bf16" else torch.float32
    loss = DistillationLoss(
        model,
        config.n_latents,
        config.kd_weight,
        config.teacher_weight,
        config.teacher_fraction,
        config.direct_weight,
        config.direct_fraction,
        config.merged,
        compute,
    )
    run_stage(
        "distillation",
        loss,
        model,
        config,
        n_steps,
        config.lr,
        config.weight_decay,
        (0.9, 0.999),
        data,
        held_out,
        accelerator,
    )
    if accelerator.is_main_process:
        state = reference_state(model)
        if not isinstance(base, str):  # rounded base weights lose nothing in bfloat16
            state = {k: v if ".lora_" in k or k.startswith("prj.") else v.to(torch.bfloat16) for k, v in state.items()}
        target = save_checkpoint(
            folder / "checkpoint",
            state,
            base,
            model.tokenizer,
            model.protocol,
            lora_r=config.lora_r,
            lora_alpha=config.lora_alpha,
            n_latents=config.n_latents,
            prj_dim=config.prj_dim,
            extra={"training": {k: v for k, v in settings.items() if k != "out"}},
            base_tokenizer=base_tokenizer,
        )
        print(f"checkpoint written to {target}")


def _data(config: Config, model: CodiModel) -> tuple[list[Problem] | None, list[Problem], int]:
    """Training problems (None: the endless generator), held-out problems and the number of distillation steps."""
    if config.data == "arithmetic":
        return None, arithmetic.generate(config.eval_problems, seed=1, split="test", min_steps=3), config.steps
    problems = [
        p
        for p in load_task(config.data, split="train", seed=config.seed, suffix=model.protocol.question_suffix)
        if p.steps
    ]
    if len(problems) <= config.eval_problems + config.batch_size:
        raise UserError(
            f"{config.data} has {len(problems)} problems with written chains, "
            f"{config.eval_problems + config.batch_size + 1} are needed (see --eval-problems, --batch-size)"
        )
    random.Random(config.seed).shuffle(problems)
    held_out, problems = problems[: config.eval_problems], problems[config.eval_problems :]
    n_steps = round(config.epochs * (len(problems) // config.batch_size)) if config.epochs else config.steps
    return problems, held_out, n_steps


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
