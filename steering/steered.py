"""A question of your own in three lines: a direction from a list of prompts, and answers under it.

    direction = direction_from(model, prompts, source=5, target=2, space="kv")
    with steer(model, direction, latent=4, coefficient=2, timing="cached"):
        model.answer(questions)

The answers are those of the branch engine (`codi.branches`), which is the fast way to many edits. Directions are saved
with where they come from, and refused for another model.

Knows nothing about right or wrong answers, controls or statistics: those are in experiments.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from codi import CodiModel, LatentRollout, UserError
from codi.interventions import Slot
from codi.parts import Parts
from codi.rollout import rollout
from lm.cache import read_slots, replace_slot
from lm.terms import KeyFrame, Part, Space, Timing
from steering.directions import Direction, Origin, difference
from steering.interventions import AddDirection
from steering.means import LatentMeansAccumulator

__all__ = ["SteerAtEnd", "direction_from", "load_direction", "save_direction", "steer"]

KIND = "codi-steering direction"


class SteerAtEnd(AddDirection):
    """`AddDirection` for the two timings that edit a finished run: "cached" (think on unedited, then edit the slot) and
    "early-exit" (think up to the edited latent only)."""

    early_exit = False

    def edit_run(self, model: Parts, run: LatentRollout) -> LatentRollout:
        k = self.latent
        if self.direction.space == "kv":
            edited = run.truncate(k if self.early_exit else run.n_latents).select(range(len(run)))
            assert edited.past_key_values is not None
            place = edited.prompt_width + k - 1
            slot = Slot(model, k, place, edited.first_position + k - 1)
            keys, values = read_slots(edited.past_key_values, place, place + 1)
            for layer in range(1, model.n_layers + 1):
                new = self.edit_slot(slot, layer, keys[:, 0, layer - 1], values[:, 0, layer - 1])
                replace_slot(edited.past_key_values, layer - 1, place, *new)
            return edited
        during = AddDirection(self.direction, k, self.value_coefficient)
        until = rollout(model, run.truncate(k - 1), k, [during], keep=("cache",))
        if self.early_exit:
            return until
        edited = run.select(range(len(run)))
        assert edited.past_key_values is not None and until.past_key_values is not None
        place = edited.prompt_width + k - 1
        keys, values = read_slots(until.past_key_values, place, place + 1)
        for layer in range(model.n_layers):
            replace_slot(edited.past_key_values, layer, place, keys[:, 0, layer], values[:, 0, layer])
        return edited


class SteerEarlyExit(SteerAtEnd):
    """`SteerAtEnd` with timing "early-exit"."""

    early_exit = True


KINDS: dict[str, type[AddDirection]] = {
    "continue": AddDirection,
    "cached": SteerAtEnd,
    "early-exit": SteerEarlyExit,
}


@contextmanager
def steer(
    model: CodiModel,
    direction: Direction,
    latent: int,
    coefficient: float = 1.0,
    timing: Timing = "continue",
    *,
    part: Part = "both",
) -> Iterator[AddDirection]:
    """While inside, `model.answer` answers with coefficient × direction added at one latent; afterwards, also after an
    error, the model is as before.

    Args:
        model: to be steered.
        direction: from `direction_from`, or any other.
        latent: where, 1..model.n_latents.
        coefficient: 1.0 adds one whole mean difference.
        timing: "continue" (edit, think on), "cached" (think, then edit), "early-exit" (think up to the latent, edit,
            answer); only the first one also steers `model.rollout`, the others refuse it.
        part: "keys", "values" or "both", in kv space.

    Raises:
        ValueError: a latent that the model does not have, a direction of another model, or a block inside another one
            with which it has no meaning together.
    """
    if timing not in get_args(Timing):
        raise UserError(f"timing must be one of {', '.join(get_args(Timing))}, got {timing!r}")
    if isinstance(latent, bool) or not 1 <= latent <= model.n_latents:
        raise UserError(f"latent must be in 1..{model.n_latents}, got {latent}")
    if not math.isfinite(coefficient):
        raise UserError(f"coefficient must be a finite number, got {coefficient}")
    if part != "both" and direction.space != "kv":
        raise UserError(f"part={part!r} is for directions in kv space, got one in {direction.space} space")
    if direction.origin is not None:
        _check_origin(direction.origin, model, "the direction")
    _check_sizes(direction, model, "the direction")
    edit = KINDS[timing](direction, latent, coefficient, part=part)
    for other in model.interventions:
        if isinstance(other, AddDirection):
            both = (type(other), type(edit))
            vectors = timing == "cached" and "kv" != direction.space
            if both[0] is not both[1] or vectors or timing == "early-exit" or other.direction.space != direction.space:
                names = {kind: name for name, kind in KINDS.items()}
                raise UserError(
                    f"steer inside steer: timing {timing!r} in {direction.space} space inside "
                    f"{names[both[0]]!r} in {other.direction.space} space has no meaning together"
                )
    with model.with_interventions(edit):
        yield edit


# --- Directions -------------------------------------------------------------------------------------------------------


def direction_from(
    model: CodiModel,
    prompts: Sequence[str],
    source: int,
    target: int,
    space: Space = "kv",
    *,
    keys: KeyFrame = "content",
    batch_size: int = 64,
) -> Direction:
    """The mean over prompts of what latent `source` holds, minus that of latent `target`: added at the target, it moves
    the target's mean to the source's.

    Args:
        model: whose latents.
        prompts: questions, used as they are; take others than those that are steered.
        source, target: latents A and B of A−B, 1-based.
        space: "kv", "embedding" or "hidden".
        keys: "content" or "raw" keys, see `steering.difference`.
        batch_size: prompts at once.

    Raises:
        ValueError: no prompts, a latent that the model does not have, twice the same one, or an unknown space.
    """
    for latent in (source, target):
        if not 1 <= latent <= model.n_latents:
            raise UserError(f"source and target must be latents in 1..{model.n_latents}, got {latent}")
    means = LatentMeansAccumulator(model)
    for _, part in model.encode(prompts).parts(batch_size):
        kept = ("embeddings", "hidden_states", "keys", "values")
        means.update(model.rollout(part, model.n_latents, keep=kept))
    asked = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    protocol = model.protocol.to_json()
    origin = Origin(model.checkpoint_hash, model.name, protocol, source, target, len(prompts), asked)
    return replace(difference(means.finish(), source, target, space, keys=keys), origin=origin)


def save_direction(path: str | Path, direction: Direction) -> None:
    """Write a direction as safetensors: float64 tensors, and in the header where it comes from and its norms.

    Raises:
        ValueError: a direction that does not say which checkpoint it belongs to.
    """
    origin = direction.origin
    if origin is None or not origin.model_hash:
        raise UserError(
            "this direction does not say which checkpoint it belongs to: make it with direction_from, from a model "
            "that was loaded from files, or give it an Origin with dataclasses.replace"
        )
    named = {name: getattr(direction, name) for name in ("keys", "values", "vector")}
    tensors = {name: block.double().contiguous() for name, block in named.items() if block is not None}
    header = {
        "kind": KIND,
        "space": direction.space,
        "keys_frame": direction.keys_frame,
        **{name: str(value) for name, value in asdict(origin).items()},
        "norm": repr(direction.norm()),
        **{f"norm_{name}": json.dumps(_layer_norms(block)) for name, block in tensors.items()},
    }
    Path(path).write_bytes(save(tensors, header))


def load_direction(path: str | Path, model: CodiModel) -> Direction:
    """Read what `save_direction` wrote.

    Raises:
        ValueError: a file that is no direction, damaged, or of another checkpoint or protocol than the model's.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file") from error
    names = [field.name for field in fields(Origin)]
    lacking = [name for name in ("space", "keys_frame", "norm", *names) if name not in header]
    if header.get("kind") != KIND or lacking or not set(tensors) <= {"keys", "values", "vector"}:
        raise UserError(f"{path} holds no direction that save_direction wrote")
    try:
        numbers = {name: int(header[name]) for name in ("source", "target", "n_prompts")}
        norm = float(header["norm"])
        texts = {name: header[name] for name in names if name not in numbers}
        origin = Origin(**texts, **numbers)  # type: ignore[arg-type]
        space, frame = header["space"], header["keys_frame"]
        direction = Direction(space, keys_frame=frame, origin=origin, **tensors)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    _check_origin(origin, model, str(path))
    _check_sizes(direction, model, str(path))
    if not math.isclose(direction.norm(), norm, rel_tol=1e-9):
        raise UserError(f"{path} is damaged: norm {direction.norm():g}, written as {norm:g}")
    return direction


