"""`codi train`: train a CODI model in one command, from scratch or from a published base model.

    codi train --out runs/train                                  # the recipe of checkpoints/tiny
    codi train --out runs/llama --init meta-llama/Llama-3.2-1B-Instruct --data zen-E/GSM8k-Aug   # published settings
    accelerate launch --num_processes 8 -m experiments.train …   # the same on several GPUs
    torchrun --nproc_per_node 2 -m experiments.train --threads 1 …   # on CPU cores: faster than one process with two

From scratch (no --init) a base model learns to write its chain of thought first (stage "teacher"); then LoRA weights
and the projection are distilled (stage "distillation", codi/training.py). Batches are a pure function of seed and step,
so an interrupted run goes on where it was: the same command continues. The run folder holds config.json, log.csv (every
loss term of every step), state files, and at the end `checkpoint/`, which load_codi reads.
"""

from __future__ import annotations

import copy
import csv
import functools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from codi import UserError
from codi.checkpoint import reference_state, save_checkpoint
from codi.lora import add_lora
from codi.model import CodiModel
from codi.parts import Projection
from codi.protocol import answer_only, original
from codi.tokenizer import CODI_SPECIAL_TOKENS, build_tokenizer
from codi.training import DistillationLoss, TeacherLoss, collate, cosine_schedule
from experiments.tasks import arithmetic, is_correct, load_task, templates
from experiments.tasks.problem import Problem
from lm.cache import GROUPED_ATTENTION

__all__ = ["Config", "Resolved", "main", "resolve"]

ENDLESS = "arithmetic"

PUBLISHED: dict[str, Any] = {
    "lora_r": 128,
    "lora_alpha": 32.0,
    "weight_decay": 0.1,
    "batch_size": 128,
    "teacher_weight": 1.0,
    "teacher_fraction": 1.0,
    "direct_weight": 1.0,
    "step_weight": 0.0,
    "last_step": False,
    "merged": False,
    "latent_scale": 1.0,
    "teacher_steps": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},  # the defaults of Resolved
    # Shen et al. 2025, section 4 and the published training scripts
    "llama-1b": PUBLISHED | {"prj_dim": 2048, "lr": 8e-4, "epochs": 10.0, "micro_batch": 16, "kd_weight": 20.0},
    "gpt2": PUBLISHED | {"prj_dim": 768, "lr": 3e-3, "epochs": 40.0, "micro_batch": 32, "kd_weight": 1.0},
}


