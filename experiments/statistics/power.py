"""What a run could have found: the smallest improvement and harm that would have passed its own rules.

"No improvement survives" means nothing unless an improvement could have. Three thresholds, for one cell alone among
`tests` and for each |c|:

    against the baseline   exact sign test on clusters, one-sided, Bonferroni over the cells of the tail (what
                           Benjamini-Hochberg asks of a single cell): the smallest g with
                           P(Binomial(g + b, 1/2) >= g) <= alpha / tests, where b clusters flip the other way (0: the
                           best case). It cannot be more than the clusters that are wrong (for a gain) or right (for a
                           harm) before the edit.
    against the draws      the maximum rule of `calibration`: the smallest accuracy whose extreme has p <= alpha. With D
                           draws shared by m directions p is never below m / (m + D): if that is above alpha, nothing
                           can survive.
    both                   the harder of the two, cell by cell.

`passes` is the share of cells in which an edit that made every answer right (wrong) would have passed both.

The other cells are held at what they were, without effect of their own, and so is the spread of a stratum.
Example: 540 cells, alpha 0.05: 0.05 / 540 needs 14 clusters gained without a loss (0.5 ** 14 = 6.1e-5 <= 9.3e-5).
Arrays in, records and frames out. Knows nothing about sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from experiments.statistics.calibration import Tail, extremes, least_draws, missed, pool_codes, typical_variance

__all__ = ["Design", "against_baseline", "against_draws", "detectable", "power_words"]


@dataclass(frozen=True)
class Design:
    """What a family of comparisons had to work with.

    Attributes:
        n, n_clusters: prompts and clusters.
        right_clusters, wrong_clusters: clusters with at least one prompt that is right (wrong) before the edit.
        baseline: accuracy before the edit, a fraction.
        alpha: level of each tail.
        tests: cells that are corrected for.
    """

    n: int
    n_clusters: int
    right_clusters: int
    wrong_clusters: int
    baseline: float
    alpha: float = 0.05
    tests: int = 1

    @classmethod
    def of(cls, correct: np.ndarray, clusters: np.ndarray, *, alpha: float = 0.05, tests: int = 1) -> Design:
        """From the unsteered answers, (prompt,) bool, and each prompt's cluster."""
        right = np.asarray(correct).astype(bool)
        if right.ndim != 1 or not len(right) or len(clusters) != len(right):
            raise ValueError(f"one answer and one cluster per prompt are needed, got {right.shape} and {len(clusters)}")
        codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
        right_clusters, wrong_clusters = len(np.unique(codes[right])), len(np.unique(codes[~right]))
        return cls(len(right), int(codes.max()) + 1, right_clusters, wrong_clusters, float(right.mean()), alpha, tests)

    def room(self, tail: Tail) -> int:
        """Clusters that can change in this tail at all."""
        return self.wrong_clusters if tail == "gain" else self.right_clusters


def against_baseline(design: Design, tail: Tail, opposed: int = 0) -> int | None:
    """Clusters that must flip one way for one cell to pass against the baseline.

    Args:
        tail: "gain" or "harm".
        opposed: clusters that flip the other way at the same time.

    Returns:
        the number of clusters in this tail (the net difference is that minus `opposed`); None if more than there are.
    """
    level = design.alpha / design.tests
    numbers = np.arange(design.room(tail) + 1)
    passed = scipy_stats.binom.sf(numbers - 1, numbers + opposed, 0.5) <= level
    return int(numbers[passed][0]) if passed.any() else None


