"""From the trial table of a sweep to claims: paired effects, clustered intervals, controls, corrected p-values.

What it does: turns the long trial table (one row = one prompt x one condition) into the tables that every number and
figure is read from. `analyse(trials)` gives all of them; `cell_statistics`, `control_statistics`, `marginal_effects`,
`rank_consistency`, `variance_shares` and `sign_symmetry` give one each. `accuracy_interval` is the plain accuracy with
a clustered interval that `codi eval` prints.

What it does not know: models, prompts' wording, files other than a run folder, figures (`plots.py`), sentences
(`report.py`).

How to run: `codi stats RUN` or `python -m experiments.sweep.cells RUN` recomputes every table of a run folder from its
trials.

Definitions, used by all tables
    cell        one edit: (space, part, timing, source A, target B, coefficient c, latent). (A, B, c) and (B, A, -c) are
                the same edit; a *unique* cell has A < B, the other one is its mirror and carries the same numbers.
    family      all unique cells of one (space, part, timing): every pair, latent and signed coefficient. Corrections
                for multiple testing are made over one family.
    difference  accuracy of the edited run minus accuracy of the unsteered run on the same prompts (and with the same
                number of latents: in early-exit, the unsteered exit after that latent). A fraction, -1..1.
    cluster     prompts that share a number triple. Intervals and p-values treat clusters, not prompts, as independent.
    unparsed    an answer without a number. It counts as wrong and is counted apart.

Intervals: percentile bootstrap over clusters (multinomial weights, the same ones for every cell of a family), with the
quantile levels widened for few clusters so that a mean gets the width of a t interval (Hesterberg 2015,
arXiv 1411.5279, "expanded percentile"). One cluster says nothing about spread: the interval is then the whole range.

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

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from experiments.study.folder import RunFolder
from experiments.sweep.trials import read_trials

__all__ = [
    "Analysis",
    "Estimate",
    "Family",
    "Overrides",
    "Settings",
    "StatsConfig",
    "accuracy_interval",
    "analyse",
    "bootstrap_interval",
    "cell_statistics",
    "cluster_weights",
    "control_statistics",
    "families",
    "load_trials",
    "main",
    "marginal_effects",
    "max_statistic_p",
    "mcnemar_p",
    "mirror",
    "paired_interval",
    "rank_consistency",
    "rank_correlations",
    "settings_of",
    "sign_flip_p",
    "sign_symmetry",
    "variance_shares",
    "write",
]

#: columns of the trial table that the statistics read (the table has more: text, prediction, ...)
TRIAL_COLUMNS = (
    "space", "part", "timing", "source", "target", "coefficient", "control", "draw", "latent", "n_latents",
    "prompt_id", "cluster", "correct", "parsed", "applied_norm",
)  # fmt: skip
FAMILY = ("space", "part", "timing")
#: controls drawn per unordered pair, latent and |coefficient|: they have the norm of the direction they control for
PAIR_CONTROLS = ("random", "covariance", "shuffled")
#: controls that replace the latent and belong to no pair
PATCH_CONTROLS = ("patch-scalar", "patch-coordinate", "patch-norm")
CONTROLS = ("none", "direction", *PAIR_CONTROLS, *PATCH_CONTROLS)

_CHUNK = 1024  # cells whose resampled values are held at once: 2,000 resamples x 1,024 cells = 16 MB


@dataclass(frozen=True)
class Settings:
    """How the statistics are computed; written beside them."""

    resamples: int = 2000
    """Bootstrap resamples of clusters behind every interval."""
    permutations: int = 5000
    """Random sign flips behind the family-wise p-value and permutations behind rank consistency."""
    level: float = 0.95
    """Coverage of the intervals, a fraction."""
    alpha: float = 0.05
    """Level at which a corrected p-value counts, a fraction."""
    seed: int = 0
    """Seed of the resamples and permutations: the same trials and settings give the same tables."""

    def __post_init__(self) -> None:
        for name in ("resamples", "permutations"):
            if getattr(self, name) < 100:
                raise ValueError(f"{name} must be at least 100, got {getattr(self, name)}")
        for name in ("level", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class Estimate:
    """A number with its clustered interval, and how much data is behind it."""

    estimate: float
    lower: float
    upper: float
    n: int
    n_clusters: int


# ---------------------------------------------------------------------------------------------------------------------
# Arrays in, arrays out
# ---------------------------------------------------------------------------------------------------------------------


def cluster_weights(n_clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each bootstrap resample.

    Returns:
        (resample, cluster) float64, rows sum to n_clusters.
    """
    if n_clusters < 1:
        raise ValueError(f"a bootstrap needs at least one cluster, got {n_clusters}")
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples).astype(float)


