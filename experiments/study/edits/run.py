"""One part of a grid of edits: every condition of one space, part and timing on some prompts, answered and judged.

The part says what is asked and tried, in plain values; the table holds the directions that its conditions point to.
Knows nothing about where directions come from, nor about files.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.study.answers import judged, reading_of
from experiments.study.edits.grid import Condition, Grid, conditions
from experiments.study.edits.trials import TRIAL_SCHEMA
from experiments.study.thoughts import rollouts
from experiments.tasks import Problem
from lm.terms import Part, Space, Timing

if TYPE_CHECKING:
    from codi import CodiModel
    from codi.edits import EditTable

__all__ = ["EditPart", "run_part"]


@dataclass(frozen=True)
class EditPart:
    """One part of a trial table, as data.

    Attributes:
        grid: what is tried.
        space, part, timing: of this part.
        problems: prompts of this part.
        max_new_tokens: longest answer.
        batch_size: most edited variants decoded at once; None: what memory allows.
        excluded_logits: vocabulary ids that are never an answer token; None: what the model's protocol says.
    """

    grid: Grid
    space: Space
    part: Part
    timing: Timing
    problems: tuple[Problem, ...]
    max_new_tokens: int
    batch_size: int | None = None
    excluded_logits: tuple[int, ...] | None = None

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What is tried on every prompt."""
        return conditions(self.grid, self.space, self.part, self.timing)

    @property
    def rows(self) -> int:
        """Trials of the part."""
        return len(self.problems) * len(self.conditions)

    @property
    def n_latents(self) -> int:
        """Latents of the longest thought that a condition needs."""
        return self.grid.longest(self.space, self.timing)


def run_part(
    model: CodiModel, table: EditTable, job: EditPart, advance: Callable[[int], object] = lambda trials: None
) -> dict[str, Any]:
    """Every condition on every problem of one part.

    Args:
        model: the model; not modified.
        table: directions that the conditions point to: `edit_table` of `directions(job.grid, job.space, …)`.
        job: the part.
        advance: called with the number of trials just decoded.

    Returns:
        Columns of the trial table (`TRIAL_SCHEMA`), condition by condition, prompts in order.
    """
    from codi.branches import decode_branches
    from steering.interventions import branches

    if job.excluded_logits is not None:
        model = copy.copy(model)  # the caller's model stays as it is
        model.protocol = dataclasses.replace(model.protocol, excluded_logits=job.excluded_logits)
    by_latent: dict[int, list[Condition]] = {}
    for condition in job.conditions:
        by_latent.setdefault(condition.edit.latent, []).append(condition)
    blocks: list[dict[str, Any]] = []
    for run, members in rollouts(model, job.problems, job.n_latents, ("embeddings", "keys", "values", "cache")):
        for group in by_latent.values():
            answers = decode_branches(
                model,
                run,
                table,
                branches([condition.edit for condition in group], run, job.space),
                timing=job.timing,
                max_new_tokens=job.max_new_tokens,
                batch_size=job.batch_size,
            )
            # rows come prompt by prompt, each with all conditions of the group
            block: dict[str, Any] = {
                "first_token": answers.first_token.numpy(),
                "applied_norm": answers.applied_norm.numpy(),
                **judged(answers.texts, np.repeat([p.answer for p in members], len(group)), reading_of(members)),
            }
            for name in ("source", "target", "coefficient", "control", "draw", "latent", "n_latents"):
                block[name] = np.tile(np.array([getattr(condition, name) for condition in group]), len(members))
            for name in ("prompt_id", "cluster", "template", "operation", "answer"):
                block[name] = np.repeat(np.array([getattr(problem, name) for problem in members]), len(group))
            for name, value in (("space", job.space), ("part", job.part), ("timing", job.timing)):
                block[name] = np.full(len(answers.texts), value)
            blocks.append(block)
            advance(len(answers.texts))
    return {name: np.concatenate([block[name] for block in blocks]) for name in TRIAL_SCHEMA.names}
