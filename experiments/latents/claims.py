"""Published claims about latents that several studies can judge. Knows nothing about how the numbers were measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Selector, compare
from experiments.statistics.sizes import Smallest
from experiments.study.storage import carrying
from experiments.study.verdicts import MARGIN, Question, no_room

__all__ = ["CLAIMED", "MARGIN", "STAR", "claimed_latents", "number_questions", "sizes_table"]

STAR = "* q < 0.05, and the whole interval beyond the size that matters"
"""What a star says, wherever one stands beside an effect."""
CLAIMED = carrying("embedding")
"""The latents that hold what the answer needs, as C3 has it."""


def number_questions(change: Callable[[int], np.ndarray], level: Callable[[int], float], n: int) -> list[Question]:
    """C1, from paired changes of accuracy per latent.

    Args:
        change: k -> (prompt,) accuracy(k latents) − accuracy(k − 1).
        level: k -> accuracy after k latents, a fraction.
        n: latents of the model.
    """
    if n != 6:
        note = f"the claim is about 6 latents, this model has {n}"
        return [Question("C1", "accuracy peaks at 5 latents", "", np.empty(0), above=MARGIN, blocked=note)]
    texts = (
        ("C1 (jump)", 5, "accuracy jumps from 4 to 5 latents", f"accuracy(5) − accuracy(4) is above {MARGIN}"),
        ("C1 (sixth)", 6, "the sixth latent adds nothing", f"accuracy(6) − accuracy(5) is below {MARGIN}"),
    )
    return [
        Question(
            name, statement, rule, change(k),
            above=MARGIN if k == 5 else None, absent=MARGIN if k == 6 else None, side="above",
            bounds=(-1, 1), room=(-level(k - 1), 1 - level(k - 1)), blocked=no_room(level(k - 1), "above", MARGIN),
            mark="ceiling" if k == 5 and level(k) == 1 else "",  # an absence with room can show
        )
        for name, k, statement, rule in texts
    ]  # fmt: skip


def sizes_table(sizes: Mapping[str, Smallest]) -> pd.DataFrame:
    """The smallest sizes that matter and where they come from, by the table that they belong to."""
    return pd.DataFrame([{"table": name, **asdict(size)} for name, size in sizes.items()])


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
