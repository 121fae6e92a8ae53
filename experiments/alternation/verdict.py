"""The rule of the alternation test on measures per latent: contrasts, splits, corrected p-values, one verdict.

What is predicted and by which rule it is judged stands in hypothesis.py. Knows nothing about models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from experiments.alternation.hypothesis import LEAST_ACCURACY, POOLED, Measure
from experiments.statistics.clusters import Settings, bootstrap_interval
from experiments.statistics.paired import max_statistic_p

__all__ = ["Profile", "Result", "analyse", "contrast_weights", "labellings", "p_words", "summary"]


# --- Contrast and splits ----------------------------------------------------------------------------------------------


def _trend(n: int) -> np.ndarray:
    """(n, 2) orthonormal constant and linear trend."""
    return np.linalg.qr(np.stack([np.ones(n), np.arange(n, dtype=float)], axis=1))[0]


def contrast_weights(n_latents: int) -> np.ndarray:
    """Weights w such that Σ w_k y_k is the coefficient of "k is even" beside a constant and a linear trend.

    Args:
        n_latents: 4 or more (with three the fit has nothing left over).

    Returns:
        (n_latents,) with Σ w = 0, Σ w k = 0 and Σ w over even latents = 1. For 6: (−5, 11, −8, 8, −11, 5) / 24.

    Raises:
        ValueError: fewer than 4 latents.
    """
    if n_latents < 4:
        raise ValueError(f"alternation needs at least 4 latents, got {n_latents}")
    even = (np.arange(1, n_latents + 1) % 2 == 0).astype(float)
    trend = _trend(n_latents)
    rest = even - trend @ (trend.T @ even)
    return rest / (rest @ even)


@lru_cache
def labellings(n_latents: int) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """Every split of the latents into two halves, even/odd first.

    Returns:
        members: one side of each split (for even n the side without latent 1: the other side is the same split).
        directions: (split, n_latents) the split's indicator with constant and trend taken off, at length 1. The square
            of its product with a profile is the sum of squares that the split explains beside the trend.
    """
    latents = range(1, n_latents + 1)
    even = tuple(k for k in latents if k % 2 == 0)
    sides = itertools.combinations(latents, n_latents // 2)
    members = (even, *(side for side in sides if side != even and (n_latents % 2 or 1 not in side)))
    indicators = np.array([[float(k in side) for k in latents] for side in members])
    trend = _trend(n_latents)
    rest = indicators - (indicators @ trend) @ trend.T
    return members, rest / np.linalg.norm(rest, axis=1, keepdims=True)


@dataclass(frozen=True)
class Profile:
    """Values of one measure.

    Attributes:
        measure: what it is.
        values: (prompt, latent 1..n, component), one component except for positions in a plane; NaN: unknown, the
            prompt is left out. None: the measure was not observed.
        direction: (component,) unit vector along which the contrast is tested; from other prompts.
        clusters: (prompt,).
        note: why it was not observed.
    """

    measure: Measure
    values: np.ndarray | None
    direction: np.ndarray
    clusters: np.ndarray
    note: str = ""

    @property
    def known(self) -> np.ndarray:
        """(prompt,) bool: prompts with a value at every latent."""
        if self.values is None:
            return np.zeros(len(self.clusters), bool)
        return np.isfinite(self.values).all((1, 2))


# --- The test ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the test found.

    Attributes:
        tests: one row per measure and one, "overall", for the pooled profile: contrast with interval, p, corrected p,
            effect sizes, splits, verdict and reason.
        levels: one row per measure × latent: mean with interval.
        settings: level, α, resamples, permutations and seed.
    """

    tests: pd.DataFrame
    levels: pd.DataFrame
    settings: Settings

    def verdict(self, measure: str = "overall") -> str:
        """Supported, contradicted, undecided or not testable."""
        return str(self.tests.set_index("measure").loc[measure, "verdict"])


