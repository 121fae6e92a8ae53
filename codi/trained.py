"""Checkpoints that hold only what was trained: LoRA, projection and the rows that were added to the embeddings.

The weights of the base model are read from the base itself, a folder or hub id that codi.json names, and checked
against the hash that stands there::

    trained.safetensors   codi.base_model.model.….lora_A.default.weight, …, prj.…, new_rows.model.embed_tokens.weight
    codi.json             as of any checkpoint, and "base_hash", "base_dtype" and, with named tokens, "tokens"

`completed` makes of both what a whole checkpoint holds; from there on `load_codi` knows no difference. The tokenizer is
that of the base, with the protocol's tokens added.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from codi.layout import WRAPPER
from codi.protocol import PROTOCOL_TOKENS, Protocol, UserError
from lm.adapters import named_from, other_base
from lm.weights import hash_files, read_weights, weight_files

__all__ = ["TRAINED_FILE", "Base", "base_hash", "completed", "has_trained", "save_trained", "with_tokens"]

TRAINED_FILE = "trained.safetensors"
ROWS = "new_rows."
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")
"""Ends of the names of weights with a row for every token."""
MARKS = (".lora_A.default.weight", ".lora_B.default.weight")


def has_trained(folder: Path) -> bool:
    """Whether a folder is a checkpoint of this kind."""
    return (folder / TRAINED_FILE).is_file()


def base_hash(folder: Path) -> str:
    """Identity of a base model's weights: SHA-256 over its weight files, as `lm.load` has it for folders."""
    return hash_files(weight_files(folder))


# --- Saving -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What a checkpoint says about its base.

    Attributes:
        name: folder or hub id.
        hash: of its weights (`base_hash`).
        rows: of its embeddings.
        dtype: that its weights were held in while the checkpoint was trained.
    """

    name: str
    hash: str
    rows: int
    dtype: str = "bfloat16"


def save_trained(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    base: Base,
    protocol: Protocol,
    settings: Mapping[str, Any],
) -> Path:
    """Write what was trained, LoRA and rows in bfloat16, the projection as it is.

    Args:
        folder: made if needed; files of the same names are replaced.
        state_dict: of the reference wrapper (`codi.checkpoint.reference_state`).
        base: that it was trained on.
        protocol: of the checkpoint.
        settings: further entries of codi.json (lora_r, lora_alpha, n_latents, …).

    Raises:
        ValueError: nothing was trained.
    """
    kept: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key.startswith("prj."):
            kept[key] = value
        elif key.endswith(MARKS):
            kept[key] = value.to(torch.bfloat16)
        elif key.endswith(EMBEDDINGS) and len(value) > base.rows:
            kept[ROWS + key.removeprefix(WRAPPER)] = value[base.rows :].to(torch.bfloat16)
    if not any(key.endswith(MARKS) for key in kept):
        raise UserError("there is nothing to save: the model has no LoRA weights")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "base": named_from(folder, base.name),
        "base_hash": base.hash,
        "base_dtype": base.dtype,
        "protocol": protocol.to_dict(),
        **settings,
    }
    if protocol.name == "answer-only":
        ids = (protocol.pad_id, protocol.bot_id, protocol.eot_id)
        record["tokens"] = dict(zip(PROTOCOL_TOKENS, ids, strict=True))
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in kept.items()}
    save_file(tensors, folder / TRAINED_FILE, {"format": "pt"})
    (folder / "codi.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


# --- Loading ----------------------------------------------------------------------------------------------------------


def completed(folder: Path, settings: Mapping[str, Any], base_folder: Path, base_name: str) -> dict[str, Tensor]:
    """The weights of a whole checkpoint, under the names of the reference wrapper.

    Warns if the base has other weights than those that it was trained on.

    Args:
        folder: of the checkpoint.
        settings: its codi.json.
        base_folder, base_name: of the base model.

    Raises:
        ValueError: a base that cannot be read, or one without the weights that rows were added to.
    """
    from lm.load import read_base

    trained = read_weights(folder / TRAINED_FILE)
    warning = other_base(folder, base_name, str(settings.get("base_hash", "")), base_hash(base_folder))
    if warning:
        warnings.warn(warning, stacklevel=4)
    kind: torch.dtype = getattr(torch, str(settings.get("base_dtype", "float32")), torch.float32)
    rows = {key.removeprefix(ROWS): value for key, value in trained.items() if key.startswith(ROWS)}
    state = {key: value for key, value in trained.items() if not key.startswith(ROWS)}
    adapted = {key.removeprefix(WRAPPER).rpartition(mark)[0] for key in state for mark in MARKS if key.endswith(mark)}
    base = read_base(str(base_folder), None, "bfloat16" if kind == torch.bfloat16 else "float32", "eager").state_dict()
    lacking = sorted(set(rows) - set(base))
    if lacking:
        raise UserError(f"base model {base_name} has no {lacking[0]}, to which {folder / TRAINED_FILE} adds rows")
    for name, value in base.items():
        module, _, last = name.rpartition(".")
        if name in rows:
            value = torch.cat((value, rows[name].to(value.dtype)))
        state[f"{WRAPPER}{module}.base_layer.{last}" if module in adapted else WRAPPER + name] = value
    return state


def with_tokens(tokenizer: Any, settings: Mapping[str, Any], where: str) -> Any:
    """The base's tokenizer with the tokens that codi.json names, if it names any.

    Raises:
        ValueError: the tokenizer gives them other ids.
    """
    tokens = settings.get("tokens")
    if not tokens:
        return tokenizer
    if not isinstance(tokens, Mapping) or list(tokens) != list(PROTOCOL_TOKENS):
        raise UserError(f"codi.json of {where}: tokens must give ids to {', '.join(PROTOCOL_TOKENS)}, got {tokens!r}")
    pad, *others = tokens
    tokenizer.add_special_tokens({"pad_token": pad, "additional_special_tokens": others})
    tokenizer.padding_side = "left"
    found = dict(zip(tokens, tokenizer.convert_tokens_to_ids(list(tokens)), strict=True))
    if found != dict(tokens):
        raise UserError(
            f"the tokenizer of the base of {where} gives other ids than codi.json says: {found}, {dict(tokens)}"
        )
    return tokenizer
