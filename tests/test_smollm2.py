"""The real language model that `make smollm2` fetches: loaded as its folder, and what a person would see at once.

Skipped where the model is not there; everything here is tested on tiny random models too, in the tests of lm.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.tasks.indirect_objects import generate as sentences
from experiments.tasks.indirect_objects import words_for
from experiments.tune import reasoner
from experiments.tune.judge import judged
from lm.cache import build_cache
from lm.forward import feed
from lm.generate import generate
from lm.load import load_lm

FOLDER = Path(__file__).resolve().parent.parent / "checkpoints" / "smollm2"
pytestmark = pytest.mark.skipif(not (FOLDER / "fetched.json").is_file(), reason="make smollm2 was not run")


@pytest.fixture(scope="module")
def model():
    return load_lm(str(FOLDER), device="cpu")


def test_sizes_form_and_card(model):
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads, model.vocab_size) == (30, 576, 9, 3, 49152)
    assert model.form == "chat" and model.end_ids == (2,) and len(model.weights_hash) == 64
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    record = json.loads((FOLDER / "fetched.json").read_text(encoding="utf-8"))
    assert "Apache-2.0" in card and record["wheel_sha256"] in card and record["file_sha256"] in card


def test_digits_are_tokens_of_their_own(model):
    pieces = [model.tokenizer.decode([i]) for i in model.tokenizer("costs 1234 now")["input_ids"]]
    assert [piece for piece in pieces if piece.strip().isdigit()] == list("1234")


def test_a_chat_begins_once(model):
    text = model.text_of("What is 3+4?")
    assert text.endswith("<|im_start|>assistant\n") and "What is 3+4?" in text
    ids = model.encode([text]).input_ids[0].tolist()
    assert ids == model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_it_knows_who_receives(model):
    """Sentences of the plainest wording are right; with the receiver's name taken away they are not."""
    items = sentences(20, "A", "test", 0, model.tokenizer, words_for(model.tokenizer))
    items = [
        replace(i, question=f"Then, {i.answer} and {i.wrong} went to the {i.place}. {i.wrong} gave a {i.thing} to")
        for i in items
    ]
    model_form, model.form = model.form, "plain"
    try:
        written = generate(model, [item.question for item in items], 2).texts
        without = generate(model, [item.question.replace(item.answer, "Somebody") for item in items], 2).texts
    finally:
        model.form = model_form
    right = sum(text.strip().startswith(item.answer) for text, item in zip(written, items, strict=True))
    control = sum(text.strip().startswith(item.answer) for text, item in zip(without, items, strict=True))
    assert right >= 18 and control == 0


@torch.no_grad()
def test_padded_is_alone_and_cached_is_uncached(model):
    texts = ["The capital of France is", "One, two, three, four, five, six, seven,"]
    batch = model.encode(texts)
    assert not batch.attention_mask.all()
    together = feed(model, model.embed(batch.input_ids), build_cache(), batch.attention_mask, batch.positions).last
    written = generate(model, texts, 8)
    for row, text in enumerate(texts):
        ids = model.encode([text]).input_ids
        alone = model.base(input_ids=ids, use_cache=False).logits[0, -1]
        found = model.logits(together[row, -1])
        assert (found - alone).abs().max() <= 1e-4 * alone.abs().max()
        for token in written.tokens[row]:  # greedy, one whole pass per token
            logits = model.base(input_ids=ids, use_cache=False).logits[0, -1]
            assert logits.argmax() == token or logits.max() - logits[token] < 1e-3
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)


# --- The adapter that is shipped --------------------------------------------------------------------------------------

ADAPTER = FOLDER.parent / "smollm2-reasoner"


def test_the_adapter_writes_chains_when_asked_for_steps():
    """The same held-out questions, asked in two ways; the base's own weights say nothing of the kind."""
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size <= 6_000_000
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the base is the one that it was trained on
        model = load_lm(str(ADAPTER), device="cpu")
    items = [item for item in reasoner.questions(4, 1).test if item.task in ("ontology-1", "babi-15")]
    found = {}
    for mode, instruction in reasoner.INSTRUCTIONS.items():
        texts = generate(model, [model.text_of(f"{item.question} {instruction}") for item in items], 48).texts
        found[mode] = [judged(item, text) for item, text in zip(items, texts, strict=True)]
    assert all(one["chain"] for one in found["steps"]) and sum(one["correct"] for one in found["steps"]) >= 7
    assert not any(one["chain"] for one in found["direct"]) and all(one["at_once"] for one in found["direct"])
