"""Three-way verdicts: a claim of presence or absence is held, not held, or undecided at this power.

"Never beats", "no pattern", "no harm" cannot be confirmed by a test that found nothing. They are judged against a
stated size by the interval: the whole interval inside the size: held; the whole interval outside: not held; otherwise
undecided. The same for claims of presence against a bound. An interval of no width judges nothing (see `exact.py`).

Families. Claims that are judged together are corrected together, in one of two ways; the record says which:

    Bonferroni     `family_level`: every interval is made at level 1 - (1 - level) / number of claims. Needs nothing but
                   the intervals, so it serves claims over different prompts. Where a percentile bootstrap has too few
                   resamples for such a level, `widened` gives a t interval from the resampled standard error.
    max-t          `simultaneous`: for claims over the same resamples of the same clusters. The half-width is q standard
                   errors with q the `level` quantile over resamples of the largest |resampled - estimate| / se over the
                   claims, times the ratio of t to normal quantiles for few clusters. Narrower where claims agree.

Sources: Schuirmann 1987 (two one-sided tests as an interval inside bounds); Lakens 2017; Westfall and Young 1993.
Arrays in, records out. Knows nothing about particular claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import stats as scipy_stats

from experiments.statistics.clusters import expanded_percentile

__all__ = ["Judgement", "ThreeWay", "UNDECIDED", "family_level", "judge_absence", "judge_presence", "simultaneous",
           "widened"]  # fmt: skip

ThreeWay = Literal["held", "not held", "undecided", "not testable"]
UNDECIDED = "undecided at this power"
"""How the verdict "undecided" is written out."""
LEAST_TAIL = 10
"""Resamples that must lie beyond a percentile bound; with fewer the bound is noise."""


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on.

    Attributes:
        verdict: "held", "not held", "undecided" or "not testable".
        reason: in words.
        lower, upper: the interval that decided, corrected if family > 1.
        size: bound that the claim was judged against.
        family: claims that were corrected together; 1: not corrected.
        mark: "ceiling", "floor", … if the claim rests on one; it is then no evidence of a mechanism.
    """

    verdict: ThreeWay
    reason: str
    lower: float
    upper: float
    size: float
    family: int = 1
    mark: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in get_args(ThreeWay):
            raise ValueError(f"verdict must be one of {', '.join(get_args(ThreeWay))}, got {self.verdict!r}")

    @property
    def words(self) -> str:
        """The verdict as it is printed."""
        name = UNDECIDED if self.verdict == "undecided" else self.verdict
        return f"{name} (rests on a {self.mark})" if self.mark else name


def _unusable(lower: float, upper: float) -> str:
    if math.isnan(lower) or math.isnan(upper):
        return "nothing was measured"
    if lower > upper:
        raise ValueError(f"lower must not exceed upper, got {lower} and {upper}")
    if upper - lower <= 1e-12:
        return "an interval of no width judges nothing"
    return ""


def judge_absence(
    lower: float,
    upper: float,
    size: float,
    *,
    side: Literal["both", "above", "below"] = "both",
    family: int = 1,
    mark: str = "",
) -> Judgement:
    """The verdict on "there is no effect of this size".

    Args:
        lower, upper: interval of the effect at the family's level; NaN: not measured.
        size: smallest effect that matters, above 0, in the unit of the effect.
        side: "above": no increase ("never beats"); "below": no decrease ("no harm"); "both": neither.
        family: number of claims that the interval is corrected for.
        mark: "ceiling" or "floor" if the numbers lie there. An absence at the end of a scale is not testable.

    Returns:
        held: the interval lies within the size; not held: it lies beyond; undecided: it reaches across.

    Raises:
        ValueError: a size that is not above 0, lower > upper.
    """
    if not size > 0:
        raise ValueError(f"an absence is judged against a size above 0, got {size}")
    reason = _unusable(lower, upper)
    if reason or mark in ("ceiling", "floor", "unparsed", "constant"):
        return Judgement("not testable", reason or f"at its {mark}: no effect could show", lower, upper, size, family)
    above, below = side in ("both", "above"), side in ("both", "below")
    inside = (not above or upper < size) and (not below or lower > -size)
    outside = (above and lower >= size) or (below and upper <= -size)
    verdict: ThreeWay = "held" if inside else "not held" if outside else "undecided"
    reason = {
        "held": f"the whole interval is within {size:.3g}",
        "not held": f"the whole interval is beyond {size:.3g}",
        "undecided": f"the interval reaches across {size:.3g}",
    }[verdict]
    return Judgement(verdict, reason, lower, upper, size, family, mark)


