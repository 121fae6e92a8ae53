"""Loading is strict, safe and faithful: merged = reference sum, every bad file gives one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import KINDS, LORA_ALPHA, LORA_R, VOCABULARY, make_base, make_state, make_tokenizer
from safetensors.torch import load_file, save_file

from codi import CheckpointError, Protocol, UserError, load_codi, save_checkpoint
from codi.known import KNOWN
from codi.protocol import answer_only, original

FAMILY_OF = {
    "llama": "answer-only",
    "gpt2": "original",
    "qwen2": "original-eos",
    "qwen3": "original",
    "mistral": "original",
}


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """A copy of a tiny checkpoint to damage: copied(kind, family) -> folder with `base/` and `checkpoint/`."""

    def copy(kind="llama", family="answer-only"):
        return Path(shutil.copytree(tiny_checkpoint(kind, family), tmp_path / f"{kind}-{family}"))

    return copy


def load(folder, **options):
    return load_codi(folder / "checkpoint", base=options.pop("base", folder / "base"), **options)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


# --- What is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_base_plus_scaled_product(tiny_checkpoint, tiny_model, kind):
    family = FAMILY_OF[kind]
    model = tiny_model(kind, family)
    state = make_state(make_base(kind), 1)
    pairs = [key.removesuffix(".lora_A.default.weight") for key in state if key.endswith("lora_A.default.weight")]
    assert len(pairs) == (8 if kind == "gpt2" else 21)
    for key in pairs:
        delta = LORA_ALPHA / LORA_R * state[f"{key}.lora_B.default.weight"] @ state[f"{key}.lora_A.default.weight"]
        expected = state[f"{key}.base_layer.weight"] + (delta.T if kind == "gpt2" else delta)
        found = model.base.get_parameter(key.removeprefix("codi.base_model.model.") + ".weight")
        torch.testing.assert_close(found.data, expected)
    plain = [key for key in state if "lora_" not in key and "base_layer.weight" not in key and "prj" not in key]
    for key in plain:
        found = model.base.state_dict()[key.removeprefix("codi.base_model.model.").replace(".base_layer", "")]
        assert torch.equal(found, state[key]), key
    for key, value in model.prj.state_dict().items():
        assert torch.equal(value, state[f"prj.{key}"]), key
    assert model.vocab_size == VOCABULARY + 3
    tied = kind != "mistral"
    assert (model.base.get_output_embeddings().weight is model.base.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_lora_kept_apart_computes_the_same(tiny_model, questions, kind):
    merged, apart = tiny_model(kind), tiny_model(kind, merge_lora=False)
    assert any("lora_A" in name for name, _ in apart.base.named_parameters())
    assert not any("lora" in name for name, _ in merged.base.named_parameters())
    states = [m.rollout(m.encode(questions), n_latents=2).states for m in (merged, apart)]
    torch.testing.assert_close(states[0], states[1], atol=1e-4, rtol=0)
    without = tiny_model(kind, lora_alpha=0.0).rollout(merged.encode(questions), n_latents=2).states
    assert (without - states[0]).abs().max() > 0.1, "control: LoRA matters"


def test_bfloat16_is_the_rounded_float32_merge(tiny_model):
    exact, rounded = tiny_model(), tiny_model(dtype="bfloat16")
    assert rounded.dtype == torch.bfloat16
    for name, value in exact.base.named_parameters():
        assert torch.equal(rounded.base.get_parameter(name).data, value.data.bfloat16()), name
    assert all(value.dtype == torch.bfloat16 for value in rounded.prj.parameters())


def test_hash_is_that_of_the_weight_file(tiny_checkpoint, codi_model):
    file = tiny_checkpoint() / "checkpoint" / "pytorch_model.bin"
    assert codi_model.checkpoint_hash == hashlib.sha256(file.read_bytes()).hexdigest()


def test_one_of_two_tied_weights_is_enough_and_they_must_agree(copied, tiny_model, questions):
    """safetensors files written by a trainer hold a tied weight once."""
    folder = copied("llama", "original")
    file = folder / "checkpoint" / "model.safetensors"
    state = load_file(file)
    head, embedding = "codi.base_model.model.lm_head.weight", "codi.base_model.model.model.embed_tokens.weight"
    expected = tiny_model("llama", "original").answer(questions, max_new_tokens=4)
    for dropped in (head, embedding):
        save_file({key: value for key, value in state.items() if key != dropped}, file)
        assert load(folder, lora_alpha=LORA_ALPHA).answer(questions, max_new_tokens=4) == expected
    save_file({key: value for key, value in state.items() if key not in (head, embedding)}, file)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert error.value.missing == [embedding]
    save_file({**state, head: state[head] + 1}, file)
    with pytest.raises(UserError, match="lm_head.weight .* differ, but the base model ties them"):
        load(folder)


def test_sharded_files(copied, tiny_model, questions):
    folder = copied("gpt2", "original")
    file = folder / "checkpoint" / "model.safetensors"
    state = load_file(file)
    keys = sorted(state)
    shards = {"model-1.safetensors": keys[: len(keys) // 2], "model-2.safetensors": keys[len(keys) // 2 :]}
    for shard, names in shards.items():
        save_file({key: state[key] for key in names}, folder / "checkpoint" / shard)
    index = {"weight_map": {key: shard for shard, names in shards.items() for key in names}}
    file.unlink()
    (folder / "checkpoint" / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load(folder, lora_alpha=LORA_ALPHA)
    expected = tiny_model("gpt2", "original").rollout(model.encode(questions)).states
    assert torch.equal(model.rollout(model.encode(questions)).states, expected)
    (folder / "checkpoint" / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 weight files: model-2.safetensors"):
        load(folder)


def test_the_auxiliary_decoder_of_sim_cot_is_left_out(copied):
    folder = copied("gpt2", "original")
    file = folder / "checkpoint" / "model.safetensors"
    state = load_file(file)
    extra = {"decoder.wte.weight": torch.zeros(3, 3), "pj_in.weight": torch.zeros(2, 2), "pj_out.U": torch.zeros(2, 1)}
    save_file({**state, **extra}, file)
    load(folder)
    save_file({**state, "pj_in.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match="1 unexpected: pj_in.weight"):
        load(folder)


# --- Saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safetensors", [False, True])
def test_saved_checkpoint_loads_by_itself(tmp_path, tiny_model, questions, safetensors, monkeypatch):
    base, state = make_base("llama"), make_state(make_base("llama"), 1)
    protocol = answer_only(VOCABULARY, VOCABULARY + 1, VOCABULARY + 2, 257)
    folder = save_checkpoint(
        tmp_path / "saved",
        state,
        base,
        make_tokenizer(True),
        protocol,
        LORA_R,
        LORA_ALPHA,
        n_latents=3,
        safetensors=safetensors,
    )
    settings = json.loads((folder / "codi.json").read_text())
    assert settings["base"] == "base" and settings["lora_alpha"] == LORA_ALPHA and settings["prj_dim"] == 24
    monkeypatch.chdir(tmp_path)  # paths in codi.json are relative to the folder, not to the caller
    model = load_codi("saved")
    reference = tiny_model()
    assert (model.n_latents, model.protocol) == (3, protocol) and reference.protocol == protocol
    runs = [m.rollout(m.encode(questions)).states for m in (model, reference)]
    assert torch.equal(runs[0], runs[1])
    # the published code: AutoModel from base/, resized by three, then the state dict under its own names
    from transformers import AutoModelForCausalLM

    published = AutoModelForCausalLM.from_pretrained(folder / "base")
    published.resize_token_embeddings(VOCABULARY + 3)
    assert published.get_input_embeddings().weight.shape == state["codi.base_model.model.lm_head.weight"].shape

    settings["lora_r"] = 9
    (folder / "codi.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="says lora_r 9, the weights have 4"):
        load_codi(folder)
    shutil.rmtree(folder / "base")
    with pytest.raises(UserError, match="base is missing"):
        load_codi(folder)
    (folder / "codi.json").write_text("{")
    with pytest.raises(UserError, match="codi.json is not readable JSON"):
        load_codi(folder)


def test_saving_checks_the_width(tmp_path):
    protocol = original(VOCABULARY, 257)
    with pytest.raises(UserError, match="prj_dim is 7"):
        save_checkpoint(
            tmp_path, make_state(make_base("gpt2")), make_base("gpt2"), make_tokenizer(False), protocol, 4, 2, prj_dim=7
        )
    assert list(tmp_path.iterdir()) == []


# --- Keys -------------------------------------------------------------------------------------------------------------


def edited(folder, change):
    file = folder / "checkpoint" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    return error.value, one_line(error)


LAYER = "codi.base_model.model.model.layers.1."


@pytest.mark.parametrize(
    "key",
    [
        LAYER + "self_attn.q_proj.lora_A.default.weight",
        LAYER + "self_attn.q_proj.lora_B.default.weight",
        LAYER + "mlp.up_proj.base_layer.weight",
        LAYER + "input_layernorm.weight",
        "codi.base_model.model.model.norm.weight",
        "prj.3.bias",
        "prj.ln.weight",
    ],
)
def test_every_missing_key_is_listed(copied, key):
    error, text = edited(copied(), lambda state: state.pop(key))
    assert (error.missing, error.unexpected, error.misshapen) == ([key], [], {})
    assert f"1 missing: {key}" in text


def test_a_layer_whose_lora_is_gone_altogether_is_missing_it(copied):
    def change(state):
        del state[LAYER + "mlp.up_proj.lora_A.default.weight"], state[LAYER + "mlp.up_proj.lora_B.default.weight"]
        state[LAYER + "mlp.up_proj.weight"] = state.pop(LAYER + "mlp.up_proj.base_layer.weight")

    error, _ = edited(copied(), change)
    assert len(error.missing) == 3 and error.unexpected == [LAYER + "mlp.up_proj.weight"]


def test_unexpected_and_misshapen_keys_are_listed(copied):
    def change(state):
        state["codi.extra.weight"] = torch.zeros(2)
        state["prj.3.bias"] = torch.zeros(5)
        state[LAYER + "self_attn.k_proj.lora_B.default.weight"] = torch.zeros(3, 4)

    error, text = edited(copied(), change)
    assert error.unexpected == ["codi.extra.weight"]
    assert error.misshapen == {
        LAYER + "self_attn.k_proj.lora_B.default.weight": ((3, 4), (16, 4)),
        "prj.3.bias": ((5,), (32,)),
    }
    assert "prj.3.bias is (5,), should be (32,)" in text


def test_wrong_base_model(copied, tiny_checkpoint):
    folder = copied("llama", "original")
    with pytest.raises(CheckpointError, match="is this the right base model"):
        load(folder, base=tiny_checkpoint("gpt2", "original") / "base")
    with pytest.raises(CheckpointError) as error:  # mistral: the same shapes, but an untied head of its own is no error
        load(folder, base=tiny_checkpoint("qwen2", "original-eos") / "base")
    assert error.value.missing, "qwen2 has biases that the checkpoint lacks"
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY + 10}))
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert list(error.value.misshapen) == [
        "codi.base_model.model.lm_head.weight",
        "codi.base_model.model.model.embed_tokens.weight",
    ]


def test_numbers_that_are_not_finite(copied):
    folder = copied("gpt2", "original")
    file = folder / "checkpoint" / "model.safetensors"
    state = load_file(file)
    state["prj.1.bias"][2] = float("nan")
    save_file(state, file)
    with pytest.raises(UserError, match="prj.1.bias holds numbers that are not finite"):
        load(folder)


# --- Tokenizers and protocols -----------------------------------------------------------------------------------------


def test_tokenizer_without_the_tokens(copied):
    folder = copied()
    make_tokenizer(named=False).save_pretrained(folder / "checkpoint")
    with pytest.raises(UserError, match=r"lacks \[PAD\], <\|bocot\|>, <\|eocot\|>.*protocol='original'") as error:
        load(folder)
    one_line(error)
    assert load(folder, protocol="original").protocol == original(VOCABULARY, 257)
    with pytest.raises(UserError, match=r"lacks \[PAD\]"):
        load(copied("gpt2", "original"), protocol="answer-only")


def test_protocol_can_be_given(tiny_checkpoint):
    folder = tiny_checkpoint("gpt2", "original")
    mine = Protocol("mine", 258, 259, 260, 257, before_latents=(5, 259), after_latents=(260, 6))
    model = load(folder, protocol=mine)
    assert model.encode(["a"]).input_ids[0, -2:].tolist() == [5, 259]
    with pytest.raises(UserError, match="original, original-eos, answer-only or a Protocol, got 'coconut'"):
        load(folder, protocol="coconut")
    outside = Protocol("mine", 999, 259, 260, 257, before_latents=(259,), after_latents=(260,))
    with pytest.raises(UserError, match="uses token 999, the vocabulary has ids 0..260"):
        load(folder, protocol=outside)


def test_a_copy_of_a_published_checkpoint_is_known_by_its_name(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("gpt2", "original")
    shutil.copytree(folder / "checkpoint", tmp_path / "CODI-gpt2")
    make_tokenizer(named=False).save_pretrained(
        tmp_path / "CODI-gpt2"
    )  # a tokenizer without the tokens is no matter here
    assert load_codi(tmp_path / "CODI-gpt2", base=folder / "base").protocol.name == "original"
    known = KNOWN["bcywinski/codi_llama1b-answer_only"]
    assert (known.base, known.protocol) == ("meta-llama/Llama-3.2-1B-Instruct", "answer-only")
    assert (known.lora_r, known.lora_alpha) == (128, 32)
    assert set(KNOWN) >= {"zen-E/CODI-llama3.2-1b-Instruct", "zen-E/CODI-gpt2"}


# --- Files ------------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [None, 2, 4], ids=["torch.save", "pickle 2", "pickle 4"])
def test_a_pickle_with_code_is_refused(copied, tmp_path, protocol):
    folder, marker = copied(), tmp_path / "ran"
    file = folder / "checkpoint" / "pytorch_model.bin"
    if protocol is None:
        torch.save({"prj.1.weight": Evil(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"prj.1.weight": Evil(marker)}, protocol=protocol))
    with pytest.raises(UserError, match="is refused: .* could run code") as error:
        load(folder)
    one_line(error)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "control: unpickled by hand, it does run"


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize(("kind", "family"), [("llama", "answer-only"), ("gpt2", "original")])
def test_truncated_files(copied, kind, family, keep):
    folder = copied(kind, family)
    file = folder / "checkpoint" / ("pytorch_model.bin" if kind == "llama" else "model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match="truncated or corrupt") as error:
        load(folder)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("content", [b"not a checkpoint at all", b"\x00" * 2000, b"version of something\n"])
@pytest.mark.parametrize(("kind", "family"), [("llama", "answer-only"), ("gpt2", "original")])
def test_corrupt_files(copied, kind, family, content):
    folder = copied(kind, family)
    file = folder / "checkpoint" / ("pytorch_model.bin" if kind == "llama" else "model.safetensors")
    file.write_bytes(content)
    with pytest.raises(UserError, match="truncated or corrupt") as error:
        load(folder)
    one_line(error)


def test_a_file_without_a_state_dict(copied):
    folder = copied()
    torch.save({"weights": {"a": torch.zeros(1)}, "epoch": 3}, folder / "checkpoint" / "pytorch_model.bin")
    with pytest.raises(UserError, match="does not hold a state dict"):
        load(folder)


def test_folders(copied, tmp_path):
    folder = copied()
    for path, message in (
        (tmp_path / "nowhere", "does not exist"),
        ("checkpoints/nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        (folder / "base" / "config.json", "is a file"),
        (folder, "holds no CODI weights"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_codi(path, base=folder / "base")
        one_line(error)
    with pytest.raises(UserError, match="give base="):
        load_codi(folder / "checkpoint")
    with pytest.raises(UserError, match="no readable config.json"):
        load_codi(folder / "checkpoint", base=folder / "checkpoint")
    (folder / "checkpoint" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no readable tokenizer"):
        load(folder)


def test_hub_ids_while_offline(tiny_checkpoint, tmp_path, monkeypatch):
    """With an empty download cache: says what to download and where to put it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = []
    folder = tiny_checkpoint("gpt2", "original") / "checkpoint"
    for path, base in (("zen-E/CODI-gpt2", None), ("someone/something", "x"), (folder, "openai-community/gpt2")):
        with pytest.raises(UserError) as error:
            load_codi(path, base=base)
        lines.append(one_line(error))
    assert "hf download zen-E/CODI-gpt2 --local-dir checkpoints/CODI-gpt2" in lines[0]
    assert "openai-community/gpt2" in lines[0] and "base=" in lines[0]
    assert "hf download someone/something" in lines[1]
    assert "give base=checkpoints/gpt2" in lines[2]


