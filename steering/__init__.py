"""Steering between latents: means, directions with their controls, and the edits that apply them.

`means` accumulates what the latents of a CODI model are on average, `directions` takes differences and draws controls,
`interventions` applies coefficients, `replacements` puts given values in. Axes, indices and units are those of `codi`.

    accumulator = LatentMeansAccumulator(model)
    accumulator.update(model.rollout(model.encode(questions)))
    direction = difference(accumulator.finish(), a=2, b=5, space="embedding")
    model.answer(["question"], interventions=[AddDirection(direction, latent=5, coefficient=1.0)])
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
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
    from steering.replacements import (
        AblatePrompt,
        HideSlots,
        MeanAblation,
        RecordPrompt,
        ReplaceRows,
        replace_embeddings,
    )

__all__ = [
    "AblatePrompt",
    "AddDirection",
    "ControlDraws",
    "Direction",
    "DrawsAccumulator",
    "Edit",
    "HideSlots",
    "LatentMeans",
    "LatentMeansAccumulator",
    "MeanAblation",
    "RecordPrompt",
    "ReplaceLatent",
    "ReplaceRows",
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
    "replace_embeddings",
    "shuffled_difference",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "AblatePrompt": "steering.replacements",
        "AddDirection": "steering.interventions",
        "ControlDraws": "steering.means",
        "Direction": "steering.directions",
        "DrawsAccumulator": "steering.means",
        "Edit": "steering.interventions",
        "HideSlots": "steering.replacements",
        "LatentMeans": "steering.means",
        "LatentMeansAccumulator": "steering.means",
        "MeanAblation": "steering.replacements",
        "RecordPrompt": "steering.replacements",
        "ReplaceLatent": "steering.interventions",
        "ReplaceRows": "steering.replacements",
        "branches": "steering.interventions",
        "covariance_matched": "steering.directions",
        "difference": "steering.directions",
        "edit_table": "steering.interventions",
        "legacy_difference": "steering.directions",
        "match_norms": "steering.directions",
        "patch_coordinate": "steering.directions",
        "patch_norm": "steering.directions",
        "patch_scalar": "steering.directions",
        "random_direction": "steering.directions",
        "replace_embeddings": "steering.replacements",
        "shuffled_difference": "steering.directions",
    },
)
