"""Figures of `codi cot grid`, drawn from its tables: rate of chains and accuracy over layer and coefficient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.cot.asking import UNSTEERED
from experiments.cot.tables import mean_row
from experiments.figures.heatmap import CORRECTED, FAMILY_WISE, Scale, colour_bar, draw_matrix, frame
from experiments.figures.series import DASHES, baseline, draw_series
from experiments.figures.style import CONTROL, legend, new_figure

__all__ = ["figures"]


def figures(
    table: pd.DataFrame, effects: Mapping[str, pd.DataFrame], chosen: Mapping[str, tuple[int, float]], alpha: float
) -> dict[str, Any]:
    """Figures by file name.

    Args:
        table: of `all_levels`.
        effects: "chain" and "correct" -> paired differences from no steering.
        chosen: way of steering -> layer and coefficient.
        alpha: level of the marks.
    """
    return {"grid": _grid(table, effects, chosen, alpha), "length": _length(table)}


def _square(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """(layer × coefficient)."""
    return rows.pivot_table(index="layer", columns="coefficient", values=value, observed=True)


def _grid(
    table: pd.DataFrame, effects: Mapping[str, pd.DataFrame], chosen: Mapping[str, tuple[int, float]], alpha: float
) -> Any:
    """Heat maps: a column per way of steering, a row per measure."""
    n_layers = table["layer"].nunique()
    figure, axes = new_figure(2, len(chosen), height=0.9 + 0.22 * n_layers)
    for row, (outcome, title) in enumerate((("chain", "Chains"), ("correct", "Accuracy"))):
        own = table[(table["outcome"] == outcome) & (table["vector"] == "all")]
        plain = 100 * mean_row(table, outcome, UNSTEERED["neutral"])["mean"]
        scale = Scale.magnitude(100 * own["mean"].to_numpy(), least=10.0)
        for column, (way, cell) in enumerate(chosen.items()):
            values = 100 * _square(own[own["way"] == way], "mean")
            tests = effects[outcome][effects[outcome]["way"] == way]
            found = (tests["q"] < alpha) * CORRECTED
            found = found.mask(tests["fwer_p"] < alpha, FAMILY_WISE)
            marks = _square(tests.assign(mark=found), "mark").reindex_like(values)
            axis = axes[row, column]
            draw_matrix(
                axis, values.to_numpy(), [str(layer) for layer in values.index], [f"{c:g}" for c in values.columns],
                f"{title} (%), {way}; none: {plain:.0f}", significant=marks.to_numpy(), bar=False, scale=scale,
                upwards=True,
            )  # fmt: skip
            at = (np.flatnonzero(values.index == cell[0]), np.flatnonzero(values.columns == cell[1]))
            frame(axis, int(at[0][0]), int(at[1][0]))
            axis.set(ylabel="layer" if column == 0 else "", xlabel="coefficient" if row else "")
        colour_bar(figure, scale, of=axes[row], aspect=14, ticks=4)
    return figure


def _length(table: pd.DataFrame) -> Any:
    """Rate of chains and words against the coefficient."""
    figure, axes = new_figure(2, 2, height=2.0, sharex=True)
    for row, (outcome, title, scale) in enumerate((("chain", "chains (%)", 100.0), ("words", "words", 1.0))):
        for column, way in enumerate(("continuous", "single")):
            axis = axes[row, column]
            own = table[(table["outcome"] == outcome) & (table["way"] == way)]
            steps = list(np.unique(own["coefficient"]))
            baseline(axis, scale * mean_row(table, outcome, UNSTEERED["neutral"])["mean"])
            axis.axhline(scale * mean_row(table, outcome, UNSTEERED["steps"])["mean"], color=CONTROL, lw=0.9, ls=DASHES)
            for place, layer in enumerate(np.unique(own["layer"])):
                rows = own[own["layer"] == layer].sort_values("coefficient")
                draw_series(axis, range(len(steps)), rows, f"layer {layer}", place, scale=scale)
            axis.set_xticks(range(len(steps)), [f"{c:g}" for c in steps])
            axis.set(title=way.capitalize() if row == 0 else "", ylabel=title if column == 0 else "")
            axis.set_ylim(bottom=min(-2.0, axis.get_ylim()[0]) if outcome == "chain" else 0)
            if row:
                axis.set_xlabel("coefficient")
    legend(figure, axes)
    return figure
