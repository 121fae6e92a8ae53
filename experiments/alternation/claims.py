"""C1, C2, S1, S2, S3 and S7 of the published claims about single latents, judged on observations of a model.

Each claim becomes one number with an interval over number triples and a rule fixed here beforehand. A *lead* is the
smallest value at the claimed latents minus the largest at all the others: positive exactly if the claimed latents are
ahead of every other one. Intervals are bootstrap intervals of the number itself (a lead is computed anew in every
resample), by the one rule of statistics.clusters.

Knows nothing about how observations are made. Not a command: `codi alternation` writes the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.alternation.measures import DIRECTION_RESAMPLES, Observations, detection, steps_of
from experiments.alternation.verdict import Result
from experiments.statistics.alternation import Profile, alternation, contrast_weights
from experiments.statistics.clusters import (
    Estimate,
    Settings,
    cluster_codes,
    cluster_sums,
    expanded_percentile,
    interval_of,
)
from experiments.statistics.equivalence import judge_absence
from experiments.study.claims import Claim, ClaimsTable, Verdict, judge

__all__ = ["published_claims"]


class _Interval:
    """Estimates with cluster-bootstrap intervals of any function of column means."""

    def __init__(self, clusters: np.ndarray, settings: Settings) -> None:
        self.codes, self.names = cluster_codes(clusters)
        self.weights, self.level = settings.weights(len(self.names)), settings.level

    def __call__(
        self, values: np.ndarray, function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray | None = None
    ) -> Estimate:
        """Of function(means), means (resample, column); prompts with an unknown column are left out.

        Args:
            values: (prompt, column).
            function: from (…, column) to (…,).
            rows: (prompt,) bool, the prompts to use; None: all.
        """
        known = np.isfinite(values).all(1) & (True if rows is None else rows)
        if not known.any():
            return Estimate(np.nan, np.nan, np.nan, 0, 0)
        sums, counts = cluster_sums(values[known], self.codes[known], len(self.names))
        n_clusters = int((counts[0] > 0).sum())
        reach = 2 * max(1.0, float(np.abs(values[known]).max()))  # no difference of two means is larger
        estimate, lower, upper = interval_of(
            lambda totals: function(totals[:, :-1] / totals[:, -1:]),
            np.vstack([sums, counts[:1]]),
            weights=self.weights,
            n_clusters=n_clusters,
            level=self.level,
            bounds=(-reach, reach),
        )
        return Estimate(float(estimate[0]), float(lower[0]), float(upper[0]), int(known.sum()), n_clusters)


def _lead(columns: Sequence[int]) -> Callable[[np.ndarray], np.ndarray]:
    """The smallest of the given columns minus the largest of the others."""
    chosen = list(columns)

    def lead(means: np.ndarray) -> np.ndarray:
        return means[..., chosen].min(-1) - np.delete(means, chosen, axis=-1).max(-1)

    return lead


def _claim(
    name: str,
    statement: str,
    measured: str,
    estimate: Estimate,
    above: float | None = None,
    below: float | None = None,
    note: str = "",
) -> Claim:
    verdict: Verdict = judge(estimate.lower, estimate.upper, above=above, below=below)
    if verdict == "not testable":
        note = note or "no prompt to measure it on"
    return Claim(name, statement, measured, verdict, note=note, **dataclasses.asdict(estimate))


def _numbers(row: pd.Series) -> dict[str, Any]:
    """The fields of a claim from a row of `alternation`."""
    return {
        "estimate": float(row["contrast"]), "lower": float(row["lower"]), "upper": float(row["upper"]),
        "n": int(row["n"]), "n_clusters": int(row["n_clusters"]),
    }  # fmt: skip


def _untestable(name: str, statement: str, note: str) -> Claim:
    return Claim(name, statement, "–", "not testable", note=note)


def published_claims(
    observations: Observations,
    result: Result,
    *,
    therefore: Sequence[int] = (),
    d_model: int = 0,
    suffix: str = "",
) -> ClaimsTable:
    """C1, C2, S1, S2, S3 and S7 of the published claims, by the observations at hand.

    Args:
        observations: of the model.
        result: of `analyse` on the same observations.
        therefore: token ids of the word family "therefore"; none: S3 is not testable.
        d_model: width of the states, for what a random direction would give.
        suffix: put behind every name, for a task beside others.
    """
    settings, n = result.settings, observations.n_latents
    interval = _Interval(observations.clusters, settings)
    table = ClaimsTable()
    _accuracy_claims(table, observations, interval)
    _readout_claims(table, observations, interval)

    if n >= 6:
        finals = [np.subtract(*detection(observations, "final", k))[:, 1:] for k in range(1, 11)]
        leads = [interval(rates, _lead([1, 3])) for rates in finals]
        smallest = min(leads, key=lambda lead: lead.lower)
        table.add(_claim(
            "S1 detection", "the final answer is detected most at latents 2 and 4, for every k = 1..10",
            "lead of h_2 and h_4 over the other latents (rate above chance), smallest over k; above 0", smallest,
            above=0.0, note=f"at k = 5: {leads[4].estimate:.3f} [{leads[4].lower:.3f}, {leads[4].upper:.3f}]",
        ))  # fmt: skip
        entropy = observations.readings.entropy[:, 1:, 0]
        table.add(_claim(
            "S1 entropy", "entropy is highest at latents 3 and 5",
            "lead of h_3 and h_5 over the other latents, nats; above 0", interval(entropy, _lead([2, 4])), above=0.0,
        ))  # fmt: skip
    statement = "a lens trained on latents fails on text tokens"
    table.add(_untestable("S2", statement, "needs trained lenses: codi lens transfer"))
    _therefore_claims(table, observations, interval, therefore)
    _component_claims(table, observations, result, d_model)
    return ClaimsTable(dataclasses.replace(claim, name=f"{claim.name}{suffix}") for claim in table)


def _accuracy_claims(table: ClaimsTable, observations: Observations, interval: _Interval) -> None:
    after = observations.correct_after
    if after is None or observations.n_latents < 6:
        table.add(_untestable("C1", "accuracy peaks at 5 latents", "needs answers after 0..6 latents"))
        return
    accuracy = after.astype(float)
    levels = ", ".join(f"{value:.3f}" for value in accuracy.mean(0))
    table.add(_claim(
        "C1 peak", "accuracy peaks at 5 latents", "accuracy after 5 minus the best of all other numbers; above 0",
        interval(accuracy, _lead([5])), above=0.0, note=f"accuracy after 0.. latents: {levels}",
    ))  # fmt: skip
    table.add(_claim(
        "C1 jump", "accuracy jumps from 4 to 5 latents", "gain by latent 5 minus the largest other gain; above 0",
        interval(np.diff(accuracy, axis=1), _lead([4])), above=0.0,
    ))  # fmt: skip
    table.add(_claim(
        "C1 sixth", "the sixth latent adds nothing", "accuracy after 6 minus after 5; below 0.02",
        interval(accuracy, lambda means: means[..., 6] - means[..., 5]), below=0.02,
    ))  # fmt: skip


def _readout_claims(table: ClaimsTable, observations: Observations, interval: _Interval) -> None:
    n = observations.n_latents
    wrong = None if observations.correct_after is None else ~observations.correct_after[:, -1].astype(bool)
    two = n >= 4 and all(len(steps_of(problem)) >= 2 for problem in observations.problems)
    for step, latent in ((1, 2), (2, 4)):
        statement = f"step{step} is read at h_{latent}"
        if not two:
            table.add(_untestable(f"C2 step{step}", statement, "needs problems with three steps or more"))
            continue
        rates = np.subtract(*detection(observations, step))
        highest = np.nanmean(rates, axis=0)
        where = f"rate above chance at h_0..h_{n}: {', '.join(f'{value:.3f}' for value in highest)}"
        table.add(_claim(
            f"C2 step{step}", statement, f"lead of h_{latent} over h_0..h_{n}, top 5, rate above chance; above 0",
            interval(rates, _lead([latent])), above=0.0, note=where,
        ))  # fmt: skip
        if wrong is not None:
            table.add(_claim(
                f"C2 step{step} wrong", f"{statement} even where the answer is wrong",
                "the same, prompts with a wrong answer only; above 0", interval(rates, _lead([latent]), wrong),
                above=0.0, note="" if wrong.any() else "every answer is right",
            ))  # fmt: skip
    finals = np.subtract(*detection(observations, "final"))
    table.add(_claim(
        "C2 final", "the final answer is not readable by the plain lens",
        f"highest rate above chance over h_0..h_{n}, top 5; below 0.05",
        interval(finals, lambda means: means.max(-1)), below=0.05,
    ))  # fmt: skip


def _therefore_claims(
    table: ClaimsTable, observations: Observations, interval: _Interval, therefore: Sequence[int]
) -> None:
    statements = {"S3 odd": "“therefore” is at odd latents only", "S3 late": "“therefore” is there from latent 3 on"}
    if not therefore:
        for name, statement in statements.items():
            table.add(_untestable(name, statement, "no form of “therefore” is one token of this vocabulary"))
        return
    shown = np.isin(observations.readings.tokens[:, 1:, 0], list(therefore)).any(-1).astype(float)
    rates = ", ".join(f"{rate:.3f}" for rate in shown.mean(0))
    odd = [k for k in range(observations.n_latents) if k % 2 == 0]
    late = list(range(2, observations.n_latents))
    for (name, statement), columns in zip(statements.items(), (odd, late), strict=True):
        table.add(_claim(
            name, statement, "lead of those latents, rate in the top 10; above 0", interval(shown, _lead(columns)),
            above=0.0, note=f"rates at latents 1..: {rates}",
        ))  # fmt: skip


def _component_claims(table: ClaimsTable, observations: Observations, result: Result, d_model: int) -> None:
    reference, settings = observations.reference, result.settings
    statement = "the first component of latents is parallel to the end-of-thought direction"
    if reference.cosines is None:
        table.add(_untestable("S7 direction", statement, "not observed"))
    else:
        n_clusters = len(np.unique(reference.clusters))
        plain, again = reference.cosines[0], reference.cosines[1:]
        lower, upper = expanded_percentile(again[:, None], n_clusters, settings.level, bounds=(0.0, 1.0))
        value = Estimate(float(plain), float(lower[0]), float(upper[0]), len(reference.clusters), n_clusters)
        chance = 1.96 / np.sqrt(d_model)
        table.add(_claim(
            "S7 direction", statement,
            "|cosine| of the first component of h_1..h_n and the end-of-thought embedding; above 0.7", value, above=0.7,
            note=f"{DIRECTION_RESAMPLES} resamples; a random direction stays below {chance:.2f} in 95 % of cases",
        ))  # fmt: skip
    tested = result.tests[result.tests["measure"] == "components"]
    statement = "the first two components separate even and odd latents"
    if tested.empty or tested.iloc[0]["verdict"] == "not testable":
        table.add(_untestable("S7 latents", statement, "the components were not tested"))
    else:
        row = tested.iloc[0]
        says: dict[str, Verdict] = {"supported": "held", "undecided": "undecided"}
        table.add(Claim(
            "S7 latents", statement, "contrast in the plane (SD); held if the measure “components” is supported",
            says.get(row["verdict"], "not held"), **_numbers(row), note=f"{row['answer']}: {row['reason']}",
        ))  # fmt: skip
    size = 0.5 if tested.empty else float(tested.iloc[0]["smallest"])
    for name, latents in {"keys": reference.keys, "values": reference.values}.items():
        statement = f"the first two components of cached {name} show no even/odd pattern"
        if latents is None:
            table.add(_untestable(f"S7 {name}", statement, "cache entries were not kept"))
            continue
        apart = np.einsum("k,pkc->c", contrast_weights(observations.n_latents), latents)
        direction = apart / (np.linalg.norm(apart) or 1.0)
        profile = Profile("slots", latents, 1, size, direction=direction)
        found = alternation([profile], reference.clusters, settings).iloc[0]
        judgement = judge_absence(found["lower"], found["upper"], size)
        split = f"split {', '.join(found['best_split'])} explains most; even/odd is number {found['split_rank']}"
        table.add(Claim(
            f"S7 {name}", statement,
            f"contrast in the plane (SD), along the direction in which it is largest; held if within {size:.3g}",
            judgement.verdict, **_numbers(found), note=f"{judgement.reason}; {split}",
        ))  # fmt: skip
