"""Structure of a sweep's grid: which latents, positions and pairs the effects depend on, and how steadily.

What it does: `marginal_effects` averages over the pairs that share a latent; `rank_correlations` and
`rank_consistency` (Kendall's W) ask whether the same pairs come out best at every position; `variance_shares` divides
the variance of the effects between pair, position, their combination and noise; `sign_symmetry` looks for pairs that
help with both signs. All but the last read ordered pairs at c > 0: (A, B, -c) is (B, A, c), so both signs are in it.

What it does not know: random draws, verdicts' rules, files, figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from experiments.statistics.clusters import Settings, expanded_percentile, resampled_ratio
from experiments.study.edits.pairing import FAMILY, Family, as_families

__all__ = ["marginal_effects", "rank_consistency", "rank_correlations", "sign_symmetry", "variance_shares"]


@dataclass(frozen=True)
class _Grid:
    """Differences of the ordered pairs at one c > 0; `rows` are condition numbers, -1 where a cell was not run."""

    coefficient: float
    pairs: list[tuple[int, int]]
    latents: list[int]
    rows: np.ndarray  # (pair, latent)

    def complete(self) -> _Grid:
        """The pairs that were run at every latent."""
        keep = np.asarray((self.rows >= 0).all(1))
        pairs = [pair for pair, kept in zip(self.pairs, keep, strict=True) if kept]
        return dataclasses.replace(self, pairs=pairs, rows=self.rows[keep])

    def differences(self, family: Family) -> np.ndarray:
        """(pair, latent), NaN where a cell was not run."""
        values = family.conditions["difference"].to_numpy()
        return np.where(self.rows >= 0, values[self.rows], np.nan)

    def resampled(self, family: Family, weights: np.ndarray) -> np.ndarray:
        """(resample, pair, latent); only for a complete grid."""
        rows = self.rows.ravel()
        values = resampled_ratio(family.differences[rows].astype(float), family.counts[rows].astype(float), weights)
        return values.reshape(len(weights), *self.rows.shape)


def _grids(family: Family) -> list[_Grid]:
    cells = family.conditions.iloc[family.of("direction")][["source", "target", "coefficient", "latent"]]
    place = {}
    for row, source, target, coefficient, latent in cells.itertuples():
        if coefficient < 0:
            source, target = target, source
        place[abs(float(coefficient)), int(source), int(target), int(latent)] = row
    grids = []
    for size in sorted({key[0] for key in place if key[0] > 0}):
        pairs = sorted({key[1:3] for key in place if key[0] == size})
        latents = sorted({key[3] for key in place if key[0] == size})
        rows = np.array([[place.get((size, *pair, latent), -1) for latent in latents] for pair in pairs])
        grids.append(_Grid(size, pairs, latents, rows))
    return grids


def marginal_effects(trials: pd.DataFrame | Sequence[Family], settings: Settings | None = None) -> pd.DataFrame:
    """Mean difference over the pairs that share A, or B, per latent and over all latents.

    Returns:
        FAMILY, coefficient (> 0), role ("A": the mean that is added, "B": the one subtracted), label (1..n), latent
        (0: mean over all positions), difference, lower, upper (clustered), n_cells. Since (A, B, -c) = (B, A, c), the
        effect of A at -c is the effect of B at c.
    """
    settings = settings or Settings()
    records: list[dict[str, Any]] = []
    for family in as_families(trials):
        weights = family.weights(settings)
        for grid in _grids(family):
            known = np.argwhere(grid.rows >= 0)
            rows = grid.rows[known[:, 0], known[:, 1]]
            members, names = [], []
            for role, side in (("A", 0), ("B", 1)):
                labels = np.array([pair[side] for pair in grid.pairs])[known[:, 0]]
                for label in np.unique(labels):
                    for latent in (0, *grid.latents):
                        here = labels == label
                        if latent:
                            here = here & (np.array(grid.latents)[known[:, 1]] == latent)
                        if here.any():
                            members.append(here / here.sum())
                            names.append((role, int(label), int(latent), int(here.sum())))
            averaging = np.array(members)
            values = family.conditions["difference"].to_numpy()[rows]
            resampled = resampled_ratio(
                family.differences[rows].astype(float), family.counts[rows].astype(float), weights
            )
            n_clusters = int((family.counts[rows].sum(0) > 0).sum())
            lower, upper = expanded_percentile(resampled @ averaging.T, n_clusters, settings.level, (-1.0, 1.0))
            means = averaging @ values
            for (role, label, latent, size), mean, low, high in zip(names, means, lower, upper, strict=True):
                records.append(
                    family.name
                    | {"coefficient": grid.coefficient, "role": role, "label": label, "latent": latent}
                    | {"difference": mean, "lower": low, "upper": high, "n_cells": size}
                )
    return pd.DataFrame.from_records(records)


def _ranked(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the pairs at each latent, centred and of unit length; and which latents have more than one value."""
    ranks = scipy_stats.rankdata(values, axis=0)
    ranks = ranks - ranks.mean(0)
    length = np.sqrt((ranks**2).sum(0))
    varied = length > 0
    return ranks[:, varied] / length[varied], varied


