"""The golden cases: what the published reference implementations computed from checkpoints stored their way."""

from __future__ import annotations

import pytest
import torch

from codi import decode_answers

CASES = ("llama_answer_only", "llama_original", "gpt2_original", "gpt2_original_eos")
FIRST, LAST = 1e-4, 2e-3  # tolerance at the first and last latent, from golden/README.md


def tolerance(n):
    """Errors grow from latent to latent: from FIRST to LAST in equal ratios."""
    return FIRST * (LAST / FIRST) ** (torch.arange(n) / (n - 1))


def assert_close_per_latent(found, expected):
    """found, expected: (batch, latent, …)."""
    error = (found - expected).abs().transpose(0, 1).flatten(1).max(dim=1).values
    assert (error <= tolerance(len(error))).all(), error


def compare(case, model, run, answers, rows):
    assert_close_per_latent(run.embeddings, case.stack("latents_post")[rows, :6])
    assert_close_per_latent(run.states, case.stack("latents_pre")[rows])
    assert_close_per_latent(run.hidden_states, case.stack("latent_hidden")[rows])
    # z_7 is computed, never fed
    assert_close_per_latent(model.project(run.states).detach(), case.stack("latents_post")[rows])
    assert torch.equal(run.states[:, 0], run.bot_hidden_states[:, -1])
    for row, tokens, text in zip(rows, answers.tokens, answers.texts, strict=True):
        assert tokens == case.expected["cases"][row]["generated"]
        assert text == case.expected["cases"][row].get("text", text)
    if "0.first_logits" in case.tensors:
        expected = case.stack("first_logits")[rows]
        assert answers.first_logits.shape[1] == expected.shape[1] + 1
        assert (answers.first_logits[:, :-1] - expected).abs().max() <= LAST


def decode(model, run):
    return decode_answers(model, run, max_new_tokens=6, keep_first_logits=True)


@pytest.mark.parametrize(
    "options", [{}, {"merge_lora": False}, {"attention": "eager"}], ids=["merged", "apart", "eager"]
)
@pytest.mark.parametrize("name", CASES)
def test_in_one_left_padded_batch(golden, name, options):
    case = golden(name)
    model = case.load(**options)
    batch = model.encode(case.expected["texts"])
    assert not batch.attention_mask.all(), "the prompts must differ in length, or nothing is padded"
    for ids, mask, expected in zip(batch.input_ids, batch.attention_mask, case.expected["cases"], strict=True):
        assert ids[mask].tolist() == expected["input_ids"]
    run = model.rollout(batch)
    compare(case, model, run, decode(model, run), list(range(len(batch))))


@pytest.mark.parametrize("name", CASES)
def test_each_prompt_alone(golden, name):
    case = golden(name)
    model = case.load()
    for row, text in enumerate(case.expected["texts"]):
        run = model.rollout(model.encode([text]))
        compare(case, model, run, decode(model, run), [row])


def test_kv_and_hidden_means(golden):
    """KV means over the addition prompts (the first of each pair of texts), hidden means over all."""
    case = golden("llama_answer_only")
    model = case.load()
    run = model.rollout(model.encode(case.expected["texts"]))
    for name, found in (("keys", run.keys), ("values", run.values)):
        expected = case.tensors[f"kv_mean.{name}"][None]
        assert_close_per_latent(found[::2].mean(dim=0)[None], expected)
        assert (found[1::2].mean(dim=0) - expected[0]).abs().max() > 0.01, "control: the subtraction prompts differ"
    assert_close_per_latent(run.hidden_states.mean(dim=0)[None], case.tensors["hidden_mean"][None])


@pytest.mark.parametrize("name", CASES)
def test_settings_are_found_without_being_told(golden, name):
    """Rank from the shapes, alpha from the published ratio, protocol from the tokenizer; control: another alpha."""
    case = golden(name)
    protocol = None if case.expected["protocol_name"] != "original-eos" else "original-eos"
    found = case.load(protocol=protocol, lora_alpha=None)
    told, wrong = case.load(), case.load(lora_alpha=16)
    assert found.protocol == told.protocol and found.protocol.name == case.expected["protocol_name"]
    for field in ("pad_id", "bot_id", "eot_id"):
        assert getattr(found.protocol, field) == case.expected.get(field, getattr(found.protocol, field))
    batch = found.encode(case.expected["texts"][:1])
    states = [m.rollout(batch, n_latents=1).states for m in (found, told, wrong)]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[1], states[2], atol=0.01)


def test_the_protocols_are_not_interchangeable(golden):
    """Control: with the eos tokens of the other variant the golden latents are missed."""
    case = golden("gpt2_original_eos")
    model = case.load(protocol="original")
    run = model.rollout(model.encode(case.expected["texts"]))
    with pytest.raises(AssertionError):
        assert_close_per_latent(run.embeddings, case.stack("latents_post")[:, :6])


def test_published_mask_alone_is_the_same_and_padded_is_not(golden):
    """mask="published" drops the mask after the prompt: unpadded prompts cannot tell, padded ones see their padding."""
    case = golden("llama_original")
    carried, published = case.load(), case.load(mask="published")
    text = case.expected["texts"][0]
    alone = [m.rollout(m.encode([text])) for m in (carried, published)]
    assert torch.equal(alone[0].states, alone[1].states)
    batch = carried.encode(case.expected["texts"])
    padded = (~batch.attention_mask).any(dim=1)
    runs = [m.rollout(batch).states for m in (carried, published)]
    assert_close_per_latent(runs[0][~padded], runs[1][~padded])
    assert (runs[0] - runs[1])[padded][:, 1:].abs().max() > 0.01
