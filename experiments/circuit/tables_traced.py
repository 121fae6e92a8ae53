"""Tables of `codi circuit` about what was traced: writers, their ablation, sources, pathways, mentions, movers, mixing,
priors.

From trial tables alone; intervals resample items (texts, for mixing). Knows nothing about models or words.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from circuits.flow import Sources, pathways
from circuits.rift import crossing_depth
from experiments.circuit.tables import means_by
from experiments.statistics.clusters import Settings, expanded_percentile

__all__ = [
    "LEAST_SHARE", "N_WRITERS", "ablation_table", "crossing_table", "crossings", "mention_table", "mixing_table",
    "mover_table", "pathway_rows", "pathway_table", "rift_table", "source_rows", "source_table", "top_heads",
    "writer_table",
]  # fmt: skip

N_WRITERS = 10
"""Heads that count as the writers, or as the movers."""
LEAST_SHARE = 0.1
"""Of what the writers write towards the word: a source with this much counts as a pathway."""
_HEAD = ["block", "head"]


def writer_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row per head: its share of the logits (mean over items and subtasks) with interval, and the word's
    probability by the head alone; the loudest first."""
    rows = trials.assign(share=trials["contribution"] / trials["total"])
    table = means_by(rows, _HEAD, "share", settings, bounds=(-np.inf, np.inf))
    said = trials.groupby(_HEAD, observed=True, sort=True)["alone"].mean().to_numpy()
    table = table.rename(columns={"mean": "share"}).assign(alone=said)
    return table.sort_values("share", ascending=False, ignore_index=True)


def top_heads(trials: pd.DataFrame, value: str, by: list[str], n: int = N_WRITERS) -> pd.DataFrame:
    """The n rows with the largest value of every combination of `by`; ties in order of the model."""
    ordered = trials.sort_values([*by, value, *_HEAD], ascending=[True] * len(by) + [False, True, True])
    return ordered.groupby(by, observed=True, sort=True).head(n)


def ablation_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Probability and accuracy with writers, random heads or nothing silenced: by subtask, and over all (subtask −1).

    Returns:
        silenced, subtask, kind, mean (probability), lower, upper, accuracy, n items.
    """
    by = ["silenced", "subtask", "kind"]
    rows = []
    for part in (trials, trials.assign(subtask=-1, kind="all")):
        table = means_by(part, by, "probability", settings, exact=False).drop(columns="n")
        rows.append(table.assign(accuracy=part.groupby(by, observed=True, sort=True)["right"].mean().to_numpy()))
    return pd.concat(rows, ignore_index=True).rename(columns={"n_clusters": "n"})


# --- Sources ----------------------------------------------------------------------------------------------------------


def _writers_only(sources: pd.DataFrame, writers: pd.DataFrame) -> pd.DataFrame:
    """Rows of the sources of the loudest heads."""
    best = writers.head(N_WRITERS)[_HEAD]
    return sources.merge(best, on=_HEAD)


def source_rows(sources: pd.DataFrame, writers: pd.DataFrame) -> pd.DataFrame:
    """Per item, subtask and part: its share of what the writers write towards the word (negative sums count as 0).

    Args:
        sources: trial table. writers: of `writer_table`.
    """
    mine = _writers_only(sources, writers)
    by = ["item", "subtask", "kind", "part"]
    written = mine.groupby(by, observed=True, sort=True)["written"].sum().clip(lower=0).reset_index()
    whole = written.groupby(["item", "subtask"], observed=True)["written"].transform("sum")
    return written.assign(share=written["written"] / whole.where(whole > 0))


def source_table(sources: pd.DataFrame, writers: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Share of every part of the text in what the writers write, by subtask, with intervals over items."""
    rows = source_rows(sources, writers).dropna(subset=["share"])
    return means_by(rows, ["subtask", "kind", "part"], "share", settings)


