"""Keys of a checkpoint: what it must hold, given its base model, and what it does hold. What does not fit is refused.

Keys are those of the published wrapper: `codi.base_model.model.…` with `.base_layer.weight`, `.lora_A.default.weight`,
`.lora_B.default.weight`, and `prj.1`, `prj.3`, `prj.ln`. LoRA may have another rank in every module and may be left out
of whole blocks; the projection may lack its LayerNorm or be missing (published options). Buffers that old versions of
transformers stored are left out.

Knows nothing about files, tokenizers or protocols.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from codi.adapter import Adapter
from codi.protocol import UserError
from lm.weights import listed

__all__ = [
    "WRAPPER",
    "CheckpointError",
    "Layout",
    "check_keys",
    "drop_old_buffers",
    "find_layout",
    "merged_weights",
    "projection_shapes",
    "tied_names",
    "untie",
]

WRAPPER = "codi.base_model.model."
PRJ_LN = ("prj.ln.weight", "prj.ln.bias")
OLD_BUFFERS = re.compile(r"(?:.*\.)?(?:rotary_emb\.inv_freq|h\.\d+\.attn\.(?:bias|masked_bias))")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        hint: str = "",
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
        hint = f"; {hint or 'is this the right base model?'}" if lost else ""
        super().__init__(f"{where}: keys do not fit: {'; '.join(parts)}{hint}")


def _what_keys(state: Mapping[str, Tensor]) -> str:
    """What is to be said about keys of which hardly any fits."""
    inside = [key for key in state if ".codi." in key]
    if 2 * len(inside) > len(state):
        before = Counter(key[: key.index(".codi.") + 1] for key in inside).most_common(1)[0][0]
        return f"the keys begin with {before!r}, which those of a CODI checkpoint do not: take it off"
    if not any(key.startswith("codi.") for key in state):
        return f"no key begins with 'codi.', as those of a CODI checkpoint do ({listed(sorted(state), 2)})"
    return ""


@dataclass
class Layout:
    """Which keys a checkpoint must have, given its base model."""

    prefix: str
    plain: dict[str, tuple[int, ...]]  # key in the checkpoint -> shape
    lora: dict[str, bool] = field(default_factory=dict)  # module -> whether its weight is stored (in, out), as Conv1D's
    ranks: dict[str, int] = field(default_factory=dict)  # module -> rank
    lora_r: int = 0  # the most common of them


def drop_old_buffers(state: dict[str, Tensor], skeleton: nn.Module, notes: list[str]) -> None:
    """Leave out, in place, the buffers that old versions of transformers stored: rotary inv_freq, GPT-2's attn.bias and
    attn.masked_bias. A key of that name that the base model has a weight for stays."""
    own = set(skeleton.state_dict())
    names = dict(skeleton.named_modules())

    def is_old(key: str) -> bool:
        name = key.removeprefix(WRAPPER).removeprefix("codi.")
        holder = name.rpartition(".")[0]
        place = holder.removesuffix(".rotary_emb") if name.endswith("inv_freq") else holder
        return name != key and name not in own and bool(OLD_BUFFERS.fullmatch(name)) and place in names

    dropped = [key for key in state if is_old(key)]
    for key in dropped:
        del state[key]
    if dropped:
        notes.append(f"buffers of old versions of transformers were left out: {listed(dropped, 4)}")


def find_layout(
    skeleton: nn.Module,
    state: Mapping[str, Tensor],
    tied: set[str],
    adapter: Adapter | None = None,
    notes: list[str] | None = None,
) -> Layout:
    """Expected keys and shapes.

    Without an adapter_config.json that says which modules carry LoRA, a kind of linear layer that carries it in one
    block must carry it in all, apart from blocks without any.

    Args:
        skeleton: base model on the meta device.
        state: weights of the checkpoint.
        tied: names in the base model of weights that may be stored once or twice.
        adapter: what adapter_config.json says.
        notes: gets a line about blocks without LoRA.
    """
    prefix = WRAPPER if any(key.startswith(WRAPPER) for key in state) else "codi."
    modules = dict(skeleton.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    marks = re.compile(r"(.*)\.(?:base_layer\.(?:weight|bias)|lora_[AB]\.default\.weight)")
    found = {match[1] for key in state if (match := marks.fullmatch(key.removeprefix(prefix)))}
    if adapter is not None and adapter.chooses:
        carriers = {name for name in linear if adapter.carries(name, name == _head_of(skeleton))}
    else:
        kinds = {re.sub(r"\.\d+\.", ".", name) for name in found}
        blocks = {_block(name) for name in found}
        alike = {name for name in linear if re.sub(r"\.\d+\.", ".", name) in kinds}
        carriers = {name for name in alike if _block(name) in blocks}
        if notes is not None and carriers < alike:
            notes.append(f"blocks without LoRA: {listed(sorted({_block(name) for name in alike - carriers}))}")

    layout = Layout(prefix, {})
    for key, value in skeleton.state_dict().items():
        module, _, kind = key.rpartition(".")
        if module in carriers:
            layout.plain[f"{prefix}{module}.base_layer.{kind}"] = tuple(value.shape)
            layout.lora[module] = isinstance(linear[module], Conv1D)
        elif key not in tied or f"{prefix}{key}" in state:
            layout.plain[prefix + key] = tuple(value.shape)
    layout.lora_r, layout.ranks = _ranks(state, prefix, layout.lora)
    for module, transposed in layout.lora.items():
        weight = linear[module].weight.shape
        out, inside = (weight[1], weight[0]) if transposed else (weight[0], weight[1])
        layout.plain[f"{prefix}{module}.lora_A.default.weight"] = (layout.ranks[module], inside)
        layout.plain[f"{prefix}{module}.lora_B.default.weight"] = (out, layout.ranks[module])
    return layout


def _block(name: str) -> str:
    """The block that a module is in, such as model.layers.3; "" outside the blocks."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else ""


