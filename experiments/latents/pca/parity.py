"""Do the first components tell even from odd latents? Shares of variance between two groups of latents, in numbers.

Knows nothing about models or about what the scores are of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums, interval_of

__all__ = ["divisions_of", "parity_interval", "parity_share", "parity_table"]


def parity_share(scores: np.ndarray, groups: Sequence[int]) -> float:
    """Share of the variance of scores (prompt, latent, component) that lies between two groups of latents.

    Args:
        scores: of prompts and latents.
        groups: latents (1-based) of the first group; the others are the second.
    """
    member = np.isin(np.arange(1, scores.shape[1] + 1), groups)
    grand = scores.mean((0, 1))
    total = ((scores - grand) ** 2).sum()
    between = sum(
        scores.shape[0] * part.sum() * ((scores[:, part].mean((0, 1)) - grand) ** 2).sum() for part in (member, ~member)
    )
    return float(between / total) if total > 0 else 0.0


def parity_interval(
    scores: np.ndarray, divisions: Sequence[tuple[int, ...]], clusters: np.ndarray, settings: Settings
) -> tuple[float, float]:
    """Interval of the lead of the first division: its `parity_share` minus the largest of the others.

    Args:
        scores: (prompt, latent, component).
        divisions: first groups of latents (1-based); the others are the second groups.
        clusters: (prompt,) number of each prompt's cluster.
        settings: resamples, level, seed.

    Returns:
        lower, upper; NaN if there is no other division.
    """
    if len(divisions) < 2:
        return np.nan, np.nan
    n_prompts, n, components = scores.shape
    centred = scores - scores.mean((0, 1))
    member = np.array([np.isin(np.arange(1, n + 1), group) for group in divisions], float)  # division, latent
    columns = np.column_stack([centred.reshape(n_prompts, -1), (centred**2).sum((1, 2)), np.ones(n_prompts)])

    def lead(sums: np.ndarray) -> np.ndarray:
        prompts = sums[:, -1]
        means = sums[:, :-2].reshape(-1, n, components) / prompts[:, None, None]
        grand = means.mean(1, keepdims=True)
        total = sums[:, -2] - prompts * n * (grand**2).sum((1, 2))
        between = np.zeros((len(sums), len(member)))
        for side in (member, 1 - member):
            size = side.sum(1)  # division
            apart = np.einsum("dk,rkc->rdc", side, means) / size[:, None] - grand
            between += prompts[:, None] * size * (apart**2).sum(-1)
        share = np.where(total[:, None] > 0, between / total[:, None], 0.0)
        return share[:, 0] - share[:, 1:].max(1)

    sums, _ = cluster_sums(columns, clusters, int(clusters.max()) + 1)
    _, low, high = interval_of(
        lead, sums, weights=settings.weights(sums.shape[1]), n_clusters=sums.shape[1], level=settings.level
    )
    return float(low[0]), float(high[0])


def divisions_of(n: int) -> list[tuple[int, ...]]:
    """Ways to divide latents 1..n into two groups of (nearly) equal size, each once; odd against even first."""
    half = n // 2
    odd = tuple(range(1, n + 1, 2)) if n % 2 == 0 else tuple(range(2, n + 1, 2))
    found = [odd]
    for group in itertools.combinations(range(1, n + 1), half):
        if (n % 2 or 1 in group) and set(group) != set(odd):
            found.append(group)
    return found


def parity_table(scores: pd.DataFrame, n: int, settings: Settings) -> pd.DataFrame:
    """How far even and odd latents lie apart, for every quantity, beside every other division of the latents.

    Args:
        scores: a row per quantity, latent and prompt, with prompt_id, cluster, first and second.
        n: number of latents.
        settings: of the interval.

    Returns:
        quantity, share (of the variance, even against odd), best_other (largest of the other divisions), difference,
        lower, upper, rank (1: no other division has more), divisions, n, n_clusters.
    """
    divisions = divisions_of(n)
    rows = []
    for quantity, part in scores.groupby("quantity", sort=False):
        asked = part[part["latent"] == 1]
        codes, names = cluster_codes(asked["cluster"])
        points = [part.loc[part["latent"] == k, ["first", "second"]].to_numpy(float) for k in range(1, n + 1)]
        values = np.stack(points, axis=1)  # prompt, latent, component
        shares = np.array([parity_share(values, group) for group in divisions])
        low, high = parity_interval(values, divisions, codes, settings)
        best = shares[1:].max(initial=0.0)
        rows.append(
            {"quantity": quantity, "share": shares[0], "best_other": best, "difference": shares[0] - best,
             "lower": low, "upper": high, "rank": int((shares >= shares[0] - 1e-12).sum()),
             "divisions": len(divisions), "n": len(asked), "n_clusters": len(names)}
        )  # fmt: skip
    return pd.DataFrame(rows)
