"""Polynomial iteration: states recomputed, splits that never meet, names of the task, a chain that is checked."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from codi.batches import _step_ends
from codi.tokenizer import build_tokenizer
from experiments.latents.options import NecessityOptions, ProbesOptions
from experiments.tasks import endless, generator_of, is_endless, load_task
from experiments.tasks.chains import equations, score_arithmetic
from experiments.tasks.polynomial import (
    CHAIN_PIECES,
    MAX_HOPS,
    Polynomial,
    corpus_sentences,
    generate,
    parse,
    split_of,
    stream,
)


@pytest.mark.parametrize("kind", [Polynomial(), Polynomial(97, 3), Polynomial(2, 0)])
def test_every_state_is_right_and_stands_in_the_question(kind: Polynomial) -> None:
    for problem in islice(stream(3, "test", kind=kind), 60):
        start, *inputs = problem.numbers
        state, states = start, []
        for x in inputs:
            state = (state * x + kind.b) % kind.m
            states.append(state)
        assert problem.intermediates == tuple(states) and problem.answer == states[-1]
        told = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert told == [start, *(n for x in inputs for n in (x, kind.b)), kind.m]
        for step, value in zip(problem.steps, states, strict=True):
            left, right = step.split("=")
            assert eval(left) == int(right) == value


def test_splits_never_meet_whatever_the_seed() -> None:
    train = {p.cluster for seed in range(3) for p in islice(stream(seed, "train", 2, 2), 3000)}
    test = {p.cluster for seed in (7, 8) for p in islice(stream(seed, "test", 2, 2), 1000)}
    assert train and test and not train & test
    assert {split_of(Polynomial(), 1, (2, x)) for x in range(50)} == {"train", "derivation", "test"}
    shares = [split_of(Polynomial(), s, (x,)) for s in range(50) for x in range(50)]
    assert shares.count("train") / len(shares) == pytest.approx(0.8, abs=0.03)


def test_seeds_and_hops() -> None:
    assert generate(5, 1) == generate(5, 1) != generate(5, 2)
    assert {len(p.steps) for p in generate(200, 0)} == {2, 3, 4, 5}
    assert {len(p.steps) for p in generate(20, 0, "train", 3, 3)} == {3}
    assert {len(p.steps) for p in islice(stream(0, min_steps=1, weights=(1, 0, 0, 2, 0)), 60)} == {1, 4}
    assert {len(p.steps) for p in load_task("polynomial", limit=20, max_steps=1)} == {1}


def test_names_of_the_task() -> None:
    assert parse("polynomial") == Polynomial() and parse("polynomial:m=97,b=3") == Polynomial(97, 3)
    assert parse("polynomial:b=1") == Polynomial(b=1) and parse("arithmetic") is None
    assert generator_of("polynomial:m=97,b=3") == "polynomial" and generator_of("polynomials") == ""
    assert is_endless("polynomial:b=1") and is_endless("arithmetic") and not is_endless("templates")
    for task, said in {
        "polynomial:97": "m=97,b=3",
        "polynomial:": "m=97,b=3",
        "polynomial:m=97,m=3": "twice",
        "polynomial:m=500": "2..199, got 500",
        "polynomial:m=7,b=7": "0..6 (below the modulus 7), got 7",
    }.items():
        for function in (parse, load_task, lambda name: NecessityOptions(task=name).check_inputs()):
            with pytest.raises(ValueError, match=re.escape(said)):
                function(task)
    problems = load_task("polynomial:m=97,b=3", "derivation", 12, min_steps=4)
    assert {len(p.steps) for p in problems} == {4, 5} and all("Modulo 97." in p.question for p in problems)
    assert Polynomial(97).prime and Polynomial(2, 0).prime and not Polynomial(50).prime


def test_bounds_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="hops must satisfy 1 <= min <= max <= 5, got 2 and 6"):
        load_task("polynomial", limit=3, max_steps=MAX_HOPS + 1)
    assert min(max(p.intermediates) for p in load_task("polynomial", limit=40, reach=45)) >= 45
    with pytest.raises(ValueError, match="no problem of 2..5 hops modulo 50 that reaches 50 was found"):
        load_task("polynomial", limit=1, reach=50)
    with pytest.raises(ValueError, match="different sequences found for 1..1 hops in split 'test'; ask for fewer"):
        load_task("polynomial:m=5,b=1", limit=40, max_steps=1)


def test_commands_take_the_task() -> None:
    NecessityOptions(task="polynomial:m=97,b=3", min_steps=2, max_steps=3).check_inputs()
    split = NecessityOptions(task="polynomial", limit=6, derivation=8, min_steps=3, max_steps=3).load_split(0)
    assert len(split.evaluation) == 6 and len(split.derivation) == 8
    assert {len(p.steps) for p in (*split.evaluation, *split.derivation)} == {3}
    probes = ProbesOptions(task="polynomial", limit=4)
    probes.check_inputs()  # its default split is one of the templates
    assert probes.chosen_split == "test" and ProbesOptions().chosen_split == "all"
    assert [p.prompt_id.split("-")[1] for p in probes.load_problems(0).evaluation] == ["test"] * 4
    with pytest.raises(ValueError, match="legacy asks the published templates"):
        NecessityOptions(task="polynomial", legacy=True).check_inputs()


def test_streams_of_training() -> None:
    weights = (0, 1, 0, 0, 0)
    for task in ("arithmetic", "polynomial:m=31,b=2"):
        problems, again = (list(islice(endless(task, "s", "train", weights), 5)) for _ in range(2))
        assert {len(p.steps) for p in problems} == {2} and problems == again
    assert all("Modulo 31." in p.question for p in problems)


def test_a_tokenizer_of_this_task_has_short_questions_and_finds_every_result() -> None:
    tokenizer = build_tokenizer([s for line in corpus_sentences() for s in (line, line[1:])] + [*CHAIN_PIECES] * 500)
    for problem in generate(20, 0):
        words = re.findall(r"[A-Za-z]+|\d+|[.?]| (?=\d)", problem.question)
        assert len(tokenizer(problem.question, add_special_tokens=False)["input_ids"]) == len(words)
        ids = tokenizer(problem.chain, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(problem.steps) * 10 + 1  # "<<(" 3 * 4 + 7 ")%" 50 = 19 ">><<(" … ">>"
        ends = _step_ends(tokenizer, [problem.chain], 0)[0]
        assert [tokenizer.decode([ids[end + 1]]) for end in ends] == [str(value) for value in problem.intermediates]


def test_its_chain_is_checked_and_read_from_a_file(tmp_path: Path) -> None:
    problem = generate(1, 4, min_steps=4)[0]
    assert [e.valid for e in equations(problem.chain)] == [True] * len(problem.steps)
    assert score_arithmetic(problem.chain + str(problem.answer)).valid_steps == len(problem.steps)
    first = problem.steps[0]
    wrong = first[: first.index("=") + 1] + str(problem.intermediates[0] + 50)  # equal only modulo 50
    assert [e.valid for e in equations(f"<<{wrong}>>")] == [False]
    file = tmp_path / "own.jsonl"
    for steps in (list(problem.steps), problem.chain):
        file.write_text(json.dumps({"question": problem.question, "answer": problem.answer, "steps": steps}) + "\n")
        (read,) = load_task(str(file))
        assert read.steps == problem.steps and read.intermediates == problem.intermediates
