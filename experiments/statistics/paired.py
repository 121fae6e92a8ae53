"""Tests of paired answers: edited against unsteered on the same prompts, and a cell against its random draws.

Against the baseline, all two-sided, with whole clusters of prompts as units (but for the first):
    mcnemar_p        exact McNemar on the flips: prompts taken as independent.
    sign_flip_p      exact sign-flip test on cluster sums; equals mcnemar_p when every cluster has one prompt.
    max_statistic_p  family-wise: step-down max-statistic over random sign flips of whole clusters.
    benjamini_hochberg  false discovery rate over a family of p-values.

Against control draws of the same size: `against_draws` ranks a cell among its draws and gives a randomisation p and
the p of a prediction t test. `paired_interval` is the difference of two accuracies with its clustered interval.

Knows nothing about trial tables, what was edited, files or models.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from experiments.statistics.clusters import (
    Estimate,
    cluster_codes,
    cluster_interval,
    cluster_sums,
    cluster_weights,
)

__all__ = [
    "AgainstDraws",
    "against_draws",
    "benjamini_hochberg",
    "max_statistic_p",
    "mcnemar_p",
    "paired_interval",
    "sign_flip_p",
]


def paired_interval(
    correct: Sequence[bool] | np.ndarray,
    reference: Sequence[bool] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Accuracy of `correct` minus that of `reference` on the same prompts, with a bootstrap interval over clusters."""
    difference = np.asarray(correct, float) - np.asarray(reference, float)
    if difference.ndim != 1 or len(difference) == 0 or len(difference) != len(clusters):
        raise ValueError(
            "correct, reference and clusters must have one length >= 1, got "
            f"{np.shape(correct)}, {np.shape(reference)} and {len(clusters)}"
        )
    codes, names = cluster_codes(clusters)
    sums, counts = cluster_sums(difference[:, None], codes, len(names))
    weights = cluster_weights(len(names), resamples, seed)
    before = float(np.asarray(reference, float).mean())
    lower, upper = cluster_interval(sums, counts, weights=weights, level=level, bounds=(-before, 1 - before))
    return Estimate(float(difference.mean()), float(lower[0]), float(upper[0]), len(difference), len(names))


# --- Against a baseline -----------------------------------------------------------------------------------------------


def mcnemar_p(gained: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Exact two-sided McNemar p: binomial test of the flips against one half. 1 where nothing flipped."""
    gained, lost = np.asarray(gained), np.asarray(lost)
    return np.minimum(1.0, 2 * scipy_stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))


def sign_flip_p(sums: np.ndarray) -> np.ndarray:
    """Exact two-sided sign-flip p of each cell's paired differences, with whole clusters as units.

    Null hypothesis: exchanging edited and unsteered answers of a whole cluster changes nothing in distribution. Then,
    given |s_j|, all sign assignments are equally likely, and p is the share of them whose |total| is at least the
    observed one. The distribution is a convolution of binomials (one per size |s_j|), so no sampling is involved.

    Args:
        sums: (cell, cluster) integer sums of (edited - unsteered) correctness.

    Returns:
        (cell,) in (0, 1]; equal to `mcnemar_p` when every cluster holds one prompt. 1 where nothing flipped.
    """
    sums = np.asarray(sums)
    if not np.issubdtype(sums.dtype, np.integer):
        raise ValueError(f"sign_flip_p needs integer cluster sums, got {sums.dtype}")
    sizes = np.abs(sums)
    largest = int(sizes.max(initial=0))
    counts = np.stack([(sizes == size).sum(1) for size in range(1, largest + 1)], 1) if largest else None
    totals = np.abs(sums.sum(1))
    p = np.ones(len(sums))
    if counts is None:
        return p
    upper_tails: dict[tuple[int, ...], np.ndarray] = {}
    for cell, (row, total) in enumerate(zip(counts, totals, strict=True)):
        if total == 0:
            continue
        key = tuple(int(number) for number in row)
        if key not in upper_tails:
            masses = np.ones(1)  # of the sum of |s_j| over the clusters that got a plus
            for size, number in enumerate(key, start=1):
                if number:
                    spread = np.zeros(size * number + 1)
                    spread[::size] = scipy_stats.binom.pmf(np.arange(number + 1), number, 0.5)
                    masses = np.convolve(masses, spread)
            upper_tails[key] = masses[::-1].cumsum()[::-1]
        tail = upper_tails[key]
        p[cell] = min(1.0, 2 * tail[(len(tail) - 1 + int(total)) // 2])
    return p


def _signs(n_clusters: int, permutations: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    return rng.choice(np.array([-1.0, 1.0]), size=(permutations, n_clusters))


def max_statistic_p(sums: np.ndarray, *, permutations: int, seed: int) -> np.ndarray:
    """Family-wise corrected two-sided p of each cell: step-down max-statistic over cluster sign flips.

    Every cluster's differences are flipped together in all cells, which keeps the dependence between cells (they share
    prompts and baseline), so the correction is milder than Bonferroni's where cells agree.

    Args:
        sums: (cell, cluster) sums of (edited - unsteered) correctness.

    Returns:
        (cell,) between 1 / (permutations + 1) and 1.

    Source: Westfall and Young 1993, step-down maxT; sign flips as in Winkler et al. 2014, NeuroImage 92.
    """
    sums = np.asarray(sums, float)
    p = np.ones(len(sums))
    scale = np.sqrt((sums**2).sum(1))
    live = np.flatnonzero(scale > 0)  # a cell in which nothing flipped can never be extreme
    if not live.size:
        return p
    scaled = sums[live] / scale[live, None]
    observed = np.abs(scaled.sum(1))
    order = np.argsort(observed, kind="stable")  # ascending: step j compares with the cells no more extreme than it
    signs = _signs(sums.shape[1], permutations, seed)
    exceed = np.zeros(len(live))
    step = max(1, 4_000_000 // len(live))  # about 32 MB of permuted statistics at a time
    for start in range(0, permutations, step):
        permuted = np.abs(signs[start : start + step] @ scaled[order].T)
        np.maximum.accumulate(permuted, axis=1, out=permuted)
        exceed += (permuted >= observed[order] - 1e-9).sum(0)
    stepped = (1 + exceed) / (1 + permutations)
    p[live[order]] = np.maximum.accumulate(stepped[::-1])[::-1]  # a less extreme cell never has a smaller p
    return p


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of a family of p-values: the false discovery rate at which each would just count.

    Source: Benjamini and Hochberg 1995.
    """
    return multipletests(p, method="fdr_bh")[1] if len(p) else np.empty(0)


