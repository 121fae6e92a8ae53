"""lm.partial: blocks below once, blocks above per row, together the whole pass, bit for bit; the model as before."""

from __future__ import annotations

import pytest
import torch
from conftest import LM_KINDS, make_tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, Gemma3TextConfig, OPTConfig

from lm.cache import build_cache
from lm.edits import Columns, ResidualEdit, edit_at
from lm.errors import UserError
from lm.forward import feed
from lm.model import LanguageModel
from lm.partial import above, below, feed_above, join_caches

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


@pytest.fixture(scope="module")
def other_model():
    """other_model("gemma2" | "gemma3" | "opt" | "bloom"): architectures beside those of the other tests."""
    common = {"vocab_size": 258, "hidden_size": 32, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0}
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128}
    grouped = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "sliding_window": 8}
    configs = {
        "gemma2": lambda: Gemma2Config(**common, **sizes, **grouped),
        "gemma3": lambda: Gemma3TextConfig(**common, **sizes, **grouped),
        "opt": lambda: OPTConfig(**common, **sizes, ffn_dim=48, word_embed_proj_dim=32),
        "bloom": lambda: BloomConfig(**common, n_layer=4, n_head=4),
    }

    def make(kind: str) -> LanguageModel:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return LanguageModel(base, make_tokenizer(named=False), name=kind)

    return make


def model_of(language_model, other_model, kind: str) -> LanguageModel:
    return language_model(kind) if kind in LM_KINDS else other_model(kind)


@pytest.mark.parametrize("kind", (*LM_KINDS, "gemma2", "gemma3", "opt", "bloom"))
@torch.no_grad()
def test_below_and_above_are_the_whole_pass(language_model, other_model, kind):
    """At every layer, for every text once and for rows in any order, with and without an edit; hooks of others work."""
    model = model_of(language_model, other_model, kind)
    batch = model.encode(TEXTS)
    mask = batch.attention_mask
    vectors = torch.randn(6, model.d_model, generator=torch.Generator().manual_seed(1))
    rows = [3, 0, 0, 2, 1, 3]
    many = batch.select(rows)
    whole = feed(model, model.embed(batch.input_ids), build_cache(), mask, batch.positions).last
    for layer in range(model.n_layers + 1):
        stem = below(model, batch, layer)
        assert stem.last is None and len(stem.cache.layers) == layer
        assert torch.equal(above(model, stem, layer)[mask], whole[mask])
        edits = [ResidualEdit(at, vectors, 0.7) for at in {max(layer, 1), model.n_layers}]
        edit = edit_at(edits, Columns(0, mask.shape[1], mask.shape[1], many.attention_mask))
        full = feed(model, model.embed(many.input_ids), build_cache(), many.attention_mask, many.positions, edit).last
        found = above(model, stem, layer, rows, edit=edit)
        torch.testing.assert_close(found[many.attention_mask], full[many.attention_mask], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[many.attention_mask], whole[rows][many.attention_mask], atol=1e-3)
        x = stem.residual[layer][rows] + vectors[:, None]
        assert not torch.allclose(above(model, stem, layer, rows, x=x)[:, -1], whole[rows, -1], atol=1e-3)
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize("kind", ("llama", "gpt2", "mistral", "gpt_neox", "gemma2", "gemma3", "opt", "bloom"))
@torch.no_grad()
def test_caches_of_both_parts_go_on_as_the_whole(language_model, other_model, kind):
    """Joined caches are those of the whole pass; a part can be fed token by token, others' caches left alone."""
    model = model_of(language_model, other_model, kind)
    batch = model.encode(TEXTS)
    mask = batch.attention_mask
    whole = build_cache()
    last = feed(model, model.embed(batch.input_ids), whole, mask, batch.positions).last
    layer = model.n_layers // 2
    stem, upper = below(model, batch, layer), build_cache()
    above(model, stem, layer, cache=upper)
    joined = join_caches(stem.cache, upper, layer)
    for found, expected in zip(joined.layers, whole.layers, strict=True):
        assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)
    half = mask.shape[1] - 3
    x, cache = stem.residual[layer], build_cache()
    for start, end in ((0, half), (half, half + 1), (half + 1, mask.shape[1])):
        # Layer 0 of the cache tells the masks how long the past is; it is not grown where block 1 is left out.
        cache = join_caches(_cropped(stem.cache, start), cache, layer) if start else cache
        part = feed_above(model, layer, x[:, start:end], cache, mask[:, :end], batch.positions[:, start:end])
    torch.testing.assert_close(part[:, -1], last[:, -1], atol=1e-5, rtol=1e-5)


def _cropped(cache, length):
    return build_cache((entry.keys[:, :, :length], entry.values[:, :, :length]) for entry in cache.layers)


@torch.no_grad()
def test_several_layers_from_one_pass_and_to_the_top(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    stem = below(model, batch, (0, 2, 3), to_top=True)
    assert sorted(stem.residual) == [0, 2, 3] and len(stem.cache.layers) == 3
    assert stem.last is not None
    for layer in (0, 2, 3):
        assert torch.equal(above(model, stem, layer)[batch.attention_mask], stem.last[batch.attention_mask])
    with pytest.raises(UserError, match=r"layer must be one that was kept \(0, 2, 3\), got 1"):
        above(model, stem, 1)
    for layer in (-1, 4):
        with pytest.raises(UserError, match=rf"layer must be in 0\.\.3, got {layer}"):
            below(model, batch, layer)
    with pytest.raises(UserError, match="at least one layer"):
        below(model, batch, ())


@torch.no_grad()
def hooks_of(model):
    return [(list(one._forward_hooks), list(one._forward_pre_hooks)) for one in model.base.modules()]


def test_blocks_left_out_compute_nothing_and_come_back_after_an_error(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    before = hooks_of(model)  # transformers leaves hooks of its own where hidden states were once asked for
    ran: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output, at=layer: ran.append(at))
        for layer, block in enumerate(model.blocks, start=1)
    ]
    try:
        stem = below(model, batch, 1)
        assert ran == [1]
        ran.clear()
        above(model, stem, 1)
        assert ran == [2, 3]

        def broken(layer, x):
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            above(model, stem, 2, x=stem.residual[1], edit=broken)
        ran.clear()
        below(model, batch, 3)
        assert ran == [1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()
    assert hooks_of(model) == before
