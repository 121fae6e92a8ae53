"""Files with weights and the keys in them: what a checkpoint must hold, given its base model, and what it does hold.

Keys are those of the published wrapper: `codi.base_model.model.…` with `.base_layer.weight`, `.lora_A.default.weight`,
`.lora_B.default.weight`, and `prj.1`, `prj.3`, `prj.ln`. Nothing that does not fit is let through, and no pickled code
is ever run.

Knows nothing about folders of models, tokenizers or protocols.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from codi.protocol import UserError

__all__ = [
    "PRJ_KEYS",
    "WRAPPER",
    "CheckpointError",
    "Layout",
    "check_keys",
    "find_layout",
    "hash_files",
    "merged_weights",
    "projection_shapes",
    "read_weights",
    "tied_names",
    "untie",
    "weight_files",
]

WRAPPER = "codi.base_model.model."
PRJ_KEYS = ("prj.1.weight", "prj.1.bias", "prj.3.weight", "prj.3.bias", "prj.ln.weight", "prj.ln.bias")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class CheckpointError(UserError):
    """Keys of a checkpoint that do not fit its base model.

    Attributes:
        missing, unexpected: key names. misshapen: key name -> (shape in the checkpoint, shape that fits).
    """

    def __init__(
        self,
        where: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.missing, self.unexpected = list(missing), list(unexpected)
        self.misshapen = dict(misshapen or {})
        shapes = [f"{key} is {have}, should be {want}" for key, (have, want) in self.misshapen.items()]
        lost = len(self.missing) + len(shapes) > 20
        parts = [
            f"{len(names)} {kind}: {listed(names, 4 if lost else 12)}"
            for kind, names in (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", shapes))
            if names
        ]
        hint = "; is this the right base model?" if lost else ""
        super().__init__(f"{where}: keys do not fit: {'; '.join(parts)}{hint}")


def listed(names: Sequence[str], limit: int = 12) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


# --- Files with weights -----------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the weights; UserError if there are none, or not all of them."""
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a readable index of weight files") from error
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of its {len(shards)} weight files: {listed(absent)}")
        return [folder / shard for shard in shards]
    raise UserError(f"{folder} holds no CODI weights: none of {', '.join(WEIGHT_FILES)} is there")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of one file; code in a pickle is refused, never run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # about pickle protocols: what cannot be read is refused below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as handle:
            is_pickle = handle.read(1) == pickle.PROTO
        if "GLOBAL" in str(error) or is_pickle:
            raise UserError(
                f"{path} is refused: a pickle with more than tensors in it, which could run code"
            ) from error
        raise UserError(f"{path} is truncated or corrupt: it cannot be read as PyTorch weights") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is truncated or corrupt: it cannot be read as weights") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a state dict (names with tensors)")
    return dict(state)


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- Keys -------------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Which keys a checkpoint must have, given its base model."""

    prefix: str
    plain: dict[str, tuple[int, ...]]  # key in the checkpoint -> shape
    lora: dict[str, bool]  # module name -> whether its weight is stored (in, out), as Conv1D does
    lora_r: int


def find_layout(skeleton: nn.Module, state: Mapping[str, Tensor], tied: set[str]) -> Layout:
    """Expected keys and shapes. A kind of linear layer that carries LoRA in one block must carry it in all."""
    prefix = WRAPPER if any(key.startswith(WRAPPER) for key in state) else "codi."
    modules = dict(skeleton.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    marks = re.compile(r"(.*)\.(?:base_layer\.(?:weight|bias)|lora_[AB]\.default\.weight)")
    found = {match[1] for key in state if (match := marks.fullmatch(key.removeprefix(prefix)))}
    kinds = {re.sub(r"\.\d+\.", ".", name) for name in found}
    ranks = Counter(t.shape[0] for k, t in state.items() if k.endswith("lora_A.default.weight") and t.dim() == 2)
    rank = ranks.most_common(1)[0][0] if ranks else 0

    plain: dict[str, tuple[int, ...]] = {}
    lora: dict[str, bool] = {}
    for key, value in skeleton.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module in linear and re.sub(r"\.\d+\.", ".", module) in kinds:
            plain[f"{prefix}{module}.base_layer.{kind}"] = tuple(value.shape)
            lora[module] = isinstance(linear[module], Conv1D)
        elif key not in tied or f"{prefix}{key}" in state:
            plain[prefix + key] = tuple(value.shape)
    for module, transposed in lora.items():
        weight = linear[module].weight.shape
        out, inside = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
        plain[f"{prefix}{module}.lora_A.default.weight"] = (rank, inside)
        plain[f"{prefix}{module}.lora_B.default.weight"] = (out, rank)
    return Layout(prefix, plain, lora, rank)


def projection_shapes(state: Mapping[str, Tensor], d_model: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the projection; its width is that of the weights."""
    first = state.get("prj.1.weight", state.get("prj.1.bias"))
    width = first.shape[0] if first is not None and first.dim() else d_model
    shapes = ((width, d_model), (width,), (d_model, width), (d_model,), (d_model,), (d_model,))
    return dict(zip(PRJ_KEYS, shapes, strict=True))


def check_keys(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse weights whose keys or shapes are not exactly the expected ones, or that are no finite numbers."""
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = {
        key: (tuple(state[key].shape), shape)
        for key, shape in sorted(expected.items())
        if key in state and tuple(state[key].shape) != shape
    }
    if missing or unexpected or misshapen:
        raise CheckpointError(where, missing, unexpected, misshapen)
    for key, value in state.items():
        if not value.is_floating_point():
            raise UserError(f"{where}: {key} holds {value.dtype}, weights must be floating point")
        if not torch.isfinite(value).all():
            raise UserError(f"{where}: {key} holds numbers that are not finite")


def tied_names(skeleton: Any, config: Any) -> dict[str, str]:
    """Tied weight -> the weight it shares, both as names in the base model."""
    if not getattr(config, "tie_word_embeddings", False):
        return {}
    keys = skeleton._tied_weights_keys
    return dict(keys) if isinstance(keys, Mapping) else {}


def untie(state: dict[str, Tensor], prefix: str, name: str, source: str, where: str) -> None:
    """A tied weight may be stored once or twice; keep it under both names, and insist that they agree."""
    first, second = prefix + name, prefix + source
    if first in state and second in state:
        if not torch.equal(state[first], state[second]):
            raise UserError(f"{where}: {first} and {second} differ, but the base model ties them")
    elif first in state:
        state[second] = state[first]
    else:
        state[first] = state[second]
    state[first] = state[second]


def merged_weights(state: dict[str, Tensor], layout: Layout, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of the base model, weight + scale · B A in float32, then rounded once. LoRA keys stay in `state`."""
    merged: dict[str, Tensor] = {}
    for key in [key for key in state if ".lora_" not in key]:
        tensor = state.pop(key)
        name = key.removeprefix(layout.prefix).replace(".base_layer.", ".")
        module, _, kind = name.rpartition(".")
        if module in layout.lora and kind == "weight" and scale:
            a = state[f"{layout.prefix}{module}.lora_A.default.weight"].float()
            b = state[f"{layout.prefix}{module}.lora_B.default.weight"].float()
            delta = scale * (b @ a)
            merged[name] = (tensor.float() + (delta.T if layout.lora[module] else delta)).to(dtype)
        else:
            merged[name] = tensor.to(dtype)
    return merged
