"""Beyond random directions: every comparison with draws is calibrated on the draws themselves, never on a normal curve.

An edit is compared with D random ones of the same norm on the same prompts. Accuracies of draws are strongly skewed to
the left (most do nothing, few do much), so a t-test of the direction against their mean and spread calls far too many
cells harms. What holds without any assumption about that shape: if the direction is one more random direction, it is
as likely as any draw to be the most extreme of the 1 + D. All p-values here are such randomisation p-values.

Arrays. `values` is (cell, 1 + D): column 0 is the direction, column j the accuracy of draw j, all on the same prompts
(so the comparison is paired). `blocks` is (cell,): cells of one block belong to one direction (in a sweep: pair x sign
of c, since A-B with -c is another vector than with +c). `pools` is (cell,): blocks of one pool are compared with the
same D draws, column by column (in a sweep: the pair, whose +c and -c share its draws; or all pairs, if the draws are
pooled); None: every block has draws of its own. Draws of different pools must be independent. A *family* j of draws is
draw j playing the direction.

    rank_p        one cell: (1 + draws at least as extreme) / (1 + D). Ties count against the direction.
    extremes      distance from the others in units of their spread, symmetric in direction and draws: a cell's own
                  spread without the value in question, moderated by that of its stratum (latent and |c|).
    maximum_p     all cells at once. A pool has m directions (blocks) and D draws; if the directions are m more draws,
                  any m of the m + D members could be they. For a threshold t that r of the members reach in any of
                  their cells, none of m random members does with probability C(m + D - r, m) / C(m + D, m); p is 1
                  minus the product of these over pools. This is the exact randomisation p of the maximum over cells;
                  cells that are more extreme than the one in question are left out of the maximum (step-down). With
                  one direction per pool, r / (1 + D) per pool. It is never below m / (m + D): 19 draws of one's own
                  are needed to pass 5 %, 38 where two directions share them, 570 where thirty do.
    last_places   aggregate: how many cells rank last (first) among their draws, against the same number for random
                  members; the exact null distribution is a convolution over blocks (here: pools).
    gains_and_losses  against the baseline: separate Benjamini-Hochberg families for gains and for losses.

In a sweep +c and -c of a pair meet the same draws. Taken for blocks with draws of their own, they would break the
level (9 % instead of 5 % with 20 draws). For the aggregate, whose spread grows if +c and -c go together, the pool is
the block: this takes them to be as alike as can be (conservative).

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

from experiments.statistics.paired import benjamini_hochberg, sign_flip_p

__all__ = [
    "Aggregate", "GainsAndLosses", "MaximumTest", "Tail", "extremes", "gains_and_losses", "last_places", "least_draws",
    "maximum_p", "members", "missed", "null_counts", "paired_excess", "pool_codes", "rank_p", "typical_variance",
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


def pool_codes(
    blocks: np.ndarray | None, pools: np.ndarray | None, cells: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool of each cell, place of its block within the pool, and the number of blocks of each pool.

    Returns:
        pool (cell,), place (cell,) 0.., shared (pool,).

    Raises:
        ValueError: a block that lies in two pools.
    """
    block = _block_codes(blocks, cells)
    pool = block if pools is None else _block_codes(pools, cells)
    pairs = np.unique(np.stack([pool, block]), axis=1)
    if len(np.unique(pairs[1])) != pairs.shape[1]:
        raise ValueError("every block must lie in one pool")
    shared = np.bincount(pairs[0], minlength=1)
    starts = np.cumsum(shared) - shared
    place = np.empty(pairs.shape[1], int)
    place[pairs[1]] = np.arange(pairs.shape[1]) - starts[pairs[0]]
    return pool, place[block], shared


