"""`codi cot grid`: where and how much, on validation questions: every layer with every coefficient, both ways.

Continuous steering adds c times the vector at every token that is written, single steering once, while the prompt is
read. Both try the same coefficients, so that which of the two needs the larger one is found, not assumed. Nothing
stands behind the questions; the unsteered model and the step-by-step sentence are asked beside.

One cell is chosen for each way of steering by a rule that is fixed before (`chosen_cells`) and written as choice.json;
its numbers here are the best of many, hence optimistic: `codi cot eval` reports it on other questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.cot.asking import UNSTEERED, Asking, ask, condition
from experiments.cot.grid_figures import figures
from experiments.cot.measures import CONDITION, TRIALS
from experiments.cot.options import ChooseBy, GridOptions
from experiments.cot.places import CHOICE, ITEMS
from experiments.cot.tables import all_levels, chain_limits, label, mean_row
from experiments.cot.vectors import Vectors, folder_hash, refuse_used, used_by
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import compare
from experiments.statistics.words import interval
from experiments.study.parts import Part, Workbench
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, language_identity
from experiments.tasks.items import ItemSplits
from lm.model import LanguageModel

__all__ = ["STUDY", "WAYS", "Plan", "chosen_cells", "main", "run"]

WAYS = ("continuous", "single")


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    choose: ChooseBy
    parse_loss: float
    asking: Asking
    settings: Settings
    used: bytes


def make_plan(options: GridOptions, model: LanguageModel, prompts: ItemSplits) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: layers that the model does not have, no validation questions, a vector of another model, or
            questions that the vector was derived from.
    """
    n = model.n_layers
    layers = options.layers or tuple(sorted({max(1, round(share * n)) for share in (1 / 3, 1 / 2, 2 / 3)}))
    wrong = next((layer for layer in layers if not 1 <= layer <= n), None)
    if wrong is not None:
        raise ValueError(f"layers must be in 1..{n}, got {wrong}")
    if not prompts.validation:
        raise ValueError("there are no validation questions")
    whole = Vectors.read(options.vectors, model).whole
    whole.only(layers)  # refuses layers that the vector does not have
    refuse_used(options.vectors, prompts.validation, "validation")
    return Plan(
        layers=tuple(sorted(layers)),
        coefficients=tuple(sorted(options.coefficients)),
        choose=options.choose,
        parse_loss=options.parse_loss,
        asking=Asking.of(options, options.seed, options.batch_size),
        settings=options.statistics(options.seed),
        used=used_by(prompts.validation, "validation"),
    )


def parts(plan: Plan) -> list[Part]:
    """One trial table: the unsteered answers, and a part for every way and layer."""
    found = [Part("unsteered", unsteered, {"asking": plan.asking}, plan.asking.seed, TRIALS, "grid")]
    for way in WAYS:
        for layer in plan.layers:
            given = {"way": way, "layer": layer, "coefficients": plan.coefficients, "asking": plan.asking}
            found.append(Part(f"{way}-{layer}", cells, given, plan.asking.seed, TRIALS, "grid"))
    return found


def unsteered(bench: Workbench, *, seed: int, asking: Asking) -> pd.DataFrame:
    """Answers without steering: no sentence, and the step-by-step one."""
    given = [{**UNSTEERED[prompt], "draw": -1} for prompt in ("neutral", "steps")]
    return ask(bench, bench.prompts.validation, given, asking, "unsteered")


def cells(
    bench: Workbench, *, seed: int, way: str, layer: int, coefficients: tuple[float, ...], asking: Asking
) -> pd.DataFrame:
    """Answers under every coefficient at one layer."""
    given = [{**condition("neutral", way, "all", layer, c), "draw": -1} for c in coefficients]
    return ask(bench, bench.prompts.validation, given, asking, f"{way}, layer {layer}")


# --- The choice -------------------------------------------------------------------------------------------------------


def chosen_cells(
    table: pd.DataFrame, choose: ChooseBy = "chains", parse_loss: float = 0.1
) -> dict[str, tuple[int, float]]:
    """The cell of each way of steering, by the rule.

    Of the cells in which at most `parse_loss` of the answers less can be read than without steering (of all cells, if
    there is none), the one with the highest rate of chains (accuracy, if that is to decide); of several, the one that
    is higher in the other; then the smaller coefficient, then the lower layer.

    Args:
        table: of `all_levels`.

    Returns:
        way -> layer, coefficient.
    """
    first, second = ("chain", "correct") if choose == "chains" else ("correct", "chain")
    readable = mean_row(table, "parsed", UNSTEERED["neutral"])["mean"] - parse_loss
    found = {}
    for way in WAYS:
        own = table[table["way"] == way].pivot_table(
            index=["layer", "coefficient"], columns="outcome", values="mean", observed=True
        )
        good = own[own["parsed"] >= readable - 1e-12]
        ranked = (good if len(good) else own).reset_index()
        ranked = ranked.assign(**{name: ranked[name].round(9) for name in (first, second)})
        best = ranked.sort_values([first, second, "coefficient", "layer"], ascending=[False, False, True, True]).iloc[0]
        found[way] = (int(best["layer"]), float(best["coefficient"]))
    return found


def _rule(plan: Plan) -> str:
    names = ("rate of chains", "accuracy") if plan.choose == "chains" else ("accuracy", "rate of chains")
    return (
        f"highest {names[0]} among the cells in which at most {100 * plan.parse_loss:g} points of the answers less can "
        f"be read than without steering; then highest {names[1]}, smallest coefficient, lowest layer"
    )


