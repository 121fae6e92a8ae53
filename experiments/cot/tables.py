"""Tables that the chain-of-thought studies share: means of every measure by condition, and conditions in words.

Knows nothing about models or figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.cot.measures import CONDITION, OUTCOMES
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import levels, row_of
from experiments.statistics.power import Design, against_baseline

__all__ = ["PROMPTS", "all_levels", "chain_limits", "label", "mean_row", "records"]

PROMPTS = {"neutral": "no sentence", "direct": "at once", "steps": "step by step"}
"""Prompts in words."""
_VECTORS = {"all": "", "held-out": "vector without own sets", "random": "random vector", "shuffled": "shuffled vector"}


def all_levels(
    trials: pd.DataFrame, settings: Settings, by: Sequence[str] = CONDITION, outcomes: Sequence[str] = OUTCOMES
) -> pd.DataFrame:
    """Mean of every measure in every condition, with intervals: the columns of `by`, outcome, and those of `levels`;
    and outcome "correct given a chain", over the texts that have one."""
    found = [levels(trials, by, outcome, settings).assign(outcome=outcome) for outcome in outcomes]
    chained = trials[trials["chain"]]
    if "correct" in outcomes and len(chained):
        found.append(levels(chained, by, "correct", settings).assign(outcome="correct given a chain"))
    table = pd.concat(found, ignore_index=True)
    return table[["outcome", *by, "n", "n_clusters", "mean", "lower", "upper"]]


def mean_row(table: pd.DataFrame, outcome: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a measure in a condition."""
    return row_of(table, {"outcome": outcome, **chosen})


def chain_limits(unsteered: pd.DataFrame, comparisons: int, settings: Settings) -> str:
    """The smallest change of the rate of chains that one of some comparisons could have told from none, in words.

    Args:
        unsteered: one row per question: chain, cluster.
        comparisons: that are corrected together.
        settings: of their tests; the level is two-sided.
    """
    design = Design.of(
        unsteered["chain"].to_numpy(bool), unsteered["cluster"].to_numpy(), alpha=settings.alpha / 2, tests=comparisons
    )
    found = []
    for tail, word in (("gain", "a rise"), ("harm", "a fall")):
        number = against_baseline(design, tail)  # type: ignore[arg-type]
        found.append(
            f"{word} of {100 * number / design.n:.1f} points" if number is not None
            else f"no {word.split()[1]} at all (too few questions have room for one)"
        )  # fmt: skip
    return (
        f"{100 * design.baseline:.1f} % of the answers have a chain before anything is done. The smallest change that "
        f"one of {comparisons} comparisons could have told from none (all that changes goes one way, "
        f"p < {settings.alpha:g} after correction): {', '.join(found)}."
    )


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def label(row: Mapping[str, Any], where: bool = True) -> str:
    """A condition in words: "step by step", "continuous +2 at layer 15", "step by step, single −20 at layer 10"."""
    prompt = PROMPTS[row["prompt"]]
    if not row["way"]:
        return prompt
    sign = "+" if row["coefficient"] >= 0 else "−"
    text = f"{row['way']} {sign}{abs(row['coefficient']):g}" + (f" at layer {int(row['layer'])}" if where else "")
    if _VECTORS[row["vector"]]:
        text += f", {_VECTORS[row['vector']]}"
    return text if row["prompt"] == "neutral" else f"{prompt}, {text}"
