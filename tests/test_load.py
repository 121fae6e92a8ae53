"""lm.load: folders, hub ids, GGUF files and adapters give the model that was saved; what cannot be loaded says why in
one line; the check at load refuses models whose hooks, cache, padding or parts lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LM_KINDS, make_base, make_tokenizer
from tiny_gguf import tiny_llama, tiny_tokenizer, write_gguf

from lm.adapters import add_adapter
from lm.errors import UserError
from lm.generate import generate
from lm.load import base_of, check_model, load_lm
from lm.model import LanguageModel
from lm.weights import hash_files

TEXTS = ["3+4=?", "Once upon a time there was", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer, as save_pretrained writes it; not to be written."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_base("llama").save_pretrained(path)
    make_tokenizer(named=False).save_pretrained(path)
    return path


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "tiny-llama"))


def logits(model: LanguageModel) -> torch.Tensor:
    found = generate(model, TEXTS, 1, end_ids=(), keep_first_logits=True).first_logits
    assert found is not None
    return found


def refused(message: str, name: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_lm(str(name), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# --- Folders and hub ids ----------------------------------------------------------------------------------------------


def test_a_folder_gives_the_model_that_was_saved(folder, language_model):
    model = load_lm(str(folder))
    assert torch.equal(logits(model), logits(language_model()))
    assert (model.name, model.form, model.dtype, model.attention) == ("tiny-llama", "plain", torch.float32, "sdpa")
    assert model.end_ids == (257,)
    assert model.weights_hash == hash_files([folder / "model.safetensors"])
    half = load_lm(str(folder), dtype="bfloat16", attention="eager", form="response")
    assert (half.form, half.dtype, half.attention) == ("response", torch.bfloat16, "eager")
    torch.testing.assert_close(logits(half).float(), logits(model), atol=0.3, rtol=0.1)


@pytest.mark.parametrize("kind", LM_KINDS)
def test_every_architecture_is_loaded_and_checked(kind, tmp_path, language_model):
    make_base(kind).save_pretrained(tmp_path)
    make_tokenizer(named=False).save_pretrained(tmp_path)
    assert torch.equal(logits(load_lm(str(tmp_path))), logits(language_model(kind)))


def test_a_hub_id_is_read_from_the_hubs_cache(folder, tmp_path, monkeypatch):
    """owner/name in the layout of a local hub cache, offline; the commit identifies the weights."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--someone--tiny"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_lm("someone/tiny")
    assert (model.name, model.weights_hash) == ("someone/tiny", commit)
    assert torch.equal(logits(model), logits(load_lm(str(folder))))
    refused("someone/other could not be loaded as a causal language model", "someone/other")


def test_a_chat_template_is_used_unless_another_form_is_asked_for(own):
    tokenizer = make_tokenizer(named=False)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(own)
    model = load_lm(str(own))
    assert model.form == "chat" and model.text_of("2+2?") == "<|begin_of_text|><user>2+2?<assistant>"
    ids = model.encode([model.text_of("2+2?")]).input_ids[0].tolist()
    assert ids.count(256) == 1, "begin of text comes from the template and once more from the tokenizer"
    plain = load_lm(str(own), form="plain")
    assert plain.text_of("2+2?") == "2+2?"
    assert plain.encode(["2+2?"]).input_ids[0].tolist()[0] == 256


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_gives_the_weights_that_were_written(tmp_path):
    base, tokenizer, path = tiny_llama(), tiny_tokenizer(), tmp_path / "tiny.F32.gguf"
    write_gguf(base, tokenizer, path)
    model, same = load_lm(str(path)), load_lm(str(tmp_path), gguf=path.name)
    expected = LanguageModel(base, tokenizer)
    assert model.tokenizer("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert torch.equal(logits(model), logits(expected)) and torch.equal(logits(same), logits(expected))
    assert model.weights_hash == same.weights_hash == hash_files([path])
    assert model.name == path.name and model.end_ids == (258,)
    # De-quantised weights are saved and loaded again as an ordinary folder.
    model.base.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_lm(str(tmp_path / "saved"))), logits(expected))


