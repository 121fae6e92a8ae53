"""Figures of components and of where edits go. Knows nothing about trials or models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.figures.series import draw_series, from_zero, spread
from experiments.figures.style import PALETTE, legend, look, new_figure
from experiments.latents.pca.components import QUANTITIES
from experiments.latents.pca.grid import SPACES
from experiments.latents.pca.plan import Plan
from experiments.latents.pca.summary import intervals
from experiments.latents.pca.where import KINDS
from experiments.statistics.effects import row_of, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["captions", "figures"]

Tables = Mapping[str, pd.DataFrame]
_SHORT = {"edit_size": "edit", "slot": "slot k", "slot_next": "slot k+1", "h_last": "h of last", "kl": "at once",
          "kl_next": "one more", "kl_end": "at the end"}  # fmt: skip


def captions(plan: Plan) -> dict[str, str]:
    """What the figures show."""
    return {
        "components": "Latents of the evaluation prompts on the first two components of the derivation prompts' "
        "latents; rank of even against odd among all divisions of the latents into equal groups.",
        "variance-steering": "Variance that the components hold, and answers that steering changes beside random "
        f"directions of the same norms; {intervals(plan)}.",
        "where": f"One edit (mean difference, c = ±1) followed through the model, in every space; {intervals(plan)}.",
    }


def figures(plan: Plan, tables: Tables) -> dict[str, Any]:
    """Figures by file name."""
    return {
        "components": _components_figure(plan, tables),
        "variance-steering": _variance_figure(plan, tables),
        "where": _where_figure(plan, tables["where"]),
    }


def _components_figure(plan: Plan, tables: Tables) -> Figure:
    figure, axes = new_figure(2, 3, height=2.3)
    for axis, name in zip(axes.flat, QUANTITIES, strict=True):
        part = tables["scores"]
        part = part[part["quantity"] == name]
        for k in plan.latents:
            points = part[part["latent"] == k]
            axis.scatter(
                points["first"], points["second"], s=9, alpha=0.7, linewidths=0, label=f"latent {k}",
                color=PALETTE[(k - 1) % len(PALETTE)], marker="o" if k % 2 else "^",
            )  # fmt: skip
        parity = row_of(tables["parity"], {"quantity": name})
        axis.set_title(f"{name} (even/odd: rank {parity['rank']:.0f} of {parity['divisions']:.0f})")
        axis.set(xlabel="first component", ylabel="second component")
    legend(figure, axes)
    return figure


def _variance_figure(plan: Plan, tables: Tables) -> Figure:
    figure, axes = new_figure(1, 2, height=2.6)
    left, right = axes[0]
    for place, name in enumerate(QUANTITIES):
        part = tables["variance"]
        part = part[(part["quantity"] == name) & (part["latent"] == 0)]
        left.plot(part["component"], 100 * part["share"].cumsum(), color=PALETTE[place], marker="o", markersize=3,
                  linewidth=1, label=name)  # fmt: skip
    left.set(xlabel="components", ylabel="variance explained (%)", title="All latents together", ylim=(0, 102))
    left.legend(loc="lower right", ncols=2)
    place = 0
    for space in SPACES:
        for control, line in (("direction", "-"), ("random", ":")):
            chosen = {"space": space, "timing": "early-exit", "control": control}
            rows = rows_of(tables["grid_changed"], [{**chosen, "latent": k} for k in plan.latents])
            right.errorbar(
                np.asarray(plan.latents) + 0.06 * (place - 2), 100 * rows["mean"], yerr=spread(rows, scale=100),
                **look(place // 2, control == "random"), linestyle=line, markersize=3.5, linewidth=1, capsize=1.5,
                label=f"{space}, {'A−B' if control == 'direction' else control}",
            )  # fmt: skip
            place += 1
    right.set(xlabel="edited latent", ylabel="changed answers (%)", title="Steering, early exit, |c| 0.5 and 1",
              xticks=plan.latents)  # fmt: skip
    from_zero(right)
    legend(figure, [right])
    return figure


def _where_figure(plan: Plan, means: pd.DataFrame) -> Figure:
    figure, axes = new_figure(1, 3, height=2.6, width_ratios=[1, 1, 1.15])
    changes, answers, layers = axes[0]
    _measures(changes, means, ("edit_size", "slot", "slot_next", "h_last"), "Change (spreads over prompts)")
    _measures(answers, means, ("kl", "kl_next", "kl_end"), "KL of the answer (nats)")
    for place, (name, _, _) in enumerate(KINDS):
        chosen = {"edit": name, "control": "direction", "measure": "eot"}
        rows = rows_of(means, [{**chosen, "layer": layer} for layer in range(plan.n_layers + 1)])
        draw_series(layers, range(plan.n_layers + 1), rows, name, place, scale=1)
    layers.set(xlabel="layer", title="Change at the end of thought (spreads)")
    layers.xaxis.get_major_locator().set_params(integer=True)
    from_zero(layers)
    legend(figure, axes)
    return figure


def _measures(axis: Axes, means: pd.DataFrame, measures: tuple[str, ...], title: str) -> None:
    """A panel of measures, one series per kind of edit."""
    for place, (name, _, _) in enumerate(KINDS):
        chosen = {"edit": name, "control": "direction"}
        rows = rows_of(means, [{**chosen, "measure": measure} for measure in measures])
        draw_series(axis, range(len(measures)), rows, name, place, scale=1)
    axis.set_xticks(range(len(measures)), [_SHORT[m] for m in measures], rotation=20, ha="right")
    axis.set_title(title)
    from_zero(axis)
