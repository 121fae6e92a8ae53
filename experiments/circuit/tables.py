"""Tables of `codi circuit` about heads that are patched or silenced: predictions, effects, chosen heads, circuits.

From trial tables alone; intervals resample items. Knows nothing about models or words. The other tables are in
tables_traced.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics.clusters import (
    Settings,
    accuracy_interval,
    bootstrap_interval,
    cluster_codes,
    cluster_sums,
    interval_of,
    mean_intervals,
)
from experiments.statistics.paired import max_statistic_p

__all__ = ["NAMED", "chosen_table", "circuit_table", "effect_table", "kept_table", "means_by", "prediction_table"]

NAMED = 5
"""Heads of a subtask that are named, and chosen on half of the items."""
_EFFECT_COLUMNS = ("subtask", "kind", "block", "head", "effect", "lower", "upper", "p", "n")


def means_by(
    trials: pd.DataFrame, by: Sequence[str], value: str, settings: Settings, *,
    cluster: str = "item", bounds: tuple[float, float] = (0.0, 1.0), exact: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Mean of a column for every combination of some columns, with its interval over clusters.

    Args:
        trials: rows; several rows of one cluster are averaged with the weight that they have.
        by: columns.
        value: column that is averaged.
        settings: resamples, level, seed.
        cluster: column of what is independent.
        bounds: the whole range of the mean.
        exact: exact bounds where all clusters agree; no: the bootstrap's, for numbers that never agree but may all be
            next to nothing.

    Returns:
        One row per combination: `by`, mean, lower, upper, n (rows), n_clusters. NaN bounds with one cluster.
    """
    rows = []
    for key, part in trials.groupby(list(by), observed=True, sort=True):
        found = mean_intervals(part[[value]].to_numpy(float), part[cluster].to_numpy(), settings, bounds=bounds).iloc[0]
        row: dict[str, Any] = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        row |= {name: found[name] for name in ("mean", "lower", "upper")}
        row |= {"n": int(found["n"]), "n_clusters": int(found["n_clusters"])}
        if not exact or row["n_clusters"] < 2:
            codes, names = cluster_codes(part[cluster].to_numpy())
            sums, counts = cluster_sums(part[[value]].to_numpy(float), codes, len(names))
            lower, upper = bootstrap_interval(sums, counts, weights=settings.weights(len(names)), level=settings.level,
                                              bounds=(np.nan, np.nan))  # fmt: skip
            row |= {"lower": lower[0], "upper": upper[0]}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*by, "mean", "lower", "upper", "n", "n_clusters"])


# --- Predictions and effects ------------------------------------------------------------------------------------------


def prediction_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row per subtask: share of items whose word is the most probable one, with its interval over items."""
    rows = []
    for (subtask, kind), part in trials.groupby(["subtask", "kind"], observed=True, sort=True):
        found = accuracy_interval(
            part["right"].to_numpy(), part["item"].to_numpy(), resamples=settings.resamples, level=settings.level,
            seed=settings.seed,
        )  # fmt: skip
        rows.append(
            {
                "subtask": subtask, "kind": kind, "mean": found.estimate, "lower": found.lower, "upper": found.upper,
                "n": found.n, "n_right": int(part["right"].sum()), "probability": part["probability"].mean(),
                "tokens_run": part["tokens_run"].mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def effect_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row per subtask and head: E, ratio of means over items, with a bootstrap interval over items.

    The interval is that of one head (NaN where fewer than two items are right). p: of no recovery at all, by random
    sign flips of whole items, corrected over all heads and subtasks together (step-down maximum).
    """
    found, gains_of = [], []
    groups: Any = trials.groupby(["subtask", "kind"], observed=True, sort=True)
    items = sorted(trials["item"].unique())
    for (subtask, kind), part in groups:
        gains = part.assign(gain=part["kl_corrupted"] - part["kl"])
        wide = gains.pivot(index=["block", "head"], columns="item", values="gain")
        whole = gains.pivot(index=["block", "head"], columns="item", values="kl_corrupted")
        sums, counts = wide.to_numpy(), whole.to_numpy()
        lower, upper = bootstrap_interval(
            sums, counts, weights=settings.weights(wide.shape[1]), level=settings.level, bounds=(np.nan, np.nan)
        )
        table = wide.index.to_frame(index=False)
        table.insert(0, "subtask", subtask)
        table.insert(1, "kind", kind)
        found.append(table.assign(effect=sums.sum(1) / counts.sum(1), lower=lower, upper=upper, n=wide.shape[1]))
        gains_of.append((wide / whole).reindex(columns=items, fill_value=0.0).fillna(0.0).to_numpy())
    if not found:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in _EFFECT_COLUMNS})
    p = max_statistic_p(np.concatenate(gains_of), permutations=settings.permutations, seed=settings.seed)
    return pd.concat(found, ignore_index=True).assign(p=p)[list(_EFFECT_COLUMNS)]


