"""Tiny random language models whose tokenizer has whole words, and items for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import make_config
from transformers import AutoModelForCausalLM
from word_tokenizers import merging_tokenizer

from lm.model import LanguageModel

WORDS = ("red", "blue", "green", "white")
SIZE = 420


def word_model(kind: str = "llama", seed: int = 0, weights_hash: str = "a" * 64) -> LanguageModel:
    """Random weights; " red", " blue" … are one token each."""
    config = make_config(kind)
    config.vocab_size = SIZE
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    texts = [f"what colour is thing {i}? {word}" for i in range(30) for word in WORDS] * 5
    return LanguageModel(base, merging_tokenizer(texts, SIZE), name=f"{kind}-{seed}", weights_hash=weights_hash)


def colour_file(path: Path, n: int = 40) -> Path:
    """A file of items with four colours as choices."""
    records = [
        {"question": f"what colour is thing {i}?", "answer": WORDS[i % 4], "choices": list(WORDS)} for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path
