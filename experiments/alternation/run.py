"""`codi alternation`: do even latents store and odd latents compute? One test with one verdict.

Everything that could be chosen after seeing the data is fixed here, as data: `MEASURES` (what is measured, which parity
the hypothesis predicts to be higher, the smallest difference that would matter), and `RULES` (contrast, unit, tests,
correction, verdicts). Nothing is chosen by the numbers.

Contrast. Six latents differ by more than parity: what grows or falls along the thought also differs between {2, 4, 6}
and {1, 3, 5}. The contrast is therefore the regression coefficient of "latent is even" beside a constant and a linear
trend in k. It is in the units of the measure; a straight line gives 0, values that alternate by ±d/2 give d, and so
does the same alternation on top of a line. For n = 6 it is also blind to any quadratic.

Two questions, both of which must be answered with yes:

1. Is it there? Unit: number triple (cluster). Null: a triple's contrast is as likely negative as positive; whole
   triples are flipped, the same flips for every measure, step-down max-statistic over all measures (family-wise). This
   generalises over prompts, not over latents: any fixed profile that is not exactly flat against the contrast is
   found with enough triples. Hence
2. Is it alternation? Every way to split the latents into two halves (10 for n = 6) is fitted in place of even/odd,
   beside the same trend. Even/odd must explain more than each of the others, in at least 1 − α of the bootstrap
   resamples of triples. Steps, single special latents and smooth curves fail here. If the latents' effects were
   exchangeable, even/odd would come first by chance once in 10, with the predicted sign once in 20: that is the level
   of one measure against arbitrary profiles, and with six latents none can be lower.

The same test against the smallest difference that matters says when a measure contradicts the hypothesis rather than
leaving it open. Runs as `codi alternation` or `python -m experiments.alternation`. Measures themselves:
latent_measures.py.

Source of the hypothesis: Scratchpad Thinking (2025) and the Latent Reasoning Sprint posts; of some measures: Cywiński
et al. In their numbering of vectors (0..6 = h_0..h_6) and in ours "even" means h_2, h_4, h_6.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from experiments.alternation.observe import Observations, components, detection, observe, principal_plane, readability
from experiments.statistics.clusters import Settings, bootstrap_interval
from experiments.statistics.paired import max_statistic_p

if TYPE_CHECKING:
    from codi import CodiModel
    from experiments.study.claims import ClaimsTable

__all__ = [
    "Config", "MEASURES", "Measure", "Profile", "RULES", "Result", "Settings", "analyse", "contrast_weights",
    "labellings", "main", "profiles_of", "summary",
]  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """One measure of the test, as fixed before it is run.

    Attributes:
        name: in tables.
        label: on the figure.
        unit: of its values.
        predicted: +1 if the hypothesis predicts even latents higher, −1 if odd ones.
        smallest: smallest difference between even and odd that would matter, in its unit, above 0.
        floor: values near 0 mean that there is nothing to compare: if no latent reaches `smallest`, not testable.
        why: the prediction in words.
    """

    name: str
    label: str
    unit: str
    predicted: Literal[1, -1]
    smallest: float
    floor: bool
    why: str


MEASURES: tuple[Measure, ...] = (
    Measure("intermediate_detection", "Intermediate value in top 5", "rate above chance", 1, 0.05, True,
            "stored intermediate values are readable from h_k by the model's own head at even latents"),
    Measure("final_detection", "Final answer in top 5", "rate above chance", 1, 0.05, True,
            "the same for the answer"),
    Measure("entropy", "Entropy of the lens", "nats", -1, 0.1, False,
            "odd latents compute: their distribution is broad (published: highest at 3 and 5)"),
    Measure("early_answer_gain", "Accuracy gained by latent k", "fraction", -1, 0.05, True,
            "accuracy of an answer after k latents grows when latent k computes"),
    Measure("ablation_damage", "Accuracy lost without latent k", "fraction", 1, 0.05, True,
            "mean-ablating the embedding of a latent that stores loses what it stored"),
    Measure("attention_to_numbers", "Attention: latent k → numbers", "attention mass", 1, 0.01, False,
            "published: attention to number tokens of the question peaks at even latents"),
    Measure("attention_from_end", "Attention: end of thought → k", "attention mass", 1, 0.01, False,
            "the answer is read off the latents that store"),
    Measure("attention_from_next", "Attention: next position → k", "attention mass", 1, 0.01, False,
            "a computing latent reads the storing one before it"),
    Measure("components", "Place in the first two PCs", "SD in the plane", 1, 0.5, False,
            "even and odd latents lie apart; direction taken from derivation prompts, so the sign is a replication"),
    Measure("probe_intermediate", "Probe: step values from h_k", "accuracy above shuffled", 1, 0.05, True,
            "intermediate values are linearly readable where they are stored"),
    Measure("probe_kind", "Probe: intermediate − final", "accuracy difference", -1, 0.05, False,
            "published: a probe for intermediate versus final works at latents 3 and 5"),
)  # fmt: skip
TUNED_MEASURES: tuple[Measure, ...] = (
    Measure("tuned_intermediate", "Intermediate, tuned lens", "rate above chance", 1, 0.05, True,
            "as intermediate_detection, by a tuned lens, mean over the layers below the last"),
    Measure("tuned_final", "Final answer, tuned lens", "rate above chance", 1, 0.05, True,
            "as final_detection, by a tuned lens, mean over the layers below the last"),
    Measure("tuned_entropy", "Entropy, tuned lens", "nats", -1, 0.1, False,
            "as entropy, by a tuned lens, mean over the layers below the last"),
)  # fmt: skip
LEAST_ACCURACY = 0.2
"""A model that answers fewer prompts right than this (a fraction) says nothing about how latents work."""
RULES: dict[str, str] = {
    "contrast": "coefficient of 'latent is even' in a least-squares fit with constant and linear trend in k",
    "unit": "number triple (cluster of prompts that share their numbers); bootstrap and sign flips move whole triples",
    "detection": "top 5 tokens of the model's head on h_k, minus the rate of other triples' values; values that stand "
    "in the question or are also another step's or the answer's are left out",
    "correction": "step-down max-statistic over all measures, common sign flips (family-wise)",
    "specificity": "even/odd explains more than every other split of the latents into halves, beside the same trend, "
    "in at least 1 - alpha of the bootstrap resamples",
    "supported": "corrected p <= alpha, sign as predicted, size at least the smallest that matters, and specific",
    "contradicted": "the contrast in the predicted direction is below the smallest size that matters (corrected "
    "p <= alpha against that size); a contrast of the opposite sign is a case of it",
    "undecided": "neither",
    "not testable": "not observed, or at its floor at every latent",
    "overall": "pooled profile: mean over testable measures of predicted sign x deviation from the prompt's mean, in "
    "units of its standard deviation. Supported: pooled contrast positive with p <= alpha, specific, and at least half "
    "of the testable measures (3 or more) supported. Contradicted: not so, and more than half of them contradicted. "
    "Otherwise undecided. Not testable with fewer than 3 testable measures, or for a model that answers fewer than "
    f"{LEAST_ACCURACY:.0%} of the prompts right",
}


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


# --- From observations to profiles ------------------------------------------------------------------------------------


def profiles_of(observations: Observations, seed: int = 0) -> list[Profile]:
    """Every measure of `MEASURES` (and of `TUNED_MEASURES` if a tuned lens was read), in that order.

    Args:
        observations: of a model, or simulated.
        seed: of probes and components.
    """
    clusters = observations.clusters
    found: dict[str, np.ndarray | None] = {}
    directions: dict[str, np.ndarray] = {}

    def rate(which: str, tuned: bool = False) -> np.ndarray:
        hit, chance = detection(observations, which, 5, tuned)
        return (hit - chance)[:, 1:]

    found["intermediate_detection"] = rate("intermediate")
    found["final_detection"] = rate("final")
    found["entropy"] = observations.readings.entropy[:, 1:, 0]
    if observations.correct_after is not None:
        after = observations.correct_after.astype(float)
        found["early_answer_gain"] = np.diff(after, axis=1)
        if observations.correct_ablated is not None:
            found["ablation_damage"] = after[:, -1:] - observations.correct_ablated.astype(float)
    if observations.attention is not None:
        n, latents = observations.n_latents, observations.attention[:, :, 2:]
        found["attention_to_numbers"] = observations.attention[:, :n, 0]
        found["attention_from_end"] = latents[:, n]
        found["attention_from_next"] = latents[:, np.arange(1, n + 1), np.arange(n)]
    plane = principal_plane(observations.reference.states, seed)
    weights = contrast_weights(observations.n_latents)
    apart = np.einsum("k,pkc->c", weights, components(observations.reference.states, plane))
    found["components"] = components(observations.states[:, 1:], plane)
    directions["components"] = apart / (np.linalg.norm(apart) or 1.0)
    gains = readability(observations.states[:, 1:], observations.problems, seed=seed)
    steps = [gain for name, gain in gains.items() if name != "answer"]
    if steps:
        found["probe_intermediate"] = np.mean(steps, axis=0)
        if "answer" in gains:
            found["probe_kind"] = np.mean(steps, axis=0) - gains["answer"]
    measures = MEASURES
    if observations.tuned is not None:
        measures += TUNED_MEASURES
        found["tuned_intermediate"] = rate("intermediate", tuned=True)
        found["tuned_final"] = rate("final", tuned=True)
        found["tuned_entropy"] = observations.tuned.entropy[:, 1:].mean(-1)
    profiles = []
    for measure in measures:
        values = found.get(measure.name)
        if values is not None and values.ndim == 2:
            values = values[:, :, None]
        note = "" if values is not None else "not observed for these problems"
        profiles.append(Profile(measure, values, directions.get(measure.name, np.ones(1)), clusters, note))
    return profiles


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


POOLED = Measure("overall", "All testable measures, pooled", "SD, predicted sign", 1, 0.0, False, RULES["overall"])


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


# --- Command ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Do even latents store and odd latents compute? One test over all measures, one verdict."""

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id."""
    task: str = "templates"
    """Problems whose steps are known: templates, arithmetic, a file, a folder or a hub id."""
    limit: int | None = 1120
    """Number of prompts that are tested, a seeded choice; None: all of the test split."""
    derivation: int = 560
    """Number of other prompts (no number triple in common) behind the means of the ablation and the components."""
    min_steps: int | None = None
    """Only problems of at least this many steps (not for templates); None: no bound."""
    max_steps: int | None = None
    """Only problems of at most this many steps (not for templates); None: no bound."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if any."""
    lens: Path | None = None
    """Folder of tuned lenses (codi lens train): adds three measures read with it, and the correction covers them."""
    lens_name: str = "all"
    """Which of them: "all", "each" (every latent its own), or the name of one."""
    alpha: float = 0.05
    """Level of the tests, a fraction."""
    resamples: int = 2000
    """Bootstrap resamples of number triples."""
    permutations: int = 10_000
    """Random sign flips of number triples."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None: the default of the checkpoint's answer style."""
    batch_size: int = 128
    """Prompts computed at once."""
    seed: int = 0
    """Of problems, probes, components, bootstrap and sign flips."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: CUDA if there is any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: Literal["original", "original-eos", "answer-only"] | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published setting."""
    mask: Literal["carried", "published"] = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    out: Path = Path("runs/alternation")
    """Folder for the tables (CSV, JSON), figures (PNG, PDF), claims and manifest."""


