"""Tiny random CODI models of every supported family, in memory and on disk, and the golden cases.

Fixtures: `tiny_checkpoint(kind, family)` writes a checkpoint folder once per session and returns its path,
`tiny_model(kind, family, **options)` loads it (once per set of options: runs never modify a model), `codi_model` is the
Llama, answer-only one. Kinds: llama (grouped heads 4/2, llama3 rotary scaling, tied head), gpt2 (absolute positions),
qwen2 (biases on q, k, v), qwen3 (normed q and k), mistral (sliding window shorter than a prompt, untied head); for
plain language models (`language_model(kind)`) also gpt_neox (blocks in parallel, half of each head rotated) and gemma
(scaled embeddings).
Families: answer-only (named tokens, .bin), original and original-eos (ids V, V+1, V+2, .safetensors).
"""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from codi import CodiModel, load_codi
from codi.lora import add_lora
from lm.model import LanguageModel

# A shell starts background jobs with Ctrl-C ignored; the tests that send it must not depend on how they were started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes side by side (pytest -n) with several threads each get in each other's way: many times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for commands that tests start
    torch.set_num_threads(1)

GOLDEN = Path(__file__).resolve().parent / "golden"
KINDS = ("llama", "gpt2", "qwen2", "qwen3", "mistral")
LM_KINDS = (*KINDS, "gpt_neox", "gemma")
LORA_R, LORA_ALPHA, PRJ_DIM = 4, 2, 24
QUESTIONS = ["3+4=?", "Tom has 12 pens and buys 30 more. How many pens?", "9-2", "A long one: 1 2 3 4 5 6 7 8 9 10 11?"]


def make_tokenizer(named: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, Llama-like special tokens and with `named` the thought tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>"] + (["[PAD]", "<|bocot|>", "<|eocot|>"] if named else [])
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 256)]
    )
    pad = {"pad_token": "[PAD]"} if named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", **pad
    )


VOCABULARY = 258  # of the base tokenizer: 256 bytes, begin of text, end of turn


def make_config(kind: str) -> Any:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
    if kind == "gpt2":
        return GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            activation_function="gelu_new",
            **common,
        )
    if kind == "llama":
        return LlamaConfig(**common, **llama, tie_word_embeddings=True, rope_parameters=scaled)
    if kind == "qwen2":
        return Qwen2Config(**common, **{k: v for k, v in llama.items() if k != "head_dim"}, tie_word_embeddings=True)
    if kind == "qwen3":
        return Qwen3Config(**common, **llama, tie_word_embeddings=True)
    if kind == "mistral":
        return MistralConfig(**common, **llama, sliding_window=12, tie_word_embeddings=False)
    if kind == "gemma":
        return GemmaConfig(**common, **llama, tie_word_embeddings=True)
    if kind == "gpt_neox":
        plain = {k: v for k, v in llama.items() if k not in ("head_dim", "num_key_value_heads")}
        return GPTNeoXConfig(**common, **plain, rotary_pct=0.5, tie_word_embeddings=False)
    raise AssertionError(f"unknown kind {kind}")


