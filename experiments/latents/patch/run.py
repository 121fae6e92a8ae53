"""`codi patch`: replace latents by means, by values, by other prompts' latents or noise, and read the answer.

Three families of edits, always on the unedited prompt, later latents computed on the edited past; one trial table each:

means        z_k replaced by the mean latent of other prompts, by zero or by noise; one latent or all (means.py).
values       z_k replaced by the mean latent of prompts of which a step is a target t (values.py).
interchange  latent k of prompt A becomes that of prompt B: vector, residual stream or cache slot (interchange.py).

Prompts are any problems with two or more known steps: of the task templates, arithmetic or polynomial, or of a file
with steps. What the answer should become if a step were another number stands in template.py, with what holds of the
template problems (X±Y)·Z + (X±Y) alone.

Runs as `codi patch` or `python -m experiments.latents.patch.run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.latents.claims import claimed_latents, sizes_table
from experiments.latents.options import PatchOptions
from experiments.latents.patch import interchange as exchange
from experiments.latents.patch import means, values
from experiments.latents.patch.claims import claims_of
from experiments.latents.patch.figures import captions, figures
from experiments.latents.patch.plan import Plan, make_plan
from experiments.latents.patch.summary import words
from experiments.statistics.effects import Selector, levels, weighed
from experiments.statistics.sizes import Smallest
from experiments.study.limits import limits
from experiments.study.parts import Part
from experiments.study.run import Findings, Study, Trials

__all__ = ["STUDY", "Plan", "main", "run"]

Made = tuple[dict[str, pd.DataFrame], dict[str, Smallest]]
"""Tables, and the size that matters in those of effects, by their names."""


# --- Parts ---------------------------------------------------------------------------------------------------


def parts(plan: Plan) -> list[Part]:
    """One trial table per family, of one part each."""
    decoding = {"max_new_tokens": plan.max_new_tokens, "batch_size": plan.batch_size}
    found = {
        "means": Part("means", means.mean_patching, {"draws": plan.draws, **decoding}, plan.seed, means.MEANS),
        "values": Part("values", values.value_patching, {"legacy": plan.legacy, **decoding}, plan.seed, values.VALUES),
        "interchange": Part(
            "interchange",
            exchange.interchange,
            {"task": plan.task, "mixed": plan.mixed, **decoding},
            plan.seed,
            exchange.interchange_schema(plan.mixed),
        ),  # fmt: skip
    }
    return [part for name, part in found.items() if name in plan.families]


# --- Tables -----------------------------------------------------------------------------------------------------------


def tables_of(plan: Plan, trials: Trials) -> dict[str, pd.DataFrame]:
    """Every table of the study; `sizes` says by table which size of an effect matters."""
    found: dict[str, pd.DataFrame] = {}
    sizes: dict[str, Smallest] = {}
    for name, make in (("means", _mean_tables), ("values", _value_tables), ("interchange", _interchange_tables)):
        if name in trials:
            tables, mine = make(trials[name], plan)
            found |= tables
            sizes |= mine
    return {**found, "sizes": sizes_table(sizes)}


def _conditions(trials: pd.DataFrame, by: Sequence[str]) -> list[dict[str, Any]]:
    """Every condition of a trial table, in the order in which they appear."""
    names = trials[list(by)].drop_duplicates().itertuples(index=False, name=None)
    return [dict(zip(by, one, strict=True)) for one in names]


def _mean_tables(trials: pd.DataFrame, plan: Plan) -> Made:
    n, by, settings = plan.n_latents, means.BY, plan.settings
    contrasts: list[tuple[Selector, Selector]] = [
        (one, means.UNEDITED) for one in _conditions(trials[trials["kind"] != "none"], by)
    ]
    for latents in (range(1, n + 1), *([k] for k in range(1, n + 1))):
        contrasts.append((means.replaced("other key", latents), means.replaced("same key", latents)))
    effects, size = weighed(trials, contrasts, by, settings=settings)
    found = {"means": effects, "means_levels": levels(trials, by, settings=settings)}
    if n >= 5:
        found["claimed_latents"] = claimed_latents(
            trials,
            lambda k: (means.replaced("other key", [k]), means.replaced("same key", [k])),
            n,
            settings=settings,
        )
    return found, {"means": size}


def _value_tables(trials: pd.DataFrame, plan: Plan) -> Made:
    by, settings = values.BY, plan.settings
    targets = _conditions(trials[trials["kind"] == "target"], by)
    contrasts: list[tuple[Selector, Selector]] = [(one, {**one, "kind": "control"}) for one in targets]
    made = {f"values_{name}": weighed(trials, contrasts, by, name, settings) for name in ("hit", "local", "propagated")}
    found = {name: table for name, (table, _) in made.items()}
    sizes = {name: size for name, (_, size) in made.items()}
    return {**found, "values_levels": levels(trials, by, "hit", settings)}, sizes


def _interchange_tables(trials: pd.DataFrame, plan: Plan) -> Made:
    """Change of accuracy; and how often the answer is what the donor predicts, against how often it is a third
    prompt's (column reference_mean)."""
    by, settings = exchange.BY, plan.settings
    edited = trials[trials["kind"] != "none"]
    tried = _conditions(edited, by)
    changed: list[tuple[Selector, Selector]] = [(one, exchange.UNEDITED) for one in tried]
    # the size that matters is read from the donors that every prompt has
    of = [pair for pair in changed if pair[0]["kind"] == "other"]
    effects, size = weighed(trials, changed, by, settings=settings, of=of or None)
    found, sizes = {"interchange_correct": effects}, {"interchange_correct": size}
    contrasts: list[tuple[Selector, Selector]] = [
        ({**one, "by_chance": False}, {**one, "by_chance": True}) for one in tried
    ]
    of = [pair for pair in contrasts if pair[0]["kind"] == "other"]
    kept = [*by, *(f"reference_{column}" for column in (*by, "by_chance")), "by_chance"]
    for outcome in ("donor", *(f"{exchange.column(one)}_hit" for one in plan.mixed)):
        told = edited if outcome == "donor" else edited[edited[outcome.removesuffix("_hit")].notna()]
        if told.empty:
            continue
        both = pd.concat([
            told.assign(value=told[outcome], by_chance=False),
            told.assign(value=told["chance"], by_chance=True),
        ])  # fmt: skip
        name = f"interchange_{outcome}"
        table, sizes[name] = weighed(both, contrasts, [*by, "by_chance"], "value", settings, of=of or None)
        found[name] = table.drop(columns=[name for name in kept if name not in by])
    return found, sizes


# --- Command ----------------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    tables = tables_of(plan, trials)
    seen = ""
    for name, table in (("interchange", "interchange_correct"), ("means", "means")):
        if name in trials:  # the last one has fewer prompts and so sees less
            unedited = trials[name][trials[name]["kind"] == "none"]
            seen = limits(unedited, len(tables[table]), plan.settings)
    return Findings(
        words(plan, tables, seen),
        tables,
        lambda: figures(plan, tables),
        captions(plan, tables),
        claims_of(plan, tables, trials),
    )


STUDY = Study(
    options=PatchOptions,
    title="Patching latents",
    prompts=lambda options, model: options.load_split(
        options.seed, model.protocol.question_suffix, known_steps=2, donors=True
    ),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
