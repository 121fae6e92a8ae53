"""LoRA layers in a base model: those of a checkpoint, kept apart, or new ones to be trained. The only file that touches
peft, and only when it is called for: peft takes seconds to import, and merged weights need none of it.

Merging them into the weights needs no peft and is in layout.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codi.layout import Layout
from codi.protocol import UserError

__all__ = ["add_lora", "attach_lora"]


#: the linear layers of a block that CODI adapts, by model type; any other type: all linear layers but the head
LORA_TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc")}
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(base: Any, r: int = 128, alpha: float = 32, dropout: float = 0.0, modules: Sequence[str] = ()) -> None:
    """Freeze a base model and give every linear layer of its blocks trainable LoRA weights, in place.

    weight + (alpha / r) · B A, with B = 0 at the start: the model computes what it did before.

    Args:
        base: Hugging Face causal language model.
        r, alpha: rank and scale; published CODI uses 128 and 32.
        dropout: on the input of the LoRA branch, 0..1.
        modules: names of the linear layers of a block that get it, such as "q_proj"; empty: all.

    Raises:
        ValueError: a rank below 1, or a name that no linear layer of the blocks has.

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685; settings of Shen et al. 2025, arXiv 2502.21074.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if r < 1:
        raise UserError(f"the LoRA rank must be at least 1, got {r}")
    kind = base.config.model_type
    every = LORA_TARGETS.get(kind, LLAMA_TARGETS)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    allowed = [name for name in every if name in names]
    for name in modules:
        if name not in allowed:
            raise UserError(f"LoRA modules must be among {', '.join(allowed)}, got {name!r}")
    targets = modules or every
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets),
        fan_in_fan_out=kind == "gpt2",
    )
    inject_adapter_in_model(config, base)
    base.train(base.training)  # what was put in is as the rest: dropouts act in training only
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def attach_lora(
    model: nn.Module, state: Mapping[str, Tensor], layout: Layout, scales: Mapping[str, float], dtype: torch.dtype
) -> None:
    """Give a base model the LoRA layers of a checkpoint's weights, in place.

    Args:
        model: base model.
        state: weights under the checkpoint's names.
        layout: which modules carry LoRA, and of which rank.
        scales: module -> what its B A is multiplied by.
        dtype: of the layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    r = layout.lora_r
    alphas = {module: scale * layout.ranks[module] for module, scale in scales.items()}
    usual = max(alphas.values(), key=list(alphas.values()).count)
    config = LoraConfig(
        r=r,
        lora_alpha=usual,  # type: ignore[arg-type]  # a ratio of published settings need not be whole
        rank_pattern={re.escape(module): rank for module, rank in layout.ranks.items() if rank != r},
        alpha_pattern={re.escape(module): alpha for module, alpha in alphas.items() if alpha != usual},  # type: ignore[misc]
        lora_dropout=0.0,
        target_modules=sorted(layout.lora),
        fan_in_fan_out=any(layout.lora.values()),
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, model)
    for module in layout.lora:
        layer: Any = model.get_submodule(module)
        for side in ("A", "B"):
            weight = getattr(layer, f"lora_{side}")["default"].weight
            weight.data = state[f"{layout.prefix}{module}.lora_{side}.default.weight"].to(dtype)
