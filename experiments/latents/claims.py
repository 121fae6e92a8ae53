"""Published claims about latents that several studies can judge. Knows nothing about how the numbers were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Selector, compare
from experiments.study.claims import Claim, effect_claim, judge
from experiments.study.storage import carrying

__all__ = ["CLAIMED", "MARGIN", "claimed_latents", "number_claims"]

MARGIN = 0.02
"""A loss of less than this (two points) counts as no harm in claims of no effect."""
CLAIMED = carrying("embedding")
"""The latents that hold what the answer needs, as C3 has it."""


def number_claims(step: Callable[[int], Mapping[str, Any]], n: int) -> list[Claim]:
    """C1, from paired changes of accuracy per latent.

    Args:
        step: k -> the row (difference, lower, upper, n, n_clusters) of accuracy(k latents) − accuracy(k − 1).
        n: latents of the model.
    """
    if n != 6:
        note = f"the claim is about 6 latents, this model has {n}"
        return [Claim("C1", "accuracy peaks at 5 latents", "", "not testable", note=note)]
    jump, sixth = step(5), step(6)
    return [
        effect_claim(
            "C1 (jump)",
            "accuracy jumps from 4 to 5 latents",
            "accuracy(5) − accuracy(4) is above 0",
            judge(jump["lower"], jump["upper"], above=0.0),
            jump,
        ),
        effect_claim(
            "C1 (sixth)",
            "the sixth latent adds nothing",
            f"accuracy(6) − accuracy(5) is below {MARGIN}",
            judge(sixth["lower"], sixth["upper"], below=MARGIN),
            sixth,
        ),
    ]


def claimed_latents(
    trials: pd.DataFrame,
    of: Callable[[int], tuple[Selector, Selector]],
    n: int,
    outcome: str = "correct",
    settings: Settings | None = None,
) -> pd.DataFrame:
    """C3 in one number: (an edit − its control) at latents 3 and 5, against the same at the other latents.

    Args:
        trials: rows of both, with prompt_id, cluster and the outcome.
        of: latent -> the columns that name the edit there, and those that name its control.
        n: latents of the model, at least 5.
        outcome: column, bool or number.
        settings: of the statistics.

    Returns:
        One row of `compare`, claimed True against reference_claimed False.
    """
    names = ["cluster", "prompt_id"]

    def mean(chosen: Selector) -> pd.Series:
        rows = trials.loc[(trials[list(chosen)] == pd.Series(chosen)).all(axis=1), [*names, outcome]]
        if rows.empty:
            raise ValueError(f"the trials have no {', '.join(f'{name} {value!r}' for name, value in chosen.items())}")
        return rows.astype({outcome: float}).groupby(names)[outcome].mean()

    rows = []
    for latent in range(1, n + 1):
        edited, control = (mean(chosen) for chosen in of(latent))
        value = (edited - control).rename("value").dropna().reset_index()
        rows.append(value.assign(claimed=latent in CLAIMED))
    contrast: tuple[Selector, Selector] = ({"claimed": True}, {"claimed": False})
    return compare(pd.concat(rows, ignore_index=True), [contrast], ["claimed"], "value", settings)
