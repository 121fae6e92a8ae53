"""Exact bounds where a bootstrap has nothing to resample: every cluster gave the same value.

A bootstrap of 13 clusters that are all right gives [100 %, 100 %], and one of differences that are all 0 gives
0.000 [0.000, 0.000]: an interval that claims what 13 clusters cannot show. The rule used instead, everywhere:

    Of C independent clusters, none showed another value than v. Then the share of clusters that do is at most
    u = 1 - ((1 - level) / 2) ** (1 / C) (Clopper and Pearson 1934, 0 of C). If all of these took the lowest (highest)
    value that is possible, the mean would be v - u (v - lowest), or v + u (highest - v). That is the interval.

    Example: 13 clusters all right, level 95 %: u = 1 - 0.025 ** (1 / 13) = 0.247, so [75.3 %, 100 %].
    Example: 200 clusters without any change: u = 0.0183, so 0.000 [-0.018, +0.018]; with 79.5 % right before, the
    lowest possible mean difference is -0.795 and the highest 0.205, so 0.000 [-0.015, +0.004].

Clusters count equally in this rule, whatever their number of prompts. A measure without bounds (nats) has no exact
interval: it is then unbounded, which no claim can rest on.

Where few clusters differ, a resampled standard error is too small just when chance showed too few of them, the more so
at the level that a family needs. `rare` gives bounds for that case, from the shares of clusters above and below v and
their Clopper-Pearson bounds, combined as squares (MOVER); with none that differs it is the rule above.

Sources: Clopper and Pearson 1934; Newcombe 1998, Statistics in Medicine 17, 2635 (squares of paired differences).
Arrays in, arrays out. Knows nothing about bootstraps, claims or models.
"""

from __future__ import annotations

import numpy as np
from scipy import stats as scipy_stats

__all__ = ["FEW", "agreeing", "clopper_pearson", "never_zero_width", "other_share", "rare", "share_difference"]

_SAME = 1e-12
FEW = 10
"""With fewer clusters than this that differ from the commonest value, `rare` speaks."""
SEEN = 3
"""So many clusters on one side show how far clusters lie there."""


def clopper_pearson(
    successes: np.ndarray | int, n: np.ndarray | int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Exact two-sided interval of a share, for many counts at once.

    Args:
        successes, n: counts of one shape (or broadcast); n may be 0, which says nothing: [0, 1].
        level: coverage, a fraction; (1 - level) / 2 on each side, on the bounded side too.

    Returns:
        lower, upper, fractions.

    Raises:
        ValueError: a level outside 0..1, or successes outside 0..n.

    Source: Clopper and Pearson 1934.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    successes, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float))
    if ((successes < 0) | (successes > n)).any():
        raise ValueError("successes must lie in 0..n")
    tail = (1 - level) / 2
    failures = n - successes
    # The beta quantiles are undefined where a count is 0: the bound is then that of the range.
    lower = scipy_stats.beta.ppf(tail, np.maximum(successes, 1), failures + 1)
    upper = scipy_stats.beta.ppf(1 - tail, successes + 1, np.maximum(failures, 1))
    return np.where(successes > 0, lower, 0.0), np.where(failures > 0, upper, 1.0)


def share_difference(first: tuple[int, int], second: tuple[int, int], level: float = 0.95) -> tuple[float, float]:
    """Interval of a difference of two shares of different prompts, such as two models' accuracies.

    The Clopper-Pearson bounds of both, combined as squares (MOVER).

    Args:
        first, second: (successes, n), n at least 1; successes independent of each other.
        level: coverage, a fraction.

    Returns:
        lower, upper of first − second, within -1..1.

    Raises:
        ValueError: as `clopper_pearson`.

    Source: Newcombe 1998, Statistics in Medicine 17, 873 (there with Wilson's bounds).
    """
    (one, low_one, up_one), (two, low_two, up_two) = (
        (right / n, *map(float, clopper_pearson(right, n, level))) for right, n in (first, second)
    )
    down = float(np.hypot(one - low_one, up_two - two))
    up = float(np.hypot(up_one - one, two - low_two))
    return max(one - two - down, -1.0), min(one - two + up, 1.0)


def other_share(n_clusters: np.ndarray | int, differing: np.ndarray | int = 0, level: float = 0.95) -> np.ndarray:
    """Upper bound on the share of clusters with another value, when `differing` of n_clusters showed one.

    Returns:
        fractions in 0..1, 1 for no cluster; the shape of the arguments.
    """
    return clopper_pearson(differing, n_clusters, level)[1]


