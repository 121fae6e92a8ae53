"""`codi sweep`: steer every latent pair, position and coefficient, beside random controls; one run folder.

    prompts  ->  means of latents on the derivation split  ->  directions and controls
             ->  every edit on every evaluation prompt, in parts  ->  statistics, figures, summary

This module only composes: what is tried is in grid.py, edits in steering/, decoding in codi/branches.py, files in
runs.py, statistics in stats.py. The same command goes on with an interrupted run and ends in the same table.

Runs as `codi sweep` or `python -m experiments.sweep`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from experiments.study.answers import judged
from experiments.study.folder import RunFolder, versions
from experiments.study.thoughts import collect_means, rollouts
from experiments.sweep.grid import (
    Condition,
    GridOptions,
    conditions,
    directions,
    parse_choices,
    parse_coefficients,
    parse_numbers,
    parse_pairs,
)
from experiments.sweep.trials import TRIAL_SCHEMA, read_trials
from experiments.tasks import Problem
from experiments.tasks.split import Split, digest, load_split
from lm.terms import CONTROLS, PARTS, SPACES, TIMINGS, Part, Space, Timing

if TYPE_CHECKING:
    from codi import CodiModel
    from codi.edits import EditTable
    from steering.means import ControlDraws, LatentMeans

__all__ = ["CONFIG", "Plan", "SweepConfig", "main", "make_plan", "run_part", "sweep"]

DEFAULT_MODEL = "checkpoints/tiny"
DEFAULT_TASK = "arithmetic"
DEFAULT_STEPS: tuple[int | None, int | None] = (5, 5)
"""Steps of the default task's problems…"""
DEFAULT_REACH: int | None = 100
"""… and the value that each of them reaches: chosen, before any steering was run, so that the unsteered shipped model
is right in 55 to 85 % of them."""
LEGACY_TASK = "templates"
FORMAT = 1
"""Of the run folder; part of a run's identity."""

_Several = tuple[str, ...]


