"""From options to a plan: `resolve` is the only reader of a sweep's options, everything after it sees plain values.

What --legacy means is settled here, once: formula of the directions, frame of the keys, extra latents, timing, prompts
that are averaged over, tokens and excluded vocabulary. Impossible values are refused against the model before a folder
is made. Knows nothing about files or statistics.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.study.answers import reading_of
from experiments.study.edits.grid import Grid, conditions
from experiments.study.edits.run import EditPart
from experiments.study.folder import versions
from experiments.study.options import command_line
from experiments.sweep.options import (
    SweepOptions,
    parse_choices,
    parse_coefficients,
    parse_numbers,
    parse_pairs,
    timings_of,
)
from experiments.tasks import Problem
from experiments.tasks.split import Split, load_split
from lm.terms import CONTROLS, PARTS, SPACES, Part, Space, Timing

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["Averaged", "Plan", "averaged_problems", "resolve", "when"]

FORMAT = 1
"""Of the run folder; part of a run's identity."""

Averaged = Literal["derivation", "addition"]
"""Prompts that means are taken over: the derivation prompts, or the evaluation prompts that are additions."""


def averaged_problems(split: Split, averaged: Averaged) -> tuple[Problem, ...]:
    """The prompts that a word of `Averaged` stands for."""
    if averaged == "addition":
        return tuple(problem for problem in split.evaluation if problem.operation == "addition")
    return split.derivation


@dataclass(frozen=True)
class Plan:
    """A sweep with everything resolved: plain values.

    Attributes:
        grid: what is tried.
        split: prompts to derive from and to evaluate on.
        averaged: per space, the prompts that its directions come from.
        means_suffix: per space, what is added to the name of the files of means.
        legacy: whether the published scripts are reproduced: a word in the identity and the announcement.
        task, model_name, checkpoint_hash, protocol, numerics: what was asked, of which model, computed how.
        max_new_tokens, excluded_logits: of every answer; None: what the protocol says.
        part_prompts, batch_size: how much is computed at once.
        out, given, command: run folder, the options as they were given, and the command as it is typed.
    """

    grid: Grid
    split: Split
    averaged: Mapping[Space, Averaged]
    means_suffix: Mapping[Space, str]
    legacy: bool
    task: str
    model_name: str
    checkpoint_hash: str
    protocol: dict[str, Any]
    numerics: dict[str, str]
    max_new_tokens: int
    excluded_logits: tuple[int, ...] | None
    part_prompts: int
    batch_size: int | None
    out: Path
    given: dict[str, Any]
    command: str
    plots: bool

    def identity(self) -> dict[str, Any]:
        """What a run folder must agree with to be continued."""
        grid = dataclasses.asdict(self.grid)
        read = reading_of(self.split.evaluation).record()
        del grid["formula"], grid["extra_latents"]  # both follow from legacy
        return {
            "format": FORMAT,
            "options": {**grid, "legacy": self.legacy},
            "task": self.task,
            "split": self.split.record(),
            "checkpoint_hash": self.checkpoint_hash,
            "protocol": self.protocol,
            "numerics": self.numerics,
            "max_new_tokens": self.max_new_tokens,
            "part_prompts": self.part_prompts,
            "seed": self.grid.seed,
            **({"reading": read} if read else {}),  # named only where it is not the default: old folders go on
        }

    def record(self) -> dict[str, Any]:
        """What the manifest says beside the identity when a run begins."""
        return {
            "config": self.given,
            "model": self.model_name,
            "started": when(time.time()),
            "trials": self.n_trials,
            "versions": versions(),
            "evaluation_prompts": [problem.prompt_id for problem in self.split.evaluation],
            "derivation_prompts": [problem.prompt_id for problem in self.split.derivation],
        }

    @property
    def families(self) -> list[tuple[Space, Part, Timing]]:
        """(space, part, timing) in the order in which they are run."""
        grid = self.grid
        return [
            (space, part, timing)
            for space in grid.spaces
            for timing in grid.timings
            for part in grid.parts_of(space)
        ]  # fmt: skip

    @property
    def n_trials(self) -> int:
        """Rows of the whole trial table."""
        return len(self.split.evaluation) * sum(len(conditions(self.grid, *family)) for family in self.families)

    def announcement(self, known: bool) -> str:
        """The number of trials and where it comes from, before they begin.

        Args:
            known: whether the run folder holds this run already.
        """
        n, others = len(self.split.evaluation), f"{len(self.split.derivation)} other prompts"
        clusters = len({problem.cluster for problem in self.split.evaluation})
        if self.legacy:  # the published embedding means may be those of another task
            alone = self.split.derivation == self.split.evaluation
            others = "themselves (legacy mode)" if alone else f"themselves (kv) and {others} (embedding; legacy mode)"
        lines = [
            f"{'continuing' if known else 'starting'}: {self.model_name} on {n} prompts of {self.task} "
            f"in {clusters} clusters, directions from {others}"
        ]
        for family in self.families:
            counter = Counter(condition.control for condition in conditions(self.grid, *family))
            kinds = " + ".join(
                f"{number:,} {'baseline' if kind == 'none' else kind}" for kind, number in counter.items()
            )
            lines.append(f"  {' '.join(family)}: {n} prompts x ({kinds}) = {n * counter.total():,} trials")
        lines.append(f"  {self.n_trials:,} trials in all")
        return "\n".join(lines)

    def jobs(self) -> list[tuple[str, EditPart]]:
        """The parts of the trial table by name, in order."""
        problems, size = self.split.evaluation, self.part_prompts
        return [
            (
                f"{space}-{part}-{timing}-{number:04d}",
                EditPart(
                    self.grid, space, part, timing, problems[start : start + size], self.max_new_tokens,
                    self.batch_size, self.excluded_logits,
                ),
            )
            for space, part, timing in self.families
            for number, start in enumerate(range(0, len(problems), size))
        ]  # fmt: skip


