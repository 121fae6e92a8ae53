"""Checkpoints as people really have them: golden cases stored in other ways. Each loads to the same numbers and says
what was done (`model.notes`), or is refused in one line that names what is wrong and the next step."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from codi import CheckpointError, UserError, load_codi, save_checkpoint
from codi.decode import decode_answers

LLAMA, ORIGINAL, GPT2 = "llama_answer_only", "llama_original", "gpt2_original"
WRAPPER = "codi.base_model.model."
LAST = 2e-3  # what rounding grows to at the last latent (golden/README.md)
State = dict[str, Tensor]


def read(folder: Path) -> State:
    if (folder / "pytorch_model.bin").exists():
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def write(folder: Path, state: Any) -> None:
    if (folder / "pytorch_model.bin").exists():
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


@pytest.fixture
def odd(golden, tmp_path):
    """odd(case, change of the state dict, adapter={…}, **options) -> the model of the changed copy."""

    def make(name: str, change: Callable[[State], Any] | None = None, adapter: Any = None, **options: Any):
        case = golden(name)
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(case.folder / "checkpoint", folder)
        if change is not None:
            write(folder, change(read(folder)))
        if adapter is not None:
            (folder / "adapter_config.json").write_text(json.dumps(adapter))
        given_ = {"protocol": case.expected["protocol_name"], "lora_alpha": case.expected["lora_alpha"], **options}
        return load_codi(folder, base=given_.pop("base", case.folder / "base"), **given_)

    return make


def states(model, case):
    return model.rollout(model.encode(case.expected["texts"]), n_latents=6).states


def same(found, golden, name):
    case = golden(name)
    expected = case.load()
    torch.testing.assert_close(states(found, case), states(expected, case), atol=LAST, rtol=0)
    texts = case.expected["texts"]
    assert found.answer(texts, max_new_tokens=5) == expected.answer(texts, max_new_tokens=5)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 3000
    return text


# --- 10: names and wrappings ---


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_left_out(odd, golden, before):
    model = odd(LLAMA, lambda state: {before + key: value for key, value in state.items()})
    same(model, golden, LLAMA)
    for part in ("module.", "_orig_mod."):
        assert any(f"{part!r} was left out of" in note for note in model.notes) == (part in before)


def test_prefixes_inside_names(odd, golden):
    """torch.compile of the base model alone."""
    model = odd(ORIGINAL, lambda s: {k.replace(WRAPPER, WRAPPER + "_orig_mod."): v for k, v in s.items()})
    same(model, golden, ORIGINAL)
    assert any("'_orig_mod.' was left out" in note for note in model.notes)


def test_one_name_twice_after_that(odd):
    with pytest.raises(UserError, match="prj.1.bias and module.prj.1.bias are one name twice"):
        odd(LLAMA, lambda state: {**state, "module.prj.1.bias": state["prj.1.bias"]})


@pytest.mark.parametrize("name", ["state_dict", "model"])
def test_a_state_dict_inside(odd, golden, name):
    model = odd(LLAMA, lambda state: {name: state, "step": 5, "epoch": 1.5})
    same(model, golden, LLAMA)
    assert any(f"taken from {name!r}, without epoch, step" in note for note in model.notes)


def test_other_wrappings_stay_refused(odd):
    with pytest.raises(UserError, match="two state dicts, under 'state_dict' and 'model'"):
        odd(LLAMA, lambda state: {"model": state, "state_dict": state})
    with pytest.raises(UserError, match="does not hold a state dict"):
        odd(LLAMA, lambda state: {"weights": state})
    with pytest.raises(UserError, match="does not hold a state dict"):
        odd(LLAMA, lambda state: {"model": {"model": state}})
    with pytest.raises(UserError, match="does not hold a state dict"):
        odd(LLAMA, lambda state: {1: torch.zeros(2)})


def test_old_buffers_are_left_out(odd, golden):
    frequencies = {f"{WRAPPER}model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    frequencies[f"{WRAPPER}model.rotary_emb.inv_freq"] = torch.ones(8)
    model = odd(ORIGINAL, lambda state: {**state, **frequencies})
    same(model, golden, ORIGINAL)
    assert [note for note in model.notes if "buffers of old versions" in note and all(k in note for k in frequencies)]
    masks = {f"{WRAPPER}transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
    masks[f"{WRAPPER}transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    model = odd(GPT2, lambda state: {**state, **masks})
    same(model, golden, GPT2)
    assert any("attn.masked_bias" in note for note in model.notes)


@pytest.mark.parametrize("key", ["transformer.h.0.attn.extra", "transformer.h.9.attn.bias", "rotary_emb.inv_freq"])
def test_other_buffers_are_not(odd, key):
    with pytest.raises(CheckpointError) as error:
        odd(GPT2, lambda state: {**state, WRAPPER + key: torch.ones(2)})
    if "rotary" not in key:
        assert error.value.unexpected == [WRAPPER + key]


# --- 11: rows ---


def with_rows(extra: int) -> Callable[[State], State]:
    ends = ("embed_tokens.weight", "lm_head.weight", "wte.weight")

    def change(state: State) -> State:
        for key in [key for key in state if key.endswith(ends)]:
            rows = state[key]
            state[key] = torch.cat([rows, 50 * rows[:1].expand(extra, -1)]) if extra > 0 else rows[:extra]
        return state

    return change


@pytest.mark.parametrize("name", [ORIGINAL, GPT2])
def test_padded_vocabularies_of_the_original_family(odd, golden, name):
    """The rows are never an answer, however large their logits."""
    model = odd(name, with_rows(61))
    same(model, golden, name)
    assert any("61 rows beyond V + 3" in note for note in model.notes)
    plain = golden(name).load()
    assert model.vocab_size == plain.vocab_size + 61
    assert model.protocol.excluded_logits == (
        *plain.protocol.excluded_logits,
        *range(plain.vocab_size, plain.vocab_size + 61),
    )
    run = model.rollout(model.encode(golden(name).expected["texts"]))
    assert decode_answers(model, run, 1, keep_first_logits=True).first_logits.argmax(1).max() >= plain.vocab_size


def test_other_numbers_of_rows_stay_refused(odd):
    for extra in (-3, -1, 600):
        with pytest.raises(CheckpointError) as error:
            odd(ORIGINAL, with_rows(extra))
        assert set(error.value.misshapen) == {WRAPPER + "model.embed_tokens.weight", WRAPPER + "lm_head.weight"}


# --- 12: projection and LoRA ---


def test_projection_without_layernorm(odd, golden):
    model = odd(LLAMA, lambda state: {k: v for k, v in state.items() if not k.startswith("prj.ln")})
    assert "the projection has no LayerNorm" in model.notes
    full = golden(LLAMA).load().prj
    h = torch.randn(3, model.d_model)
    by_hand = torch.nn.functional.gelu(h @ full.get_submodule("1").weight.T + full.get_submodule("1").bias)
    by_hand = by_hand @ full.get_submodule("3").weight.T + full.get_submodule("3").bias
    torch.testing.assert_close(model.project(h), by_hand)
    model.answer(golden(LLAMA).expected["texts"][:2], max_new_tokens=3)


def test_no_projection(odd, golden, tmp_path):
    model = odd(LLAMA, lambda state: {k: v for k, v in state.items() if not k.startswith("prj.")})
    assert any(note.startswith("no projection") for note in model.notes)
    run = model.rollout(model.encode(golden(LLAMA).expected["texts"][:2]), 3)
    assert torch.equal(run.embeddings, run.states[:, :-1])
    for missing in ("prj.ln.weight", "prj.3.bias"):
        with pytest.raises(CheckpointError, match=f"1 missing: {missing}"):
            odd(LLAMA, lambda state, key=missing: {k: v for k, v in state.items() if k != key})


def test_saved_without_projection(golden, tmp_path):
    case = golden(LLAMA)
    model = case.load()
    state = {k: v for k, v in read(case.folder / "checkpoint").items() if not k.startswith("prj.")}
    given_ = (str(case.folder / "base"), model.tokenizer, model.protocol, case.expected["lora_r"], 1)
    folder = save_checkpoint(tmp_path / "s", state, *given_)
    assert len(load_codi(folder).prj) == 0
    settings_ = json.loads((folder / "codi.json").read_text())
    (folder / "codi.json").write_text(json.dumps({**settings_, "prj_dim": 24}))
    with pytest.raises(UserError, match="says prj_dim 24, the weights have no projection"):
        load_codi(folder)


def doubled_rank(state: State) -> State:
    """One module of twice the rank that computes the same: A twice; B once and zeros, doubled for the halved scale."""
    key = next(key for key in state if key.endswith("lora_A.default.weight"))
    other = key.replace("lora_A", "lora_B")
    state[key] = torch.cat([state[key], state[key]])
    state[other] = 2 * torch.cat([state[other], torch.zeros_like(state[other])], dim=1)
    return state


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", [LLAMA, GPT2])
def test_another_rank_in_one_module(odd, golden, name, merge):
    same(odd(name, doubled_rank, merge_lora=merge), golden, name)


def without_lora(layer: str) -> Callable[[State], State]:
    def change(state: State) -> State:
        kept = {k: v for k, v in state.items() if not (layer in k and "lora_" in k)}
        return {k.replace(".base_layer", "") if layer in k else k: v for k, v in kept.items()}

    return change


@pytest.mark.parametrize("merge", [True, False])
def test_lora_on_some_blocks(odd, golden, merge):
    """The same as LoRA with B = 0 there."""
    model = odd(LLAMA, without_lora(".layers.1."), merge_lora=merge)
    assert "blocks without LoRA: model.layers.1" in model.notes

    def zero(state: State) -> State:
        return {k: v * 0 if ".layers.1." in k and "lora_B" in k else v for k, v in state.items()}

    case = golden(LLAMA)
    torch.testing.assert_close(states(model, case), states(odd(LLAMA, zero), case), atol=LAST, rtol=0)
    assert not torch.allclose(states(model, case), states(case.load(), case), atol=1e-2), "control: it matters"


# --- 5: adapter_config.json ---


def known(golden, name: str) -> tuple[int, float]:
    return golden(name).expected["lora_r"], golden(name).expected["lora_alpha"]


def test_alpha_of_the_adapter_config(odd, golden):
    r, alpha = known(golden, LLAMA)
    found = odd(LLAMA, adapter={"peft_type": "LORA", "r": r, "lora_alpha": alpha * 3}, lora_alpha=None)
    case = golden(LLAMA)
    expected = case.load(lora_alpha=alpha * 3)
    torch.testing.assert_close(states(found, case), states(expected, case), atol=0, rtol=0)
    assert f"LoRA scale {3 * alpha / r:g} by adapter_config.json" in found.notes


def test_a_given_alpha_wins_and_is_said(odd, golden):
    r, alpha = known(golden, LLAMA)
    config = {"r": r, "lora_alpha": 999, "alpha_pattern": {"q_proj": 7}}
    found = odd(LLAMA, adapter=config, lora_alpha=alpha)
    same(found, golden, LLAMA)
    assert f"lora_alpha {alpha:g} was given and is used; adapter_config.json says 7, 999" in found.notes


@pytest.mark.parametrize("merge", [True, False])
def test_rank_stabilised_scale(odd, golden, merge):
    r, alpha = known(golden, GPT2)
    config = {"r": r, "lora_alpha": alpha / math.sqrt(r), "use_rslora": True}
    found = odd(GPT2, adapter=config, lora_alpha=None, merge_lora=merge)
    same(found, golden, GPT2)
    assert any("(rank-stabilised)" in note for note in found.notes)


@pytest.mark.parametrize("merge", [True, False])
def test_patterns(odd, golden, merge):
    """Patterns as peft matches them: rank of one module, alpha of a kind in one block."""
    r, alpha = known(golden, LLAMA)

    def change(state: State) -> State:
        key = WRAPPER + "model.layers.1.mlp.up_proj.lora_{}.default.weight"
        a, b = state[key.format("A")], state[key.format("B")]
        state[key.format("A")] = torch.cat([a, a])
        state[key.format("B")] = torch.cat([b, b * 0], dim=1)
        state[WRAPPER + "model.layers.0.self_attn.q_proj.lora_B.default.weight"] /= 4
        return state

    config = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {"layers.1.mlp.up_proj": 2 * r},
        "alpha_pattern": {r".*\.1\.mlp\.up_proj": 2 * alpha, "model.layers.0.self_attn.q_proj": 4 * alpha},
    }
    same(odd(LLAMA, change, adapter=config, lora_alpha=None, merge_lora=merge), golden, LLAMA)
    with pytest.raises(UserError, match=f"says rank {r} of model.layers.1.mlp.up_proj, the weights have {2 * r}"):
        odd(LLAMA, change, adapter={**config, "rank_pattern": {}}, lora_alpha=None)


def test_targets_say_which_modules_carry_lora(odd, golden):
    r, alpha = known(golden, LLAMA)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"r": r, "lora_alpha": alpha}
    for targets in (every, r".*(_proj)", "all-linear"):
        same(odd(LLAMA, adapter={**config, "target_modules": targets}, lora_alpha=None), golden, LLAMA)
    with pytest.raises(CheckpointError) as error:
        odd(LLAMA, adapter={**config, "target_modules": every[:-1]}, lora_alpha=None)
    assert error.value.unexpected and all("down_proj" in key for key in error.value.unexpected)
    only = {**config, "target_modules": every, "layers_to_transform": [0, 2, 3]}
    assert odd(LLAMA, without_lora(".layers.1."), adapter=only, lora_alpha=None)
    with pytest.raises(CheckpointError):
        odd(LLAMA, adapter=only, lora_alpha=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is not supported"),
        (
            {"layer_replication": [[0, 1]], "trainable_token_indices": [3]},
            "layer_replication, trainable_token_indices",
        ),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, 0 or more, got '16'"),
        ({"r": 0}, "r must be a whole number, 1 or more, got 0"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern must be a regular expression .*got '\('"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ([], "must hold one JSON object"),
        ({"r": 99}, "says rank 99 of .*, the weights have"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(odd, config, message):
    with pytest.raises(UserError, match=message) as error:
        odd(LLAMA, adapter=config)
    assert "adapter_config.json" in one_line(error)


def test_two_files_that_disagree(golden, tmp_path):
    case = golden(LLAMA)
    r, alpha = known(golden, LLAMA)
    model = case.load()
    state, base = read(case.folder / "checkpoint"), str(case.folder / "base")
    folder = save_checkpoint(tmp_path / "s", state, base, model.tokenizer, model.protocol, r, alpha)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha + 1}))
    with pytest.raises(UserError, match=f"codi.json says lora_alpha {alpha}.*_config.json says .*: give lora_alpha="):
        load_codi(folder)
    assert load_codi(folder, lora_alpha=alpha).notes[0].startswith(f"lora_alpha {alpha:g} was given and is used")


# --- 6: control tokens in a question ---


@pytest.mark.parametrize("token", ["<|eocot|>", "[PAD]", "<|eot_id|>", "<|begin_of_text|>"])
def test_control_text_in_a_question_is_plain_text(codi_model, tiny_model, token):
    """The default writes its characters; the published way makes it the token."""
    text = f"What is {token} plus 3?"
    published = tiny_model(control_text="published")
    special = codi_model.tokenizer.convert_tokens_to_ids(token)
    plain = codi_model.encode([text, "3+4=?"])
    after = codi_model.protocol.before("latent")
    row = plain.input_ids[0][plain.attention_mask[0]].tolist()[: -len(after)]
    assert row[0] == 256 and special not in row[1:], "one begin of text, put there by the tokenizer"
    assert codi_model.tokenizer.decode(row[1:]) == text
    as_token = published.encode([text])
    assert special in as_token.input_ids[0].tolist()[1 : -len(after)]
    expected = codi_model.tokenizer(text)["input_ids"]
    assert as_token.input_ids[0].tolist() == [*expected, *after]
    for model in (codi_model, published):
        ordinary = ["3+4=?", "Tom has 12 pens"]
        assert torch.equal(model.encode(ordinary).input_ids, codi_model.encode(ordinary).input_ids)
    assert codi_model.tokenizer(text)["input_ids"] == expected, "the tokenizer is as before"


def test_a_control_token_that_cannot_be_plain_text(golden, tmp_path):
    """A token that is added, but not marked special, is always matched: refused, with the number of the question."""
    case = golden(LLAMA)
    folder = shutil.copytree(case.folder / "checkpoint", tmp_path / "c")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|eocot|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    given_ = {"base": case.folder / "base", "lora_alpha": 1.0}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for entry in config.get("added_tokens_decoder", {}).values():
        entry["special"] = entry["special"] and entry["content"] != "<|eocot|>"
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if name in config:
            config[name] = [x for x in config[name] if x != "<|eocot|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(
        UserError, match=r"question 2 holds '<\|eocot\|>', which this tokenizer can only read as"
    ) as error:
        load_codi(folder, **given_).encode(["1+1=?", "a <|eocot|> b"])
    assert "control_text='published'" in one_line(error)
    load_codi(folder, control_text="published", **given_).encode(["a <|eocot|> b"])


def test_control_text_is_checked(tiny_checkpoint):
    with pytest.raises(UserError, match="control_text must be 'plain' or 'published', got 'raw'"):
        load_codi(tiny_checkpoint() / "checkpoint", base=tiny_checkpoint() / "base", control_text="raw")


# --- 13 and messages ---


@pytest.fixture
def copied(golden, tmp_path):
    """copied(case) -> a copy of its checkpoint to be spoilt, and how to load it."""

    def copy(name: str) -> tuple[Path, Callable[[], Any]]:
        case = golden(name)
        folder = Path(shutil.copytree(case.folder / "checkpoint", tmp_path / name))
        protocol = case.expected["protocol_name"]
        return folder, lambda: load_codi(folder, base=case.folder / "base", protocol=protocol)

    return copy


def test_an_empty_config_is_named(copied):
    folder, load = copied(LLAMA)
    (folder / "config.json").write_text("")
    with pytest.raises(UserError, match=r"config.json is not readable JSON: it is empty, or remove it") as error:
        load()
    assert str(folder / "config.json") in one_line(error)
    folder, load = copied(ORIGINAL)
    (folder / "config.json").write_text("")
    load()  # no tokenizer of its own: nothing reads it


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.json", "codi.json", "adapter_config.json"])
def test_a_git_lfs_pointer_is_called_by_its_name(copied, name):
    folder, load = copied(LLAMA)
    oid = "0" * 64
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 123\n")
    with pytest.raises(
        UserError, match=f"{name} is a git-lfs pointer, not the file itself: run 'git lfs pull'"
    ) as error:
        load()
    assert "truncated" not in one_line(error)


def test_the_parent_folder_of_a_trainer(copied):
    folder, load = copied(ORIGINAL)
    for number in (1000, 500):
        (folder / f"checkpoint-{number}").mkdir()
        shutil.copy(folder / "pytorch_model.bin", folder / f"checkpoint-{number}")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="in checkpoint-500, checkpoint-1000: give .*checkpoint-1000") as error:
        load()
    assert "holds no CODI weights" in one_line(error)


def test_an_adapter_only(copied):
    folder, load = copied(LLAMA)
    state = read(folder)
    (folder / "pytorch_model.bin").unlink()
    adapter = {k.split("codi.")[1].replace(".default", ""): v.clone() for k, v in state.items() if "lora_" in k}
    save_file(adapter, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="it holds an adapter only .*save the whole state dict") as error:
        load()
    assert "adapter_model.safetensors" in one_line(error)


def test_hints(odd):
    with pytest.raises(CheckpointError, match="the keys begin with 'model.', .*take it off") as error:
        odd(GPT2, lambda state: {f"model.{key}": value for key, value in state.items()})
    assert "right base model" not in one_line(error)
    with pytest.raises(CheckpointError, match="no key begins with 'codi.'") as error:
        odd(LLAMA, lambda state: {k.removeprefix(WRAPPER): v for k, v in state.items()})
    assert "right base model" not in one_line(error)


def test_settings_of_another_type(copied):
    folder, load = copied(LLAMA)
    for settings_, message in (
        ({"n_latents": "six"}, "n_latents must be a whole number, 0 or more, got 'six'"),
        ({"lora_r": 2.5}, "lora_r must be a whole number"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
        ({"base": 3}, "base must be a folder or a hub id, got 3"),
        ({"protocol": 5}, "protocol must be the name of a family"),
    ):
        (folder / "codi.json").write_text(json.dumps(settings_))
        with pytest.raises(UserError, match=message) as error:
            load()
        assert str(folder / "codi.json") in one_line(error)


def test_weights_that_are_no_plain_numbers(odd):
    def with_(value: Tensor) -> Callable[[State], State]:
        return lambda state: {**state, "prj.1.bias": value}

    for value in (
        torch.zeros(24, dtype=torch.float8_e4m3fn),
        torch.zeros(24, dtype=torch.complex64),
        torch.zeros(24).to_sparse(),
    ):
        with pytest.raises(UserError, match="prj.1.bias (holds|is)"):
            odd(LLAMA, with_(value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats(odd, golden, dtype):
    found = odd(GPT2, lambda state: {key: value.to(dtype) for key, value in state.items()})
    if dtype == torch.float64:
        same(found, golden, GPT2)
    assert found.dtype == torch.float32


# --- Any one key ---


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """spoilt(golden case, state) -> the message of loading it, None if it loads."""
    place = tmp_path_factory.mktemp("spoilt")

    def load(case, state: State) -> str | None:
        folder = place / case.name
        if not folder.exists():
            shutil.copytree(case.folder / "checkpoint", folder)
        file = folder / ("model.safetensors" if (folder / "model.safetensors").exists() else "pytorch_model.bin")
        file.unlink()  # another file: a mapped one must not be written into
        if file.suffix == ".bin":
            torch.save(state, file)
        else:
            save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
        try:
            load_codi(folder, base=case.folder / "base", protocol=case.expected["protocol_name"], check=False)
        except UserError as error:
            return str(error)
        return None

    return load


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_spoilt_key_is_always_named_in_one_line(golden, spoilt, data):
    """Drop, add, rename or reshape any key."""
    case = golden(data.draw(st.sampled_from([LLAMA, ORIGINAL, GPT2])))
    state = read(case.folder / "checkpoint")
    key = data.draw(st.sampled_from(sorted(state)))
    how = data.draw(st.sampled_from(["drop", "add", "rename", "reshape"]))
    value, named = state[key], key
    tied = key.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))
    if how == "drop":
        del state[key]
    elif how == "add":
        named = key + data.draw(st.sampled_from([".extra", "2", "_scale"]))
        state[named] = torch.zeros(2)
    elif how == "rename":
        del state[key]
        named = data.draw(st.sampled_from([f"x.{key}", key.upper(), key.replace(".weight", ".wieght") + "x"]))
        state[named] = value
    else:
        shapes = [value[:-1], value[..., :-1], value[None], value.flatten(), value.repeat(*[2] * value.dim())]
        state[key] = data.draw(st.sampled_from([x for x in shapes if x.shape != value.shape]))
    message = spoilt(case, state)
    if message is None:
        assert how == "drop" and tied, f"{how} {key} loads"  # a tied weight is there once more
        return
    assert "\n" not in message and named in message, f"{how} {key}: {message}"
    if how == "rename":
        assert key in message or tied


def test_commands_say_the_notes_and_record_what_is_not_default(golden, tmp_path, capsys):
    from experiments.study.options import StudyOptions, identity_of

    case = golden(ORIGINAL)
    folder = Path(shutil.copytree(case.folder / "checkpoint", tmp_path / "c"))
    write(folder, {f"module.{key}": value for key, value in read(folder).items()})
    plain = StudyOptions(model=str(folder), base=str(case.folder / "base"))
    assert plain.load().control_text == "plain" and "control_text" not in identity_of(plain)
    assert f"{folder}: 'module.' was left out of" in capsys.readouterr().err
    published = StudyOptions(model=str(folder), base=str(case.folder / "base"), control_text="published")
    assert published.load().control_text == "published" and identity_of(published)["control_text"] == "published"
