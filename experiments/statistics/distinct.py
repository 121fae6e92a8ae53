"""Effects, not cells: how many different edits are behind some cells, by the prompts that they flip.

Arrays in, records out. Knows nothing about sweeps, files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

__all__ = ["DistinctEdits", "distinct_edits", "overlap"]

_TIE = 1e-9


def overlap(flips: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """(cell, other) Jaccard overlap of sets of flipped prompts: both / either; 0 where neither flips anything."""
    first = np.asarray(flips, float)
    second = first if others is None else np.asarray(others, float)
    both = first @ second.T
    either = first.sum(1)[:, None] + second.sum(1)[None] - both
    return np.where(either > 0, both / np.maximum(either, 1), 0.0)


@dataclass(frozen=True)
class DistinctEdits:
    """Cells grouped into effects.

    Attributes:
        labels: (cell,) number of the effect, 0.., in order of first appearance.
        number: how many effects.
        threshold: overlap from which two cells count as one effect.
        null_pairs: how many pairs of unrelated random edits the threshold was read from.
    """

    labels: np.ndarray
    number: int
    threshold: float
    null_pairs: int


def distinct_edits(
    flips: np.ndarray,
    null_flips: np.ndarray,
    null_edits: np.ndarray,
    *,
    method: Literal["average", "components"] = "average",
    quantile: float = 0.95,
    most: int = 600,
    seed: int = 0,
) -> DistinctEdits:
    """How many different effects are behind some cells, by the prompts that they flip.

    Two cells are the same effect if their flips overlap more than those of two unrelated random edits usually do: the
    threshold is the `quantile` of the Jaccard overlap between null cells of different vectors, among null cells with
    at least half the flips of the smallest given cell and at most twice those of the largest (overlap grows with
    size). Easy prompts flip together under any edit; this is what the null overlap measures. With average linkage a
    cell joins a group if its mean overlap with the group is above the threshold, so that chance overlaps do not chain.

    Args:
        flips: (cell, prompt) bool, the cells to group.
        null_flips: (null cell, prompt) bool, of random draws.
        null_edits: (null cell,) which vector it was; only different ones are compared.
        method: "average": average linkage; "components": single overlaps above the threshold connect.
        quantile: of the overlap between unrelated edits.
        most: null cells used at most, a seeded choice.

    Raises:
        ValueError: shapes that do not fit.
    """
    cells = np.asarray(flips, bool)
    null = np.asarray(null_flips, bool)
    edits = np.unique(np.asarray(null_edits), return_inverse=True)[1] if len(null) else np.empty(0, int)
    if cells.ndim != 2 or null.ndim != 2 or null.shape[1] != cells.shape[1] or len(edits) != len(null):
        raise ValueError(f"flips and null_flips must be (cell, prompt) over the same prompts, got {cells.shape}, "
                         f"{null.shape} and {len(edits)} null_edits")  # fmt: skip
    if not len(cells):
        return DistinctEdits(np.empty(0, int), 0, np.nan, 0)
    sizes, own = null.sum(1), cells.sum(1)
    alike = np.flatnonzero((sizes >= max(1.0, own.min() / 2)) & (sizes <= 2 * own.max()))
    if len(alike) > most:
        alike = np.sort(np.random.default_rng([seed, 5]).choice(alike, most, replace=False))
    unrelated = np.triu(edits[alike][:, None] != edits[alike][None], 1)
    found = overlap(null[alike])[unrelated]
    threshold = float(np.quantile(found, quantile)) if found.size else 0.5
    if len(cells) == 1:
        return DistinctEdits(np.zeros(1, int), 1, threshold, found.size)
    apart = 1 - overlap(cells)
    np.fill_diagonal(apart, 0.0)
    tree = linkage(squareform(apart, checks=False), "average" if method == "average" else "single")
    raw = fcluster(tree, 1 - threshold - _TIE, "distance")
    _, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    labels = np.argsort(np.argsort(first))[inverse]
    return DistinctEdits(labels, len(first), threshold, int(found.size))