def against_draws(
    values: np.ndarray,
    resolution: float,
    tail: Tail,
    *,
    strata: np.ndarray | None = None,
    blocks: np.ndarray | None = None,
    pools: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    alpha: float = 0.05,
) -> np.ndarray:
    """Accuracy that each cell would need, alone, to pass the maximum rule.

    Args:
        values: (cell, 1 + D) accuracies; column 0 (the direction) serves only for the stratum's spread.
        resolution: 1 / prompts.
        strata, blocks, pools, groups: as in `calibration`.

    Returns:
        (cell,) the smallest (gain) or largest (harm) accuracy, a multiple of the resolution, that passes; NaN where
        not even 1 (0) does, and everywhere if D is too small for anything to survive.
    """
    values = np.asarray(values, float)
    cells = len(values)
    out = np.full(cells, np.nan)
    typical = typical_variance(values, strata)
    blocks = np.zeros(cells, int) if blocks is None else np.asarray(blocks)
    parts = np.zeros(cells, int) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    number = int(parts.max(initial=0)) + 1
    for rows in (np.flatnonzero(parts == part) for part in range(number)):
        pool, _, shared = pool_codes(blocks[rows], None if pools is None else np.asarray(pools)[rows], len(rows))
        if values.shape[1] - 1 >= least_draws(alpha / number, shared=int(shared.max())):
            out[rows] = _needed(values[rows], resolution, tail, typical[rows], pool, shared, alpha / number)
    return out


def _needed(
    values: np.ndarray,
    resolution: float,
    tail: Tail,
    typical: np.ndarray,
    codes: np.ndarray,
    shared: np.ndarray,
    alpha: float,
) -> np.ndarray:
    """`against_draws` within one group; `codes` are the pools of its cells, `shared` the directions of each pool."""
    cells, draws = len(values), values.shape[1] - 1
    out = np.full(cells, np.nan)
    plain = extremes(values, resolution, tail, typical=typical)[:, 1:]
    others = np.full((len(shared), draws), -np.inf)
    np.maximum.at(others, codes, plain)
    runner_up, leader = _without_each(plain, codes)
    steps = int(round(1 / resolution))

    def passes(accuracy: np.ndarray) -> np.ndarray:
        trial = values.copy()
        trial[:, 0] = accuracy
        extreme = extremes(trial, resolution, tail, typical=typical)
        own = np.maximum(np.where(leader, runner_up[codes], others[codes]), extreme[:, 1:])
        reached = extreme[:, :1] - 1e-9
        with np.errstate(divide="ignore"):
            free = np.zeros(cells)
            for pool, row in enumerate(others):
                reaching = (row[None] >= reached).sum(1)
                free += np.where(codes == pool, 0.0, np.log(missed(reaching, shared[pool], draws)))
            free += np.log(missed(1 + (own >= reached).sum(1), shared[codes], draws))
        return -np.expm1(free) <= alpha + 1e-12

    sign = 1 if tail == "gain" else -1
    low, high = np.zeros(cells, int), np.full(cells, steps)  # steps from the far end of the tail
    possible = passes(np.full(cells, 1.0 if sign > 0 else 0.0))
    while (high - low > 0).any():
        middle = (low + high) // 2
        good = passes(middle * resolution if sign > 0 else 1 - middle * resolution)
        high, low = np.where(good, middle, high), np.where(good, low, np.minimum(middle + 1, high))
    out[possible] = (high * resolution if sign > 0 else 1 - high * resolution)[possible]
    return out


