"""What patching knows about its prompts: they ask for (X±Y)·Z + (X±Y), in a scene, with an operation.

Everything here holds for these template problems only: which two numbers fix all intermediate values (`key_of`), what
the answer becomes if one step were another number (`predictions`), and which prompt differs by its operation alone
(`counterpart`, `operation_donors`). means.py, values.py and interchange.py are about latents and know none of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.tasks import STEPS_HELP, Problem, templates
from experiments.tasks.split import Split

__all__ = ["Key", "check_form", "counterpart", "factor_of", "has_form", "key_of", "operation_donors", "predictions"]

Key = tuple[float, int]


def check_form(prompts: Split) -> None:
    """Refuse prompts of another form.

    Raises:
        ValueError: the first that is not (X±Y)·Z + (X±Y).
    """
    for problem in (*prompts.evaluation, *prompts.derivation):
        if not has_form(problem):
            steps = ", ".join(problem.steps) or "none that are known"
            raise ValueError(
                f"patching needs prompts of the form (X±Y)·Z + (X±Y), as in the task 'templates' or prompts.json; "
                f"{problem.prompt_id!r} has the numbers {', '.join(map(str, problem.numbers)) or '(none)'} and the "
                f"steps {steps}. With prompts of this form {STEPS_HELP}"
            )


def has_form(problem: Problem) -> bool:
    """Whether a problem is (X±Y)·Z + (X±Y): three numbers, and three known steps in which Z multiplies the first."""
    if len(problem.numbers) != 3 or len(problem.intermediates) != 3:
        return False
    first, second, last = problem.intermediates
    return second == first * problem.numbers[2] and last == first + second


def factor_of(problem: Problem) -> int:
    """Z."""
    return problem.numbers[2]


def key_of(problem: Problem) -> Key:
    """(step 1, Z): with these every intermediate value is known."""
    return problem.intermediates[0], factor_of(problem)


def predictions(problem: Problem, step: int, value: float) -> tuple[float, float]:
    """The answers that follow if a step were `value`: local, with the other step as it is, and propagated, with all
    that depends on it.

        step 1 -> t, local: t + own step 2;  step 1 -> t, propagated: t · Z + t;  step 2 -> t: own step 1 + t
    """
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
