"""Do even and odd latents differ? A rule that can give each of its answers, on values per latent alone.

Contrast. The regression coefficient of "latent is even" beside a constant and a linear trend in k: a straight line
gives 0, values that alternate by +-d/2 give d. `Profile.predicted` is the sign that the hypothesis gives it.

Pooled. Measures of one model are correlated, so they do not vote. Each is centred per prompt, divided by its spread (or
by its smallest size where that is larger, so that a flat measure is not blown up) and turned to its predicted sign;
their mean is one measure, and it alone decides. Its smallest size that matters is given by the caller (such as the
spread between equivalent prompts, `sizes.between_forms`, of the pooled contrast), or else the smallest one of its
measures in the same units, min(smallest / scale): what the least demanding measure would count.

Intervals of all contrasts, the pooled one among them, hold together (max-t over cluster resamples; `equivalence`).

Splits. Every way to split the latents into two halves (10 for six latents) is fitted in place of even/odd beside the
same trend; `first` is the share of resamples in which even/odd explains most.

Answers, by the first rule that applies, for the pooled measure and for each (lo, hi: interval in the predicted sign):

    not testable: floor | ceiling | constant | not observed | too few clusters
    supported                   lo > 0, estimate >= smallest, even/odd first in >= 1 - alpha of the resamples
    alternates, opposite phase  hi < 0, estimate <= -smallest, even/odd first in >= 1 - alpha of the resamples
    another split explains more one other split explains more than even/odd in >= 1 - alpha of the resamples, and is
                                there itself: its interval (max-t over splits) excludes 0, its size is >= smallest
    below the size that matters -smallest < lo and hi < smallest: no alternation of that size in either phase
    not in the predicted phase  hi < smallest, but lo <= -smallest: the opposite phase stays open
    undecided at this power     everything else

Verdict: supported; opposite phase; contradicted (another split, below the size, not in the predicted phase);
undecided; not testable. So "contradicted" needs a pooled contrast below a stated size or another split that is better
in >= 95 % of resamples, and many weak measures cannot contradict what their mean leaves open.

Phase-free: `phase_free` says whether even and odd latents differ in either sign, by the same interval.
Limit: splits are into halves, so latents 3 and 5 alone being high counts as "odd latents are" (no half is nearer).
Level against arbitrary fixed profiles of six latents: even/odd is first by chance once in ten, in the predicted sign
once in twenty; no test on six latents can be lower.

Arrays in, frame out. Knows nothing about models or how values are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums
from experiments.statistics.equivalence import simultaneous
from experiments.statistics.floors import mark_of

__all__ = [
    "ANSWERS", "POOLED", "Answer", "Profile", "alternation", "contrast_weights", "phase_free", "pooled", "splits",
    "verdict_of",
]  # fmt: skip

Answer = Literal[
    "supported", "alternates, opposite phase", "another split explains more", "below the size that matters",
    "not in the predicted phase", "undecided at this power", "not testable: floor", "not testable: ceiling",
    "not testable: constant", "not testable: not observed", "not testable: too few clusters",
]  # fmt: skip
ANSWERS: dict[str, str] = {
    "supported": "supported",
    "alternates, opposite phase": "opposite phase",
    "another split explains more": "contradicted",
    "below the size that matters": "contradicted",
    "not in the predicted phase": "contradicted",
    "undecided at this power": "undecided",
}
"""Answer -> verdict; every "not testable: …" has the verdict "not testable"."""
POOLED = "pooled"


@dataclass(frozen=True)
class Profile:
    """Values of one measure at every latent.

    Attributes:
        name: in the table.
        values: (prompt, latent 1..n) or (prompt, latent, component); NaN: the prompt is left out. None: not observed.
        predicted: +1 if the hypothesis predicts even latents higher, -1 if odd ones.
        smallest: smallest contrast that matters, in the unit of the values, above 0.
        bounds: lowest and highest possible value, for floors and ceilings; None: it has none.
        direction: (component,) unit vector along which components are compared; None for one component.
        enters: whether it enters the pooled measure. One whose direction was chosen by its own contrast must not: it
            would be positive whatever the profile is.
    """

    name: str
    values: np.ndarray | None
    predicted: Literal[1, -1]
    smallest: float
    bounds: tuple[float, float] | None = None
    direction: np.ndarray | None = None
    enters: bool = True

    def cube(self) -> np.ndarray:
        """(prompt, latent, component)."""
        assert self.values is not None
        values = np.asarray(self.values, float)
        return values[:, :, None] if values.ndim == 2 else values

    def along(self) -> np.ndarray:
        """(prompt, latent) values along the direction; NaN in all latents of a prompt that lacks one."""
        cube = self.cube()
        if self.direction is None and cube.shape[2] != 1:
            raise ValueError(f"measure {self.name} has {cube.shape[2]} components and no direction")
        line = cube[:, :, 0] if self.direction is None else cube @ np.asarray(self.direction, float)
        return np.where(np.isfinite(cube).all((1, 2))[:, None], line, np.nan)


# --- Contrast and splits ----------------------------------------------------------------------------------------------


def _trend(n: int) -> np.ndarray:
    """(n, 2) orthonormal constant and linear trend."""
    return np.linalg.qr(np.stack([np.ones(n), np.arange(n, dtype=float)], axis=1))[0]


def contrast_weights(n_latents: int) -> np.ndarray:
    """Weights w such that sum of w_k y_k is the coefficient of "k is even" beside a constant and a linear trend.

    Returns:
        (n_latents,), summing to 0, and to 1 over even latents. For 6: (-5, 11, -8, 8, -11, 5) / 24.

    Raises:
        ValueError: fewer than 4 latents.
    """
    if n_latents < 4:
        raise ValueError(f"alternation needs at least 4 latents, got {n_latents}")
    return splits(n_latents)[1][0]


@lru_cache
def splits(n_latents: int) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """Every split of the latents into two halves, even/odd first.

    Returns:
        sides: one side of each split (for even n the side without latent 1: the other side is the same split).
        weights: (split, n_latents) such that weights @ profile is the coefficient of "latent is on that side" beside
            a constant and a linear trend. Its square times 1 / |weights|^2 is the sum of squares that it explains.
    """
    latents = range(1, n_latents + 1)
    even = tuple(k for k in latents if k % 2 == 0)
    halves = itertools.combinations(latents, n_latents // 2)
    sides = (even, *(side for side in halves if side != even and (n_latents % 2 or 1 not in side)))
    indicators = np.array([[float(k in side) for k in latents] for side in sides])
    trend = _trend(n_latents)
    rest = indicators - (indicators @ trend) @ trend.T
    return sides, rest / (rest**2).sum(1, keepdims=True)


def explained(profiles: np.ndarray) -> np.ndarray:
    """(…, split) sum of squares that each split explains beside the trend, of (…, latent, component) profiles."""
    weights = splits(profiles.shape[-2])[1]
    coefficients = np.einsum("sk,...kc->...sc", weights, profiles)
    return (coefficients**2).sum(-1) / (weights**2).sum(1)


def pooled(profiles: Sequence[Profile], smallest: float | None = None) -> Profile | None:
    """The mean of several measures as one: centred per prompt, in units of each measure's spread, predicted sign +1.

    Args:
        profiles: testable ones, over the same prompts; a prompt enters with the measures that it has.
        smallest: size that matters, in these units; None: see the top of the module.

    Returns:
        A measure in standard deviations; None if none of the profiles varies.
    """
    scaled, sizes = [], []
    for profile in profiles:
        line = profile.predicted * profile.along()
        line = line - line.mean(1, keepdims=True)
        spread = float(np.sqrt(np.nanmean(line**2)))
        if spread > 0:
            scale = max(spread, profile.smallest)
            scaled.append(line / scale)
            sizes.append(profile.smallest / scale)
    if not scaled:
        return None
    stacked = np.stack(scaled)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    values = np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)
    return Profile(POOLED, values, 1, min(sizes) if smallest is None else smallest)


# --- The rule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resampled:
    """One measure in every resample of clusters: contrasts in the predicted sign, and the splits."""

    estimate: float
    contrasts: np.ndarray  # (resample,)
    levels: np.ndarray  # (latent,)
    first: float
    rank: int
    best: int
    beats: float
    present: bool
    best_size: float
    n: int
    n_clusters: int


def _resample(profile: Profile, codes: np.ndarray, weights: np.ndarray, level: float) -> _Resampled:
    cube, line = profile.cube(), profile.along()
    known = np.isfinite(line).all(1)
    latents, width = cube.shape[1], cube.shape[2]
    columns = np.where(known[:, None], cube.reshape(len(cube), -1), np.nan)
    sums, counts = cluster_sums(columns, codes, weights.shape[1])
    drawn = weights @ counts[0]
    mean = (sums.sum(1) / counts[0].sum()).reshape(latents, width)
    again = ((weights @ sums.T) / np.maximum(drawn, 1e-12)[:, None]).reshape(-1, latents, width)
    again = np.where((drawn > 0)[:, None, None], again, mean)
    turn = profile.predicted * (np.ones(1) if profile.direction is None else np.asarray(profile.direction, float))
    weighting = contrast_weights(latents)
    clusters = int((counts[0] > 0).sum())

    plain, repeated = explained(mean), explained(again)
    total = plain.sum()
    first = repeated[:, 0] > repeated[:, 1:].max(1) * (1 + 1e-9) + 1e-24
    best = 1 + int(plain[1:].argmax())
    beats = repeated[:, best] > repeated[:, 0] * (1 + 1e-9) + 1e-24
    side_weights = splits(latents)[1]
    coefficients = np.einsum("sk,kc->sc", side_weights, mean)
    moved = np.einsum("sk,rkc->rsc", side_weights, again).reshape(len(again), -1)
    lower, upper = simultaneous(coefficients.ravel(), moved, clusters, level)
    excludes = ((lower > 0) | (upper < 0)).reshape(coefficients.shape)
    return _Resampled(
        estimate=float(weighting @ (mean @ turn)), contrasts=np.einsum("k,rkc,c->r", weighting, again, turn),
        levels=mean @ (turn / profile.predicted), first=float(first.mean()),
        rank=1 + int((plain[1:] >= plain[0]).sum()) if total > 1e-24 else 0,
        best=(int(plain.argmax()) if total > 1e-24 else -1), beats=float(beats.mean()),
        present=bool(excludes[best].any()), best_size=float(np.linalg.norm(coefficients[best])),
        n=int(known.sum()), n_clusters=clusters,
    )  # fmt: skip


def _untestable(profile: Profile, found: _Resampled | None) -> str:
    if found is None or not found.n:
        return "not observed"
    mark = mark_of(found.levels, profile.bounds, profile.smallest)
    if mark in ("floor", "ceiling"):
        return mark
    if found.n_clusters < 2:
        return "too few clusters"
    # Without any spread between resamples there is no interval, and no width decides nothing.
    return "constant" if np.ptp(found.contrasts) <= 1e-12 else ""


def _answer(found: _Resampled, lower: float, upper: float, smallest: float, alpha: float) -> Answer:
    specific = found.first >= 1 - alpha
    if lower > 0 and found.estimate >= smallest and specific:
        return "supported"
    if upper < 0 and found.estimate <= -smallest and specific:
        return "alternates, opposite phase"
    if found.beats >= 1 - alpha and found.present and found.best_size >= smallest:
        return "another split explains more"
    if upper < smallest:
        return "below the size that matters" if lower > -smallest else "not in the predicted phase"
    return "undecided at this power"


def verdict_of(answer: str) -> str:
    """ "supported", "opposite phase", "contradicted", "undecided" or "not testable"."""
    if answer.startswith("not testable"):
        return "not testable"
    if answer not in ANSWERS:
        raise ValueError(f"answer must be one of {', '.join(ANSWERS)}, got {answer!r}")
    return ANSWERS[answer]


def phase_free(lower: float, upper: float, smallest: float) -> str:
    """Even against odd in either sign: "differ", "do not differ by the size that matters" or "undecided"."""
    if lower > 0 or upper < 0:
        return "differ"
    return "do not differ by the size that matters" if max(-lower, upper) < smallest else "undecided"


def alternation(
    profiles: Sequence[Profile],
    clusters: np.ndarray,
    settings: Settings | None = None,
    *,
    least_measures: int = 1,
    pooled_smallest: float | None = None,
) -> pd.DataFrame:
    """Every measure and the pooled one, with contrasts, splits, answers and verdicts.

    Args:
        profiles: measures over the same prompts.
        clusters: (prompt,).
        settings: resamples, level, alpha, seed.
        least_measures: testable measures that the pooled answer needs (of those that enter it).
        pooled_smallest: size that matters of the pooled contrast, in standard deviations; None: from the measures.

    Returns:
        One row per measure and, last, one named "pooled": measure, predicted ("even" or "odd"), contrast, lower, upper
        (in the predicted sign, so positive is as predicted; simultaneous over the rows), smallest, even_minus_odd (the
        contrast with its own sign), phase_free, split_rank (of even/odd), best_split, first (share of resamples in
        which even/odd is), beats (share in which the best other split explains more), n, n_clusters, answer, verdict.

    Raises:
        ValueError: no profiles, values that do not fit the clusters.
    """
    settings = settings or Settings()
    if not profiles:
        raise ValueError("there is nothing to test: no profiles")
    codes, names = cluster_codes(clusters)
    if any(profile.values is not None and len(profile.values) != len(codes) for profile in profiles):
        raise ValueError(f"every measure needs values for the same {len(codes)} prompts")
    weights = settings.weights(len(names))
    found: list[_Resampled | None] = [
        None if profile.values is None or not np.isfinite(profile.along()).any()
        else _resample(profile, codes, weights, settings.level)
        for profile in profiles
    ]  # fmt: skip
    reasons = [_untestable(profile, result) for profile, result in zip(profiles, found, strict=True)]
    usable = [profile for profile, reason in zip(profiles, reasons, strict=True) if profile.enters and not reason]
    together = pooled(usable, pooled_smallest) if len(usable) >= least_measures else None
    everything = list(profiles)
    everything.append(together if together is not None else Profile(POOLED, None, 1, float("nan")))
    found.append(None if together is None else _resample(together, codes, weights, settings.level))
    reasons.append(_untestable(everything[-1], found[-1]))

    tested = [i for i, reason in enumerate(reasons) if not reason]
    lower, upper = np.full(len(everything), np.nan), np.full(len(everything), np.nan)
    results = [result for i in tested if (result := found[i]) is not None]
    if tested:
        lower[tested], upper[tested] = simultaneous(
            np.array([result.estimate for result in results]),
            np.stack([result.contrasts for result in results], axis=1),
            np.array([result.n_clusters for result in results]),
            settings.level,
        )
    rows = [
        _row(profile, result, reason, float(low), float(high), settings.alpha)
        for profile, result, reason, low, high in zip(everything, found, reasons, lower, upper, strict=True)
    ]
    return pd.DataFrame(rows)


def _row(
    profile: Profile, found: _Resampled | None, reason: str, lower: float, upper: float, alpha: float
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "measure": profile.name, "predicted": "even" if profile.predicted > 0 else "odd", "contrast": np.nan,
        "lower": lower, "upper": upper, "smallest": profile.smallest, "even_minus_odd": np.nan, "phase_free": "",
        "split_rank": 0, "best_split": "", "first": np.nan, "beats": np.nan, "n": 0, "n_clusters": 0,
    }  # fmt: skip
    if found is not None:
        sides = splits(len(found.levels))[0]
        row |= {
            "contrast": found.estimate, "even_minus_odd": profile.predicted * found.estimate,
            "split_rank": found.rank, "best_split": "".join(map(str, sides[found.best])) if found.best >= 0 else "",
            "first": found.first, "beats": found.beats, "n": found.n, "n_clusters": found.n_clusters,
        }  # fmt: skip
    if reason or found is None:
        answer = f"not testable: {reason or 'not observed'}"
    else:
        answer = str(_answer(found, lower, upper, profile.smallest, alpha))
        row["phase_free"] = phase_free(lower, upper, profile.smallest)
    return {**row, "answer": answer, "verdict": verdict_of(answer)}