def judge_presence(
    lower: float,
    upper: float,
    *,
    above: float | None = None,
    below: float | None = None,
    family: int = 1,
    mark: str = "",
) -> Judgement:
    """The verdict on "the number is above (below) a bound"; with both bounds, on both.

    Returns:
        held: the whole interval is on the claimed side of every bound; not held: it is wholly on the other side of
        one; undecided: neither. A mark is passed on: the reader should know that it rests on a ceiling.

    Raises:
        ValueError: no bound, lower > upper.
    """
    if above is None and below is None:
        raise ValueError("judge_presence needs a bound: above=, below= or both")
    bounds = [(above, 1.0), (below, -1.0)]
    size = next(bound for bound, _ in bounds if bound is not None)
    reason = _unusable(lower, upper)
    if reason:
        return Judgement("not testable", reason, lower, upper, size, family, mark)
    held = (above is None or lower > above) and (below is None or upper < below)
    refuted = (above is not None and upper <= above) or (below is not None and lower >= below)
    verdict: ThreeWay = "held" if held else "not held" if refuted else "undecided"
    reason = {
        "held": "the whole interval is on the claimed side",
        "not held": "the whole interval is on the other side",
        "undecided": "the interval reaches across the bound",
    }[verdict]
    return Judgement(verdict, reason, lower, upper, size, family, mark)


# --- Families ---------------------------------------------------------------------------------------------------------


def family_level(level: float, claims: int) -> float:
    """Level of each interval so that all of `claims` hold together at `level` (Bonferroni).

    Example: 60 claims at 95 %: each at 99.917 %.
    """
    if not 0 < level < 1 or claims < 1:
        raise ValueError(f"level in 0..1 and at least one claim are needed, got {level} and {claims}")
    return 1 - (1 - level) / claims


def widened(
    estimate: np.ndarray,
    resampled: np.ndarray,
    n_clusters: int,
    level: float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[np.ndarray, np.ndarray]:
    """Interval at a high level from a limited number of resamples.

    Args:
        estimate: (claim,). resampled: (resample, claim).
        n_clusters: behind every claim.
        level: of each interval, such as from `family_level`.
        bounds: range of the number.

    Returns:
        lower, upper: expanded percentiles if at least LEAST_TAIL resamples lie beyond each bound, otherwise
        estimate +- t x bootstrap standard error (n_clusters - 1 degrees of freedom), cut to the bounds. Fewer than two
        clusters: the bounds.
    """
    estimate, resampled = np.asarray(estimate, float), np.asarray(resampled, float)
    if n_clusters < 2 or (1 - level) / 2 * len(resampled) >= LEAST_TAIL:
        return expanded_percentile(resampled, n_clusters, level, bounds)
    error = resampled.std(0, ddof=1) * math.sqrt(n_clusters / (n_clusters - 1))
    width = scipy_stats.t.ppf((1 + level) / 2, n_clusters - 1) * error
    return np.maximum(estimate - width, bounds[0]), np.minimum(estimate + width, bounds[1])


def simultaneous(
    estimate: np.ndarray, resampled: np.ndarray, n_clusters: np.ndarray | int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of several numbers that hold together: max-t over the same bootstrap resamples.

    Args:
        estimate: (claim,); NaN: not measured.
        resampled: (resample, claim) over the same cluster weights in every column.
        n_clusters: behind each claim, (claim,) or one number.

    Returns:
        lower, upper (claim,): NaN where the estimate is; of no width where no resample differs; unbounded for a claim
        with fewer than two clusters.
    """
    estimate, resampled = np.asarray(estimate, float), np.asarray(resampled, float)
    clusters = np.broadcast_to(np.asarray(n_clusters), estimate.shape)
    error = resampled.std(0, ddof=1)
    live = np.isfinite(estimate) & (error > 1e-12) & (clusters > 1)
    lower, upper = estimate.copy(), estimate.copy()
    single = np.isfinite(estimate) & (clusters < 2)
    lower[single], upper[single] = -np.inf, np.inf
    if live.any():
        apart = np.abs(resampled[:, live] - estimate[live]) / error[live]
        critical = float(np.quantile(apart.max(1), level))
        few = clusters[live]
        # A bootstrap of few clusters is too narrow: by t against normal at this critical value, and by sqrt((k-1)/k).
        tail = scipy_stats.norm.sf(critical)
        factor = scipy_stats.t.isf(tail, few - 1) / critical * np.sqrt(few / (few - 1))
        lower[live] -= critical * factor * error[live]
        upper[live] += critical * factor * error[live]
    return lower, upper
