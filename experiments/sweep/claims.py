"""Does steering ever help? The published claims that a sweep judges: S4 for embedding edits, S5 for the others.

One claim per space, part and timing, over all pairs, latents and coefficients of the sweep at once, by the rule of
experiments/study/edits/claims.py. A note says what gain this sweep could have found: without it "none" means nothing.

Knows nothing about files or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.statistics.effects import row_of
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.edits.claims import BestCell, best_cell, never_better, some_better
from experiments.study.edits.pairing import Family

__all__ = ["claims_of"]

EDITED = {"kv": "the KV cache", "hidden": "the hidden state"}


def claims_of(
    families: Sequence[Family], cells: pd.DataFrame, evidence: pd.DataFrame, power: pd.DataFrame, settings: Settings
) -> ClaimsTable:
    """One claim per family that has directions.

    Args:
        families: paired trials.
        cells, evidence, power: tables of `analysis.Analysis`.
        settings: resamples, level, seed, alpha.
    """
    return ClaimsTable(
        _claim(family, cells, evidence, power, settings) for family in families if len(family.of("direction"))
    )


def _claim(
    family: Family, cells: pd.DataFrame, evidence: pd.DataFrame, power: pd.DataFrame, settings: Settings
) -> Claim:
    best = _best(family, cells, evidence, settings)
    part = family.part if family.space == "kv" and family.part != "both" else ""
    where = f"{family.space} {part}".strip() + f", {family.timing}"
    note = _could_be_found(power, family)
    if family.space == "embedding":
        reference = "unsteered exit" if family.timing == "early-exit" else "unsteered run"
        return never_better(f"S4 ({where})", "embedding steering never beats the baseline", best, note, reference)
    edited = f"the {part} of {EDITED[family.space]}" if part else EDITED[family.space]
    statement = f"steering {edited} ever helps: some direction beats the baseline and random directions"
    return some_better(f"S5 ({where})" if family.space == "kv" else f"helps ({where})", statement, best, note)


def _best(family: Family, cells: pd.DataFrame, evidence: pd.DataFrame, settings: Settings) -> BestCell:
    """The largest gain of a family of a sweep; only cells that all prompts saw are compared prompt by prompt."""
    rows = family.of("direction")
    edited = family.answers[rows].astype(float)
    before = family.baselines[family.baseline_of[rows]].astype(float)
    gains = np.where((edited < 0) | (before < 0), np.nan, edited - before).T
    own = cells[(cells[list(family.name)] == pd.Series(family.name)).all(axis=1) & ~cells["mirrored"].astype(bool)]
    gain = row_of(evidence, {**family.name, "tail": "gain"})
    words = f"{family.space} space ({family.timing})"
    share = family.conditions["baseline"].to_numpy(float)[rows]
    return best_cell(gains, family.prompt_cluster, own, gain, settings, words, share)


def _could_be_found(power: pd.DataFrame, family: Family) -> str:
    """The smallest improvement that could have been found, at the |c| where that is easiest; in words."""
    own = power[(power[list(family.name)] == pd.Series(family.name)).all(axis=1) & (power["tail"] == "gain")]
    possible = own[own["can_survive"].astype(bool) & own["both_points"].notna()]
    if possible.empty:
        return "no improvement could have been found in half of the cells at any |c|"
    row = possible.sort_values("both_points", kind="stable").iloc[0]
    return (
        f"an improvement of {100 * row['both_points']:.1f} points would have been found in the median cell at |c| = "
        f"{row['coefficient']:g}"
    )
