"""Files of control vectors: our own (safetensors) and the GGUF files that llama.cpp and repeng read and write.

    save_vector("calm.safetensors", vector)          # everything, exactly
    save_vector("calm.gguf", vector)                 # for llama.cpp: --control-vector-scaled calm.gguf:1.5
    vector = load_vector("calm.gguf", model)         # refused if it is of another model

Numbering in GGUF files. llama.cpp adds the tensor `direction.N` to the output of block N counted from 0, that is at
our layer N + 1, at every position; repeng numbers the same way. Nothing is ever added after the first block there:
`direction.0` makes llama.cpp refuse the file. So layer l is written as `direction.{l - 1}`, and layer 1, which
llama.cpp cannot steer, goes into a metadata field that only `load_vector` reads, together with where the vector comes
from. repeng may write `direction.0`; it is read as layer 1. llama.cpp sums several files and takes no notice of
`controlvector.model_hint` and `controlvector.layer_count`; they are written for people and for repeng.

Sources: llama.cpp, common/common.cpp and src/llama-adapter.cpp; repeng, repeng/extract.py and repeng/control.py.
Checked once with llama.cpp of October 2026 on SmolLM2 in Q4_1: its loader reads the same bytes, and its next token
under direction.N differs from ours under layer N + 1 by at most 0.004 nats (KL), from ours under any other layer by 0.1
or more.

Knows nothing about how vectors are made or used.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lm.errors import UserError
from steering.control_vectors import ControlVector, VectorOrigin

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["load_vector", "save_vector"]

KIND = "codi_steering.control_vector"
LAYER = re.compile(r"layer\.([1-9][0-9]*)")
DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]*)")
ARCHITECTURE = "controlvector"
ORIGIN_FIELD = "codi_steering.origin"
LAYER_1_FIELD = "codi_steering.direction_of_layer_1"


def save_vector(path: str | Path, vector: ControlVector) -> None:
    """Write a control vector; the ending says how.

    Args:
        path: `.safetensors`, or `.gguf` for llama.cpp (see this module for its numbering of layers).
        vector: any; reading it back gives the same bytes of every layer and the same origin.

    Raises:
        ValueError: another ending, or a vector for llama.cpp that has layer 1 only.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        Path(path).write_bytes(_to_safetensors(vector))
    elif suffix == ".gguf":
        _write_gguf(Path(path), vector)
    else:
        raise UserError(f"a control vector is saved as .safetensors or .gguf, got {path}")


def load_vector(path: str | Path, model: LanguageModel | None = None) -> ControlVector:
    """Read what `save_vector`, llama.cpp or repeng wrote.

    Args:
        path: `.safetensors` or `.gguf`.
        model: that the vector must be of; None: not checked. Files of other programs do not say which weights they are
            of, so only sizes can be compared there.

    Raises:
        ValueError: a file that is no control vector, damaged, or of another model.
    """
    place = Path(path)
    if not place.is_file():
        raise UserError(f"no file {path}")
    if place.suffix not in (".safetensors", ".gguf"):
        raise UserError(f"a control vector is a .safetensors or .gguf file, got {path}")
    vector = _read_gguf(place) if place.suffix == ".gguf" else _read_safetensors(place)
    if model is not None:
        vector.check_model(model, str(path))
    return vector


# --- Where it comes from, as text -------------------------------------------------------------------------------------


def _origin_text(origin: VectorOrigin) -> str:
    return json.dumps({**asdict(origin), "explained": {str(k): v for k, v in origin.explained.items()}})


def _origin_of(text: str, path: Path) -> VectorOrigin:
    """Back from `_origin_text`; ValueError for anything else."""
    try:
        found: Any = json.loads(text)
        explained = {int(layer): float(share) for layer, share in found.pop("explained").items()}
        if set(found) != {field.name for field in fields(VectorOrigin)} - {"explained"}:
            raise ValueError("other fields")
        return VectorOrigin(**found, explained=explained)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} does not say in a readable way where its vector comes from") from error


def _vector(directions: dict[int, Tensor], origin: VectorOrigin, path: Path) -> ControlVector:
    try:
        return ControlVector(directions, origin)
    except (UserError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


# --- safetensors ------------------------------------------------------------------------------------------------------


def _to_safetensors(vector: ControlVector) -> bytes:
    tensors = {f"layer.{layer}": direction for layer, direction in vector.directions.items()}
    norms = {str(layer): norm for layer, norm in vector.norms().items()}
    # One field: safetensors writes several in any order, and the same vector should give the same bytes.
    return save(tensors, {KIND: json.dumps({"origin": _origin_text(vector.origin), "norms": norms})})


def _read_safetensors(path: Path) -> ControlVector:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file") from error
    named = {name: LAYER.fullmatch(name) for name in tensors}
    if KIND not in header or not all(named.values()):
        raise UserError(f"{path} holds no control vector that save_vector wrote")
    try:
        told = json.loads(header[KIND])
        origin, written = told["origin"], {int(layer): float(norm) for layer, norm in told["norms"].items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is damaged: what it says about itself cannot be read") from error
    directions = {int(match[1]): tensors[name] for name, match in named.items() if match}
    vector = _vector(directions, _origin_of(origin, path), path)
    found = vector.norms()
    if set(found) != set(written) or not all(math.isclose(found[k], written[k], rel_tol=1e-9) for k in found):
        raise UserError(f"{path} is damaged: its directions do not have the norms that were written")
    return vector


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _write_gguf(path: Path, vector: ControlVector) -> None:
    import gguf

    steered = {layer: direction for layer, direction in vector.directions.items() if layer > 1}
    if not steered:
        raise UserError("llama.cpp cannot steer layer 1, the only one of this vector: save it as .safetensors")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", vector.origin.model_type)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(steered))
    writer.add_string(ORIGIN_FIELD, _origin_text(vector.origin))
    if 1 in vector.directions:
        writer.add_array(LAYER_1_FIELD, vector.directions[1].tolist())
    for layer, direction in steered.items():
        writer.add_tensor(f"direction.{layer - 1}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(path: Path) -> ControlVector:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a readable GGUF file") from error

    def text(name: str) -> str | None:
        field = reader.get_field(name)
        found = None if field is None else field.contents()
        return found if isinstance(found, str) else None

    kind = text("general.architecture")
    if kind != ARCHITECTURE:
        raise UserError(f"{path} holds no control vector: its architecture is {kind!r}, not {ARCHITECTURE!r}")
    directions: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        match = DIRECTION.fullmatch(tensor.name)
        if match is None:
            raise UserError(f"{path}: a control vector has tensors direction.N, got {tensor.name!r}")
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise UserError(f"{path}: {tensor.name} must be float32, got {tensor.tensor_type.name}")
        directions[int(match[1]) + 1] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    first = reader.get_field(LAYER_1_FIELD)
    if first is not None:
        directions[1] = torch.tensor(first.contents(), dtype=torch.float32)
    told = text(ORIGIN_FIELD)
    if told is not None:
        origin = _origin_of(told, path)
    else:
        origin = VectorOrigin(model_type=text(f"{ARCHITECTURE}.model_hint") or "", method=f"read from {path.name}")
    return _vector(directions, origin, path)