def test_hub_ids_are_downloaded(tiny_checkpoint, monkeypatch):
    """With the download replaced: both repositories are asked for, and what they give is loaded."""
    folder = tiny_checkpoint("gpt2", "original")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(folder / ("checkpoint" if name == "zen-E/CODI-gpt2" else "base"))

    monkeypatch.setattr("codi.places.snapshot_download", download)
    model = load_codi("zen-E/CODI-gpt2", lora_alpha=LORA_ALPHA)
    assert [name for name, _ in asked] == ["zen-E/CODI-gpt2", "openai-community/gpt2"]
    assert "*.safetensors" in asked[0][1] and not any("safetensors" in p for p in asked[1][1]), "no weights of the base"
    assert (model.name, model.protocol.name) == ("zen-E/CODI-gpt2", "original")


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "float32, bfloat16, float16, got 'int8'"),
        ({"mask": "none"}, "'carried' or 'published', got 'none'"),
        ({"rope": "exact"}, "'float32' or 'published', got 'exact'"),
        ({"rope": "published"}, "needs dtype='bfloat16'"),
        ({"attention": "flash"}, "'sdpa' or 'eager', got 'flash'"),
        ({"device": "abacus"}, "got 'abacus'"),
    ],
)
def test_impossible_options(tiny_checkpoint, options, message):
    with pytest.raises(UserError, match=message):
        load(tiny_checkpoint(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_where_there_is_none(tiny_checkpoint):
    with pytest.raises(UserError, match="no CUDA device"):
        load(tiny_checkpoint(), device="cuda")


def test_the_check_at_load_catches_a_base_that_mistreats_its_cache(tiny_checkpoint, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def forgetful(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            kwargs["position_ids"] = kwargs["position_ids"] * 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forgetful)
    with pytest.raises(UserError, match="other states with its cache than without"):
        load(tiny_checkpoint())
    load(tiny_checkpoint(), check=False)