def rank_correlations(trials: pd.DataFrame | Sequence[Family]) -> pd.DataFrame:
    """Spearman correlation of the pairs' differences between two positions, for every two positions and c > 0.

    Returns:
        FAMILY, coefficient, latent_a, latent_b, spearman (-1..1; NaN where all pairs tie at a position), n_pairs.
    """
    records = []
    for family in as_families(trials):
        for grid in map(_Grid.complete, _grids(family)):
            if len(grid.pairs) < 3:
                continue
            ranks, varied = _ranked(grid.differences(family))
            matrix = np.full((len(grid.latents),) * 2, np.nan)
            matrix[np.ix_(varied, varied)] = np.clip(ranks.T @ ranks, -1, 1)
            for i, latent_a in enumerate(grid.latents):
                for j, latent_b in enumerate(grid.latents):
                    records.append(
                        family.name
                        | {"coefficient": grid.coefficient, "latent_a": latent_a, "latent_b": latent_b}
                        | {"spearman": matrix[i, j], "n_pairs": len(grid.pairs)}
                    )
    columns = [*FAMILY, "coefficient", "latent_a", "latent_b", "spearman", "n_pairs"]
    return pd.DataFrame.from_records(records, columns=columns)


def rank_consistency(trials: pd.DataFrame | Sequence[Family], settings: Settings | None = None) -> pd.DataFrame:
    """Do the same pairs come out best at every position? Kendall's W with a permutation p, for each c > 0.

    The permutation relabels the latents that name a pair (all of A and B together) independently at each position: it
    keeps the dependence between pairs that share a latent, and between (A, B) and (B, A), and breaks only what is
    common to positions (the quadratic assignment procedure). If some ordered pairs were not run, pairs are permuted.

    Returns:
        FAMILY, coefficient, kendall_w (0..1, corrected for ties), mean_spearman, p, n_pairs, n_positions (positions
        at which all pairs tie are left out; with fewer than two left, W and p are NaN).

    Source: Kendall and Babington Smith 1939; Krackhardt 1988 (quadratic assignment).
    """
    settings = settings or Settings()
    records = []
    for family in as_families(trials):
        for grid in map(_Grid.complete, _grids(family)):
            if len(grid.pairs) < 3:
                continue
            ranks, _ = _ranked(grid.differences(family))
            positions = ranks.shape[1]
            w = mean = p = np.nan
            if positions > 1:
                rng = np.random.default_rng([settings.seed, 3])
                observed = (ranks.sum(1) ** 2).sum()  # = positions + sum of all correlations between two positions
                orders = _pair_orders(grid.pairs, settings.permutations, positions, rng)
                permuted = (np.take_along_axis(ranks[None], orders, axis=1).sum(2) ** 2).sum(1)
                p = (1 + (permuted >= observed - 1e-9).sum()) / (1 + settings.permutations)
                mean = (observed - positions) / (positions * (positions - 1))
                w = observed / positions**2
            records.append(
                family.name
                | {"coefficient": grid.coefficient, "kendall_w": w, "mean_spearman": mean, "p": p}
                | {"n_pairs": len(grid.pairs), "n_positions": positions}
            )
    columns = [*FAMILY, "coefficient", "kendall_w", "mean_spearman", "p", "n_pairs", "n_positions"]
    return pd.DataFrame.from_records(records, columns=columns)


def _pair_orders(
    pairs: list[tuple[int, int]], permutations: int, positions: int, rng: np.random.Generator
) -> np.ndarray:
    """(permutation, pair, position) order in which the pairs' ranks are taken."""
    labels = sorted({label for pair in pairs for label in pair})
    size = (permutations, positions)
    if len(pairs) < len(labels) * (len(labels) - 1):
        return rng.permuted(np.broadcast_to(np.arange(len(pairs)), (*size, len(pairs))), axis=2).swapaxes(1, 2)
    place = {label: number for number, label in enumerate(labels)}
    number_of = np.zeros((len(labels), len(labels)), int)
    for number, (source, target) in enumerate(pairs):
        number_of[place[source], place[target]] = number
    renamed = rng.permuted(np.broadcast_to(np.arange(len(labels)), (*size, len(labels))), axis=2)
    sources = renamed[:, :, [place[source] for source, _ in pairs]]
    targets = renamed[:, :, [place[target] for _, target in pairs]]
    return number_of[sources, targets].swapaxes(1, 2)


