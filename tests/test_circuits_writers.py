"""circuits.writers: contributions add up to the logit, whatever the norm; the writer of a known model is found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import LM_KINDS, make_tokenizer
from induction_model import COPY, INDUCE, make_induction_model, make_induction_probes, make_texts
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from circuits.heads import Heads, head_sets
from circuits.knockout import random_sets, ranking, reference_means
from circuits.writers import FrozenNorm, ablated_probability, alone, writing
from lm.errors import UserError
from lm.model import LanguageModel
from lm.text import left_padded

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


@pytest.mark.parametrize("kind", LM_KINDS)
def test_contributions_add_up_to_the_logit(language_model, kind):
    model = language_model(kind)
    heads = Heads(model)
    batch = model.encode(TEXTS)
    target, other = torch.tensor([7, 99, 40, 3]), torch.tensor([8, 11, 200, 100])
    plain = heads.run(batch).logits.double()
    rows = torch.arange(4)
    for against, expected in (
        (None, plain[rows, target] - plain.mean(1)),
        (other, plain[rows, target] - plain[rows, other]),
    ):
        for batch_size in (1, 8):
            found = writing(heads, batch, target, against, batch_size=batch_size)
            torch.testing.assert_close(found.total, expected, atol=2e-4, rtol=1e-4)
            parts = found.heads.sum((1, 2)) + found.mlps.sum(1) + found.rest
            torch.testing.assert_close(parts, found.total, atol=2e-4, rtol=1e-4)
    assert float(found.heads.abs().mean()) > 1e-3
    torch.testing.assert_close(found.shares(), found.heads.mean(0) / found.total.mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "gpt_neox"])
def test_frozen_norm_is_the_norm(language_model, kind):
    model = language_model(kind)
    norm = FrozenNorm(model)
    assert norm.centres == (kind in ("gpt2", "gpt_neox"))
    x = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0)) + 0.5
    scale = norm.scale(x)
    found = norm.part(x, scale) + norm.bias
    torch.testing.assert_close(found.float(), model.final_norm(x).detach(), atol=1e-4, rtol=1e-4)
    # Linear at that scale, which the norm itself is not.
    half = norm.part(0.5 * x, scale)
    torch.testing.assert_close(half, 0.5 * norm.part(x, scale))
    own = model.final_norm(0.5 * x).double() - norm.bias
    assert not torch.allclose(own, half, atol=1e-2)


def test_odd_widths_and_norms_of_another_kind(language_model):
    model = copy.copy(language_model("gpt2"))
    model.d_model, model._norm = 5, nn.LayerNorm(5)
    with torch.no_grad():
        model._norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5]))
        model._norm.bias.copy_(torch.arange(5.0))
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    norm = FrozenNorm(model)
    torch.testing.assert_close((norm.part(x, norm.scale(x)) + norm.bias).float(), model._norm(x).detach())

    class Squashing(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.tanh(x)

    model._norm = Squashing()
    with pytest.raises(UserError, match=r"final norm \(Squashing\) is not gain"):
        FrozenNorm(model).scale(x)


def test_a_norm_behind_the_attention_is_refused():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    model = LanguageModel(Gemma2ForCausalLM(config), make_tokenizer(named=False), name="gemma2")
    with pytest.raises(UserError, match="the blocks of gemma2 add something else than heads, biases and MLPs"):
        writing(Heads(model), model.encode(TEXTS), torch.tensor([1, 2, 3, 4]))


def test_alone_is_the_lens_on_one_head(language_model):
    model = language_model("gpt2")
    heads = Heads(model)
    batch = model.encode(TEXTS[:2])
    z = heads.run(batch, z=True).z
    assert z is not None
    found = writing(heads, batch, torch.tensor([7, 99]))
    assert found.alone is not None and found.alone.shape == (2, 2, 4)
    x = heads.written(2, z[:, -1, 1])[1, 3]
    with torch.no_grad():
        expected = model.logits(model.final_norm(x)).softmax(-1)[99]
    assert float(found.alone[1, 1, 3]) == pytest.approx(float(expected), rel=1e-4)
    assert float(alone(model, x, torch.tensor(99))) == pytest.approx(float(expected), rel=1e-4)
    assert writing(heads, batch, torch.tensor([7, 99]), with_alone=False).alone is None


def test_the_writer_of_a_known_model():
    """By contribution, alone, and by what silencing it does; random heads do nothing."""
    heads = Heads(make_induction_model())
    probes = make_induction_probes(12)
    batch = left_padded([probe.clean for probe in probes], 0)
    target = torch.tensor([probe.target for probe in probes])
    found = writing(heads, batch, target)
    assert found.alone is not None
    assert ranking(found.heads.mean(0))[0] == INDUCE and ranking(found.alone.mean(0))[0] == INDUCE
    assert float(found.shares()[INDUCE[0] - 1, INDUCE[1]]) > 0.8
    assert float(found.alone[:, INDUCE[0] - 1, INDUCE[1]].min()) > 0.9
    assert float(found.alone[:, COPY[0] - 1, COPY[1]].max()) < 0.2, "it writes nothing into the output itself"
    means = reference_means(heads, left_padded([ids[:-1] for ids, _, _ in make_texts(64, seed=9, length=13)], 0))
    writer = head_sets(heads, [INDUCE])
    nothing = torch.zeros_like(writer)
    before, after = (ablated_probability(heads, batch, x, means, target) for x in (nothing, writer))
    assert float(before.min()) > 0.9 and float(after.max()) < 0.5
    for other in random_sets(writer, 20, torch.Generator().manual_seed(1)):
        if not bool((other & head_sets(heads, [INDUCE, COPY])).any()):
            assert float(ablated_probability(heads, batch, other, means, target).min()) > 0.9
