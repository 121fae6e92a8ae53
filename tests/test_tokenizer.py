"""The tokenizer: any text, Llama-3's digit rule, whole words."""

from __future__ import annotations

import pytest

from codi.tokenizer import BASE_SPECIAL_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return build_tokenizer(["There are many birds.", "many birds leave", "There 77 are"] * 3, n_words=60)


@pytest.mark.parametrize("text", ["There are 12 birds", "Zürich 12345 naïve 007 ≥ <<1+2=3>>", "\n\t x  y", "鳥"])
def test_every_text_comes_back(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_numbers_up_to_three_digits_are_one_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    numbers = [str(n) for n in range(1000)] + ["00", "007"]
    ids = tokenizer(numbers, add_special_tokens=False)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == [[n] for n in numbers]


def test_longer_numbers_split_in_threes_from_the_left(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer("12345", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["123", "45"]


def test_words_are_learnt_and_begin_of_text_comes_first(tokenizer) -> None:  # type: ignore[no-untyped-def]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("many birds")["input_ids"])
    assert tokens == [BASE_SPECIAL_TOKENS[0], "many", "Ġbirds"]
    assert tokenizer.eos_token == "<|eot_id|>"