def analyse(profiles: Sequence[Profile], settings: Settings | None = None, accuracy: float | None = None) -> Result:
    """Test every measure, correct over them, and come to one verdict.

    Args:
        profiles: at least one; all over the same prompts.
        settings: level, α, resamples, permutations, seed.
        accuracy: of the model on these prompts, a fraction; None: not known, so not asked for.

    Returns:
        Columns of `tests`: measure, predicted ("even" or "odd"), contrast (even − odd, trend removed), lower, upper, p
        (two-sided, this measure alone), p_corrected, d (mean contrast / standard deviation over clusters), explained
        (share of the differences between latents beyond the trend that even/odd accounts for; 1 of n − 2 degrees of
        freedom), split_rank (of even/odd among all splits), best_split, specific (share of resamples in which even/odd
        comes first), smallest, p_absent (corrected, against the smallest contrast that matters), n, n_clusters,
        verdict, reason.

    Raises:
        ValueError: no profiles, fewer than two clusters.
    """
    settings = settings or Settings(permutations=10_000)
    if not profiles:
        raise ValueError("there is nothing to test: no profiles")
    clusters = profiles[0].clusters
    names, codes = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"the unit of the test is the number triple: at least 2 are needed, got {len(names)}")
    weights = settings.weights(len(names))

    levels: list[dict[str, Any]] = []
    rows = [_describe(profile, codes, weights, settings, levels) for profile in profiles]
    _correct(rows, [profile.measure.smallest for profile in profiles], settings)
    testable = [_floor_reason(profile, row) for profile, row in zip(profiles, rows, strict=True)]
    for row, profile, reason in zip(rows, profiles, testable, strict=True):
        row["verdict"], row["reason"] = _verdict(row, profile.measure, reason, settings.alpha)
    pooled = _pool([profile for profile, reason in zip(profiles, testable, strict=True) if not reason], clusters)
    overall = _overall(pooled, rows, codes, weights, settings, levels)
    if accuracy is not None and accuracy < LEAST_ACCURACY:
        overall["verdict"] = "not testable"
        overall["reason"] = f"the model answers {accuracy:.1%} of the prompts right, {LEAST_ACCURACY:.0%} are needed"
    rows.append(overall)
    tests = pd.DataFrame(rows).drop(columns=["sums", "counts"])
    return Result(tests, pd.DataFrame(levels), settings)


def _describe(
    profile: Profile, codes: np.ndarray, weights: np.ndarray, settings: Settings, levels: list[dict[str, Any]]
) -> dict[str, Any]:
    """Contrast, interval and splits of one profile; its level at every latent goes to `levels`."""
    measure, n_clusters = profile.measure, weights.shape[1]
    row: dict[str, Any] = {
        "measure": measure.name, "predicted": "even" if measure.predicted > 0 else "odd", "contrast": np.nan,
        "lower": np.nan, "upper": np.nan, "p": np.nan, "p_corrected": np.nan, "d": np.nan, "explained": np.nan,
        "split_rank": 0, "best_split": "", "specific": np.nan, "smallest": measure.smallest, "p_absent": np.nan,
        "n": 0, "n_clusters": 0, "verdict": "", "reason": "",
        "sums": np.zeros(n_clusters), "counts": np.zeros(n_clusters),
    }  # fmt: skip
    known = profile.known
    if profile.values is None or not known.any():
        return row
    values, rows_of = profile.values[known].astype(float), codes[known]
    n = values.shape[1]
    along = values @ profile.direction
    counts = np.bincount(rows_of, minlength=n_clusters).astype(float)

    def by_cluster(x: np.ndarray) -> np.ndarray:
        return np.bincount(rows_of, weights=x, minlength=n_clusters)

    sums = by_cluster(along @ contrast_weights(n))
    unbounded = (-np.inf, np.inf)
    lower, upper = bootstrap_interval(sums[None], counts[None], weights=weights, level=settings.level, bounds=unbounded)
    latent_sums = np.stack([by_cluster(along[:, k]) for k in range(n)])
    low, high = bootstrap_interval(
        latent_sums, np.broadcast_to(counts, latent_sums.shape), weights=weights, level=settings.level, bounds=unbounded
    )
    for k in range(n):
        levels.append({
            "measure": measure.name, "latent": k + 1, "mean": latent_sums[k].sum() / counts.sum(), "lower": low[k],
            "upper": high[k], "n": int(known.sum()), "n_clusters": int((counts > 0).sum()),
        })  # fmt: skip

    present = counts > 0
    per_cluster = sums[present] / counts[present]
    spread = per_cluster.std(ddof=1) if present.sum() > 1 else 0.0
    cell_sums = np.stack([by_cluster(values[:, k, c]) for k in range(n) for c in range(values.shape[2])])
    members, _ = labellings(n)
    explained = _explained((cell_sums.sum(1) / counts.sum()).reshape(1, n, -1))[0]
    resampled = (weights @ cell_sums.T) / np.maximum(weights @ counts, 1e-12)[:, None]
    again = _explained(resampled.reshape(len(weights), n, -1))
    mean = (cell_sums.sum(1) / counts.sum()).reshape(n, -1)
    trend = _trend(n)
    left = float(((mean - trend @ (trend.T @ mean)) ** 2).sum())
    row.update({
        "contrast": sums.sum() / counts.sum(), "lower": lower[0], "upper": upper[0],
        "p": max_statistic_p(sums[None], permutations=settings.permutations, seed=settings.seed)[0],
        "d": per_cluster.mean() / spread if spread > 0 else np.nan,
        "explained": explained[0] / left if left > 1e-24 else np.nan,
        "split_rank": 1 + int((explained[1:] >= explained[0]).sum()),
        "best_split": "".join(map(str, members[int(explained.argmax())])) if left > 1e-24 else "",
        "specific": float((again[:, 0] > again[:, 1:].max(1) * (1 + 1e-9) + 1e-24).mean()),
        "n": int(known.sum()), "n_clusters": int(present.sum()), "sums": sums, "counts": counts,
    })  # fmt: skip
    return row


