"""Word problems: equations that hold, numbers that stand in the text, splits that share nothing, many wordings."""

from __future__ import annotations

import re
import string
from itertools import islice

import pytest

from experiments.tasks import word_problem_texts as texts
from experiments.tasks import word_problems
from experiments.tasks.problem import Problem


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return list(islice(word_problems.stream(3), 1500))


def numbers_in(text: str) -> list[int]:
    """Digits and number words; "one" is no number here ("one person")."""
    found = re.findall(r"\d+|" + "|".join(rf"\b{word}\b" for word in texts.WORDS if word != "one"), text, re.IGNORECASE)
    return [int(one) if one.isdigit() else texts.WORDS.index(one.lower()) for one in found]


def test_equations_hold_and_follow_one_another(problems: list[Problem]) -> None:
    for p in problems:
        last = None
        for step, value in zip(p.steps, p.intermediates, strict=True):
            a, sign, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
            a, b, result = int(a), int(b), int(result)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == result == value
            assert last is None or a == last
            assert a in p.numbers or a == last
            assert b in p.numbers and 1 <= value <= word_problems.MAX_VALUE
            last = value
        assert p.answer == p.intermediates[-1] and p.chain.count("<<") == len(p.steps)
    assert {len(p.steps) for p in problems} == {1, 2, 3}
    assert {op for p in problems for op in p.operation.split("+")} == {"plain", *word_problems.SIGNS}


def test_numbers_are_those_of_the_text_in_order(problems: list[Problem]) -> None:
    for p in problems:
        assert numbers_in(p.question) == list(p.numbers), p.question
    needed = [len(p.cluster.rpartition(":")[2].split(",")) for p in problems]
    assert 0.2 < sum(len(p.numbers) > n for p, n in zip(problems, needed, strict=True)) / len(problems) < 0.4  # asides
    assert 0.1 < sum(bool(re.search("two|three|seven|twelve", p.question.lower())) for p in problems) / len(problems)


def test_many_wordings(problems: list[Problem]) -> None:
    """Every wording comes up; hardly any sentence pattern is the same twice."""
    patterns = {re.sub(r"\d+", "#", p.question) for p in problems}
    assert len(patterns) > 0.98 * len(problems)
    assert sum(p.question.startswith(("How many", "What is", "Find", "So how", "For how")) for p in problems) > 60
    for p in problems:
        assert "{" not in p.question and "  " not in p.question and "?" in p.question + "?"
        assert p.question[0].isupper() or p.question[0].isdigit()


def test_a_pronoun_never_comes_before_the_name(problems: list[Problem]) -> None:
    names = [name for group in texts.NAMES.values() for name in group]
    for p in problems:
        first = re.search(r"\b(she|he|him|his|hers?)\b", p.question, re.IGNORECASE)
        named = [found.start() for name in names if (found := re.search(rf"\b{name}\b", p.question))]
        assert first is None or min(named) < first.start(), p.question


def test_every_wording_can_be_filled() -> None:
    known = {"a", "b", "y", "z", "S", "s", "her", "hers", "Hers", "theirs", "name", "Other", "Third", "items", "item"}
    known |= {"boxes", "box", "place"}
    wordings = [w for group in (texts.STARTS, texts.CLAUSES) for lines in group.values() for w in lines]
    wordings += [w for pairs in texts.FINALS.values() for pair in pairs for w in pair]
    for wording in (*wordings, *texts.QUESTIONS, *texts.LEFT, *texts.ASIDES):
        fields = {name for _, name, _, _ in string.Formatter().parse(wording) if name}
        assert fields <= known, wording
    for kind, lines in texts.STARTS.items():
        assert all(("{b}" in line) == (kind != "plain") and "{a}" in line for line in lines)
    for lines in texts.CLAUSES.values():
        assert all("{y}" in line for line in lines)


def test_splits_share_no_numbers() -> None:
    seen = {s: {p.cluster for p in islice(word_problems.stream(1, s), 1500)} for s in word_problems.SPLITS}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["derivation"]
    assert not seen["test"] & seen["derivation"]
    assert seen["test"] & {p.cluster for p in islice(word_problems.stream(2, "test"), 1500)}  # it could have failed


def test_seeds_lengths_and_distinctness() -> None:
    first, again, other = (word_problems.generate(60, seed=s, min_steps=2) for s in (1, 1, 2))
    assert first == again and first != other
    assert len({p.cluster for p in first}) == 60 and {len(p.steps) for p in first} == {2, 3}
    only = islice(word_problems.stream(0, weights=(0, 0, 1)), 40)
    assert {len(p.steps) for p in only} == {3}
    assert all(max(p.intermediates) >= 200 for p in word_problems.generate(10, reach=200))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split must be one of train, derivation, test"),
        ({"min_steps": 0}, "steps must satisfy 1 <= min <= max <= 3"),
        ({"max_steps": 4}, "steps must satisfy"),
        ({"weights": (1.0,)}, "3 weights are needed"),
        ({"reach": 1000}, "no problem of [123] steps was found that reaches 1000"),
    ],
)
def test_mistakes(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        next(word_problems.stream(0, **arguments))
    with pytest.raises(ValueError, match="at least 1"):
        word_problems.generate(0)