@dataclass(frozen=True)
class SweepConfig:
    """Steer every latent pair, position and coefficient, beside random controls.

    Lists are separated by commas or blanks. The same command goes on with an interrupted run.
    """

    model: str = DEFAULT_MODEL
    """Checkpoint: a folder or a hub id such as bcywinski/codi_llama1b-answer_only."""
    out: Path = Path("runs/sweep")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""

    task: str | None = None
    """Evaluation prompts: arithmetic, templates, a file (prompts.json, GSM8K .jsonl, …), a folder or a hub id.
    None: arithmetic (templates with --legacy)."""
    prompts: Path | None = None
    """Evaluation prompts from this file; the same as --task FILE."""
    limit: int | None = 200
    """Number of evaluation prompts (a seeded choice); None: all."""
    min_steps: int | None = None
    """Only problems of at least this many steps. The default task, left alone, has problems of 5 steps in which some
    value is 100 or more; otherwise None is no bound."""
    max_steps: int | None = None
    """Only problems of at most this many steps."""
    reach: int | None = None
    """Only problems in which some value is at least this."""
    derivation: int = 256
    """Number of prompts that directions are derived from. They share no question and no numbers with the evaluation
    prompts (checked); of a file at most half of the clusters are taken."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one; never with --legacy."""

    space: Annotated[_Several, tyro.conf.arg(metavar="kv|embedding|hidden …")] = ("kv", "embedding")
    """What is edited: the cache slot of a latent, the vector fed at it, or the state it is projected from."""
    part: Annotated[_Several, tyro.conf.arg(metavar="keys|values|both …")] = ("both",)
    """Which part of the cache slot; kv space only."""
    timing: Annotated[_Several, tyro.conf.arg(metavar="early-exit|continue|cached …")] = ("default",)
    """When: early-exit stops thinking after the edited latent; continue edits and computes the remaining latents on the
    edited past; cached computes all latents, then edits. default: cached, and early-exit with --legacy."""
    keys: Literal["content", "raw"] = "content"
    """Frame of key directions: content (un-rotated before averaging, rotated to the edited slot) or raw (as cached, the
    published way)."""
    layers: Annotated[_Several, tyro.conf.arg(metavar="1..N|all")] = ("all",)
    """Layers to edit, 1 = first; kv space only."""
    kv_heads: Annotated[_Several, tyro.conf.arg(metavar="1..N|all")] = ("all",)
    """Key-value heads to edit, 1 = first; kv space only."""
    key_scale: float = 1.0
    """Factor on the coefficient of the keys."""
    value_scale: float = 1.0
    """Factor on the coefficient of the values."""
    pairs: Annotated[_Several, tyro.conf.arg(metavar="A-B,…|all")] = ("all",)
    """Ordered pairs of latents; the direction of A-B is mean_A - mean_B."""
    latents: Annotated[_Several, tyro.conf.arg(metavar="1..6")] = ("all",)
    """Latents that are edited (positions), 1 = first."""
    coefficients: Annotated[_Several, tyro.conf.arg(metavar="C,…")] = ("-2", "-1", "-0.5", "0.5", "1", "2")
    """Signed multiples of one mean difference. 0 is the baseline and always computed."""

    controls: Annotated[
        _Several, tyro.conf.arg(metavar="random|covariance|shuffled|patch-scalar|patch-coordinate|patch-norm|none …")
    ] = ("random",)
    """Controls beside the directions, seeded: norm-matched random, covariance-matched and shuffled directions, and
    random-latent patching in three forms (embedding and hidden space); none: only the baseline."""
    draws: int = 20
    """Draws of each control; use 200 for a publication."""
    draw_norm: Literal["pair", "pooled"] = "pair"
    """pair: every pair has draws of its own norms; pooled: the pairs share draws of their mean norms, 15 times
    fewer."""

    legacy: bool = False
    """Reproduce the published scripts: label A-B but direction mean_B - mean_A, raw keys, means over the evaluation
    prompts (KV: the addition ones), early exit, embedding edits by means of states after one extra latent, one answer
    token, questions as they are."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None: 16 for models that answer with a number, 64 for a sentence (1 with --legacy)."""

    seed: int = 0
    """Seed of prompts, split, draws and statistics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    batch_size: int | None = None
    """Most edited variants decoded at once; None: what memory allows. Halved by itself if memory runs out."""
    part_prompts: int = 16
    """Prompts in one part of the trial table: how much an interruption can cost."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published ratio."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    rope: Literal["float32", "published"] = "float32"
    """Rotary frequencies: kept in float32, or rounded as published runs in bfloat16 do."""
    plots: bool = True
    """Draw the figures at the end."""

    def __post_init__(self) -> None:
        for name in ("limit", "draws", "batch_size", "part_prompts", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        if self.task is not None and self.prompts is not None:
            raise ValueError(f"give --task or --prompts, not both: got {self.task} and {self.prompts}")
        # what can be seen to be wrong before a model is loaded
        parse_choices("space", self.space, SPACES)
        parse_choices("part", self.part, PARTS)
        timings_of(self)
        parse_choices("controls", self.controls, CONTROLS)
        parse_coefficients(self.coefficients)
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


CONFIG = SweepConfig


def timings_of(config: SweepConfig) -> tuple[Timing, ...]:
    """The timings that a configuration asks for.

    Raises:
        ValueError: an unknown timing.
    """
    if tuple(config.timing) == ("default",):
        return ("early-exit",) if config.legacy else ("cached",)
    return parse_choices("timing", config.timing, TIMINGS)


def main(config: SweepConfig) -> None:
    """Entry point: run or continue the sweep, then statistics, figures and summary, printed."""
    from codi import load_codi

    model = load_codi(
        config.model,
        base=config.base,
        protocol=config.protocol,
        device=None if config.device == "auto" else config.device,
        dtype=config.dtype,
        mask=config.mask,
        rope=config.rope,
        lora_alpha=config.lora_alpha,
    )
    say = functools.partial(tqdm.write, file=sys.stderr)  # leaves the progress bar whole
    try:
        folder = sweep(config, model, say)
    except KeyboardInterrupt:
        say(f"\ninterrupted; finished parts are in {config.out}, the same command goes on from them")
        raise
    conclude(folder, config, say)


def sweep(config: SweepConfig, model: CodiModel, say: Callable[[str], None] = lambda line: None) -> RunFolder:
    """Everything up to and including the trial table.

    Args:
        config: options.
        model: loaded; not modified (with `config.legacy` the last vocabulary id is excluded, as the scripts do).
        say: called with lines for a person.

    Returns:
        The run folder, all parts there.
    """
    from steering.interventions import edit_table

    if config.legacy:
        model = copy.copy(model)  # the caller's model stays as it is
        model.protocol = dataclasses.replace(model.protocol, excluded_logits=(model.vocab_size - 1,))
    plan = make_plan(config, model)
    folder = RunFolder(config.out)
    with folder.open(plan.identity(), {"config": _plain(config), **plan.record()}) as known:
        began = time.time()
        say(plan.announcement(known))
        missing = [job for job in plan.jobs() if not folder.has_part(job.name, TRIAL_SCHEMA, job.rows)]
        todo = sum(job.rows for job in missing)
        with tqdm(total=plan.n_trials, initial=plan.n_trials - todo, unit="trial", unit_scale=True, **_bar()) as bar:
            for space, jobs in itertools.groupby(missing, key=lambda job: job.space):
                means, draws = _stored_means(folder, plan, space, model, say)
                table = edit_table(directions(plan.options, space, means, draws), model.device)
                for job in jobs:
                    trials = run_part(
                        model,
                        job.problems,
                        table,
                        plan.conditions(space, job.part, job.timing),
                        space,
                        job.part,
                        job.timing,
                        n_latents=plan.rollout_latents(space, job.timing),
                        max_new_tokens=plan.max_new_tokens,
                        batch_size=config.batch_size,
                        advance=bar.update,
                    )
                    folder.write_part(job.name, trials, TRIAL_SCHEMA)
        sittings = folder.manifest().get("sittings", [])
        seconds = time.time() - began
        sittings.append({"started": _when(began), "seconds": round(seconds, 1), "trials": todo, **_peak_memory(model)})
        folder.add_to_manifest(sittings=sittings, finished=_when(time.time()))
        say(f"{todo:,} trials in {seconds:.0f} s" + (f", {todo / seconds:,.0f} per second" if todo else ""))
    return folder


def conclude(folder: RunFolder, config: SweepConfig, say: Callable[[str], None]) -> None:
    """Statistics, figures and the printed summary of a finished trial table."""
    from experiments.statistics.clusters import Settings
    from experiments.sweep.analysis import analyse
    from experiments.sweep.recompute import write
    from experiments.sweep.summary import summary

    analysis = analyse(read_trials(folder), Settings(seed=config.seed))
    write(analysis, folder.path)
    if config.plots:
        from experiments.sweep.draw import draw

        say("drawing the figures")
        draw(analysis, folder.path)
    print(summary(analysis, run=folder.path))


# --- The plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One part of the trial table."""

    space: Space
    part: Part
    timing: Timing
    number: int
    problems: tuple[Problem, ...]
    rows: int

    @property
    def name(self) -> str:
        """Names the part's file."""
        return f"{self.space}-{self.part}-{self.timing}-{self.number:04d}"


@dataclass(frozen=True)
class Plan:
    """A sweep with everything resolved: what decides the result, and nothing else."""

    options: GridOptions
    split: Split
    task: str
    model_name: str
    checkpoint_hash: str
    protocol: dict[str, Any]
    numerics: dict[str, str]
    max_new_tokens: int
    part_prompts: int

    def identity(self) -> dict[str, Any]:
        """What a run folder must agree with to be continued."""
        return {
            "format": FORMAT,
            "options": dataclasses.asdict(self.options),
            "task": self.task,
            "split": self.split.record(),
            "checkpoint_hash": self.checkpoint_hash,
            "protocol": self.protocol,
            "numerics": self.numerics,
            "max_new_tokens": self.max_new_tokens,
            "part_prompts": self.part_prompts,
            "seed": self.options.seed,
        }

    def record(self) -> dict[str, Any]:
        """What the manifest says beside the identity when a run begins."""
        return {
            "model": self.model_name,
            "started": _when(time.time()),
            "trials": self.n_trials,
            "versions": versions(),
            "evaluation_prompts": [problem.prompt_id for problem in self.split.evaluation],
            "derivation_prompts": [problem.prompt_id for problem in self.split.derivation],
        }

    @functools.cached_property
    def _conditions(self) -> dict[tuple[Space, Part, Timing], list[Condition]]:
        options = self.options
        return {
            (space, part, timing): conditions(options, space, part, timing)
            for space in options.spaces
            for timing in options.timings
            for part in options.parts_of(space)
        }

    def conditions(self, space: Space, part: Part, timing: Timing) -> list[Condition]:
        """What is tried on every prompt in one space, part and timing."""
        return self._conditions[space, part, timing]

    @functools.cached_property
    def counts(self) -> dict[tuple[Space, Part, Timing], Counter[str]]:
        """Conditions by control, per (space, part, timing)."""
        return {key: Counter(c.control for c in tried) for key, tried in self._conditions.items()}

    @property
    def n_trials(self) -> int:
        """Rows of the whole trial table."""
        return len(self.split.evaluation) * sum(counter.total() for counter in self.counts.values())

    def rollout_latents(self, space: Space, timing: Timing) -> int:
        """Latents of the longest thought that a space and timing need."""
        if timing != "early-exit":
            return self.options.n_latents
        return max(self.options.latents) + (1 if self.options.legacy and space == "embedding" else 0)

    def derivation(self, space: Space) -> tuple[Problem, ...]:
        """Prompts that the directions of a space are derived from: in legacy mode the evaluation prompts themselves, of
        which the KV script takes the addition ones."""
        if self.options.legacy and space == "kv":
            return tuple(problem for problem in self.split.derivation if problem.operation == "addition")
        return self.split.derivation

    def announcement(self, known: bool) -> str:
        """The number of trials and where it comes from, before they begin."""
        n, derivation = len(self.split.evaluation), len(self.split.derivation)
        clusters = len({problem.cluster for problem in self.split.evaluation})
        origin = "themselves (legacy mode)" if self.options.legacy else f"{derivation} other prompts"
        lines = [
            f"{'continuing' if known else 'starting'}: {self.model_name} on {n} prompts of {self.task} "
            f"in {clusters} clusters, directions from {origin}"
        ]
        for (space, part, timing), counter in self.counts.items():
            kinds = " + ".join(
                f"{number:,} {'baseline' if kind == 'none' else kind}" for kind, number in counter.items()
            )
            lines.append(f"  {space} {part} {timing}: {n} prompts x ({kinds}) = {n * counter.total():,} trials")
        lines.append(f"  {self.n_trials:,} trials in all")
        return "\n".join(lines)

    def jobs(self) -> Iterator[Job]:
        """The parts of the trial table, in order."""
        problems = self.split.evaluation
        for (space, part, timing), counter in self.counts.items():
            for number, start in enumerate(range(0, len(problems), self.part_prompts)):
                chunk = problems[start : start + self.part_prompts]
                yield Job(space, part, timing, number, chunk, len(chunk) * counter.total())


def make_plan(config: SweepConfig, model: CodiModel) -> Plan:
    """Resolve and check every option against the model; load and split the prompts."""
    from codi.decode import default_new_tokens

    spaces = parse_choices("space", config.space, SPACES)
    in_kv = "kv" in spaces

    def subset(name: str, words: Sequence[str], highest: int) -> tuple[int, ...] | None:
        chosen = parse_numbers(name, words, highest)
        return None if len(chosen) == highest else chosen

    options = GridOptions(
        spaces=spaces,
        parts=parse_choices("part", config.part, PARTS) if in_kv else ("both",),
        timings=timings_of(config),
        pairs=parse_pairs(config.pairs, model.n_latents),
        latents=parse_numbers("latents", config.latents, model.n_latents),
        coefficients=parse_coefficients(config.coefficients),
        controls=parse_choices("controls", config.controls, CONTROLS),
        draws=config.draws,
        draw_norm=config.draw_norm,
        keys="raw" if config.legacy else config.keys,
        layers=subset("layers", config.layers, model.n_layers),
        kv_heads=subset("kv-heads", config.kv_heads, model.n_kv_heads),
        key_scale=config.key_scale,
        value_scale=config.value_scale,
        n_latents=model.n_latents,
        seed=config.seed,
        legacy=config.legacy,
    )
    task = str(config.prompts) if config.prompts is not None else config.task
    min_steps, max_steps, reach = config.min_steps, config.max_steps, config.reach
    if task is None:
        task = LEGACY_TASK if config.legacy else DEFAULT_TASK
    if task == DEFAULT_TASK and (min_steps, max_steps, reach) == (None, None, None):
        (min_steps, max_steps), reach = DEFAULT_STEPS, DEFAULT_REACH
    split = load_split(
        task,
        limit=config.limit,
        derivation=config.derivation,
        seed=config.seed,
        min_steps=min_steps,
        max_steps=max_steps,
        reach=reach,
        suffix=model.protocol.question_suffix if config.suffix and not config.legacy else "",
        legacy=config.legacy,
    )
    if config.legacy and in_kv and not any(problem.operation == "addition" for problem in split.evaluation):
        raise ValueError(
            f"{task}: legacy directions in kv space are means over addition prompts, and there are none; "
            "use the task 'templates' or a file in the format of prompts.json"
        )
    tokens = config.max_new_tokens
    if tokens is None:
        tokens = 1 if config.legacy else default_new_tokens(model)
    return Plan(
        options=options,
        split=split,
        task=Path(task).name if Path(task).is_file() else task,
        model_name=config.model,
        checkpoint_hash=model.checkpoint_hash,
        protocol=dataclasses.asdict(model.protocol),
        numerics={
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mask": config.mask,
            "rope": config.rope,
            "lora_alpha": str(config.lora_alpha),
        },
        max_new_tokens=tokens,
        part_prompts=config.part_prompts,
    )


# --- Means ------------------------------------------------------------------------------------------------------------


def _stored_means(
    folder: RunFolder, plan: Plan, space: Space, model: CodiModel, say: Callable[[str], None]
) -> tuple[LatentMeans, ControlDraws | None]:
    """The means and draws of the run folder; computed and written there if they are missing or damaged.

    One file serves all spaces, except in legacy mode, whose scripts average over different prompts.
    """
    from steering.means import ControlDraws, LatentMeans

    options, problems = plan.options, plan.derivation(space)
    ending = f"-{space}" if options.legacy else ""
    n_draws = options.draws if {"covariance", "shuffled"} & set(options.controls) else 0
    metadata = {
        "checkpoint_hash": plan.checkpoint_hash,
        "derivation": digest(problems),
        "fingerprint": folder.fingerprint,
    }
    try:
        means = LatentMeans.load(folder.path / f"means{ending}.safetensors")
        draws = ControlDraws.load(folder.path / f"draws{ending}.safetensors") if n_draws else None
        if all(means.metadata.get(name) == value for name, value in metadata.items()):
            return means, draws
    except (FileNotFoundError, ValueError):
        pass
    say(f"averaging the latents of {len(problems)} prompts")
    means, draws = collect_means(
        model, problems, metadata=metadata, n_draws=n_draws, seed=options.seed, keys=options.keys
    )
    folder.write(f"means{ending}.csv", pd.DataFrame(means.summary()).to_csv(index=False).encode())
    if draws is not None:
        folder.write(f"draws{ending}.safetensors", draws.to_bytes())
    folder.write(f"means{ending}.safetensors", means.to_bytes())
    return means, draws


# --- One part ---------------------------------------------------------------------------------------------------------


def run_part(
    model: CodiModel,
    problems: Sequence[Problem],
    table: EditTable,
    tried: Sequence[Condition],
    space: Space,
    part: Part,
    timing: Timing,
    *,
    n_latents: int,
    max_new_tokens: int,
    batch_size: int | None = None,
    advance: Callable[[int], object] = lambda trials: None,
) -> dict[str, Any]:
    """Every condition on every problem of one part.

    Args:
        model: the model.
        problems: of the part.
        table: directions that the conditions point to.
        tried: the conditions.
        space, part, timing: of the part.
        n_latents: of the longest thought that any condition needs.
        max_new_tokens, batch_size: of the decoding.
        advance: called with the number of trials just decoded.

    Returns:
        Columns of the trial table (`sweep.trials.TRIAL_SCHEMA`), condition by condition, prompts in order.
    """
    from codi.branches import decode_branches
    from steering.interventions import branches

    by_latent: dict[int, list[Condition]] = {}
    for condition in tried:
        by_latent.setdefault(condition.edit.latent, []).append(condition)
    blocks: list[dict[str, Any]] = []
    for run, members in rollouts(model, problems, n_latents, ("embeddings", "keys", "values", "cache")):
        for group in by_latent.values():
            answers = decode_branches(
                model,
                run,
                table,
                branches([condition.edit for condition in group], run, space),
                timing=timing,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
            )
            # rows come prompt by prompt, each with all conditions of the group
            block: dict[str, Any] = {
                "first_token": answers.first_token.numpy(),
                "applied_norm": answers.applied_norm.numpy(),
                **judged(answers.texts, np.repeat([problem.answer for problem in members], len(group))),
            }
            for name in ("source", "target", "coefficient", "control", "draw", "latent", "n_latents"):
                block[name] = np.tile(np.array([getattr(condition, name) for condition in group]), len(members))
            for name in ("prompt_id", "cluster", "template", "operation", "answer"):
                block[name] = np.repeat(np.array([getattr(problem, name) for problem in members]), len(group))
            for name, value in (("space", space), ("part", part), ("timing", timing)):
                block[name] = np.full(len(answers.texts), value)
            blocks.append(block)
            advance(len(answers.texts))
    return {name: np.concatenate([block[name] for block in blocks]) for name in TRIAL_SCHEMA.names}


# --- For a person -----------------------------------------------------------------------------------------------------


def _plain(config: SweepConfig) -> dict[str, Any]:
    """The options as given, for the manifest."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()
    }


def _bar() -> dict[str, Any]:
    """Progress on stderr: rate and time left; rarely where nobody watches."""
    return {"desc": "sweep", "smoothing": 0.05, "mininterval": 0.5 if sys.stderr.isatty() else 15.0, "file": sys.stderr}


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _peak_memory(model: CodiModel) -> dict[str, float | str]:
    """Largest memory so far in GB: of the process, and of the GPU where there is one."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found: dict[str, float | str] = {"peak_memory_gb": round(peak / 1e9, 3)}
    if model.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(model.device)
        found["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(model.device) / 1e9, 3)
    return found


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
