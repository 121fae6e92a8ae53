"""circuits.rift: priors of hand-made texts, lens probabilities recomputed, crossings of curves drawn by hand."""

from __future__ import annotations

import pytest
import torch
from induction_model import make_induction_model, make_texts

from circuits.rift import context_prior, crossing_depth, pretraining_prior, rift
from lm.errors import UserError
from lm.residual import read_residual
from lm.text import left_padded


def test_context_priors_by_hand():
    #        0  1  2  3  4  5  6
    ids = [1, 2, 1, 3, 1, 2, 1]
    assert context_prior(ids) == [(), (), (2,), (), (2, 3), (1,), (2, 3)]
    assert context_prior([4, 4, 4]) == [(), (4,), (4,)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pretraining_priors_are_the_models_own(language_model, kind):
    model = language_model(kind)
    found = pretraining_prior(model, [5, 9, 5, 77], before=[256], top=2, batch_size=2)
    assert set(found) == {5, 9, 77}
    for token, best in found.items():
        with torch.no_grad():
            logits = model.base(input_ids=torch.tensor([[256, token]])).logits[0, -1]
        assert list(best) == logits.topk(2).indices.tolist()
    assert pretraining_prior(model, [5])[5] != found[5][:1] or pretraining_prior(model, [9])[9] != found[9][:1]
    with pytest.raises(UserError, match="top must be 1 or more"):
        pretraining_prior(model, [5], top=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_probabilities_are_the_lens(language_model, kind):
    """Which positions count is told by hand; their numbers are the logit lens on every layer."""
    model = language_model(kind)
    texts = [[10, 20, 10, 30, 10], [7, 8, 9, 7]]
    batch = left_padded(texts, 0)
    prior = {10: (40,), 7: (8,), 20: (1,)}  # at 7 both priors name 8: it does not count
    found = rift(model, batch, prior)
    assert found.item.tolist() == [0, 0] and found.position.tolist() == [2, 4]
    states = read_residual(model, batch, "all")[0]
    with torch.no_grad():
        said = model.logits(model.final_norm(states)).double().softmax(-1)
    torch.testing.assert_close(found.pretraining[1], said[4, :, 40], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.context[0], said[2, :, 20], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.context[1], said[4, :, 20] + said[4, :, 30], atol=1e-6, rtol=1e-4)
    prior[7] = (50,)
    both = rift(model, batch, prior, batch_size=2)
    assert both.item.tolist() == [0, 0, 1] and both.position.tolist() == [2, 4, 3]
    torch.testing.assert_close(both.context[:2], found.context, atol=1e-6, rtol=1e-4)
    last = torch.zeros(2, 5, dtype=torch.bool)
    last[:, -1] = True
    assert rift(model, batch, prior, chosen=last).position.tolist() == [4, 3]
    items, pretraining, context = both.by_item()
    assert items.tolist() == [0, 1] and torch.allclose(context[0], both.context[:2].mean(0))
    items, pretraining, context = both.by_item(both.item == 1)
    assert items.tolist() == [1] and torch.equal(pretraining[0], both.pretraining[2])
    assert both.by_item(both.item == 5)[1].shape == (0, model.n_layers + 1)
    with pytest.raises(UserError, match="chosen must be"):
        rift(model, batch, prior, chosen=last[:, 1:])


def test_a_known_model_turns_to_the_context_in_its_second_block():
    model = make_induction_model()
    texts = make_texts(8)
    batch = left_padded([ids for ids, _, _ in texts], 0)
    unused = {ids[-1]: (next(t for t in range(16) if t not in ids),) for ids, _, _ in texts}
    found = rift(model, batch, unused)
    assert len(found.item) >= 6
    assert float(found.context[:, 1].max()) < 0.2 and float(found.context[:, 2].min()) > 0.9


def test_crossings_by_hand():
    pretraining = torch.tensor([[0.5, 0.4, 0.3, 0.0]])
    context = torch.tensor([[0.0, 0.1, 0.4, 0.9]])
    # -0.5, -0.3, +0.1: three quarters of the way from layer 1 to layer 2
    assert float(crossing_depth(pretraining, context)) == pytest.approx(1.75)
    assert float(crossing_depth(context, pretraining + 1)) == 0
    assert crossing_depth(context, pretraining).isnan()
    back = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert float(crossing_depth(torch.full((1, 4), 0.5), back)) == pytest.approx(2.5), "the last crossing counts"
    items = torch.cat((context, torch.zeros(1, 4)))
    rows = torch.tensor([[0, 0], [0, 1], [1, 1]])
    found = crossing_depth(pretraining.expand(2, 4), items, rows)
    assert found[0] == pytest.approx(1.75) and found[1] > found[0]
    assert found[2].isnan()
    with pytest.raises(UserError, match=r"must be \(item, layer\) with at least one item"):
        crossing_depth(pretraining, context[:, 1:])
