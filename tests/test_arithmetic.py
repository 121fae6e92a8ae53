"""The problem generators: correct equations, disjoint splits, seeded."""

from __future__ import annotations

from itertools import islice

import pytest

from experiments.tasks import arithmetic, templates


@pytest.fixture(scope="module")
def problems() -> list:  # type: ignore[type-arg]
    return list(islice(arithmetic.stream(3), 800))


def test_equations_are_right_and_chained(problems: list) -> None:  # type: ignore[type-arg]
    for p in problems:
        value = p.numbers[0]
        for step, result in zip(p.steps, p.intermediates, strict=True):
            left, _, right = step.partition("=")
            assert eval(left) == int(right) == result  # noqa: S307  # our own text
            assert left.startswith(str(value)) or left.split("+")[0] == str(p.numbers[0]) or "+" in left
            value = result
        assert p.answer == p.intermediates[-1] == value
        assert all(1 <= v <= arithmetic.MAX_VALUE for v in p.intermediates)
        assert all(f" {n} " in f"{p.question} " for n in p.numbers)


def test_operations_match_numbers_and_steps(problems: list) -> None:  # type: ignore[type-arg]
    for p in problems:
        operations = p.operation.split("+")
        assert len(p.numbers) == len(operations) + 1
        assert len(p.steps) == len(operations) + operations.count("bring")
    assert {op for p in problems for op in p.operation.split("+")} == set(arithmetic.OPERATIONS)
    assert {len(p.steps) for p in problems} == {1, 2, 3, 4, 5}


def test_a_hand_computed_problem() -> None:
    found = next(p for p in islice(arithmetic.stream(0), 2000) if p.operation == "add+bring" and len(p.steps) == 3)
    x, y, z = found.numbers
    assert found.steps == (f"{x}+{y}={x + y}", f"{x + y}*{z}={(x + y) * z}", f"{x + y}+{(x + y) * z}={found.answer}")


def test_splits_share_no_number_combination() -> None:
    seen = {split: {p.cluster for p in islice(arithmetic.stream(1, split), 1500)} for split in arithmetic.SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["derivation"]
    assert not seen["test"] & seen["derivation"]
    overlap = seen["test"] & {p.cluster for p in islice(arithmetic.stream(2, "test"), 1500)}
    assert overlap  # the check above could have failed: the same split does repeat combinations


def test_training_never_sees_a_template_combination(problems: list) -> None:  # type: ignore[type-arg]
    for p in templates.generate():
        first = "add" if p.operation == "addition" else "subtract"
        assert arithmetic.split_of((first, "bring"), p.numbers) == arithmetic.RESERVED
    assert arithmetic.split_of(("add", "bring"), (9, 2, 3)) in arithmetic.SPLITS


def test_seeds_and_distinctness() -> None:
    first, again, other = (arithmetic.generate(50, seed=s, min_steps=3) for s in (1, 1, 2))
    assert first == again and first != other
    assert len({p.cluster for p in first}) == 50 and all(len(p.steps) >= 3 for p in first)


def test_weights_set_the_lengths() -> None:
    only = list(islice(arithmetic.stream(0, weights=(0, 0, 1, 0, 0)), 50))
    assert {len(p.steps) for p in only} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of train, derivation, test"),
        ({"max_steps": 1, "reach": 150}, "no problem of 1..1 steps was found that reaches 150"),
        ({"min_steps": 0}, "steps must satisfy 1 <= min <= max <= 5"),
        ({"max_steps": 6}, "steps must satisfy"),
        ({"weights": (1.0,)}, "5 weights are needed"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        next(arithmetic.stream(0, **arguments))
    with pytest.raises(ValueError, match="at least 1"):
        arithmetic.generate(0)


def test_templates_have_the_published_structure() -> None:
    everything = templates.generate(split="all")
    assert len(everything) == 224 * 10 * 2 and len({p.cluster for p in everything}) == 224
    for p in everything:
        x, y, z = p.numbers
        step1 = x + y if p.operation == "addition" else x - y
        assert p.intermediates == (step1, step1 * z, step1 * z + step1) and p.answer == step1 * z + step1
        assert 1 <= y < x <= 8 and 1 <= z <= 8
    test, derivation = templates.generate(), templates.generate(split="derivation")
    assert len(test) == len(derivation) == 112 * 20
    assert not {p.cluster for p in test} & {p.cluster for p in derivation}
    assert not {p.question for p in test} & {p.question for p in derivation}


def test_templates_draw() -> None:
    some = templates.generate(30, seed=5)
    assert some == templates.generate(30, seed=5) != templates.generate(30, seed=6)
    assert len({p.prompt_id for p in some}) == 30
    with pytest.raises(ValueError, match="1..2240"):
        templates.generate(2241)
    with pytest.raises(ValueError, match="split must be"):
        templates.generate(split="train")


def test_no_sentence_outside_the_tokenizer_corpus() -> None:
    """Template stories use wordings of the generator, so a model trained on the generator has seen them."""
    known = {s.replace("  ", " ").strip() for s in arithmetic.corpus_sentences()}
    for line in templates.corpus_sentences():
        for sentence in line.replace("?", "?|").replace(".", ".|").split("|"):
            if sentence.strip():
                assert sentence.replace("  ", " ").strip() in known, sentence
