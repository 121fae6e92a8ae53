"""Every table of a sweep at once, from its trials.

What it does not know: files, figures (heatmaps.py), sentences (summary.py), how a table is made (cells.py,
structure.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.study.edits.cells import cell_statistics, control_statistics
from experiments.study.edits.pairing import families, named
from experiments.study.edits.verdicts import judge_cells
from experiments.sweep.structure import (
    marginal_effects,
    rank_consistency,
    rank_correlations,
    sign_symmetry,
    variance_shares,
)

__all__ = ["Analysis", "analyse"]


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


def analyse(trials: pd.DataFrame, settings: Settings | None = None) -> Analysis:
    """Every table from the trials; deterministic for given trials (in any row order) and settings."""
    settings = settings or Settings()
    paired = families(trials)
    verdicts = [judge_cells(family, settings) for family in paired]
    cells = cell_statistics(paired, settings, verdicts=verdicts)
    return Analysis(
        cells=cells,
        controls=control_statistics(paired, settings),
        marginals=marginal_effects(paired, settings),
        correlations=rank_correlations(paired),
        consistency=rank_consistency(paired, settings),
        variance=variance_shares(paired, settings),
        symmetry=sign_symmetry(cells),
        evidence=named(paired, [pd.DataFrame(one.evidence) for one in verdicts]),
        power=named(paired, [one.power.rename(columns={"group": "coefficient"}) for one in verdicts]),
        visibility=named(paired, [pd.DataFrame(one.visibility) for one in verdicts]),
        settings=settings,
    )
