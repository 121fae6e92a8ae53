"""`codi tune`: train a LoRA adapter on the reasoner's samples, plain next-token loss on their completions.

    make smollm2 && codi tune --out runs/tune --adapter checkpoints/smollm2-reasoner     # the shipped adapter

The samples are a pure function of seed and step, so an interrupted run goes on where it was: the same command
continues. The run folder holds log.csv (the loss of every step), accuracy.csv (held-out samples now and then),
state.pt, and at the end `adapter/` unless another folder was given; `load_lm` reads it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from experiments.study.folder import RunFolder, open_run
from experiments.study.options import identity_of
from experiments.study.result import Section
from experiments.study.run import Findings, to_stderr, write_result
from experiments.study.steps import StepLog, load_state, save_state
from experiments.tasks.reasoner import TASKS, Mode, Sample, answer_of, generate
from experiments.tune.batches import batches, completion_loss, learning_rate, samples_of_step
from experiments.tune.options import TuneOptions
from lm.adapters import add_adapter, save_adapter
from lm.generate import generate as write
from lm.load import load_lm
from lm.model import LanguageModel
from lm.terms import Dtype

__all__ = ["main", "run"]

FORMAT = 1
"""Of the run folder; part of a run's identity."""
LAST = 50
"""Steps that the loss in result.json is a mean over."""
STAGE = "tune"
MODES: tuple[Mode, ...] = get_args(Mode)
NEW_TOKENS = 72


def main(options: TuneOptions) -> None:
    """Train, and write the adapter."""
    run(options)
    print(f"adapter written to {options.target}")


def run(options: TuneOptions) -> None:
    """See `main`.

    Raises:
        ValueError: the folder holds another run, or the base model cannot be loaded.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    to_stderr(f"loading {options.model}")
    device = None if options.device == "auto" else options.device
    dtype: Dtype = "bfloat16" if options.precision == "bf16" else "float32"
    # On CPUs eager attention is trained about three times faster than sdpa.
    model = load_lm(options.model, device=device, dtype=dtype, attention="eager", form="response")
    identity = {
        "study": options.COMMAND, "format": FORMAT, "options": identity_of(options), "base_hash": model.weights_hash,
    }  # fmt: skip
    with open_run(options.out, identity, model=options.model, say=to_stderr) as folder:
        torch.manual_seed(options.seed)
        adapted = add_adapter(model.base, options.lora_r, options.lora_alpha)
        train(model, adapted, options)
        save_adapter(adapted, options.target, base=options.model, base_hash=model.weights_hash, form=model.form)
        write_result(folder, _findings(folder, options.target), options, "Adapter", model.name)


def train(model: LanguageModel, adapted: nn.Module, options: TuneOptions) -> None:
    """Optimise the adapter, from the last state file on."""
    weights = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=options.lr, weight_decay=options.weight_decay)
    state = options.out / "state.pt"
    first = load_state(state, weights, optimizer)
    if first >= options.steps:
        return
    log = StepLog(options.out / "log.csv", STAGE, first)
    progress = tqdm(
        range(first, options.steps), initial=first, total=options.steps, desc=STAGE, unit="step", mininterval=5
    )
    for step in progress:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate(step, options.steps)
        loss = _gradients(model, samples_of_step(options, step), options)
        norm = float(nn.utils.clip_grad_norm_(list(weights.values()), options.clip))
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        log.write(STAGE, step + 1, {"loss": loss}, norm, seconds)
        progress.set_postfix({"loss": f"{loss:.3f}", "samples/s": f"{options.batch_size / seconds:.1f}"}, refresh=False)
        last = step + 1 == options.steps
        if last or (step + 1) % options.save_every == 0:
            save_state(state, step + 1, weights, optimizer)
        if options.eval_every and (last or (step + 1) % options.eval_every == 0):
            table = held_out(model, options.eval_samples)
            _add_rows(options.out / "accuracy.csv", step + 1, table)
            progress.write(f"step {step + 1}: {_in_words(table)}")


def _gradients(model: LanguageModel, samples: Sequence[Sample], options: TuneOptions) -> float:
    """Add up the gradients of one step; the mean loss per token of the completions."""
    parts = list(batches(model.tokenizer, samples, options.micro_batch))
    n_targets = sum(len(part.targets) for part in parts)
    total = 0.0
    for part in parts:
        with _autocast(model, options):
            loss = completion_loss(model.base, part.to(model.device)) / n_targets
        loss.backward()
        total += float(loss.detach())
    return total


def _autocast(model: LanguageModel, options: TuneOptions) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bf16")


def held_out(model: LanguageModel, n: int) -> pd.DataFrame:
    """Accuracy on n held-out samples of each task and way of asking, greedy; `at_once`: share of bare answers."""
    rows = []
    for mode in MODES:
        for task in TASKS:
            samples = generate(n, "held-out", "test", task, mode)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                texts = write(model, [sample.prompt for sample in samples], NEW_TOKENS).texts
            pairs = list(zip(texts, samples, strict=True))
            right = sum(answer_of(text) == sample.answer for text, sample in pairs)
            short = sum(len(text.split()) == 1 for text in texts)
            rows.append({"mode": mode, "task": task, "accuracy": right / n, "at_once": short / n, "n": n})
    return pd.DataFrame(rows)


def _in_words(table: pd.DataFrame) -> str:
    words = []
    for mode, part in table.groupby("mode", sort=False):
        cells = ", ".join(f"{row.task} {row.accuracy:.2f}" for row in part.itertuples())
        words.append(f"{mode}: {cells} (at once {part['at_once'].mean():.2f})")
    return "; ".join(words)


def _add_rows(path: Path, step: int, table: pd.DataFrame) -> None:
    """Rows of a step, in the place of those that the file has of it or of later ones."""
    old = pd.read_csv(path) if path.exists() else pd.DataFrame()
    kept = old[old["step"] < step] if len(old) else old
    pd.concat([kept, table.assign(step=step)]).to_csv(path, index=False)


def _findings(folder: RunFolder, target: Path) -> Findings:
    """Where the adapter is, and the loss at the end."""
    log = pd.read_csv(folder.path / "log.csv")
    last = log[log["step"] > log["step"].max() - LAST]["value"]
    words = f"Loss per token of the completions, mean over the last {len(last)} steps: {last.mean():.4f} nats."
    tables: Mapping[str, Any] = {"losses": pd.DataFrame([{"loss": last.mean(), "steps": len(last)}])}
    return Findings([Section(f"Adapter: {target}"), Section(words)], tables)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
