"""Verdicts on the cells of a family: improvement, harm or none, and what the family could have shown.

A cell is a *harm* if it is worse than the unsteered run and worse than random directions of its norm:

    loss_q         exact sign-flip test on clusters, one-sided; Benjamini-Hochberg over the losses of the family
    beyond_harm_p  maximum rule on the draws, one-sided, family-wise (experiments/statistics/calibration.py)

both at most alpha. An *improvement* is the same with gain_q and beyond_gain_p. Each tail has the level alpha.

The maximum is taken over all cells, or within each |c| (p times the number of |c|) if there are draws enough for that:
tails differ by |c|, but every further group asks for more draws. Blocks are the directions (pair and sign of c), pools
the directions that share draws: +c and -c of a pair, or all pairs where the draws are pooled.

What it does not know: intervals, sentences, figures, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics.calibration import (
    GainsAndLosses,
    Tail,
    extremes,
    gains_and_losses,
    last_places,
    least_draws,
    maximum_p,
    null_counts,
    pool_codes,
    rank_p,
)
from experiments.statistics.clusters import Settings
from experiments.statistics.distinct import distinct_edits
from experiments.statistics.floors import visibility
from experiments.statistics.paired import benjamini_hochberg
from experiments.statistics.power import Design, detectable
from experiments.study.edits.pairing import Family

__all__ = ["TAILS", "VERDICT_COLUMNS", "Compared", "Verdicts", "compared", "judge_cells"]

TAILS: tuple[Tail, ...] = ("gain", "harm")
WORD = {"gain": "improvement", "harm": "harm"}
VERDICT_COLUMNS = (
    "gain_p", "gain_q", "loss_p", "loss_q", "random_gain_p", "random_harm_p", "beyond_gain_p", "beyond_harm_p",
    "effect",
)  # fmt: skip
"""Columns of cells.csv that come from here, beside verdict and verdict_q."""


@dataclass(frozen=True)
class Verdicts:
    """What is said of one family.

    Attributes:
        columns: VERDICT_COLUMNS, verdict_q and verdict, one value per direction cell.
        evidence: one record per tail: how many cells, beyond how many draws, what the same rule finds in families of
            draws, how many cells rank last (harm) or first (gain), how many different edits are behind the verdicts.
        power: smallest sizes that could have been found, one row per |c| and tail (statistics.power.detectable).
        visibility: what the baselines hide, one record per baseline.
    """

    columns: dict[str, np.ndarray]
    evidence: list[dict[str, Any]]
    power: pd.DataFrame
    visibility: list[dict[str, Any]]


@dataclass(frozen=True)
class Compared:
    """Direction cells that saw the same prompts and have the same number of draws.

    Attributes:
        cells: (cell,) numbers among the direction cells of the family.
        draws: (cell, D) rows of the family's conditions.
        values: (cell, 1 + D) accuracies, column 0 the direction.
        sizes: (cell,) |c|. strata: (cell,) codes of latent and |c|. blocks, pools: see the top of the module.
        resolution: 1 / prompts.
        apart: the maximum is taken within each |c|.
    """

    cells: np.ndarray
    draws: np.ndarray
    values: np.ndarray
    sizes: np.ndarray
    strata: np.ndarray
    blocks: np.ndarray
    pools: np.ndarray
    resolution: float
    apart: bool

    @property
    def groups(self) -> np.ndarray | None:
        """`groups` of the maximum rule."""
        return self.sizes if self.apart else None

    def beyond(self, values: np.ndarray, tail: Tail, alpha: float, quick: bool = False) -> np.ndarray:
        """(cell,) family-wise p of the maximum rule; 1 with fewer than two draws."""
        if values.shape[1] < 3:
            return np.ones(len(values))
        extreme = extremes(values, self.resolution, tail, self.strata)
        return maximum_p(extreme, self.blocks, alpha, pools=self.pools, groups=self.groups, quick=quick).p


def compared(family: Family, rows: np.ndarray, alpha: float) -> list[Compared]:
    """The direction cells of a family beside their random draws, the largest set first.

    Args:
        family: paired trials.
        rows: its direction cells.
        alpha: level of each tail.
    """
    table = family.conditions
    chosen = table.iloc[rows]
    groups = family.draws_of(rows, "random")
    accuracy = table["accuracy"].to_numpy()
    sizes = chosen["coefficient"].abs().round(9).to_numpy()
    source, target, latent = (chosen[name].to_numpy() for name in ("source", "target", "latent"))
    blocks = _codes(source, target, np.sign(chosen["coefficient"].to_numpy()))
    owner = np.stack([table[name].to_numpy() for name in ("source", "target")], axis=1)
    pools = _codes(*np.array([owner[group[0]] if len(group) else (-1, -1) for group in groups]).T)
    draw, n = table["draw"].to_numpy(), table["n"].to_numpy()
    kinds = [(tuple(draw[group]), family.prompts_key[row]) for group, row in zip(groups, rows, strict=True)]
    found = []
    for kind in dict.fromkeys(kinds):
        cells = np.array([cell for cell, other in enumerate(kinds) if other == kind])
        draws = np.array([groups[cell] for cell in cells], int).reshape(len(cells), -1)
        values = np.concatenate([accuracy[rows[cells]][:, None], accuracy[draws]], axis=1)
        places = (blocks[cells], pools[cells])
        shared = int(pool_codes(*places, len(cells))[2].max())
        number = len(np.unique(sizes[cells]))
        apart = number > 1 and draws.shape[1] >= least_draws(alpha / number, shared=shared) + shared
        strata = _codes(latent[cells], sizes[cells])
        found.append(Compared(cells, draws, values, sizes[cells], strata, *places, 1 / n[rows[cells[0]]], apart))
    return sorted(found, key=lambda one: -len(one.cells))


def _codes(*columns: np.ndarray) -> np.ndarray:
    return np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def judge_cells(family: Family, settings: Settings) -> Verdicts:
    """Every verdict of a family and what they rest on; empty if the family has no direction cell."""
    rows, alpha = family.of("direction"), settings.alpha
    if not len(rows):
        empty: dict[str, np.ndarray] = {name: np.empty(0) for name in (*VERDICT_COLUMNS, "verdict_q", "verdict")}
        return Verdicts(empty, [], pd.DataFrame(), [])
    sets = compared(family, rows, alpha)
    against = gains_and_losses(family.differences[rows])
    columns: dict[str, np.ndarray] = {
        "gain_p": against.gain_p, "gain_q": against.gain_q, "loss_p": against.loss_p, "loss_q": against.loss_q,
    }  # fmt: skip
    for tail in TAILS:
        ranks, beyond = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
        for one in sets:
            if one.draws.shape[1]:
                ranks[one.cells] = rank_p(one.values, tail)
                beyond[one.cells] = np.minimum(1.0, len(sets) * one.beyond(one.values, tail, alpha))
        columns[f"random_{tail}_p"], columns[f"beyond_{tail}_p"] = ranks, beyond
    difference = family.conditions["difference"].to_numpy()[rows]
    q = np.where(difference > 0, against.gain_q, against.loss_q)
    beyond = np.where(difference > 0, columns["beyond_gain_p"], columns["beyond_harm_p"])
    columns["verdict_q"] = np.where(np.isnan(beyond), np.nan, np.where(difference == 0, 1.0, np.fmax(q, beyond)))
    counts = columns["verdict_q"] <= alpha
    columns["verdict"] = np.where(counts, np.where(difference > 0, WORD["gain"], WORD["harm"]), "none")
    columns["effect"] = np.zeros(len(rows), int)
    evidence = [_evidence(family, rows, sets[0], tail, columns, settings) for tail in TAILS]
    return Verdicts(columns, evidence, _power(family, rows, sets[0], settings), _visibility(family, rows, settings))


# --- What a verdict rests on ------------------------------------------------------------------------------------------


def _evidence(
    family: Family, rows: np.ndarray, one: Compared, tail: Tail, columns: dict[str, np.ndarray], settings: Settings
) -> dict[str, Any]:
    """One record; the numbers of the different edits are put into columns["effect"]."""
    found = np.flatnonzero(columns["verdict"] == WORD[tail])
    draws, alpha = one.draws.shape[1], settings.alpha
    shared = int(pool_codes(one.blocks, one.pools, len(one.cells))[2].max())
    number = len(np.unique(one.sizes)) if one.apart else 1
    record: dict[str, Any] = {
        "tail": tail, "cells": len(rows), "draws": draws, "shared": shared, "apart": one.apart,
        "least_p": number * shared / (shared + draws), "needed_draws": least_draws(alpha / number, shared=shared),
        "found": len(found),
    }  # fmt: skip
    nulls = null_families(family, one, tail, alpha)
    record |= {
        "null_families": len(nulls), "null_with_any": int((nulls > 0).sum()),
        "null_most": int(nulls.max(initial=0)),
        "null_least_p": number * shared / draws if draws > shared else 1.0,
    }  # fmt: skip
    if draws:
        total = last_places(one.values, tail, one.pools)
        record |= {
            "last": total.observed, "last_expected": total.expected, "last_p": total.p,
            "last_p_families": total.p_families, "last_families_lower": int(total.families.min()),
            "last_families_upper": int(total.families.max()),
        }  # fmt: skip
    edits = _effects(family, rows, found, one, tail)
    columns["effect"][found] = edits.labels + 1
    return record | {"effects": edits.number, "overlap_threshold": edits.threshold}


def null_families(family: Family, one: Compared, tail: Tail, alpha: float, quick: bool = True) -> np.ndarray:
    """(family,) how many verdicts of a tail the rule gives if draws play the directions; empty with too few draws."""
    if one.draws.shape[1] - int(pool_codes(one.blocks, one.pools, len(one.cells))[2].max()) < 2:
        return np.empty(0, int)
    unique, place = np.unique(one.draws, return_inverse=True)
    against: GainsAndLosses = gains_and_losses(family.differences[unique])
    single = (against.gain_p if tail == "gain" else against.loss_p)[place.reshape(one.draws.shape)]
    everyone = np.arange(len(one.cells))

    def rule(values: np.ndarray, playing: np.ndarray) -> int:
        q = benjamini_hochberg(single[everyone, playing - 1])
        if not (q <= alpha).any():
            return 0
        return int(((q <= alpha) & (one.beyond(values, tail, alpha, quick) <= alpha)).sum())

    return null_counts(one.values, rule, one.blocks, one.pools)


def _flips(family: Family, rows: np.ndarray, tail: Tail) -> np.ndarray:
    """(row, prompt) whether the edit made the prompt right (gain) or wrong (harm)."""
    now, before = family.answers[rows], family.baselines[family.baseline_of[rows]]
    return (now == 1) & (before == 0) if tail == "gain" else (now == 0) & (before == 1)


def _effects(family: Family, rows: np.ndarray, found: np.ndarray, one: Compared, tail: Tail) -> Any:
    """The different edits behind some cells, by overlap of the prompts that flip, against that of random draws."""
    if not len(found):
        empty = np.zeros((0, family.answers.shape[1]), bool)
        return distinct_edits(empty, empty, np.empty(0, int))
    unique, first = np.unique(one.draws, return_index=True)
    vectors = one.pools[:, None] * one.draws.shape[1] + np.arange(one.draws.shape[1])
    return distinct_edits(
        _flips(family, rows[found], tail), _flips(family, unique, tail), vectors.ravel()[first]
    )  # fmt: skip


def _baselines(family: Family, rows: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The different baselines of the direction cells, and which of them each cell has."""
    known, which = np.unique(family.baseline_of[rows], return_inverse=True)
    return [int(row) for row in known], which


