"""The published claims that components and the small grid can judge: S4, S5, S7 and S8. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from experiments.latents.pca.plan import Plan
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import compare, row_of
from experiments.study.claims import Claim, ClaimsTable, effect_claim, judge

__all__ = ["PUBLISHED_CELLS", "claims_of"]

PUBLISHED_CELLS = tuple(
    (a, b, -c) for a, b in ((1, 2), (1, 5), (2, 3), (2, 4), (3, 5), (4, 5)) for c in (0.5, 1.0)
) + tuple((a, b, 1.0) for a, b in ((1, 4), (1, 6), (4, 6), (5, 6)))
"""Cells that the published grid names as improvements at latent 5, as (A, B, c) of this project: its label A-B is
B−A."""


def claims_of(plan: Plan, tables: Mapping[str, pd.DataFrame], rates: pd.DataFrame) -> ClaimsTable:
    """S4, S5, S7 and S8.

    Args:
        plan: of the study.
        tables: of the study.
        rates: the grid's trials with `changed` and `gain`, see grid.py.
    """
    kv = rates[(rates["space"] == "kv") & (rates["timing"] == "early-exit") & (rates["control"] == "direction")]
    later = rates[(rates["space"] == "kv") & (rates["timing"] == "continue")]
    return ClaimsTable([
        *_best_cells(tables["cells"]),
        *_embedding_is_random(plan, tables["grid_over_random"]),
        *(_at_latent_five(kv, plan.settings) if plan.n_latents == 6 else ()),
        _smaller_is_better(kv, plan.settings),
        *_even_and_odd(tables["parity"]),
        _end_of_thought(tables["token_alignment"]),
        _later_is_random(later, plan.settings),
    ])  # fmt: skip


def _best_cells(cells: pd.DataFrame) -> Iterator[Claim]:
    base = float(cells["baseline"].max())
    for space, name, statement in (
        ("embedding", "S4 (baseline)", "embedding steering never beats the baseline"),
        ("kv", "S5 (any)", "some KV directions beat the baseline and random directions"),
    ):
        part = cells[cells["space"] == space]
        count = int((part["verdict"] == "improvement").sum())
        held = count == 0 if space == "embedding" else count > 0
        yield effect_claim(
            name,
            statement,
            "cells above baseline and random directions, corrected; number of the best cell",
            "held" if held else "not held",
            part.sort_values("difference").iloc[-1],
            f"{count} of {len(part)} cells are improvements after correction; best unsteered accuracy {base:.2f}",
        )


def _embedding_is_random(plan: Plan, over_random: pd.DataFrame) -> Iterator[Claim]:
    for k in (plan.n_latents - 1, plan.n_latents):
        chosen = {"space": "embedding", "timing": "early-exit", "control": "direction", "latent": k}
        row = row_of(over_random, chosen)
        yield effect_claim(
            f"S4 (random, latent {k})",
            "embedding steering is at the random level at later latents",
            "accuracy, directions minus random ones, is within ±0.03",
            judge(row["lower"], row["upper"], above=-0.03, below=0.03),
            row,
        )


def _at_latent_five(kv: pd.DataFrame, settings: Settings) -> Iterator[Claim]:
    cells = pd.Series(list(zip(kv["source"], kv["target"], kv["coefficient"], strict=True)), index=kv.index)
    named = kv[cells.isin(PUBLISHED_CELLS) & (kv["latent"] == 5)]
    both = pd.concat([named.assign(steered=True, value=named["gain"]), named.assign(steered=False, value=0.0)])
    row = compare(both, [({"steered": True}, {"steered": False})], ["steered"], "value", settings).iloc[0]
    yield effect_claim(
        "S5 (named cells)",
        "the KV cells named as better at latent 5 are better",
        "mean change of accuracy over these 16 cells is above 0",
        judge(row["lower"], row["upper"], above=0.0),
        row,
    )
    five = kv.assign(five=kv["latent"] == 5)
    row = compare(five, [({"five": True}, {"five": False})], ["five"], "changed", settings).iloc[0]
    yield effect_claim(
        "S5 (latent 5)",
        "KV steering acts mainly at latent 5",
        "share of changed answers, latent 5 minus the other latents, is above 0",
        judge(row["lower"], row["upper"], above=0.0),
        row,
    )


def _smaller_is_better(kv: pd.DataFrame, settings: Settings) -> Claim:
    sizes = kv.assign(size=np.abs(kv["coefficient"]))
    row = compare(sizes, [({"size": 1.0}, {"size": 0.5})], ["size"], "gain", settings).iloc[0]
    return effect_claim(
        "S5 (|c|)",
        "accuracy falls with |c|",
        "accuracy at |c| = 1 minus |c| = 0.5 is below 0",
        judge(row["lower"], row["upper"], below=0.0),
        row,
    )


def _even_and_odd(parity: pd.DataFrame) -> Iterator[Claim]:
    for name in ("z", "keys", "values"):
        row = row_of(parity, {"quantity": name})
        separated = judge(row["lower"], row["upper"], above=0.0)
        apart = name == "z"
        yield effect_claim(
            f"S7 ({name})",
            "the first two components separate even and odd latents"
            if apart
            else "the first two components of cache entries do not",
            "variance between even and odd, minus the best other division of the latents, is "
            + ("above 0" if apart else "not above 0"),
            separated if apart else ("not held" if separated == "held" else "held"),
            row,
            f"rank {row['rank']} of {row['divisions']} divisions; share of variance {row['share']:.2f}",
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
        note=f"rank {first['rank']} of {first['tokens']} tokens by |cosine|",
    )


def _later_is_random(later: pd.DataFrame, settings: Settings) -> Claim:
    contrast = ({"control": "direction"}, {"control": "random"})
    row = compare(later, [contrast], ["control"], "gain", settings).iloc[0]
    return effect_claim(
        "S8",
        "KV steering pushed through one more latent is like random",
        "accuracy, directions minus random ones, is within ±0.02",
        judge(row["lower"], row["upper"], above=-0.02, below=0.02),
        row,
    )
