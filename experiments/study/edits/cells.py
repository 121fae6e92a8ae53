"""From paired trials to claims: the table of a sweep's cells and that of its controls.

What it does: `cell_statistics` gives one row per edit, with paired effects, clustered intervals, its random draws and
corrected p-values; `control_statistics` the level of the baseline and of every control. What a cell, a family, a
difference and a cluster are is said in pairing.py; how intervals and p-values are made, in experiments/statistics.

What it does not know: models, prompts' wording, files, figures (heatmaps.py), sentences (summary.py).

Intervals: bootstrap over clusters, the same weights for every cell of a family (statistics.clusters, the one rule).

p-values against the baseline, all two-sided:
    mcnemar_p   exact McNemar on the flips (gained against lost): prompts taken as independent.
    p           exact sign-flip test on cluster sums of (edited - unsteered): the distribution of sum(+-|s_j|) over all
                sign assignments, by convolution. Equals mcnemar_p when every cluster has one prompt.
    q           Benjamini-Hochberg over the family, from p.
    fwer_p      family-wise: step-down max-statistic (Westfall and Young 1993) over random sign flips of whole
                clusters, the same flips for every cell, statistic |sum s_j| / sqrt(sum s_j^2).

p-values against the random directions of the same cell (same pair, latent and |c|; same prompts):
    random_p    randomisation test, min(1, 2 min(1 + #draws at least as good, 1 + #draws at most as good) / (1 + D)):
                exact, but never below 2 / (1 + D).
    random_t_p  prediction test, t = (accuracy - mean of draws) / (s sqrt(1 + 1/D)) with D - 1 degrees of freedom, so
                that 20 draws can be informative; s is the larger of the spread of the cell's own draws and the
                spread pooled over the pairs at that latent and |c|, and never under half a prompt.

A cell is an improvement (harm) only if it is better (worse) than both the baseline and its random directions after
correction: BH over the family of max(p, random_t_p) is under alpha (hence q < alpha too), and random_p is under
max(alpha, 2 / (1 + D)), that is, with 20 draws the cell lies outside all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings, bootstrap_interval, expanded_percentile
from experiments.statistics.paired import (
    AgainstDraws,
    against_draws,
    benjamini_hochberg,
    max_statistic_p,
    mcnemar_p,
    sign_flip_p,
)
from experiments.study.edits.pairing import FAMILY, Family, as_families, mirror
from lm.terms import PAIR_CONTROLS, PATCH_CONTROLS

__all__ = ["CELL_COLUMNS", "cell_statistics", "control_statistics"]

CELL_COLUMNS = (
    *FAMILY, "source", "target", "coefficient", "latent", "n_latents", "control", "mirrored",
    "accuracy", "accuracy_lower", "accuracy_upper", "baseline", "difference", "lower", "upper",
    "gained", "lost", "n", "n_clusters", "unparsed", "applied_norm", "mcnemar_p", "p", "q", "fwer_p",
    *(f"{control}_{what}" for control in PAIR_CONTROLS
      for what in ("mean", "lower", "upper", "rank", "p", "t_p", "draws")),
    "over_random", "over_random_lower", "over_random_upper", "verdict_q", "verdict",
)  # fmt: skip


def _stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    kept = list(frames)
    filled = [frame for frame in kept if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else (kept[0] if kept else pd.DataFrame())


def cell_statistics(
    trials: pd.DataFrame | Sequence[Family], settings: Settings | None = None, *, mirrored: bool = True
) -> pd.DataFrame:
    """One row per direction cell: effect against the baseline and against the random directions, corrected.

    Args:
        trials: the trial table, or the result of `families` on it.
        mirrored: also give each cell under its other name (B, A, -c); such rows have `mirrored` True.

    Returns:
        CELL_COLUMNS. Accuracies, differences and their bounds are fractions. `gained`/`lost`: prompts that became
        right/wrong. `n`: prompts. `{control}_mean`: mean accuracy of the draws of that control for the cell;
        `_lower`, `_upper`: the central 95 % (`settings.level`) of the draws; `_rank`: place of the cell among the
        draws from the best, 1..draws + 1, half a place per tie; `_p`, `_t_p`: see the top of the module; NaN without
        draws. `over_random`: accuracy minus `random_mean`, with a clustered interval. q, fwer_p and verdict_q are
        corrected over the unique cells of the family (space, part, timing). `verdict`: "improvement", "harm", "none".
    """
    settings = settings or Settings()
    frames = [_family_cells(family, settings) for family in as_families(trials)]
    cells = _stack(frames)
    if cells.empty:
        return pd.DataFrame(columns=list(CELL_COLUMNS))
    if mirrored:
        before = len(cells)
        cells = mirror(cells)
        cells.loc[before:, "mirrored"] = True
    keys = [*FAMILY, "source", "target", "coefficient", "latent"]
    return cells[list(CELL_COLUMNS)].sort_values(keys, ignore_index=True)


def _family_cells(family: Family, settings: Settings) -> pd.DataFrame:
    rows = family.of("direction")
    cells = family.conditions.iloc[rows].reset_index(drop=True)
    for column, value in family.name.items():
        cells[column] = value
    cells["mirrored"] = False
    if cells.empty:
        return cells.reindex(columns=list(CELL_COLUMNS))
    weights = family.weights(settings)
    sums, counts = family.differences[rows], family.counts[rows]
    cells["lower"], cells["upper"] = bootstrap_interval(sums, counts, weights=weights, level=settings.level)
    cells["accuracy_lower"], cells["accuracy_upper"] = bootstrap_interval(
        family.correct[rows], counts, weights=weights, level=settings.level, bounds=(0.0, 1.0)
    )
    cells["mcnemar_p"] = mcnemar_p(cells["gained"].to_numpy(), cells["lost"].to_numpy())
    cells["p"] = sign_flip_p(sums)
    cells["q"] = benjamini_hochberg(cells["p"].to_numpy())
    cells["fwer_p"] = max_statistic_p(sums, permutations=settings.permutations, seed=settings.seed)
    for control in PAIR_CONTROLS:
        for column, values in vars(_against_draws(family, rows, control, settings)).items():
            cells[f"{control}_{column}"] = values
    over, lower, upper = _over_draws(family, rows, "random", weights, settings)
    cells["over_random"], cells["over_random_lower"], cells["over_random_upper"] = over, lower, upper
    cells["verdict_q"], cells["verdict"] = _verdicts(cells, settings.alpha)
    return cells


def _draw_groups(family: Family, rows: np.ndarray, control: str) -> list[np.ndarray]:
    """For each direction cell, the rows of its control draws: same pair (or draws pooled over pairs), latent, |c| and
    the same prompts."""
    columns = ["source", "target", "latent", "n_latents"]
    draws = family.of(control)
    table = family.conditions
    groups: dict[tuple, list[int]] = {}
    keys = zip(*(table[column].to_numpy()[draws] for column in columns), strict=True)
    for row, key, size in zip(draws, keys, table["coefficient"].to_numpy()[draws], strict=True):
        groups.setdefault((*key, round(float(size), 9)), []).append(row)
    found = []
    keys = zip(*(table[column].to_numpy()[rows] for column in columns), strict=True)
    for row, key, size in zip(rows, keys, table["coefficient"].to_numpy()[rows], strict=True):
        size = round(abs(float(size)), 9)
        shared = (0, 0, *key[2:], size)  # pooled draws belong to no pair: they serve those without own ones
        members = np.array(groups.get((*key, size)) or groups.get(shared, []), int)
        found.append(members[family.prompts_key[members] == family.prompts_key[row]])
    return found


def _against_draws(family: Family, rows: np.ndarray, control: str, settings: Settings) -> AgainstDraws:
    """Direction cells beside their draws; the spread is pooled over the pairs at one latent and |c|."""
    table = family.conditions
    accuracy = table["accuracy"].to_numpy()
    groups = _draw_groups(family, rows, control)
    pools = [
        (int(latent), int(n), round(abs(float(size)), 9))
        for latent, n, size in table.iloc[rows][["latent", "n_latents", "coefficient"]].itertuples(index=False)
    ]
    return against_draws(
        accuracy[rows],
        [accuracy[group] for group in groups],
        table["n"].to_numpy()[rows],
        pools=pools,
        sets=[int(group[0]) if len(group) else -1 for group in groups],  # +c and -c share their draws
        level=settings.level,
    )


def _over_draws(
    family: Family, rows: np.ndarray, control: str, weights: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy minus the mean accuracy of the control draws, with a clustered interval; NaN without draws."""
    groups = _draw_groups(family, rows, control)
    estimate, lower, upper = (np.full(len(rows), np.nan) for _ in range(3))
    have = np.array([cell for cell, group in enumerate(groups) if len(group)], int)
    if have.size:
        level = np.stack([family.correct[groups[cell]].mean(0) for cell in have])
        sums, counts = family.correct[rows[have]] - level, family.counts[rows[have]]
        estimate[have] = sums.sum(1) / counts.sum(1)
        lower[have], upper[have] = bootstrap_interval(sums, counts, weights=weights, level=settings.level)
    return estimate, lower, upper


