"""What a run cannot see: floors and ceilings of a baseline, ties, and levels at the end of their scale.

At a baseline of 100 % no edit can be an improvement, at 0 % none can be a harm, and where no answer parses neither can
be told from the other. Such things are said before any number, by one rule for every study. Ties have no best.

Arrays in, records out. Knows nothing about models or studies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Mark", "Visibility", "best_places", "mark_of", "visibility"]

Mark = Literal["", "ceiling", "floor", "unparsed", "constant"]


@dataclass(frozen=True)
class Visibility:
    """Which direction a comparison with this baseline can see.

    Attributes:
        mark: "ceiling" (all right), "floor" (all wrong), "unparsed" (all wrong and not one answer has a number), "".
        baseline: accuracy, a fraction.
        n, n_clusters: prompts and clusters.
        gain_clusters, harm_clusters: clusters in which a gain (a loss) is possible at all.
        gain, harm: whether it could be told from chance: an edit that changes all of those clusters one way has a
            one-sided exact sign p of 0.5 ** clusters, which must be at most alpha / tests.
        words: one sentence for the top of a summary; empty if both can be seen.
    """

    mark: Mark
    baseline: float
    n: int
    n_clusters: int
    gain_clusters: int
    harm_clusters: int
    gain: bool
    harm: bool
    words: str


def visibility(
    correct: np.ndarray, clusters: np.ndarray, parsed: np.ndarray | None = None, *, alpha: float = 0.05, tests: int = 1
) -> Visibility:
    """Floors and ceilings of a baseline.

    Args:
        correct: (prompt,) bool or 0/1, the unsteered answers.
        clusters: (prompt,) name or number of each prompt's cluster.
        parsed: (prompt,) bool, whether the answer has a number; None: not known.
        alpha, tests: level, and how many comparisons are corrected for (1: none).

    Raises:
        ValueError: no prompts, or lengths that differ.
    """
    right = np.asarray(correct).astype(bool)
    codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if right.ndim != 1 or not len(right) or len(codes) != len(right):
        raise ValueError(f"correct and clusters must have one length >= 1, got {right.shape} and {codes.shape}")
    n_clusters = int(codes.max()) + 1
    gain_clusters, harm_clusters = len(np.unique(codes[~right])), len(np.unique(codes[right]))
    gain, harm = (0.5**number <= alpha / tests for number in (gain_clusters, harm_clusters))
    silent = parsed is not None and not np.asarray(parsed).any()
    mark: Mark = "ceiling" if right.all() else "unparsed" if silent else "floor" if not right.any() else ""
    words = {
        "ceiling": "The unsteered run answers every prompt right: an improvement cannot be seen here.",
        "floor": "The unsteered run answers every prompt wrong: a harm cannot be seen here.",
        "unparsed": "No unsteered answer has a number: a harm cannot be seen here, and a gain may be one of form only.",
        "constant": "",
        "": _scarce(gain, harm, gain_clusters, harm_clusters, tests),
    }[mark]
    return Visibility(
        mark, float(right.mean()), len(right), n_clusters, gain_clusters, harm_clusters, gain, harm, words
    )


def _scarce(gain: bool, harm: bool, gain_clusters: int, harm_clusters: int, tests: int) -> str:
    after = f" after correction for {tests} comparisons" if tests > 1 else ""
    lines = []
    sides = ((gain, gain_clusters, "improvement", "wrong"), (harm, harm_clusters, "harm", "right"))
    for seen, number, word, state in sides:
        if not seen:
            holds, them = ("cluster holds", "it") if number == 1 else ("clusters hold", "all of them")
            lines.append(
                f"Only {number} {holds} an answer that is {state} before the edit: not even an edit that turned "
                f"{them} could be told from chance{after}; no {word} can be found here."
            )
    return " ".join(lines)


def mark_of(levels: np.ndarray, bounds: tuple[float, float] | None, smallest: float) -> Mark:
    """Whether levels lie so near one end of their scale that a difference of `smallest` has no room.

    Args:
        levels: (place,) means, such as one per latent.
        bounds: lowest and highest value of the measure (either may be infinite); None: no bounds.
        smallest: smallest difference that matters, in the unit of the levels, above 0.

    Returns:
        "floor": every level is less than `smallest` above the lowest value; "ceiling" likewise; "constant": all levels
        are equal (and neither applies); "" otherwise.

    Raises:
        ValueError: no levels, or a `smallest` that is not above 0.
    """
    values = np.asarray(levels, float)
    if not values.size or not smallest > 0:
        raise ValueError(f"mark_of needs levels and a smallest size above 0, got {values.size} levels and {smallest}")
    if bounds is not None and values.max() - bounds[0] < smallest - 1e-12:
        return "floor"
    if bounds is not None and bounds[1] - values.min() < smallest - 1e-12:
        return "ceiling"
    return "constant" if np.ptp(values) <= 1e-12 else ""


def best_places(values: np.ndarray, *, highest: bool = True, most: int = 3) -> np.ndarray:
    """Places of the best values, none if that would choose among ties.

    Args:
        values: (place,); NaN is never best.
        highest: False: the lowest are best.
        most: how many places at most.

    Returns:
        (0..most,) indices, best first. Groups of equal values are named whole or not at all, and where all values are
        equal there is no best: an empty array.
    """
    scores = np.asarray(values, float) * (1.0 if highest else -1.0)
    known = np.flatnonzero(np.isfinite(scores))
    if known.size < 2 or np.ptp(scores[known]) <= 1e-12:
        return np.empty(0, int)
    order = known[np.argsort(-scores[known], kind="stable")]
    kept = 0
    for stop in range(1, min(most, len(order) - 1) + 1):
        if scores[order[stop - 1]] - scores[order[stop]] > 1e-12:
            kept = stop
    return order[:kept]
