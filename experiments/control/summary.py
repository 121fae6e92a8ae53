"""The summary of a sweep in words: what was asked, what could be seen, what was chosen and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from experiments.control.cells import NAMES, Choice
from experiments.statistics.beyond import Beyond, fewest_draws
from experiments.statistics.effects import row_of
from experiments.statistics.words import interval
from experiments.study.limits import limits
from experiments.study.result import Section

if TYPE_CHECKING:
    from experiments.control.plan import Plan

__all__ = ["NEGATIVES", "SHOWN", "words"]

SHOWN: dict[str, tuple[str, float, int]] = {
    "correct": ("exact match, %", 100, 1),
    "choice_correct": ("restricted choice, %", 100, 1),
    "p_right": ("p(right), %", 100, 1),
    "p_wrong": ("p(wrong), %", 100, 1),
    "entropy": ("entropy, nats", 1, 3),
    "kl": ("KL, nats", 1, 3),
    "repetition": ("repeated token pairs, %", 100, 1),
}
"""Outcome -> name, factor and digits in tables."""
NEGATIVES = {
    "swapped": "the same question with another answer",
    "letters": "random letters",
    "failures": "the same question with the model's own wrong answer",
    "given": "given texts",
}
SCALES = {
    "as-is": "Alpha multiplies each vector as it is",
    "equal-norm": "Alpha multiplies each vector at the norm of the first one",
    "equal-kl": "Alpha of every vector is scaled until it moves the next token as far (KL) as the first one does",
}


def words(
    plan: Plan, tables: Mapping[str, pd.DataFrame], test: pd.DataFrame, choice: Choice, beyond: Beyond | None
) -> list[Section]:
    """The sections.

    Args:
        plan: of the run.
        tables: norms, effects, cells.
        test: trials of the reported items.
        choice: on the validation items.
        beyond: the chosen cell beside random directions.
    """
    return [
        Section(_opening(plan, tables, test)),
        Section(_chosen(plan, tables["cells"], choice), "Chosen on validation items"),
        Section(_table(plan, tables["effects"], choice), "On the test items"),
        Section(_random(choice, beyond, plan), "Against random directions"),
        Section(_all_cells(plan, tables, choice), "All cells"),
    ]


def _opening(plan: Plan, tables: Mapping[str, pd.DataFrame], test: pd.DataFrame) -> str:
    plain = test[test["kind"] == "none"]
    pairs = int(tables["norms"]["n_pairs"].max())
    files = plan.setup.making.files
    origin = f"vectors from {files}" if files else f"vectors from {pairs} pairs (against: {NEGATIVES[plan.negatives]})"
    where = {
        "all": "every token, of the prompt and generated", "prompt": "every prompt token",
        "generated": "every generated token", "last": "the last prompt token", "once": "the first generated token",
    }[plan.setup.positions]  # fmt: skip
    many = f"layers {plan.layers[0]} to {plan.layers[-1]} one by one"
    layers = f"layer {plan.layers[0]} of {plan.n_layers}" if len(plan.layers) == 1 else many
    seen = limits(plain.assign(parsed=True), 1, plan.settings)
    return (
        f"{plan.n_test} test items of {plan.asked} in {plain['cluster'].nunique()} clusters, chosen on "
        f"{plan.n_validation} others; {origin}, {', '.join(plan.methods)}; added at {layers}, at {where}. "
        f"{SCALES[plan.setup.scale]}. Intervals: {100 * plan.settings.level:g} % over items. Unsteered: "
        f"{100 * plain['correct'].mean():.1f} % exact match. {seen}"
    )


def _chosen(plan: Plan, cells: pd.DataFrame, choice: Choice) -> str:
    number = int((cells["alpha"] != 0).sum())
    gain = choice.accuracy - choice.baseline
    first = (
        f"{choice.method}, layer {choice.layer}, alpha {choice.alpha:g}: {100 * choice.accuracy:.1f} % right against "
        f"{100 * choice.baseline:.1f} % unsteered ({plan.n_validation} items, best of {number} cells)."
    )
    if choice.tied:
        others = "1 other cell is" if choice.tied == 1 else f"{choice.tied} other cells are"
        first += f" {others} as accurate; of them this one has the largest p(right)."
    if gain <= 0:
        first += " No cell is more accurate than the unsteered model there."
    return first.replace("alpha -", "alpha −")


def _table(plan: Plan, effects: pd.DataFrame, choice: Choice) -> str:
    """Both signs of the chosen cell beside the unsteered model and random directions."""
    place = {"method": choice.method, "layer": choice.layer}
    alphas = [choice.alpha]
    if ((effects["alpha"] == -choice.alpha) & (effects["layer"] == choice.layer)).any():
        alphas.append(-choice.alpha)
    heads = "".join(f" alpha {alpha:g} |" for alpha in alphas).replace("-", "−")
    lines = [
        "Changes from the unsteered model at the chosen cell, at its opposite, and those of random "
        "directions of its norm:\n",
        f"| | unsteered |{heads} random at {abs(choice.alpha):g}, mean (central {100 * plan.settings.level:g} %) |",
        "|---|---|" + "---|" * (len(alphas) + 1),
    ]
    for outcome, (name, factor, digits) in SHOWN.items():
        if not (effects["outcome"] == outcome).any():
            continue
        rows = [row_of(effects, {**place, "alpha": alpha, "outcome": outcome}) for alpha in alphas]
        cells = [f"{interval(row, 'difference', factor, digits)}{'*' if row['q'] < 0.05 else ''}" for row in rows]
        one = rows[0]
        random = "–"
        if one["draws"] and one["random_mean"] == one["random_mean"]:
            low, mean, high = (factor * (one[f"random_{end}"] - one["reference_mean"]) for end in
                               ("lower", "mean", "upper"))  # fmt: skip
            random = f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})".replace("-", "−")
        lines.append(f"| {name} | {factor * one['reference_mean']:.{digits}f} | " + " | ".join([*cells, random]) + " |")
    lines.append("\n\\* q < 0.05 over all cells of the sweep.")
    return "\n".join(lines)


def _random(choice: Choice, beyond: Beyond | None, plan: Plan) -> str:
    if beyond is None:
        return "No random directions were run (--draws): nothing can be said to be due to the direction."
    needed = fewest_draws(plan.settings.alpha)
    few = f" With fewer than {needed} draws nothing can be first of them at p ≤ {plan.settings.alpha:g}."
    return (
        f"Exact match at the chosen cell is {100 * beyond.estimate:+.1f} [{100 * beyond.lower:+.1f}, "
        f"{100 * beyond.upper:+.1f}] points above the mean of {beyond.draws} random directions of its norm (items and "
        f"directions resampled); {round(beyond.p * (1 + beyond.draws)) - 1} of them are as good or better (rank "
        f"p = {beyond.p:.3f}).{few if beyond.draws < needed else ''}"
    ).replace("-", "−")


def _all_cells(plan: Plan, tables: Mapping[str, pd.DataFrame], choice: Choice) -> str:
    cells, effects = tables["cells"], tables["effects"]
    tried = cells[cells["alpha"] != 0]
    own = effects[(effects["outcome"] == "correct") & (effects["alpha"] != 0)]
    level = plan.settings.alpha
    up, down = ((own["q"] < level) & (side * own["difference"] > 0) for side in (1, -1))
    best = own.sort_values("difference", ascending=False).iloc[0]
    first = int((up & (own["p_above"] <= level + 1e-12)).sum())
    chosen = row_of(own, {name: getattr(choice, name) for name in NAMES})
    return (
        f"Of {len(tried)} cells {int(up.sum())} raise exact match and {int(down.sum())} lower it (q < {level:g}); "
        f"{first} of the former are also first of their random directions. Coherent (exact match and p(right) rise, "
        f"entropy falls): {int(tried['coherent'].sum())} by their estimates, {int(tried['coherent_shown'].sum())} each "
        f"with q < {level:g}. The best cell on the test items themselves, {best['method']} at layer {best['layer']}, "
        f"alpha {best['alpha']:g}, has {100 * best['difference']:+.1f} points; it was found on the items that it is "
        f"measured on. The cell chosen on others has {100 * chosen['difference']:+.1f}."
    ).replace("-", "−")