def _means(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if sums.ndim != 2 or sums.shape != counts.shape:
        raise ValueError(f"sums and counts must both be (cell, cluster), got {sums.shape} and {counts.shape}")
    return sums / np.maximum(counts, 1), counts > 0


def agreeing(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(cell,) bool: all clusters that a cell has show the same mean. True for a cell with one cluster or none.

    Args:
        sums: (cell, cluster) sum over a cluster's prompts.
        counts: (cell, cluster) prompts; 0 where the cell has none of the cluster.
    """
    means, present = _means(sums, counts)
    highest = np.where(present, means, -np.inf).max(1, initial=-np.inf)
    lowest = np.where(present, means, np.inf).min(1, initial=np.inf)
    return (highest - lowest <= _SAME) | ~present.any(1)


def _commonest(means: np.ndarray, present: np.ndarray) -> tuple[float, int]:
    """The value that most clusters show, and how many show another one."""
    values, numbers = np.unique(np.round(means[present], 9), return_counts=True)
    place = int(numbers.argmax())
    return float(values[place]), int(numbers.sum() - numbers[place])


def never_zero_width(
    lower: np.ndarray,
    upper: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[float | np.ndarray, float | np.ndarray] = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the exact interval wherever the clusters agree, or where the given one has no width for another reason.

    Args:
        lower, upper: (cell,) interval of sums.sum(1) / counts.sum(1), as the bootstrap gave it.
        sums, counts: (cell, cluster), as for the bootstrap.
        level: coverage of the exact interval.
        bounds: lowest and highest value that the mean can take, numbers or (cell,): (0, 1) for a share, and for a
            paired difference (-baseline, 1 - baseline), or (-1, 1) where the baseline is not known.

    Returns:
        lower, upper, replaced (cell,) bool. A cell with fewer than two clusters gets the whole range.

    Raises:
        ValueError: shapes that do not fit, or a value outside the bounds.
    """
    means, present = _means(sums, counts)
    low, high = (np.broadcast_to(np.asarray(bound, float), (len(means),)) for bound in bounds)
    new_lower, new_upper = np.array(lower, float), np.array(upper, float)
    if new_lower.shape != (len(means),) or new_upper.shape != (len(means),):
        raise ValueError(f"lower and upper must be ({len(means)},), got {new_lower.shape} and {new_upper.shape}")
    clusters = present.sum(1)
    replaced = agreeing(sums, counts) | ~(new_upper - new_lower > _SAME) | (clusters < 2)
    for cell in np.flatnonzero(replaced):
        if clusters[cell] < 2:
            new_lower[cell], new_upper[cell] = low[cell], high[cell]
            continue
        value, differing = _commonest(means[cell], present[cell])
        if not low[cell] - 1e-9 <= value <= high[cell] + 1e-9:
            raise ValueError(f"cell {cell}: the value {value:g} lies outside {low[cell]:g}..{high[cell]:g}")
        share = float(other_share(int(clusters[cell]), differing, level))
        new_lower[cell] = max(low[cell], value - share * max(value - low[cell], 0.0))
        new_upper[cell] = min(high[cell], value + share * max(high[cell] - value, 0.0))
    return new_lower, new_upper, replaced


def rare(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    level: float = 0.95,
    bounds: tuple[np.ndarray | float, np.ndarray | float] = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of sums.sum(1) / counts.sum(1) where fewer than FEW clusters, and less than half, differ from the rest.

    With the commonest cluster mean v, and the shares of clusters below and above it with their exact bounds, the mean
    reaches so far down as more clusters may lie below and as fewer may lie above (at the distance that they were seen
    at), the two as the root of their squares; so far up likewise. How far those lie that were not seen: as far as the
    farthest on their side if at least SEEN are there, otherwise at the end of the range.

    Args:
        sums, counts, level, bounds: as for `never_zero_width`.

    Returns:
        lower, upper (cell,); NaN for the other cells.
    """
    means, present = _means(sums, counts)
    low, high = (np.broadcast_to(np.asarray(bound, float), (len(means),)) for bound in bounds)
    lower, upper = np.full(len(means), np.nan), np.full(len(means), np.nan)
    for cell, here in enumerate(present):
        total = int(here.sum())
        if total < 2:
            continue
        value, differing = _commonest(means[cell], here)
        if differing >= min(FEW, total / 2):
            continue
        apart = means[cell][here] - value
        estimate = float(np.asarray(sums, float)[cell].sum() / np.asarray(counts, float)[cell].sum())
        more, fewer = {}, {}
        for side, room in ((-1, value - low[cell]), (1, high[cell] - value)):
            found = side * apart > 1e-9
            number = int(found.sum())
            least, most = (float(bound) for bound in clopper_pearson(number, total, level))
            size = float(np.abs(apart[found]).mean()) if number else 0.0
            farthest = float(np.abs(apart[found]).max()) if number >= SEEN else max(room, 0.0)
            more[side] = (most - number / total) * farthest if farthest > 0 else 0.0
            fewer[side] = (number / total - least) * size
        lower[cell] = max(low[cell], estimate - np.hypot(more[-1], fewer[1]))
        upper[cell] = min(high[cell], estimate + np.hypot(more[1], fewer[-1]))
    return lower, upper