def _power(family: Family, rows: np.ndarray, one: Compared, settings: Settings) -> pd.DataFrame:
    known, which = _baselines(family, rows)
    designs: Sequence[Design] = [
        Design.of(right, clusters, alpha=settings.alpha, tests=len(rows))
        for right, _, clusters in (_unsteered(family, row, rows) for row in known)
    ]
    return detectable(
        one.values, designs, one.sizes, which=which[one.cells], strata=one.strata, blocks=one.blocks, pools=one.pools,
        apart=one.apart,
    )  # fmt: skip


def _unsteered(family: Family, baseline: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, parsed and cluster of the prompts of a baseline that any direction cell saw."""
    seen = (family.answers[rows[family.baseline_of[rows] == baseline]] >= 0).any(0)
    return family.baselines[baseline, seen] == 1, family.parsed[baseline, seen] == 1, family.prompt_cluster[seen]


def _visibility(family: Family, rows: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    known, which = _baselines(family, rows)
    latents = family.conditions["latent"].to_numpy()[rows]
    records = []
    for place, row in enumerate(known):
        right, parsed, clusters = _unsteered(family, row, rows)
        seen = visibility(right, clusters, parsed, alpha=settings.alpha, tests=len(rows))
        here = sorted({int(latent) for latent in latents[which == place]})
        records.append({
            "latents": " ".join(map(str, here)), "mark": seen.mark, "baseline": seen.baseline, "n": seen.n,
            "n_clusters": seen.n_clusters, "gain_clusters": seen.gain_clusters, "harm_clusters": seen.harm_clusters,
            "gain": seen.gain, "harm": seen.harm, "words": seen.words,
        })  # fmt: skip
    return records