# --- Against draws ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgainstDraws:
    """Cells beside their control draws; all (cell,), NaN where a cell has no draw (or, for t_p, only one).

    Attributes:
        mean: of the draws.
        lower, upper: central share (the level that was asked for) of the draws.
        rank: place of the cell among its draws from the best, 1..draws + 1, half a place per tie.
        p: randomisation test, min(1, 2 min(1 + #draws at least as good, 1 + #draws at most as good) / (1 + D)): exact,
            but never below 2 / (1 + D).
        t_p: prediction test, t = (value - mean of draws) / (s sqrt(1 + 1/D)) with D - 1 degrees of freedom; s is the
            larger of the spread of the cell's own draws and the pooled spread, and never under half a prompt.
        draws: number of draws.
    """

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    rank: np.ndarray
    p: np.ndarray
    t_p: np.ndarray
    draws: np.ndarray


def against_draws(
    own: np.ndarray,
    draws: Sequence[np.ndarray],
    n: np.ndarray,
    *,
    pools: Sequence[Hashable],
    sets: Sequence[Hashable],
    level: float = 0.95,
) -> AgainstDraws:
    """Every cell against its control draws.

    Args:
        own: (cell,) accuracy of each cell, a fraction.
        draws: per cell, (draw,) accuracies of its draws, possibly none.
        n: (cell,) prompts behind an accuracy; the spread of draws is never taken as less than half a prompt.
        pools: per cell, a name: the spread of draws around their own cell's mean is pooled over the cells of a pool.
        sets: per cell, a name of its set of draws: cells that share their draws count once in a pool.
        level: share of the draws between `lower` and `upper`.
    """
    if not len(own) == len(draws) == len(n) == len(pools) == len(sets):
        raise ValueError(
            "own, draws, n, pools and sets must have one entry per cell, got "
            f"{len(own)}, {len(draws)}, {len(n)}, {len(pools)} and {len(sets)}"
        )
    squares: dict[Hashable, dict[Hashable, tuple[float, int]]] = {}
    for pool, name, values in zip(pools, sets, draws, strict=True):
        if len(values) > 1:
            squares.setdefault(pool, {})[name] = (((values - values.mean()) ** 2).sum(), len(values) - 1)
    pooled = {
        pool: sum(total for total, _ in entries.values()) / sum(free for _, free in entries.values())
        for pool, entries in squares.items()
    }
    tail = (1 - level) / 2
    mean, lower, upper, rank, p, t_p = (np.full(len(own), np.nan) for _ in range(6))
    for cell, (value, values) in enumerate(zip(own, draws, strict=True)):
        number = len(values)
        if not number:
            continue
        better, worse = int((values > value + 1e-12).sum()), int((values < value - 1e-12).sum())
        tied = number - better - worse
        mean[cell] = values.mean()
        lower[cell], upper[cell] = np.quantile(values, [tail, 1 - tail])
        rank[cell] = 1 + better + tied / 2
        p[cell] = min(1.0, 2 * (1 + tied + min(better, worse)) / (1 + number))
        if number > 1:
            variance = max(float(values.var(ddof=1)), pooled[pools[cell]], (0.5 / int(n[cell])) ** 2)
            t = (value - values.mean()) / np.sqrt(variance * (1 + 1 / number))
            t_p[cell] = 2 * scipy_stats.t.sf(abs(t), number - 1)
    return AgainstDraws(mean, lower, upper, rank, p, t_p, np.array([len(values) for values in draws]))
