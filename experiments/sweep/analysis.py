"""Every table of a sweep at once, from its trials, and the claims that rest on them.

What it does not know: files, figures (heatmaps.py), sentences (summary.py), how a table is made (cells.py,
structure.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.study.claims import ClaimsTable
from experiments.study.edits.cells import cell_statistics, control_statistics
from experiments.study.edits.pairing import families, named
from experiments.study.edits.verdicts import judge_cells
from experiments.study.progress import Bar, no_bar
from experiments.sweep.claims import claims_of
from experiments.sweep.structure import (
    marginal_effects,
    rank_consistency,
    rank_correlations,
    sign_symmetry,
    variance_shares,
)

__all__ = ["Analysis", "analyse"]

T = TypeVar("T")


@dataclass(frozen=True)
class Analysis:
    """All tables of one trial table; figures and summary read nothing else."""

    cells: pd.DataFrame
    controls: pd.DataFrame
    marginals: pd.DataFrame
    correlations: pd.DataFrame
    consistency: pd.DataFrame
    variance: pd.DataFrame
    symmetry: pd.DataFrame
    evidence: pd.DataFrame
    """What the verdicts rest on, one row per family and tail (study.edits.verdicts)."""
    power: pd.DataFrame
    """Smallest sizes that could have been found, one row per family, |c| and tail."""
    visibility: pd.DataFrame
    """What the baselines hide, one row per family and baseline."""
    settings: Settings
    claims: ClaimsTable
    """Does steering ever help, a claim per family."""


def analyse(trials: pd.DataFrame, settings: Settings | None = None, bar: Bar = no_bar) -> Analysis:
    """Every table from the trials; deterministic for given trials (in any row order) and settings.

    Args:
        trials: of a sweep.
        settings: of the statistics.
        bar: makes the progress bar.
    """
    settings = settings or Settings()
    with bar(8, "table", "statistics") as advance:

        def done(table: T) -> T:
            advance(1)
            return table

        paired = done(families(trials))
        verdicts = done([judge_cells(family, settings) for family in paired])
        cells = done(cell_statistics(paired, settings, verdicts=verdicts))
        controls = done(control_statistics(paired, settings))
        marginals = done(marginal_effects(paired, settings))
        correlations = done(rank_correlations(paired))
        consistency = done(rank_consistency(paired, settings))
        variance = done(variance_shares(paired, settings))
    evidence = named(paired, [pd.DataFrame(one.evidence) for one in verdicts])
    power = named(paired, [one.power.rename(columns={"group": "coefficient"}) for one in verdicts])
    return Analysis(
        cells=cells,
        controls=controls,
        marginals=marginals,
        correlations=correlations,
        consistency=consistency,
        variance=variance,
        symmetry=sign_symmetry(cells),
        evidence=evidence,
        power=power,
        visibility=named(paired, [pd.DataFrame(one.visibility) for one in verdicts]),
        settings=settings,
        claims=claims_of(paired, cells, evidence, power, settings),
    )
