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

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from transformers import AutoConfig

from codi.checkpoint import reference_state, save_checkpoint
from codi.decoder import StepDecoder
from codi.lora import add_lora
from codi.model import CodiModel
from codi.places import base_folder
from codi.trained import Base, base_hash, save_trained
from codi.training import DistillationLoss, TeacherLoss
from experiments.study.folder import RunFolder, fingerprint, open_run, versions
from experiments.study.options import identity_of
from experiments.study.result import Section
from experiments.study.run import Findings, to_stderr, write_result
from experiments.tasks.problem import Problem
from experiments.train.data import load_data
from experiments.train.model import base_reference, build_model, freeze_in_bfloat16, frozen_base
from experiments.train.options import Resolved, TrainOptions, check_folder, micro_batch_of, resolve
from experiments.train.stage import Stage, run_stage
from experiments.train.targets import targets_of
from lm.cache import GROUPED_ATTENTION
from lm.errors import UserError

__all__ = ["main"]

FORMAT = 1
"""Of the run folder; part of a run's identity."""
LAST = 100
"""Steps that the losses in result.json are means over."""


def main(options: TrainOptions) -> None:
    """Train, and write `out/checkpoint`."""
    resolved = resolve(options)
    if resolved.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but this machine or this PyTorch has no CUDA device")
    cpu = resolved.device == "cpu" or (resolved.device == "auto" and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if resolved.precision == "bf16" else "no")
    micro_batch_of(resolved, accelerator.num_processes)  # refused now, not after the model has been loaded
    with claimed(resolved, accelerator) as folder:
        target = _train(resolved, accelerator, cpu)
        if folder is not None:
            write_result(folder, _findings(folder.path, target), options, "Training", str(target))
            print(f"checkpoint written to {target}")
    accelerator.end_training()


@contextmanager
def claimed(config: Resolved, accelerator: Accelerator) -> Iterator[RunFolder | None]:
    """Begin the run or go on with it; the folder is open in the main process, None in the others.

    Raises:
        ValueError: the folder belongs to another command or to other options, or another run is writing to it.
    """
    check_folder(config)
    accelerator.wait_for_everyone()  # every process has looked before one writes
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield None
        return
    settings = settings_of(config)
    identity = {"study": config.COMMAND, "format": FORMAT, "options": settings}
    if (config.out / "config.json").exists() and not (config.out / "manifest.json").exists():  # of an early version
        record = {"identity": identity, "fingerprint": fingerprint(identity), "versions": versions()}
        RunFolder(config.out).write_json("manifest.json", record)
    with open_run(config.out, identity, model=config.init or "from scratch", say=to_stderr) as folder:
        folder.write_json("config.json", settings)
        accelerator.wait_for_everyone()
        yield folder


def settings_of(config: Resolved) -> dict[str, Any]:
    """What decides the result of a run, as JSON values."""
    return json.loads(json.dumps(identity_of(config)))


