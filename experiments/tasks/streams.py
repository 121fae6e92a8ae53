"""What every endless generator of problems does alike: check what it was asked for, and pick distinct problems.

Knows nothing about what problems are about.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from experiments.tasks.problem import Problem

__all__ = ["checked_lengths", "distinct"]


def checked_lengths(
    split: str,
    splits: Collection[str],
    steps: tuple[int, int],
    allowed: tuple[int, int],
    weights: Sequence[float] | None,
    what: str = "steps",
) -> list[int]:
    """The lengths that problems may have.

    Args:
        split, splits: asked for, and all there are.
        steps, allowed: smallest and largest number of steps, asked for and possible.
        weights: one for each length; None: none given.
        what: steps are called.

    Raises:
        ValueError: no such split, lengths that are not possible, or another number of weights.
    """
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}, got {split!r}")
    (least, most), (first, last) = steps, allowed
    if not first <= least <= most <= last:
        raise ValueError(f"{what} must satisfy {first} <= min <= max <= {last}, got {least} and {most}")
    lengths = list(range(least, most + 1))
    if weights is not None and len(weights) != len(lengths):
        raise ValueError(f"{len(lengths)} weights are needed for {least}..{most} {what}, got {len(weights)}")
    return lengths


def distinct(stream: Iterable[Problem], n: int, what: str) -> list[Problem]:
    """The first n problems of an endless stream whose clusters differ: every problem is a cluster of its own.

    Args:
        stream: of problems.
        n: number of problems, at least 1.
        what: such problems are called, where they run out.

    Raises:
        ValueError: n < 1, or so many that distinct problems run out.
    """
    if n < 1:
        raise ValueError(f"the number of problems must be at least 1, got {n}")
    found: dict[str, Problem] = {}
    for tries, problem in enumerate(stream):
        found.setdefault(problem.cluster, problem)
        if len(found) == n:
            return list(found.values())
        if tries > 200 * n + 10_000:
            raise ValueError(f"only {len(found)} {what}; ask for fewer than {n}")
    raise AssertionError("an endless stream ended")
