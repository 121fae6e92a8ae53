"""The published claims that patching can judge: C3 (latents 3 and 5 hold what the answer needs) and C5 (a patched
step moves the answer as the arithmetic predicts). All are judged together, over the evaluation prompts.

Knows nothing about models or how the trials came about.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from experiments.latents.claims import CLAIMED
from experiments.latents.patch.means import UNEDITED, replaced
from experiments.latents.patch.plan import Plan
from experiments.latents.patch.values import SCOPES, STATES
from experiments.statistics.effects import row_of
from experiments.statistics.words import interval
from experiments.study.answers import set_of
from experiments.study.claims import ClaimsTable
from experiments.study.run import Trials
from experiments.study.verdicts import Question, judged_together

__all__ = ["ENOUGH", "FAR", "claims_of"]

ENOUGH = 0.2
"""Unedited accuracy below this leaves claims about lost answers not testable."""
FAR = 0.1
"""Share of predicted answers, beyond the control's, that counts as "far above random"."""


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame], trials: Trials) -> ClaimsTable:
    """C3 and C5, as far as their families of edits were tried."""
    asked = pd.concat([frame[["prompt_id", "cluster"]] for frame in trials.values()]).drop_duplicates()
    prompts = pd.Index(sorted(asked["prompt_id"]))
    questions = []
    if "means" in trials:
        questions.append(_third_and_fifth(plan, tables["means"], trials["means"], prompts))
    if "values" in trials:
        questions += _moved_as_predicted(plan, trials["values"], prompts)
    clusters = asked.set_index("prompt_id")["cluster"].reindex(prompts).to_numpy()
    return ClaimsTable(judged_together(questions, clusters, plan.settings))


def _third_and_fifth(plan: Plan, means: pd.DataFrame, trials: pd.DataFrame, prompts: pd.Index) -> Question:
    n = plan.n_latents
    base = float(row_of(means, replaced("mean", [1]), UNEDITED)["reference_mean"])
    each = [row_of(means, replaced("other key", [k]), replaced("same key", [k])) for k in range(1, n + 1)]
    blocked = f"unedited accuracy is {base:.2f}: little to lose" if base < ENOUGH else ""
    values = np.empty(0)
    if n < max(CLAIMED):
        blocked = f"this model has {n} latents"
    else:
        wide = trials.pivot_table(index="prompt_id", columns=["kind", "replaced"], values="correct", aggfunc="mean")
        lost = {k: wide["other key", set_of([k])] - wide["same key", set_of([k])] for k in range(1, n + 1)}
        claimed = np.mean([lost[k] for k in CLAIMED], axis=0)
        others = np.mean([lost[k] for k in lost if k not in CLAIMED], axis=0)
        values = pd.Series(claimed - others, index=wide.index).reindex(prompts).to_numpy()
    return Question(
        "C3",
        "the mean of another key hurts at latents 3 and 5 only",
        "accuracy (other key − same key) at latents 3 and 5, minus the other latents, is below 0",
        values,
        below=0.0,
        bounds=(-2, 2),
        blocked=blocked,
        note="" if blocked else "points per latent: " + ", ".join(interval(row, "difference") for row in each),
    )


def _moved_as_predicted(plan: Plan, trials: pd.DataFrame, prompts: pd.Index) -> list[Question]:
    k = min(5, plan.n_latents)
    if not plan.form:
        note = "it is about problems (X±Y)·Z + (X±Y), which these prompts are not all"
        statement = f"step-2 patching at latent {k} moves the answer as predicted, far above random"
        return [Question("C5", statement, "", np.empty(0), above=FAR, blocked=note)]
    second = trials[(trials["step"] == 2) & (trials["latent"] == k)]
    questions = []
    for scope in SCOPES:
        for state in STATES:
            here = second[(second["scope"] == scope) & (second["state"] == state)]
            wide = here.pivot(index="prompt_id", columns="kind", values="local").astype(float)
            questions.append(
                Question(
                    f"C5 ({scope}, {state})",
                    f"step-2 patching at latent {k} moves the answer as predicted, far above random",
                    f"share of predicted answers, minus the control value's, is above {FAR}",
                    (wide["target"] - wide["control"]).reindex(prompts).to_numpy(),
                    above=FAR,
                    bounds=(-1, 1),
                )
            )
    return questions
