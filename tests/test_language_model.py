"""lm without CODI: parts found by structure, hooks that see what the model reports, tokens that are the model's own."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import LM_KINDS, make_base, make_tokenizer
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, OPTConfig, OPTForCausalLM

from lm.cache import build_cache, cache_length
from lm.errors import UserError
from lm.forward import feed, tapped
from lm.generate import generate
from lm.model import LanguageModel
from lm.text import EncodedBatch, left_padded

TEXTS = ["3+4=?", "Once upon a time there was", "x", "1 2 3 4 5 6 7 8 9 10 11 12 13"]


def hooked(model: LanguageModel, batch: EncodedBatch, **options: Any) -> Any:
    with torch.no_grad():
        mask = batch.attention_mask
        embeddings = model.embed(batch.input_ids)
        return feed(model, embeddings, build_cache(), mask, batch.positions, **options)


def reported(model: LanguageModel, batch: EncodedBatch, **options: Any) -> Any:
    with torch.no_grad():
        return model.base(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
            **options,
        )


def hooks(model: LanguageModel) -> int:
    return sum(len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.blocks)


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LM_KINDS)
def test_sizes_and_parts(language_model, kind):
    model = language_model(kind)
    names = dict(model.base.named_modules())
    blocks, norm = {"gpt2": ("transformer.h", "transformer.ln_f"), "gpt_neox": ("gpt_neox.layers", None)}.get(
        kind, ("model.layers", "model.norm")
    )
    assert model.blocks is names[blocks] and len(model.blocks) == model.n_layers
    assert model.final_norm is names["gpt_neox.final_layer_norm" if norm is None else norm]
    assert model.unembedding is model.base.get_output_embeddings()
    assert (model.d_model, model.vocab_size, model.n_heads) == (32, 258, 4)
    assert model.d_head * model.n_heads == 32
    assert model.n_kv_heads == (4 if kind in ("gpt2", "gpt_neox") else 2)
    assert model.end_ids == (257,)


@pytest.mark.parametrize("kind", LM_KINDS)
def test_named_parts_are_those_found(language_model, kind):
    found = language_model(kind)
    names = {id(module): name for name, module in found.base.named_modules()}
    given = LanguageModel(found.base, blocks=names[id(found.blocks)], norm=names[id(found.final_norm)])
    assert given.blocks is found.blocks and given.final_norm is found.final_norm
    with pytest.raises(UserError, match=r"blocks='model\.nothing'.*has no part"):
        LanguageModel(found.base, blocks="model.nothing")
    with pytest.raises(UserError, match=r"norm='model\.nothing'"):
        LanguageModel(found.base, norm="model.nothing")


def test_what_cannot_be_told_apart_is_asked_for(language_model):
    base = copy.deepcopy(language_model("llama").base)
    base.model.more = nn.ModuleList([nn.Linear(2, 2) for _ in range(len(base.model.layers))])
    with pytest.raises(UserError, match="2 lists of 3 blocks found in LlamaModel.*give blocks="):
        LanguageModel(base)
    assert LanguageModel(base, blocks="model.layers").blocks is base.model.layers
    base = copy.deepcopy(language_model("llama").base)
    base.model.second_norm = nn.LayerNorm(32)
    with pytest.raises(UserError, match="2 candidates found in LlamaModel"):
        _ = LanguageModel(base).final_norm
    assert LanguageModel(base, norm="model.norm").final_norm is base.model.norm


def test_other_families():
    """A norm before the blocks (Bloom), blocks one level down (OPT)."""
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16}
    bloom = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, **small))
    assert LanguageModel(bloom).final_norm is bloom.transformer.ln_f
    opt = OPTForCausalLM(
        OPTConfig(num_hidden_layers=2, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=16, **small)
    )
    assert LanguageModel(opt).blocks is opt.model.decoder.layers
    assert LanguageModel(opt).final_norm is opt.model.decoder.final_layer_norm


def test_capped_logits_are_the_models_own():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.2,
    )  # fmt: skip
    model = LanguageModel(Gemma2ForCausalLM(config), make_tokenizer(named=False))
    batch = model.encode(TEXTS[:1])
    output = reported(model, batch)
    last = hooked(model, batch).last
    torch.testing.assert_close(model.logits(last), output.logits)
    assert output.logits.abs().max() <= 0.5 < model.unembedding(last).abs().max()


def test_refusals(language_model):
    model = language_model()
    with pytest.raises(UserError, match="takes a list of texts"):
        model.encode("one")
    with pytest.raises(UserError, match="no tokenizer"):
        LanguageModel(model.base).encode(["x"])
    with pytest.raises(UserError, match="513 positions are needed, but llama has 512"):
        model.check_length(513)
    lost = copy.copy(model)
    lost.base, lost.tokenizer = make_base("llama"), None
    lost.base.generation_config.eos_token_id = lost.base.config.eos_token_id = None
    with pytest.raises(UserError, match="names a token that ends a text"):
        _ = lost.end_ids


# --- One pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LM_KINDS)
def test_hooked_states_are_those_reported(language_model, kind):
    model = language_model(kind)
    batch = model.encode(TEXTS)
    real = batch.attention_mask
    output = reported(model, batch, output_hidden_states=True)
    step = hooked(model, batch, hidden_states=True)
    assert step.hidden_states.shape == (4, real.shape[1], model.n_layers + 1, model.d_model)
    for layer, states in enumerate(output.hidden_states):
        torch.testing.assert_close(step.hidden_states[:, :, layer][real], states[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.logits(step.last)[real], output.logits[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LM_KINDS)
def test_cached_is_uncached_and_padded_is_alone(language_model, kind):
    model = language_model(kind)
    batch = model.encode(TEXTS)
    whole = hooked(model, batch).last
    cache = build_cache()
    mask, positions = batch.attention_mask, batch.positions
    with torch.no_grad():
        for start, stop in ((0, 4), (4, mask.shape[1] - 1), (mask.shape[1] - 1, mask.shape[1])):
            given = model.embed(batch.input_ids[:, start:stop])
            last = feed(model, given, cache, mask[:, :stop], positions[:, start:stop]).last
    assert cache_length(cache) == mask.shape[1]
    torch.testing.assert_close(last[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
    for row, text in enumerate(TEXTS):
        alone = hooked(model, model.encode([text])).last[0]
        torch.testing.assert_close(whole[row][mask[row]], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_edits_are_seen_later_and_leave_no_trace(language_model, kind):
    model = language_model(kind)
    batch = model.encode(TEXTS)
    before = hooks(model)  # transformers may have left some of its own
    plain = hooked(model, batch, hidden_states=True)
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    edited = hooked(model, batch, edit=lambda layer, x: x + direction if layer == 1 else x, hidden_states=True)
    assert torch.equal(edited.hidden_states[:, :, 0], plain.hidden_states[:, :, 0])
    torch.testing.assert_close(edited.hidden_states[:, :, 1], plain.hidden_states[:, :, 1] + direction)
    assert not torch.allclose(edited.last, plain.last)
    assert torch.equal(hooked(model, batch).last, plain.last)

    def broken(layer, x):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        hooked(model, batch, edit=broken)
    assert hooks(model) == before
    with tapped(model.blocks, see=lambda layer, x: None):
        assert hooks(model) == before + model.n_layers + 1
    assert hooks(model) == before


# --- Writing ----------------------------------------------------------------------------------------------------------


def step_by_step(model: LanguageModel, text: str, n: int, end: int) -> list[int]:
    """Greedy tokens from whole passes of the model itself, without cache, batch or padding."""
    ids = model.tokenizer(text)["input_ids"]
    written: list[int] = []
    while len(written) < n:
        with torch.no_grad():
            token = int(model.base(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
        if token == end:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("kind", LM_KINDS)
def test_written_tokens_are_those_of_the_model_alone(language_model, kind):
    """Left-padded in one batch, in batches of two, one by one: what whole passes of the bare model say."""
    model = language_model(kind)
    tokens = generate(model, TEXTS, 8, end_ids=[]).tokens
    end = tokens[1][3]  # a token that some row says: rows leave at different times
    expected = [step_by_step(model, text, 8, end) for text in TEXTS]
    assert len(set(map(len, expected))) > 1
    for batch_size in (1, 2, 64):
        found = generate(model, TEXTS, 8, end_ids=[end], batch_size=batch_size)
        assert found.tokens == expected
        assert found.finished == [len(row) < 8 for row in expected]
        assert found.texts[0] == model.tokenizer.decode(expected[0], skip_special_tokens=True)


def test_first_logits_several_ends_and_encoded_texts(language_model):
    model = language_model()
    batch = model.encode(TEXTS)
    found = generate(model, batch, 4, keep_first_logits=True, batch_size=3)
    last = hooked(model, batch).last[:, -1]
    torch.testing.assert_close(found.first_logits, model.logits(last), atol=1e-4, rtol=1e-4)
    both = generate(model, batch, 4, end_ids=[found.tokens[0][0], found.tokens[1][1]])
    assert both.tokens[0] == [] and both.finished[:2] == [True, True]
    assert generate(model, batch, 4, end_ids=[]).finished == [False] * 4


def test_draws_belong_to_seed_and_place(language_model):
    model = language_model("gpt2")
    first = generate(model, TEXTS, 6, temperature=1.0, seed=1)
    assert first.tokens == generate(model, TEXTS, 6, temperature=1.0, seed=1, batch_size=1).tokens
    assert first.tokens != generate(model, TEXTS, 6, temperature=1.0, seed=2).tokens
    assert generate(model, TEXTS, 6, temperature=1e-4, seed=3).tokens == generate(model, TEXTS, 6).tokens
    with pytest.raises(UserError, match="needs a seeded generator"):
        generate(model, TEXTS, 6, temperature=1.0)
    with pytest.raises(UserError, match="max_new_tokens must be 1 or more"):
        generate(model, TEXTS, 0)
    with pytest.raises(UserError, match="positions are needed"):
        generate(model, ["x" * 125], 8)


def test_batches_of_similar_length():
    batch = left_padded([[1, 2, 3], [4], [5, 6], [7]], pad_id=0)
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    parts = [(rows.tolist(), part.input_ids.tolist()) for rows, part in batch.parts(2)]
    assert parts == [([1, 3], [[4], [7]]), ([2, 0], [[0, 5, 6], [1, 2, 3]])]
    with pytest.raises(UserError, match="batch_size must be 1 or more"):
        list(batch.parts(0))


# --- Imports that cost nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["lm", "lm.terms", "lm.errors", "codi", "codi.protocol", "steering", "lenses", "circuits"]
)
def test_import_without_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'pandas', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["lm", "codi", "steering", "lenses", "circuits"])
def test_lazy_names_are_all_there(package):
    module = __import__(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing
