"""The published claims that components and the small grid can judge: S4, S5, S7 and S8.

Three families, each corrected within itself: the cells of one space (does the best one gain?), means over prompts of
the grid, and the leads of even against odd. A claim that something is not there is judged against a stated size. Where
the draws are too few for a verdict on any cell, as by default, the claim that some cells beat the random directions is
judged for all of them together.

Knows nothing about models or how the trials came about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.latents.claims import MARGIN
from experiments.latents.pca.parity import parity_table
from experiments.latents.pca.plan import Plan
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import row_of
from experiments.statistics.equivalence import family_level, judge_absence, judge_presence
from experiments.study.claims import Claim, ClaimsTable, Verdict, effect_claim
from experiments.study.edits.claims import BestCell, best_cell, never_better, some_better
from experiments.study.edits.words import together
from experiments.study.verdicts import Question, judged_together

__all__ = ["NEAR", "PUBLISHED_CELLS", "SEPARATED", "claims_of"]

PUBLISHED_CELLS = tuple(
    (a, b, -c) for a, b in ((1, 2), (1, 5), (2, 3), (2, 4), (3, 5), (4, 5)) for c in (0.5, 1.0)
) + tuple((a, b, 1.0) for a, b in ((1, 4), (1, 6), (4, 6), (5, 6)))
"""Cells that the published grid names as improvements at latent 5, as (A, B, c) of this project: its label A-B is
B−A."""
NEAR = 0.03
"""Directions that differ from random ones by less (three points) are at the random level."""
SEPARATED = 0.05
"""Share of the variance by which even against odd must lead every other division to count as a separation."""
_PARITY = ("z", "keys", "values")


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame], rates: pd.DataFrame) -> ClaimsTable:
    """S4, S5, S7 and S8.

    Args:
        plan: of the study.
        tables: of the study.
        rates: the grid's trials with `changed` and `gain`, see grid.py.
    """
    early = rates[(rates["timing"] == "early-exit") & (rates["control"] == "direction")]
    return ClaimsTable([
        _never_better(tables, early, plan.settings),
        _some_better(tables, early, plan.settings),
        _better_together(tables["evidence"], rates, plan.settings),
        *_means_over_prompts(plan, rates),
        *_even_and_odd(plan, tables),
        _end_of_thought(tables["token_alignment"]),
    ])  # fmt: skip


# --- The best cell of a space -----------------------------------------------------------------------------------------


def _never_better(tables: Mapping[str, pd.DataFrame], early: pd.DataFrame, settings: Settings) -> Claim:
    best = _best_cell(tables, early, "embedding", settings)
    return never_better("S4 (baseline)", "embedding steering never beats the baseline", best)


def _some_better(tables: Mapping[str, pd.DataFrame], early: pd.DataFrame, settings: Settings) -> Claim:
    statement = "some KV directions beat the baseline and random directions"
    return some_better("S5 (any)", statement, _best_cell(tables, early, "kv", settings), elsewhere="S5 (together)")


def _better_together(evidence: pd.DataFrame, rates: pd.DataFrame, settings: Settings) -> Claim:
    """The aggregate over all KV cells, which few draws allow. What it does not find is not thereby absent."""
    row = _gains(evidence, "kv")
    asked = rates[["prompt_id", "cluster"]].drop_duplicates()
    reach = 1 / (1 + int(row["draws"]))
    verdict: Verdict = "held" if row["last_p"] <= settings.alpha else "undecided"
    return Claim(
        "S5 (together)",
        "more KV directions than chance beat random directions",
        f"share of cells that rank first among their random directions, minus what is expected; held if p ≤ "
        f"{settings.alpha:g}",
        verdict,
        (float(row["last"]) - float(row["last_expected"])) / int(row["cells"]),
        n=len(asked),
        n_clusters=asked["cluster"].nunique(),
        note=f"{together(row)} (the smallest p that {row['draws']} draws shared by all pairs allow is {reach:.2g})",
    )


def _gains(evidence: pd.DataFrame, space: str) -> Mapping[str, Any]:
    return row_of(evidence, {"space": space, "tail": "gain"})


def _best_cell(tables: Mapping[str, pd.DataFrame], early: pd.DataFrame, space: str, settings: Settings) -> BestCell:
    """The largest gain over the cells of a space."""
    cells = tables["cells"]
    wide = early[early["space"] == space].pivot_table(
        index=["prompt_id", "cluster"], columns=["source", "target", "coefficient", "latent"], values="gain"
    )
    clusters = wide.index.get_level_values("cluster").to_numpy()
    part, gains = cells[cells["space"] == space], _gains(tables["evidence"], space)
    return best_cell(wide.to_numpy(float), clusters, part, gains, settings, f"{space} space")


# --- Means over prompts -----------------------------------------------------------------------------------------------


def _means_over_prompts(plan: Plan, rates: pd.DataFrame) -> list[Claim]:
    """Everything that is a mean of paired numbers over the evaluation prompts, judged together."""
    asked = rates[["prompt_id", "cluster"]].drop_duplicates().sort_values("prompt_id")
    early = rates[rates["timing"] == "early-exit"]
    kv = early[(early["space"] == "kv") & (early["control"] == "direction")]
    embedding = early[early["space"] == "embedding"]
    later = rates[(rates["space"] == "kv") & (rates["timing"] == "continue")]

    def mean(rows: pd.DataFrame, outcome: str) -> np.ndarray:
        """(prompt,)"""
        return rows.groupby("prompt_id")[outcome].mean().reindex(asked["prompt_id"]).to_numpy(float)

    def over_random(rows: pd.DataFrame) -> np.ndarray:
        return mean(rows[rows["control"] == "direction"], "gain") - mean(rows[rows["control"] == "random"], "gain")

    questions = [
        Question(
            f"S4 (random, latent {k})",
            "embedding steering is at the random level at later latents",
            f"accuracy, directions minus random ones, is within ±{NEAR}",
            over_random(embedding[embedding["latent"] == k]),
            absent=NEAR,
            bounds=(-1, 1),
        )
        for k in (plan.n_latents - 1, plan.n_latents)
    ]
    if plan.n_latents == 6:
        cells = pd.Series(list(zip(kv["source"], kv["target"], kv["coefficient"], strict=True)), index=kv.index)
        five = kv["latent"] == 5
        questions += [
            Question(
                "S5 (named cells)",
                "the KV cells named as better at latent 5 are better",
                "mean change of accuracy over these 16 cells is above 0",
                mean(kv[cells.isin(PUBLISHED_CELLS) & five], "gain"),
                above=0.0,
                bounds=(-1, 1),
            ),
            Question(
                "S5 (latent 5)",
                "KV steering acts mainly at latent 5",
                "share of changed answers, latent 5 minus the other latents, is above 0",
                mean(kv[five], "changed") - mean(kv[~five], "changed"),
                above=0.0,
                bounds=(-1, 1),
            ),
        ]
    size = kv["coefficient"].abs()
    questions += [
        Question(
            "S5 (|c|)",
            "accuracy falls with |c|",
            "accuracy at |c| = 1 minus |c| = 0.5 is below 0",
            mean(kv[size == 1], "gain") - mean(kv[size == 0.5], "gain"),
            below=0.0,
            bounds=(-1, 1),
        ),
        Question(
            "S8",
            "KV steering pushed through one more latent is like random",
            f"accuracy, directions minus random ones, is within ±{MARGIN}",
            over_random(later),
            absent=MARGIN,
            bounds=(-1, 1),
        ),
    ]
    return judged_together(questions, asked["cluster"].to_numpy(), plan.settings)


# --- Components -------------------------------------------------------------------------------------------------------


def _even_and_odd(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Iterator[Claim]:
    """Leads of even against odd over every other division: no means over prompts, so corrected by Bonferroni."""
    number, level = len(_PARITY), plan.settings.level
    scores = tables["scores"]
    corrected = dataclasses.replace(plan.settings, level=family_level(level, number))
    parity = parity_table(scores[scores["quantity"].isin(_PARITY)], plan.n_latents, corrected)
    for name in _PARITY:
        row = row_of(parity, {"quantity": name})
        lower, upper = float(row["lower"]), float(row["upper"])
        lead = "variance between even and odd, minus the best other division of the latents, is "
        if name == "z":
            statement, rule = "the first two components separate even and odd latents", lead + "above 0"
            verdict = judge_presence(lower, upper, above=0.0, family=number)
        else:
            statement = "the first two components of cache entries do not separate even and odd latents"
            rule = lead + f"below {SEPARATED} of the variance"
            verdict = judge_absence(lower, upper, SEPARATED, side="above", family=number)
        yield effect_claim(
            f"S7 ({name})",
            statement,
            rule,
            verdict,
            row,
            f"rank {row['rank']} of {row['divisions']} divisions; share of variance {row['share']:.2f}",
            corrected=f"Bonferroni, together at {100 * level:g} %",
        )


def _end_of_thought(tokens: pd.DataFrame) -> Claim:
    first = row_of(tokens, {"quantity": "z", "component": 1, "embedding": "plain"})
    return Claim(
        "S7 (end of thought)",
        "the first component is parallel to the end-of-thought direction",
        "|cosine| is above 0.5 and among the 1 % largest of all tokens",
        "held" if abs(first["cosine"]) > 0.5 and first["p"] <= 0.01 else "not held",
        float(first["cosine"]),
        n=int(first["tokens"]),
        note=f"rank {first['rank']} of {first['tokens']} tokens by |cosine|; of one component, without an interval "
        "(codi alternation judges the same with one)",
    )