def _without_each(extreme: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second largest extreme per pool and draw, and (cell, draw) where a cell holds the largest one."""
    blocks = int(codes.max()) + 1
    second = np.full((blocks, extreme.shape[1]), -np.inf)
    leader = np.zeros(extreme.shape, bool)
    for block in range(blocks):
        rows = np.flatnonzero(codes == block)
        order = np.argsort(extreme[rows], axis=0)
        leader[rows[order[-1]], np.arange(extreme.shape[1])] = True
        if len(rows) > 1:
            second[block] = np.take_along_axis(extreme[rows], order[-2:-1], axis=0)[0]
    return second, leader


def detectable(
    values: np.ndarray,
    design: Design,
    groups: np.ndarray,
    *,
    strata: np.ndarray | None = None,
    blocks: np.ndarray | None = None,
    pools: np.ndarray | None = None,
    apart: bool = False,
) -> pd.DataFrame:
    """Smallest improvement and harm that each group of cells (each |c|) could have shown.

    Args:
        values: (cell, 1 + D) accuracies, column 0 the direction; D = 0 if no draws were run.
        design: prompts, clusters, baseline, alpha and number of tests.
        groups: (cell,) |c|.
        strata, blocks, pools: as in `calibration`.
        apart: the maximum is taken within each group (`groups` of `maximum_p`).

    Returns:
        One row per group and tail: group, tail ("gain", "harm"), cells, draws, least_p (m / (m + D) with m directions
        that share D draws, times the groups if apart), needed (draws with which it would be alpha), can_survive,
        baseline_clusters (NaN: impossible), baseline_points, draws_points, both_points (median
        over cells of the difference from the baseline that is needed; fractions, negative for harm; NaN where most
        cells cannot), both_least (easiest cell), passes (share of cells in which an edit that made every answer right,
        or wrong, would pass both).
    """
    values, groups = np.asarray(values, float), np.asarray(groups)
    draws = values.shape[1] - 1
    families = len(np.unique(groups)) if apart else 1
    records = []
    for tail in ("gain", "harm"):
        sign = 1.0 if tail == "gain" else -1.0
        clusters = against_baseline(design, tail)
        # One prompt per cluster is the least that flips a cluster.
        base = np.nan if clusters is None else sign * clusters / design.n
        need = np.full(len(values), np.nan)
        if draws >= 2:
            accuracy = against_draws(
                values, 1 / design.n, tail,
                strata=strata, blocks=blocks, pools=pools, groups=groups if apart else None, alpha=design.alpha,
            )  # fmt: skip
            need = accuracy - design.baseline
        both = sign * np.maximum(sign * need, sign * base)
        for group in np.unique(groups):
            here = groups == group
            chosen = here if apart else np.ones(len(values), bool)
            codes = [None if c is None else np.asarray(c)[chosen] for c in (blocks, pools)]
            shared = int(pool_codes(codes[0], codes[1], int(chosen.sum()))[2].max())
            needed = least_draws(design.alpha / families, shared=shared)
            records.append({
                "group": group, "tail": tail, "cells": int(here.sum()), "draws": draws,
                "least_p": families * shared / (shared + draws), "needed": needed,
                "can_survive": bool(draws >= needed and np.isfinite(both[here]).any()),
                "baseline_clusters": np.nan if clusters is None else float(clusters), "baseline_points": base,
                "draws_points": _median(need[here], sign), "both_points": _median(both[here], sign),
                "both_least": sign * np.nanmin(sign * both[here]) if np.isfinite(both[here]).any() else np.nan,
                "passes": float(np.isfinite(both[here]).mean()),
            })  # fmt: skip
    return pd.DataFrame(records)


def _median(points: np.ndarray, sign: float) -> float:
    """Median with "impossible" as the largest value; NaN if that is the median."""
    ordered = np.sort(np.where(np.isfinite(points), sign * points, np.inf))
    middle = ordered[(len(ordered) - 1) // 2]
    return float(sign * middle) if np.isfinite(middle) else float("nan")


def power_words(row: pd.Series | dict, alpha: float = 0.05) -> str:
    """One row of `detectable` as a sentence, |c| left to the caller."""
    name = "improvement" if row["tail"] == "gain" else "harm"
    if row["least_p"] > alpha + 1e-12:
        return (
            f"Nothing can survive: {row['draws']} draws allow no p below {min(1.0, row['least_p']):.2g}; "
            f"{row['needed']} are needed for {alpha:g}."
        )
    if np.isnan(row["baseline_points"]):
        return f"No {name} could be found: too few clusters have room for one at this baseline."
    if not row["can_survive"]:
        return f"No {name} could be found: not even every answer {'right' if name != 'harm' else 'wrong'} would pass."
    points = "more than the scale has" if np.isnan(row["both_points"]) else f"{100 * row['both_points']:+.1f} points"
    return (
        f"Smallest {name} that could be found: {points} in the median cell, {100 * row['both_least']:+.1f} in the "
        f"easiest ({100 * row['baseline_points']:+.1f} against the baseline alone); an edit that made every answer "
        f"{'right' if name != 'harm' else 'wrong'} would have passed in {100 * row['passes']:.0f} % of cells."
    ).replace("-", "−")