def resolve(options: SweepOptions, model: CodiModel) -> Plan:
    """Resolve and check every option against the model; load and split the prompts.

    Raises:
        ValueError: a value that is impossible with this model or with another option, or prompts that cannot be used.
    """
    from codi.decode import default_new_tokens

    grid = _grid(options, model)
    split = _split(options, model)
    tokens, excluded = options.max_new_tokens, None
    averaged: dict[Space, Averaged] = {space: "derivation" for space in grid.spaces}
    if options.legacy:
        excluded = (model.vocab_size - 1,)
        tokens = 1 if tokens is None else tokens
        if "kv" in averaged:
            averaged["kv"] = "addition"
            if not averaged_problems(split, "addition"):
                raise ValueError(
                    f"{options.chosen_task}: legacy directions in kv space are means over addition prompts, and there "
                    "are none; use the task 'templates' or a file in the format of prompts.json"
                )
    protocol = dataclasses.asdict(model.protocol)
    task = options.chosen_task
    return Plan(
        grid=grid,
        split=split,
        averaged=averaged,
        means_suffix={space: f"-{space}" if options.legacy else "" for space in grid.spaces},
        legacy=options.legacy,
        task=Path(task).name if Path(task).is_file() else task,
        model_name=options.model,
        checkpoint_hash=model.checkpoint_hash,
        protocol=protocol if excluded is None else {**protocol, "excluded_logits": excluded},
        numerics={
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "mask": options.mask,
            "rope": options.rope,
            "lora_alpha": str(options.lora_alpha),
        },
        max_new_tokens=default_new_tokens(model) if tokens is None else tokens,
        excluded_logits=excluded,
        part_prompts=options.part_prompts,
        batch_size=options.batch_size,
        out=options.out,
        given={name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()},
        command=command_line(options),
        plots=options.plots,
    )


def _grid(options: SweepOptions, model: CodiModel) -> Grid:
    options.check_legacy()
    spaces = parse_choices("space", options.space, SPACES)

    def subset(name: str, words: Sequence[str], highest: int) -> tuple[int, ...] | None:
        chosen = parse_numbers(name, words, highest)
        return None if len(chosen) == highest else chosen

    layers = subset("layers", options.layers, model.n_layers)
    kv_heads = subset("kv-heads", options.kv_heads, model.n_kv_heads)
    if options.legacy and (layers is not None or kv_heads is not None):
        raise ValueError("legacy steering edits all layers and kv-heads")
    return Grid(
        spaces=spaces,
        parts=parse_choices("part", options.part, PARTS) if "kv" in spaces else ("both",),
        timings=timings_of(options),
        pairs=parse_pairs(options.pairs, model.n_latents),
        latents=parse_numbers("latents", options.latents, model.n_latents),
        coefficients=parse_coefficients(options.coefficients),
        controls=parse_choices("controls", options.controls, CONTROLS),
        draws=options.draws,
        draw_norm=options.draw_norm,
        keys="raw" if options.legacy else options.keys,
        layers=layers,
        kv_heads=kv_heads,
        key_scale=options.key_scale,
        value_scale=options.value_scale,
        n_latents=model.n_latents,
        seed=options.seed,
        formula="published" if options.legacy else "corrected",
        extra_latents=1 if options.legacy else 0,
    )


def _split(options: SweepOptions, model: CodiModel) -> Split:
    """With --legacy the evaluation prompts are their own derivation prompts, unless another task is named for these."""
    bounds = options.bounds
    split = load_split(
        options.chosen_task,
        limit=options.limit,
        derivation=options.derivation,
        seed=options.seed,
        suffix=model.protocol.question_suffix if options.suffix and not options.legacy else "",
        legacy=options.legacy and options.derivation_task is None,
        derivation_task=options.derivation_task,
        min_steps=bounds["min_steps"],
        max_steps=bounds["max_steps"],
        reach=bounds["reach"],
        decimal_comma=options.decimal_comma,
    )
    return split.read_by(options.reading)


def when(seconds: float) -> str:
    """A moment as it stands in the manifest: UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
