"""One word for steering, whatever is steered.

    with steer(model, vector, 1.5, layers=[12]):                 # an ordinary language model, under a control vector
        model.base.generate(**inputs)
    with steer(model, direction, latent=4, coefficient=2):       # a CODI model, between two of its latents
        model.answer(questions)

Control vectors are added by `lm.edits`; directions between latents by `steering.steered`.

Knows nothing about where vectors come from or whether they help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, overload

from torch import nn

from codi import CodiModel
from lm.edits import ResidualEdit, edited
from lm.errors import UserError
from lm.model import LanguageModel
from lm.terms import EditPositions, Part, Timing
from steering import steered
from steering.control_vectors import ControlVector, middle_layer
from steering.directions import Direction
from steering.interventions import AddDirection

__all__ = ["steer"]


@overload
def steer(
    model: CodiModel,
    direction: Direction,
    latent: int,
    coefficient: float = 1.0,
    timing: Timing = "continue",
    *,
    part: Part = "both",
) -> AbstractContextManager[AddDirection]: ...


@overload
def steer(
    model: Any,
    vector: ControlVector,
    coefficient: float = 1.0,
    *,
    layers: int | Sequence[int] | None = None,
    positions: EditPositions = "all",
    normalise: bool = False,
) -> AbstractContextManager[None]: ...


def steer(model: Any, *given: Any, **named: Any) -> AbstractContextManager[Any]:
    """While inside, the model is steered; afterwards, also after an error, it is as before.

    A `Direction` steers a CODI model at one latent, see `steering.steered.steer`. A `ControlVector` steers an ordinary
    language model: every pass inside adds coefficient x direction to the output of the given blocks, whoever runs it.

    Args:
        model: a `LanguageModel` or a causal language model of Hugging Face (a `CodiModel` for a direction).
        vector: control vector; of a plain Hugging Face model only the sizes can be compared with the vector's.
        coefficient: 1.0 adds the vector as it is; 0 changes nothing, bit for bit.
        layers: which, of those that the vector has; None: its only one. The published choice is the middle layer.
        positions: which tokens, see `lm.terms.EditPositions`; padding never.
        normalise: bring every steered state back to the norm it had before.

    Raises:
        ValueError: a vector of another model, layers that it does not have, none chosen where it has several, or a
            coefficient that is not finite.

    Source: Højer, Jarvis, Heinrich 2025, arXiv 2504.19483.
    """
    what = given[0] if given else named.get("direction", named.get("vector"))
    if isinstance(what, ControlVector):
        return _under_vector(model, *given, **named)
    if isinstance(what, Direction):
        return steered.steer(model, *given, **named)
    raise UserError(f"steer takes a ControlVector or a Direction, got {type(what).__name__}")


@contextmanager
def _under_vector(
    model: Any,
    vector: ControlVector,
    coefficient: float = 1.0,
    *,
    layers: int | Sequence[int] | None = None,
    positions: EditPositions = "all",
    normalise: bool = False,
) -> Iterator[None]:
    if isinstance(model, CodiModel):
        raise UserError("a CODI model is steered by a Direction between its latents, not by a ControlVector")
    if not math.isfinite(coefficient):
        raise UserError(f"coefficient must be a finite number, got {coefficient}")
    opened = model if isinstance(model, LanguageModel) else _opened(model)
    vector.check_model(opened)
    if layers is None:
        if len(vector.layers) > 1:
            raise UserError(
                f"this control vector has {len(vector.layers)} layers: say which with layers=, such as the middle one, "
                f"[{middle_layer(opened.n_layers)}]"
            )
        layers = vector.layers
    chosen = [layers] if isinstance(layers, int) else sorted(set(layers))
    edits = [ResidualEdit(layer, vector[layer], float(coefficient), positions, normalise) for layer in chosen]
    with edited(opened, edits):
        yield


def _opened(model: Any) -> LanguageModel:
    """A model of Hugging Face, taken apart; its modules stay in the mode (training or not) that they are in."""
    if not isinstance(model, nn.Module) or not hasattr(model, "get_output_embeddings"):
        raise UserError(f"steer takes a LanguageModel or a model of Hugging Face, got {type(model).__name__}")
    modes = [(module, module.training) for module in model.modules()]
    opened = LanguageModel(model)
    for module, training in modes:
        module.training = training
    return opened
