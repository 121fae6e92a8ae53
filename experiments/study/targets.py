"""What is known about problems, as targets of probes: operation, operands, steps, answer; and what recurs in them.

Folds. A probe must not score by recognising what it was trained on. Step 1 is a function of the first two numbers
(X, Y), which recur in other number triples: it and the operands are held out by (X, Y). Everything else is held out by
cluster, that is by all numbers.

Control tasks (see experiments/statistics/control_tasks.py), types that get a random label once and for all: (X, Y) for
step 1, the number itself for an operand, the cluster for later steps and the answer, wording with operation for the
operation. A probe that reads an operand no better than its control task reads which number stands there, and nothing
that makes it a quantity.

Knows nothing about models or features. Used by every study that probes latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.statistics.control_tasks import joined, type_codes
from experiments.statistics.probes import Design, Target
from experiments.tasks import Problem

__all__ = ["design_of", "independent_groups", "targets_of"]


def targets_of(problems: Sequence[Problem]) -> list[Target]:
    """Everything known about the problems that varies: operation, operands (if all have as many), steps, answer.

    A step is a target if every problem has it and it is not the last one of any problem (that one is the answer).

    Raises:
        ValueError: no problem at all.
    """
    if not problems:
        raise ValueError("probes need at least one problem, got none")
    columns: dict[str, list[Any]] = {"operation": [problem.operation for problem in problems]}
    widths = {len(problem.numbers) for problem in problems}
    if len(widths) == 1:
        for i in range(widths.pop()):
            columns[f"operand{i + 1}"] = [problem.numbers[i] for problem in problems]
    for i in range(min(len(problem.intermediates) for problem in problems) - 1):
        columns[f"step{i + 1}"] = [problem.intermediates[i] for problem in problems]
    columns["answer"] = [problem.answer for problem in problems]
    return [Target.of(name, values) for name, values in columns.items() if len(set(values)) > 1]


def _pairs(problems: Sequence[Problem]) -> np.ndarray:
    """(prompt,) code of the first two numbers; of the prompt where they are not known."""
    return type_codes([str(tuple(problem.numbers[:2]) or problem.prompt_id) for problem in problems])


def independent_groups(problems: Sequence[Problem]) -> int:
    """How many groups of prompts share neither (X, Y) nor a cluster: the most folds that `design_of` can make."""
    return len(np.unique(joined(_pairs(problems), [problem.cluster or problem.prompt_id for problem in problems])))


def design_of(
    problems: Sequence[Problem],
    folds: int,
    shuffles: int,
    seed: int,
    *,
    draws: int = 0,
    targets: Sequence[Target] | None = None,
) -> Design:
    """Folds, shuffles and control tasks of probes on these problems, by the rules at the top of this file.

    Args:
        problems: at least as many groups (`independent_groups`) as folds.
        folds, shuffles, seed, draws: see `experiments.statistics.probes.Design.of`.
        targets: some of `targets_of(problems)`; None: all.

    Raises:
        ValueError: as `Design.of`.
    """
    clusters = [problem.cluster or problem.prompt_id for problem in problems]
    chosen = targets_of(problems) if targets is None else targets
    pairs = _pairs(problems)
    whole: dict[str, np.ndarray] = {}
    types: dict[str, np.ndarray] = {}
    for target in chosen:
        if target.name == "step1" or target.name.startswith("operand"):
            whole[target.name] = pairs
        if target.name == "step1":
            types[target.name] = pairs
        elif target.name.startswith("operand"):
            types[target.name] = type_codes(target.labels)
        elif target.name == "operation":
            types[target.name] = type_codes(
                [problem.template for problem in problems], [problem.operation for problem in problems]
            )
        else:
            types[target.name] = type_codes(clusters)
    return Design.of(chosen, clusters, folds, shuffles, seed, whole=whole, types=types, draws=draws)
