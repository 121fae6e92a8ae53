"""`codi control sweep`: steer with every vector, layer and coefficient, beside random directions.

    items    ->  derivation (vectors), validation (layer and alpha are chosen), test (reported)
             ->  trials: one row per item and cell, controls on test items
             ->  every cell against the unsteered model and its random directions, claims, figures

Runs as `codi control sweep`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.control.cells import cells, choose, effects, validation_table
from experiments.control.claims import beyond_random, claims_of
from experiments.control.figures import curves_figure, map_figure, norm_figure
from experiments.control.options import SweepOptions
from experiments.control.plan import Plan, make_plan, parts
from experiments.control.summary import words
from experiments.control.vectors import vector_files_hash
from experiments.study.run import Findings, Study, Trials, language_identity
from experiments.tasks.items import ItemSplits
from lm.model import LanguageModel

__all__ = ["STUDY", "main", "run"]


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    validation, test = (_plain(trials[name]) for name in ("validation", "test"))
    chosen_on = validation_table(validation)
    choice = choose(chosen_on)
    found = effects(test, plan.settings)
    tables = {
        "norms": trials["norms"].astype({"method": str}),
        "validation": chosen_on,
        "effects": found,
        "cells": cells(found, test, plan.settings.alpha),
    }
    sample = f"{plan.n_test} items of {plan.asked}."
    shown = dict.fromkeys((choice.layer, plan.middle if plan.middle in plan.layers else choice.layer))

    def figures() -> dict[str, Any]:
        drawn: dict[str, Any] = {
            f"curves-layer-{layer}": curves_figure(found, plan.methods, layer, plan.settings.level, sample)
            for layer in shown
        }
        if len(plan.layers) > 1:
            for method in plan.methods:
                drawn[f"map-{method}"] = map_figure(found, method, plan.settings.alpha, sample)
        return drawn | {"norms": norm_figure(tables["norms"], explained=True)}

    captions = {f"curves-layer-{layer}": f"Every measure against alpha at layer {layer}." for layer in shown}
    if len(plan.layers) > 1:
        captions |= {f"map-{method}": f"Layer and alpha, {method} vector." for method in plan.methods}
    captions["norms"] = "Length of the vectors per layer."
    beyond = beyond_random(test, choice, plan.settings)
    claims = claims_of(validation, test, plan.layers, plan.middle, plan.settings)
    return Findings(words(plan, tables, test, choice, beyond), tables, figures, captions, claims)


def _plain(trials: pd.DataFrame) -> pd.DataFrame:
    """Words as texts, not as categories."""
    return trials.astype({name: str for name in ("kind", "method")})


def identity(options: SweepOptions, model: LanguageModel, prompts: ItemSplits) -> dict[str, Any]:
    """What decides the result, the content of given vectors among it."""
    own = language_identity(options, model, prompts)
    return own if options.vectors is None else {**own, "vectors": vector_files_hash(options.vectors)}


STUDY = Study(
    options=SweepOptions,
    title="Control vectors",
    prompts=lambda options, model: options.load_items(options.seed, model.tokenizer),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=identity,
)

run = STUDY.run
main = STUDY.main