def pathway_rows(sources: pd.DataFrame, writers: pd.DataFrame) -> pd.DataFrame:
    """Per item and subtask: through how many sources the writers write at once (see `circuits.flow.pathways`)."""
    mine = _writers_only(sources, writers)
    if mine.empty:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in ("item", "subtask", "kind", "pathways")})
    parts = [*sorted(set(mine["part"]) - {"rest"}), "rest"]
    wide = mine.pivot(index=["item", "subtask", "kind", "block", "head"], columns="part", values="written")
    grouped = wide.reindex(columns=parts, fill_value=0.0).groupby(level=["item", "subtask", "kind"], observed=True)
    keys = list(grouped.indices)
    written = torch.tensor(np.stack([grouped.get_group(key).to_numpy() for key in keys]))[:, None]  # (row, 1, head, …)
    every = torch.ones(written.shape[1:3], dtype=torch.bool)
    numbers = pathways(Sources(tuple(parts), torch.zeros_like(written), written), every, LEAST_SHARE)
    found = pd.DataFrame(keys, columns=["item", "subtask", "kind"])
    return found.assign(pathways=numbers.numpy())


def pathway_table(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Mean number of pathways by subtask, and the share of words that several sources write."""
    by = ["subtask", "kind"]
    table = means_by(rows, by, "pathways", settings, bounds=(0.0, 3.0))
    several = (rows["pathways"] > 1).groupby([rows[name] for name in by], observed=True, sort=True).mean().to_numpy()
    return table.assign(several=several)


def mention_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Probability of the word with one of its mentions, the other, or both corrupted, by subtask."""
    return means_by(trials, ["subtask", "kind", "corruption"], "probability", settings, exact=False)


def mover_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """One row per head: attention from objects to subjects, less its control, with interval; the largest first."""
    rows = trials.assign(contrast=trials["attention"] - trials["control"])
    table = means_by(rows, _HEAD, "contrast", settings, bounds=(-1.0, 1.0)).rename(columns={"mean": "contrast"})
    table = table.assign(attention=trials.groupby(_HEAD, observed=True, sort=True)["attention"].mean().to_numpy())
    return table.sort_values("contrast", ascending=False, ignore_index=True)


# --- Streams ----------------------------------------------------------------------------------------------------------


def mixing_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Accuracy (interval over texts), F1 and chance of every probe at every layer."""
    by = ["probe", "labels", "layer"]
    table = means_by(trials, by, "correct", settings, cluster="text")
    groups = trials.groupby(by, observed=True, sort=True)
    return table.assign(f1=groups["f1"].first().to_numpy(), chance=groups["chance"].first().to_numpy())


def rift_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Mean probability of both priors by kind of position ("all" too) and layer, with intervals over items."""
    long = trials.melt(
        ["item", "position", "kind", "layer"], ["pretraining", "context"], var_name="prior", value_name="probability"
    )
    both = pd.concat([long, long.assign(kind="all")], ignore_index=True)
    means = both.groupby(["kind", "prior", "layer", "item"], observed=True)["probability"].mean().reset_index()
    return means_by(means, ["kind", "prior", "layer"], "probability", settings, exact=False)


def crossings(trials: pd.DataFrame, settings: Settings) -> tuple[float, np.ndarray, int]:
    """Depth at which the context overtakes pretraining, as a share of the layers.

    Returns:
        the depth (NaN: never), (resample,) depths of resampled items (never counts as 1, the end), number of items.
    """
    means = trials.groupby(["item", "layer"], observed=True)[["pretraining", "context"]].mean()
    both = [torch.tensor(means[name].unstack("layer").to_numpy()) for name in ("pretraining", "context")]
    n, layers = both[0].shape
    rows = torch.tensor(np.random.default_rng(settings.seed).integers(0, n, (settings.resamples, n)))
    depth = float(crossing_depth(*both)) / (layers - 1)
    resampled = crossing_depth(*both, rows).numpy() / (layers - 1)
    return depth, np.where(np.isnan(resampled), 1.0, resampled), n


def crossing_table(trials: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The depth of the crossing by kind of position, with its interval over items (NaN with one item)."""
    rows = []
    for kind, part in [("all", trials), *trials.groupby("kind", observed=True, sort=True)]:
        depth, resampled, n = crossings(part, settings)
        lower, upper = expanded_percentile(resampled[:, None], n, settings.level, (np.nan, np.nan))
        rows.append({"kind": kind, "depth": depth, "lower": max(lower[0], 0.0), "upper": min(upper[0], 1.0), "n": n})
    return pd.DataFrame(rows)
