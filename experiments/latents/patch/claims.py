"""The published claims that patching can judge: C3 (latents 3 and 5 hold what the answer needs) and C5 (a patched
step moves the answer as the arithmetic predicts). Knows nothing about trials."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from experiments.latents.patch.means import replaced
from experiments.latents.patch.plan import Plan
from experiments.latents.patch.values import SCOPES, STATES, patched
from experiments.statistics.effects import row_of
from experiments.statistics.words import interval
from experiments.study.claims import Claim, ClaimsTable, effect_claim, judge

__all__ = ["ENOUGH", "claims_of"]

ENOUGH = 0.2
"""Unedited accuracy below this leaves claims about lost answers not testable."""


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> ClaimsTable:
    """C3 and C5, as far as their families of edits were tried."""
    claims = ClaimsTable()
    if "means" in tables:
        claims.add(_third_and_fifth(plan, tables))
    if "values_local" in tables:
        k = min(5, plan.n_latents)
        for scope in SCOPES:
            for state in STATES:
                row = row_of(tables["values_local"], patched("target", 2, scope, state, k))
                claims.add(
                    effect_claim(
                        f"C5 ({scope}, {state})",
                        f"step-2 patching at latent {k} moves the answer as predicted, far above random",
                        "share of predicted answers, minus the control value's, is above 0.1",
                        judge(row["lower"], row["upper"], above=0.1),
                        row,
                    )
                )
    return claims


def _third_and_fifth(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Claim:
    n, means = plan.n_latents, tables["means"]
    base = float(row_of(means, replaced("mean", [1]), {"kind": "none"})["reference_mean"])
    text = "the mean of another key hurts at latents 3 and 5 only"
    rule = "accuracy (other key − same key) at latents 3 and 5, minus the other latents, is below 0"
    if n < 5 or base < ENOUGH:
        reason = f"this model has {n} latents" if n < 5 else f"unedited accuracy is {base:.2f}: little to lose"
        return Claim("C3", text, rule, "not testable", note=reason)
    each = [row_of(means, replaced("other key", [k]), replaced("same key", [k])) for k in range(1, n + 1)]
    note = "points per latent: " + ", ".join(interval(row, "difference") for row in each)
    row = row_of(tables["claimed_latents"], {"claimed": True})
    return effect_claim("C3", text, rule, judge(row["lower"], row["upper"], below=0.0), row, note)