def _therefore_tokens(model: CodiModel) -> list[int]:
    """Ids of the forms of "therefore" that are one token."""
    forms = ("therefore", " therefore", "Therefore", " Therefore")
    ids = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return sorted({found[0] for found in ids if len(found) == 1})


def main(config: Config) -> None:
    """Observe, test, judge; write tables, figures and claims; print the verdict."""
    import torch
    from tqdm import tqdm

    from codi import load_codi
    from experiments.alternation.claims import published_claims
    from experiments.study.folder import versions
    from experiments.tasks.split import load_split

    settings = Settings(config.resamples, config.permutations, alpha=config.alpha, seed=config.seed)
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}")
    config.out.mkdir(parents=True, exist_ok=True)
    model = load_codi(
        config.model, base=config.base, protocol=config.protocol, lora_alpha=config.lora_alpha, mask=config.mask,
        dtype=config.dtype, device=None if config.device == "auto" else config.device, attention="eager",
    )  # fmt: skip
    contrast_weights(model.n_latents)  # refuses a model with too few latents before the work
    split = load_split(
        config.task, limit=config.limit, derivation=config.derivation, seed=config.seed,
        suffix=model.protocol.question_suffix if config.suffix else "", min_steps=config.min_steps,
        max_steps=config.max_steps,
    )  # fmt: skip
    if any(not problem.intermediates for problem in split.evaluation):
        raise ValueError(f"{config.task}: the test needs problems whose steps are known")
    lens = None
    if config.lens is not None:
        from lenses.latent_lens import choose_lens, load_lenses, unembed

        head = unembed(model)
        lens = choose_lens(config.lens_name, load_lenses(config.lens, model, head), model, head)
        unread = [k for k in range(1, model.n_latents + 1) if not lens.reads(k)]
        if unread:
            raise ValueError(f"lens {config.lens_name!r} does not read latent {unread[0]}: choose one for all latents")
    with tqdm(total=len(split.derivation) + len(split.evaluation), unit="prompt", desc="latents") as bar:
        observations = observe(
            model, split.derivation, split.evaluation, lens=lens, max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size, advance=bar.update,
        )  # fmt: skip
    assert observations.correct_after is not None
    accuracy = float(observations.correct_after[:, -1].mean())
    result = analyse(profiles_of(observations, config.seed), settings, accuracy)
    with torch.no_grad():
        end = model.embed(torch.tensor(model.protocol.eot_id, device=model.device)).float().cpu().numpy()
    claims = published_claims(
        observations, result, therefore=_therefore_tokens(model), end_embedding=end, seed=config.seed
    )
    written = _write(config, model, observations, result, claims, {**split.record(), "versions": versions()})
    head = f"{model.name}: {config.task}, accuracy {accuracy:.3f}"
    text = f"{head}\n\n{summary(result)}\n\n{claims.markdown()}"
    (config.out / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n\nWritten to {config.out}: {', '.join(path.name for path in written)}, summary.md")


def _write(
    config: Config,
    model: CodiModel,
    observations: Observations,
    result: Result,
    claims: ClaimsTable,
    record: dict[str, Any],
) -> list[Path]:
    from experiments.alternation.figures import draw, draw_states
    from experiments.figures.style import FORMATS, encode
    from experiments.study.folder import RunFolder

    out = config.out
    options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    manifest = {
        "options": options, "checkpoint_hash": model.checkpoint_hash, "protocol": model.protocol.to_dict(), **record,
        "settings": asdict(result.settings), "rules": RULES,
        "measures": [asdict(measure) for measure in (*MEASURES, *TUNED_MEASURES)],
        "splits": ["".join(map(str, side)) for side in labellings(model.n_latents)[0]],
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    paths = []
    for name, table in (("tests", result.tests), ("latents", result.levels)):
        table.to_csv(out / f"{name}.csv", index=False)
        (out / f"{name}.json").write_text(table.to_json(orient="records", indent=1) + "\n", encoding="utf-8")
        paths += [out / f"{name}.csv", out / f"{name}.json"]
    paths += claims.write(RunFolder(out).write)
    for name, figure in (("alternation", draw(result)), ("states", draw_states(observations, config.seed))):
        for form in FORMATS:
            paths.append(out / f"{name}.{form}")
            paths[-1].write_bytes(encode(figure, form))
    return paths


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
