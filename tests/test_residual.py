"""lm.residual: what is read is what the blocks hand on, at the tokens that were asked for; streamed means are means."""

from __future__ import annotations

import pytest
import torch
from conftest import LM_KINDS

from lm.errors import UserError
from lm.residual import StreamingMean, mean_residual, read_residual

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


@pytest.mark.parametrize("kind", LM_KINDS)
def test_all_is_what_the_model_reports(language_model, kind):
    """Every layer but the last as the model reports it; the last one becomes what it reports through the final norm."""
    model = language_model(kind)
    batch = model.encode(TEXTS)
    real = batch.attention_mask
    with torch.no_grad():
        output = model.base(
            input_ids=batch.input_ids, attention_mask=real, position_ids=batch.positions, output_hidden_states=True
        )
        found = read_residual(model, batch, "all")
        assert found.shape == (4, real.shape[1], model.n_layers + 1, model.d_model)
        for layer in range(model.n_layers):
            torch.testing.assert_close(
                found[:, :, layer][real], output.hidden_states[layer][real], atol=1e-5, rtol=1e-5
            )
        normed = model.final_norm(found[:, :, -1])
        torch.testing.assert_close(normed[real], output.hidden_states[-1][real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[:, :, -1][real], output.hidden_states[-1][real]), "read before the norm"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_last_and_mean_are_parts_of_all(language_model, kind):
    model = language_model(kind)
    batch = model.encode(TEXTS)
    everything = read_residual(model, batch, "all")
    assert torch.equal(read_residual(model, batch), everything[:, -1])
    assert torch.equal(read_residual(model, batch, layers=(2, 0)), everything[:, -1, [2, 0]])
    mean = read_residual(model, batch, "mean")
    assert mean.dtype == torch.float64
    for row, text in enumerate(TEXTS):
        states = everything[row][batch.attention_mask[row]].double()
        torch.testing.assert_close(mean[row], states.mean(0))
        alone = read_residual(model, model.encode([text]), "mean")[0]
        torch.testing.assert_close(mean[row], alone, atol=1e-5, rtol=1e-5)
    chosen = torch.zeros_like(batch.attention_mask)
    chosen[:, -1] = True
    chosen[1, -3] = True
    some = read_residual(model, batch, "mean", chosen, layers=[1])
    torch.testing.assert_close(some[0, 0], everything[0, -1, 1].double())
    torch.testing.assert_close(some[1, 0], everything[1, [-3, -1], 1].double().mean(0))


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_means_over_texts_do_not_depend_on_batches(language_model, tokens):
    model = language_model()
    batch = model.encode(TEXTS)
    whole = read_residual(model, batch, tokens).double().mean(0)
    for batch_size in (1, 3, 64):
        found = mean_residual(model, batch, tokens, batch_size=batch_size)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mean_residual(model, batch.select([0, 1]), tokens), whole)


def test_streaming_keeps_float64():
    """Where float32 sums lose the small numbers, the streamed mean keeps them."""
    rows = torch.tensor([[1e8], [1.0], [1.0], [-1e8]])
    mean = StreamingMean()
    for row in rows:
        mean.add(row[None])
    assert mean.count == 4 and mean.mean.tolist() == [0.5]


def test_refusals(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.blocks]
    with pytest.raises(UserError, match="tokens must be one of last, mean, all, got 'first'"):
        read_residual(model, batch, "first")
    with pytest.raises(UserError, match=r"layer must be in 0\.\.3, got 4"):
        read_residual(model, batch, layers=[4])
    with pytest.raises(UserError, match="some of them are padding"):
        read_residual(model, batch, "mean", torch.ones_like(batch.attention_mask))
    with pytest.raises(UserError, match="at least one chosen token in every text"):
        read_residual(model, batch, "mean", torch.zeros_like(batch.attention_mask))
    with pytest.raises(UserError, match="like the batch"):
        read_residual(model, batch, "mean", batch.attention_mask[:, 1:])
    with pytest.raises(UserError, match="got 'all'"):
        mean_residual(model, batch, "all")
    with pytest.raises(UserError, match="none was added"):
        _ = StreamingMean().mean
    mean = StreamingMean()
    mean.add(torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"rows must be \(3,\)"):
        mean.add(torch.zeros(2, 4))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.blocks] == before