@dataclass(frozen=True)
class Config:
    """Train a CODI model."""

    out: str = "runs/train"
    """Run folder; the same command continues an interrupted run in it."""
    preset: Literal["auto", "tiny", "llama-1b", "gpt2"] = "auto"
    """Where options that are None below come from. tiny: the recipe of checkpoints/tiny; llama-1b, gpt2: the published
    settings for these bases; auto: tiny from scratch, with --init gpt2 for a GPT-2 and llama-1b for any other base."""
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

    teacher_steps: int | None = None
    """Steps of the teacher stage (0: none); None: the preset's from scratch, 0 with --init."""
    teacher_lr: float = 2e-3
    """Highest learning rate of the teacher stage."""
    teacher_weight_decay: float = 0.05
    """Weight decay of the teacher stage."""
    steps: int | None = None
    """Steps of the distillation stage; with a finite data set --epochs can be given instead."""
    epochs: float | None = None
    """Passes over a finite data set (llama-1b 10, gpt2 40); 0: --steps counts."""
    lr: float | None = None
    """Highest learning rate of the distillation stage (llama-1b 8e-4, gpt2 3e-3); cosine to zero after 3 %
    warm-up."""
    weight_decay: float | None = None
    """Weight decay of the distillation stage (published 0.1)."""
    clip: float = 2.0
    """Largest gradient norm."""
    batch_size: int | None = None
    """Problems per optimiser step, over all processes."""
    micro_batch: int | None = None
    """Problems computed at once by a process (llama-1b 16, gpt2 32): memory against speed."""
    lora_r: int | None = None
    """LoRA rank (published 128)."""
    lora_alpha: float | None = None
    """LoRA scale is alpha / r (published 32)."""
    prj_dim: int | None = None
    """Width of the projection (llama-1b 2048, gpt2 768)."""
    latent_scale: float | None = None
    """Scale of the latents at the start: the weight of the projection's last LayerNorm (published 1). 0: the root mean
    square of the base model's embeddings, so that a latent enters the residual stream as large as a token does."""
    kd_weight: float | None = None
    """f: weight of the distillation term (llama-1b 20, gpt2 1)."""
    teacher_weight: float | None = None
    """g: weight of the teacher term (published 1)."""
    teacher_fraction: float | None = None
    """Share of the problems whose written chain enters the teacher term (all give a distillation target;
    published 1)."""
    step_weight: float | None = None
    """Weight of the step term at the start: the state that becomes latent k is to predict what the teacher predicts
    where it writes the result of step k (published 0: CODI guides no single latent). It is constant for 50 % of the
    stage, falls to 0 until 75 %, and the rest is published CODI."""
    direct_weight: float | None = None
    """Weight of the direct-answer term (published 1)."""
    direct_fraction: float | None = None
    """Share of the problems that are also (teacher stage: instead) answered directly (published 1 for
    answer-only, 0 for original)."""
    first_weights: tuple[float, ...] = (1.2, 1.2, 1.0, 1.0, 1.0)
    """Arithmetic: relative frequency of 1..5-step problems at the first step of a stage…"""
    last_weights: tuple[float, ...] = (0.5, 0.8, 1.2, 1.3, 1.3)
    """… and from half of the stage on; linear in between."""
    last_step: bool | None = None
    """Whether the written chain holds its last equation (published: no, because a teacher that has written the result
    only copies it)."""
    merged: bool | None = None
    """Compute with merged LoRA weights: faster for small models (codi.training.MergedLora; tiny yes, published no)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: bfloat16 autocast, and frozen weights of a given base held in bfloat16; float32 throughout."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""
    save_every: int = 100
    """Steps between state files."""
    eval_every: int = 250
    """Steps between accuracies on held-out problems (0: never)."""
    eval_problems: int = 200
    """Held-out problems of each such accuracy."""


@dataclass(frozen=True)
class Resolved(Config):
    """A `Config` whose preset has been filled in; the defaults here are those of the preset "tiny"."""

    teacher_steps: int = 2000
    steps: int = 6000
    epochs: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 128
    micro_batch: int = 64
    lora_r: int = 128
    lora_alpha: float = 64.0
    prj_dim: int = 384
    latent_scale: float = 0.0
    kd_weight: float = 20.0
    teacher_weight: float = 10.0
    teacher_fraction: float = 0.6
    step_weight: float = 2.0
    direct_weight: float = 0.0
    direct_fraction: float = 0.03
    last_step: bool = True
    merged: bool = True


@dataclass(frozen=True)
class _Text:
    """A training problem as codi.training reads it."""

    question: str
    chain: str
    answer_text: str


def _text(problem: Problem, style: str, last_step: bool = True) -> _Text:
    problem = problem if last_step else replace(problem, steps=problem.steps[:-1])
    answer = format(Decimal(str(problem.answer)), "f")  # never 1e+06
    return _Text(problem.question, problem.chain, answer if style == "number" else f"The answer is: {answer}")


def resolve(config: Config) -> Resolved:
    """Fill in the preset wherever an option was not given.

    Raises:
        ValueError: options that contradict each other, or no configuration of a base model at `init`.
    """
    preset, kind = config.preset, ""
    if config.init:
        try:
            kind = AutoConfig.from_pretrained(config.init).model_type
        except (OSError, ValueError) as error:
            raise UserError(
                f"base model {config.init} is neither a folder with a language model nor can it be fetched from the "
                "Hugging Face hub: log in if it is gated, or on a machine with a connection run "
                f"'hf download {config.init} --local-dir base', copy the folder here and give --init base"
            ) from error
    if preset == "auto":
        preset = "tiny" if not config.init else "gpt2" if kind == "gpt2" else "llama-1b"
    if config.steps and config.epochs:
        raise UserError(f"give --steps or --epochs, not both: got {config.steps} and {config.epochs:g}")
    if config.epochs and config.data == ENDLESS:
        raise UserError(f"--epochs needs a finite data set, and {ENDLESS!r} is endless: give --steps")
    values = dict(PRESETS[preset])
    if config.init:
        values["teacher_steps"] = 0
    if preset != "tiny":
        values["direct_fraction"] = 1.0 if config.protocol == "answer-only" else 0.0
    if config.steps or config.data == ENDLESS:
        values["epochs"] = 0.0
    values |= {k: v for k, v in vars(config).items() if v is not None}
    resolved = Resolved(**{**values, "preset": preset})
    for name, lowest in (("batch_size", 1), ("micro_batch", 1), ("teacher_steps", 0), ("steps", 1), ("epochs", 0)):
        if getattr(resolved, name) < lowest:
            raise UserError(f"{name.replace('_', '-')} must be at least {lowest}, got {getattr(resolved, name)}")
    if not resolved.init and not resolved.teacher_steps:
        raise UserError("a model from scratch needs a teacher stage: give --teacher-steps > 0 or --init")
    return resolved


def micro_batch_of(config: Resolved, n_ranks: int) -> int:
    """Problems that each of n_ranks processes computes at once, so that equal shares make up a batch.

    Raises:
        ValueError: the batch cannot be divided like that.
    """
    share, rest = divmod(config.batch_size, n_ranks)
    if rest:
        raise UserError(f"batch-size must be a multiple of the {n_ranks} processes, got {config.batch_size}")
    size = min(config.micro_batch, share)
    if share % size:
        of = f" ({share} per process)" if n_ranks > 1 else ""
        raise UserError(f"batch-size must be a multiple of micro-batch, got {config.batch_size}{of} and {size}")
    return size


# --- Model ------------------------------------------------------------------------------------------------------------


def build_model(config: Resolved, attention: str) -> tuple[CodiModel, int, Any]:
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


def _freeze_in_bfloat16(base: nn.Module) -> None:
    """Hold frozen weights in bfloat16, as published training does: autocast need not cast them in every pass, nor keep
    a copy of them for every pass. Trainable weights and rotary frequencies stay in float32."""
    for parameter in base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


# --- Data -------------------------------------------------------------------------------------------------------------


def problems_of_step(
    config: Resolved, data: Sequence[Problem] | None, stage: str, step: int, n_steps: int
) -> list[Problem]:
    """The batch of one step: a pure function of its arguments."""
    if data is None:
        share = min(1.0, step / max(1, n_steps // 2))
        weights = [a + share * (b - a) for a, b in zip(config.first_weights, config.last_weights, strict=True)]
        stream = arithmetic.stream(seed=f"{config.seed}-{stage}-{step}", split="train", weights=weights)
        return [next(stream) for _ in range(config.batch_size)]
    per_epoch = max(1, len(data) // config.batch_size)
    epoch, index = divmod(step, per_epoch)
    order = _order(f"{config.seed}-{stage}-{epoch}", len(data))
    return [data[i] for i in order[index * config.batch_size : (index + 1) * config.batch_size]]


@functools.lru_cache(maxsize=1)
def _order(seed: str, n: int) -> list[int]:
    """Order of the problems in one pass; shuffled once per pass, not at every step."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def micro_batches(problems: Sequence[Problem], micro_batch: int, rank: int, n_ranks: int) -> Iterator[list[Problem]]:
    """This process's share of a batch, cut into micro-batches of similar length (less padding).

    Every process gets the same number of micro-batches of the same size, and every problem is in one of them.
    """
    order = sorted(problems, key=lambda p: len(p.question) + len(p.chain))
    for i in range(0, len(order), micro_batch * n_ranks):
        part = order[i : i + micro_batch * n_ranks][rank::n_ranks]
        # The direct-answer term sees the first problems of each micro-batch: any length, not the shortest.
        yield random.Random(len(part) + i).sample(part, len(part))


