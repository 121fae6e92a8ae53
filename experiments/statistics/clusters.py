"""Uncertainty over clusters of prompts: resampling weights, cluster sums, and the one rule for an interval.

A *cluster* is a set of prompts that share a number triple. Clusters, not prompts, are taken as independent: every
interval of every study comes from resampling whole clusters, by one rule that is defined here and nowhere else.

The rule, `expanded_percentile`: percentile bootstrap over clusters (multinomial weights), with the quantile levels
widened for few clusters so that a mean gets the width of a t interval. One cluster says nothing about spread: the
interval is then the whole range of the number. It holds for any function of cluster sums (`interval_of`): a mean, a
difference of means, the lead of one column over the others, a calibration error. `bootstrap_interval` is the same for
many ratios at once. Where all clusters agree there is nothing to resample: `cluster_interval` is `bootstrap_interval`
with the exact bounds of `exact.py` there, and what every table has: `mean_intervals` for the columns of a table,
`accuracy_interval` for one accuracy, `effects.levels` and `effects.compare`.

Knows nothing about trial tables, files or models.

Source: Hesterberg 2015, arXiv 1411.5279, "expanded percentile".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from experiments.statistics.exact import never_zero_width

__all__ = [
    "Estimate",
    "Settings",
    "accuracy_interval",
    "bootstrap_interval",
    "cluster_codes",
    "cluster_interval",
    "cluster_sums",
    "cluster_weights",
    "expanded_percentile",
    "interval_of",
    "mean_intervals",
    "resampled_ratio",
]

_CHUNK = 1024  # cells whose resampled values are held at once: 2,000 resamples x 1,024 cells = 16 MB


@dataclass(frozen=True)
class Settings:
    """How the statistics are computed; written beside them."""

    resamples: int = 2000
    """Bootstrap resamples of clusters behind every interval."""
    permutations: int = 5000
    """Random sign flips behind the family-wise p-value and permutations behind rank consistency."""
    level: float = 0.95
    """Coverage of the intervals, a fraction."""
    alpha: float = 0.05
    """Level at which a corrected p-value counts, a fraction."""
    seed: int = 0
    """Seed of the resamples and permutations: the same trials and settings give the same tables."""

    def __post_init__(self) -> None:
        for name in ("resamples", "permutations"):
            if getattr(self, name) < 100:
                raise ValueError(f"{name} must be at least 100, got {getattr(self, name)}")
        for name in ("level", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def weights(self, n_clusters: int) -> np.ndarray:
        """(resample, cluster) weights of these settings, see `cluster_weights`."""
        return cluster_weights(n_clusters, self.resamples, self.seed)


@dataclass(frozen=True)
class Estimate:
    """A number with its clustered interval, and how much data is behind it."""

    estimate: float
    lower: float
    upper: float
    n: int
    n_clusters: int


# --- Clusters ---------------------------------------------------------------------------------------------------------


def cluster_weights(n_clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each bootstrap resample.

    Returns:
        (resample, cluster) float64, rows sum to n_clusters.
    """
    if n_clusters < 1:
        raise ValueError(f"a bootstrap needs at least one cluster, got {n_clusters}")
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples).astype(float)


