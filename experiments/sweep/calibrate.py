"""`codi stats RUN --calibrate`: what a rule finds in a run where there is nothing to find.

In each family of draws, a random draw plays every direction and the draws that are left over are its controls: nothing
that is found there is real. A rule of level alpha should find anything in at most a share alpha of the families. Two
rules are tried: the one behind the verdicts (study/edits/verdicts.py), and the prediction test that takes accuracies of
draws for normal, which they are not (random_t_p in cells.csv).

Knows nothing about files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from experiments.statistics.calibration import Tail, gains_and_losses, null_counts
from experiments.statistics.clusters import Settings
from experiments.statistics.paired import benjamini_hochberg
from experiments.study.edits.pairing import Family
from experiments.study.edits.verdicts import TAILS, Compared, compared, null_families
from experiments.study.result import Section

__all__ = ["calibration", "calibration_section"]

IN_USE, NORMAL = "maximum over the draws (in use)", "prediction test on a normal curve"


def calibration(families: Sequence[Family], settings: Settings) -> pd.DataFrame:
    """Both rules on every family of draws.

    Args:
        families: paired trials.
        settings: alpha is the level of each tail.

    Returns:
        One row per (space, part, timing), tail and rule: families, with_any (families in which anything is found),
        share, median and most (cells found), counts (cells found in each family, as text).
    """
    records: list[dict[str, Any]] = []
    for family in families:
        rows = family.of("direction")
        sets = compared(family, rows, settings.alpha) if len(rows) else []
        for tail in TAILS if sets else ():
            rules = {
                IN_USE: null_families(family, sets[0], tail, settings.alpha, quick=False),
                NORMAL: _normal_families(family, sets[0], tail, settings.alpha),
            }
            for rule, counts in rules.items():
                found = {"families": len(counts), "with_any": int((counts > 0).sum())}
                records.append({
                    **family.name, "tail": tail, "rule": rule, "draws": sets[0].draws.shape[1], **found,
                    "share": found["with_any"] / max(1, len(counts)),
                    "median": float(np.median(counts)) if len(counts) else np.nan,
                    "most": int(counts.max(initial=0)), "counts": " ".join(map(str, counts)),
                })  # fmt: skip
    return pd.DataFrame(records)


def _normal_families(family: Family, one: Compared, tail: Tail, alpha: float) -> np.ndarray:
    """`null_families` of the older rule: Benjamini-Hochberg over the larger of the two-sided p against the baseline and
    the prediction test, and outside all draws."""
    if not len(null_families(family, one, tail, alpha)):
        return np.empty(0, int)
    unique, place = np.unique(one.draws, return_inverse=True)
    against = gains_and_losses(family.differences[unique])
    total = family.differences[unique].sum(1)
    two_sided = np.where(total == 0, 1.0, np.minimum(1.0, 2 * np.minimum(against.gain_p, against.loss_p)))
    side = (total > 0 if tail == "gain" else total < 0)[place].reshape(one.draws.shape)
    p = two_sided[place].reshape(one.draws.shape)
    everyone, sign = np.arange(len(one.cells)), 1.0 if tail == "gain" else -1.0

    def rule(values: np.ndarray, playing: np.ndarray) -> int:
        own, others = sign * values[:, 0], sign * values[:, 1:]
        number = others.shape[1]
        variance = others.var(1, ddof=1)
        typical = np.bincount(one.strata, variance) / np.bincount(one.strata)
        spread = np.sqrt(np.maximum(np.maximum(variance, typical[one.strata]), (0.5 * one.resolution) ** 2))
        distance = (own - others.mean(1)) / (spread * np.sqrt(1 + 1 / number))
        both = np.maximum(p[everyone, playing - 1], 2 * scipy_stats.t.sf(np.abs(distance), number - 1))
        outside = (own[:, None] > others).all(1)
        return int(((benjamini_hochberg(both) < alpha) & outside & side[everyone, playing - 1]).sum())

    return null_counts(one.values, rule, one.blocks, one.pools)


def calibration_section(table: pd.DataFrame, alpha: float) -> Section:
    """The table in words."""
    lines = [
        f"Random draws play the directions; nothing that is found is real. Promised: anything at all in at most "
        f"{100 * alpha:g} % of the families.",
        "",
        "| space | timing | what | rule | families | with any | median | most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        what = "improvements" if row["tail"] == "gain" else "harms"
        if row["families"]:
            numbers = f"{row['families']} | {row['with_any']} ({100 * row['share']:.0f} %) | {row['median']:g}"
        else:
            numbers = "0 (too few draws) | – | –"
        name = f"{row['space']} ({row['part']})" if row["space"] == "kv" else row["space"]
        lines.append(f"| {name} | {row['timing']} | {what} | {row['rule']} | {numbers} | {row['most']} |")
    return Section("\n".join(lines), "Calibration")
