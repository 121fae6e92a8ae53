"""LoRA adapters of ordinary language models: new ones to be trained, saved ones merged in. Here and in codi/lora.py
peft is touched, and only when it is called for: it takes seconds to import."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lm.errors import UserError
from lm.terms import TextForm
from lm.weights import ADAPTER_FILES, UNREADABLE

__all__ = ["FORM_FILE", "add_adapter", "merge_adapter", "named_from", "other_base", "save_adapter"]

FORM_FILE = "lm.json"
"""Beside an adapter: the form of text that it was trained on and the base's identity,
{"form": "response", "base": {"name": …, "weights_hash": …}}."""


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


def named_from(folder: Path, base: str) -> str:
    """How a folder of trained weights names its base: another folder by the way to it, a hub id as it is."""
    place = Path(base).expanduser()
    return os.path.relpath(place, folder) if place.is_dir() else base


def other_base(folder: Path, base: str, recorded: str, found: str) -> str:
    """A warning if trained weights belong to another base than the one at hand; "" if not, or if nothing is recorded.

    Args:
        folder: of the trained weights.
        base: name of the base at hand.
        recorded: identity of the weights that they were trained on; "": not known.
        found: of those at hand; "": not known.
    """
    if not recorded or recorded == found:
        return ""
    return (
        f"{folder} was trained on other weights than those of {base} (recorded {recorded[:12]}, found "
        f"{found[:12] or 'unknown'}): numbers will differ from its card"
    )


def save_adapter(adapted: Any, folder: Path, *, base: str, base_hash: str, form: TextForm) -> None:
    """Write a trained adapter as a folder that `lm.load.load_lm` reads, its weights in bfloat16.

    Args:
        adapted: peft model of `add_adapter`.
        folder: made if need be; what it holds of an adapter is replaced.
        base: folder or hub id of the base model. A folder is named relative to the adapter's.
        base_hash: identity of its weights.
        form: of the texts that it was trained on.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = named_from(folder, base), True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # peft keeps a set: the file would differ by the run
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    kept = {name: weight.detach().to(torch.bfloat16).cpu().contiguous() for name, weight in weights.items()}
    save_file(kept, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    record = {"form": form, "base": {"name": Path(base).name, "weights_hash": base_hash}}
    (folder / FORM_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
