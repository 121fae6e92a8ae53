"""Steering between latents: means, directions with their controls, and the edits that apply them.

`means` accumulates what the latents of a CODI model are on average, `directions` takes differences and draws controls,
`interventions` applies coefficients, `replacements` puts given values in, `steered` does the usual in three lines.
Axes, indices and units are those of `codi`.

    direction = direction_from(model, prompts, source=5, target=2, space="kv")
    with steer(model, direction, latent=4, coefficient=2, timing="cached"):
        model.answer(questions)
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
    from steering.directions import (
        Direction,
        Origin,
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
    from steering.steered import direction_from, load_direction, save_direction, steer

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
    "Origin",
    "RecordPrompt",
    "ReplaceLatent",
    "ReplaceRows",
    "branches",
    "covariance_matched",
    "difference",
    "direction_from",
    "edit_table",
    "legacy_difference",
    "load_direction",
    "match_norms",
    "patch_coordinate",
    "patch_norm",
    "patch_scalar",
    "random_direction",
    "replace_embeddings",
    "save_direction",
    "shuffled_difference",
    "steer",
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
        "Origin": "steering.directions",
        "RecordPrompt": "steering.replacements",
        "ReplaceLatent": "steering.interventions",
        "ReplaceRows": "steering.replacements",
        "branches": "steering.interventions",
        "covariance_matched": "steering.directions",
        "difference": "steering.directions",
        "direction_from": "steering.steered",
        "edit_table": "steering.interventions",
        "legacy_difference": "steering.directions",
        "load_direction": "steering.steered",
        "match_norms": "steering.directions",
        "patch_coordinate": "steering.directions",
        "patch_norm": "steering.directions",
        "patch_scalar": "steering.directions",
        "random_direction": "steering.directions",
        "replace_embeddings": "steering.replacements",
        "save_direction": "steering.steered",
        "shuffled_difference": "steering.directions",
        "steer": "steering.steered",
    },
)
