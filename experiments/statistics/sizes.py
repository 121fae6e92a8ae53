"""The smallest size that matters, read from the data: what equivalent prompts differ by when nothing was done to them.

Significance without size calls 0.005 nats an effect. A difference matters if it is larger than the one that an
irrelevant choice makes: the wording around the same numbers (templates), or which half of the prompts was asked.

Derivation, `between_forms`. Each cluster (number triple) is asked in several forms (templates). For every two forms a
and b, d_ab is the mean over their common clusters of value(a) - value(b), with variance v_ab. The spread between
equivalent forms is the root mean square of d_ab with the sampling noise taken off: sqrt(max(0, mean(d_ab^2 - v_ab))).
It estimates how far the result would move if all prompts were worded in another, equally good way; it does not shrink
as prompts are added. `resolution` (one prompt in n) stands in where this is smaller: no run can resolve less.

`between_halves`, for prompts without forms: the `quantile` of |mean of one half - mean of the other| over seeded random
halves of clusters, divided by 2 (a half differs from the whole by half of that). It shrinks with n, and says only what
the choice of prompts makes of the result at this n: use it as a floor of size, not as its meaning.

Arrays in, records out. Knows nothing about studies.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from experiments.statistics.clusters import cluster_codes, cluster_sums

__all__ = ["Smallest", "between_forms", "between_halves"]


@dataclass(frozen=True)
class Smallest:
    """A size that matters and where it comes from.

    Attributes:
        size: in the unit of the values, above 0.
        spread: the spread it was read from, before the resolution is put under it.
        resolution: one prompt in n times the range of the values; the lower limit.
        pairs: how many differences between forms (or halves) are behind it.
        words: the derivation in one sentence.
    """

    size: float
    spread: float
    resolution: float
    pairs: int
    words: str


def _resolution(values: np.ndarray) -> float:
    return float(np.ptp(values)) / len(values)


def _checked(values: np.ndarray, *others: np.ndarray) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or any(len(other) != len(values) for other in others):
        raise ValueError(f"values, clusters and forms must have one length >= 1, got {values.shape} and "
                         f"{[len(other) for other in others]}")  # fmt: skip
    if not np.isfinite(values).all():
        raise ValueError("values must be finite; leave out prompts without one")
    return values


def between_forms(values: np.ndarray, clusters: np.ndarray, forms: np.ndarray) -> Smallest:
    """From prompts with the same numbers in different forms.

    Args:
        values: (prompt,) the measure per prompt: correct (0/1), an effect of an edit, a KL in nats.
        clusters: (prompt,) cluster (number triple) of each prompt.
        forms: (prompt,) form (template) of each prompt.

    Raises:
        ValueError: lengths that differ, values that are not finite, or no two forms with two common clusters.
    """
    values = _checked(values, clusters, forms)
    codes, names = cluster_codes(clusters)
    kinds, kind_names = cluster_codes(forms)
    width = len(kind_names)
    columns = np.where(kinds[:, None] == np.arange(width), values[:, None], np.nan)
    sums, counts = cluster_sums(columns, codes, len(names))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    squares = []
    for a, b in itertools.combinations(range(width), 2):
        apart = means[a] - means[b]
        apart = apart[np.isfinite(apart)]
        if len(apart) > 1:
            squares.append(apart.mean() ** 2 - apart.var(ddof=1) / len(apart))
    if not squares:
        raise ValueError("no two forms share two clusters: use between_halves")
    spread = float(np.sqrt(max(0.0, float(np.mean(squares)))))
    return _smallest(spread, values, len(squares), f"spread between {width} wordings of the same numbers")


def between_halves(
    values: np.ndarray, clusters: np.ndarray, *, halves: int = 400, quantile: float = 0.95, seed: int = 0
) -> Smallest:
    """From random halves of the clusters.

    Args:
        values, clusters: as for `between_forms`.
        halves: random splits.
        quantile: of the absolute differences.

    Raises:
        ValueError: lengths that differ, values that are not finite, fewer than two clusters.
    """
    values = _checked(values, clusters)
    codes, names = cluster_codes(clusters)
    if len(names) < 2:
        raise ValueError("two halves need two clusters at least, got 1")
    sums, counts = (table[0] for table in cluster_sums(values[:, None], codes, len(names)))
    rng = np.random.default_rng([seed, 6])
    first = rng.permuted(np.tile(np.arange(len(names)) < len(names) // 2, (halves, 1)), axis=1)
    one, other = ((side @ sums) / (side @ counts) for side in (first.astype(float), (~first).astype(float)))
    spread = float(np.quantile(np.abs(one - other), quantile)) / 2
    words = f"half of the {quantile:.0%} quantile of differences between random halves"
    return _smallest(spread, values, halves, words)


def _smallest(spread: float, values: np.ndarray, pairs: int, words: str) -> Smallest:
    resolution = _resolution(values)
    if not max(spread, resolution) > 0:
        raise ValueError("every value is the same: no size can be read from them")
    if resolution > spread:
        words = f"one prompt in {len(values)} ({words} is smaller)"
    return Smallest(max(spread, resolution), spread, resolution, pairs, words)
