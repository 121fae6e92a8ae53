"""Beyond random directions: every comparison with draws is calibrated on the draws themselves, never on a normal curve.

An edit is compared with D random ones of the same norm on the same prompts. Accuracies of draws are strongly skewed to
the left (most do nothing, few do much), so a t-test of the direction against their mean and spread calls far too many
cells harms. What holds without any assumption about that shape: if the direction is one more random direction, it is
as likely as any draw to be the most extreme of the 1 + D. All p-values here are such randomisation p-values.

Arrays. `values` is (cell, 1 + D): column 0 is the direction, column j the accuracy of draw j, all on the same prompts
(so the comparison is paired). `blocks` is (cell,): cells of one block were edited with the same draws and change
places with them together (in a sweep: pair x sign of c, since one random vector serves all latents and |c| of a pair,
and A-B with -c is another vector than with +c); draws of different blocks must be independent. A *family* j of draws
is draw j playing the direction in every block.

    rank_p        one cell: (1 + draws at least as extreme) / (1 + D). Ties count against the direction.
    extremes      distance from the others in units of their spread, symmetric in direction and draws: a cell's own
                  spread without the value in question, moderated by that of its stratum (latent and |c|).
    maximum_p     all cells at once. For a threshold t, block b is exceeded by a random member with probability
                  p_b = share of its 1 + D members whose largest extreme reaches t; p = 1 - prod(1 - p_b). This is the
                  exact randomisation p of the maximum over cells, over all (1 + D) ** blocks ways to let a member of
                  each block play the direction; cells that are more extreme than the one in question are left out of
                  the maximum (step-down). With one block it is (1 + #families as extreme) / (1 + D). It is never
                  below 1 / (1 + D): with fewer than 19 draws nothing can pass 5 %.
    last_places   aggregate: how many cells rank last (first) among their draws, against the same number for random
                  members; the exact null distribution is a convolution over blocks.
    distinct_edits  cells whose flipped prompts overlap more than those of unrelated random edits are one effect.
    gains_and_losses  against the baseline: separate Benjamini-Hochberg families for gains and for losses.

In a sweep +c and -c of a pair meet the same draws. For the maximum, pair x sign is the block. For the aggregate, whose
spread grows if +c and -c go together, the pair is the block: this takes them to be as alike as can be (conservative).

Tails are one-sided and each has level alpha: "is anything harmed beyond chance" and "is anything improved" are two
questions. Limits: directions of different pairs share latents and are not independent of each other, which the draws
are; the maximum is little affected (its p is within rounding of the union bound, which needs no independence), the
p of the aggregate is; `Aggregate.families` shows whole families beside it.

Sources: Westfall and Young 1993 (maximum statistic); Phipson and Smyth 2010 (1 + in permutation p); Smyth 2004
(moderated spread); Benjamini and Hochberg 1995. Knows nothing about sweeps, files or models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from experiments.statistics.paired import benjamini_hochberg, sign_flip_p

__all__ = [
    "Aggregate", "DistinctEdits", "GainsAndLosses", "MaximumTest", "Tail", "block_maxima", "distinct_edits", "extremes",
    "gains_and_losses", "last_places", "least_draws", "maximum_p", "members", "null_counts", "overlap", "paired_excess",
    "rank_p", "typical_variance",
]  # fmt: skip

Tail = Literal["harm", "gain"]
PRIOR_DF = 4.0
"""Degrees of freedom that the spread of the stratum counts for beside a cell's own draws."""
_TIE = 1e-9


def members(direction: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Accuracy of the direction and of its draws on the same prompts.

    Args:
        direction: (cell, prompt) bool or 0/1.
        draws: (cell, draw, prompt).

    Returns:
        (cell, 1 + draw) float64, fractions; column 0 is the direction.
    """
    direction, draws = np.asarray(direction), np.asarray(draws)
    if direction.ndim != 2 or draws.ndim != 3 or (len(draws), draws.shape[2]) != direction.shape:
        raise ValueError(f"direction must be (cell, prompt) and draws (cell, draw, prompt), got {direction.shape}, "
                         f"{draws.shape}")  # fmt: skip
    own = direction.mean(1, dtype=float)
    return np.concatenate([own[:, None], draws.mean(2, dtype=float)], axis=1)


def paired_excess(direction: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(cell, prompt) answer of the direction minus the mean answer of its draws to the same prompt, -1..1.

    For a clustered interval of "how much better than a random direction", and to see at which prompts.
    """
    return np.asarray(direction, float) - np.asarray(draws).mean(1, dtype=float)


def _oriented(values: np.ndarray, tail: Tail) -> np.ndarray:
    """Values turned so that more is more extreme."""
    if tail not in ("harm", "gain"):
        raise ValueError(f"tail must be harm or gain, got {tail!r}")
    values = np.asarray(values, float)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"values must be (cell, 1 + draws) with at least one draw, got {values.shape}")
    return -values if tail == "harm" else values


