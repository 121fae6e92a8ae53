"""Answers against the float64 oracle; batches, order, limits, sampling and the three modes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import KINDS
from oracle import Oracle

from codi import CodiModel, Intervention, UserError, decode_answers
from codi.decode import default_new_tokens
from lm.cache import cache_length
from lm.generate import exclude, most_probable
from lm.text import to_text

FAMILY_OF = {
    "llama": "answer-only",
    "gpt2": "original-eos",
    "qwen2": "original",
    "qwen3": "original-eos",
    "mistral": "original",
}


def with_protocol(model, **changes):
    """The same model under a changed protocol."""
    protocol = dataclasses.replace(model.protocol, **changes)
    return CodiModel(model.base, model.prj, model.tokenizer, protocol, name=model.name, mask=model.mask)


def ending_model(model, questions, row=1, place=2, n_latents=6):
    """The same model with another end-of-text id: the token that it says at `place` of the answer to one question."""
    tokens = decode_answers(model, model.rollout(model.encode(questions), n_latents), 6).tokens
    return with_protocol(model, eos_id=tokens[row][place]), tokens


@pytest.mark.parametrize("n_latents", [0, 6, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_float64_oracle(tiny_model, questions, kind, n_latents):
    model = tiny_model(kind, FAMILY_OF[kind])
    oracle = Oracle(model)
    texts = questions[:3]
    batch = model.encode(texts)
    run = model.rollout(batch, n_latents)
    found = decode_answers(model, run, 3, keep_first_logits=True)
    for row in range(len(texts)):
        ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
        x, _, _ = oracle.run(ids, n_latents)
        tokens, first = oracle.answer(x, model.protocol.after_latents, 3)
        logits = exclude(found.first_logits, model.protocol.excluded_logits)[row].double()
        kept = first.isfinite()
        assert kept.sum() == model.vocab_size - len(model.protocol.excluded_logits)
        assert torch.equal(logits.isfinite(), kept)
        torch.testing.assert_close(logits[kept], first[kept], atol=5e-3, rtol=0)
        assert found.tokens[row] == tokens


@pytest.mark.parametrize("mode", ["direct", "verbal"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_modes_without_latents(tiny_model, questions, kind, mode):
    """The question and the protocol's tokens of that mode, then the answer: no thought, nothing else fed."""
    for family in ("answer-only", "original"):
        model = tiny_model(kind, family)
        oracle = Oracle(model)
        batch = model.encode(questions[:3], thought=mode)
        found = decode_answers(model, model.prefill(batch), 4).tokens
        for row, text in enumerate(questions[:3]):
            ids = model.tokenizer(text)["input_ids"] + list(model.protocol.before(mode))
            tokens, _ = oracle.answer(oracle.embedding[torch.tensor(ids)], (), 4)
            assert found[row] == tokens
        assert model.answer(questions[:3], mode=mode, max_new_tokens=4) == [to_text(model.tokenizer, t) for t in found]


def test_direct_is_not_zero_latents(codi_model, questions):
    """Without latents the begin-of-thought token is still fed; a direct answer never sees it."""
    direct = codi_model.answer(questions, mode="direct", max_new_tokens=6)
    none = codi_model.answer(questions, n_latents=0, max_new_tokens=6)
    assert direct != none


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_order_and_batch_size_do_not_matter(tiny_model, questions, kind):
    model = tiny_model(kind)
    texts = [*questions, *reversed(questions), "7"]
    one_by_one = [model.answer([text], max_new_tokens=5)[0] for text in texts]
    assert len(set(one_by_one)) > 2
    for batch_size in (1, 2, 3, 64):
        assert model.answer(texts, max_new_tokens=5, batch_size=batch_size) == one_by_one
    assert model.answer([]) == []


