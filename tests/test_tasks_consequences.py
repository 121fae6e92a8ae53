"""The answer if one step were another number: worked out by the generators' own rules, and refused in doubt."""

from __future__ import annotations

import pytest

from experiments.latents.patch.template import has_form, predictions
from experiments.tasks import Problem, arithmetic, load_task, templates
from experiments.tasks.consequences import answer_if, uses_of
from experiments.tasks.polynomial import Polynomial, generate, parse


def of_file(*steps: str, numbers: tuple[int, ...] = ()) -> Problem:
    """A problem whose steps are known as a text only."""
    values = tuple(int(step.split("=")[1]) for step in steps)
    return Problem("p", "?", values[-1], steps=steps, numbers=numbers, intermediates=values)


def test_a_polynomial_goes_on_from_the_new_state() -> None:
    for name in ("polynomial", "polynomial:m=97,b=3"):
        kind = parse(name)
        assert isinstance(kind, Polynomial)
        for problem in generate(20, 1, kind=kind):
            for step in range(1, len(problem.steps)):
                for value in (0, 7, kind.m - 1):
                    state = value
                    for x in problem.numbers[step + 1 :]:
                        state = kind.hop(state, x)
                    assert answer_if(problem, step, value) == state
                    last = answer_if(problem, step, value, carried=False)
                    assert last == (state if step == len(problem.steps) - 1 else None)


def test_templates_are_what_their_own_formula_says() -> None:
    for problem in templates.generate(40):
        assert has_form(problem)
        for step in (1, 2):
            for value in (3, 11):
                for carried in (False, True):
                    assert answer_if(problem, step, value, carried) == predictions(problem, step, value)[carried]


def test_stories_with_equal_numbers_are_told_apart_by_what_the_generator_knows() -> None:
    """ "bring" adds a product to the value before it: with one other each, both are the same number."""
    problem = next(
        p for seed in range(50) for p in arithmetic.generate(100, seed, min_steps=3, max_steps=3)
        if p.operation == "add+bring" and p.numbers[2] == 1
    )  # fmt: skip
    value, same, total = problem.intermediates
    assert same == value and total == 2 * value
    assert answer_if(problem, 1, 50) == 100 and answer_if(problem, 2, 50) == value + 50
    assert answer_if(problem, 1, 50, carried=False) == 50 + same
    for problem in load_task("arithmetic", limit=60, min_steps=2):
        for step in range(1, len(problem.steps)):
            assert answer_if(problem, step, problem.intermediates[step - 1]) == problem.answer


def test_a_file_says_it_by_its_figures() -> None:
    problem = of_file("7+5=12", "12*3=36", "36-4=32", numbers=(7, 5, 3, 4))
    assert uses_of(problem) == ((0, 0), (1, 0), (2, 0))
    assert answer_if(problem, 1, 10) == 26 and answer_if(problem, 2, 10) == 6
    assert answer_if(problem, 2, 10, carried=False) == 6 and answer_if(problem, 1, 10, carried=False) is None
    assert answer_if(of_file("6/4=2", "2+1=3"), 1, 5) is None  # the step is wrong
    assert answer_if(of_file("8/2=4", "12/4=3", numbers=(8, 2, 12)), 1, 0) is None  # no such division


@pytest.mark.parametrize(
    "problem",
    [
        of_file("7+5=12", "12*12=144", numbers=(7, 5, 12)),  # a result, or the number of the question?
        of_file("7+5=12", "6*2=12", "12+1=13", numbers=(7, 5, 6, 2, 1)),  # of which step?
        of_file("3-7=-4", "-4*2=-8", numbers=(3, 7, 2)),  # the result −4, or 4 taken away?
        Problem("p", "?", 12, intermediates=(4, 12)),
        Problem("p", "?", 13, steps=("2+2=4", "4*3=12"), intermediates=(4, 12)),  # another answer than the last step
    ],
)
def test_nothing_is_said_in_doubt(problem: Problem) -> None:
    assert uses_of(problem) is None and answer_if(problem, 1, 5) is None


def test_only_steps_before_the_last() -> None:
    for step in (0, 2):
        with pytest.raises(ValueError, match=f"the step must be in 1..1, one before the last, got {step}"):
            answer_if(of_file("7+5=12", "12*3=36"), step, 1)
