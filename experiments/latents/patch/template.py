"""What patching knows about its prompts: what the answer becomes if a step were another number.

Of any problem with known steps the chain is worked out again from that step on (experiments/tasks/consequences.py). The
template problems (X±Y)·Z + (X±Y) have more, and here only: step 1 and Z fix all their values (`has_form`), the last
step reads both others, so that a step can move the answer past the other one (`predictions`, local), and there are
prompts that differ by their operation alone (`counterpart`, `operation_donors`). means.py, values.py and interchange.py
are about latents and know none of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from experiments.tasks import Problem, templates
from experiments.tasks.consequences import answer_if

__all__ = ["counterpart", "factor_of", "has_form", "operation_donors", "predictions"]


def has_form(problem: Problem) -> bool:
    """Whether a problem is (X±Y)·Z + (X±Y): three numbers, and three known steps in which Z multiplies the first."""
    if len(problem.numbers) != 3 or len(problem.intermediates) != 3:
        return False
    first, second, last = problem.intermediates
    return second == first * problem.numbers[2] and last == first + second


def factor_of(problem: Problem) -> int:
    """Z."""
    return problem.numbers[2]


def predictions(problem: Problem, step: int, value: float) -> tuple[float, float]:
    """The answers that follow if a step were `value`: local, with the other steps before the last as they are, and
    propagated, with all that depends on it. Of (X±Y)·Z + (X±Y):

        step 1 -> t, local: t + own step 2;  step 1 -> t, propagated: t · Z + t;  step 2 -> t: own step 1 + t

    Returns:
        Both; NaN where the steps do not tell, and for a local one where the last step does not read this step.
    """
    if not has_form(problem):
        found = (answer_if(problem, step, value, carried) for carried in (False, True))
        local, propagated = (math.nan if answer is None else answer for answer in found)
        return local, propagated
    step1, step2, _ = problem.intermediates
    if step == 2:
        return float(step1 + value), float(step1 + value)
    return float(value + step2), float(value * factor_of(problem) + value)


def counterpart(problem: Problem, problems: Sequence[Problem]) -> int | None:
    """Row of the same story and numbers with the other operation, if it is there."""
    for row, other in enumerate(problems):
        if (other.cluster, other.template) == (problem.cluster, problem.template) and (
            other.operation != problem.operation
        ):
            return row
    return None


def operation_donors(problems: Sequence[Problem], task: str) -> list[Problem | None]:
    """The same story with the other operation, for each prompt: from the prompts or, of the task "templates", made."""
    made: dict[tuple[str, str, str], Problem] = {}
    if task == "templates":
        made = {(p.cluster, p.template, p.operation): p for p in templates.generate(split="all")}
    found: list[Problem | None] = []
    for problem in problems:
        row = counterpart(problem, problems)
        other = {"addition": "subtraction", "subtraction": "addition"}.get(problem.operation, "")
        generated = made.get((problem.cluster, problem.template, other))
        if generated is not None and generated.question in problem.question:
            generated = None
        if row is None and generated is not None:  # with the ending that the questions have
            ending = problem.question[len(made[problem.cluster, problem.template, problem.operation].question) :]
            generated = dataclasses.replace(generated, question=generated.question + ending)
        found.append(problems[row] if row is not None else generated)
    return found