# --- Findings ---------------------------------------------------------------------------------------------------------


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, the choice, and words."""
    grid = trials["grid"]
    table = all_levels(grid, plan.settings)
    chosen = chosen_cells(table, plan.choose, plan.parse_loss)
    contrasts = [
        (condition("neutral", way, "all", layer, c), UNSTEERED["neutral"])
        for way in WAYS for layer in plan.layers for c in plan.coefficients
    ]  # fmt: skip
    effects = {name: compare(grid, contrasts, CONDITION, name, plan.settings) for name in ("chain", "correct")}
    tables = {"levels": table} | {f"effects_{name}": rows for name, rows in effects.items()}
    content = {
        "rule": _rule(plan),
        "chosen": {way: {"layer": layer, "coefficient": c} for way, (layer, c) in chosen.items()},
    }
    captions = {
        "grid": "Rate of chains and accuracy (per cent) on validation questions, by layer and coefficient; framed: "
        f"chosen. ○ differs from no steering (q < {plan.settings.alpha:g}), ● family-wise.",
        "length": "Rate of chains and length against the coefficient, by layer; "
        f"{100 * plan.settings.level:g} % intervals over clusters; lines: no steering (solid) and the step-by-step "
        "sentence (dashed).",
    }
    return Findings(
        words(plan, grid, tables, chosen),
        tables,
        lambda: figures(table, effects, chosen, plan.settings.alpha),
        captions,
        files={CHOICE: (json.dumps(content, indent=2) + "\n").encode(), ITEMS: plan.used},
    )


def words(
    plan: Plan, grid: pd.DataFrame, tables: Mapping[str, pd.DataFrame], chosen: Mapping[str, tuple[int, float]]
) -> list[Section]:
    """The summary, section by section."""
    table = tables["levels"]
    plain = {prompt: UNSTEERED[prompt] for prompt in ("neutral", "steps")}
    rows = {name: mean_row(table, "chain", one) for name, one in plain.items()}
    n_cells = len(plan.layers) * len(plan.coefficients)
    level = f"{100 * plan.settings.level:g} %"
    base = grid[(grid["prompt"] == "neutral") & (grid["way"] == "")]
    found = [
        Section(
            f"{int(rows['neutral']['n'])} validation questions in {int(rows['neutral']['n_clusters'])} clusters; "
            f"{n_cells} cells (layers {', '.join(map(str, plan.layers))}; coefficients "
            f"{', '.join(f'{c:g}' for c in plan.coefficients)}) for each way of steering; per cent with {level} "
            f"intervals. {chain_limits(base, 2 * n_cells, plan.settings)}"
        ),
        Section(f"The rule, fixed before: {_rule(plan)}.", "Choice"),
        Section(_chosen_lines(table, plain, chosen), "Chosen"),
        Section(_by_coefficient(plan, table), "Chains by coefficient"),
    ]
    for way in WAYS:
        effects = tables["effects_chain"]
        own = effects[effects["way"] == way]
        better = int(((own["q"] < plan.settings.alpha) & (own["difference"] > 0)).sum())
        worse = int(((own["q"] < plan.settings.alpha) & (own["difference"] < 0)).sum())
        found.append(
            Section(
                f"{better} of {n_cells} cells have more chains than no steering, {worse} fewer "
                f"(q < {plan.settings.alpha:g} over all {2 * n_cells} cells).",
                f"Against no steering ({way})",
            )
        )
    return found


def _chosen_lines(table: pd.DataFrame, plain: Mapping[str, Any], chosen: Mapping[str, tuple[int, float]]) -> str:
    """The chosen cells beside the unsteered answers, as a table."""
    lines = ["On these questions the chosen cells are the best of many, hence optimistic.", ""]
    lines += ["| | chains | accuracy | read | words |", "|---|---|---|---|---|"]
    cells_ = [condition("neutral", way, "all", *cell) for way, cell in chosen.items()]
    for one in [*plain.values(), *cells_]:
        numbers = [interval(mean_row(table, name, one)) for name in ("chain", "correct", "parsed")]
        numbers.append(interval(mean_row(table, "words", one), scale=1))
        lines.append(f"| {label(one)} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def _by_coefficient(plan: Plan, table: pd.DataFrame) -> str:
    """Best rate over layers at every coefficient."""
    texts = []
    for way in WAYS:
        own = table[(table["way"] == way) & (table["outcome"] == "chain")]
        best = own.groupby("coefficient", observed=True)["mean"].max()
        texts.append(f"{way}: " + ", ".join(f"{c:g}: {100 * best[c]:.1f}" for c in plan.coefficients))
    return f"Best layer at each coefficient, per cent. {'; '.join(texts)}."


# --- Command ----------------------------------------------------------------------------------------------------------


def identity(options: GridOptions, model: LanguageModel, prompts: ItemSplits) -> dict[str, Any]:
    """What decides the result: also the vectors."""
    return {**language_identity(options, model, prompts), "vectors": folder_hash(options.vectors)}


STUDY = Study(
    options=GridOptions,
    title="Chain-of-thought vector: where and how much",
    prompts=lambda options, model: options.load_splits(options.seed, model.tokenizer),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=identity,
)

run = STUDY.run
main = STUDY.main
