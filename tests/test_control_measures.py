"""Measures of steered rows against an oracle of plain Python numbers, and the answers that are compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from word_models import WORDS, word_model

from experiments.control.measures import compared_answers, distribution, judged_length, text_measures
from experiments.study.item_texts import Reader
from experiments.tasks.items import Item


def oracle(logits: list[float], reference: list[float], answers: list[int]) -> dict[str, float]:
    """The same numbers one by one, in Python's own floats."""

    def probabilities(values: list[float]) -> list[float]:
        top = max(values)
        total = math.fsum(math.exp(value - top) for value in values)
        return [math.exp(value - top) / total for value in values]

    q, p = probabilities(logits), probabilities(reference)
    right, wrong = q[answers[0]], math.fsum(q[one] for one in answers[1:])
    return {
        "kl": math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "entropy": -math.fsum(b * math.log(b) for b in q),
        "p_right": right,
        "p_wrong": wrong,
        "p_answers": right + wrong,
        "share_right": right / (right + wrong),
    }


def test_distributions_against_the_oracle() -> None:
    torch.manual_seed(0)
    logits, reference = 3 * torch.randn(150, 40), 3 * torch.randn(150, 40)
    answers = torch.stack([torch.randperm(40)[:3] for _ in range(150)])
    found = distribution(logits, reference, answers)
    for row in range(150):
        wanted = oracle(logits[row].tolist(), reference[row].tolist(), answers[row].tolist())
        for name, value in wanted.items():
            assert found[name][row] == pytest.approx(value, rel=1e-12, abs=1e-14), (row, name)
        best = max(answers[row].tolist(), key=lambda token: float(logits[row, token]))
        assert answers[row, found["chosen"][row]] == best


def test_equal_logits_have_no_divergence_at_all() -> None:
    logits = 10 * torch.randn(70, 300)
    assert (distribution(logits, logits.clone(), torch.zeros(70, 1, dtype=torch.long))["kl"] == 0).all()


def test_ties_and_missing_answers() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    found = distribution(logits, logits, torch.tensor([[0, 1], [0, 1], [1, -1]]))
    assert found["chosen"].tolist() == [1, 0, 0]  # a tie is not the right answer's
    assert np.isnan(found["p_wrong"][2]) and np.isnan(found["share_right"][2]) and not np.isnan(found["p_right"][2])


def test_answers_that_share_their_first_token_are_refused() -> None:
    model = word_model()
    items = [Item("a", "t", "what colour?", "red", choices=WORDS)]
    reader = Reader.of(model, items)
    compared = compared_answers(reader, items)
    assert compared.names == [("red", "blue", "green", "white")]
    ids = [model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in compared.names[0]]
    assert compared.tokens.tolist() == [ids]
    odd = [Item("b", "t", "what colour?", "red", choices=("red", "red green"))]
    with pytest.raises(ValueError, match="b: answers 'red' and 'red green' share their first token"):
        compared_answers(reader, odd)
    alone = compared_answers(reader, [Item("c", "t", "what colour?", "red")])
    assert alone.tokens.shape == (1, 1)
    everyone = compared_answers(reader, [Item("c", "t", "what colour?", "red")], WORDS)
    assert everyone.names[0] == WORDS


def test_as_many_tokens_are_read_whoever_writes() -> None:
    model = word_model()
    items = [Item("a", "t", "what colour?", "red", choices=WORDS)]
    reader = Reader.of(model, items)
    assert judged_length(reader, items, 10) == 2 and judged_length(reader, items, 1) == 1
    assert judged_length(reader, [Item("n", "t", "1+1?", "2", "number")], 50) == 50
    ids = model.tokenizer(" red red red", add_special_tokens=False)["input_ids"]
    rows = text_measures(reader, items, [0, 0], [ids, ids[:2]], 2, whole=True)
    assert rows["correct"] == [True, True] and rows["repetition"] == [0.5, 0.0]
    assert np.isnan(text_measures(reader, items, [0], [ids], 2, whole=False)["repetition"][0])