def missed(reaching: np.ndarray, shared: np.ndarray | int, draws: int) -> np.ndarray:
    """Probability that none of `shared` members, chosen among shared + draws, is one of those that reach a threshold.

    C(shared + draws - reaching, shared) / C(shared + draws, shared), for many pools at once.
    """
    reaching, shared = np.broadcast_arrays(np.asarray(reaching, float), np.asarray(shared))
    size, out = shared + draws, np.ones(reaching.shape)
    for i in range(int(shared.max(initial=0))):
        out *= np.where(i < shared, np.maximum(size - reaching - i, 0.0) / (size - i), 1.0)
    return out


class _Pools:
    """The largest extreme of every member of every pool, over the cells that were put in so far."""

    def __init__(self, pool: np.ndarray, place: np.ndarray, shared: np.ndarray, draws: int) -> None:
        self.pool, self.place, self.shared, self.draws = pool, place, shared, draws
        self.own = np.full((len(shared), int(shared.max(initial=1))), -np.inf)
        self.others = np.full((len(shared), draws), -np.inf)

    def empty(self) -> _Pools:
        """The same pools without any cell."""
        return _Pools(self.pool, self.place, self.shared, self.draws)

    def add(self, cell: int, extreme: np.ndarray) -> None:
        """Put in a cell with its (1 + D,) extremes."""
        pool, place = self.pool[cell], self.place[cell]
        self.own[pool, place] = max(self.own[pool, place], extreme[0])
        np.maximum(self.others[pool], extreme[1:], out=self.others[pool])

    def p(self, threshold: float) -> float:
        """Probability that random members in the directions' places reach the threshold anywhere."""
        least = threshold - _TIE
        reaching = (self.own >= least).sum(1) + (self.others >= least).sum(1)
        return _exactly(1 - np.prod(missed(reaching, self.shared, self.draws)))

    def alone(self, threshold: float) -> float:
        """p of a direction that reaches the threshold while no other one does (the largest over which pool)."""
        reaching = (self.others >= threshold - _TIE).sum(1)
        none, one = (missed(reaching + more, self.shared, self.draws) for more in (0, 1))
        return _exactly(1 - np.where(np.eye(len(none), dtype=bool), one, none).prod(1).min())

    def threshold(self, alpha: float) -> float:
        """Smallest extreme with p <= alpha, when one direction reaches it; p falls only where a draw is passed."""
        values = np.sort(self.others.ravel())
        low, high = -1, len(values) - 1  # just above the last one no draw counts, so p is least
        while high - low > 1:
            middle = (low + high) // 2
            if self.alone(values[middle] + 2 * _TIE) <= alpha + 1e-12:
                high = middle
            else:
                low = middle
        return float(values[high] + 2 * _TIE)


def _exactly(p: float) -> float:
    """Without the last digits: 1 - 19 / 20 must not exceed 0.05."""
    return round(float(p), 12)


def _step_down(extreme: np.ndarray, pools: _Pools) -> np.ndarray:
    """Corrected p of column 0 in each cell: the maximum is over the cells that are no more extreme than it."""
    order = np.argsort(extreme[:, 0], kind="stable")
    p = np.empty(len(extreme))
    for cell in order:
        pools.add(cell, extreme[cell])
        p[cell] = pools.p(extreme[cell, 0])
    p[order] = np.maximum.accumulate(p[order][::-1])[::-1]  # a less extreme cell never has a smaller p
    return p


