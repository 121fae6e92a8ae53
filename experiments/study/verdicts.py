"""Claims of one table judged together: each asks a `Question` of the same prompts, the family is corrected at once.

    claims = judged_together(
        [
            Question("C1 (jump)", "accuracy jumps …", "accuracy(5) − accuracy(4) is above 0", five - four, above=0.0,
                     bounds=(-1, 1)),
            Question("C4 (norm)", "random vectors … do no harm", "change of accuracy is above −0.02", change,
                     absent=0.02, side="below", bounds=(-1, 1)),
        ],
        clusters, settings,
    )

A question of presence names a bound (`above`, `below`), a question of absence the smallest size that matters
(`absent`). What cannot show at all, such as a gain where the reference is right throughout, is not asked: `blocked`
says why, and the claim is not testable; `no_room` finds out for paired changes of a share. Claims whose number is no
mean over prompts make their own `Judgement` and go through `effect_claim`.

Knows nothing about models or particular claims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from experiments.statistics.clusters import Settings
from experiments.statistics.equivalence import Judgement, judge_absence, judge_presence
from experiments.statistics.families import family_intervals, family_text
from experiments.study.claims import Claim, effect_claim

__all__ = ["MARGIN", "Question", "judged_together", "no_room"]

MARGIN = 0.02
"""A change of accuracy by less than this (two points) counts as none, in claims that there is one and that there is
none."""

Side = Literal["both", "above", "below"]


@dataclass(frozen=True)
class Question:
    """A claim before it is judged: the mean of some values over prompts, and what decides.

    Attributes:
        name, statement, measured, note, mark: see `Claim`.
        values: (prompt,) whose mean is the number; NaN where a prompt does not count. Empty: nothing was measured.
        above, below: bounds of a claim of presence.
        absent: smallest size that matters, of a claim of absence; None: it is one of presence.
        side: of the absence: "above": no increase, "below": no decrease, "both".
        bounds: lowest and highest value that the mean can take.
        room: the same given the reference that was measured, see `family_intervals`; None: the bounds.
        blocked: why nothing could show, in words; "": it could.
    """

    name: str
    statement: str
    measured: str
    values: np.ndarray
    above: float | None = None
    below: float | None = None
    absent: float | None = None
    side: Side = "both"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    room: tuple[float, float] | None = None
    mark: str = ""
    blocked: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        presence = self.above is not None or self.below is not None
        if presence == (self.absent is not None):
            raise ValueError(f"claim {self.name}: give above or below, or else absent")

    def judge(self, lower: float, upper: float, family: int) -> Judgement:
        """The verdict by an interval of the mean."""
        if self.blocked:
            size = next(size for size in (self.absent, self.above, self.below) if size is not None)
            return Judgement("not testable", self.blocked, lower, upper, size, family)
        if self.absent is not None:
            return judge_absence(lower, upper, self.absent, side=self.side, family=family, mark=self.mark)
        return judge_presence(lower, upper, above=self.above, below=self.below, family=family, mark=self.mark)


def judged_together(
    questions: Sequence[Question], clusters: Sequence[Any] | np.ndarray, settings: Settings
) -> list[Claim]:
    """The claims, with intervals that hold together for all questions that can be answered.

    Args:
        questions: over the same prompts.
        clusters: (prompt,) cluster of each prompt.
        settings: resamples, level, seed.
    """
    asked = [one for one in questions if not one.blocked and len(one.values)]
    found = {}
    if asked:
        values = np.stack([np.asarray(one.values, float) for one in asked], axis=1)
        room = [one.room or one.bounds for one in asked]
        table = family_intervals(values, clusters, [one.bounds for one in asked], settings, room)
        found = {one.name: row for one, (_, row) in zip(asked, table.iterrows(), strict=True)}
    family = len(found)
    claims = []
    for one in questions:
        row = found.get(one.name, {"estimate": math.nan, "lower": math.nan, "upper": math.nan, "n": 0, "n_clusters": 0})
        number = family if one.name in found else 1
        judgement = one.judge(float(row["lower"]), float(row["upper"]), number)
        corrected = family_text(number, settings.level)
        claims.append(
            effect_claim(one.name, one.statement, one.measured, judgement, row, one.note, "estimate", corrected)
        )
    return claims


def no_room(reference: float, side: Literal["above", "below"], size: float) -> str:
    """Why a change of a share could not show, in words; "": it could.

    Args:
        reference: share before the change, a fraction.
        side: which way the change would go.
        size: smallest change that matters, a fraction above 0.
    """
    room = 1 - reference if side == "above" else reference
    if room >= size - 1e-12:
        return ""
    end = "ceiling" if side == "above" else "floor"
    return f"the reference is at its {end} ({100 * reference:.1f} %): a change of {100 * size:g} points has no room"
