"""C1, C2, S1, S2, S3 and S7 of the published claims about single latents, judged on observations of a model.

Each claim becomes one number and a rule fixed here beforehand. A *lead* is the smallest value at the claimed latents
minus the largest at all the others: positive exactly if the claimed latents are ahead of every other one; it is
computed anew in every resample of clusters. Claims that rest on the evaluation prompts form one family, whose intervals
hold together (max-t over the same resamples); those that rest on the derivation prompts another, by Bonferroni.

Knows nothing about how observations are made. Not a command: `codi alternation` writes the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.alternation.measures import DIRECTION_RESAMPLES, Observations, Reference, detection, steps_of
from experiments.alternation.verdict import Result
from experiments.statistics.alternation import Profile, alternation, contrast_weights
from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums
from experiments.statistics.equivalence import family_level, judge_absence, judge_presence, simultaneous, widened
from experiments.statistics.families import family_text
from experiments.study.claims import Claim, ClaimsTable, Verdict, effect_claim

__all__ = ["published_claims"]

SAME = 0.02
"""A gain of less than this (two points) counts as none."""
PARALLEL = 0.7
"""|cosine| above which two directions count as parallel: half of the squared length is common."""


@dataclass(frozen=True)
class _Asked:
    """A claim before it is judged.

    Attributes:
        number: the number and, (resample,), the same in every resample.
        above, below: its bound.
    """

    name: str
    statement: str
    measured: str
    number: _Number
    above: float | None = None
    below: float | None = None
    note: str = ""


@dataclass(frozen=True)
class _Number:
    estimate: float
    resampled: np.ndarray
    n: int
    n_clusters: int


class _Numbers:
    """Functions of column means over prompts, plain and in every resample of clusters."""

    def __init__(self, clusters: np.ndarray, settings: Settings) -> None:
        self.codes, self.names = cluster_codes(clusters)
        self.weights = settings.weights(len(self.names))

    def __call__(
        self, values: np.ndarray, function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray | None = None
    ) -> _Number:
        """Of function(means), means (resample, column); prompts with an unknown column are left out.

        Args:
            values: (prompt, column).
            function: from (…, column) to (…,).
            rows: (prompt,) bool, the prompts to use; None: all.
        """
        known = np.isfinite(values).all(1) & (True if rows is None else rows)
        if not known.any():
            return _Number(np.nan, np.full(len(self.weights), np.nan), 0, 0)
        sums, counts = cluster_sums(values[known], self.codes[known], len(self.names))
        plain = float(function((sums.sum(1) / counts[0].sum())[None])[0])
        drawn = (self.weights @ counts[0])[:, None]
        again = function((self.weights @ sums.T) / np.maximum(drawn, 1))
        # a resample without any of these prompts says nothing
        return _Number(plain, np.where(drawn[:, 0] > 0, again, plain), int(known.sum()), int((counts[0] > 0).sum()))


def _lead(columns: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """The smallest of the given columns minus the largest of the others."""
    chosen = list(columns)

    def lead(means: np.ndarray) -> np.ndarray:
        return means[..., chosen].min(-1) - np.delete(means, chosen, axis=-1).max(-1)

    return lead


def _untestable(name: str, statement: str, note: str) -> Claim:
    return Claim(name, statement, "–", "not testable", note=note)


def published_claims(
    observations: Observations,
    result: Result,
    *,
    therefore: Sequence[int] = (),
    d_model: int = 0,
    suffix: str = "",
) -> ClaimsTable:
    """C1, C2, S1, S2, S3 and S7 of the published claims, by the observations at hand.

    Args:
        observations: of the model.
        result: of `analyse` on the same observations.
        therefore: token ids of the word family "therefore"; none: S3 is not testable.
        d_model: width of the states, for what a random direction would give.
        suffix: put behind every name, for a task beside others.
    """
    numbers = _Numbers(observations.clusters, result.settings)
    asked = [
        *_accuracy_claims(observations, numbers),
        *_readout_claims(observations, numbers),
        *_detection_claims(observations, numbers),
        _untestable("S2", "a lens trained on latents fails on text tokens", "needs trained lenses: codi lens transfer"),
        *_therefore_claims(observations, numbers, therefore),
    ]
    claims = [*_together(asked, result.settings), *_component_claims(observations.reference, result, d_model)]
    return ClaimsTable(dataclasses.replace(claim, name=f"{claim.name}{suffix}") for claim in claims)


def _together(asked: Sequence[_Asked | Claim], settings: Settings) -> list[Claim]:
    """The claims in their order, with intervals that hold together for all that were measured."""
    open_ = [one for one in asked if isinstance(one, _Asked) and one.number.n]
    intervals: dict[str, tuple[float, float]] = {}
    if open_:
        lower, upper = simultaneous(
            np.array([one.number.estimate for one in open_]),
            np.stack([one.number.resampled for one in open_], axis=1),
            np.array([one.number.n_clusters for one in open_]),
            settings.level,
        )
        pairs = zip(lower.tolist(), upper.tolist(), strict=True)
        intervals = {one.name: pair for one, pair in zip(open_, pairs, strict=True)}
    claims = []
    for one in asked:
        if isinstance(one, Claim):
            claims.append(one)
            continue
        family = len(open_) if one.number.n else 1
        low, high = intervals.get(one.name, (np.nan, np.nan))
        judgement = judge_presence(low, high, above=one.above, below=one.below, family=family)
        row = {"estimate": one.number.estimate, "n": one.number.n, "n_clusters": one.number.n_clusters}
        text = family_text(family, settings.level)
        claims.append(
            effect_claim(one.name, one.statement, one.measured, judgement, row, one.note, "estimate", text)
        )  # fmt: skip
    return claims


# --- On the evaluation prompts ----------------------------------------------------------------------------------------


def _accuracy_claims(observations: Observations, numbers: _Numbers) -> list[_Asked | Claim]:
    after = observations.correct_after
    if after is None or observations.n_latents < 6:
        return [_untestable("C1", "accuracy peaks at 5 latents", "needs answers after 0..6 latents")]
    accuracy = after.astype(float)
    levels = ", ".join(f"{value:.3f}" for value in accuracy.mean(0))
    return [
        _Asked(
            "C1 peak", "accuracy peaks at 5 latents", "accuracy after 5 minus the best of all other numbers; above 0",
            numbers(accuracy, _lead([5])), above=0.0, note=f"accuracy after 0.. latents: {levels}",
        ),
        _Asked(
            "C1 jump", "accuracy jumps from 4 to 5 latents", "gain by latent 5 minus the largest other gain; above 0",
            numbers(np.diff(accuracy, axis=1), _lead([4])), above=0.0,
        ),
        _Asked(
            "C1 sixth", "the sixth latent adds nothing", f"accuracy after 6 minus after 5; below {SAME}",
            numbers(accuracy, lambda means: means[..., 6] - means[..., 5]), below=SAME,
        ),
    ]  # fmt: skip


def _readout_claims(observations: Observations, numbers: _Numbers) -> list[_Asked | Claim]:
    n = observations.n_latents
    wrong = None if observations.correct_after is None else ~observations.correct_after[:, -1].astype(bool)
    two = n >= 4 and all(len(steps_of(problem)) >= 2 for problem in observations.problems)
    asked: list[_Asked | Claim] = []
    for step, latent in ((1, 2), (2, 4)):
        statement = f"step{step} is read at h_{latent}"
        if not two:
            asked.append(_untestable(f"C2 step{step}", statement, "needs problems with three steps or more"))
            continue
        rates = np.subtract(*detection(observations, step))
        highest = np.nanmean(rates, axis=0)
        where = f"rate above chance at h_0..h_{n}: {', '.join(f'{value:.3f}' for value in highest)}"
        asked.append(_Asked(
            f"C2 step{step}", statement, f"lead of h_{latent} over h_0..h_{n}, top 5, rate above chance; above 0",
            numbers(rates, _lead([latent])), above=0.0, note=where,
        ))  # fmt: skip
        if wrong is not None:
            asked.append(_Asked(
                f"C2 step{step} wrong", f"{statement} even where the answer is wrong",
                "the same, prompts with a wrong answer only; above 0", numbers(rates, _lead([latent]), wrong),
                above=0.0, note="" if wrong.any() else "every answer is right",
            ))  # fmt: skip
    finals = np.subtract(*detection(observations, "final"))
    asked.append(_Asked(
        "C2 final", "the final answer is not readable by the plain lens",
        f"highest rate above chance over h_0..h_{n}, top 5; below 0.05",
        numbers(finals, lambda means: means.max(-1)), below=0.05,
    ))  # fmt: skip
    return asked


def _detection_claims(observations: Observations, numbers: _Numbers) -> list[_Asked | Claim]:
    n = observations.n_latents
    if n < 6:
        return []
    finals = [np.subtract(*detection(observations, "final", k))[:, 1:] for k in range(1, 11)]
    lead = _lead([1, 3])

    def smallest(means: np.ndarray) -> np.ndarray:
        return lead(means.reshape(*means.shape[:-1], len(finals), n)).min(-1)

    at_five = numbers(finals[4], lead).estimate
    entropy = observations.readings.entropy[:, 1:, 0]
    return [
        _Asked(
            "S1 detection", "the final answer is detected most at latents 2 and 4, for every k = 1..10",
            "lead of h_2 and h_4 over the other latents (rate above chance), smallest over k; above 0",
            numbers(np.concatenate(finals, axis=1), smallest), above=0.0, note=f"at k = 5: {at_five:.3f}",
        ),
        _Asked(
            "S1 entropy", "entropy is highest at latents 3 and 5",
            "lead of h_3 and h_5 over the other latents, nats; above 0", numbers(entropy, _lead([2, 4])), above=0.0,
        ),
    ]  # fmt: skip


def _therefore_claims(observations: Observations, numbers: _Numbers, therefore: Sequence[int]) -> list[_Asked | Claim]:
    statements = {"S3 odd": "“therefore” is at odd latents only", "S3 late": "“therefore” is there from latent 3 on"}
    if not therefore:
        reason = "no form of “therefore” is one token of this vocabulary"
        return [_untestable(name, statement, reason) for name, statement in statements.items()]
    shown = np.isin(observations.readings.tokens[:, 1:, 0], list(therefore)).any(-1).astype(float)
    rates = ", ".join(f"{rate:.3f}" for rate in shown.mean(0))
    odd = [k for k in range(observations.n_latents) if k % 2 == 0]
    late = list(range(2, observations.n_latents))
    return [
        _Asked(
            name, statement, "lead of those latents, rate in the top 10; above 0", numbers(shown, _lead(columns)),
            above=0.0, note=f"rates at latents 1..: {rates}",
        )
        for (name, statement), columns in zip(statements.items(), (odd, late), strict=True)
    ]  # fmt: skip


# --- On the components ------------------------------------------------------------------------------------------------


def _component_claims(reference: Reference, result: Result, d_model: int) -> list[Claim]:
    slots = {"keys": reference.keys, "values": reference.values}
    family = sum(one is not None for one in (reference.cosines, *slots.values()))
    level = family_level(result.settings.level, max(family, 1))
    settings = dataclasses.replace(result.settings, level=level)
    corrected = f"each at {100 * level:.2f} % (Bonferroni)" if family > 1 else ""
    claims = [_direction_claim(reference, level, family, corrected, d_model), _latents_claim(result)]
    size = float(result.row("components")["smallest"])
    for name, latents in slots.items():
        statement = f"the first two components of cached {name} show no even/odd pattern"
        if latents is None:
            claims.append(_untestable(f"S7 {name}", statement, "cache entries were not kept"))
            continue
        apart = np.einsum("k,pkc->c", contrast_weights(latents.shape[1]), latents)
        direction = apart / (np.linalg.norm(apart) or 1.0)
        profile = Profile("slots", latents, 1, size, direction=direction)
        found = alternation([profile], reference.clusters, settings).iloc[0]
        judgement = judge_absence(float(found["lower"]), float(found["upper"]), size, family=family)
        split = f"split {', '.join(found['best_split'])} explains most; even/odd is number {found['split_rank']}"
        claims.append(effect_claim(
            f"S7 {name}", statement,
            f"contrast in the plane (SD), along the direction in which it is largest; held if within {size:.3g}",
            judgement, found, split, "contrast", corrected,
        ))  # fmt: skip
    return claims


def _direction_claim(reference: Reference, level: float, family: int, corrected: str, d_model: int) -> Claim:
    statement = "the first component of latents is parallel to the end-of-thought direction"
    if reference.cosines is None:
        return _untestable("S7 direction", statement, "not observed")
    n_clusters = len(np.unique(reference.clusters))
    plain, again = reference.cosines[:1], reference.cosines[1:, None]
    lower, upper = widened(plain, again, n_clusters, level, bounds=(0.0, 1.0))
    judgement = judge_presence(float(lower[0]), float(upper[0]), above=PARALLEL, family=family)
    chance = 1.96 / np.sqrt(d_model)
    row = {"cosine": plain[0], "n": len(reference.clusters), "n_clusters": n_clusters}
    note = f"{DIRECTION_RESAMPLES} resamples; a random direction stays below {chance:.2f} in 95 % of cases"
    measured = f"|cosine| of the first component of h_1..h_n and the end-of-thought embedding; above {PARALLEL}"
    return effect_claim("S7 direction", statement, measured, judgement, row, note, "cosine", corrected)


def _latents_claim(result: Result) -> Claim:
    statement = "the first two components separate even and odd latents"
    row = result.row("components")
    if row["verdict"] == "not testable":
        return _untestable("S7 latents", statement, "the components were not tested")
    says: Mapping[str, Verdict] = {"supported": "held", "undecided": "undecided"}
    return effect_claim(
        "S7 latents", statement, "contrast in the plane (SD); held if the measure “components” is supported",
        says.get(row["verdict"], "not held"), row, f"{row['answer']}: {row['reason']}", "contrast",
    )  # fmt: skip
