"""The figure of `codi polynomial`. Knows nothing about trials or models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from experiments.figures.heatmap import Scale, colour_bar, draw_matrix
from experiments.figures.style import SEQUENTIAL, new_figure
from experiments.polynomial.plan import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_of"]


def figure_of(plan: Plan, tables: Mapping[str, pd.DataFrame]) -> Figure:
    """How often each state is read at each place: a panel per method and number of hops."""
    grid = tables["grid"]
    last = grid[(grid["method"] == "probe") | (grid["layer"] == plan.n_layers)]
    figure, axes = new_figure(2, len(plan.hops), height=0.7 + 0.22 * max(plan.hops))
    scale = Scale(0, 100, SEQUENTIAL)
    places = [*plan.latents, plan.n_latents + 1]
    for row, (method, by) in enumerate((("lens", "lens"), ("probe", "probes"))):
        for axis, hops in zip(axes[row], plan.hops, strict=True):
            mine = last[(last["method"] == method) & (last["hops"] == hops)]
            wide = mine.pivot(index="state", columns="place", values="read").reindex(range(1, hops + 1), columns=places)
            draw_matrix(
                axis, 100 * wide.to_numpy(), [f"s{state}" for state in wide.index],
                [*(f"h_{place}" for place in plan.latents), "end"], f"{hops} hops, {by}", bar=False, scale=scale,
            )  # fmt: skip
            axis.set_xlabel("read at")
    colour_bar(figure, scale, "prompts (%)", of=axes)
    return figure
