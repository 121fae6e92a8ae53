"""Control vectors of ordinary language models: one direction per layer, with where they come from, and their algebra.

    vector = fit_contrasts(model, right, wrong).vector("contrastive")      # steering.contrasts
    with steer(model, vector, 1.5, layers=[12]):                           # steering.controlled
        model.base.generate(**inputs)

Layers are those of `lm`: layer l is the output of block l, 1..n_layers, also the last one before the final norm. A
vector that is added at layer l therefore moves exactly what was read there. Vectors carry the identity of the weights
that they were read from and are refused for other ones.

Knows nothing about texts, files (those are in vector_files.py) or what becomes of a steered model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm.errors import UserError

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["ControlVector", "VectorOrigin", "middle_layer"]


@dataclass(frozen=True)
class VectorOrigin:
    """Where a control vector comes from: it is of use for this model only.

    Attributes:
        model_name: for messages.
        model_hash: identity of the weights (`LanguageModel.weights_hash`); "": not known.
        model_type: architecture, as the model's configuration names it, such as "llama".
        n_layers: blocks of the model; None: not known (files of other programs).
        method: "reading", "contrastive", "pca-contrast", "pca-reading", "random", …; sums say what they are sums of.
        tokens: which tokens were read ("last", "generated", …); None: not known, or not the same in a sum.
        n: texts or pairs that it was derived from; None likewise.
        centred: whether the mean was taken away before the principal component; None: no PCA.
        scale: length of the principal components, "mean" (of the mean that they stand for) or "unit"; None: no PCA.
        explained: layer -> share of the variance (of the second moment where not centred) along the direction.
        data_digest: SHA-256 over the texts; None: not known, or not the same in a sum.
        made_by: program and version that wrote it.
    """

    model_name: str = ""
    model_hash: str = ""
    model_type: str = ""
    n_layers: int | None = None
    method: str = ""
    tokens: str | None = None
    n: int | None = None
    centred: bool | None = None
    scale: str | None = None
    explained: Mapping[int, float] = field(default_factory=dict)
    data_digest: str | None = None
    made_by: str = ""


def middle_layer(n_layers: int) -> int:
    """The layer that is steered where nobody says another one: n_layers / 2, rounded up. Source: arXiv 2504.19483."""
    return (n_layers + 1) // 2


@dataclass(frozen=True, eq=False)
class ControlVector:
    """One direction per layer, float32, not normalised: coefficient 1.0 adds the direction as it is.

    Adding, subtracting, multiplying and dividing give new vectors; a layer that only one of two vectors has is taken
    from that one. What the two do not agree on is forgotten by the sum's origin.

    Attributes:
        directions: layer 1..n_layers -> (d_model,), float32 on the CPU, by ascending layer.
        origin: where it comes from.

    Raises:
        ValueError: no layer, a layer below 1 or above the model's, directions that are no vectors of one width, or
            numbers that are not finite.
    """

    directions: Mapping[int, Tensor]
    origin: VectorOrigin = field(default_factory=VectorOrigin)

    def __post_init__(self) -> None:
        if not self.directions:
            raise UserError("a control vector needs at least one layer, got none")
        last = self.origin.n_layers
        kept: dict[int, Tensor] = {}
        for layer in sorted(self.directions):
            if isinstance(layer, bool) or layer < 1 or (last is not None and layer > last):
                raise UserError(f"layers of a control vector must be in 1..{last or 'n_layers'}, got {layer}")
            direction = self.directions[layer].detach().to("cpu", torch.float32, copy=True).contiguous()
            if direction.dim() != 1 or not len(direction):
                raise UserError(f"a direction must be (d_model,), got {tuple(direction.shape)} at layer {layer}")
            if not bool(torch.isfinite(direction).all()):
                raise UserError(f"the direction of layer {layer} holds numbers that are not finite")
            kept[layer] = direction
        widths = sorted({len(direction) for direction in kept.values()})
        if len(widths) > 1:
            raise UserError(f"directions must all have the width of one model, got {' and '.join(map(str, widths))}")
        object.__setattr__(self, "directions", MappingProxyType(kept))

    # --- What it is ---

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a direction, ascending."""
        return tuple(self.directions)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return len(next(iter(self.directions.values())))

    def __getitem__(self, layer: int) -> Tensor:
        """(d_model,) direction of a layer; ValueError if there is none."""
        if layer not in self.directions:
            raise UserError(f"this control vector has no layer {layer}: it has {_listed(self.layers)}")
        return self.directions[layer]

    def __repr__(self) -> str:
        named = f"{self.origin.method or 'unknown'} of {self.origin.model_name or 'an unnamed model'}"
        return f"ControlVector({named}, layers {_listed(self.layers)}, d_model={self.d_model})"

    def tensor(self) -> Tensor:
        """(layer, d_model) the directions, in the order of `layers`."""
        return torch.stack(list(self.directions.values()))

    def stacked(self, n_layers: int) -> Tensor:
        """(n_layers + 1, d_model) one row per layer from 0 on, zero where there is no direction, as grids of edits
        (`lm.steered`) take it; ValueError if a layer is above n_layers."""
        if self.layers[-1] > n_layers:
            raise UserError(f"layer {self.layers[-1]} of this control vector is above the model's {n_layers}")
        rows = torch.zeros(n_layers + 1, self.d_model)
        rows[list(self.layers)] = self.tensor()
        return rows

    def only(self, layers: Iterable[int]) -> ControlVector:
        """The same vector with some of its layers; ValueError for one that it does not have."""
        chosen = {layer: self[layer] for layer in layers}
        explained = {layer: share for layer, share in self.origin.explained.items() if layer in chosen}
        return ControlVector(chosen, replace(self.origin, explained=explained))

    def norms(self) -> dict[int, float]:
        """Layer -> Euclidean norm."""
        return {layer: float(direction.double().norm()) for layer, direction in self.directions.items()}

    def cosines(self, other: ControlVector | None = None) -> Tensor:
        """Cosines between the layers of this vector and those of another one, or of itself.

        Returns:
            (layer, layer of the other) float64 in -1..1; nan where a direction is zero.

        Raises:
            ValueError: a vector of another model.
        """
        other = self if other is None else other
        self._check_same_model(other)
        a, b = self.tensor().double(), other.tensor().double()
        return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1)[None])

    def cosine(self, other: ControlVector) -> dict[int, float]:
        """Layer -> cosine with the same layer of another vector, for the layers that both have; nan for zeros."""
        both = [layer for layer in self.layers if layer in other.directions]
        if not both:
            raise UserError(f"these control vectors share no layer: {_listed(self.layers)} and {_listed(other.layers)}")
        table = self.only(both).cosines(other.only(both))
        return {layer: float(table[i, i]) for i, layer in enumerate(both)}

    # --- Algebra ---

    def __add__(self, other: ControlVector) -> ControlVector:
        return self._joined(other, "+") if isinstance(other, ControlVector) else NotImplemented

    def __sub__(self, other: ControlVector) -> ControlVector:
        return self._joined(other, "-") if isinstance(other, ControlVector) else NotImplemented

    def __neg__(self) -> ControlVector:
        return self * -1.0

    def __mul__(self, factor: Real | float) -> ControlVector:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        number = float(factor)
        if not math.isfinite(number):
            raise UserError(f"a control vector can be multiplied by finite numbers, got {number}")
        scaled = {layer: direction * number for layer, direction in self.directions.items()}
        return ControlVector(scaled, replace(self.origin, method=f"{number:g} * {_grouped(self.origin.method)}"))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Real | float) -> ControlVector:
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        if float(divisor) == 0:
            raise UserError("a control vector cannot be divided by 0")
        return self * (1.0 / float(divisor))

    def scaled(self, like: ControlVector) -> ControlVector:
        """The same directions with the norms of another vector, layer by layer: equal sizes, so that coefficients
        compare.

        Raises:
            ValueError: a vector of another model, a layer that `like` lacks, or a zero direction where `like` has one.
        """
        self._check_same_model(like)
        found = {}
        for layer, direction in self.directions.items():
            own, wanted = direction.double().norm(), like[layer].double().norm()
            if own == 0 and wanted > 0:
                raise UserError(f"the direction of layer {layer} is zero: it cannot be given the norm {wanted:g}")
            found[layer] = direction.double() * (wanted / own if own > 0 else 0.0)
        return ControlVector(found, self.origin)

    def _joined(self, other: ControlVector, sign: str) -> ControlVector:
        self._check_same_model(other)
        factor = 1.0 if sign == "+" else -1.0
        found = dict(self.directions)
        for layer, direction in other.directions.items():
            found[layer] = found[layer] + factor * direction if layer in found else factor * direction
        a, b = self.origin, other.origin
        agreed: dict[str, Any] = {
            name: getattr(a, name) if getattr(a, name) == getattr(b, name) else None
            for name in ("tokens", "n", "centred", "scale", "data_digest")
        }
        named = {name: getattr(a, name) or getattr(b, name) for name in ("model_name", "model_hash", "model_type")}
        method = f"{a.method or '?'} {sign} {_grouped(b.method) if sign == '-' else b.method or '?'}"
        return ControlVector(
            found,
            replace(a, **named, **agreed, n_layers=a.n_layers or b.n_layers, method=method, explained={}),
        )

    # --- Whose it is ---

    def _check_same_model(self, other: ControlVector) -> None:
        _refuse_other(self, other.origin, other.d_model, other.layers[-1], "control vectors of two models")

    def check_model(self, model: LanguageModel, what: str = "the control vector") -> None:
        """Raise ValueError if this vector is of other weights than the model's.

        Hashes are compared where both are known; sizes always.

        Args:
            model: that is to be steered.
            what: what to call the vector in the message, such as its file.
        """
        here = VectorOrigin(model_name=model.name, n_layers=model.n_layers)
        if self.origin.model_hash:
            here = replace(here, model_hash=model.weights_hash)
        _refuse_other(self, here, model.d_model, None, f"{what} was made with another model")