@dataclass(frozen=True)
class MaximumTest:
    """Family-wise comparison of every cell with the draws.

    Attributes:
        p: (cell,) corrected over all cells, one-sided.
        threshold: (cell,) smallest extreme that has p <= alpha in the first step, reached by one cell; inf if nothing
            can.
        least_p: the smallest p that this number of draws allows, m / (m + D) with m directions that share D draws
            (times the number of groups).
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
    pools: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    quick: bool = False,
) -> MaximumTest:
    """Corrected p of every cell by the maximum over the family of cells (step-down), calibrated on the members.

    Args:
        extreme: (cell, 1 + D) from `extremes`.
        blocks, pools: (cell,) see the top of the module; None: one block (whole families of draws), and draws of its
            own for every block.
        alpha: level behind `threshold`.
        groups: (cell,) parts of the family, such as |c|: the maximum is taken within each, and p multiplied by their
            number (Bonferroni). Better where tails differ between groups, but needs as many times more draws.
        quick: where no cell of a group passes alpha, give all of them the p of the most extreme one (for counting).
    """
    parts, cells = _block_codes(groups, len(extreme)), np.arange(len(extreme))
    blocks = np.zeros(len(cells), int) if blocks is None else np.asarray(blocks)
    number, draws = int(parts.max(initial=0)) + 1, extreme.shape[1] - 1
    p, threshold, least = np.ones(len(cells)), np.full(len(cells), np.inf), []
    for rows in (cells[parts == part] for part in range(number)):
        codes = pool_codes(blocks[rows], None if pools is None else np.asarray(pools)[rows], len(rows))
        whole = _Pools(*codes, draws)
        for row, values in enumerate(extreme[rows]):
            whole.add(row, values)
        least.append(number * float((whole.shared / (whole.shared + draws)).max(initial=0.0)))
        if least[-1] <= alpha + 1e-12:
            threshold[rows] = whole.threshold(alpha / number)
        first = whole.p(extreme[rows, 0].max(initial=-np.inf))
        # Nothing passes if the most extreme cell does not: the p of the others can then be left at its lower bound.
        skip = quick and first * number > alpha
        found = np.full(len(rows), first) if skip else _step_down(extreme[rows], whole.empty())
        p[rows] = np.minimum(1.0, number * found)
    return MaximumTest(p, threshold, max(least), draws)


def null_counts(
    values: np.ndarray,
    rule: Callable[[np.ndarray, np.ndarray], int],
    blocks: np.ndarray | None = None,
    pools: np.ndarray | None = None,
) -> np.ndarray:
    """What a rule finds where there is nothing: draws play the directions, those that are left over are their controls.

    Args:
        values: (cell, 1 + D); the direction (column 0) is left out altogether.
        rule: from values (cell, 1 + D - m), column 0 the draw that plays, and its (cell,) column number, to a count of
            "harms". m is the largest number of blocks that share draws (1 without pools).
        blocks, pools: (cell,) codes; in family j the first block of pool k plays draw (j + k) mod D, its next block the
            draw after that, so that blocks with the same draws do not play the same vector. None: draw j everywhere.

    Returns:
        (D,) counts, one per family.

    Raises:
        ValueError: no draw is left over as a control.
    """
    draws = values.shape[1] - 1
    pool, place, shared = pool_codes(blocks, pools, len(values))
    most = int(shared.max(initial=1))
    if draws <= most:
        raise ValueError(f"{most} of {draws} draws would play: none is left over to compare them with")
    counts = np.empty(draws, int)
    for family in range(draws):
        first = family + pool  # the draws first .. first + most - 1 play in the pool
        playing = 1 + (first + place) % draws
        left = 1 + (first[:, None] + most + np.arange(draws - most)[None]) % draws
        order = np.concatenate([playing[:, None], left], axis=1)
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


def least_draws(alpha: float, tests: int = 1, at_least: int = 1, shared: int = 1) -> int:
    """Draws that are needed before anything can survive.

    Args:
        alpha: level, one-sided.
        tests: 1 for the maximum rule (times its groups); the number of cells for single ranks under Bonferroni or
            Benjamini-Hochberg.
        at_least: cells that must reach the smallest p together (Benjamini-Hochberg: k of them need k times less).
        shared: directions that share the draws.

    Returns:
        the smallest D with shared / (shared + D) <= alpha * at_least / tests.
    """
    if not 0 < alpha < 1 or tests < 1 or not 1 <= at_least <= tests or shared < 1:
        raise ValueError(f"alpha in 0..1, 1 <= at_least <= tests and shared >= 1 are needed, got {alpha}, {at_least}, "
                         f"{tests} and {shared}")  # fmt: skip
    return int(np.ceil(shared * (tests / (alpha * at_least) - 1) - 1e-9))


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