def _block_codes(blocks: np.ndarray | None, cells: int) -> np.ndarray:
    if blocks is None:
        return np.zeros(cells, int)
    if len(blocks) != cells:
        raise ValueError(f"blocks must have one entry per cell ({cells}), got {len(blocks)}")
    return np.unique(np.asarray(blocks), return_inverse=True)[1]


def rank_p(values: np.ndarray, tail: Tail) -> np.ndarray:
    """One-sided randomisation p of the direction in each cell, not corrected.

    Args:
        values: (cell, 1 + D), column 0 the direction.
        tail: "harm": low values are extreme; "gain": high ones.

    Returns:
        (cell,) multiples of 1 / (1 + D), from 1 / (1 + D) to 1. Ties count against the direction, so the level holds
        with any number of ties, and a cell in which nothing changed has p = 1.
    """
    turned = _oriented(values, tail)
    return (turned >= turned[:, :1] - _TIE).mean(1)


def typical_variance(values: np.ndarray, strata: np.ndarray | None = None) -> np.ndarray:
    """(cell,) mean over the cells of a stratum of the variance of their 1 + D members."""
    groups = _block_codes(strata, len(values))
    return (np.bincount(groups, np.asarray(values, float).var(1, ddof=1)) / np.bincount(groups))[groups]


def extremes(
    values: np.ndarray,
    resolution: np.ndarray | float,
    tail: Tail,
    strata: np.ndarray | None = None,
    *,
    typical: np.ndarray | None = None,
    prior_df: float = PRIOR_DF,
) -> np.ndarray:
    """How far each member lies from the other D members of its cell, in units of their spread.

    t_i = (y_i - mean of the others) / (s_i sqrt(1 + 1 / D)), turned so that more is more extreme. s_i^2 is the variance
    of the others, moderated: (d0 s0^2 + (D - 1) s_own^2) / (d0 + D - 1) with s0^2 the mean variance of the stratum;
    s_i is at least half a prompt. Direction and draws are treated alike, so exchangeable members give exchangeable t.

    Args:
        values: (cell, 1 + D) with D >= 2.
        resolution: 1 / prompts, per cell or one number.
        tail: as in `rank_p`.
        strata: (cell,) cells with like spread (latent and |c|); None: all cells.
        typical: (cell,) s0^2 if it is known already; None: `typical_variance` of these values.
        prior_df: d0.

    Returns:
        (cell, 1 + D).
    """
    turned = _oriented(values, tail)
    draws = turned.shape[1] - 1
    if draws < 2:
        raise ValueError(f"a spread needs at least 2 draws, got {draws}")
    if typical is None:
        typical = typical_variance(turned, strata)
    away = turned - turned.mean(1, keepdims=True)
    # Sum of squares of the others around their own mean.
    own = np.maximum((away**2).sum(1, keepdims=True) - away**2 * (draws + 1) / draws, 0.0)
    variance = (prior_df * typical[:, None] + own) / (prior_df + draws - 1)
    floor = (0.5 * np.broadcast_to(np.asarray(resolution, float), (len(turned),))) ** 2
    variance = np.maximum(variance, floor[:, None])
    distance = away * (draws + 1) / draws  # y_i minus the mean of the others
    return distance / np.sqrt(variance * (1 + 1 / draws))


def block_maxima(extreme: np.ndarray, blocks: np.ndarray | None = None) -> np.ndarray:
    """(block, 1 + D) largest extreme over the cells of a block, for the direction (column 0) and each draw."""
    codes = _block_codes(blocks, len(extreme))
    out = np.full((int(codes.max(initial=0)) + 1, extreme.shape[1]), -np.inf)
    for block in range(len(out)):
        out[block] = extreme[codes == block].max(0, initial=-np.inf)
    return out


def _p_of(threshold: float, maxima: np.ndarray) -> float:
    """Probability that a random member of each block reaches the threshold in any block."""
    return _exactly(1 - np.prod(1 - (maxima >= threshold - _TIE).mean(1)))


def _exactly(p: float) -> float:
    """Without the last digits: 1 - 19 / 20 must not exceed 0.05."""
    return round(float(p), 12)