def _squares(values: np.ndarray) -> np.ndarray:
    """Sums of squares (pair, position, interaction) of (..., pair, latent) values."""
    _, pairs, latents = (1, *values.shape[-2:])
    mean = values.mean((-2, -1), keepdims=True)
    pair = values.mean(-1, keepdims=True) - mean
    position = values.mean(-2, keepdims=True) - mean
    rest = values - mean - pair - position
    return np.stack(
        [latents * (pair**2).sum((-2, -1)), pairs * (position**2).sum((-2, -1)), (rest**2).sum((-2, -1))], axis=-1
    )


def variance_shares(trials: pd.DataFrame | Sequence[Family], settings: Settings | None = None) -> pd.DataFrame:
    """What the differences depend on: the pair, the position, their combination, or which prompts were drawn.

    Two-way sums of squares over the ordered pairs that were run at every latent (balanced, so they add up). Part of
    each is noise from the finite prompts; its expectation is the same sum of squares of the bootstrap deviations
    (which share prompts across cells, as the data do), and is taken off and shown as a share of its own.

    Returns:
        FAMILY, coefficient (> 0), term ("pair", "position", "interaction", "noise"), share (0..1, they sum to 1; all 0
        if no cell differs), sum_of_squares (raw; NaN for noise), df, f and f_p of the term against the interaction
        (`statsmodels`' two-way ANOVA without replication), sd (of all cells' differences), n_pairs, n_positions.
    """
    settings = settings or Settings()
    records = []
    for family in as_families(trials):
        weights = family.weights(settings)
        for grid in map(_Grid.complete, _grids(family)):
            pairs, positions = len(grid.pairs), len(grid.latents)
            if pairs < 2 or positions < 2:
                continue
            values = grid.differences(family)
            squares = _squares(values)
            deviations = grid.resampled(family, weights) - values
            expected = _squares(deviations).mean(0) * _few_clusters(family, grid)
            noise = np.minimum(expected, squares)
            total = squares.sum()
            shares = np.zeros(4) if total < 1e-20 else np.append(squares - noise, noise.sum()) / total
            free = np.array([pairs - 1, positions - 1, (pairs - 1) * (positions - 1)])
            for term, name in enumerate(("pair", "position", "interaction", "noise")):
                f = p = np.nan
                if term < 2 and squares[2] > 1e-20:
                    f = float((squares[term] / free[term]) / (squares[2] / free[2]))
                    p = float(scipy_stats.f.sf(f, free[term], free[2]))
                records.append(
                    family.name
                    | {"coefficient": grid.coefficient, "term": name, "share": float(shares[term])}
                    | {"sum_of_squares": float(squares[term]) if term < 3 else np.nan}
                    | {"df": int(free[term]) if term < 3 else 0, "f": f, "f_p": p, "sd": float(values.std())}
                    | {"n_pairs": pairs, "n_positions": positions}
                )
    columns = [*FAMILY, "coefficient", "term", "share", "sum_of_squares", "df", "f", "f_p", "sd"]
    return pd.DataFrame.from_records(records, columns=[*columns, "n_pairs", "n_positions"])


def _few_clusters(family: Family, grid: _Grid) -> float:
    """A bootstrap variance of a mean is too small by (k - 1) / k with k clusters."""
    k = int((family.counts[grid.rows.ravel()].sum(0) > 0).sum())
    return k / (k - 1) if k > 1 else 1.0


def sign_symmetry(cells: pd.DataFrame) -> pd.DataFrame:
    """Does a pair help with both signs? One row per unordered pair, latent and |c| that was run with both signs.

    Args:
        cells: from `cell_statistics`.

    Returns:
        FAMILY, source < target, coefficient (> 0), latent, difference and verdict at +c and at -c (`plus`, `minus`,
        `plus_verdict`, `minus_verdict`), `both_above` (both differences positive), `both_improve` (both verdicts).
    """
    keys = [*FAMILY, "source", "target", "latent"]
    unique = cells[~cells["mirrored"].astype(bool)] if len(cells) else cells
    columns = [*keys, "coefficient", "difference", "verdict"]
    plus = unique.loc[unique["coefficient"] > 0, columns]
    minus = unique.loc[unique["coefficient"] < 0, columns].assign(coefficient=lambda table: -table["coefficient"])
    both = plus.merge(minus, on=[*keys, "coefficient"], suffixes=("_plus", "_minus"))
    both = both.rename(
        columns={
            "difference_plus": "plus", "difference_minus": "minus",
            "verdict_plus": "plus_verdict", "verdict_minus": "minus_verdict",
        }
    )  # fmt: skip
    both["both_above"] = (both["plus"] > 0) & (both["minus"] > 0)
    both["both_improve"] = (both["plus_verdict"] == "improvement") & (both["minus_verdict"] == "improvement")
    return both.sort_values([*keys, "coefficient"], ignore_index=True)
