"""From observations of a model to the measures of the alternation test: one value per prompt and latent.

Knows nothing about models, predictions or verdicts.
"""

from __future__ import annotations

import numpy as np

from experiments.alternation.hypothesis import MEASURES, TUNED_MEASURES
from experiments.alternation.measures import Observations, detection
from experiments.alternation.verdict import Profile, contrast_weights

__all__ = ["profiles_of"]


def profiles_of(observations: Observations) -> list[Profile]:
    """Every measure of `MEASURES` (and of `TUNED_MEASURES` if a tuned lens was read), in that order.

    Args:
        observations: of a model, or simulated.
    """
    clusters = observations.clusters
    found: dict[str, np.ndarray | None] = {}
    directions: dict[str, np.ndarray] = {}

    def rate(which: str, tuned: bool = False) -> np.ndarray:
        hit, chance = detection(observations, which, 5, tuned)
        return (hit - chance)[:, 1:]

    found["intermediate_detection"] = rate("intermediate")
    found["final_detection"] = rate("final")
    found["entropy"] = observations.readings.entropy[:, 1:, 0]
    if observations.correct_after is not None:
        after = observations.correct_after.astype(float)
        found["early_answer_gain"] = np.diff(after, axis=1)
        if observations.correct_ablated is not None:
            found["ablation_damage"] = after[:, -1:] - observations.correct_ablated.astype(float)
    if observations.attention is not None:
        n, latents = observations.n_latents, observations.attention[:, :, 2:]
        found["attention_to_numbers"] = observations.attention[:, :n, 0]
        found["attention_from_end"] = latents[:, n]
        found["attention_from_next"] = latents[:, np.arange(1, n + 1), np.arange(n)]
    weights = contrast_weights(observations.n_latents)
    apart = np.einsum("k,pkc->c", weights, observations.reference.places)
    found["components"] = observations.places
    directions["components"] = apart / (np.linalg.norm(apart) or 1.0)
    gains = observations.readable
    steps = [gain for name, gain in gains.items() if name != "answer"]
    if steps:
        found["probe_intermediate"] = np.mean(steps, axis=0)
        if "answer" in gains:
            found["probe_kind"] = np.mean(steps, axis=0) - gains["answer"]
    measures = MEASURES
    if observations.tuned is not None:
        measures += TUNED_MEASURES
        found["tuned_intermediate"] = rate("intermediate", tuned=True)
        found["tuned_final"] = rate("final", tuned=True)
        found["tuned_entropy"] = observations.tuned.entropy[:, 1:].mean(-1)
    profiles = []
    for measure in measures:
        values = found.get(measure.name)
        if values is not None and values.ndim == 2:
            values = values[:, :, None]
        note = "" if values is not None else "not observed for these problems"
        profiles.append(Profile(measure, values, directions.get(measure.name, np.ones(1)), clusters, note))
    return profiles