def _step_down(extreme: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Corrected p of column 0 in each cell: the maximum is over the cells that are no more extreme than it."""
    maxima = np.full((int(codes.max(initial=0)) + 1, extreme.shape[1]), -np.inf)
    order = np.argsort(extreme[:, 0], kind="stable")
    p = np.empty(len(extreme))
    for cell in order:
        np.maximum(maxima[codes[cell]], extreme[cell], out=maxima[codes[cell]])
        p[cell] = _p_of(extreme[cell, 0], maxima)
    p[order] = np.maximum.accumulate(p[order][::-1])[::-1]  # a less extreme cell never has a smaller p
    return p


@dataclass(frozen=True)
class MaximumTest:
    """Family-wise comparison of every cell with the draws.

    Attributes:
        p: (cell,) corrected over all cells, one-sided.
        threshold: (cell,) smallest extreme that has p <= alpha in the first step, reached by one cell; inf if nothing
            can.
        least_p: the smallest p that this number of draws allows, 1 / (1 + D) (times the number of groups).
        draws: D.
    """

    p: np.ndarray
    threshold: np.ndarray
    least_p: float
    draws: int

    @property
    def can_survive(self) -> bool:
        """False: too few draws, no cell could pass whatever its accuracy."""
        return bool(np.isfinite(self.threshold).any())


def maximum_p(
    extreme: np.ndarray,
    blocks: np.ndarray | None = None,
    alpha: float = 0.05,
    *,
    groups: np.ndarray | None = None,
    quick: bool = False,
) -> MaximumTest:
    """Corrected p of every cell by the maximum over the family of cells (step-down), calibrated on the members.

    Args:
        extreme: (cell, 1 + D) from `extremes`.
        blocks: (cell,) see the top of the module; None: one block (whole families of draws).
        alpha: level behind `threshold`.
        groups: (cell,) parts of the family, such as |c|: the maximum is taken within each, and p multiplied by their
            number (Bonferroni). Better where tails differ between groups, but needs as many times more draws.
        quick: where no cell of a group passes alpha, give all of them the p of the most extreme one (for counting).
    """
    parts = _block_codes(groups, len(extreme))
    codes = _block_codes(blocks, len(extreme))
    number, size = int(parts.max(initial=0)) + 1, extreme.shape[1]
    p, threshold = np.ones(len(extreme)), np.full(len(extreme), np.inf)
    for part in range(number):
        rows = np.flatnonzero(parts == part)
        maxima = block_maxima(extreme[rows], codes[rows])
        if number / size <= alpha + 1e-12:
            threshold[rows] = _threshold(maxima, alpha / number)
        first = _p_of(extreme[rows, 0].max(initial=-np.inf), maxima)
        # Nothing passes if the most extreme cell does not: the p of the others can then be left at its lower bound.
        skip = quick and first * number > alpha
        found = np.full(len(rows), first) if skip else _step_down(extreme[rows], codes[rows])
        p[rows] = np.minimum(1.0, number * found)
    return MaximumTest(p, threshold, number / size, size - 1)


def _threshold(maxima: np.ndarray, alpha: float) -> float:
    """Smallest extreme with p <= alpha, when one cell reaches it; p falls only where a draw's maximum is passed."""
    others = np.sort(maxima[:, 1:].ravel())
    low, high = -1, len(others) - 1  # just above the last one no draw counts, so p is least
    while high - low > 1:
        middle = (low + high) // 2
        if _own_p(others[middle] + 2 * _TIE, maxima) <= alpha + 1e-12:
            high = middle
        else:
            low = middle
    return float(others[high] + 2 * _TIE)


def _own_p(threshold: float, maxima: np.ndarray) -> float:
    """p of a direction that reaches the threshold in one block (the largest over which block) and in no other."""
    share = ((maxima[:, 1:] >= threshold - _TIE).sum(1)) / maxima.shape[1]
    none = np.prod(1 - share)
    with_own = none / (1 - share) * (1 - share - 1 / maxima.shape[1])
    return _exactly(1 - with_own.min())


def null_counts(
    values: np.ndarray, rule: Callable[[np.ndarray, np.ndarray], int], blocks: np.ndarray | None = None
) -> np.ndarray:
    """What a rule finds where there is nothing: each family of draws plays the direction, the others are its controls.

    Args:
        values: (cell, 1 + D); the direction (column 0) is left out altogether.
        rule: from values (cell, D), column 0 the draw that plays, and its (cell,) column number, to a count of "harms".
        blocks: (cell,) codes; block b plays draw (j + b) mod D in family j, so that blocks with the same draws (+c and
            -c of one pair) do not play the same vector. None: draw j everywhere.

    Returns:
        (D,) counts, one per family.
    """
    draws = values.shape[1] - 1
    shift = _block_codes(blocks, len(values))
    counts = np.empty(draws, int)
    for family in range(draws):
        playing = 1 + (family + shift) % draws
        order = (np.arange(draws)[None] + playing[:, None] - 1) % draws + 1
        counts[family] = rule(np.take_along_axis(values, order, axis=1), playing)
    return counts


@dataclass(frozen=True)
class Aggregate:
    """How many cells rank last (or first) among their draws, taken together.

    Attributes:
        observed: cells in which the direction does.
        expected: mean of the null distribution.
        families: (D,) the same number for each whole family of draws.
        p: exact, over independent blocks: share of random members with at least as many.
        p_families: (1 + families with at least as many) / (1 + D); needs no independence, never below 1 / (1 + D).
    """

    observed: int
    expected: float
    families: np.ndarray
    p: float
    p_families: float


def last_places(values: np.ndarray, tail: Tail, blocks: np.ndarray | None = None) -> Aggregate:
    """Aggregate evidence: the number of cells in which the direction is the most extreme member.

    A member is last if no other is more extreme and at most one ties with it (middle rank at least D + 1/2).

    Args:
        values: (cell, 1 + D).
        tail: "harm": last is worst; "gain": last is best.
        blocks: (cell,) see the top of the module.
    """
    turned = _oriented(values, tail)
    top = turned >= turned.max(1, keepdims=True) - _TIE
    last = top & (top.sum(1, keepdims=True) <= 2)
    codes = _block_codes(blocks, len(turned))
    per_block = np.zeros((int(codes.max(initial=0)) + 1, turned.shape[1]), int)
    np.add.at(per_block, codes, last)
    masses = np.ones(1)
    for row in per_block:
        masses = np.convolve(masses, np.bincount(row) / turned.shape[1])
    observed = int(per_block[:, 0].sum())
    draws = turned.shape[1] - 1
    shifted = 1 + (np.arange(draws)[None] + np.arange(len(per_block))[:, None]) % draws
    families = np.take_along_axis(per_block, shifted, axis=1).sum(0)
    p = float(min(1.0, masses[observed:].sum()))
    return Aggregate(
        observed, float(masses @ np.arange(len(masses))), families, p,
        float((1 + (families >= observed).sum()) / (1 + draws)),
    )  # fmt: skip


def least_draws(alpha: float, tests: int = 1, at_least: int = 1) -> int:
    """Draws that are needed before anything can survive.

    Args:
        alpha: level, one-sided.
        tests: 1 for the maximum rule; the number of cells for single ranks under Bonferroni or Benjamini-Hochberg.
        at_least: cells that must reach the smallest p together (Benjamini-Hochberg: k of them need k times less).

    Returns:
        the smallest D with 1 / (1 + D) <= alpha * at_least / tests.
    """
    if not 0 < alpha < 1 or tests < 1 or not 1 <= at_least <= tests:
        raise ValueError(f"alpha in 0..1 and 1 <= at_least <= tests are needed, got {alpha}, {at_least} and {tests}")
    return int(np.ceil(tests / (alpha * at_least) - 1e-9)) - 1


# --- Effects, not cells -----------------------------------------------------------------------------------------------


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


# --- Against the baseline: gains and losses apart ---------------------------------------------------------------------


@dataclass(frozen=True)
class GainsAndLosses:
    """One-sided exact sign-flip p and Benjamini-Hochberg q against the baseline, each tail in a family of its own."""

    gain_p: np.ndarray
    gain_q: np.ndarray
    loss_p: np.ndarray
    loss_q: np.ndarray


def gains_and_losses(sums: np.ndarray) -> GainsAndLosses:
    """Two families of tests, so that many losses do not loosen the threshold for gains.

    Args:
        sums: (cell, cluster) integer sums of (edited - unsteered) correctness over the clusters' prompts.

    Returns:
        (cell,) each. One-sided p: probability of a total at least as far out on that side when whole clusters flip
        sign (half of the two-sided p); 1 for a cell whose total is 0 or on the other side, which is conservative.
    """
    sums = np.asarray(sums)
    two_sided = sign_flip_p(sums)
    total = sums.sum(1)
    gain, loss = (np.where(side * total > 0, two_sided / 2, 1.0) for side in (1, -1))
    return GainsAndLosses(gain, benjamini_hochberg(gain), loss, benjamini_hochberg(loss))
