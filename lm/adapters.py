"""LoRA adapters of ordinary language models: new ones to be trained, saved ones merged in. Here and in codi/lora.py
peft is touched, and only when it is called for: it takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.weights import UNREADABLE

__all__ = ["add_adapter", "merge_adapter"]


def add_adapter(
    base: Any, r: int, alpha: int, targets: Sequence[str] | str = "all-linear", dropout: float = 0.0
) -> Any:
    """A model with new trainable LoRA weights, which computes what `base` did until they are trained.

    Args:
        base: Hugging Face causal language model; its own weights are frozen.
        r, alpha: rank, and scale times rank.
        targets: names of the linear layers; "all-linear": all but the unembedding.
        dropout: on the input of the LoRA branch, 0..1.

    Returns:
        peft model around `base`.

    Source: Hu et al. 2021, LoRA, arXiv 2106.09685.
    """
    from peft import LoraConfig, get_peft_model

    names = targets if isinstance(targets, str) else list(targets)
    return get_peft_model(
        base, LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
    )


def merge_adapter(base: Any, folder: Path) -> None:
    """Add an adapter's weights to those of its base, in place; the base is an ordinary model again afterwards.

    Raises:
        ValueError: files that are no LoRA adapter, or one of another base.
    """
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except UNREADABLE as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} could not be loaded as an adapter of {base.config.name_or_path}: {why}") from error
    assert merged is base, "merging gave another model"