def _train(config: Resolved, accelerator: Accelerator, cpu: bool) -> Path:
    """Both stages; the folder of the checkpoint, which the main process has written."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model, vocabulary, base_tokenizer = build_model(
        config, GROUPED_ATTENTION if cpu else "sdpa"
    )  # sdpa's masked backward is slow on CPUs
    model.base.to(accelerator.device)
    model.prj.to(accelerator.device)
    data, held_out, n_steps = load_data(config, model)
    if config.teacher_lora:
        _give_lora(model, config, accelerator, base_stays=True)
    if config.teacher_steps:
        stage = Stage("teacher", config.teacher_steps, config.teacher_lr, config.teacher_weight_decay, (0.9, 0.95))
        run_stage(stage, TeacherLoss(model, config.direct_fraction), model, config, data, held_out, accelerator)
    reference = base_reference(config)
    base: Any = frozen_base(model, vocabulary) if reference is None else reference
    if not config.teacher_lora:
        _give_lora(model, config, accelerator, base_stays=reference is not None)
    _distil(model, config, n_steps, data, held_out, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _save(config, model, base, base_tokenizer)
    return config.out / "checkpoint"


def _give_lora(model: CodiModel, config: Resolved, accelerator: Accelerator, base_stays: bool) -> None:
    """Freeze the base and give it trainable LoRA weights; a base that stays where it is need not be held in full."""
    add_lora(model.base, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_modules)
    if base_stays and config.precision == "bf16":
        freeze_in_bfloat16(model.base)
    model.base.to(accelerator.device)


def _distil(
    model: CodiModel,
    config: Resolved,
    n_steps: int,
    data: Sequence[Problem] | None,
    held_out: Sequence[Problem],
    accelerator: Accelerator,
) -> None:
    """The second stage: LoRA and the projection learn what the teacher knows."""
    with torch.no_grad():
        rms = float(model.base.get_input_embeddings().weight.float().pow(2).mean().sqrt())
        model.prj.get_parameter("ln.weight").fill_(config.latent_scale or rms)
    decoder = StepDecoder(model, config.decoder_layers).to(accelerator.device) if config.decoder_weight else None
    loss = DistillationLoss(
        model,
        config.n_latents,
        config.kd_weight,
        config.teacher_weight,
        config.teacher_fraction,
        config.direct_weight,
        config.direct_fraction,
        config.merged,
        torch.bfloat16 if config.precision == "bf16" else torch.float32,
        step_latents=config.step_latents,
        decoder=decoder,
        decoder_weight=config.decoder_weight,
        decoder_latents=config.decoder_latents,
    )
    targets = targets_of(model, config, data, accelerator) if config.frozen_teacher and data is not None else None
    stage = Stage("distillation", n_steps, config.lr, config.weight_decay, (0.9, 0.999))
    run_stage(stage, loss, model, config, data, held_out, accelerator, targets)


def _save(config: Resolved, model: CodiModel, base: Any, base_tokenizer: Any) -> None:
    """Write the checkpoint."""
    state = reference_state(model)
    settings = {
        "lora_r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "n_latents": config.n_latents,
        "prj_dim": config.prj_dim,
        "training": settings_of(config),
    }
    if config.checkpoint == "trained":
        place = base_folder(config.init)
        rows = AutoConfig.from_pretrained(place).get_text_config().vocab_size
        held = "bfloat16" if config.precision == "bf16" else "float32"
        save_trained(
            config.out / "checkpoint", state, Base(str(base), base_hash(place), rows, held), model.protocol, settings
        )
        return
    if not isinstance(base, str):  # the base was rounded before; LoRA is rounded now, the projection stays as it is
        state = {k: v if k.startswith("prj.") else v.to(torch.bfloat16) for k, v in state.items()}
    save_checkpoint(
        config.out / "checkpoint",
        state,
        base,
        model.tokenizer,
        model.protocol,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        n_latents=config.n_latents,
        prj_dim=config.prj_dim,
        extra={"training": settings_of(config)},
        base_tokenizer=base_tokenizer,
    )


def _findings(folder: Path, target: Path) -> Findings:
    """What is said of a finished run: where the checkpoint is, and the losses at the end of each stage."""
    log = pd.read_csv(folder / "log.csv")
    last = log[log["step"] > log.groupby("stage")["step"].transform("max") - LAST]
    losses = last.groupby(["stage", "term"], sort=False)["value"].agg(["mean", "size"]).reset_index()
    losses = losses.rename(columns={"mean": "value", "size": "steps"})
    lines = [f"| {row.stage} | {row.term} | {row.value:.4f} | {row.steps} |" for row in losses.itertuples()]
    table = "\n".join(["| stage | term | value | steps |", "|---|---|---|---|", *lines])
    words = f"Terms of the loss, unweighted: means over those of the last {LAST} steps of a stage that have the term."
    return Findings([Section(f"Checkpoint: {target}"), Section(words), Section(table)], {"losses": losses})


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
