"""Options of `codi train`: what is given, the presets that fill in the rest, and what of it decides the result.

Free of torch; transformers is imported only to see what kind of base model `--init` names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from codi.step_latents import parse_step_latents
from experiments.study.manifest import check_out, command_of, differences, read_manifest, refuse_other
from experiments.study.options import JudgingOptions, RunOptions, identity_of
from experiments.tasks import is_endless
from lm.errors import UserError

__all__ = ["PRESETS", "Resolved", "TrainOptions", "check_folder", "micro_batch_of", "resolve"]

PUBLISHED: dict[str, Any] = {
    "lora_r": 128,
    "lora_alpha": 32.0,
    "lora_dropout": 0.1,  # train.py of zhenyi4/codi gives LoraConfig this number, whatever its options say
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
    # for a small pretrained base on CPU cores: this project's own
    "smollm2": PUBLISHED
    | {
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "prj_dim": 768,
        "latent_scale": 0.0,
        "lr": 1e-3,
        "teacher_steps": 640,
        "teacher_lr": 1e-3,
        "teacher_lora": True,
        "frozen_teacher": True,
        "teacher_weight": 0.0,
        "direct_weight": 0.0,
        "direct_fraction": 0.03,
        "last_step": True,
        "kd_weight": 20.0,
        "steps": 3000,
        "batch_size": 32,
        "micro_batch": 32,
        "problems": 16000,
        "length_window": 8,
        "checkpoint": "trained",
    },
}


@dataclass(frozen=True)
class TrainOptions(JudgingOptions, RunOptions):
    """Train a CODI model."""

    COMMAND: ClassVar[str] = "train"
    AT_LEAST: ClassVar[Mapping[str, float]] = {
        "teacher_steps": 0, "steps": 1, "epochs": 0, "micro_batch": 1, "n_latents": 1, "lora_dropout": 0,
        "step_until": 0, "decoder_weight": 0, "decoder_layers": 1, "problems": 0, "length_window": 1,
    }  # fmt: skip
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {"device", "preset", "save_every", "eval_every", "eval_problems", "answers"}
    )
    LATER: ClassVar[frozenset[str]] = frozenset({
        "decimal_comma", "lora_dropout", "step_latents", "step_until", "decoder_weight", "decoder_latents",
        "decoder_layers", "problems", "length_window", "teacher_lora", "frozen_teacher", "lora_modules", "checkpoint",
    })  # fmt: skip
    IDENTITY: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    out: Path = Path("runs/train")
    preset: Literal["auto", "tiny", "llama-1b", "gpt2", "smollm2"] = "auto"
    """Where options that are None below come from. tiny: the recipe of checkpoints/tiny; llama-1b, gpt2: the published
    settings for these bases; auto: tiny from scratch, with --init gpt2 for a GPT-2 and llama-1b for any other base.
    smollm2: for a small pretrained base on CPU cores, a LoRA teacher whose targets are computed once."""
    init: str = ""
    """Base model: folder or hub id; empty: a small Llama from scratch."""
    teacher: str = ""
    """A CODI checkpoint (folder or hub id) whose base model, tokens and protocol are taken as they are, in place of a
    teacher stage: models that differ in their distillation only share one teacher. Empty: none."""
    data: str = "arithmetic"
    """Training problems with written chains: arithmetic, word-problems or polynomial (endless; with other constants
    polynomial:m=97,b=3), or a file or hub id that `codi eval` reads."""
    problems: int | None = None
    """Of an endless generator: train on this many problems, again and again, in the mixture of --last-weights; 0: no
    problem comes twice (smollm2 16,000)."""
    length_window: int | None = None
    """With a finite number of problems: sort this many batches by length before they are cut, less padding at the price
    of batches that are alike in length; 1: do not (smollm2 8)."""
    decimal_comma: bool = False
    """Commas are decimal in the answers and steps of the data: 3,5 is 3.5, and 1.234 is 1234."""
    protocol: Literal["answer-only", "original", "original-eos"] = "answer-only"
    """Token order and answer style."""
    n_latents: int = 6
    """Latent steps between question and answer."""
    seed: int = 0
    """Seed of weights, problems and order."""

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
    """Steps of the teacher stage (0: none); None: the preset's from scratch, 0 with --init (smollm2 640)."""
    teacher_lora: bool | None = None
    """With --init: the teacher stage trains LoRA weights, which the student goes on from, and leaves the base as it is;
    otherwise it trains all weights of the base (smollm2 yes)."""
    teacher_lr: float | None = None
    """Highest learning rate of the teacher stage (tiny 2e-3, smollm2 1e-3)."""
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
    batch_size: int | None = None  # type: ignore[assignment]
    """Problems per optimiser step, over all processes."""
    micro_batch: int | None = None
    """Problems computed at once by a process (llama-1b 16, gpt2 32): memory against speed."""
    lora_r: int | None = None
    """LoRA rank (published 128)."""
    lora_alpha: float | None = None
    """LoRA scale is alpha / r (published 32)."""
    lora_dropout: float | None = None
    """Dropout on what enters a LoRA layer, a fraction (published 0.1, tiny 0); needs --merged False. While a model is
    trained, dropouts of its own (GPT-2 has some) act too, as in published training."""
    lora_modules: tuple[str, ...] | None = None
    """Names of the linear layers that carry LoRA, such as q_proj v_proj; none named: all of the blocks (published)."""
    prj_dim: int | None = None
    """Width of the projection (llama-1b 2048, gpt2 768)."""
    latent_scale: float | None = None
    """Scale of the latents at the start: the weight of the projection's last LayerNorm (published 1). 0: the root mean
    square of the base model's embeddings, so that a latent enters the residual stream as large as a token does."""
    kd_weight: float | None = None
    """f: weight of the distillation term (llama-1b 20, gpt2 1)."""
    teacher_weight: float | None = None
    """g: weight of the teacher term (published 1). 0: the teacher is not trained along, and computed without
    gradient."""
    frozen_teacher: bool | None = None
    """The teacher is the model as it is when distillation begins: what it gives is computed once per problem and kept
    in the run folder. Needs --teacher-weight 0 and problems that come again (smollm2 yes; published no)."""
    teacher_fraction: float | None = None
    """Share of the problems whose written chain enters the teacher term (all give a distillation target;
    published 1)."""
    step_weight: float | None = None
    """Weight of the step term at the start: the state that becomes latent k is to predict what the teacher predicts
    where it writes the result of step k (published 0: CODI guides no single latent). Constant at first, then falling to
    0 (see --step-until); the rest is published CODI."""
    step_latents: str = "same"
    """Which latent learns which step by the step term. same: latent k step k; later: latent k + 1 step k; or pairs such
    as 2:1,4:2 (only these), a latent that is to say nothing: 3:-. What learns is the state that becomes the latent: h_1
    for latent 2 (h_6 for latent 7 of six). A step beyond the last counts as the last."""
    step_until: float = 0.75
    """Share of the stage after which the step term has gone: it is constant for two thirds of that time, then falls.
    1.5 or more: constant to the end."""
    decoder_weight: float | None = None
    """Weight of an auxiliary decoder, a small transformer that reads a latent and writes its step (SIM-CoT, arXiv
    2509.20317: 1, constant; published CODI and tiny: 0, none). It is not part of the checkpoint."""
    decoder_latents: str = "same"
    """Which latent the decoder is to read which step from, as --step-latents; a step that a problem does not have is
    left out."""
    decoder_layers: int = 2
    """Blocks of that decoder."""
    direct_weight: float | None = None
    """Weight of the direct-answer term (published 1)."""
    direct_fraction: float | None = None
    """Share of the problems that are also (teacher stage: instead) answered directly (published 1 for
    answer-only, 0 for original)."""
    first_weights: tuple[float, ...] = (1.2, 1.2, 1.0, 1.0, 1.0)
    """Endless data: relative frequency of problems of 1..5 steps (hops) at the first step of a stage…"""
    last_weights: tuple[float, ...] = (0.5, 0.8, 1.2, 1.3, 1.3)
    """… and from half of the stage on; linear in between. Held-out problems have 3 steps or more (word
    problems 2), or as many as training has where that is less: 0 1 0 0 0 trains on problems of two hops alone."""
    last_step: bool | None = None
    """Whether the written chain holds its last equation (published: no, because a teacher that has written the result
    only copies it)."""
    merged: bool | None = None
    """Compute with merged LoRA weights: faster for small models (codi.merged; tiny yes, published no)."""

    checkpoint: Literal["whole", "trained"] | None = None
    """What the checkpoint holds. whole: every weight, as published ones do; trained: LoRA, projection and the rows of
    new tokens alone, the base by its name and the hash of its weights (needs --init; smollm2 trained)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["bf16", "float32"] = "bf16"
    """bf16: bfloat16 autocast, and frozen weights of a given base held in bfloat16; float32 throughout."""
    save_every: int = 100
    """Steps between state files."""
    eval_every: int = 250
    """Steps between accuracies on held-out problems (0: never)."""
    eval_problems: int = 200
    """Held-out problems of each such accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in (self.step_latents, self.decoder_latents):
            parse_step_latents(text, self.n_latents)
        if self.lora_dropout is not None and self.lora_dropout >= 1:
            raise UserError(f"lora-dropout must be a fraction below 1, got {self.lora_dropout:g}")

    def check_inputs(self) -> None:
        if not self.init:
            check_folder(resolve(self))
        elif (self.out / "manifest.json").exists():  # what the preset is, only loading the base model tells
            old = read_manifest(self.out)["identity"]
            if command_of(old) != self.COMMAND:
                refuse_other(self.out, old, {"study": self.COMMAND})