def _resampled_ratio(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(resample, cell) weighted sum / weighted count; a resample without any trial of a cell gives its plain ratio."""
    totals = weights @ sums.T
    if len(counts) > 1 and (counts == counts[0]).all():  # the usual case: every cell saw the same prompts
        trials = weights @ counts[:1].T
    else:
        trials = weights @ counts.T
    plain = sums.sum(1) / np.maximum(counts.sum(1), 1)
    return np.where(trials > 0, totals / np.where(trials > 0, trials, 1), plain)


def _interval_of(
    resampled: np.ndarray, n_clusters: np.ndarray | int, level: float, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Expanded percentile interval of each column of (resample, cell) values; the whole range for one cluster."""
    clusters = np.broadcast_to(np.asarray(n_clusters), resampled.shape[1:])
    lower, upper = np.full(clusters.shape, bounds[0], float), np.full(clusters.shape, bounds[1], float)
    for number in np.unique(clusters[clusters > 1]):
        t = scipy_stats.t.ppf((1 - level) / 2, number - 1) * np.sqrt(number / (number - 1))
        tail = scipy_stats.norm.cdf(t)
        chosen = clusters == number
        lower[chosen], upper[chosen] = np.quantile(resampled[:, chosen], [tail, 1 - tail], axis=0)
    return lower, upper


def bootstrap_interval(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    weights: np.ndarray,
    level: float = 0.95,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Clustered bootstrap interval of `sums.sum(1) / counts.sum(1)` for many cells at once.

    Args:
        sums: (cell, cluster) sum over the cluster's prompts, of correct answers or of paired differences.
        counts: (cell, cluster) number of prompts in that sum; 0 where the cell has none of that cluster.
        weights: (resample, cluster) from `cluster_weights`.
        level: coverage.
        bounds: the whole range of the statistic, returned for a cell with fewer than two clusters.

    Returns:
        lower, upper, each (cell,). Constant data gives an interval of no width.

    Source: expanded percentile interval, Hesterberg 2015, arXiv 1411.5279.
    """
    if sums.shape != counts.shape or sums.shape[1] != weights.shape[1]:
        raise ValueError(f"sums {sums.shape}, counts {counts.shape} and weights {weights.shape} do not fit")
    parts = []
    for start in range(0, len(sums), _CHUNK):
        rows = slice(start, start + _CHUNK)
        resampled = _resampled_ratio(sums[rows].astype(float), counts[rows].astype(float), weights)
        parts.append(_interval_of(resampled, (counts[rows] > 0).sum(1), level, bounds))
    if not parts:
        return np.empty(0), np.empty(0)
    return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])


def mcnemar_p(gained: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Exact two-sided McNemar p: binomial test of the flips against one half. 1 where nothing flipped."""
    gained, lost = np.asarray(gained), np.asarray(lost)
    return np.minimum(1.0, 2 * scipy_stats.binom.cdf(np.minimum(gained, lost), gained + lost, 0.5))


def sign_flip_p(sums: np.ndarray) -> np.ndarray:
    """Exact two-sided sign-flip p of each cell's paired differences, with whole clusters as units.

    Null hypothesis: exchanging edited and unsteered answers of a whole cluster changes nothing in distribution. Then,
    given |s_j|, all sign assignments are equally likely, and p is the share of them whose |total| is at least the
    observed one. The distribution is a convolution of binomials (one per size |s_j|), so no sampling is involved.

    Args:
        sums: (cell, cluster) integer sums of (edited - unsteered) correctness.

    Returns:
        (cell,) in (0, 1]; equal to `mcnemar_p` when every cluster holds one prompt. 1 where nothing flipped.
    """
    sums = np.asarray(sums)
    if not np.issubdtype(sums.dtype, np.integer):
        raise ValueError(f"sign_flip_p needs integer cluster sums, got {sums.dtype}")
    sizes = np.abs(sums)
    largest = int(sizes.max(initial=0))
    counts = np.stack([(sizes == size).sum(1) for size in range(1, largest + 1)], 1) if largest else None
    totals = np.abs(sums.sum(1))
    p = np.ones(len(sums))
    if counts is None:
        return p
    upper_tails: dict[tuple[int, ...], np.ndarray] = {}
    for cell, (row, total) in enumerate(zip(counts, totals, strict=True)):
        if total == 0:
            continue
        key = tuple(int(number) for number in row)
        if key not in upper_tails:
            masses = np.ones(1)  # of the sum of |s_j| over the clusters that got a plus
            for size, number in enumerate(key, start=1):
                if number:
                    spread = np.zeros(size * number + 1)
                    spread[::size] = scipy_stats.binom.pmf(np.arange(number + 1), number, 0.5)
                    masses = np.convolve(masses, spread)
            upper_tails[key] = masses[::-1].cumsum()[::-1]
        tail = upper_tails[key]
        p[cell] = min(1.0, 2 * tail[(len(tail) - 1 + int(total)) // 2])
    return p


def _signs(n_clusters: int, permutations: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1])
    return rng.choice(np.array([-1.0, 1.0]), size=(permutations, n_clusters))


def max_statistic_p(sums: np.ndarray, *, permutations: int, seed: int) -> np.ndarray:
    """Family-wise corrected two-sided p of each cell: step-down max-statistic over cluster sign flips.

    Every cluster's differences are flipped together in all cells, which keeps the dependence between cells (they share
    prompts and baseline), so the correction is milder than Bonferroni's where cells agree.

    Args:
        sums: (cell, cluster) sums of (edited - unsteered) correctness.

    Returns:
        (cell,) between 1 / (permutations + 1) and 1.

    Source: Westfall and Young 1993, step-down maxT; sign flips as in Winkler et al. 2014, NeuroImage 92.
    """
    sums = np.asarray(sums, float)
    p = np.ones(len(sums))
    scale = np.sqrt((sums**2).sum(1))
    live = np.flatnonzero(scale > 0)  # a cell in which nothing flipped can never be extreme
    if not live.size:
        return p
    scaled = sums[live] / scale[live, None]
    observed = np.abs(scaled.sum(1))
    order = np.argsort(observed, kind="stable")  # ascending: step j compares with the cells no more extreme than it
    signs = _signs(sums.shape[1], permutations, seed)
    exceed = np.zeros(len(live))
    step = max(1, 4_000_000 // len(live))  # about 32 MB of permuted statistics at a time
    for start in range(0, permutations, step):
        permuted = np.abs(signs[start : start + step] @ scaled[order].T)
        np.maximum.accumulate(permuted, axis=1, out=permuted)
        exceed += (permuted >= observed[order] - 1e-9).sum(0)
    stepped = (1 + exceed) / (1 + permutations)
    p[live[order]] = np.maximum.accumulate(stepped[::-1])[::-1]  # a less extreme cell never has a smaller p
    return p


def _benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    return multipletests(p, method="fdr_bh")[1] if len(p) else np.empty(0)


def _cluster_sums(values: np.ndarray, clusters: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, names = pd.factorize(np.asarray(clusters), sort=True)
    sums = np.bincount(codes, weights=values, minlength=len(names))
    return sums[None], np.bincount(codes, minlength=len(names))[None]


def accuracy_interval(
    correct: Sequence[bool] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Accuracy with a bootstrap interval over clusters.

    Args:
        correct: one truth value per prompt.
        clusters: the cluster of each prompt (prompts that share a number triple).

    Returns:
        estimate, lower, upper as fractions, number of prompts and of clusters. All right or all wrong gives no width.

    Raises:
        ValueError: no prompts, or lengths that differ.
    """
    values = np.asarray(correct, float)
    if values.ndim != 1 or len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"correct and clusters must have one length >= 1, got {values.shape} and {len(clusters)}")
    sums, counts = _cluster_sums(values, clusters)
    weights = cluster_weights(sums.shape[1], resamples, seed)
    lower, upper = bootstrap_interval(sums, counts, weights=weights, level=level, bounds=(0.0, 1.0))
    return Estimate(float(values.mean()), float(lower[0]), float(upper[0]), len(values), sums.shape[1])


def paired_interval(
    correct: Sequence[bool] | np.ndarray,
    reference: Sequence[bool] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Accuracy of `correct` minus that of `reference` on the same prompts, with a bootstrap interval over clusters."""
    difference = np.asarray(correct, float) - np.asarray(reference, float)
    if difference.ndim != 1 or len(difference) == 0 or len(difference) != len(clusters):
        raise ValueError(
            "correct, reference and clusters must have one length >= 1, got "
            f"{np.shape(correct)}, {np.shape(reference)} and {len(clusters)}"
        )
    sums, counts = _cluster_sums(difference, clusters)
    weights = cluster_weights(sums.shape[1], resamples, seed)
    lower, upper = bootstrap_interval(sums, counts, weights=weights, level=level)
    return Estimate(float(difference.mean()), float(lower[0]), float(upper[0]), len(difference), sums.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# The trial table, paired with its baseline
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """All conditions of one (space, part, timing), paired with the unsteered run and summed per cluster.

    `conditions` has one row per edit, control draws included (columns control, source, target, coefficient, draw,
    latent, n_latents, n, n_clusters, accuracy, baseline, difference, gained, lost, unparsed, applied_norm); rows of
    direction cells are unique (source < target). The arrays are (condition, cluster), in the order of its rows.
    """

    space: str
    part: str
    timing: str
    conditions: pd.DataFrame
    differences: np.ndarray  # sums of edited - unsteered correctness, integers
    correct: np.ndarray  # sums of edited correctness
    counts: np.ndarray  # prompts
    prompts_key: np.ndarray  # (condition,) which set of prompts it saw: equal keys, equal sets
    clusters: np.ndarray  # names, sorted

    @property
    def name(self) -> dict[str, str]:
        return {"space": self.space, "part": self.part, "timing": self.timing}

    @property
    def baseline_correct(self) -> np.ndarray:
        return self.correct - self.differences

    def of(self, *controls: str) -> np.ndarray:
        """Row numbers of the conditions with one of these controls."""
        return np.flatnonzero(self.conditions["control"].isin(controls).to_numpy())

    def weights(self, settings: Settings) -> np.ndarray:
        return cluster_weights(len(self.clusters), settings.resamples, settings.seed)


def mirror(table: pd.DataFrame) -> pd.DataFrame:
    """Trials or cells with every edit under both of its names, (A, B, c) and (B, A, -c).

    Rows that are no directions (baseline, controls) are kept as they are; a mirror that the table already has is not
    added again. The result is sorted like its input, mirrors behind.
    """
    directions = table["control"].eq("direction") if "control" in table else pd.Series(True, index=table.index)
    copies = table[directions].copy()
    copies[["source", "target"]] = copies[["target", "source"]].to_numpy()
    copies["coefficient"] = -copies["coefficient"]
    keys = [*FAMILY, "source", "target", "coefficient", "latent", "n_latents", "control", "draw", "prompt_id"]
    keys = [key for key in keys if key in table]
    both = pd.concat([table, copies], ignore_index=True)
    repeated = both.duplicated(keys, keep="first").to_numpy(copy=True)
    repeated[: len(table)] = False
    return both[~repeated].reset_index(drop=True)


def families(trials: pd.DataFrame) -> list[Family]:
    """Pairs every trial with the unsteered answer of its prompt and sums by cluster, per space, part and timing.

    The unsteered answer is the row with control "none" of the same prompt, timing and number of latents; of several
    (early-exit) the one of the same latent. Baseline rows of another space or part serve where a family has none, since
    the unsteered run does not depend on them.

    Raises:
        ValueError: a missing column, an unknown control, a repeated trial, a trial without its unsteered answer.
    """
    missing = [column for column in TRIAL_COLUMNS if column not in trials]
    if missing:
        raise ValueError(f"the trial table lacks the columns {', '.join(missing)}")
    if trials.empty:
        raise ValueError("the trial table is empty")
    table = trials.loc[:, list(TRIAL_COLUMNS)]
    named = [column for column in TRIAL_COLUMNS if column != "applied_norm"]
    holes = [column for column in named if table[column].isna().any()]
    if holes:
        raise ValueError(f"the trial table has missing values in {', '.join(holes)}")
    for column in (*FAMILY, "control", "prompt_id", "cluster"):
        table[column] = pd.Categorical(table[column])
    unknown = [control for control in table["control"].cat.categories if control not in CONTROLS]
    if unknown:
        raise ValueError(f"unknown control {unknown[0]!r}; allowed: {', '.join(CONTROLS)}")
    unsteered = (table["control"] == "none").to_numpy()
    edited = table[~unsteered]
    baselines = table[unsteered]
    if baselines.empty:
        raise ValueError("the trial table has no baseline (control 'none'): nothing to pair with")
    result = []
    for (space, part, timing), rows in edited.groupby(list(FAMILY), observed=True, sort=True):
        own = baselines[baselines["timing"] == timing]
        for column, value in (("space", space), ("part", part)):
            same = own[own[column] == value]
            own = same if len(same) else own
        if own.empty:
            raise ValueError(f"no baseline rows with timing {timing!r} for {space} {part}")
        result.append(_pair(str(space), str(part), str(timing), rows, own))
    return result


def _pair(space: str, part: str, timing: str, rows: pd.DataFrame, baselines: pd.DataFrame) -> Family:
    where = f"{space} {part} {timing}"
    # prompts in the order of their clusters, so that a cluster is a slice
    pairs = baselines[["cluster", "prompt_id"]].drop_duplicates()
    pairs = pairs.astype(object).sort_values(["cluster", "prompt_id"], key=lambda column: column.astype(str))
    if pairs["prompt_id"].duplicated().any():
        example = pairs.loc[pairs["prompt_id"].duplicated(), "prompt_id"].iloc[0]
        raise ValueError(f"prompt {example!r} belongs to several clusters")
    prompt_ids = pairs["prompt_id"].to_numpy()
    cluster_codes, cluster_names = pd.factorize(pairs["cluster"].to_numpy())
    starts = np.flatnonzero(np.r_[True, cluster_codes[1:] != cluster_codes[:-1]])
    places = np.full(len(rows["prompt_id"].cat.categories), -1)  # category code -> place of the prompt
    places[pd.Index(rows["prompt_id"].cat.categories).get_indexer(prompt_ids)] = np.arange(len(prompt_ids))

    keys = baselines.groupby(["n_latents", "latent"], sort=True)
    base_index = keys.ngroup().to_numpy()
    base_keys = keys.size().index.to_frame(index=False)
    base_prompts = places[baselines["prompt_id"].cat.codes]
    base = _dense(base_index, base_prompts, baselines["correct"], len(base_keys), len(prompt_ids))
    if base is None:
        raise ValueError(f"{where}: the baseline of a prompt is there more than once")

    # one name for each edit: source < target
    rows = rows.copy()
    direction = (rows["control"] == "direction").to_numpy()
    swapped = direction & (rows["source"] > rows["target"]).to_numpy()
    source, target = rows["source"].to_numpy(), rows["target"].to_numpy()
    if (direction & (source == target)).any():
        raise ValueError(f"{where}: a direction has the same latent as source and target")
    rows["source"], rows["target"] = np.where(swapped, target, source), np.where(swapped, source, target)
    coefficient = rows["coefficient"].to_numpy(float)
    rows["coefficient"] = np.where(direction, np.where(swapped, -coefficient, coefficient), np.abs(coefficient)) + 0.0
    columns = ["control", "source", "target", "coefficient", "draw", "latent", "n_latents"]
    index, conditions = _groups(rows, columns)
    twice = np.bincount(index[swapped], minlength=len(conditions)).astype(bool)
    twice &= np.bincount(index[~swapped], minlength=len(conditions)).astype(bool)
    keep = ~(swapped & twice[index])  # where a sweep computed both names of an edit, the unique one counts
    rows, index = rows[keep], index[keep]

    prompts = places[rows["prompt_id"].cat.codes]
    if (prompts < 0).any():
        example = rows["prompt_id"].to_numpy()[np.argmax(prompts < 0)]
        raise ValueError(f"{where}: prompt {example!r} has trials but no baseline")
    correct = _dense(index, prompts, rows["correct"], len(conditions), len(prompt_ids))
    if correct is None:
        raise ValueError(f"{where}: a prompt appears twice in one condition")
    reference = _matching_baseline(conditions, base_keys, where)
    number = len(conditions)
    sums = np.zeros((3, number, len(starts)), np.int32)
    flips = np.zeros((2, number), np.int64)
    salt = np.random.default_rng(0).integers(0, 2**63, len(prompt_ids), dtype=np.uint64)
    prompts_key = np.zeros(number, np.uint64)
    for start in range(0, number, _CHUNK):
        part_rows = slice(start, start + _CHUNK)
        seen = correct[part_rows] >= 0
        before = base[reference[part_rows]]
        if (seen & (before < 0)).any():
            cell, prompt = np.argwhere(seen & (before < 0))[0]
            latent = conditions["latent"].iloc[start + cell]
            raise ValueError(f"{where}: prompt {prompt_ids[prompt]!r} has no baseline at latent {latent}")
        now = np.where(seen, correct[part_rows], 0)
        before = np.where(seen, before, 0)
        for out, values in zip(sums, (now - before, now, seen), strict=True):
            out[part_rows] = np.add.reduceat(values, starts, axis=1, dtype=np.int32)
        flips[0, part_rows] = (now > before).sum(1)
        flips[1, part_rows] = (now < before).sum(1)
        prompts_key[part_rows] = (seen * salt).sum(1, dtype=np.uint64)
    differences, right, counts = sums
    n = counts.sum(1)
    conditions["n"], conditions["n_clusters"] = n, (counts > 0).sum(1)
    conditions["accuracy"] = right.sum(1) / n
    conditions["baseline"] = (right - differences).sum(1) / n
    conditions["difference"] = differences.sum(1) / n
    conditions["gained"], conditions["lost"] = flips
    unparsed = ~rows["parsed"].to_numpy(bool)
    conditions["unparsed"] = np.bincount(index, weights=unparsed, minlength=number).astype(np.int64)
    norms = rows["applied_norm"].to_numpy(float)
    known = ~np.isnan(norms)
    total = np.bincount(index[known], weights=norms[known], minlength=number)
    conditions["applied_norm"] = total / np.maximum(np.bincount(index[known], minlength=number), 1)
    return Family(space, part, timing, conditions, differences, right, counts, prompts_key, np.asarray(cluster_names))


def _groups(rows: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Number of each row's group and the groups' keys, sorted; an integer code per column is faster than groupby."""
    codes = np.zeros(len(rows), np.int64)
    levels = []
    for column in columns:
        values = rows[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            code, level = values.cat.codes.to_numpy(np.int64), values.cat.categories.to_numpy(object)
        else:
            code, found = pd.factorize(values.to_numpy(), sort=True)
            level = np.asarray(found)
        codes = codes * len(level) + code
        levels.append(level)
    index, names = pd.factorize(codes, sort=True)
    names = np.asarray(names)
    keys: dict[str, np.ndarray] = {}
    for column, level in zip(columns[::-1], levels[::-1], strict=True):
        keys[column] = level[names % len(level)]
        names = names // len(level)
    return index, pd.DataFrame({column: keys[column] for column in columns})


def _dense(rows: np.ndarray, columns: np.ndarray, correct: pd.Series, n_rows: int, n_columns: int) -> np.ndarray | None:
    """(condition, prompt) int8: 1 right, 0 wrong, -1 not there; None if a place would be filled twice."""
    out = np.full((n_rows, n_columns), -1, np.int8)
    out[rows, columns] = correct.to_numpy(bool)
    return out if np.count_nonzero(out >= 0) == len(rows) else None


def _matching_baseline(conditions: pd.DataFrame, base_keys: pd.DataFrame, where: str) -> np.ndarray:
    known = {(int(n), int(latent)): row for row, (n, latent) in enumerate(base_keys.itertuples(index=False))}
    found = {}
    for n, latent in set(zip(conditions["n_latents"], conditions["latent"], strict=True)):
        for candidate in (latent, 0, -1, n):  # -1, 0: a baseline that belongs to no latent in particular
            if (int(n), int(candidate)) in known:
                found[n, latent] = known[int(n), int(candidate)]
                break
        else:
            raise ValueError(f"{where}: no baseline with {n} latents for the cells at latent {latent}")
    return np.array([found[key] for key in zip(conditions["n_latents"], conditions["latent"], strict=True)], int)


def _as_families(trials: pd.DataFrame | Sequence[Family]) -> Sequence[Family]:
    return families(trials) if isinstance(trials, pd.DataFrame) else trials


def _stack(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    kept = list(frames)
    filled = [frame for frame in kept if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else (kept[0] if kept else pd.DataFrame())


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

CELL_COLUMNS = (
    *FAMILY, "source", "target", "coefficient", "latent", "n_latents", "control", "mirrored",
    "accuracy", "accuracy_lower", "accuracy_upper", "baseline", "difference", "lower", "upper",
    "gained", "lost", "n", "n_clusters", "unparsed", "applied_norm", "mcnemar_p", "p", "q", "fwer_p",
    *(f"{control}_{what}" for control in PAIR_CONTROLS
      for what in ("mean", "lower", "upper", "rank", "p", "t_p", "draws")),
    "over_random", "over_random_lower", "over_random_upper", "verdict_q", "verdict",
)  # fmt: skip


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
    frames = [_family_cells(family, settings) for family in _as_families(trials)]
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
    cells["q"] = _benjamini_hochberg(cells["p"].to_numpy())
    cells["fwer_p"] = max_statistic_p(sums, permutations=settings.permutations, seed=settings.seed)
    for control in PAIR_CONTROLS:
        for column, values in _against_draws(family, rows, control, settings).items():
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


def _against_draws(family: Family, rows: np.ndarray, control: str, settings: Settings) -> dict[str, np.ndarray]:
    table = family.conditions
    accuracy = table["accuracy"].to_numpy()
    groups = _draw_groups(family, rows, control)
    names = ("mean", "lower", "upper", "rank", "p", "t_p")
    out = {name: np.full(len(rows), np.nan) for name in names}
    out["draws"] = np.array([len(group) for group in groups])
    # spread of draws around their own cell's mean, pooled over the pairs at one latent and |c|
    squares: dict[tuple, dict[int, tuple[float, int]]] = {}
    places = [
        (int(latent), int(n), round(abs(float(size)), 9))
        for latent, n, size in table.iloc[rows][["latent", "n_latents", "coefficient"]].itertuples(index=False)
    ]
    for place, group in zip(places, groups, strict=True):
        if len(group) > 1:  # the cells +c and -c share their draws: counted once, under the first draw's row
            values = accuracy[group]
            squares.setdefault(place, {})[int(group[0])] = (((values - values.mean()) ** 2).sum(), len(values) - 1)
    pooled = {
        place: sum(total for total, _ in entries.values()) / sum(free for _, free in entries.values())
        for place, entries in squares.items()
    }
    tail = (1 - settings.level) / 2
    for cell, (row, group) in enumerate(zip(rows, groups, strict=True)):
        if not len(group):
            continue
        values, own, number = accuracy[group], accuracy[row], len(group)
        better, worse = int((values > own + 1e-12).sum()), int((values < own - 1e-12).sum())
        tied = number - better - worse
        out["mean"][cell] = values.mean()
        out["lower"][cell], out["upper"][cell] = np.quantile(values, [tail, 1 - tail])
        out["rank"][cell] = 1 + better + tied / 2
        out["p"][cell] = min(1.0, 2 * (1 + tied + min(better, worse)) / (1 + number))
        if number > 1:
            n = int(table["n"].iloc[row])
            variance = max(float(values.var(ddof=1)), pooled[places[cell]], (0.5 / n) ** 2)
            t = (own - values.mean()) / np.sqrt(variance * (1 + 1 / number))
            out["t_p"][cell] = 2 * scipy_stats.t.sf(abs(t), number - 1)
    return out


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
    verdict_q = _benjamini_hochberg(both)
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
    for family in _as_families(trials):
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
            }  # fmt: skip
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
        lower, upper = _interval_of(resampled[:, None], n_clusters, settings.level, bounds)
        prefix = "accuracy_" if name == "accuracy" else ""
        record |= {name: float(plain), f"{prefix}lower": float(lower[0]), f"{prefix}upper": float(upper[0])}
    tail = (1 - settings.level) / 2
    low, high = np.quantile(group["accuracy"], [tail, 1 - tail])
    return record | {
        "draw_lower": float(low), "draw_upper": float(high), "n_draws": number, "n": int(group["n"].max()),
        "n_clusters": n_clusters, "unparsed": float(group["unparsed"].sum() / group["n"].sum()),
        "applied_norm": float(group["applied_norm"].mean()),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Structure of the grid: ordered pairs at c > 0. (A, B, -c) is (B, A, c), so both signs are in it.
# ---------------------------------------------------------------------------------------------------------------------


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
        values = family.conditions["difference"].to_numpy()
        return np.where(self.rows >= 0, values[self.rows], np.nan)

    def resampled(self, family: Family, weights: np.ndarray) -> np.ndarray:
        """(resample, pair, latent); only for a complete grid."""
        rows = self.rows.ravel()
        values = _resampled_ratio(family.differences[rows].astype(float), family.counts[rows].astype(float), weights)
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
    for family in _as_families(trials):
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
            resampled = _resampled_ratio(
                family.differences[rows].astype(float), family.counts[rows].astype(float), weights
            )
            n_clusters = int((family.counts[rows].sum(0) > 0).sum())
            lower, upper = _interval_of(resampled @ averaging.T, n_clusters, settings.level, (-1.0, 1.0))
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
    for family in _as_families(trials):
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
    for family in _as_families(trials):
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
    for family in _as_families(trials):
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


# ---------------------------------------------------------------------------------------------------------------------
# Everything at once, and a run folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysis:
    """All tables of one trial table; `plots.draw` and `report.summary` read nothing else."""

    cells: pd.DataFrame
    controls: pd.DataFrame
    marginals: pd.DataFrame
    correlations: pd.DataFrame
    consistency: pd.DataFrame
    variance: pd.DataFrame
    symmetry: pd.DataFrame
    settings: Settings


def analyse(trials: pd.DataFrame, settings: Settings | None = None) -> Analysis:
    """Every table from the trials; deterministic for given trials (in any row order) and settings."""
    settings = settings or Settings()
    paired = families(trials)
    cells = cell_statistics(paired, settings)
    return Analysis(
        cells=cells,
        controls=control_statistics(paired, settings),
        marginals=marginal_effects(paired, settings),
        correlations=rank_correlations(paired),
        consistency=rank_consistency(paired, settings),
        variance=variance_shares(paired, settings),
        symmetry=sign_symmetry(cells),
        settings=settings,
    )


def load_trials(run: Path) -> pd.DataFrame:
    """The trial table of a run folder.

    Raises:
        ValueError: no folder, a folder without trials, a damaged part.
    """
    if not run.is_dir():
        raise ValueError(f"no run folder {str(run)!r}")
    return read_trials(run)


def write(analysis: Analysis, run: Path) -> list[Path]:
    """Writes cells.parquet, cells.csv and statistics/*.csv with settings.json; each file whole or not at all."""
    folder = RunFolder(run)
    written = [
        folder.write("cells.parquet", analysis.cells.to_parquet(index=False)),
        folder.write("cells.csv", analysis.cells.to_csv(index=False).encode()),
        folder.write_json("statistics/settings.json", dataclasses.asdict(analysis.settings)),
    ]
    for name in ("controls", "marginals", "correlations", "consistency", "variance", "symmetry"):
        table: pd.DataFrame = getattr(analysis, name)
        written.append(folder.write(f"statistics/{name}.csv", table.to_csv(index=False).encode()))
    return written


@dataclass(frozen=True)
class Overrides:
    """Settings given on the command line; what is not given stays as it was in the run folder."""

    resamples: int | None = None
    """Bootstrap resamples of clusters behind every interval. None: as before in this folder, else 2000."""
    permutations: int | None = None
    """Sign flips behind the family-wise p, permutations behind rank consistency. None: as before, else 5000."""
    level: float | None = None
    """Coverage of the intervals, a fraction. None: as before, else 0.95."""
    alpha: float | None = None
    """Level at which a corrected p-value counts, a fraction. None: as before, else 0.05."""
    seed: int | None = None
    """Seed of resamples and permutations: same trials and settings, same tables. None: as before, else 0."""


def settings_of(run: Path, given: Overrides | None = None) -> Settings:
    """The settings of a run folder's statistics (statistics/settings.json, if any) with what is given in their place.

    Raises:
        ValueError: an impossible value, or a damaged settings.json.
    """
    path = run / "statistics" / "settings.json"
    stored: dict[str, Any] = {}
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            Settings(**stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to go back to the defaults") from error
    changed = {name: value for name, value in vars(given or Overrides()).items() if value is not None}
    return Settings(**(stored | changed))


@dataclass(frozen=True)
class StatsConfig:
    """Recompute the statistics of a run folder from its trials alone, write them there and print a summary."""

    run: tyro.conf.Positional[Path]
    """Run folder of `codi sweep` (it holds trials/part-*.parquet)."""
    settings: Annotated[Overrides, tyro.conf.arg(name="")] = field(default_factory=Overrides)


def main(config: StatsConfig) -> None:
    from experiments.sweep import summary as report

    trials = load_trials(config.run)
    analysis = analyse(trials, settings_of(config.run, config.settings))
    write(analysis, config.run)
    print(report.summary(analysis, run=config.run))


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
