"""The model that is trained: built from scratch or around a given base, its base frozen for the second stage.

Knows nothing about data, losses or run folders.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from codi.checkpoint import load_codi
from codi.model import CodiModel
from codi.parts import Projection
from codi.places import locate
from codi.protocol import answer_only, original
from codi.tokenizer import CODI_SPECIAL_TOKENS, build_tokenizer
from experiments.tasks import arithmetic, generator_of, is_endless, polynomial, templates
from experiments.train.options import Resolved
from lm.tokenizer import read_tokenizer

__all__ = ["base_reference", "build_model", "freeze_in_bfloat16", "frozen_base"]


def build_model(config: Resolved, attention: str) -> tuple[CodiModel, int, Any]:
    """The model before any training, the size of the base vocabulary (the CODI tokens follow), the base tokenizer."""
    tokenizer: Any
    base: Any
    if config.teacher:
        return _taught(config, attention)
    if config.init:
        tokenizer = read_tokenizer(config.init)
        base = AutoModelForCausalLM.from_pretrained(config.init, dtype=torch.float32, attn_implementation=attention)
        vocabulary = max(int(base.get_input_embeddings().weight.shape[0]), len(tokenizer))
        base.resize_token_embeddings(vocabulary + len(CODI_SPECIAL_TOKENS), mean_resizing=False)
    else:
        pieces: tuple[str, ...] = (">><<a", "a>>", "<<a")
        sentences = arithmetic.corpus_sentences() + templates.corpus_sentences()
        if generator_of(config.data) == polynomial.NAME:
            sentences, pieces = polynomial.corpus_sentences(), polynomial.CHAIN_PIECES
        chains = [*pieces] * 500
        tokenizer = build_tokenizer([s for line in sentences for s in (line, line[1:])] + chains)
        vocabulary = len(tokenizer)
        base = LlamaForCausalLM(
            LlamaConfig(  # type: ignore[call-arg]  # attn_implementation is taken by the parent class
                vocab_size=vocabulary + len(CODI_SPECIAL_TOKENS),
                hidden_size=config.d_model,
                intermediate_size=config.d_ffn,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                attn_implementation=attention,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    base_tokenizer = copy.deepcopy(tokenizer)
    if config.protocol == "answer-only":
        pad, bot, eot = CODI_SPECIAL_TOKENS
        tokenizer.add_special_tokens({"pad_token": pad, "additional_special_tokens": [bot, eot]})
        ids = tokenizer.convert_tokens_to_ids([pad, bot, eot])
        protocol = answer_only(ids[0], ids[1], ids[2], tokenizer.eos_token_id)
        if not config.init or is_endless(config.data):  # questions of our own end as they are
            protocol = replace(protocol, question_suffix="")
    else:
        protocol = original(vocabulary, tokenizer.eos_token_id, with_eos=config.protocol == "original-eos")
    tokenizer.padding_side = "left"
    prj = Projection(base.config.hidden_size, config.prj_dim)
    return CodiModel(base, prj, tokenizer, protocol, n_latents=config.n_latents), vocabulary, base_tokenizer


def _taught(config: Resolved, attention: str) -> tuple[CodiModel, int, Any]:
    """The same around the base model of a CODI checkpoint: its LoRA and projection are left behind, the trained rows of
    its tokens are kept."""
    place = locate(config.teacher, None)
    taught = load_codi(config.teacher, merge_lora=False)
    base = AutoModelForCausalLM.from_config(taught.base.config, attn_implementation=attention)
    weights = taught.base.state_dict().items()
    base.load_state_dict({name.replace(".base_layer", ""): x for name, x in weights if ".lora_" not in name})
    vocabulary = AutoConfig.from_pretrained(place.base_folder).vocab_size
    prj = Projection(base.config.hidden_size, config.prj_dim)
    model = CodiModel(base, prj, taught.tokenizer, taught.protocol, n_latents=config.n_latents)
    return model, vocabulary, read_tokenizer(str(place.base_folder))


def base_reference(config: Resolved) -> str | None:
    """Where the saved model is to find its base; None: it holds a copy, because the base is its own."""
    if config.teacher:
        place = locate(config.teacher, None)
        return None if place.base_folder.is_relative_to(place.folder) else place.base_name
    if config.init and (config.teacher_lora or not config.teacher_steps):
        return str(Path(config.init).resolve()) if Path(config.init).is_dir() else config.init
    return None


def frozen_base(model: CodiModel, vocabulary: int) -> Any:
    """The teacher as a base model of its own: weights rounded to bfloat16 (also in `model`), CODI tokens cut off."""
    with torch.no_grad():
        for parameter in model.base.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
    base = copy.deepcopy(model.base)
    base.resize_token_embeddings(vocabulary)
    return base.to(torch.bfloat16)


def freeze_in_bfloat16(base: nn.Module) -> None:
    """Hold frozen weights in bfloat16, as published training does: autocast need not cast them in every pass, nor keep
    a copy of them for every pass. Trainable weights and rotary frequencies stay in float32."""
    for parameter in base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
