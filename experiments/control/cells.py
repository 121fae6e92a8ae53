"""From trials to tables: every cell against the unsteered model and beside its random directions, and what is chosen.

`effects` has one row per method, layer, alpha and outcome; `cells` one per method, layer and alpha, with the rule of
the paper in columns of its own:

    coherent        accuracy and p_right rise and entropy falls (estimates)
    coherent_shown  the same, each with q < 0.05 over all cells

`choose` looks at validation trials only. Ties in accuracy go to the larger p_right, then to the smaller |alpha|.
Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.control.trials import BY, OUTCOMES, UNSTEERED
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Bounds, compare, levels

__all__ = ["Choice", "cells", "choose", "choose_both", "effects", "measured_outcomes", "validation_table"]

NAMES = ("method", "layer", "alpha")
_BOUNDS: dict[str, Bounds] = {"kl": (0.0, np.inf), "entropy": (0.0, np.inf)}


def measured_outcomes(trials: pd.DataFrame) -> list[str]:
    """Outcomes that the vectors' rows have numbers of."""
    own = trials[trials["kind"] == "vector"]
    return [name for name in OUTCOMES if own[name].notna().any()]


def effects(
    trials: pd.DataFrame,
    settings: Settings,
    reference: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda one: UNSTEERED,
) -> pd.DataFrame:
    """Every vector at every layer and alpha, per outcome; a family of comparisons is one outcome's cells but alpha 0.

    Args:
        trials: of the reported items.
        settings: resamples, permutations, level, seed.
        reference: from a vector's condition to the unsteered one of the same items.

    Returns:
        NAMES, outcome, n, n_clusters, mean with mean_lower and mean_upper, reference_mean (unsteered), difference with
        lower and upper, p, q, fwer_p; of the random directions random_mean, random_lower and random_upper (central
        share of single draws, by level), draws, p_above and p_below ((1 + draws at least as high, as low) / (1 + D));
        of shuffled pairs shuffled_mean. NaN where there are none (alpha 0).
    """
    vectors = trials[trials["kind"].isin(("none", "vector"))]
    moved = (vectors["kind"] == "vector") & (vectors["alpha"] != 0)
    named = vectors.loc[moved, list(BY)].drop_duplicates().sort_values(list(BY))
    wanted = [dict(zip(BY, one, strict=True)) for one in named.itertuples(index=False, name=None)]
    frames = []
    for outcome in measured_outcomes(trials):
        bounds = _BOUNDS.get(outcome, (0.0, 1.0))
        known = vectors.dropna(subset=[outcome])
        table = compare(known, [(one, reference(one)) for one in wanted], BY, outcome, settings, bounds)
        level = levels(known[known["kind"] == "vector"], BY, outcome, settings, bounds).set_index(list(NAMES))
        table = table[[*NAMES, "n", "n_clusters", "mean", "reference_mean", "difference", "lower", "upper", "p", "q",
                       "fwer_p"]]  # fmt: skip
        table = pd.concat([table, _unmoved(level)], ignore_index=True).sort_values(list(NAMES), ignore_index=True)
        table = table.join(level[["lower", "upper"]].add_prefix("mean_"), on=list(NAMES))
        frames.append(_beside(table, trials, outcome, settings.level).assign(outcome=outcome))
    return pd.concat(frames, ignore_index=True)


def _unmoved(level: pd.DataFrame) -> pd.DataFrame:
    """Rows of alpha 0, the unsteered model itself: no change, and nothing to be tested."""
    rows = level.reset_index()
    rows = rows[rows["alpha"] == 0][[*NAMES, "n", "n_clusters", "mean"]]
    return rows.assign(reference_mean=rows["mean"], difference=0.0, lower=0.0, upper=0.0, p=1.0, q=1.0, fwer_p=1.0)


def _beside(table: pd.DataFrame, trials: pd.DataFrame, outcome: str, level: float) -> pd.DataFrame:
    """The same with the columns of random directions and shuffled pairs of the same method, layer and |alpha|."""
    keys = [*NAMES, "draw"]
    controls = {
        kind: trials[trials["kind"] == kind].groupby(keys, observed=True)[outcome].mean().dropna()
        for kind in ("random", "shuffled")
    }
    groups = {kind: dict(iter(means.groupby(level=list(NAMES)))) for kind, means in controls.items()}
    rows = []
    tail = (1 - level) / 2
    for method, layer, alpha, mean in table[[*NAMES, "mean"]].itertuples(index=False, name=None):
        place = (method, layer, abs(alpha))
        draws = groups["random"].get(place, pd.Series(dtype=float)).to_numpy(float)
        shuffled = groups["shuffled"].get(place, pd.Series(dtype=float)).to_numpy(float)
        number = len(draws)
        row = {"draws": number, "shuffled_mean": shuffled.mean() if len(shuffled) else np.nan}
        if number:
            row |= {
                "random_mean": draws.mean(),
                "random_lower": np.quantile(draws, tail),
                "random_upper": np.quantile(draws, 1 - tail),
                "p_above": (1 + (draws >= mean - 1e-12).sum()) / (1 + number),
                "p_below": (1 + (draws <= mean + 1e-12).sum()) / (1 + number),
            }
        rows.append(row)
    columns = ["random_mean", "random_lower", "random_upper", "p_above", "p_below", "draws", "shuffled_mean"]
    return pd.concat([table.reset_index(drop=True), pd.DataFrame(rows).reindex(columns=columns)], axis=1)


