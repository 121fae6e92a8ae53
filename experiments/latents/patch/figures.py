"""Figures of patching. Knows nothing about trials or models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.figures.heatmap import MARKS, Scale, colour_bar, draw_matrix
from experiments.figures.series import baseline, draw_series
from experiments.figures.style import DIVERGING, legend, new_figure
from experiments.latents.patch.interchange import levels_of, moved
from experiments.latents.patch.means import KINDS, UNEDITED, replaced
from experiments.latents.patch.plan import Plan
from experiments.latents.patch.summary import intervals, level_name, predictions_of
from experiments.latents.patch.values import STATES, patched
from experiments.statistics.effects import row_of, rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["captions", "figures"]


def _drawn(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which figures there are."""
    found = ["means"] if "means" in tables else []
    if "values_hit" in tables and not plan.legacy:
        found.append("values")
    return [*found, "interchange"] if "interchange_donor" in tables else found


def captions(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """What the figures show."""
    found = {
        "means": "Accuracy with latents replaced by means of derivation prompts, zero or noise, and what another key's "
        f"mean changes beyond the same key's; {intervals(plan)}.",
        "values": "Answers that are the predicted one when a latent is the mean of prompts with another value of a "
        f"step, minus those when it is a third value's; {intervals(plan)}.",
        "interchange": "Change of accuracy, and answers that become the donor's (beyond a third prompt's), with parts "
        f"of latents taken from another prompt. {MARKS.rstrip('.')}, by more than the size that matters.",
    }
    return {name: found[name] for name in _drawn(plan, tables)}


def figures(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Figures by file name."""
    make = {"means": _means_figure, "values": _values_figure, "interchange": _interchange_figure}
    return {name: make[name](plan, tables) for name in _drawn(plan, tables)}


def _means_figure(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Figure:
    n = plan.n_latents
    level = tables["means_levels"]
    sets = [*([k] for k in range(1, n + 1)), list(range(1, n + 1))]
    ticks = (range(1, n + 2), [*map(str, range(1, n + 1)), "all"])
    figure, axes = new_figure(1, 2, height=2.9)
    left, right = axes[0]
    baseline(left, 100 * row_of(level, UNEDITED)["mean"], "unedited")
    for place, kind in enumerate(KINDS):
        rows = rows_of(level, [replaced(kind, chosen) for chosen in sets])
        control = kind == "same key"
        draw_series(left, range(1, n + 2), rows, kind, 0 if control else place - 1, joined=n, control=control)
    left.set(xlabel="replaced latent", ylabel="accuracy (%)", title="Mean patching", ylim=(-2, None))
    left.set_xticks(*ticks)
    legend(figure, [left])
    pairs = [(replaced("other key", chosen), replaced("same key", chosen)) for chosen in sets]
    rows = pd.DataFrame([row_of(tables["means"], *pair) for pair in pairs])
    baseline(right)
    draw_series(right, range(1, n + 2), rows, "other − same", 0, name="difference", joined=n)
    right.set(xlabel="replaced latent", ylabel="points of accuracy", title="Other key against same key")
    right.set_xticks(*ticks)
    return figure


def _values_figure(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Figure:
    latents = plan.value_latents
    shown = predictions_of(plan, tables)
    figure, axes = new_figure(1, len(shown), height=2.8, sharey=True)
    for axis, (step, outcome, label) in zip(axes[0], shown, strict=True):
        baseline(axis)
        series = [(scope, state) for scope in plan.scopes for state in STATES]
        for place, (scope, state) in enumerate(series):
            rows = rows_of(tables[f"values_{outcome}"], [patched("target", step, scope, state, k) for k in latents])
            draw_series(axis, latents, rows, f"{scope}, {state}", place, name="difference")
        axis.set(xlabel="patched latent", title=f"Step {step} → t: {label}", xticks=latents)
    axes[0, 0].set_ylabel("predicted answers,\ntarget − control (points)")
    legend(figure, axes)
    return figure


def _interchange_figure(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Figure:
    n = plan.n_latents
    order = {"vector": 0, "residual": 1, "keys": 2, "values": 3, "slot": 4}
    levels = sorted(levels_of("other", plan.n_layers), key=lambda level: (order[level[0]], level[1]))
    sets = [list(range(1, n + 1)), *([k] for k in range(1, n + 1))]
    figure, axes = new_figure(1, 2, height=0.9 + 0.22 * len(levels), sharey=True)
    scale = Scale(-100, 100, DIVERGING)
    for axis, table, title in (
        (axes[0, 0], tables["interchange_correct"], "Change of accuracy (points)"),
        (axes[0, 1], tables["interchange_donor"], "Donor's answer, above chance (points)"),
    ):
        index = table.set_index(["kind", "level", "layer", "replaced"])[["difference", "matters"]]
        wanted = [[tuple(moved("other", level, chosen).values()) for chosen in sets] for level in levels]
        values = np.array([[100 * index["difference"].get(name, np.nan) for name in row] for row in wanted])
        strong = np.array([[bool(index["matters"].get(name, False)) for name in row] for row in wanted])
        labels = ["all", *(str(k) for k in range(1, n + 1))]
        draw_matrix(axis, values, [level_name(level) for level in levels], labels, title, form="+.0f",
                    significant=strong, bar=False, scale=scale)  # fmt: skip
        axis.set_xlabel("interchanged latent")
    colour_bar(figure, scale, "points", of=axes)
    return figure