@dataclass(frozen=True)
class Resolved(TrainOptions):
    """`TrainOptions` whose preset has been filled in; the defaults here are those of the preset "tiny"."""

    problems: int = 0
    length_window: int = 1
    teacher_steps: int = 2000
    teacher_lora: bool = False
    teacher_lr: float = 2e-3
    steps: int = 6000
    epochs: float = 0.0
    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 128
    micro_batch: int = 64
    lora_r: int = 128
    lora_alpha: float = 64.0
    lora_dropout: float = 0.0
    lora_modules: tuple[str, ...] = ()
    prj_dim: int = 384
    latent_scale: float = 0.0
    kd_weight: float = 20.0
    teacher_weight: float = 10.0
    teacher_fraction: float = 0.6
    frozen_teacher: bool = False
    step_weight: float = 2.0
    decoder_weight: float = 0.0
    direct_weight: float = 0.0
    direct_fraction: float = 0.03
    last_step: bool = True
    merged: bool = True
    checkpoint: Literal["whole", "trained"] = "whole"


def resolve(options: TrainOptions) -> Resolved:
    """Fill in the preset wherever an option was not given.

    Raises:
        ValueError: options that contradict each other, or no configuration of a base model at `init`.
    """
    preset, kind = options.preset, ""
    if options.init:
        try:
            from transformers import AutoConfig

            kind = AutoConfig.from_pretrained(options.init).model_type
        except (OSError, ValueError) as error:
            raise UserError(
                f"base model {options.init} is neither a folder with a language model nor can it be fetched from the "
                "Hugging Face hub: log in if it is gated, or on a machine with a connection run "
                f"'hf download {options.init} --local-dir base', copy the folder here and give --init base"
            ) from error
    if preset == "auto":
        preset = "tiny" if not options.init else "gpt2" if kind == "gpt2" else "llama-1b"
    if options.steps and options.epochs:
        raise UserError(f"give --steps or --epochs, not both: got {options.steps} and {options.epochs:g}")
    for name, weights in (("first-weights", options.first_weights), ("last-weights", options.last_weights)):
        if len(weights) != 5 or min(weights) < 0 or not any(weights):
            raise UserError(f"{name} must be 5 numbers of 0 or more, not all 0: got {' '.join(map(str, weights))}")
    pool = options.problems if options.problems is not None else PRESETS[preset].get("problems", 0)
    endless = is_endless(options.data) and not pool
    if options.epochs and endless:
        raise UserError(
            f"--epochs needs a finite data set, and {options.data!r} is endless: give --steps, or --problems too"
        )
    values = dict(PRESETS[preset])
    if options.teacher and (options.init or options.teacher_steps):
        raise UserError(
            "--teacher takes a finished teacher, so that neither --init nor --teacher-steps can be given; got "
            f"{options.init or options.teacher_steps}"
        )
    if options.teacher or (options.init and preset != "smollm2"):
        values["teacher_steps"] = 0
    if preset in ("llama-1b", "gpt2"):
        values["direct_fraction"] = 1.0 if options.protocol == "answer-only" else 0.0
    if options.steps or endless:
        values["epochs"] = 0.0
    values |= {k: v for k, v in vars(options).items() if v is not None}
    resolved = Resolved(**{**values, "preset": preset})
    if not resolved.init and not resolved.teacher and not resolved.teacher_steps:
        raise UserError("a model from scratch needs a teacher stage: give --teacher-steps > 0, --teacher or --init")
    _refuse_contradictions(resolved)
    return resolved