def _refuse_other(vector: ControlVector, other: VectorOrigin, width: int, top: int | None, what: str) -> None:
    """ValueError if a vector does not go with other weights of the given width (and with a vector up to layer top)."""
    own = vector.origin
    names = f"{own.model_name or 'unnamed'}, {other.model_name or 'unnamed'}"
    if vector.d_model != width:
        raise UserError(f"{what}: widths {vector.d_model} and {width} ({names})")
    if own.n_layers is not None and other.n_layers is not None and own.n_layers != other.n_layers:
        raise UserError(f"{what}: {own.n_layers} and {other.n_layers} layers ({names})")
    if other.n_layers is not None and vector.layers[-1] > other.n_layers:
        raise UserError(f"{what}: layer {vector.layers[-1]} of {other.n_layers} ({names})")
    if own.n_layers is not None and top is not None and top > own.n_layers:
        raise UserError(f"{what}: layer {top} of {own.n_layers} ({names})")
    if own.model_hash and other.model_hash and own.model_hash != other.model_hash:
        raise UserError(f"{what}: weights {own.model_hash[:12]} and {other.model_hash[:12]} ({names})")


def _grouped(method: str) -> str:
    """A method's name, in brackets where it is a sum or a product already."""
    return f"({method})" if " " in method else method or "?"


def _listed(layers: tuple[int, ...]) -> str:
    """Layers in few words: "1..12" where they are all there, "3, 5" where not."""
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(map(str, layers))