def make_base(kind: str, seed: int = 0) -> Any:
    """A random base model; norm weights and biases are random too, so that forgetting one of them shows."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(make_config(kind), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
                assert "norm" in name or "ln_" in name or "bias" in name, name
    return base.eval()


def make_state(base: Any, seed: int = 1) -> dict[str, Tensor]:
    """State dict of the reference wrapper: base with three more embedding rows, random LoRA and projection."""
    torch.manual_seed(seed)
    base = copy.deepcopy(base)
    with torch.no_grad():
        base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    gpt2 = base.config.model_type == "gpt2"
    targets = (
        ("c_attn", "c_proj", "c_fc")
        if gpt2
        else ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    adapted = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.endswith(targets)}
    state: dict[str, Tensor] = {}
    for key, value in base.state_dict().items():
        module, _, kind = key.rpartition(".")
        inner = f"{module}.base_layer.{kind}" if module in adapted else key
        state[f"codi.base_model.model.{inner}"] = value
    for name, module in adapted.items():
        out, inside = module.weight.shape[::-1] if gpt2 else module.weight.shape
        state[f"codi.base_model.model.{name}.lora_A.default.weight"] = 0.3 * torch.randn(LORA_R, inside)
        state[f"codi.base_model.model.{name}.lora_B.default.weight"] = 0.3 * torch.randn(out, LORA_R)
    d = base.config.hidden_size
    state |= {"prj.1.weight": 0.3 * torch.randn(PRJ_DIM, d), "prj.1.bias": 0.3 * torch.randn(PRJ_DIM)}
    state |= {"prj.3.weight": 0.3 * torch.randn(d, PRJ_DIM), "prj.3.bias": 0.3 * torch.randn(d)}
    state |= {"prj.ln.weight": 0.3 + 0.1 * torch.randn(d), "prj.ln.bias": 0.1 * torch.randn(d)}
    return state


def write_checkpoint(folder: Path, kind: str, family: str, seed: int = 0) -> Path:
    """A published layout: `base/` and `checkpoint/` side by side. Returns the folder that holds both."""
    base = make_base(kind, seed)
    state = make_state(base, seed + 1)
    base.save_pretrained(folder / "base")
    make_tokenizer(named=False).save_pretrained(folder / "base")
    (folder / "checkpoint").mkdir()
    if family == "answer-only":
        make_tokenizer(named=True).save_pretrained(folder / "checkpoint")
        torch.save(state, folder / "checkpoint" / "pytorch_model.bin")
    else:
        save_file({key: value.clone() for key, value in state.items()}, folder / "checkpoint" / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_checkpoint(kind="llama", family="answer-only") -> folder with `base/`, `checkpoint/`; not to be written."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str = "llama", family: str = "answer-only") -> Path:
        if (kind, family) not in made:
            made[kind, family] = write_checkpoint(tmp_path_factory.mktemp(f"{kind}-{family}"), kind, family)
        return made[kind, family]

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Callable[..., CodiModel]:
    """tiny_model(kind="llama", family="answer-only", **options of load_codi) -> CodiModel."""
    loaded: dict[tuple[Any, ...], CodiModel] = {}

    def load(kind: str = "llama", family: str = "answer-only", **options: Any) -> CodiModel:
        key = (kind, family, *sorted(options.items()))
        if key not in loaded:
            folder = tiny_checkpoint(kind, family)
            given = {"lora_alpha": LORA_ALPHA, "protocol": family, **options}
            loaded[key] = load_codi(folder / "checkpoint", base=folder / "base", **given)
        return loaded[key]

    return load


@pytest.fixture
def trainable(tiny_model: Callable[..., CodiModel]) -> Callable[..., CodiModel]:
    """A private copy of a tiny model with fresh LoRA layers whose B is not zero."""

    def make(kind: str = "llama", family: str = "answer-only") -> CodiModel:
        model = copy.deepcopy(tiny_model(kind, family))
        add_lora(model.base, r=3, alpha=6)
        torch.manual_seed(3)
        for name, parameter in model.base.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def codi_model(tiny_model: Callable[..., CodiModel]) -> CodiModel:
    """The tiny Llama, answer-only, float32."""
    return tiny_model()


@pytest.fixture(scope="session")
def language_model() -> Callable[..., LanguageModel]:
    """language_model(kind="llama") -> an ordinary LanguageModel, random weights, float32, with a byte tokenizer."""
    made: dict[str, LanguageModel] = {}

    def make(kind: str = "llama") -> LanguageModel:
        if kind not in made:
            made[kind] = LanguageModel(make_base(kind), make_tokenizer(named=False), name=kind)
        return made[kind]

    return make


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Four questions of different length."""
    return list(QUESTIONS)


@dataclass(frozen=True)
class GoldenCase:
    """A folder of tests/golden: `expected` is expected.json, `tensors` expected.safetensors."""

    name: str
    folder: Path
    expected: dict[str, Any]
    tensors: dict[str, Tensor]

    def load(self, **options: Any) -> CodiModel:
        given = {"protocol": self.expected["protocol_name"], "lora_alpha": self.expected["lora_alpha"], **options}
        return load_codi(self.folder / "checkpoint", base=self.folder / "base", **given)

    def stack(self, name: str) -> Tensor:
        """(case, …) the tensors `{i}.name`."""
        return torch.stack([self.tensors[f"{case['i']}.{name}"] for case in self.expected["cases"]])


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Folder with the golden cases."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden(golden_root: Path) -> Callable[[str], GoldenCase]:
    """golden(name) -> GoldenCase, for the four folder names of golden/README.md."""
    read: dict[str, GoldenCase] = {}

    def case(name: str) -> GoldenCase:
        if name not in read:
            folder = golden_root / name
            expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
            read[name] = GoldenCase(name, folder, expected, load_file(folder / "expected.safetensors"))
        return read[name]

    return case