def chosen_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """What the strongest heads recover on items that they were not chosen on, beside heads taken at random.

    The items of a subtask are halved; the `NAMED` heads with the largest E on one half are measured on the other one,
    and the other way round. "random" is the mean over all heads: what a head drawn at random recovers.

    Returns:
        One row per subtask and set ("chosen", "random"): mean E per head, lower, upper, n items. Subtasks with fewer
        than four items are left out.
    """
    rows = []
    for (subtask, kind), part in trials.groupby(["subtask", "kind"], observed=True, sort=True):
        gains = part.assign(gain=part["kl_corrupted"] - part["kl"])
        wide = gains.pivot(index=["block", "head"], columns="item", values="gain").to_numpy()
        whole = gains.pivot(index=["block", "head"], columns="item", values="kl_corrupted").to_numpy()[0]
        if wide.shape[1] < 4:
            continue
        gained = np.zeros(wide.shape[1])
        for half in (0, 1):
            here = np.arange(wide.shape[1]) % 2 == half
            effect = wide[:, here].sum(1) / whole[here].sum()
            best = np.argsort(-effect, kind="stable")[:NAMED]
            gained[~here] = wide[np.ix_(best, ~here)].mean(0)
        for name, values in (("chosen", gained), ("random", wide.mean(0))):
            weights = settings.weights(len(values))
            lower, upper = bootstrap_interval(values[None], whole[None], weights=weights, level=settings.level,
                                              bounds=(np.nan, np.nan))  # fmt: skip
            rows.append(
                {
                    "subtask": subtask, "kind": kind, "heads": name, "effect": values.sum() / whole.sum(),
                    "lower": lower[0], "upper": upper[0], "n": len(values),
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["subtask", "kind", "heads", "effect", "lower", "upper", "n"])


# --- Circuits ---------------------------------------------------------------------------------------------------------


def kept_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Agreement with the whole model and gold accuracy of every circuit, by subtask and over all of them (subtask −1).

    Random sets of one size are one row: the mean over draws, and the lowest and highest draw.

    Returns:
        set, circuit, complement, kept, subtask, kind; agreement, lower, upper (over items); accuracy; least, most (of
        the draws' agreements; the agreement itself where nothing is random); n items.
    """
    by = ["set", "circuit", "complement", "kept", "subtask", "kind"]
    every = trials.assign(subtask=-1, kind="all")
    rows = []
    for part in (trials, every):
        table = means_by(part.assign(value=part["agrees"]), by, "value", settings)
        groups = part.groupby(by, observed=True, sort=True)
        accuracy = groups["right"].mean().to_numpy()
        draws = part.groupby([*by, "draw"], observed=True, sort=True)["agrees"].mean().groupby(level=by, observed=True)
        table = table.rename(columns={"mean": "agreement"}).drop(columns="n")
        rows.append(table.assign(accuracy=accuracy, least=draws.min().to_numpy(), most=draws.max().to_numpy()))
    return pd.concat(rows, ignore_index=True).rename(columns={"n_clusters": "n"})


def circuit_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Faithfulness and completeness of circuits whose complement was run too, by the probability of the right word.

    Returns:
        set, circuit, kept, measure ("faithfulness", "completeness"), mean, lower, upper, n items. Random sets have
        faithfulness only. NaN where the heads change nothing. Bounds are NaN with one item.
    """
    wide = trials.groupby(["set", "circuit", "complement", "kept", "item"], observed=True)["probability"].mean()
    rows = []
    for name in sorted(wide.index.unique("set")):
        here = wide.loc[name]
        ends = [here.xs(end, level="circuit").droplevel(["complement", "kept"]) for end in ("none", "whole")]
        for (circuit, complement, kept), part in here.groupby(level=["circuit", "complement", "kept"], observed=True):
            if circuit in ("none", "whole"):
                continue
            inner = part.droplevel(["circuit", "complement", "kept"]).groupby(level="item").mean()
            sums = np.stack([inner.to_numpy(), *(end.reindex(inner.index).to_numpy() for end in ends)])
            estimate, lower, upper = interval_of(
                _one_less_share if complement else _share, sums, weights=settings.weights(sums.shape[1]),
                n_clusters=sums.shape[1], level=settings.level, bounds=(np.nan, np.nan),
            )  # fmt: skip
            rows.append(
                {
                    "set": name, "circuit": circuit, "kept": kept,
                    "measure": "completeness" if complement else "faithfulness", "mean": estimate[0],
                    "lower": lower[0], "upper": upper[0], "n": sums.shape[1],
                }
            )  # fmt: skip
    columns = ["set", "circuit", "kept", "measure", "mean", "lower", "upper", "n"]
    return pd.DataFrame(rows, columns=columns)


def _share(sums: np.ndarray) -> np.ndarray:
    """(F(circuit) − F(none)) / (F(whole) − F(none)) of sums (resample, 3) of circuit, none, whole."""
    return (sums[:, 0] - sums[:, 1]) / (sums[:, 2] - sums[:, 1])


def _one_less_share(sums: np.ndarray) -> np.ndarray:
    return 1 - _share(sums)
