"""`codi eval`: how often a model is right, by number of latents and by mode of answering, with intervals.

The prompt and the longest thought are computed once per problem; an answer after k latents starts from that run cut
after latent k. Intervals are 95 % bootstrap intervals over clusters (problems that share their numbers are not
independent). Text without a number is wrong and counted apart.

Runs as `codi eval` or `python -m experiments.evaluate`. Knows nothing about steering.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experiments.study.modes import evaluate
from experiments.tasks import load_task, with_suffix
from lm.terms import AnswerMode

if TYPE_CHECKING:
    import pandas as pd

    from codi import CodiModel

__all__ = ["Config", "accuracy_table", "evaluate", "main", "markdown"]


@dataclass(frozen=True)
class Config:
    """Accuracy by number of latents and by mode of answering, with intervals."""

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id such as bcywinski/codi_llama1b-answer_only."""
    task: str = "arithmetic"
    """What is asked: arithmetic, templates, a file (prompts.json, GSM8K .jsonl, GSM8K-Aug .txt, SVAMP or MultiArith
    .json, .parquet), a folder in the layout of a hub data set, or a hub id such as openai/gsm8k."""
    split: str = "test"
    """Split of the task: train, derivation or test of a generated task; that of a folder or hub data set (published:
    the one that the published evaluation reads). Not used for a single file."""
    limit: int | None = None
    """Number of problems, a seeded random choice of a data set; None: all (1,000 of arithmetic)."""
    min_steps: int | None = None
    """Only problems of at least this many steps; None: no bound."""
    max_steps: int | None = None
    """Only problems of at most this many steps; None: no bound."""
    reach: int | None = None
    """Only problems in which some value is at least this."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions (question_suffix of its protocol), if any."""
    modes: tuple[AnswerMode, ...] = ("latent", "direct", "verbal")
    """Ways of answering: after latents, directly (no thought), or after a written chain of thought."""
    latents: tuple[int, ...] | None = None
    """Numbers of latents for mode latent, 0 or more; None: 0 to the number the model was trained with."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None: 16 (64 for a sentence), and 256 with a written chain."""
    temperature: float = 0.0
    """0: greedy answers; above 0: sampled at this temperature. Every condition uses the same random numbers."""
    batch_size: int = 128
    """Problems computed at once; halved by itself if memory runs out."""
    seed: int = 0
    """Seed of the problems, of sampled answers and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    out: Path | None = None
    """Write the table to this file: .json (with options and versions) or .csv."""
    answers: Path | None = None
    """Write every answer to this .csv file."""

    def __post_init__(self) -> None:
        if not self.modes:
            raise ValueError("modes must name at least one of latent, direct, verbal")
        if self.latents is not None and (not self.latents or min(self.latents) < 0):
            raise ValueError(f"latents must be 0 or more, got {' '.join(map(str, self.latents)) or 'none'}")
        if self.batch_size < 1:
            raise ValueError(f"batch-size must be at least 1, got {self.batch_size}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.out is not None and self.out.suffix not in (".json", ".csv"):
            raise ValueError(f"out must end in .json or .csv, got {self.out}")
        if self.answers is not None and self.answers.suffix != ".csv":
            raise ValueError(f"answers must end in .csv, got {self.answers}")


def accuracy_table(answers: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Accuracy of every condition, over all problems and by number of steps.

    Args:
        answers: from `evaluate`.
        seed: of the bootstrap.

    Returns:
        One row per mode x n_latents x n_steps (-1: all problems), with accuracy, lower, upper (95 %, clustered
        bootstrap; fractions), n, n_clusters and unparsed (answers without a number; they count as wrong). Where all are
        right or all wrong a bootstrap has no width: there the interval is Clopper-Pearson over clusters.
    """
    import pandas as pd
    from statsmodels.stats.proportion import proportion_confint

    from experiments.statistics.clusters import accuracy_interval

    rows = []
    for mode, count in _conditions(answers):
        condition = answers[(answers["mode"] == mode) & (answers["n_latents"] == count)]
        found = sorted(condition["n_steps"].unique())
        for steps in [-1, *(found if len(found) > 1 else [])]:
            group = condition if steps == -1 else condition[condition["n_steps"] == steps]
            estimate = accuracy_interval(group["correct"].to_numpy(), group["cluster"].to_numpy(), seed=seed)
            lower, upper = estimate.lower, estimate.upper
            if estimate.estimate in (0.0, 1.0):
                right = int(estimate.estimate) * estimate.n_clusters
                lower, upper = map(float, proportion_confint(right, estimate.n_clusters, method="beta"))
            rows.append(
                {
                    "mode": mode,
                    "n_latents": count,
                    "n_steps": steps,
                    "accuracy": estimate.estimate,
                    "lower": lower,
                    "upper": upper,
                    "n": estimate.n,
                    "n_clusters": estimate.n_clusters,
                    "unparsed": int((~group["parsed"]).sum()),
                }
            )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The accuracy table as a markdown table: one line per condition, one column per number of steps."""
    steps = sorted(table["n_steps"].astype(int).unique().tolist())
    sizes = dict(zip(table["n_steps"], table["n"], strict=True))
    names = {-1: "all", 0: "steps unknown", 1: "1 step"}
    heads = [f"{names.get(k, f'{k} steps')} (n={sizes[k]})" for k in steps]
    lines = [
        "| mode | latents | " + " | ".join(heads) + " | no number |",
        "|---|---|" + "---|" * len(heads) + "---|",
    ]
    for mode, count in _conditions(table):
        rows = table[(table["mode"] == mode) & (table["n_latents"] == count)].to_dict(orient="records")
        cells = {row["n_steps"]: row for row in rows}
        values = [f"{cells[k]['accuracy']:.3f} [{cells[k]['lower']:.3f}, {cells[k]['upper']:.3f}]" for k in steps]
        shown = "–" if count < 0 else str(count)
        lines.append(f"| {mode} | {shown} | " + " | ".join(values) + f" | {cells[-1]['unparsed']} |")
    return "\n".join(lines)


def _conditions(table: pd.DataFrame) -> list[tuple[str, int]]:
    """(mode, n_latents) in the order in which they come."""
    return list(dict.fromkeys(zip(table["mode"], table["n_latents"].astype(int), strict=True)))


def main(config: Config) -> None:
    """Load, answer, print the table, write what was asked for."""
    for path in (config.out, config.answers):  # before the work, not after it
        if path is not None:
            _check_writable(path)
    bounds = config.min_steps, config.max_steps, config.reach
    problems = load_task(config.task, config.split, config.limit, config.seed, "", *bounds)
    from tqdm import tqdm

    from codi import load_codi

    model = load_codi(
        config.model,
        base=config.base,
        protocol=config.protocol,
        device=None if config.device == "auto" else config.device,
        dtype=config.dtype,
        mask=config.mask,
    )
    if config.suffix:
        problems = with_suffix(problems, model.protocol.question_suffix)
    n_conditions = sum(
        (model.n_latents + 1 if config.latents is None else len(set(config.latents))) if mode == "latent" else 1
        for mode in set(config.modes)
    )
    with tqdm(total=n_conditions * len(problems), unit="answer", desc="answering", smoothing=0.1) as bar:
        answers = evaluate(
            model,
            problems,
            modes=config.modes,
            latents=config.latents,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
            batch_size=config.batch_size,
            advance=bar.update,
        )
    table = accuracy_table(answers, config.seed)
    clusters = answers["cluster"].nunique()
    print(f"{model.name}: {config.task}, split {config.split}, {len(problems)} problems in {clusters} clusters")
    print("Fraction right [95 % bootstrap interval over clusters]; answers without a number are wrong.\n")
    print(markdown(table))
    if config.out is not None:
        _write(config.out, table.to_csv(index=False) if config.out.suffix == ".csv" else _report(config, model, table))
    if config.answers is not None:
        _write(config.answers, answers.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC))  # texts may hold line ends


def _report(config: Config, model: CodiModel, table: pd.DataFrame) -> str:
    from importlib.metadata import version

    options = dataclasses.asdict(config)
    content = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": str(model.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "accuracy": table.to_dict(orient="records"),
    }
    return json.dumps(content, indent=2) + "\n"


def _check_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a temporary name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
