"""One condition against the population that its random draws come from: a difference of means, and a rank.

A direction is compared with D random ones on the same prompts. Its advantage over them is the mean over prompts of
(value − mean of the draws). Both prompts and draws are samples, so the interval resamples both: whole clusters, and,
independently of them, draws (a little wider than needed where the two do not interact). The rank says where it stands
among the draws: as one more random direction it would be first of all with probability 1 / (1 + D).

A direction is *beyond* random ones if the interval lies above the smallest size that matters and the rank p is at most
alpha; it is *not beyond* them if the interval lies below that size. Arrays in, records out.

Sources: Owen 2007, The pigeonhole bootstrap; Phipson and Smyth 2010 (1 + in randomisation p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums, expanded_percentile
from experiments.statistics.equivalence import Judgement
from experiments.statistics.exact import never_zero_width

__all__ = ["Beyond", "beyond_draws", "fewest_draws", "judge_beyond"]

_TIE = 1e-9


@dataclass(frozen=True)
class Beyond:
    """A condition beside its draws.

    Attributes:
        estimate, lower, upper: mean over prompts of value − mean of the draws, with its interval.
        p: (1 + draws at least as large) / (1 + draws), one-sided; ties count against the condition.
        draws, n, n_clusters: behind it.
    """

    estimate: float
    lower: float
    upper: float
    p: float
    draws: int
    n: int
    n_clusters: int


def fewest_draws(alpha: float = 0.05) -> int:
    """Draws without which no condition can have a rank p of alpha."""
    return int(np.ceil(1 / alpha - 1 - 1e-9))


def beyond_draws(
    own: np.ndarray, draws: np.ndarray, clusters: Sequence[Any] | np.ndarray, settings: Settings | None = None,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Beyond:  # fmt: skip
    """How far a condition lies above its draws.

    Args:
        own: (prompt,) values.
        draws: (prompt, draw) values of the draws on the same prompts.
        clusters: (prompt,) cluster of each.
        settings: resamples, level, seed.
        bounds: lowest and highest difference that there can be.

    Raises:
        ValueError: no draw, or shapes that do not fit.
    """
    settings = settings or Settings()
    own, draws = np.asarray(own, float), np.asarray(draws, float)
    if draws.ndim != 2 or not draws.shape[1] or len(own) != len(draws) or len(own) != len(clusters) or not len(own):
        raise ValueError(f"one value and one or more draws per prompt are needed, got {own.shape} and {draws.shape}")
    codes, names = cluster_codes(clusters)
    sums, counts = cluster_sums(np.column_stack([own, draws]), codes, len(names))  # (1 + draw, cluster)
    number = draws.shape[1]
    weights = settings.weights(len(names))
    rng = np.random.default_rng([settings.seed, number])
    chosen = rng.multinomial(number, np.full(number, 1 / number), size=settings.resamples) / number
    total = weights @ sums.T  # (resample, 1 + draw)
    sizes = weights @ counts[0]
    resampled = (total[:, 0] - (total[:, 1:] * chosen).sum(1)) / sizes
    difference = (sums[0] - sums[1:].mean(0))[None]
    lower, upper = expanded_percentile(resampled[:, None], len(names), settings.level, bounds)
    if np.ptp(resampled) < 1e-12 or len(names) < 2:
        lower, upper, _ = never_zero_width(
            lower, upper, difference, counts[:1], level=settings.level, bounds=bounds
        )  # fmt: skip
    means = sums.sum(1) / counts.sum(1)
    p = (1 + int((means[1:] >= means[0] - _TIE).sum())) / (1 + number)
    estimate = float(means[0] - means[1:].mean())
    return Beyond(estimate, float(lower[0]), float(upper[0]), p, number, len(own), len(names))


def judge_beyond(found: Beyond, size: float, alpha: float = 0.05) -> Judgement:
    """The verdict on "it is above random draws by more than a size".

    Returns:
        held: the interval lies above the size and the rank p is at most alpha; not held: it lies below the size; not
        testable: too few draws for any such p; undecided otherwise.
    """
    reach = f"{found.estimate:.3f} [{found.lower:.3f}, {found.upper:.3f}], rank p = {found.p:.3f}"
    if found.draws < fewest_draws(alpha):
        reason = f"{found.draws} draws allow no p below {1 / (1 + found.draws):.2g}: {fewest_draws(alpha)} are needed"
        return Judgement("not testable", reason, found.lower, found.upper, size)
    if found.upper < size:
        return Judgement("not held", f"{reach}: wholly below {size}", found.lower, found.upper, size)
    if found.lower > size and found.p <= alpha + 1e-12:
        return Judgement("held", f"{reach}: wholly above {size} and first of the draws", found.lower, found.upper, size)
    return Judgement("undecided", f"{reach}: neither", found.lower, found.upper, size)