def test_finished_rows_leave_the_batch(codi_model, questions, monkeypatch):
    """An end-of-text token that one row says early: its answer is cut there, the others are as before."""
    model, before = ending_model(codi_model, questions)
    fed = []
    embed = CodiModel.embed
    monkeypatch.setattr(CodiModel, "embed", lambda self, ids: fed.append(tuple(ids.shape)) or embed(self, ids))
    run = model.rollout(model.encode(questions), 6)
    fed.clear()
    found = decode_answers(model, run, 6)
    eos = model.protocol.eos_id
    for row, tokens in enumerate(before):
        cut = tokens.index(eos) if eos in tokens else len(tokens)
        assert found.tokens[row] == tokens[:cut]
        assert found.finished[row] == (eos in tokens)
        assert found.texts[row] == to_text(model.tokenizer, tokens[:cut])
    assert found.finished[1] and not all(found.finished)
    assert fed[0] == (4, 1) and fed[-1] == (4 - sum(found.finished), 1)
    assert cache_length(run.past_key_values) == run.prompt_width + 6


def test_all_finished_at_once(codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions[:1]))
    first = decode_answers(codi_model, run, 1).tokens[0][0]
    found = decode_answers(with_protocol(codi_model, eos_id=first), run, 5, keep_first_logits=True)
    assert (found.tokens, found.texts, found.finished) == ([[]], [""], [True])
    assert found.first_logits.shape == (1, codi_model.vocab_size)


def test_excluded_ids_are_never_said(codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions))
    plain = decode_answers(codi_model, run, 1, keep_first_logits=True)
    said = tuple(row[0] for row in plain.tokens)
    changed = decode_answers(with_protocol(codi_model, excluded_logits=said), run, 4, keep_first_logits=True)
    assert not set(said) & {token for row in changed.tokens for token in row}
    assert torch.equal(changed.first_logits, plain.first_logits), "first_logits leave nothing out"
    for row in range(len(run)):
        assert changed.tokens[row][0] == min(
            (i for i in range(codi_model.vocab_size) if i not in said),
            key=lambda i, r=row: -plain.first_logits[r, i].item(),
        )


def test_a_run_is_not_modified_by_decoding(codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions))
    keys = [layer.keys for layer in run.past_key_values.layers]
    copies = [k.clone() for k in keys]
    first = decode_answers(codi_model, run, 4)
    for layer, key, copy in zip(run.past_key_values.layers, keys, copies, strict=True):
        assert layer.keys is key and torch.equal(key, copy)
    assert decode_answers(codi_model, run, 4) == first
    prompt = codi_model.prefill(codi_model.encode(questions, thought="direct"))
    assert decode_answers(codi_model, prompt, 4) == decode_answers(codi_model, prompt, 4)
    assert cache_length(prompt.cache) == prompt.attention_mask.shape[1]


def test_an_early_exit_is_a_run_with_fewer_latents(codi_model, questions):
    whole = codi_model.rollout(codi_model.encode(questions), 6)
    for k in (0, 2, 5):
        found = decode_answers(codi_model, whole.truncate(k), 5)
        assert found.texts == codi_model.answer(questions, n_latents=k, max_new_tokens=5)


def test_answer_masks_apply_to_every_answer_position(codi_model, questions):
    """An answer that may not see the latents does not care what their slots hold."""

    class Hide(Intervention):
        def __init__(self, width, n):
            self.width, self.n, self.seen = width, n, []

        def edit_mask(self, k, mask):
            if k != self.n + 1:
                return mask
            self.seen.append(tuple(mask.shape))
            place = torch.arange(mask.shape[1])
            return mask & ~((place >= self.width) & (place < self.width + self.n))

    run = codi_model.rollout(codi_model.encode(questions), 3)
    spoilt = codi_model.rollout(codi_model.encode(questions), 3, [Spoil()])
    hide = Hide(run.prompt_width, 3)
    a = decode_answers(codi_model, run, 4, interventions=[hide], keep_first_logits=True)
    b = decode_answers(codi_model, spoilt, 4, interventions=[hide], keep_first_logits=True)
    assert torch.equal(a.first_logits, b.first_logits) and a.tokens == b.tokens
    assert hide.seen[:2] == [(4, run.prompt_width + 4), (4, run.prompt_width + 5)]
    plain = [decode_answers(codi_model, r, 4, keep_first_logits=True).first_logits for r in (run, spoilt)]
    assert not torch.allclose(plain[0], plain[1], atol=1e-2), "control: unmasked, the slots matter"
    assert not torch.allclose(plain[0], a.first_logits, atol=1e-2)


