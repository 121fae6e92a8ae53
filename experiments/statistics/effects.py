"""From a trial table to effects: the mean of an outcome in every condition, and paired differences between conditions.

A trial table has one row per prompt, condition and draw. A *condition* is what the columns in `by` say, each with its
own type (kind "mean", latent 3): no text that is put together and taken apart again. What does not apply to a condition
has a fixed value (`absent`): the empty word, latent, source and target 0, draw, layer and step -1, any other number 0.
So a contrast names only the columns that matter, and "none" is one condition, not one per latent.

Draws of a prompt are averaged first; prompts of a cluster stand or fall together (see `clusters`). A prompt counts in a
comparison if both of its conditions have it. `per_prompt` and `differences` are what tables are made of, prompt by
prompt, for whoever judges several numbers together. `beyond` tells which effects are not only there but matter.

Knows nothing about files, models, or what a condition means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api import types

from experiments.statistics.clusters import Settings, cluster_codes, cluster_interval, cluster_sums
from experiments.statistics.paired import benjamini_hochberg, max_statistic_p, mcnemar_p, sign_flip_p
from experiments.statistics.sizes import Smallest, smallest_size

__all__ = [
    "Bounds",
    "Selector",
    "absent",
    "beyond",
    "compare",
    "differences",
    "levels",
    "per_prompt",
    "reach",
    "row_of",
    "rows_of",
]

Selector = Mapping[str, Any]
"""Column -> value: the rows that have these values."""
Bounds = tuple[float, float]
"""Lowest and highest value that an outcome can have; infinite where there is none."""

_ABSENT = {"latent": 0, "source": 0, "target": 0, "draw": -1, "layer": -1, "step": -1}
_NUMBERS = ("n", "n_clusters", "mean")
_EFFECTS = (*_NUMBERS, "reference_mean", "difference", "lower", "upper", "gained", "lost", "mcnemar_p", "p", "q",
            "fwer_p")  # fmt: skip


def absent(column: str, values: pd.Series) -> Any:
    """What stands in a column of a trial table where it does not apply: see the top of the module."""
    if column in _ABSENT:
        return _ABSENT[column]
    return 0 if types.is_numeric_dtype(values.dtype) else ""


class _Conditions:
    """The conditions of a trial table, and the mean of the outcome over draws for every prompt in each of them.

    `keys` has one row per condition, sorted; `values` is (prompt, condition), NaN where a prompt is not there;
    `prompts` is the index (cluster, prompt_id) of its rows.
    """

    def __init__(self, trials: pd.DataFrame, by: Sequence[str], outcome: str) -> None:
        self.by = list(by)
        lacking = [name for name in (*self.by, "cluster", "prompt_id", outcome) if name not in trials]
        if lacking or not self.by:
            raise ValueError(f"the trials lack the columns {', '.join(lacking) or 'that name a condition'}")
        holes = [name for name in self.by if trials[name].isna().any()]
        if holes:
            raise ValueError(f"the trials have missing values in {', '.join(holes)}")
        grouped = trials.groupby(self.by, observed=True, sort=True)
        self.keys = grouped.size().index.to_frame(index=False)
        long = trials[["cluster", "prompt_id"]].assign(
            condition=grouped.ngroup().to_numpy(), outcome=trials[outcome].astype(float).to_numpy()
        )
        means = long.groupby(["cluster", "prompt_id", "condition"], observed=True, sort=True)["outcome"].mean()
        table = means.unstack()
        self.values, self.prompts = table.to_numpy(float), table.index
        self.codes, self.clusters = cluster_codes(table.index.get_level_values("cluster"))
        self._absent = {name: absent(name, trials[name]) for name in self.by}
        self._place = {key: place for place, key in enumerate(self.keys.itertuples(index=False, name=None))}

    def key(self, chosen: Selector) -> tuple[Any, ...]:
        """The values of every column of a condition that is named by some of them."""
        unknown = [name for name in chosen if name not in self.by]
        if unknown:
            raise ValueError(f"a condition is named by {', '.join(self.by)}, got {', '.join(unknown)}")
        return tuple(chosen.get(name, self._absent[name]) for name in self.by)

    def of(self, chosen: Selector) -> np.ndarray:
        """(prompt,) values in the condition."""
        key = self.key(chosen)
        if key not in self._place:
            raise ValueError(f"the trials have no {self.name(key)}")
        return self.values[:, self._place[key]]

    def name(self, key: tuple[Any, ...]) -> str:
        """A condition for a message."""
        return ", ".join(f"{column} {value!r}" for column, value in zip(self.by, key, strict=True))


def _range(values: pd.Series, bounds: Bounds | None) -> Bounds:
    """The range of an outcome: as given, else 0..1 for truth values and none for other numbers."""
    if bounds is not None:
        return bounds
    known = values.dropna()
    return (0.0, 1.0) if known.astype(float).isin((0.0, 1.0)).all() else (-np.inf, np.inf)


def levels(
    trials: pd.DataFrame,
    by: Sequence[str],
    outcome: str = "correct",
    settings: Settings | None = None,
    bounds: Bounds | None = None,
) -> pd.DataFrame:
    """Mean of an outcome in every condition, with its interval.

    Args:
        trials: with the columns of `by`, prompt_id, cluster and the outcome (bool or number); draws of a prompt are
            averaged first.
        by: columns that name a condition.
        outcome: column.
        settings: resamples, level, seed.
        bounds: range of the outcome; None: 0..1 for truth values, none for other numbers.

    Returns:
        One row per condition, sorted: the columns of `by`, n (prompts), n_clusters, mean, lower, upper (bootstrap over
        clusters, exact where all clusters agree).

    Raises:
        ValueError: a column that is not there, or a missing value in a column of `by`.
    """
    settings = settings or Settings()
    found = _Conditions(trials, by, outcome)
    sums, counts = cluster_sums(found.values, found.codes, len(found.clusters))
    weights = settings.weights(len(found.clusters))
    lower, upper = cluster_interval(
        sums, counts, weights=weights, level=settings.level, bounds=_range(trials[outcome], bounds)
    )
    return found.keys.assign(
        n=counts.sum(1).astype(int),
        n_clusters=(counts > 0).sum(1),
        mean=sums.sum(1) / np.maximum(counts.sum(1), 1),
        lower=lower,
        upper=upper,
    )


def compare(
    trials: pd.DataFrame,
    contrasts: Sequence[tuple[Selector, Selector]],
    by: Sequence[str],
    outcome: str = "correct",
    settings: Settings | None = None,
    bounds: Bounds | None = None,
) -> pd.DataFrame:
    """Paired differences between conditions, over the prompts that both have; all contrasts are one family.

    Args:
        trials: as in `levels`.
        contrasts: (condition, reference) pairs; a column of `by` that is not named is one that does not apply.
        by: columns that name a condition.
        outcome: column, bool or number.
        settings: resamples, permutations, level, seed.
        bounds: range of the outcome, as in `levels`.

    Returns:
        One row per contrast: the columns of `by`, the same of the reference as reference_<column>, n, n_clusters, mean,
        reference_mean, difference, lower, upper (bootstrap over clusters, exact where all clusters agree), gained and
        lost (prompts above and below the reference), mcnemar_p (prompts taken as independent; NaN if an outcome is no
        truth value or has several draws), p (sign flips of whole clusters: exact for truth values, else by
        `permutations` random flips), q (Benjamini-Hochberg over the contrasts), fwer_p (step-down max-statistic over
        them).

    Raises:
        ValueError: a condition that the trials do not have, a column outside `by`, or no prompt in common.
    """
    settings = settings or Settings()
    names = [*by, *(f"reference_{column}" for column in by)]
    if not contrasts:
        return pd.DataFrame({column: [] for column in (*names, *_EFFECTS)})
    found = _Conditions(trials, by, outcome)
    pairs = [(found.of(condition), found.of(reference)) for condition, reference in contrasts]
    keys = [(found.key(condition), found.key(reference)) for condition, reference in contrasts]
    both = [~np.isnan(a) & ~np.isnan(b) for a, b in pairs]
    for (a, b), known in zip(keys, both, strict=True):
        if not known.any():
            raise ValueError(f"{found.name(a)} and {found.name(b)} have no prompt in common")
    values = np.stack([np.where(known, a - b, np.nan) for (a, b), known in zip(pairs, both, strict=True)], axis=1)
    means = np.array([(a[known].mean(), b[known].mean()) for (a, b), known in zip(pairs, both, strict=True)])
    named = {column: [key[i] for key, _ in keys] for i, column in enumerate(by)}
    named |= {f"reference_{column}": [key[i] for _, key in keys] for i, column in enumerate(by)}
    span = _range(trials[outcome], bounds)
    return pd.DataFrame(named | _effects(values, found.codes, len(found.clusters), means, settings, span))


def _effects(
    values: np.ndarray, codes: np.ndarray, n_clusters: int, means: np.ndarray, settings: Settings, span: Bounds
) -> dict[str, np.ndarray]:
    """The columns _EFFECTS from (prompt, contrast) differences, NaN where a prompt does not count, (contrast, 2) means
    of condition and reference, and the range of the outcome."""
    sums, counts = cluster_sums(values, codes, n_clusters)
    weights = settings.weights(n_clusters)
    low, high = (bound - means[:, 1] for bound in span)  # what the reference leaves room for
    lower, upper = cluster_interval(sums, counts, weights=weights, level=settings.level, bounds=(low, high))
    gained, lost = (np.nan_to_num(values) > 1e-12).sum(0), (np.nan_to_num(values) < -1e-12).sum(0)
    whole = np.array([np.isin(np.abs(column[~np.isnan(column)]), (0.0, 1.0)).all() for column in values.T])
    p = np.ones(len(sums))
    for i, row in enumerate(sums):
        if whole[i]:
            p[i] = sign_flip_p(np.rint(row).astype(int)[None])[0]
        else:
            p[i] = max_statistic_p(row[None], permutations=settings.permutations, seed=settings.seed)[0]
    columns = (
        counts.sum(1).astype(int), (counts > 0).sum(1), means[:, 0], means[:, 1], sums.sum(1) / counts.sum(1), lower,
        upper, gained, lost, np.where(whole, mcnemar_p(gained, lost), np.nan), p, benjamini_hochberg(p),
        max_statistic_p(sums, permutations=settings.permutations, seed=settings.seed),
    )  # fmt: skip
    return dict(zip(_EFFECTS, columns, strict=True))


# --- Prompt by prompt -------------------------------------------------------------------------------------------------


def per_prompt(
    trials: pd.DataFrame, conditions: Sequence[Selector], by: Sequence[str], outcome: str = "correct"
) -> pd.DataFrame:
    """Means over draws of every prompt in some conditions.

    Args:
        trials, by, outcome: as in `levels`.
        conditions: a column of `by` that is not named is one that does not apply.

    Returns:
        (prompt × condition) with the index (cluster, prompt_id), columns 0, 1, …; NaN where a prompt is not there.

    Raises:
        ValueError: a condition that the trials do not have.
    """
    found = _Conditions(trials, by, outcome)
    columns = {place: found.of(condition) for place, condition in enumerate(conditions)}
    return pd.DataFrame(columns, index=found.prompts)


def differences(
    trials: pd.DataFrame, contrasts: Sequence[tuple[Selector, Selector]], by: Sequence[str], outcome: str = "correct"
) -> pd.DataFrame:
    """Paired differences of every prompt, one column per contrast; arguments as for `compare`, result as for
    `per_prompt`."""
    first, second = (per_prompt(trials, [pair[side] for pair in contrasts], by, outcome) for side in (0, 1))
    return first - second


# --- Which effects matter ---------------------------------------------------------------------------------------------


def beyond(table: pd.DataFrame, size: float, alpha: float = 0.05, name: str = "difference") -> np.ndarray:
    """(row,) bool: the effect survives correction (q < alpha), and its whole interval lies beyond the size that
    matters, on the side of the estimate.

    Args:
        table: with the columns name, lower, upper and q.
        size: smallest effect that matters, 0 or more, in the unit of the effect (see `sizes`).
        alpha: false discovery rate.
        name: column of the estimate.
    """
    up = table[name].to_numpy(float) > 0
    outside = np.where(up, table["lower"].to_numpy(float) > size, table["upper"].to_numpy(float) < -size)
    return outside & (table["q"].to_numpy(float) < alpha)


def size_of(
    trials: pd.DataFrame,
    contrasts: Sequence[tuple[Selector, Selector]],
    by: Sequence[str],
    outcome: str = "correct",
    settings: Settings | None = None,
) -> Smallest:
    """The smallest size that matters of some paired differences, from what the wording of a prompt makes of them.

    Args:
        trials: as for `compare`, with the form of each prompt in the column template ("" or one each: no forms).
        contrasts, by, outcome, settings: as for `compare`; all contrasts share one size.
    """
    wide = differences(trials, contrasts, by, outcome)
    forms = trials.drop_duplicates("prompt_id").set_index("prompt_id")["template"]
    names = wide.index.get_level_values("prompt_id")
    clusters = wide.index.get_level_values("cluster").to_numpy()
    return smallest_size(wide.to_numpy(), clusters, forms.reindex(names).to_numpy(), seed=(settings or Settings()).seed)


def weighed(
    trials: pd.DataFrame,
    contrasts: Sequence[tuple[Selector, Selector]],
    by: Sequence[str],
    outcome: str = "correct",
    settings: Settings | None = None,
    bounds: Bounds | None = None,
    of: Sequence[tuple[Selector, Selector]] | None = None,
) -> tuple[pd.DataFrame, Smallest]:
    """`compare`, with a column `matters`: significant, and larger than wording makes of it (`beyond` `size_of`).

    Args:
        trials, contrasts, by, outcome, settings, bounds: as for `compare` and `size_of`.
        of: contrasts that the size is read from; None: all.
    """
    settings = settings or Settings()
    table = compare(trials, contrasts, by, outcome, settings, bounds)
    size = size_of(trials, contrasts if of is None else of, by, outcome, settings)
    return table.assign(matters=beyond(table, size.size, settings.alpha)), size


# --- Rows of a table --------------------------------------------------------------------------------------------------


def row_of(table: pd.DataFrame, condition: Selector, reference: Selector | None = None) -> dict[str, Any]:
    """The one row of a table of `levels` or `compare` with these values.

    Args:
        table: rows.
        condition: column -> value; other columns may have any value.
        reference: the same for the columns reference_<column>.

    Raises:
        ValueError: a column that the table does not have, no such row, or several.
    """
    chosen = dict(condition) | {f"reference_{column}": value for column, value in (reference or {}).items()}
    unknown = [column for column in chosen if column not in table]
    if unknown:
        raise ValueError(f"the table has no column {', '.join(unknown)}; it has {', '.join(map(str, table.columns))}")
    here = np.ones(len(table), bool)
    for column, value in chosen.items():
        here &= (table[column] == value).to_numpy(bool)
    if here.sum() != 1:
        wanted = ", ".join(f"{column} {value!r}" for column, value in chosen.items())
        raise ValueError(f"one row must have {wanted}, got {here.sum()}")
    return {str(key): value for key, value in table[here].iloc[0].items()}


def rows_of(table: pd.DataFrame, conditions: Sequence[Selector], reference: Selector | None = None) -> pd.DataFrame:
    """The rows with these values, one per selector, in that order; see `row_of`."""
    return pd.DataFrame([row_of(table, condition, reference) for condition in conditions])


def reach(row: Mapping[str, Any] | pd.Series, name: str = "difference") -> float:
    """The smallest effect that could have been told from none: how far the interval of a row reaches from its estimate,
    on the wider side; infinite if it has no end.

    Args:
        row: with the columns name, lower and upper.
        name: column of the estimate.
    """
    return float(max(row[name] - row["lower"], row["upper"] - row[name]))
