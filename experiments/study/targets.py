"""What is known about problems, as targets of probes: operation, operands, steps, answer.

Knows nothing about models or features. Used by every study that probes latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.statistics.probes import Target
from experiments.tasks import Problem

__all__ = ["targets_of"]


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
