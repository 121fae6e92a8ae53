"""Prompts of a lens study in batches and in words, and its numbers in words.

Knows nothing about lenses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from experiments.study.result import Result
from experiments.tasks import Problem

__all__ = ["batches", "clusters_of", "per_cent", "printed", "sizes", "sizes_of", "span"]


def batches(problems: Sequence[Problem], size: int) -> Iterator[list[int]]:
    """Indices of problems of similar length, at most `size` at once."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].question))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def clusters_of(problems: Sequence[Problem]) -> list[str]:
    """(prompt,) name of its cluster."""
    return [problem.cluster or problem.prompt_id for problem in problems]


def sizes(n: int, n_clusters: int) -> str:
    """How many prompts and clusters."""
    return f"{n} prompts in {n_clusters} clusters"


def sizes_of(trials: pd.DataFrame) -> str:
    """How many prompts and clusters a trial table has."""
    return sizes(trials["prompt_id"].nunique(), trials["cluster"].nunique())


def span(value: float, lower: float, upper: float, digits: int = 3) -> str:
    """An estimate with its interval."""
    return f"{value:.{digits}f} [{lower:.{digits}f}, {upper:.{digits}f}]"


def per_cent(level: float) -> str:
    """Coverage of an interval, as in "95 %"."""
    return f"{100 * level:g} %"


def printed(result: Result, where: str) -> str:
    """What a lens command prints: its sections, where the files are, and the claims if it judged any.

    Args:
        result: of the command.
        where: words before the folder, such as "Tables and figures: ".
    """
    text = "\n".join([*(section.text for section in result.sections), f"{where}{result.path}"])
    return text if result.claims is None else f"{text}\n\n{result.claims.markdown()}"
