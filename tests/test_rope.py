"""Un-rotating and rotating keys, against the model and against a hand-computed rotation."""

from __future__ import annotations

import math

import pytest
import torch

from codi.rope import rotate, unrotate

ROTARY = ("llama", "qwen2", "qwen3", "mistral")


@pytest.mark.parametrize("kind", ROTARY)
def test_unrotate_then_rotate_is_the_identity(tiny_model, kind):
    model = tiny_model(kind)
    x = torch.randn(5, 3, model.d_head, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 40, 200])[:, None]
    there = rotate(x, positions, model)
    torch.testing.assert_close(unrotate(there, positions, model), x, atol=1e-6, rtol=0)
    assert torch.equal(there[0], x[0]), "position 0 turns nothing"
    assert (there[1:] - x[1:]).abs().max() > 0.1
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("kind", ROTARY)
def test_agrees_with_the_cache_of_the_model(tiny_model, kind):
    """Keys of layer 1 depend on position only through the rotation: un-rotated, a repeated token has one key."""
    model = tiny_model(kind)
    batch = model.encode(["aaaaaaaaaaaa"])
    keys = model.prefill(batch).cache.layers[0].keys[0]  # (kv_head, position, d_head)
    content = unrotate(keys, torch.arange(keys.shape[1]), model)[:, 1:13]
    torch.testing.assert_close(content, content[:, :1].expand_as(content), atol=1e-5, rtol=0)
    assert (keys[:, 1:13] - keys[:, 1:2]).abs().max() > 0.1, "control: as cached they differ"


def test_by_hand(tiny_model):
    """Qwen2 has plain frequencies theta^(-2i/d): at position 2 the pair (x_0, x_4) of d_head 8 turns by 2 radians."""
    model = tiny_model("qwen2")
    x = torch.zeros(8)
    x[0] = 1.0
    turned = rotate(x, 2, model)
    expected = torch.zeros(8)
    expected[0], expected[4] = math.cos(2.0), math.sin(2.0)
    torch.testing.assert_close(turned, expected)


def test_positions_add_up(codi_model):
    x = torch.randn(4, codi_model.d_head, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    twice = rotate(rotate(x, 3, codi_model), 8, codi_model)
    torch.testing.assert_close(twice, rotate(x, 11, codi_model), atol=1e-6, rtol=0)


def test_absolute_positions_have_nothing_to_turn(tiny_model):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    assert rotate(x, 5, tiny_model("gpt2")) is x
    assert unrotate(x, 5, tiny_model("gpt2")) is x


def test_slots_of_a_rollout(codi_model, questions):
    """latent_positions are the ids the slots were written at: content keys alone and padded agree."""
    run = codi_model.rollout(codi_model.encode(questions))
    content = unrotate(run.keys, run.latent_positions[:, :, None, None], codi_model)
    for row, text in enumerate(questions):
        alone = codi_model.rollout(codi_model.encode([text]))
        assert torch.equal(alone.latent_positions[0], run.latent_positions[row])
        expected = unrotate(alone.keys, alone.latent_positions[:, :, None, None], codi_model)
        torch.testing.assert_close(content[row], expected[0], atol=2e-3, rtol=0)


def test_published_rope_rounds_the_frequencies(tiny_model):
    exact, rounded = tiny_model(dtype="bfloat16"), tiny_model(dtype="bfloat16", rope="published")
    frequencies = tiny_model().decoder.rotary_emb.inv_freq
    assert torch.equal(exact.decoder.rotary_emb.inv_freq, frequencies)
    assert exact.decoder.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(rounded.decoder.rotary_emb.inv_freq, frequencies.bfloat16().float())
    assert not torch.equal(rounded.decoder.rotary_emb.inv_freq, frequencies)


def test_lengthening_ropes_are_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model().decoder.rotary_emb, "rope_type", "dynamic")
    with pytest.raises(ValueError, match="'dynamic'"):
        unrotate(torch.zeros(8), 1, tiny_model())