def _verdicts(cells: pd.DataFrame, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Beats both: the larger p of the two comparisons is a p-value of "no better than one of them"; BH over those."""
    both = np.fmax(cells["p"].to_numpy(), cells["random_t_p"].to_numpy())
    both[cells["random_t_p"].isna()] = 1.0  # nothing to beat, no claim
    verdict_q = benjamini_hochberg(both)
    floor = 2 / (1 + cells["random_draws"].to_numpy())
    counted = (verdict_q < alpha) & (cells["random_p"].to_numpy() <= np.maximum(alpha, floor) + 1e-12)
    up = (cells["difference"] > 0) & (cells["accuracy"] > cells["random_mean"])
    down = (cells["difference"] < 0) & (cells["accuracy"] < cells["random_mean"])
    verdict = np.where(counted & up, "improvement", np.where(counted & down, "harm", "none"))
    return np.where(cells["random_t_p"].isna(), np.nan, verdict_q), verdict


def control_statistics(trials: pd.DataFrame | Sequence[Family], settings: Settings | None = None) -> pd.DataFrame:
    """Level of the baseline and of every control, per latent and |coefficient|, over all pairs and draws.

    Returns:
        FAMILY, control ("none" = the unsteered run), latent, coefficient (0 where it has none), accuracy and
        difference from the baseline with intervals that resample clusters and draws independently, `draw_lower` and
        `draw_upper` (the central 95 % of the accuracies of single draws: what one random direction does), n_draws
        (over all pairs), n (prompts), n_clusters, unparsed (share of answers, a fraction), applied_norm (mean).
    """
    settings = settings or Settings()
    records = []
    for family in as_families(trials):
        weights = family.weights(settings)
        records += [family.name | record for record in _baseline_records(family, weights, settings)]
        table = family.conditions
        chosen = table[table["control"].isin((*PAIR_CONTROLS, *PATCH_CONTROLS))]
        for (control, latent, size), group in chosen.groupby(["control", "latent", "coefficient"], sort=True):
            record = {"control": control, "latent": latent, "coefficient": size}
            rows = group.index.to_numpy()
            records.append(family.name | record | _control_record(family, rows, weights, settings))
    return pd.DataFrame.from_records(records)


def _baseline_records(family: Family, weights: np.ndarray, settings: Settings) -> list[dict[str, Any]]:
    """The unsteered run at each latent, over all prompts of any condition there."""
    records = []
    table = family.conditions
    for latent in sorted(table["latent"].unique()):
        rows = np.flatnonzero(table["latent"].to_numpy() == latent)
        rows = rows[[int(family.counts[rows].sum(1).argmax())]]  # the condition that saw most prompts
        sums, counts = family.baseline_correct[rows], family.counts[rows]
        lower, upper = bootstrap_interval(sums, counts, weights=weights, level=settings.level, bounds=(0.0, 1.0))
        accuracy = float(sums.sum() / counts.sum())
        records.append(
            {
                "control": "none",
                "latent": int(latent),
                "coefficient": 0.0,
                "accuracy": accuracy,
                "accuracy_lower": float(lower[0]),
                "accuracy_upper": float(upper[0]),
                "difference": 0.0,
                "lower": 0.0,
                "upper": 0.0,
                "draw_lower": accuracy,
                "draw_upper": accuracy,
                "n_draws": 1,
                "n": int(counts.sum()),
                "n_clusters": int((counts > 0).sum()),
                "unparsed": np.nan,
                "applied_norm": 0.0,
            }
        )
    return records


def _control_record(family: Family, rows: np.ndarray, weights: np.ndarray, settings: Settings) -> dict[str, Any]:
    group = family.conditions.iloc[rows]
    number = len(rows)
    rng = np.random.default_rng([settings.seed, 2])
    per_draw = rng.multinomial(number, np.full(number, 1 / number), size=len(weights)).astype(float)
    trials = (per_draw @ family.counts[rows] * weights).sum(1)
    n_clusters = int((family.counts[rows].sum(0) > 0).sum())
    record: dict[str, Any] = {}
    for name, sums, bounds in (
        ("accuracy", family.correct[rows], (0.0, 1.0)),
        ("difference", family.differences[rows], (-1.0, 1.0)),
    ):
        plain = sums.sum() / family.counts[rows].sum()
        totals = (per_draw @ sums * weights).sum(1)
        resampled = np.where(trials > 0, totals / np.where(trials > 0, trials, 1), plain)
        lower, upper = expanded_percentile(resampled[:, None], n_clusters, settings.level, bounds)
        prefix = "accuracy_" if name == "accuracy" else ""
        record |= {name: float(plain), f"{prefix}lower": float(lower[0]), f"{prefix}upper": float(upper[0])}
    tail = (1 - settings.level) / 2
    low, high = np.quantile(group["accuracy"], [tail, 1 - tail])
    return record | {
        "draw_lower": float(low), "draw_upper": float(high), "n_draws": number, "n": int(group["n"].max()),
        "n_clusters": n_clusters, "unparsed": float(group["unparsed"].sum() / group["n"].sum()),
        "applied_norm": float(group["applied_norm"].mean()),
    }  # fmt: skip