def _explained(profiles: np.ndarray) -> np.ndarray:
    """(row, split) sum of squares that each split explains beside the trend, of (row, latent, component) profiles."""
    _, directions = labellings(profiles.shape[1])
    return (np.einsum("sk,rkc->rsc", directions, profiles) ** 2).sum(-1)


def _correct(rows: list[dict[str, Any]], smallest: Sequence[float], settings: Settings) -> None:
    """Family-wise p over all observed measures: against 0, and against the smallest contrast that matters."""
    seen = [i for i, row in enumerate(rows) if row["n"]]
    if not seen:
        return
    sums = np.stack([rows[i]["sums"] for i in seen])
    counts = np.stack([rows[i]["counts"] for i in seen])
    signs = np.array([1.0 if rows[i]["predicted"] == "even" else -1.0 for i in seen])
    bounds = np.array([smallest[i] for i in seen])
    options = {"permutations": settings.permutations, "seed": settings.seed}
    against_zero = max_statistic_p(sums, **options)
    against_smallest = max_statistic_p(signs[:, None] * sums - bounds[:, None] * counts, **options)
    for i, present, absent in zip(seen, against_zero, against_smallest, strict=True):
        rows[i]["p_corrected"], rows[i]["p_absent"] = present, absent


def _floor_reason(profile: Profile, row: dict[str, Any]) -> str:
    """Why a measure cannot be tested; empty if it can."""
    if not row["n"]:
        return profile.note or "no prompt has a value"
    assert profile.values is not None
    highest = float(profile.values[profile.known].mean((0, 2)).max())
    if profile.measure.floor and highest < profile.measure.smallest:
        return f"at its floor: no latent reaches {profile.measure.smallest:g} (highest {highest:.3f})"
    return ""


def _verdict(row: dict[str, Any], measure: Measure, untestable: str, alpha: float) -> tuple[str, str]:
    if untestable:
        return "not testable", untestable
    size = measure.predicted * row["contrast"]
    higher = "even" if row["contrast"] > 0 else "odd"
    there, specific = row["p_corrected"] <= alpha, row["specific"] >= 1 - alpha
    if there and specific and size >= measure.smallest:
        return "supported", f"{higher} latents higher, as predicted, and no other split explains as much"
    if size < measure.smallest and row["p_absent"] <= alpha:
        if there and size < 0:
            return "contradicted", f"{higher} latents are the higher ones"
        return "contradicted", f"smaller than {measure.smallest:g}, the least that would matter"
    if not there:
        return "undecided", "the contrast could be 0"
    if size < measure.smallest:
        return "undecided", f"it could be {measure.smallest:g} or less"
    split = ", ".join(row["best_split"])
    if row["split_rank"] > 1:
        return "undecided", f"not alternation: latents {split} against the rest explain more"
    return "undecided", "even/odd comes first in too few resamples"