def _layer_norms(block: Tensor) -> list[float]:
    """Norm of each layer of keys or values; of a vector, one norm."""
    rows = block.flatten(1) if block.dim() > 1 else block[None]
    return [float(norm) for norm in torch.linalg.vector_norm(rows.double(), dim=1)]


def _check_origin(origin: Origin, model: CodiModel, what: str) -> None:
    if origin.model_hash != model.checkpoint_hash:
        raise UserError(
            f"{what} was made with another model: {origin.model_name} ({origin.model_hash[:12] or 'no hash'}), "
            f"this is {model.name} ({model.checkpoint_hash[:12] or 'no hash'})"
        )
    if origin.protocol != model.protocol.to_json():
        was, now = json.loads(origin.protocol), model.protocol.to_dict()
        differ = ", ".join(name for name in now if was.get(name) != now[name])
        raise UserError(f"{what} was made with another protocol of {model.name}: {differ} differ")


def _check_sizes(direction: Direction, model: CodiModel, what: str) -> None:
    wanted = (model.n_layers, model.n_kv_heads, model.d_head) if direction.space == "kv" else (model.d_model,)
    for block in direction.blocks():
        if tuple(block.shape) != wanted:
            raise UserError(f"{what} has shape {tuple(block.shape)}, {model.name} needs {wanted}")