class Spoil(Intervention):
    """Other keys and values in the last slot; the latents themselves as they were computed."""

    def edit_kv(self, k, layer, keys, values):
        return (keys + 2, values - 2) if k == 3 else (keys, values)


def test_sampling(codi_model, questions):
    texts = questions * 3
    options = {"temperature": 2.0, "max_new_tokens": 5}
    first = codi_model.answer(texts, seed=1, **options)
    assert codi_model.answer(texts, seed=1, batch_size=2, **options) == first
    assert codi_model.answer(texts, seed=2, **options) != first
    assert len({first[i] for i in range(0, 12, 4)}) > 1, "the same question is drawn anew"
    greedy = codi_model.answer(texts, max_new_tokens=5)
    assert codi_model.answer(texts, seed=1, temperature=1e-6, max_new_tokens=5) == greedy
    state = torch.random.get_rng_state()
    codi_model.answer(texts, seed=1, **options)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_draws_follow_the_softmax(codi_model, questions):
    """A grid of uniform numbers hits each token as often as its probability at temperature 1.5 says."""
    run = codi_model.rollout(codi_model.encode(questions[:1]))
    n = 4000
    many = run.select([0] * n)
    uniforms = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    found = decode_answers(codi_model, many, 1, temperature=1.5, uniforms=uniforms, keep_first_logits=True)
    said = [row[0] if row else codi_model.protocol.eos_id for row in found.tokens]
    counts = torch.bincount(torch.tensor(said), minlength=codi_model.vocab_size)
    expected = (found.first_logits[0].double() / 1.5).softmax(-1) * n
    assert (counts - expected).abs().max() < 2.5
    assert (counts > 0).sum() > 20


def test_text_leaves_out_what_is_not_text(codi_model):
    ids = codi_model.tokenizer("42")["input_ids"]
    assert to_text(codi_model.tokenizer, [*ids, codi_model.protocol.eot_id, 100_000]) == "42"


def test_default_lengths(tiny_model):
    named, plain = tiny_model("llama", "answer-only"), tiny_model("llama", "original")
    assert [default_new_tokens(named, m) for m in ("latent", "direct", "verbal")] == [16, 16, 256]
    assert default_new_tokens(plain) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_latents": -1}, "0 or more, got -1"),
        ({"mode": "aloud"}, "latent, direct, verbal, got 'aloud'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 .* got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 .* got nan"),
        ({"temperature": 1.0}, "needs a seed"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_impossible_requests(codi_model, options, message):
    with pytest.raises(UserError if "n_latents" not in options else ValueError, match=message):
        codi_model.answer(["1+1"], **options)


def test_impossible_decoding(tiny_model, codi_model, questions):
    run = codi_model.rollout(codi_model.encode(questions), 1, keep=("embeddings",))
    with pytest.raises(UserError, match="must have kept its cache"):
        decode_answers(codi_model, run)
    run = codi_model.rollout(codi_model.encode(questions), 1)
    with pytest.raises(UserError, match="seeded generator or uniforms"):
        decode_answers(codi_model, run, temperature=1.0)
    with pytest.raises(UserError, match=r"uniforms must be \(4, 3\), got \(4, 2\)"):
        decode_answers(codi_model, run, 3, temperature=1.0, uniforms=torch.rand(4, 2))
    short = tiny_model("gpt2")
    with pytest.raises(ValueError, match="shorten the text"):
        short.answer(["x" * 118], n_latents=3, max_new_tokens=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 64, 130, 1606])
def test_most_probable_is_argmax(vocab, dtype):
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[10:20] = logits[10:20].round()  # ties: the first counts
    logits[20, : vocab // 2] = -torch.inf
    logits[21] = -torch.inf
    logits[22, -1] = 99.0
    assert torch.equal(most_probable(logits), logits.argmax(dim=-1))
    assert torch.equal(most_probable(logits[:0]), logits[:0].argmax(dim=-1))
