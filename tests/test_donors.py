"""experiments.latents.donors: which prompts have the same value, in templates and in prompts of one's own."""

from __future__ import annotations

import pytest

from experiments.latents.donors import another_wording, by_key, check_known, key_of, other_keys, unlike
from experiments.latents.options import TransferOptions
from experiments.latents.patch.template import has_form
from experiments.tasks import Problem, load_task, polynomial, templates
from experiments.tasks.split import Split


def own(name: str, question: str, *values: int, numbers: tuple[int, ...] = ()) -> Problem:
    """A prompt of a file: steps are known, template and operation are not."""
    steps = tuple(f"?={value}" for value in values)
    return Problem(name, question, values[-1] if values else 1, steps=steps, numbers=numbers, intermediates=values)


def test_templates_are_known_by_step_1_and_z() -> None:
    problems = templates.generate(split="all")[:40]
    for problem in problems:
        assert has_form(problem) and key_of(problem) == (problem.intermediates[0], problem.numbers[2])
        for key in other_keys(sorted(by_key(problems)), problem):
            assert key[0] != problem.intermediates[0] and key[1] != problem.numbers[2]


def test_other_problems_are_known_by_all_their_values() -> None:
    """Three numbers alone are not the form: in 3 + 4 = 7, 7 - 5 = 2 the third one multiplies nothing."""
    first, twin = own("a", "x?", 7, 2, numbers=(3, 4, 5)), own("b", "y?", 7, 2, numbers=(5, 2, 5))
    other, near = own("c", "x?", 9, 3, numbers=(4, 5, 6)), own("d", "z?", 7, 3, numbers=(3, 4, 4))
    longer = own("e", "w?", 9, 8, 5)
    assert not has_form(first) and key_of(first) == key_of(twin) == (7, 2)
    pools = by_key([first, twin, other, near, longer])
    assert pools[7, 2] == [0, 1]
    assert other_keys(sorted(pools), first) == [(9, 3), (9, 8, 5)]  # (7, 3) shares its first step
    assert another_wording(first, twin) and not another_wording(first, other)  # told by the questions
    chains = load_task("arithmetic", limit=30, min_steps=3, max_steps=3)
    assert all(key_of(problem) == problem.intermediates for problem in chains if not has_form(problem))
    assert not all(map(has_form, chains))


def test_refusals_say_how_steps_are_given() -> None:
    known, unknown = own("a", "x?", 7, 2, numbers=(3, 4, 5)), own("b", "y?")
    check_known("anchors", Split((known,), (known,)))
    with pytest.raises(ValueError, match="anchors needs prompts with known steps, 'b' has none: give every"):
        check_known("anchors", Split((unknown,), (known,)))
    with pytest.raises(ValueError, match="patching needs prompts with 3 or more known steps, 'a' has 2: give every"):
        check_known("patching", Split((known,), (known,)), 3)
    check_known("patching", Split((known,), (known,)), 2)


def test_unlike_in_everything() -> None:
    first = own("a", "x?", 7, 2)
    others = [own("b", "y?", 8, 3), own("c", "y?", 7, 3), own("d", "y?", 8, 2), own("e", "y?", 8, 9, 3)]
    assert [unlike(first, other) for other in others] == [True, False, False, False]
    problems = templates.generate(split="all")[::97]
    for problem in problems:  # as these problems were compared before there were others
        for other in problems:
            (step1, *_), (other1, *_) = problem.intermediates, other.intermediates
            differs = problem.answer != other.answer and step1 != other1 and problem.numbers[2] != other.numbers[2]
            assert unlike(problem, other) == differs


@pytest.mark.parametrize("task", ["polynomial", "polynomial:m=97,b=3"])
def test_polynomials_get_donors_of_the_same_values(task: str) -> None:
    """Without them hardly any prompt would have one: their states are the same by chance in 1 of 2,500 cases."""
    options = TransferOptions(task=task, limit=20, derivation=60)
    plain, given = options.load_split(0), options.load_split(0, donors=True)
    assert given.evaluation == plain.evaluation and len(given.derivation) == 60
    pools, kind = by_key(given.derivation), polynomial.parse(task)
    assert kind is not None
    found = 0
    for problem in given.evaluation:
        for row in pools.get(key_of(problem), []):
            twin = given.derivation[row]
            found += 1
            assert another_wording(problem, twin) and twin.numbers[:2] != problem.numbers[:2]
            assert twin.intermediates == problem.intermediates and "-derivation-twin-" in twin.prompt_id
            assert polynomial.split_of(kind, twin.numbers[0], twin.numbers[1:]) == "derivation"
    assert found >= 15 > sum(key_of(problem) in by_key(plain.derivation) for problem in plain.evaluation)
