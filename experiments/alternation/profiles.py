"""From observations of a model to the measures of the alternation test, their floors and ceilings, and their sizes.

A measure is one value per prompt and latent. `profiles_of` gives them in the order of the hypothesis, with the lowest
and highest value that each can take: a rate above chance reaches 1 − chance at most, a probe what is reachable minus
what shuffled labels give. `size_of` compares the stated size with what wordings of the same numbers differ by, as
hypothesis.py says.

Knows nothing about models or verdicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.alternation.hypothesis import MEASURES, POOLED, TUNED_MEASURES, Measure
from experiments.alternation.measures import Observations, detection
from experiments.statistics.alternation import Profile, contrast_weights
from experiments.statistics.clusters import cluster_codes
from experiments.statistics.sizes import between_forms

__all__ = ["Size", "measured", "profiles_of", "size_of"]

Values = tuple[np.ndarray, tuple[float, float] | None]
"""(prompt, latent 1..n) or (prompt, latent, component), and the lowest and highest value that a mean can take."""


def measured(observations: Observations) -> list[Measure]:
    """The measures of these observations: those of a tuned lens only if one was read."""
    return [*MEASURES, *(TUNED_MEASURES if observations.tuned is not None else ())]


def profiles_of(observations: Observations, vocabulary: int = 0) -> list[Profile]:
    """Every measure, in the order of `measured`, with the stated sizes.

    Args:
        observations: of a model, or simulated.
        vocabulary: number of tokens, for the highest entropy; 0: not known, so entropy has no ceiling.
    """
    found: dict[str, Values] = {}
    highest = float(np.log(vocabulary)) if vocabulary else np.inf
    found |= _lens_measures(observations, highest)
    found |= _answer_measures(observations)
    if observations.attention is not None:
        n, latents = observations.n_latents, observations.attention[:, :, 2:]
        found["attention_to_numbers"] = observations.attention[:, :n, 0], (0.0, 1.0)
        found["attention_from_end"] = latents[:, n], (0.0, 1.0)
        found["attention_from_next"] = latents[:, np.arange(1, n + 1), np.arange(n)], (0.0, 1.0)
    found["components"] = observations.places, None
    found |= _probe_measures(observations)
    apart = np.einsum("k,pkc->c", contrast_weights(observations.n_latents), observations.reference.places)
    directions = {"components": apart / (np.linalg.norm(apart) or 1.0)}
    profiles = []
    for measure in measured(observations):
        values, bounds = found.get(measure.name, (None, None))
        direction = directions.get(measure.name)
        profiles.append(
            Profile(
                measure.name, values, measure.predicted, measure.smallest, bounds, direction, enters=direction is None
            )
        )  # fmt: skip
    return profiles


def _lens_measures(observations: Observations, highest: float) -> dict[str, Values]:
    found: dict[str, Values] = {}

    def rate(which: str, tuned: bool = False) -> Values:
        hit, chance = detection(observations, which, 5, tuned)
        known = np.isfinite(chance[:, 1:])
        top = 1.0 - (float(chance[:, 1:][known].mean()) if known.any() else 0.0)
        return (hit - chance)[:, 1:], (0.0, top)

    found["intermediate_detection"] = rate("intermediate")
    found["final_detection"] = rate("final")
    found["entropy"] = observations.readings.entropy[:, 1:, 0], (0.0, highest)
    if observations.tuned is not None:
        found["tuned_intermediate"] = rate("intermediate", tuned=True)
        found["tuned_final"] = rate("final", tuned=True)
        found["tuned_entropy"] = observations.tuned.entropy[:, 1:].mean(-1), (0.0, highest)
    return found


def _answer_measures(observations: Observations) -> dict[str, Values]:
    if observations.correct_after is None:
        return {}
    after = observations.correct_after.astype(float)
    found: dict[str, Values] = {"early_answer_gain": (np.diff(after, axis=1), (0.0, 1.0))}
    for kind, right in observations.correct_ablated.items():
        # more than the right answers cannot be lost
        found[f"ablation_{kind}"] = after[:, -1:] - right.astype(float), (0.0, float(after[:, -1].mean()))
    return found


def _probe_measures(observations: Observations) -> dict[str, Values]:
    readable = observations.readable
    steps = [read for name, read in readable.items() if name != "answer"]
    if not steps:
        return {}
    gain = np.mean([read.gain for read in steps], axis=0)
    top = float(np.mean([read.reachable - read.shuffled.mean() for read in steps]))
    found: dict[str, Values] = {"probe_intermediate": (gain, (0.0, top))}
    if "answer" in readable:
        found["probe_kind"] = gain - readable["answer"].gain, (-1.0, 1.0)
    return found


# --- Sizes that matter ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A smallest size that matters: the larger of a stated one and of what wordings differ by.

    Attributes:
        size: in the unit of the measure, above 0.
        words: which of the two it is, and why.
        spread: what the contrast differs by between wordings of the same numbers; NaN: not known.
    """

    size: float
    words: str
    spread: float


def size_of(
    profile: Profile, observations: Observations, borrowed: Size | None = None, stated: float | None = None
) -> Size:
    """The smallest size that matters of one measure, or of the pooled one.

    Args:
        profile: the measure, over the prompts of the observations.
        observations: that it is of.
        borrowed: its size in another task of the same run, for prompts that are not asked in several wordings.
        stated: in place of the stated size of the measure; None: that one.
    """
    measure = next(one for one in (*MEASURES, *TUNED_MEASURES, POOLED) if one.name == profile.name)
    least = measure.smallest if stated is None else stated
    spread, where = float("nan"), ""
    clusters, forms = observations.clusters, np.array([problem.template for problem in observations.problems])
    if not _several_wordings(clusters, forms):
        if borrowed is not None:
            spread, where = borrowed.spread, "spread between wordings of the templates"
    elif profile.values is not None:
        contrasts = profile.along() @ contrast_weights(observations.n_latents)
        known = np.isfinite(contrasts)
        if known.any() and np.ptp(contrasts[known]) > 1e-12:
            found = between_forms(contrasts[known], clusters[known], forms[known])
            spread, where = found.size, found.words
    if spread > least:
        return Size(spread, where, spread)
    return Size(least, measure.reason, spread)


def _several_wordings(clusters: np.ndarray, forms: np.ndarray) -> bool:
    """Whether the same numbers are asked in several wordings: most clusters in two or more."""
    codes, names = cluster_codes(clusters)
    return bool(np.median([len(set(forms[codes == cluster])) for cluster in range(len(names))]) >= 2)
