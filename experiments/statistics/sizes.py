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

`smallest_size` takes whichever of the two the prompts allow. Several columns (an effect at each latent, say) share one
size: the squares are pooled over columns, so that it is the typical movement of one of them.

Arrays in, records out. Knows nothing about studies.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.statistics.clusters import cluster_codes, cluster_sums

__all__ = ["Smallest", "between_forms", "between_halves", "smallest_size"]


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


def _checked(values: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """(prompt, column)."""
    values = np.asarray(values, float)
    if values.ndim not in (1, 2) or not len(values) or any(len(other) != len(values) for other in others):
        raise ValueError(f"values, clusters and forms must have one length >= 1, got {values.shape} and "
                         f"{[len(other) for other in others]}")  # fmt: skip
    if not np.isfinite(values).all():
        raise ValueError("values must be finite; leave out prompts without one")
    return values if values.ndim == 2 else values[:, None]


def between_forms(values: np.ndarray, clusters: np.ndarray, forms: np.ndarray) -> Smallest:
    """From prompts with the same numbers in different forms.

    Args:
        values: (prompt,) the measure per prompt: correct (0/1), an effect of an edit, a KL in nats; or (prompt,
            column).
        clusters: (prompt,) cluster (number triple) of each prompt.
        forms: (prompt,) form (template) of each prompt.

    Raises:
        ValueError: lengths that differ, values that are not finite, or no two forms with two common clusters.
    """
    table = _checked(values, clusters, forms)
    codes, names = cluster_codes(clusters)
    kinds, kind_names = cluster_codes(forms)
    width = len(kind_names)
    squares = []
    for column in table.T:
        spread = np.where(kinds[:, None] == np.arange(width), column[:, None], np.nan)
        sums, counts = cluster_sums(spread, codes, len(names))
        means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        for a, b in itertools.combinations(range(width), 2):
            apart = means[a] - means[b]
            apart = apart[np.isfinite(apart)]
            if len(apart) > 1:
                squares.append(apart.mean() ** 2 - apart.var(ddof=1) / len(apart))
    if not squares:
        raise ValueError("no two forms share two clusters: use between_halves")
    spread_of = float(np.sqrt(max(0.0, float(np.mean(squares)))))
    return _smallest(spread_of, table, len(squares), f"spread between {width} wordings of the same numbers")


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
    table = _checked(values, clusters)
    codes, names = cluster_codes(clusters)
    if len(names) < 2:
        raise ValueError("two halves need two clusters at least, got 1")
    sums, counts = cluster_sums(table, codes, len(names))
    rng = np.random.default_rng([seed, 6])
    first = rng.permuted(np.tile(np.arange(len(names)) < len(names) // 2, (halves, 1)), axis=1)
    one, other = ((side @ sums.T) / (side @ counts.T) for side in (first.astype(float), (~first).astype(float)))
    spread = float(np.quantile(np.abs(one - other), quantile)) / 2
    words = f"half of the {quantile:.0%} quantile of differences between random halves"
    return _smallest(spread, table, halves * table.shape[1], words)


def smallest_size(values: np.ndarray, clusters: np.ndarray, forms: np.ndarray, *, seed: int = 0) -> Smallest:
    """By forms if the prompts have them, else by halves; where all values are alike, one prompt in n of a scale of 1.

    Args:
        values, clusters, forms: as for `between_forms`; a prompt with a value that is not finite is left out.
        seed: of the halves.

    Raises:
        ValueError: lengths that differ, or no prompt with values.
    """
    table = np.asarray(values, float)
    table = table if table.ndim == 2 else table[:, None]
    if len(clusters) != len(table) or len(forms) != len(table):
        raise ValueError(f"{len(table)} values, {len(clusters)} clusters and {len(forms)} forms must be as many")
    known = np.isfinite(table).all(1)
    table, clusters, forms = table[known], np.asarray(clusters)[known], np.asarray(forms)[known]
    if not len(table):
        raise ValueError("no prompt has every value: no size can be read from them")
    if np.ptp(table, axis=0).max() <= 0:
        return Smallest(1 / len(table), 0.0, 1 / len(table), 0, f"one prompt in {len(table)} (no value differs)")
    pairs = pd.DataFrame({"cluster": clusters, "form": forms}).drop_duplicates()
    shared = pairs.merge(pairs, on="cluster").query("form_x < form_y").groupby(["form_x", "form_y"]).size()
    if (shared > 1).any():
        return between_forms(table, clusters, forms)
    if len(np.unique(clusters)) > 1:
        return between_halves(table, clusters, seed=seed)
    return _smallest(0.0, table, 0, "there is one cluster, which says nothing about spread, and that")


def _smallest(spread: float, values: np.ndarray, pairs: int, words: str) -> Smallest:
    resolution = float(np.ptp(values, axis=0).max()) / len(values)
    if not max(spread, resolution) > 0:
        raise ValueError("every value is the same: no size can be read from them")
    if resolution > spread:
        words = f"one prompt in {len(values)} ({words} is smaller)"
    return Smallest(max(spread, resolution), spread, resolution, pairs, words)
