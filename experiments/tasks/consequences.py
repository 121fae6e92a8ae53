"""What the answer becomes if one step of a chain were another number: the chain is worked out again from there.

Which figures of a step are results of earlier steps is known for generated problems (`Problem.uses`). Of a file only
the text of the steps is known: a figure that equals an earlier result is that result, unless it could as well be
something else (a number of the question, or one of two results); then nothing is said about the problem.

Knows nothing about models. Arithmetic is exact (experiments/tasks/chains.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from fractions import Fraction

from experiments.tasks.chains import FIGURE, value_of
from experiments.tasks.problem import Problem, Uses

__all__ = ["answer_if", "uses_of"]


@functools.lru_cache(maxsize=4096)
def uses_of(problem: Problem) -> Uses | None:
    """For each step, for each figure of its left side, which earlier step's result it is (0: none).

    Returns:
        As `Problem.uses`; None where the steps are not known, do not work out to their values, do not end in the
        answer, or use figures that could be several things.
    """
    steps, values = problem.steps, problem.intermediates
    if not steps or len(steps) != len(values) or values[-1] != problem.answer:
        return None
    if any(value_of(_left(step)) != Fraction(str(value)) for step, value in zip(steps, values, strict=True)):
        return None
    if problem.uses:
        return problem.uses
    given = {Fraction(str(number)) for number in problem.numbers}
    results = [Fraction(str(value)) for value in values]
    if min(results[:-1], default=Fraction(0)) < 0:  # is "-3" the result -3, or is 3 taken away?
        return None
    found = []
    for place, step in enumerate(steps):
        mine = []
        for figure in _figures(step):
            sources = [number for number, value in enumerate(results[:place], 1) if value == figure]
            if sources and (len(sources) > 1 or figure in given):
                return None
            mine.append(sources[0] if sources else 0)
        found.append(tuple(mine))
    return tuple(found)


def answer_if(problem: Problem, step: int, value: float, carried: bool = True) -> float | None:
    """The answer that follows if a step were another number.

    Args:
        problem: with known steps.
        step: 1-based, before the last.
        value: its new value.
        carried: through every later step that depends on it; else the last step alone sees it, all others stay.

    Returns:
        The answer; None where it is not known how the steps hang together (`uses_of`), where it cannot be computed
        (division by zero), or where it would not depend on the step at all.

    Raises:
        ValueError: step outside 1..(number of steps − 1).
    """
    n = len(problem.intermediates)
    if not 1 <= step < n:
        raise ValueError(f"the step must be in 1..{n - 1}, one before the last, got {step}")
    uses = uses_of(problem)
    if uses is None:
        return None
    results = {step: Fraction(str(value))}
    for number in range(step + 1, n + 1):
        reads = [source for source in uses[number - 1] if source in results]
        if not reads or (not carried and number < n):
            continue
        again = value_of(_rewritten(problem, uses, number, results))
        if again is None:
            return None
        results[number] = again
    return float(results[n]) if n in results else None


def _left(step: str) -> str:
    return step.rsplit("=", 1)[0]


def _figures(step: str) -> list[Fraction]:
    return [Fraction(figure.replace(",", "")) for figure in re.findall(FIGURE, _left(step))]


def _rewritten(problem: Problem, uses: Uses, number: int, results: Mapping[int, Fraction]) -> str:
    """The left side of a step with new results in place of those that it uses."""
    sources = iter(uses[number - 1])

    def new(figure: re.Match[str]) -> str:
        source = next(sources)
        return f"({results[source]})" if source in results else figure[0]

    return re.sub(FIGURE, new, _left(problem.steps[number - 1]))