def cells(found: pd.DataFrame, trials: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """One row per method, layer and alpha: the means of every outcome, and whether it is coherent.

    Args:
        found: `effects`.
        trials: the same trials.
        alpha: level of q.
    """
    by = list(NAMES)
    wide = found.pivot(index=by, columns="outcome")
    own = trials[trials["kind"] == "vector"].groupby(by, observed=True)
    table = pd.DataFrame(index=wide.index)
    table["norm"], table["coefficient"] = own["norm"].first(), own["coefficient"].first()
    for outcome in found["outcome"].unique():
        table[outcome] = wide["mean", outcome]
    table["change"] = wide["difference", "correct"]
    risen = {name: wide["difference", name] > 0 for name in ("correct", "p_right")}
    risen["entropy"] = wide["difference", "entropy"] < 0
    shown = {name: side & (wide["q", name] < alpha) for name, side in risen.items()}
    table["coherent"] = risen["correct"] & risen["p_right"] & risen["entropy"]
    table["coherent_shown"] = shown["correct"] & shown["p_right"] & shown["entropy"]
    return table.reset_index()


# --- Choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A cell that was chosen on validation items.

    Attributes:
        method, layer, alpha: which.
        accuracy, baseline: on the validation items, of it and of the unsteered model.
        tied: other cells with the same accuracy.
    """

    method: str
    layer: int
    alpha: float
    accuracy: float
    baseline: float
    tied: int

    @property
    def selector(self) -> dict[str, object]:
        """The condition of the trial table."""
        return {"kind": "vector", "method": self.method, "layer": self.layer, "alpha": self.alpha}

    @property
    def mirror(self) -> dict[str, object]:
        """The same with the other sign."""
        return {**self.selector, "alpha": -self.alpha}


def validation_table(trials: pd.DataFrame) -> pd.DataFrame:
    """Means of every vector cell on the validation items: NAMES, correct, p_right, kl, entropy, n."""
    own = trials[(trials["kind"] == "vector") & (trials["alpha"] != 0)]
    grouped = own.groupby(list(NAMES), observed=True)
    table = grouped[["correct", "p_right", "kl", "entropy"]].mean().assign(n=grouped["prompt_id"].nunique())
    plain = trials[trials["kind"] == "none"]
    return table.assign(baseline=plain["correct"].mean()).reset_index()


def choose(table: pd.DataFrame, methods: Sequence[str] | None = None, layers: Sequence[int] | None = None) -> Choice:
    """The best cell on the validation items.

    Args:
        table: `validation_table`.
        methods, layers: among which; None: all.
    """
    kept = table[table["method"].isin(methods)] if methods is not None else table
    kept = kept[kept["layer"].isin(layers)] if layers is not None else kept
    assert len(kept), "no cell to choose from"
    best = _best(kept, ["correct", "p_right"])
    tied = int((kept["correct"] >= best["correct"] - 1e-12).sum()) - 1
    return Choice(
        str(best["method"]), int(best["layer"]), float(best["alpha"]), float(best["correct"]), float(best["baseline"]),
        tied,
    )  # fmt: skip


def choose_both(table: pd.DataFrame) -> Choice | None:
    """The |alpha| whose worse sign is best; None where no alpha has its opposite."""
    flipped = table.assign(alpha=-table["alpha"]).set_index(list(NAMES))[["correct", "p_right"]]
    joined = table.join(flipped.add_suffix("_other"), on=list(NAMES), how="inner")
    joined = joined[joined["alpha"] > 0]
    if joined.empty:
        return None
    worse = joined.assign(
        correct=joined[["correct", "correct_other"]].min(axis=1),
        p_right=joined[["p_right", "p_right_other"]].min(axis=1),
    )
    return choose(worse)


def _best(table: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    size = table["alpha"].abs()
    ordered = table.assign(size=size).sort_values([*by, "size"], ascending=[*(False for _ in by), True], kind="stable")
    return ordered.iloc[0]
