"""Samples of the reasoner: modes do what they say, chains are valid, the held-out split shares no word or number."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from experiments.tasks import arithmetic
from experiments.tasks.chains import score_arithmetic, score_ontology
from experiments.tasks.ontology_words import TRAINING, UNSEEN
from experiments.tasks.reasoner import (
    DIRECT,
    MIXTURE,
    STEPS,
    TASKS,
    Sample,
    answer_of,
    arithmetic_chain,
    generate,
    stream,
)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(islice(stream(0), 3000))


def test_modes(samples: list[Sample]) -> None:
    for s in samples:
        assert s.prompt.startswith("### Input: " + s.question) and s.prompt.endswith("\n### Response:")
        instruction = s.prompt.removeprefix("### Input: " + s.question).removesuffix("\n### Response:").strip()
        assert (instruction == "") == (s.mode == "neutral")
        assert s.completion.split()[-1] == s.answer and s.completion.startswith(" ")
        assert s.completion == " " + " ".join([*s.chain, s.answer] if s.chained else [s.answer])
        assert s.chained if s.mode == "steps" else not (s.chained and s.mode == "direct")
        assert not s.choices or s.answer in s.choices
    neutral = [s.chained for s in samples if s.mode == "neutral"]
    assert 0.06 < sum(neutral) / len(neutral) < 0.14 and len(neutral) > 600
    counts = Counter(s.task for s in samples)
    total = sum(MIXTURE.values())
    assert all(abs(counts[t] / len(samples) - MIXTURE[t] / total) < 0.03 for t in TASKS)
    assert {STEPS, DIRECT} <= {re.split(r"[?.] ", s.prompt.split("\n")[0])[-1] for s in samples}


def test_chains_are_valid_and_answers_balanced(samples: list[Sample]) -> None:
    for s in samples:
        text = " ".join([*s.chain, s.answer])
        if s.task == "arithmetic":
            score = score_arithmetic(text)
            assert score.valid_steps == score.steps == len(s.chain) >= 1 and score.is_chain
        elif s.task.startswith("ontology"):
            score = score_ontology(s.question, text)
            assert score.valid_steps == score.steps == 2 * int(s.task[-1]) + 1
            last = s.chain[-1].rstrip(".")
            asked = s.question.split("True or false: ")[1].rstrip(".")
            assert (last == asked) == (s.answer == "True")
        else:
            facts = s.question.rsplit(". ", 1)[0] + "."
            assert all(sentence in facts for sentence in s.chain[:-1]) and s.chain[-1] not in facts
    truths = [s.answer == "True" for s in samples if s.task.startswith("ontology")]
    assert abs(sum(truths) / len(truths) - 0.5) < 0.04


def test_held_out_words_and_numbers_are_others(samples: list[Sample]) -> None:
    held = [s for task in TASKS for s in generate(150, 0, "test", task)]

    def words(found: list[Sample], task: str) -> set[str]:
        return {w for s in found if s.task.startswith(task) for w in re.findall("[A-Za-z]+", s.question)}

    invented = {w for noun in UNSEEN.concepts for w in (noun, noun + "s")}
    assert words(held, "ontology") & invented and not words(samples, "ontology") & invented
    assert not words(held, "ontology") & set(TRAINING.concepts + TRAINING.entities + TRAINING.properties)
    names = {w for w in words(held, "babi") if w[0].isupper()} - {"What"}
    assert len(names) > 8 and not names & words(samples, "babi")

    def numbers(s: Sample) -> tuple[str, ...]:
        return tuple(re.findall(r"\d+", s.question)) + tuple(re.sub(r"\d+", "", c) for c in s.chain)

    sums = {numbers(s) for s in held if s.task == "arithmetic"}
    assert len(sums) > 100 and not sums & {numbers(s) for s in samples if s.task == "arithmetic"}
    assert {s.prompt.split("\n")[0].endswith((STEPS, DIRECT)) for s in held if s.mode != "neutral"} == {True}


def test_demonstrations_only_where_steps_are_asked_for() -> None:
    found = list(islice(stream(1, demonstrations=3), 400))
    shown = Counter(s.prompt.count("### Input:") - 1 for s in found if s.mode == "steps" and "ontology" in s.task)
    assert set(shown) == {0, 1, 2, 3}
    for s in found:
        if s.mode != "steps" or "ontology" not in s.task:
            assert s.prompt.count("### Input:") == 1
        elif "\n\n" in s.prompt:
            before, own = s.prompt.rsplit("### Input: ", 1)
            assert own.startswith(s.question)
            for block in before.strip().split("\n\n"):
                asked, chain = block.split("\n### Response:")
                assert score_ontology(asked, chain).valid_steps == 2 * int(s.task[-1]) + 1
            entity = s.chain[0].split()[0]
            assert entity not in before.split()


def test_one_task_and_mode_seeds_and_refusals() -> None:
    found = generate(40, 3, "test", "ontology-3", "steps")
    assert all((s.task, s.mode, s.chained) == ("ontology-3", "steps", True) for s in found)
    assert len({s.prompt for s in found}) == 40 and found == generate(40, 3, "test", "ontology-3", "steps")
    assert generate(5, 1) == generate(5, 1) != generate(5, 2)
    assert all(s.chained for s in generate(20, mode="neutral", at_once=0))
    for broken, message in (
        ({"split": "validation"}, "train, test, got 'validation'"),
        ({"mixture": {"ontology-4": 1}}, "task must be one of .*, got 'ontology-4'"),
        ({"modes": {"slow": 1}}, "mode must be one of steps, direct, neutral, got 'slow'"),
        ({"mixture": {"arithmetic": 0}}, "not all 0"),
        ({"at_once": 2}, "between 0 and 1, got 2"),
        ({"demonstrations": -1}, "0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            stream(0, **broken)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        generate(0)


def test_arithmetic_chain() -> None:
    problem = arithmetic.generate(1, 0)[0]
    assert len(arithmetic_chain(problem)) == len(problem.steps)
    assert arithmetic_chain(replace(problem, steps=("7+5=12", "12*3=36"))) == ("7 + 5 = 12.", "12 * 3 = 36.")


def test_answer_of(samples: list[Sample]) -> None:
    assert all(answer_of(s.completion) == s.answer for s in samples)
    assert answer_of("\n So it is **True**.\nFalse") == "True" and answer_of(" . \n") == "" == answer_of("")