def _pool(profiles: Sequence[Profile], clusters: np.ndarray) -> np.ndarray | None:
    """(prompt, latent) mean over measures of predicted sign × deviation from the prompt's mean, standardised."""
    scaled = []
    for profile in profiles:
        assert profile.values is not None
        along = profile.measure.predicted * (profile.values @ profile.direction)
        along[~profile.known] = np.nan
        along -= along.mean(axis=1, keepdims=True)
        spread = np.sqrt(np.nanmean(along**2))
        scaled.append(along / spread if spread > 0 else along)
    if not scaled:
        return None
    stacked = np.stack(scaled)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _overall(
    pooled: np.ndarray | None,
    rows: Sequence[dict[str, Any]],
    codes: np.ndarray,
    weights: np.ndarray,
    settings: Settings,
    levels: list[dict[str, Any]],
) -> dict[str, Any]:
    values = None if pooled is None else pooled[:, :, None]
    row = _describe(Profile(POOLED, values, np.ones(1), codes), codes, weights, settings, levels)
    row["p_corrected"] = row["p"]
    counts = {verdict: sum(r["verdict"] == verdict for r in rows) for verdict in ("supported", "contradicted")}
    testable = sum(r["verdict"] != "not testable" for r in rows)
    there = row["n"] > 0 and row["p"] <= settings.alpha and row["contrast"] > 0
    specific = row["specific"] >= 1 - settings.alpha
    tally = f"{counts['supported']} of {testable} testable measures supported, {counts['contradicted']} contradicted"
    if testable < 3:
        return {**row, "verdict": "not testable", "reason": f"only {testable} measures are testable, 3 are needed"}
    if there and specific and counts["supported"] >= testable / 2:
        return {**row, "verdict": "supported", "reason": tally}
    if counts["contradicted"] > testable / 2:
        return {**row, "verdict": "contradicted", "reason": tally}
    lacking = []
    if not there:
        lacking.append("the pooled contrast could be 0 or has the wrong sign")
    elif not specific:
        lacking.append(f"pooled, latents {', '.join(row['best_split'])} against the rest explain more or about as much")
    return {**row, "verdict": "undecided", "reason": "; ".join([tally, *lacking])}


# --- Words ------------------------------------------------------------------------------------------------------------


def p_words(value: float) -> str:
    """A p-value as it stands in tables and figures."""
    return "–" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def summary(result: Result) -> str:
    """The verdicts as markdown: overall first, then a row per measure."""
    tests = result.tests.set_index("measure")
    overall = result.tests.iloc[-1]
    prompts, clusters = int(tests["n"].max()), int(tests["n_clusters"].max())
    pooled = "Nothing could be pooled."
    if overall["n"]:
        pooled = (
            f"Pooled contrast {_number(overall)} SD, p {p_words(overall['p'])}; even/odd is number "
            f"{overall['split_rank']} of the splits and first in {100 * overall['specific']:.0f} % of resamples."
        )
    lines = [
        f"**Compute/store alternation: {overall['verdict']}** ({overall['reason']}; "
        f"n = {prompts} prompts in {clusters} number triples).",
        "",
        pooled,
        "",
        "| measure | predicted higher | even − odd [95 %] | p vs 0 | p vs smallest | d | explained | best split "
        "| first in | n | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in tests.drop(index="overall").iterrows():
        best = ", ".join(row["best_split"]) or "–"
        numbers = (
            f"{_number(row)} | {p_words(row['p_corrected'])} | {p_words(row['p_absent'])} | {_two(row['d'])} | "
            f"{_two(row['explained'])} | {best} | {100 * row['specific']:.0f} %"
            if row["n"] else "– | – | – | – | – | – | –"
        )  # fmt: skip
        verdict = f"**{row['verdict']}**: {row['reason']}"
        lines.append(f"| {name} | {row['predicted']} | {numbers} | {row['n']} ({row['n_clusters']}) | {verdict} |")
    lines += [
        "",
        "even − odd: coefficient beside a linear trend. p vs 0, p vs smallest: corrected over the measures, against no "
        "contrast and against the smallest one that would matter. explained: share of the differences between latents "
        "beyond the trend. best split: one half of the split of the latents that explains most; first in: share of "
        "resamples of triples in which even/odd does. n: prompts (triples).",
    ]
    return "\n".join(lines)


def _two(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _number(row: pd.Series) -> str:
    return f"{row['contrast']:+.3f} [{row['lower']:+.3f}, {row['upper']:+.3f}]"