def guidance(step: int, n_steps: int) -> float:
    """Share of the step term's weight: 1 for 50 % of the stage, then falling to 0 at 75 %."""
    return min(1.0, max(0.0, (0.75 - step / n_steps) / 0.25))


# --- One stage --------------------------------------------------------------------------------------------------------


def run_stage(
    stage: str,
    loss: nn.Module,
    model: CodiModel,
    config: Resolved,
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
    log = _Log(folder / "log.csv", stage, first) if accelerator.is_main_process else None
    micro_batch = micro_batch_of(config, accelerator.num_processes)
    shares = config.batch_size // (micro_batch * accelerator.num_processes)
    for step in progress:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_schedule(step, n_steps)
        if isinstance(loss, DistillationLoss):
            loss.step_weight = config.step_weight * guidance(step, n_steps)
        problems = problems_of_step(config, data, stage, step, n_steps)
        sums: dict[str, float] = {}
        parts = list(micro_batches(problems, micro_batch, accelerator.process_index, accelerator.num_processes))
        for i, part in enumerate(parts):
            texts = [_text(p, model.protocol.answer_style, config.last_step) for p in part]
            batch = collate(texts, model).to(accelerator.device)
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
    """log.csv: one row per step and loss term of the main process; rows after the state that a run goes on from are
    dropped, because those steps come again."""

    def __init__(self, path: Path, stage: str, first: int) -> None:
        head = ["stage", "step", "term", "value", "gradient_norm", "seconds"]
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(head)]
        partial = path.with_suffix(".tmp")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([head, *(row for row in rows if row[0] != stage or int(row[1]) <= first)])
        partial.replace(path)
        self.file = path.open("a", newline="")
        self.writer = csv.writer(self.file)

    def write(self, stage: str, step: int, terms: dict[str, float], norm: float, seconds: float) -> None:
        for term, value in terms.items():
            self.writer.writerow([stage, step, term, f"{value:.6g}", f"{norm:.4g}", f"{seconds:.3f}"])
        self.file.flush()