def _refuse_contradictions(options: Resolved) -> None:
    """Refuse options that cannot act together."""
    if options.merged and options.lora_dropout:
        raise UserError(
            f"lora-dropout {options.lora_dropout:g} cannot act on merged weights: give --merged False or "
            "--lora-dropout 0"
        )
    if options.teacher_lora and not options.init:
        raise UserError("--teacher-lora trains an adapter of a given base: give --init")
    if options.checkpoint == "trained" and (not options.init or (options.teacher_steps and not options.teacher_lora)):
        raise UserError(
            "--checkpoint trained needs a base that stays as it is: give --init, and --teacher-lora True if there "
            "is a teacher stage"
        )
    if options.frozen_teacher and options.teacher_weight:
        raise UserError(
            f"--frozen-teacher needs --teacher-weight 0, got {options.teacher_weight:g}: a teacher that is trained "
            "along is not frozen"
        )
    if options.frozen_teacher and is_endless(options.data) and not options.problems:
        raise UserError(
            f"--frozen-teacher needs problems that come again, and {options.data!r} is endless: give --problems"
        )


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


def check_folder(config: Resolved) -> None:
    """Refuse a run folder that can be seen to hold another run.

    Raises:
        ValueError: it does (every difference is listed), or what it holds is damaged.
    """
    check_out(config.out, config.COMMAND, identity_of(config))
    early = config.out / "config.json"  # runs of early versions have no manifest
    if not early.exists() or (config.out / "manifest.json").exists():
        return
    try:
        before = json.loads(early.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{early} is damaged: {error}") from None
    found = differences(before, identity_of(config), "options.")
    if found:
        raise UserError(
            f"{config.out} holds a training run with other options; choose another --out or the same options. "
            f"Differences (there -> now): {'; '.join(found)}"
        )
