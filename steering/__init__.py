"""Steering: directions with their controls, and the edits that apply them, between the latents of CODI models and in
the residual stream of ordinary language models.

Latents: `means` accumulates what the latents of a CODI model are on average, `directions` takes differences and draws
controls, `interventions` applies coefficients, `replacements` puts given values in, `steered` does the usual in three
lines. Axes, indices and units are those of `codi`.

    direction = direction_from(model, prompts, source=5, target=2, space="kv")
    with steer(model, direction, latent=4, coefficient=2, timing="cached"):
        model.answer(questions)

Ordinary language models: `contrasts` reads pairs of texts, `pair_statistics` makes control vectors of what was read,
`control_vectors` holds one direction per layer and adds them up, `vector_files` reads and writes them (also for
llama.cpp), `vector_controls` draws what they are compared with. Layers are those of `lm`.

    vector = fit_contrasts(model, right, wrong).vector("contrastive")
    with steer(model, vector, 1.5, layers=[12]):
        model.base.generate(**inputs)

`controlled` has the one word `steer` for both.
"""

from typing import TYPE_CHECKING

from lm.lazy import exports

if TYPE_CHECKING:
    from steering.contrasts import Written, fit_contrasts, fit_runs, pooled
    from steering.control_vectors import ControlVector, VectorOrigin
    from steering.controlled import steer
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
    from steering.pair_statistics import PairStatistics
    from steering.replacements import (
        AblatePrompt,
        HideSlots,
        MeanAblation,
        RecordPrompt,
        ReplaceRows,
        replace_embeddings,
    )
    from steering.steered import direction_from, load_direction, save_direction
    from steering.vector_controls import equal_kl, random_vector
    from steering.vector_files import load_vector, save_vector

__all__ = [
    "AblatePrompt",
    "AddDirection",
    "ControlDraws",
    "ControlVector",
    "Direction",
    "DrawsAccumulator",
    "Edit",
    "HideSlots",
    "LatentMeans",
    "LatentMeansAccumulator",
    "MeanAblation",
    "Origin",
    "PairStatistics",
    "RecordPrompt",
    "ReplaceLatent",
    "ReplaceRows",
    "VectorOrigin",
    "Written",
    "branches",
    "covariance_matched",
    "difference",
    "direction_from",
    "edit_table",
    "equal_kl",
    "fit_contrasts",
    "fit_runs",
    "legacy_difference",
    "load_direction",
    "load_vector",
    "match_norms",
    "patch_coordinate",
    "patch_norm",
    "patch_scalar",
    "pooled",
    "random_direction",
    "random_vector",
    "replace_embeddings",
    "save_direction",
    "save_vector",
    "shuffled_difference",
    "steer",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "AblatePrompt": "steering.replacements",
        "AddDirection": "steering.interventions",
        "ControlDraws": "steering.means",
        "ControlVector": "steering.control_vectors",
        "Direction": "steering.directions",
        "DrawsAccumulator": "steering.means",
        "Edit": "steering.interventions",
        "HideSlots": "steering.replacements",
        "LatentMeans": "steering.means",
        "LatentMeansAccumulator": "steering.means",
        "MeanAblation": "steering.replacements",
        "Origin": "steering.directions",
        "PairStatistics": "steering.pair_statistics",
        "RecordPrompt": "steering.replacements",
        "ReplaceLatent": "steering.interventions",
        "ReplaceRows": "steering.replacements",
        "VectorOrigin": "steering.control_vectors",
        "Written": "steering.contrasts",
        "branches": "steering.interventions",
        "covariance_matched": "steering.directions",
        "difference": "steering.directions",
        "direction_from": "steering.steered",
        "edit_table": "steering.interventions",
        "equal_kl": "steering.vector_controls",
        "fit_contrasts": "steering.contrasts",
        "fit_runs": "steering.contrasts",
        "legacy_difference": "steering.directions",
        "load_direction": "steering.steered",
        "load_vector": "steering.vector_files",
        "match_norms": "steering.directions",
        "patch_coordinate": "steering.directions",
        "patch_norm": "steering.directions",
        "patch_scalar": "steering.directions",
        "pooled": "steering.contrasts",
        "random_direction": "steering.directions",
        "random_vector": "steering.vector_controls",
        "replace_embeddings": "steering.replacements",
        "save_direction": "steering.steered",
        "save_vector": "steering.vector_files",
        "shuffled_difference": "steering.directions",
        "steer": "steering.controlled",
    },
)
