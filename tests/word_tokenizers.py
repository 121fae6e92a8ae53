"""Tokenizers for tests of texts: a token per character, a token per word, and merges learned from given texts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def merging_tokenizer(texts: Sequence[str], vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges within words, blanks at the beginning of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """One token per character, as a function with offsets."""
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


def word_tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """One token per word with the blank before it, or per sign, as a function with offsets."""
    found = list(re.finditer(r" ?\w+|\s|[^\w\s]", text))
    return [zlib.crc32(m[0].encode()) for m in found], [m.span() for m in found]