def test_quantised_gguf_weights_are_close(tmp_path):
    base, path = tiny_llama(), tmp_path / "tiny.Q8_0.gguf"
    write_gguf(base, tiny_tokenizer(), path, "Q8_0")
    model = load_lm(str(path))
    found, expected = logits(model), logits(LanguageModel(base, tiny_tokenizer()))
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.05


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    """A LoRA adapter of peft with weights that change the numbers, beside its base."""
    torch.manual_seed(5)
    base = load_lm(str(folder)).base
    base.config.name_or_path = str(folder)
    wrapped = add_adapter(base, r=2, alpha=4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged_into_its_base(folder, adapter):
    from peft import PeftModel

    base, model = load_lm(str(folder)), load_lm(str(adapter))
    assert base_of(adapter) == str(folder) and model.name == "adapter"
    wrapped = PeftModel.from_pretrained(load_lm(str(folder)).base, str(adapter))
    ids = base.encode(TEXTS[:1]).input_ids
    with torch.no_grad():
        torch.testing.assert_close(model.base(ids).logits, wrapped(ids).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model.base(ids).logits, base.base(ids).logits, atol=0.1)
    assert len({model.weights_hash, base.weights_hash, hash_files([adapter / "adapter_model.safetensors"])}) == 3
    assert not any("lora" in name for name, _ in model.base.named_parameters())


def test_the_form_beside_an_adapter_is_used(folder, adapter):
    assert load_lm(str(adapter)).form == "plain"
    (adapter / "lm.json").write_text('{"form": "response"}')
    assert load_lm(str(adapter)).form == "response"
    assert load_lm(str(adapter), form="plain").form == "plain"
    (adapter / "lm.json").write_text('{"form": "verse"}')
    refused(r"lm\.json: form must be one of plain, chat, response, got 'verse'", adapter)


def test_a_relative_base_is_looked_for_beside_the_adapter(folder, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(folder, adapter.parent / "base")
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    assert base_of(adapter) == str((adapter.parent / "base").resolve())
    load_lm(str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    refused("names no base model: give base=", adapter)
    assert load_lm(str(adapter), base=str(folder)).name == "adapter"


def test_adapters_that_do_not_fit_are_refused(folder, adapter, tmp_path):
    refused("no adapter: it has no adapter_config.json", folder, base=str(folder))
    make_base("gpt2").save_pretrained(tmp_path / "gpt2")
    make_tokenizer(named=False).save_pretrained(tmp_path / "gpt2")
    refused("could not be loaded as an adapter of", adapter, base=str(tmp_path / "gpt2"))
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    refused("could not be loaded as an adapter of", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    refused("has adapter_config.json but none of", adapter)


# --- What cannot be loaded --------------------------------------------------------------------------------------------


def test_missing_and_damaged_files_are_named(own, tmp_path):
    refused("no model 'no/such/folder': no such folder or file, and a hub id has the form owner/name", "no/such/folder")
    refused("no model './tiny'", "./tiny")
    refused("no model 'a/b.gguf'", "a/b.gguf")
    refused("`make smollm2` fetches it", tmp_path / "smollm2")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("has no config.json: is it a folder of Hugging Face", empty)
    (empty / "x.gguf").write_bytes(b"GGUF")
    refused(r"has no config.json: give the file itself, such as .*x\.gguf", empty)
    refused("has no file y.gguf", empty, gguf="y.gguf")
    refused("could not be loaded as a causal language model", empty / "x.gguf")
    (own / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    load_refused = "git-lfs pointer, not the file itself|could not be loaded as a causal language model"
    refused(load_refused, own)
    (own / "model.safetensors").unlink()
    refused("none of model.safetensors", own)


def test_a_model_that_is_no_causal_decoder_is_refused(own):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "t5", "architectures": ["T5Model"]}))
    refused("could not be loaded as a causal language model", own)


def test_a_folder_without_a_tokenizer_says_so(own):
    for path in own.glob("tokenizer*"):
        path.unlink()
    refused("the tokenizer of .* could not be loaded", own)


def test_parts_can_be_named_and_wrong_names_are_refused(folder):
    model = load_lm(str(folder), blocks="model.layers", norm="model.norm")
    assert torch.equal(logits(model), logits(load_lm(str(folder))))
    refused("blocks='model.blocks': LlamaForCausalLM has no part of that name", folder, blocks="model.blocks")


# --- The check --------------------------------------------------------------------------------------------------------


def broken(how: str) -> LanguageModel:
    base = make_base("llama")
    blocks = base.model.layers
    if how in ("hooks", "head"):
        forward = base.forward

        def reported(*args: Any, **given: Any) -> Any:
            output = forward(*args, **given)
            if how == "head":
                output.logits = 2 * output.logits
            elif output.hidden_states is not None:
                output.hidden_states = tuple(1.01 * states for states in output.hidden_states)
            return output

        base.forward = reported
    if how == "idle":  # blocks that the model does not run
        model = LanguageModel(base, make_tokenizer(named=False), name="broken")
        model.blocks = make_base("llama").model.layers
        return model
    if how == "padding":
        attention = blocks[1].self_attn
        whole = attention.forward
        attention.forward = lambda *args, **given: whole(*args, **{**given, "attention_mask": None})
    if how == "cache":
        blocks[0].register_forward_pre_hook(_counts_positions_anew, with_kwargs=True)
    if how == "parts":
        first: list[torch.Tensor] = []
        blocks[0].register_forward_pre_hook(lambda module, args: first.__setitem__(slice(None), [args[0]]))
        blocks[2].mlp.register_forward_hook(lambda module, args, output: output + 0.5 * first[0])
    return LanguageModel(base, make_tokenizer(named=False), name="broken")


def _counts_positions_anew(module: Any, args: Any, given: dict[str, Any]) -> Any:
    cos, sin = given["position_embeddings"]
    length = cos.shape[1]
    angles = torch.arange(length, dtype=cos.dtype)[None, :, None].expand_as(cos)
    return args, {**given, "position_embeddings": (angles.cos(), angles.sin())}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("hooks", "a hook on a block sees other numbers than the model's hidden_states"),
        ("idle", "hooks showed 1 of 4 layers"),
        ("head", "norm and unembedding give other logits"),
        ("padding", "a text in a padded batch gives other numbers than alone"),
        ("cache", "the cache changes the numbers"),
        ("parts", "blocks above layer 1 run apart from those below give other logits"),
    ],
)
def test_the_check_catches_a_broken_model(how, message):
    check_model(LanguageModel(make_base("llama"), make_tokenizer(named=False)))
    with pytest.raises(UserError, match=f"broken cannot be used: {message}") as caught:
        check_model(broken(how))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["model", "pre_tokenizer", "added_tokens", ""])
def test_a_damaged_tokenizer_is_refused_in_one_line(own, part):
    """Also where the tokenizers library raises bare `Exception` (a model or a pre-tokenizer of an unknown kind)."""
    path = own / "tokenizer.json"
    record = json.loads(path.read_text())
    if part:
        record[part] = {"type": "Nobody"} if part != "added_tokens" else "none"
    path.write_text(json.dumps(record) if part else '{"version": 1')
    with pytest.raises(UserError, match="the tokenizer of .* could not be loaded") as error:
        load_lm(str(own))
    assert "\n" not in str(error.value)
