"""Figures of `codi cot eval`, drawn from its tables: rates under every condition, accuracy against length, sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.cot.asking import UNSTEERED
from experiments.cot.eval_words import main_conditions
from experiments.cot.measures import CONDITION
from experiments.cot.tables import label, mean_row, records
from experiments.figures.heatmap import Scale, draw_matrix
from experiments.figures.series import DASHES, draw_points, spread
from experiments.figures.style import CONTROL, SERIES, legend, new_figure

__all__ = ["figures"]


def figures(chosen: Mapping[str, tuple[int, float]], tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Figures by file name."""
    table = tables["levels"]
    return {"rates": _rates(table), "pareto": _pareto(table, chosen), "sets": _sets(tables["by_set"], chosen)}


def _ordered(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Every condition: the prompts, then each way of steering, the vector before its controls."""
    order = {"all": 0, "held-out": 1, "random": 2, "shuffled": 3, "": 0}
    rows = records(table[table["outcome"] == "chain"][list(CONDITION)])
    plain = list(UNSTEERED.values())
    steered = [row for row in rows if row["way"]]
    steered.sort(key=lambda row: (row["way"], row["prompt"] != "neutral", order[row["vector"]], -row["coefficient"]))
    return [*plain, *steered]


def _rates(table: pd.DataFrame) -> Any:
    """A line per condition: rate of chains, accuracy."""
    conditions = _ordered(table)
    figure, axes = new_figure(1, 2, total=0.7 + 0.17 * len(conditions), sharey=True)
    for axis, outcome, title in zip(axes[0], ("chain", "correct"), ("Chains (%)", "Accuracy (%)"), strict=True):
        for place, one in enumerate(conditions):
            row = mean_row(table, outcome, one)
            colour = SERIES[0] if not one["way"] else SERIES[1] if one["vector"] in ("all", "held-out") else CONTROL
            reach = [[100 * (row["mean"] - row["lower"])], [100 * (row["upper"] - row["mean"])]]
            axis.errorbar(100 * row["mean"], place, xerr=np.abs(reach), fmt="o", ms=3.4, color=colour, elinewidth=0.8)
        for prompt, style in (("neutral", "-"), ("steps", DASHES)):
            level = 100 * mean_row(table, outcome, UNSTEERED[prompt])["mean"]
            axis.axvline(level, color=CONTROL, lw=0.7, ls=style, zorder=1)
        axis.set(title=title, xlim=(-3, 103))
        axis.set_yticks(range(len(conditions)), [label(one) for one in conditions])
        axis.set_ylim(len(conditions) - 0.4, -0.6)
    return figure


def _pareto(table: pd.DataFrame, chosen: Mapping[str, tuple[int, float]]) -> Any:
    """Accuracy and rate of chains against words."""
    figure, axes = new_figure(1, 2, height=2.9)
    for axis, outcome, title in zip(axes[0], ("correct", "chain"), ("accuracy (%)", "chains (%)"), strict=True):
        for place, one in enumerate(main_conditions(chosen)):
            rows = {name: pd.DataFrame([mean_row(table, name, one)]) for name in (outcome, "words")}
            draw_points(
                axis, rows["words"]["mean"], 100 * rows[outcome]["mean"], label(one), place,
                across=spread(rows["words"]), up=spread(rows[outcome], scale=100),
            )  # fmt: skip
        axis.set(xlabel="words", ylabel=title)
        axis.set_ylim(-3, max(20.0, axis.get_ylim()[1]))
        axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    legend(figure, axes[0, :1])
    return figure


def _sets(table: pd.DataFrame, chosen: Mapping[str, tuple[int, float]]) -> Any:
    """Heat maps: condition × set."""
    conditions = main_conditions(chosen)
    names = list(dict.fromkeys(table["set"]))
    figure, axes = new_figure(1, 2, height=0.9 + 0.24 * len(conditions), sharey=True)
    for axis, outcome, title in zip(axes[0], ("chain", "correct"), ("Chains (%)", "Accuracy (%)"), strict=True):
        values = np.array(
            [[100 * mean_row(table, outcome, {"set": name, **one})["mean"] for name in names] for one in conditions]
        )
        draw_matrix(
            axis, values, [label(one) for one in conditions], [name.replace("-", "\n") for name in names], title,
            bar=False, scale=Scale(0, 100),
        )  # fmt: skip
    return figure
