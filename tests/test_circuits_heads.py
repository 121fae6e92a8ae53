"""circuits.heads: what is read is what TransformerLens and a float64 recomputation read; nothing stays behind."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from conftest import LM_KINDS, make_base, make_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuits.heads import Heads, head_sets
from lm.cache import build_cache
from lm.errors import UserError
from lm.load import load_lm
from lm.model import LanguageModel

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


@pytest.fixture(scope="module")
def eager() -> Any:
    """eager(kind): a tiny model whose attention weights can be read."""
    made: dict[str, LanguageModel] = {}

    def make(kind: str) -> LanguageModel:
        if kind not in made:
            base = make_base(kind)
            base.set_attn_implementation("eager")
            made[kind] = LanguageModel(base, make_tokenizer(named=False), name=kind)
        return made[kind]

    return make


def hooks(model: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.base.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_golden_cases(golden_root, kind):
    folder = golden_root / "circuit" / kind
    expected = json.loads((folder / "expected.json").read_text())
    tensors = load_file(folder / "expected.safetensors")
    model = load_lm(str(folder / "model"), attention="eager", form="plain", device="cpu")
    heads = Heads(model)
    found = heads.run(model.encode(expected["clean"]), z=True, patterns=True)
    scale = float(tensors["logits.clean"].abs().max())
    torch.testing.assert_close(found.logits, tensors["logits.clean"], atol=1e-4 * scale, rtol=0)
    assert found.z is not None and found.patterns is not None
    for block in range(3):
        torch.testing.assert_close(found.z[:, :, block], tensors[f"z.{block}"], atol=1e-4 * scale, rtol=0)
        torch.testing.assert_close(found.patterns[:, block], tensors[f"pattern.{block}"], atol=1e-4, rtol=0)
        assert not torch.allclose(found.z[:, :, block], tensors[f"z.{(block + 1) % 3}"], atol=1e-2)


@pytest.mark.parametrize("kind", LM_KINDS)
def test_reads_are_a_float64_recomputation(eager, kind):
    """z again from the attention weights and the values in float64; the parts add up to the residual stream."""
    model = eager(kind)
    heads = Heads(model)
    batch = model.encode(TEXTS)
    found = heads.run(batch, z=True, mlp=True, residual=True, patterns=True)
    assert found.z is not None and found.residual is not None and found.mlp is not None and found.patterns is not None
    double = Heads(LanguageModel(copy.deepcopy(model.base).double(), model.tokenizer))
    for row, text in enumerate(TEXTS):  # alone: without padding and with everything else in float64
        alone = model.encode([text])
        n = alone.input_ids.shape[1]
        with torch.no_grad():
            cache = build_cache()
            output = double.model.base(input_ids=alone.input_ids, output_attentions=True, past_key_values=cache)
        for block, layer in enumerate(cache.layers):
            weights = output.attentions[block].double()
            values = layer.values.repeat_interleave(model.n_heads // model.n_kv_heads, 1)
            z = (weights @ values).transpose(1, 2)[0]
            torch.testing.assert_close(found.z[row, -n:, block], z.float(), atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(
                found.patterns[row, block, :, -n:, -n:], weights[0].float(), atol=2e-5, rtol=1e-4
            )
            written = double.written(block + 1, z).sum(1) + double.output_bias(block + 1)
            x = found.residual[row, -n:]
            added = x[:, block + 1] - x[:, block] - found.mlp[row, -n:, block]
            torch.testing.assert_close(added, written.float(), atol=2e-4, rtol=1e-3)
    some = heads.run(batch, patterns=[-1]).patterns
    assert some is not None and torch.equal(some, found.patterns[:, :, :, -1:])


@pytest.mark.parametrize("kind", LM_KINDS)
def test_replacing_by_itself_changes_nothing_and_by_nothing_silences(language_model, kind):
    model = language_model(kind)
    heads = Heads(model)
    batch = model.encode(TEXTS)
    plain = heads.run(batch, z=True)
    before = hooks(model)
    same = heads.run(batch, lambda block, z: plain.z[:, :, block - 1], lambda block, x: x)
    assert torch.equal(same.logits, plain.logits)
    silent = heads.run(batch, lambda block, z: torch.zeros_like(z) if block == 1 else z, z=True)
    assert not torch.allclose(silent.logits, plain.logits, atol=1e-3)
    assert silent.z is not None and not silent.z[:, :, 0].any()
    # One head's zero is that head's share of W_O taken away, bias and others kept.
    first = {"z": plain.z[:, :, 0]}
    out = heads.projections[0](first["z"].flatten(-2))
    parts = heads.written(1, first["z"])
    torch.testing.assert_close(parts.sum(2) + heads.output_bias(1), out, atol=1e-5, rtol=1e-4)
    assert hooks(model) == before and torch.equal(heads.run(batch).logits, plain.logits)


def test_no_trace_after_an_error(language_model):
    model = language_model("llama")
    heads = Heads(model)
    batch = model.encode(TEXTS)
    plain, before = heads.run(batch).logits, hooks(model)

    def broken(block: int, x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    for options in ({"change": broken}, {"change_mlp": broken}):
        with pytest.raises(RuntimeError, match="broken"):
            heads.run(batch, **options)
        assert hooks(model) == before
    assert torch.equal(heads.run(batch).logits, plain)


def test_logits_at_chosen_columns(language_model):
    model = language_model("llama")
    heads = Heads(model)
    batch = model.encode(TEXTS[:2])
    width = batch.input_ids.shape[1]
    found = heads.run(batch, at=torch.tensor([[width - 1, width - 3], [width - 2, width - 1]])).logits
    torch.testing.assert_close(found[:, [0, 1]][[0, 1], [0, 1]], heads.run(batch).logits)
    cut = model.encode(TEXTS[:1])
    alone = heads.run(type(cut)(cut.input_ids[:, :-2], cut.attention_mask[:, :-2])).logits[0]
    torch.testing.assert_close(found[0, 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", LM_KINDS)
def test_parts_by_structure(language_model, kind):
    model = language_model(kind)
    heads = Heads(model)
    names = {id(module): name for name, module in model.base.named_modules()}
    ends = {names[id(module)].split(".")[-1] for module in heads.projections}
    assert ends == {{"gpt2": "c_proj", "gpt_neox": "dense"}.get(kind, "o_proj")}
    assert {names[id(module)].split(".")[-1] for module in heads.mlps} == {"mlp"}
    grouped = kind not in ("gpt2", "gpt_neox")
    assert heads.groups == (((0, 1), (2, 3)) if grouped else ((0,), (1,), (2,), (3,)))


def test_refusals(language_model):
    model = language_model("llama")
    heads = Heads(model)
    with pytest.raises(UserError, match="loaded with attention='eager', this one has 'sdpa'"):
        heads.run(model.encode(TEXTS), patterns=True)
    with pytest.raises(UserError, match=r"block must be in 1\.\.3, got 0"):
        heads.output_weights(0)
    assert head_sets(heads, [(3, 1)]).nonzero().tolist() == [[2, 1]]
    with pytest.raises(UserError, match=r"head must be in 0\.\.3, got 4"):
        head_sets(heads, [(1, 4)])
    base = copy.deepcopy(model.base)

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **given: Any) -> Any:
            out, weights = self.inner(*args, **given)
            return 2 * out, weights

    base.model.layers[1].self_attn = Scaled(base.model.layers[1].self_attn)
    with pytest.raises(UserError, match="attention of block 2 of .* changes what its output projection gives"):
        Heads(LanguageModel(base))
    base.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(UserError, match="0 attention modules found in block 2"):
        Heads(LanguageModel(base))
    assert issubclass(Conv1D, nn.Module)  # GPT-2's linear layer is one of the kinds that are looked for
