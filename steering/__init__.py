"""Steering between latents: means, directions with their controls, and the edits that apply them.

`means` accumulates what the latents of a CODI model are on average, `directions` takes differences and draws controls,
`interventions` is the only place where a coefficient is applied. Axes, indices and units are those of `codi`.

    accumulator = LatentMeansAccumulator(model)
    accumulator.update(model.rollout(model.encode(questions)))
    direction = difference(accumulator.finish(), a=2, b=5, space="embedding")
    model.answer(["question"], interventions=[AddDirection(direction, latent=5, coefficient=1.0)])
"""

from steering.directions import (
    Direction,
    covariance_matched,
    difference,
    legacy_difference,
    match_norms,
    patch_coordinate,
    patch_norm,
    patch_scalar,
    random_direction,
    shuffled_difference,
)
from steering.interventions import AddDirection, Edit, ReplaceLatent, branches, edit_table
from steering.means import ControlDraws, DrawsAccumulator, LatentMeans, LatentMeansAccumulator

__all__ = [
    "AddDirection",
    "ControlDraws",
    "Direction",
    "DrawsAccumulator",
    "Edit",
    "LatentMeans",
    "LatentMeansAccumulator",
    "ReplaceLatent",
    "branches",
    "covariance_matched",
    "difference",
    "edit_table",
    "legacy_difference",
    "match_norms",
    "patch_coordinate",
    "patch_norm",
    "patch_scalar",
    "random_direction",
    "shuffled_difference",
]
