"""Files with weights and settings: what they hold, or in one line why that cannot be read. No pickled code is ever run.

Knows nothing about what the keys mean.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lm.errors import UserError

__all__ = ["hash_files", "listed", "read_object", "read_state", "read_weights", "refuse_pointer", "weight_files"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
INSIDE = ("state_dict", "model")
"""Entries under which trainers keep the state dict of a file that holds more."""
POINTER = b"version https://git-lfs"
LEFT_OUT = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
"""What DistributedDataParallel and torch.compile put before the names of what they wrap."""


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Names in words, the first `limit` of them."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def refuse_pointer(path: Path) -> None:
    """UserError if a file is not there but only the note that git-lfs puts in its place."""
    if path.is_file():
        with open(path, "rb") as handle:
            if handle.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"{path} is a git-lfs pointer, not the file itself: run 'git lfs pull' where it was cloned, "
                    "or download the file"
                )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    refuse_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        empty = "it is empty" if not path.stat().st_size else " ".join(str(error).split())
        raise UserError(f"{path} is not readable JSON: {empty}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold one JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the weights; UserError if there are none, or not all of them."""
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        refuse_pointer(path)
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise UserError(f"{path} is not a readable index of weight files") from error
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of its {len(shards)} weight files: {listed(absent)}")
        if not shards:
            raise UserError(f"{path} is not a readable index of weight files")
        return [folder / shard for shard in shards]
    raise UserError(f"{folder} holds no CODI weights: none of {', '.join(WEIGHT_FILES)} is there{_elsewhere(folder)}")


def _elsewhere(folder: Path) -> str:
    """What a folder without weights holds in their place, and what to do about it."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return (
                f"; it holds an adapter only ({name}), without the base weights and the projection of CODI: save the "
                "whole state dict, torch.save(model.state_dict(), 'pytorch_model.bin')"
            )
    inside = [path for path in folder.iterdir() if any((path / name).is_file() for name in WEIGHT_FILES)]
    if not inside:
        return ""
    inside.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    names = [path.name for path in inside if not path.name.startswith("base")] or [path.name for path in inside]
    return f"; there are some in {listed(names)}: give {folder / names[-1]}"


def read_weights(path: Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """Tensors of one file; code in a pickle is refused, never run.

    Args:
        path: .safetensors, or what torch.save wrote: a state dict, or a dict with one under "state_dict" or "model".
        notes: gets a line if the state dict was taken from inside.
    """
    refuse_pointer(path)
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
    except UNREADABLE as error:
        raise UserError(f"{path} is truncated or corrupt: it cannot be read as weights") from error
    if isinstance(state, Mapping):
        inside = [name for name in INSIDE if _is_state_dict(state.get(name))]
        if len(inside) > 1:
            raise UserError(f"{path} holds two state dicts, under {' and '.join(map(repr, inside))}: save one of them")
        if inside:
            others = sorted(str(name) for name in state if name != inside[0])
            if notes is not None:
                without = f", without {listed(others)}" if others else ""
                notes.append(f"{path.name}: the state dict was taken from {inside[0]!r}{without}")
            state = state[inside[0]]
    if not _is_state_dict(state):
        raise UserError(f"{path} does not hold a state dict (names with tensors)")
    return {key: value.detach() for key, value in state.items()}


UNREADABLE = (
    *(SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError),
    *(TypeError, AttributeError, AssertionError, OSError, OverflowError),
)
"""What readers of damaged weights raise."""


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def read_state(files: Sequence[Path], notes: list[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, `module.` and `_orig_mod.` left out of their names.

    Args:
        files: from `weight_files`.
        notes: gets a line for everything that was done.

    Raises:
        ValueError: a file that cannot be read, or two tensors of one name.
    """
    state: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    left_out: dict[str, int] = {}
    for file in files:
        for key, tensor in read_weights(file, notes).items():
            name = LEFT_OUT.sub("", key)
            if name in state:
                same = f"{file.name}: {key}" if len(files) > 1 else key
                raise UserError(f"{file.parent}: {written[name]} and {same} are one name twice")
            for part in set(LEFT_OUT.findall(key)):
                left_out[part] = left_out.get(part, 0) + 1
            state[name] = tensor
            written[name] = f"{file.name}: {key}" if len(files) > 1 else key
    for part, count in sorted(left_out.items()):
        notes.append(f"{part!r} was left out of {count} key names")
    return state


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