def _head_of(skeleton: nn.Module) -> str:
    head = skeleton.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in skeleton.named_modules() if module is head), "")


def _ranks(state: Mapping[str, Tensor], prefix: str, lora: Mapping[str, bool]) -> tuple[int, dict[str, int]]:
    """The most common rank, and that of every module; the most common one where a module's A and B disagree."""
    said: dict[str, list[int]] = {}
    for module in lora:
        pair = (state.get(f"{prefix}{module}.lora_{side}.default.weight") for side in "AB")
        said[module] = [x.shape[i] for i, x in enumerate(pair) if x is not None and x.dim() == 2 and x.shape[i]]
    counts = Counter(ranks[0] for ranks in said.values() if ranks)
    usual = counts.most_common(1)[0][0] if counts else 0
    chosen = {m: ranks[0] if ranks and len(set(ranks)) == 1 else usual for m, ranks in said.items()}
    return usual, chosen


def projection_shapes(
    state: Mapping[str, Tensor], d_model: int, notes: list[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the projection; its width is the one that most of the weights have.

    Published options leave out its LayerNorm (no `prj.ln.…`), or the whole projection (no `prj.…`): z_k = h_{k-1}.

    Args:
        state: weights of the checkpoint.
        d_model: of the base model.
        notes: gets a line if something is left out.
    """
    mine = [key for key in state if key.startswith("prj.")]
    if not mine:
        if notes is not None:
            notes.append("no projection: a latent is fed the state before it as it is")
        return {}
    at = (("prj.1.weight", 0), ("prj.1.bias", 0), ("prj.3.weight", 1))
    widths = Counter(state[key].shape[i] for key, i in at if key in state and state[key].dim() > i)
    width = widths.most_common(1)[0][0] if widths else d_model
    shapes: dict[str, tuple[int, ...]] = {
        "prj.1.weight": (width, d_model),
        "prj.1.bias": (width,),
        "prj.3.weight": (d_model, width),
        "prj.3.bias": (d_model,),
    }
    if any(key.startswith("prj.ln") for key in mine):
        return shapes | dict.fromkeys(PRJ_LN, (d_model,))
    if notes is not None:
        notes.append("the projection has no LayerNorm")
    return shapes


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
        raise CheckpointError(where, missing, unexpected, misshapen, _what_keys(state))
    for key, value in state.items():
        if value.dtype not in DTYPES or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise UserError(f"{where}: {key} holds {kind}, weights must be floating point")
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


def merged_weights(
    state: dict[str, Tensor], layout: Layout, scales: Mapping[str, float], dtype: torch.dtype
) -> dict[str, Tensor]:
    """State dict of the base model, weight + scale · B A in float32, then rounded once. LoRA keys stay in `state`.

    Args:
        state: weights under the checkpoint's names.
        layout: what they are.
        scales: module -> scale of its LoRA; modules that are not named stay as they are.
        dtype: of the result.
    """
    merged: dict[str, Tensor] = {}
    for key in [key for key in state if ".lora_" not in key]:
        tensor = state.pop(key)
        name = key.removeprefix(layout.prefix).replace(".base_layer.", ".")
        module, _, kind = name.rpartition(".")
        scale = scales.get(module, 0.0)
        if module in layout.lora and kind == "weight" and scale:
            a = state[f"{layout.prefix}{module}.lora_A.default.weight"].float()
            b = state[f"{layout.prefix}{module}.lora_B.default.weight"].float()
            delta = scale * (b @ a)
            merged[name] = (tensor.float() + (delta.T if layout.lora[module] else delta)).to(dtype)
        else:
            merged[name] = tensor.to(dtype)
    return merged
