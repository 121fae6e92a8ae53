"""`codi pca`: principal components of latents and cache entries; where each edit's effect goes.

components   principal components over the latents of derivation prompts: share of variance, cosine with the
             end-of-thought embedding and with the steering directions A−B (components.py); how well the first two tell
             even from odd latents on the evaluation prompts, beside every other way to divide the latents (parity.py).
along        steering along the components against random directions of the same norm (along.py).
grid         the steering of the published study, small, random directions of the same norms beside it (grid.py). The
             draws are shared by all pairs: enough for means and for all cells of a space together, too few for a
             verdict on any one cell (570 would do), which summary and claims say.
where        one edit followed through the model: why does KV steering act where embedding steering does not (where.py)?

Attention to the edited slot is measured only if the model was loaded with attention "eager", as the command does.

Runs as `codi pca` or `python -m experiments.latents.pca.run`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.latents.claims import sizes_table
from experiments.latents.options import PcaOptions
from experiments.latents.pca import along, components, grid, where
from experiments.latents.pca.claims import claims_of
from experiments.latents.pca.figures import captions, figures
from experiments.latents.pca.parity import parity_table
from experiments.latents.pca.plan import Plan, make_plan
from experiments.latents.pca.summary import words
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import Selector, compare, levels, weighed
from experiments.study.edits.cells import cell_statistics
from experiments.study.edits.pairing import families, named
from experiments.study.edits.verdicts import judge_cells
from experiments.study.parts import Part
from experiments.study.run import Findings, Study, Trials

__all__ = ["STUDY", "main", "run"]


# --- Parts ------------------------------------------------------------------------------------------------------------


def parts(plan: Plan) -> list[Part]:
    """One trial table per question, of one part each."""
    taken = {"top": plan.top, "batch_size": plan.batch_size}
    steered = {**taken, "steered": plan.steered, "draws": plan.draws, "max_new_tokens": plan.max_new_tokens}
    tried = {"draws": plan.draws, "max_new_tokens": plan.max_new_tokens}
    followed = {"pairs": plan.where_pairs, "prompts": plan.where_prompts, "max_new_tokens": plan.max_new_tokens}
    return [
        Part("variance", components.variance, taken, plan.seed, components.VARIANCE),
        Part("alignment", components.alignment, taken, plan.seed, components.ALIGNMENT),
        Part("token_alignment", components.token_alignment, taken, plan.seed, components.TOKEN_ALIGNMENT),
        Part("scores", components.scores, taken, plan.seed, components.SCORES),
        Part("along", along.along_components, steered, plan.seed, along.ALONG),
        Part("grid", grid.grid_trials, tried, plan.seed, grid.GRID),
        Part("where", where.where_effects_go, followed, plan.seed, where.where_schema(plan.n_layers)),
    ]


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables_of(plan: Plan, trials: Trials, rates: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Every table of the study; `rates` are `grid.rates_of` the grid."""
    found = {name: trials[name] for name in ("variance", "alignment", "token_alignment", "scores")}
    found["parity"] = parity_table(trials["scores"], plan.n_latents, plan.settings)
    found |= _along_tables(trials["along"], plan.settings)
    steered = trials["grid"]
    found |= _cell_tables(steered[steered["timing"] == "early-exit"], plan.settings)
    found |= _grid_tables(rates, plan.settings)
    return found | _where_tables(trials["where"], plan)


def _cell_tables(trials: pd.DataFrame, settings: Settings) -> dict[str, pd.DataFrame]:
    """Tables cells (one row per edit), evidence (all cells of a space together, and what the draws allow) and
    visibility (what floors and ceilings of the unsteered exits hide)."""
    spaces = families(trials)
    judged = [judge_cells(family, settings) for family in spaces]
    return {
        "cells": cell_statistics(spaces, settings, mirrored=False, verdicts=judged),
        "evidence": named(spaces, [pd.DataFrame(one.evidence) for one in judged]),
        "visibility": named(spaces, [pd.DataFrame(one.visibility) for one in judged]),
    }


def _along_tables(trials: pd.DataFrame, settings: Settings) -> dict[str, pd.DataFrame]:
    steered = trials.loc[trials["kind"] == "component", list(along.BY)].drop_duplicates()
    tried = [dict(zip(along.BY, one, strict=True)) for one in steered.itertuples(index=False, name=None)]
    found: dict[str, list[tuple[Selector, Selector]]] = {
        "along_baseline": [(one, along.along(one["space"], one["latent"])) for one in tried],
        "along_random": [(one, {**one, "kind": "random"}) for one in tried],
    }
    made = {name: weighed(trials, pairs, along.BY, settings=settings) for name, pairs in found.items()}
    sizes = sizes_table({name: size for name, (_, size) in made.items()})
    return {**{name: table for name, (table, _) in made.items()}, "sizes": sizes}


def _grid_tables(rates: pd.DataFrame, settings: Settings) -> dict[str, pd.DataFrame]:
    directions = rates.loc[rates["control"] == "direction", list(grid.BY)].drop_duplicates()
    tried = [dict(zip(grid.BY, one, strict=True)) for one in directions.itertuples(index=False, name=None)]
    pairs: list[tuple[Selector, Selector]] = [(one, {**one, "control": "random"}) for one in tried]
    return {
        "grid_changed": levels(rates, grid.BY, "changed", settings),
        "grid_over_random": compare(rates, pairs, grid.BY, "gain", settings),
        "grid_changed_over_random": compare(rates, pairs, grid.BY, "changed", settings),
    }


_CONTRASTS = (
    (("kv", "direction"), ("embedding", "direction")),
    (("kv", "direction"), ("hidden", "direction")),
    (("kv", "direction"), ("kv", "random")),
    (("embedding", "direction"), ("embedding", "random")),
    (("keys", "direction"), ("values", "direction")),
)


def _where_tables(trials: pd.DataFrame, plan: Plan) -> dict[str, pd.DataFrame]:
    """Tables where (mean of every measure, per edit and control; those at the end-of-thought token are "eot", per
    layer) and where_contrasts (KV against embedding)."""
    settings = plan.settings
    frames = []
    measures = [(name, name, -1) for name in where.MEASURES]
    measures += [(f"eot_{layer}", "eot", layer) for layer in range(plan.n_layers + 1)]
    for column, measure, layer in measures:
        known = trials[trials[column].notna()]
        if len(known):
            frames.append(levels(known, where.BY, column, settings).assign(measure=measure, layer=np.int16(layer)))
    pairs: list[tuple[Selector, Selector]] = [
        (dict(zip(where.BY, one, strict=True)), dict(zip(where.BY, other, strict=True))) for one, other in _CONTRASTS
    ]
    contrasts = [
        compare(trials[trials[measure].notna()], pairs, where.BY, measure, settings).assign(measure=measure)
        for measure in ("kl", "kl_next", "kl_end", "slot", "h_last")
    ]
    return {
        "where": pd.concat(frames, ignore_index=True),
        "where_contrasts": pd.concat(contrasts, ignore_index=True),
    }


# --- Command ----------------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    rates = grid.rates_of(trials["grid"])
    tables = tables_of(plan, trials, rates)
    return Findings(
        words(plan, tables), tables, lambda: figures(plan, tables), captions(plan), claims_of(plan, tables, rates)
    )


STUDY = Study(
    options=PcaOptions,
    title="Principal components and effects of edits",
    prompts=lambda options, model: options.load_split(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    attention="eager",
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
