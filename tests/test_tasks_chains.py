"""Scoring of chains: equations are checked exactly, ontologies' steps must follow, repetition is measured."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest

from experiments.tasks import arithmetic
from experiments.tasks.chains import (
    compression_ratio,
    equations,
    ontology_steps,
    repetition,
    score_arithmetic,
    score_ontology,
    value_of,
    words_in,
)
from experiments.tasks.ontology_text import generate
from experiments.tasks.ontology_words import TRAINING, UNSEEN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = 24, and 48+24 = 72.", [("48/2", "24", True), ("48+24", "72", True)]),
        ("<<5*6=30>>30", [("5*6", "30", True)]),
        ("5 + 3 = 8 * 2 = 16", [("5 + 3", "8 * 2", False), ("8 * 2", "16", True)]),
        ("1/3 = 0.33", [("1/3", "0.33", False)]),
        ("1/4 = 0.25", [("1/4", "0.25", True)]),
        ("$1,200 + $300 = $1,500", [("$1,200 + $300", "$1,500", True)]),
        ("20% of 50 = 10", [("20% *  50", "10", True)]),
        ("<<(3*4+7)%50=19>>", [("(3*4+7)%50", "19", True)]),
        ("(9 * 8 + 7) % 50 = 29 = 79 % 50", [("(9 * 8 + 7) % 50", "29", True), ("29", "79 % 50", True)]),
        ("9%5=9", [("9%5", "9", False)]),
        ("12% = 12, 20% 5 + 3 = 8, 50%*2 = 1", [("5 + 3", "8", True), ("50%*2", "1", True)]),
        ("4%0=4", [("4%0", "4", False)]),
        ("3 x 4 = 12 and 3×4=13", [("3 x 4", "12", True), ("3*4", "13", False)]),
        ("2*(3+4)=14", [("2*(3+4)", "14", True)]),
        ("-3 + 5 = 2; 7 − 9 = -2", [("-3 + 5", "2", True), ("7 - 9", "-2", True)]),
        ("2^3 = 8, 2**3=9", [("2^3", "8", True), ("2**3", "9", False)]),
        ("4 / 0 = 4", [("4 / 0", "4", False)]),
        ("12 = 12, and = 5", []),
        ("2x + 3 = 7", []),
        ("f(2) = 3 + 1", []),
        ("x = 5 + 3 = 8", [("5 + 3", "8", True)]),
        ("3 apples + 4 apples = 7 apples", []),
        ("in 1990 - well, 12 people", []),
    ],
)
def test_equations(text: str, expected: list[tuple[str, str, bool]]) -> None:
    found = equations(text)
    assert [(e.left, e.right, e.valid) for e in found] == expected
    for e in found:
        if "of" not in text and not set("×−") & set(text):
            assert text[e.start : e.end].startswith(e.left) and text[e.start : e.end].endswith(e.right)


def test_units_can_be_named() -> None:
    text = "3 apples + 4 Apples = 7 apples"
    (found,) = equations(text, ["apples"])
    assert found.valid and text[found.start : found.end] == "3 apples + 4 Apples = 7"


def test_values_are_exact_and_agree_with_python() -> None:
    rng = random.Random(0)
    for _ in range(300):
        parts = [str(rng.randint(1, 30))]
        for _ in range(rng.randint(1, 4)):
            number = str(rng.randint(1, 30))
            parts += [rng.choice("+-*/"), rng.choice([number, f"({number}-{rng.randint(31, 40)})"])]
        expression = " ".join(parts)
        exact = eval(  # noqa: S307  # our own text
            "".join(f"Fraction({c})" if c.isdigit() else c for c in _tokens(expression)), {"Fraction": Fraction}
        )
        assert value_of(expression) == exact
    assert value_of("0.1 + 0.2") == Fraction(3, 10) != 0.1 + 0.2
    for broken in ("", "3 +", "(3", "3 4", "a + 1", "2^99", "2^0.5", "1/0"):
        assert value_of(broken) is None


def _tokens(expression: str) -> list[str]:
    return re.findall(r"\d+|\S", expression)


def test_steps_must_come_before_the_answer() -> None:
    assert score_arithmetic("48 + 24 = 72").is_chain is False  # the equation states the answer itself
    assert score_arithmetic("48 + 24 = 72. The answer is 72.").is_chain
    half = score_arithmetic("48/2 = 24. 48 + 24 = 71. So 71", None)
    assert (half.steps, half.valid_steps, half.is_chain, half.words) == (2, 1, True, 8)
    assert score_arithmetic("72. Because 48 + 24 = 72", answer_at=0).steps == 0
    none = score_arithmetic("I do not know.")
    assert not none.parsed and not none.is_chain and none.steps == 0 and none.words == 4
    with pytest.raises(ValueError, match="within the 1 characters"):
        score_arithmetic("1", 2)


def test_every_written_chain_of_the_generator_is_valid() -> None:
    for problem in arithmetic.generate(100, 1):
        text = ". ".join(problem.steps) + f". The answer is {problem.answer}."
        score = score_arithmetic(text)
        assert score.steps == score.valid_steps == len(problem.steps) and score.is_chain
        wrong = score_arithmetic(text.replace("=", "=1"))
        assert wrong.valid_steps == 0 and not wrong.is_chain and wrong.steps == score.steps


@pytest.mark.parametrize("lexicon", [TRAINING, UNSEEN], ids=["training", "unseen"])
def test_gold_chains_of_ontologies_are_valid(lexicon) -> None:  # type: ignore[no-untyped-def]
    for negation in ("none", "some"):
        for hops in (1, 2, 3, 4):
            for item in generate(5, lexicon, hops, 2, "shuffled", "relevant", negation, demonstrations=1):  # type: ignore[arg-type]
                steps = ontology_steps(item.prompt, item.completion.rsplit(". ", 1)[0])
                assert [s.valid for s in steps] == ["stated", *["stated", "inferred"] * hops]
                score = score_ontology(item.prompt, item.completion)
                assert score.steps == score.valid_steps == 2 * hops + 1 and score.is_chain and score.parsed


def test_wrong_steps_of_ontologies() -> None:
    question = "Tumps are joms. Jom is fast. Wugs are tumps. Sam is tump. True or false: Sam is loud."

    def check(chain: str) -> list[str]:
        return [step.valid for step in ontology_steps(question, chain)]

    assert check("Sam is tump. Tumps are joms. Sam is jom. Jom is fast. Sam is fast.") == [
        "stated", "stated", "inferred", "stated", "inferred",
    ]  # fmt: skip
    assert check("Sam is jom. Sam is fast. Sam is loud. Sam is wug.") == ["inferred", "inferred", "", ""]
    assert check("Sam is fast") == [""]  # two rules at once: a step is missing
    assert check("Sam is not fast. Joms are tumps. Well, let me see. Tumps are fast.") == ["", "", "", "inferred"]
    assert check("Sam is loud. Loud is fast. Sam is fast") == ["", "", ""]  # nothing follows from a wrong step
    bare = score_ontology(question, " False")
    assert bare.parsed and not bare.is_chain and bare.steps == 0
    late = score_ontology(question, " False. Sam is tump.")
    assert late.steps == 0 and not score_ontology(question, "Sam is tump.").parsed


def test_repetition_and_compression() -> None:
    assert repetition("one two three four five") == 0 == repetition("one")
    assert repetition("a b a b a b a b") == pytest.approx(1 - 2 / 5)
    assert repetition("na na na na", n=1) == 0.75
    text = " ".join(str(n) for n in range(200))
    assert compression_ratio("so it is. " * 100) < 0.1 < compression_ratio(text) < 1 and compression_ratio("") == 1
    assert words_in("It's 3, don't?") == ["it's", "3", "don't"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        repetition("a", 0)
