"""What the cells of a grid say about two published claims: that edits never help (S4), that some do (S5).

Both rest on the largest gain of any cell over its unsteered run, with an interval by those of all cells of the family
together, and on how many cells are improvements after correction (verdicts.py). Every grid of edits judges them by this
rule, whichever prompts, pairs and timings it has.

Knows nothing about models, files, or how trials came about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.statistics.equivalence import Judgement, judge_absence
from experiments.statistics.families import family_intervals
from experiments.study.claims import Claim, effect_claim
from experiments.study.edits.words import singles
from experiments.study.verdicts import MARGIN, no_room

__all__ = ["BestCell", "best_cell", "never_better", "some_better"]


@dataclass(frozen=True)
class BestCell:
    """The largest gain over the cells of a family.

    Attributes:
        row: estimate, lower, upper, n, n_clusters: the gain of the best cell, a fraction, in the interval of the
            largest gain of any cell.
        cells: number of cells that the interval is corrected for.
        lowest: lowest unsteered accuracy of any cell, a fraction: how much room the gains have.
        improvements: cells that are better than baseline and random directions after correction.
        few: why no single cell can have a verdict; "": there are draws enough.
        note: for a reader: how many cells are above what.
        corrected: how, for the claims.
    """

    row: Mapping[str, Any]
    cells: int
    lowest: float
    improvements: int
    few: str
    note: str
    corrected: str


def best_cell(
    gains: np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    cells: pd.DataFrame,
    evidence: Mapping[str, Any],
    settings: Settings,
    where: str,
    before: Sequence[float] | np.ndarray | None = None,
) -> BestCell:
    """The largest gain of a family.

    Args:
        gains: (prompt, cell) right minus unsteered right, NaN where a prompt was not asked.
        clusters: (prompt,) cluster of each prompt.
        cells: their rows of the table of cells, with verdict, gain_q and baseline; in any order, mirrors or not.
        evidence: record of the family's gains (study/edits/verdicts.py).
        settings: resamples, level, seed, alpha.
        where: the family in words, such as "kv space".
        before: (cell,) unsteered accuracy, a fraction: bounds of cells that no prompt tells apart use it; None: not.
    """
    room = None if before is None else [(-float(share), 1 - float(share)) for share in before]
    table = family_intervals(gains, clusters, [(-1.0, 1.0)] * gains.shape[1], settings, room)
    row: dict[str, Any] = {str(name): value for name, value in table.iloc[table["estimate"].argmax()].items()}
    row |= {"lower": table["lower"].max(), "upper": table["upper"].max()}
    number, above = int((cells["verdict"] == "improvement").sum()), int((cells["gain_q"] <= settings.alpha).sum())
    few = singles(evidence, settings.alpha)
    words = (
        f"{above} of {len(cells)} cells are above the baseline alone (q ≤ {settings.alpha:g})"
        if few
        else f"{number} of {len(cells)} cells are improvements after correction"
    )
    return BestCell(
        row,
        len(table),
        float(cells["baseline"].min()),
        number,
        few,
        f"{words}; best unsteered accuracy {cells['baseline'].max():.2f}; the interval is that of the largest gain of "
        "any cell",
        f"max-t over the cells of {where}, together at {100 * settings.level:g} %" if len(table) > 1 else "",
    )


def never_better(name: str, statement: str, best: BestCell, note: str = "", reference: str = "unsteered exit") -> Claim:
    """That no edit gains as much as MARGIN.

    Args:
        name, statement: of the claim.
        best: the largest gain.
        note: said after the note of the best cell.
        reference: what gains are measured from, in words.
    """
    lower, upper = float(best.row["lower"]), float(best.row["upper"])
    verdict = judge_absence(lower, upper, MARGIN, side="above", family=best.cells)
    if blocked := no_room(best.lowest, "above", MARGIN):
        verdict = dataclasses.replace(verdict, verdict="not testable", reason=blocked)
    rule = f"gain of the best cell over its {reference} is below {MARGIN}"
    return effect_claim(name, statement, rule, verdict, best.row, _joined(best.note, note), "estimate", best.corrected)


def some_better(name: str, statement: str, best: BestCell, note: str = "", elsewhere: str = "") -> Claim:
    """Held by a cell that is better than baseline and random directions; not held if no cell can gain MARGIN.

    Args:
        name, statement, best, note: see `never_better`.
        elsewhere: claim that judges all cells together where no single one can be judged; "": there is none.
    """
    lower, upper = float(best.row["lower"]), float(best.row["upper"])
    said = best.note
    if best.few:
        rest = f", the rest is judged in {elsewhere}" if elsewhere else ""
        said = f"{best.few}: only that no cell gains could be said here{rest}; {said}"
    if blocked := no_room(best.lowest, "above", MARGIN):
        verdict = Judgement("not testable", blocked, lower, upper, MARGIN, best.cells)
    elif best.improvements:
        verdict = Judgement("held", f"{best.improvements} cells are improvements", lower, upper, MARGIN, best.cells)
    elif upper <= MARGIN:
        verdict = Judgement("not held", f"no cell gains as much as {MARGIN}", lower, upper, MARGIN, best.cells)
    else:
        reason = "none survives, but a gain cannot be excluded"
        verdict = Judgement("undecided", reason, lower, upper, MARGIN, best.cells)
    rule = (
        "cells above baseline and random directions, corrected (number: gain of the best cell); not held if no cell "
        f"can gain {MARGIN}"
    )
    return effect_claim(name, statement, rule, verdict, best.row, _joined(said, note), "estimate", best.corrected)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
