"""A small random Llama for studies of ontologies: a token for every form of every word, attention in the open."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from word_tokenizers import merging_tokenizer

from experiments.circuit import trials
from experiments.tasks.ontology_text import generate
from experiments.tasks.ontology_words import FALSE, TRAINING, UNSEEN, plural_of
from lm.model import LanguageModel


def make_circuit_model(n_blocks: int = 3) -> LanguageModel:
    """The model; it predicts no word."""
    words, texts = [], []
    for lexicon in (TRAINING, UNSEEN, FALSE):
        forms = [form for noun in lexicon.concepts for one in (noun, plural_of(noun))
                 for form in (one, one.capitalize())]  # fmt: skip
        words += [" " + form for form in (*forms, *lexicon.entities, *lexicon.properties)]
        texts += [item.text for item in generate(4, lexicon, 1, demonstrations=1)]
    tokenizer = merging_tokenizer([" ".join(words)] * 3 + texts, vocabulary=4000)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=n_blocks,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config), tokenizer, name="tiny")


def count_all_as_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the study count every word as predicted, so that there is something to patch and trace."""
    real = trials._subtasks_of

    def all_right(bench, item, where):
        found, table = real(bench, item, where)
        return found, table.assign(right=True)

    monkeypatch.setattr(trials, "_subtasks_of", all_right)
    monkeypatch.setattr(trials, "_right", lambda heads, probes: [True] * len(probes))


def rows(columns: str, *values: tuple) -> pd.DataFrame:
    """A table from the names of its columns, with blanks between, and its rows."""
    return pd.DataFrame(list(values), columns=columns.split())