def cluster_codes(clusters: Sequence[Any] | np.ndarray | pd.Index | pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """The number of each prompt's cluster, and the clusters' names in sorted order.

    Args:
        clusters: name of the cluster of each prompt.

    Returns:
        codes (prompt,) int, names (cluster,).
    """
    codes, names = pd.factorize(np.asarray(clusters), sort=True)
    return codes, np.asarray(names)


def cluster_sums(values: np.ndarray, codes: np.ndarray, n_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the prompts of each cluster, added in the order of the prompts.

    Args:
        values: (prompt, column), NaN where a prompt does not count.
        codes: (prompt,) number of its cluster, 0..n_clusters - 1.
        n_clusters: number of clusters.

    Returns:
        sums and counts (prompts that count), each (column, cluster) float64.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or len(values) != len(codes):
        raise ValueError(f"values must be ({len(codes)} prompts, column), got {values.shape}")
    known = ~np.isnan(values)
    columns = values.shape[1]
    place = (np.asarray(codes)[:, None] * columns + np.arange(columns)).ravel()
    size = columns * n_clusters
    sums = np.bincount(place, weights=np.where(known, values, 0.0).ravel(), minlength=size)
    counts = np.bincount(place, weights=known.ravel(), minlength=size)
    # columns lie side by side in memory: sums over clusters go cluster by cluster, the same for one column or many
    return sums.reshape(n_clusters, columns).T, counts.reshape(n_clusters, columns).T


# --- The rule ---------------------------------------------------------------------------------------------------------


def expanded_percentile(
    resampled: np.ndarray, n_clusters: np.ndarray | int, level: float = 0.95, bounds: tuple[float, float] = (-1.0, 1.0)
) -> tuple[np.ndarray, np.ndarray]:
    """THE interval: expanded percentiles of resampled values; the whole range where there is one cluster.

    Args:
        resampled: (resample, cell) values, one per bootstrap resample.
        n_clusters: clusters with data behind each cell, (cell,) or one number.
        level: coverage.
        bounds: the whole range of the number, given to a cell with fewer than two clusters.

    Returns:
        lower, upper, each (cell,).
    """
    clusters = np.broadcast_to(np.asarray(n_clusters), resampled.shape[1:])
    lower, upper = np.full(clusters.shape, bounds[0], float), np.full(clusters.shape, bounds[1], float)
    for number in np.unique(clusters[clusters > 1]):
        t = scipy_stats.t.ppf((1 - level) / 2, number - 1) * np.sqrt(number / (number - 1))
        tail = scipy_stats.norm.cdf(t)
        chosen = clusters == number
        lower[chosen], upper[chosen] = np.quantile(resampled[:, chosen], [tail, 1 - tail], axis=0)
    return lower, upper


def interval_of(
    function: Callable[[np.ndarray], np.ndarray],
    sums: np.ndarray,
    *,
    weights: np.ndarray,
    n_clusters: np.ndarray | int,
    level: float = 0.95,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A function of sums over clusters, with its interval.

    Args:
        function: from (resample, quantity) sums to (resample, cell) values, or (resample,) for one cell. It gives NaN
            for a resample that drew none of the clusters with data; the plain value then stands in.
        sums: (quantity, cluster).
        weights: (resample, cluster) from `cluster_weights`.
        n_clusters: clusters with data, (cell,) or one number.
        level: coverage.
        bounds: the whole range of the function, given if there are fewer than two clusters.

    Returns:
        estimate, lower, upper, each (cell,).
    """
    if sums.ndim != 2 or sums.shape[1] != weights.shape[1]:
        raise ValueError(f"sums {sums.shape} and weights {weights.shape} do not fit")
    sums = np.ascontiguousarray(sums)  # numpy adds along memory: the same sum, to the last digit, for every caller
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = np.asarray(function(sums.sum(1)[None]))
        resampled = np.asarray(function(weights @ sums.T))
    plain, resampled = plain.reshape(1, -1), resampled.reshape(len(weights), -1)
    resampled = np.where(np.isnan(resampled), plain, resampled)
    return plain[0], *expanded_percentile(resampled, n_clusters, level, bounds)


def resampled_ratio(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum / weighted count of each cell in each resample.

    Args:
        sums: (cell, cluster). counts: (cell, cluster) prompts behind the sums. weights: (resample, cluster).

    Returns:
        (resample, cell); a resample without any trial of a cell gives its plain ratio.
    """
    totals = weights @ sums.T
    if len(counts) > 1 and (counts == counts[0]).all():  # the usual case: every cell saw the same prompts
        trials = weights @ counts[:1].T
    else:
        trials = weights @ counts.T
    plain = sums.sum(1) / np.maximum(counts.sum(1), 1)
    return np.where(trials > 0, totals / np.where(trials > 0, trials, 1), plain)


def bootstrap_interval(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    weights: np.ndarray,
    level: float = 0.95,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Clustered bootstrap interval of `sums.sum(1) / counts.sum(1)` for many cells at once.

    Args:
        sums: (cell, cluster) sum over the cluster's prompts, of correct answers or of paired differences.
        counts: (cell, cluster) number of prompts in that sum; 0 where the cell has none of that cluster.
        weights: (resample, cluster) from `cluster_weights`.
        level: coverage.
        bounds: the whole range of the statistic, returned for a cell with fewer than two clusters.

    Returns:
        lower, upper, each (cell,). Constant data gives an interval of no width.

    Source: expanded percentile interval, Hesterberg 2015, arXiv 1411.5279.
    """
    if sums.shape != counts.shape or sums.shape[1] != weights.shape[1]:
        raise ValueError(f"sums {sums.shape}, counts {counts.shape} and weights {weights.shape} do not fit")
    parts = []
    for start in range(0, len(sums), _CHUNK):
        rows = slice(start, start + _CHUNK)
        resampled = resampled_ratio(sums[rows].astype(float), counts[rows].astype(float), weights)
        parts.append(expanded_percentile(resampled, (counts[rows] > 0).sum(1), level, bounds))
    if not parts:
        return np.empty(0), np.empty(0)
    return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])


def cluster_interval(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    weights: np.ndarray,
    level: float = 0.95,
    bounds: tuple[float | np.ndarray, float | np.ndarray] = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """`bootstrap_interval`, with exact bounds wherever all clusters agree: never an interval of no width.

    Args:
        sums, counts, weights, level: as there.
        bounds: lowest and highest value of the mean, numbers or (cell,); infinite for a measure without bounds, whose
            interval is then unbounded where all clusters agree.

    Returns:
        lower, upper, each (cell,); NaN for a cell without data.
    """
    lower, upper = bootstrap_interval(sums, counts, weights=weights, level=level)
    known = np.flatnonzero(counts.sum(1) > 0)
    low, high = (np.broadcast_to(np.asarray(bound, float), (len(sums),))[known] for bound in bounds)
    ends = np.full(len(sums), np.nan), np.full(len(sums), np.nan)
    ends[0][known], ends[1][known], _ = never_zero_width(
        lower[known], upper[known], sums[known], counts[known], level=level, bounds=(low, high)
    )
    return ends


# --- Means ------------------------------------------------------------------------------------------------------------


def accuracy_interval(
    correct: Sequence[bool] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Accuracy with a bootstrap interval over clusters.

    Args:
        correct: one truth value per prompt.
        clusters: the cluster of each prompt (prompts that share a number triple).

    Returns:
        estimate, lower, upper as fractions, number of prompts and of clusters; exact where all clusters agree.

    Raises:
        ValueError: no prompts, or lengths that differ.
    """
    values = np.asarray(correct, float)
    if values.ndim != 1 or len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"correct and clusters must have one length >= 1, got {values.shape} and {len(clusters)}")
    codes, names = cluster_codes(clusters)
    sums, counts = cluster_sums(values[:, None], codes, len(names))
    weights = cluster_weights(len(names), resamples, seed)
    lower, upper = cluster_interval(sums, counts, weights=weights, level=level, bounds=(0.0, 1.0))
    return Estimate(float(values.mean()), float(lower[0]), float(upper[0]), len(values), len(names))


def mean_intervals(
    values: np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    settings: Settings | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> pd.DataFrame:
    """Means of many columns over prompts, with intervals over clusters (`cluster_interval`).

    Args:
        values: (prompt, column), NaN where a prompt does not count.
        clusters: one per prompt.
        settings: resamples, level, seed.
        bounds: the whole range of a mean.

    Returns:
        One row per column: mean, lower, upper, n (prompts), n_clusters. NaN where no prompt counts.
    """
    settings = settings or Settings()
    codes, names = cluster_codes(clusters)
    sums, counts = (np.ascontiguousarray(table) for table in cluster_sums(values, codes, len(names)))
    weights = settings.weights(len(names))
    lower, upper = cluster_interval(sums, counts, weights=weights, level=settings.level, bounds=bounds)
    n = counts.sum(1)
    return pd.DataFrame(
        {
            "mean": np.where(n == 0, np.nan, sums.sum(1) / np.maximum(n, 1)),
            "lower": lower,
            "upper": upper,
            "n": n.astype(int),
            "n_clusters": (counts > 0).sum(1),
        }
    )
