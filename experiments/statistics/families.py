"""Claims that are judged together: intervals that all hold at once, none of them without width.

Means over the same prompts, one column per claim. One claim has the interval that it has everywhere else. Several have
max-t intervals over the same resamples of clusters (`equivalence.simultaneous`), cut to the range of each number. Where
all clusters agree they are the exact bounds of `exact.py`, and where fewer than ten differ they are at least as wide as
`exact.rare`, both at the Bonferroni level of the family.

Arrays in, a frame out. Knows nothing about what is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings, bootstrap_interval, cluster_codes, cluster_sums, resampled_ratio
from experiments.statistics.equivalence import family_level, simultaneous
from experiments.statistics.exact import never_zero_width, rare

__all__ = ["family_intervals", "family_text"]


def family_text(claims: int, level: float) -> str:
    """How `family_intervals` corrects, in words; "" for one claim."""
    return f"max-t, together at {100 * level:g} %" if claims > 1 else ""


def family_intervals(
    values: np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    bounds: Sequence[tuple[float, float]],
    settings: Settings | None = None,
    room: Sequence[tuple[float, float]] | None = None,
) -> pd.DataFrame:
    """Means of several columns with intervals that hold together at the level of the settings.

    Args:
        values: (prompt, claim), NaN where a prompt does not count for a claim.
        clusters: (prompt,) cluster of each prompt.
        bounds: per claim, lowest and highest value that its mean can take; infinite where there is none.
        settings: resamples, level, seed.
        room: the same given the reference that was measured, for a paired change: (-reference, 1 - reference) of a
            share. Exact bounds use it; others move with the reference and are cut to `bounds`. None: the bounds.

    Returns:
        One row per claim: estimate, lower, upper, n (prompts), n_clusters; NaN where no prompt counts. The range of the
        number where there is one cluster, or where all clusters agree and the number has no bounds.

    Raises:
        ValueError: shapes that do not fit, or a mean outside its bounds.
    """
    settings = settings or Settings()
    values = np.asarray(values, float)
    if values.ndim != 2 or len(values) != len(clusters) or values.shape[1] != len(bounds):
        raise ValueError(
            f"values must be ({len(clusters)} prompts, {len(bounds)} claims), as clusters and bounds say, got "
            f"{values.shape}"
        )
    codes, names = cluster_codes(clusters)
    sums, counts = (np.ascontiguousarray(table) for table in cluster_sums(values, codes, len(names)))
    n, n_clusters = counts.sum(1).astype(int), (counts > 0).sum(1)
    estimate = np.where(n > 0, sums.sum(1) / np.maximum(n, 1), np.nan)
    low, high = (np.array([pair[side] for pair in bounds], float) for side in (0, 1))
    least, most = (np.array([pair[side] for pair in room or bounds], float) for side in (0, 1))
    weights = settings.weights(len(names))
    claims = int((n > 0).sum())
    if claims > 1:
        lower, upper = simultaneous(estimate, resampled_ratio(sums, counts, weights), n_clusters, settings.level)
    else:
        lower, upper = bootstrap_interval(sums, counts, weights=weights, level=settings.level)
    measured = np.flatnonzero(n > 0)
    sums, counts, left = sums[measured], counts[measured], (least[measured], most[measured])
    level = family_level(settings.level, max(claims, 1))
    lower, upper = np.maximum(lower, low)[measured], np.minimum(upper, high)[measured]
    lower, upper, _ = never_zero_width(lower, upper, sums, counts, level=level, bounds=left)
    below, above = rare(sums, counts, level=level, bounds=left)
    table = pd.DataFrame({"estimate": estimate, "lower": np.nan, "upper": np.nan, "n": n, "n_clusters": n_clusters})
    table.loc[measured, "lower"], table.loc[measured, "upper"] = np.fmin(lower, below), np.fmax(upper, above)
    return table