# --- All of it --------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Train, and write `out/checkpoint`."""
    resolved = resolve(config)
    if resolved.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but this machine or this PyTorch has no CUDA device")
    cpu = resolved.device == "cpu" or (resolved.device == "auto" and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if resolved.precision == "bf16" else "no")
    _train(resolved, accelerator, cpu)
    accelerator.end_training()


def _settings(config: Resolved) -> dict[str, Any]:
    """What decides the result of a run."""
    left_out = ("out", "device", "preset", "threads", "save_every", "eval_every", "eval_problems")
    return json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in left_out}))


def _claim(folder: Path, settings: dict[str, Any], accelerator: Accelerator) -> None:
    """Make the run folder, or check that it holds the same run."""
    config_file = folder / "config.json"
    if config_file.exists():
        try:
            before = json.loads(config_file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{config_file} is damaged: {error}") from error
        changed = [f"{k}: {before.get(k)} there, {v} here" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise UserError(
                f"{folder} holds a training run with other options ({'; '.join(changed)}); choose another --out"
            )
    accelerator.wait_for_everyone()  # every process has looked before one writes
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        partial = config_file.with_suffix(".tmp")
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        partial.replace(config_file)
    accelerator.wait_for_everyone()


def _train(config: Resolved, accelerator: Accelerator, cpu: bool) -> None:
    folder, settings = Path(config.out), _settings(config)
    micro_batch_of(config, accelerator.num_processes)  # refused now, not after the model has been loaded
    _claim(folder, settings, accelerator)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
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
    if isinstance(base, str) and config.precision == "bf16":
        _freeze_in_bfloat16(model.base)
    model.base.to(accelerator.device)
    with torch.no_grad():
        rms = float(model.base.get_input_embeddings().weight.float().pow(2).mean().sqrt())
        model.prj.get_parameter("ln.weight").fill_(config.latent_scale or rms)
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
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = reference_state(model)
        if not isinstance(base, str):  # the base was rounded before; LoRA is rounded now, the projection stays as it is
            state = {k: v if k.startswith("prj.") else v.to(torch.bfloat16) for k, v in state.items()}
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
            extra={"training": settings},
            base_tokenizer=base_tokenizer,
        )
        print(f"checkpoint written to {target}")


def _data(config: Resolved, model: CodiModel) -> tuple[list[Problem] | None, list[Problem], int]:
    """Training problems (None: the endless generator), held-out problems and the number of distillation steps."""
    if config.data == ENDLESS:
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
    n_steps = round(config.epochs * (len(problems) // config.batch_size)) or 1 if config.epochs else config.steps
    return problems, held_out, n_steps


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
