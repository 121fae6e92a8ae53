"""Indirect objects: sets, splits that share nothing, single tokens, pairs, restricted choice."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from word_tokenizers import byte_tokens, merging_tokenizer, word_tokens

from experiments.tasks.indirect_objects import (
    SPLITS,
    Words,
    contrastive_pair,
    generate,
    negative_letters,
    split_of,
    words_for,
)
from experiments.tasks.restricted import beginnings, first_tokens

SETS: tuple[Any, ...] = ("A", "B", "AL", "BL", "H", "HL")


@pytest.mark.parametrize("sentences", SETS)
def test_the_answer_is_who_did_not_give_and_did_not_leave(sentences: Any) -> None:
    items = generate(60, sentences)
    for item in items:
        text = item.question
        assert text.endswith(f"{item.verb} a {item.thing} to") and f"the {item.place}" in text
        assert text.rsplit(item.verb, 1)[0].split()[-1] == item.wrong
        named = [name for name in item.choices if f"{name}" in text]
        assert named == list(item.choices) and item.choices[:2] == (item.answer, item.wrong)
        assert item.answer != item.wrong and len(set(item.choices)) == (3 if sentences[0] == "H" else 2)
        order = text.index(item.answer) < text.index(item.wrong)
        if sentences[0] in "AB":
            assert order == (sentences[0] == "A") and text.count(item.answer) == 1 and text.count(item.wrong) == 2
        else:
            away = item.choices[2]
            assert text.count(away) >= 2 > text.count(item.answer) == 1  # who leaves is named more often
    assert len({item.verb for item in items}) >= 5 and len({item.prompt_id for item in items}) == 60
    if sentences[0] == "H":
        first = [item.choices.index(min(item.choices, key=item.question.index)) for item in items]
        assert {0, 1, 2} == set(first)  # the order of the names tells nothing


def test_turned_and_longer_sets_are_the_same_stories() -> None:
    for short, turned in (("A", "B"), ("AL", "BL")):
        a, b = generate(20, short), generate(20, turned)  # type: ignore[arg-type]
        assert [(i.answer, i.wrong, i.place, i.thing, i.verb) for i in a] == [
            (i.answer, i.wrong, i.place, i.thing, i.verb) for i in b
        ]
        assert all(len(x.question) == len(y.question) and x.question != y.question for x, y in zip(a, b, strict=True))
    mean = {s: sum(len(i.question) for i in generate(50, s)) / 50 for s in ("A", "AL", "H", "HL")}  # type: ignore[arg-type]
    assert mean["AL"] > 2 * mean["A"] and mean["HL"] > 1.5 * mean["H"]


def test_splits_share_no_combination() -> None:
    clusters = {
        split: {i.cluster for s in SETS for seed in (0, 1) for i in generate(150, s, split, seed)} for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not clusters[one] & clusters[other]
    for split, found in clusters.items():
        assert all(i.split == split for i in generate(5, "A", split)) and len(found) > 500
    few = Words(("Mary", "Tom", "John"), ("park", "lake"), ("ring", "book"))
    keys = {split: {i.cluster for i in generate(2, "A", split, words=few)} for split in SPLITS}
    again = {split: {i.cluster for i in generate(2, "B", split, 5, words=few)} for split in SPLITS}
    assert keys["test"] | again["test"] and not keys["test"] & again["derivation"]
    assert split_of(("Mary", "Tom"), "park", "ring") == split_of(("Tom", "Mary"), "park", "ring")


def test_seeds_and_refusals() -> None:
    assert generate(30, "H", seed=1) == generate(30, "H", seed=1) != generate(30, "H", seed=2)
    for broken, message in (
        ({"sentences": "C"}, "A, B, AL, BL, H, HL, got 'C'"),
        ({"split": "train"}, "derivation, validation, test, got 'train'"),
        ({"n": 0}, "at least 1, got 0"),
        ({"n": 50, "words": Words(("Mary", "Tom"), ("park",), ("ring", "book"))}, "only .* different combinations"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(**{"n": 3, **broken})  # type: ignore[arg-type]


def test_single_tokens_only() -> None:
    with pytest.raises(ValueError, match="only 0 of 46 names are single tokens of this tokenizer; 8 are needed"):
        generate(3, tokenizer=byte_tokens)
    assert words_for(word_tokens) == Words()
    texts = [i.question for i in generate(300, "A")] * 2
    tokenizer = merging_tokenizer(texts, 540)
    found = words_for(tokenizer)
    assert 8 <= len(found.names) and len(found.names) + len(found.places) + len(found.things) < sum(
        map(len, (Words().names, Words().places, Words().things))
    )
    for item in generate(20, "H", tokenizer=tokenizer):
        for word in (*item.choices, item.place, item.thing):
            assert len(tokenizer(" " + word)["input_ids"]) == 1


def test_pairs_and_letters() -> None:
    item = generate(1)[0]
    right, wrong = contrastive_pair(item)
    assert right == f"{item.question} {item.answer}" and wrong == f"{item.question} {item.wrong}"
    rng = random.Random(0)
    letters = contrastive_pair(item, "letters", lambda: negative_letters(rng))
    assert letters[0] == right and len(letters[1]) == 75 and letters[1].isalpha()
    assert letters[1] != contrastive_pair(item, "letters", lambda: negative_letters(rng))[1]
    assert negative_letters(random.Random(3)) == negative_letters(random.Random(3))
    with pytest.raises(ValueError, match="needs the function"):
        contrastive_pair(item, "letters")
    with pytest.raises(ValueError, match="swapped, letters, got 'wrong'"):
        contrastive_pair(item, "wrong")  # type: ignore[arg-type]


def test_restricted_choice() -> None:
    letters = [ord(c) for c in "MTmo"]
    assert first_tokens(["Mary", "Tom", "Mary"], byte_tokens, before="") == {"Mary": letters[0], "Tom": letters[1]}
    with pytest.raises(ValueError, match="'mouse' and 'mole' share their first token"):
        first_tokens(["mouse", "mole"], byte_tokens, before="")
    with pytest.raises(ValueError, match="share their first token"):  # the blank is a token of its own here
        first_tokens(["Mary", "Tom"], byte_tokens)
    found = beginnings(["mouse", "mole", "cat"], byte_tokens, before="")
    assert {a: "".join(map(chr, ids)) for a, ids in found.items()} == {"mouse": "mou", "mole": "mol", "cat": "c"}
    with pytest.raises(ValueError, match="tokens of answer '1' begin answer '12'"):
        beginnings(["1", "12"], byte_tokens)
    with pytest.raises(ValueError, match="two different answers, got 1"):
        first_tokens(["a", "a"], byte_tokens)
    with pytest.raises(ValueError, match="answer '' has no tokens"):
        first_tokens(["a", ""], byte_tokens)
