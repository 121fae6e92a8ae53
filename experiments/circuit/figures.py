"""The figure of `codi circuit`: a heat map of heads for every subtask. Knows nothing about models or texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.figures.heatmap import Scale, colour_bar, matrix
from experiments.figures.style import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_effects"]

_COLUMNS = 4


@styled
def draw_effects(table: pd.DataFrame, n_blocks: int, n_heads: int) -> Figure:
    """Heads to the right, blocks upwards, one panel per subtask, one scale for all.

    Args:
        table: columns subtask, kind, block, head, effect.
        n_blocks, n_heads: of the model; heads that were not patched stay grey.
    """
    subtasks = list(table.groupby(["subtask", "kind"], observed=True, sort=True))
    rows = -(-len(subtasks) // _COLUMNS)
    height = float(np.clip(0.08 * n_blocks, 0.7, 2.6))
    figure, axes = new_figure(rows, min(_COLUMNS, len(subtasks)), total=0.6 + (height + 0.45) * rows)
    scale = Scale.signed(table["effect"], least=0.1, quantile=0.995)  # a few heads must not take all the colours
    every = max(1, n_blocks // 6)
    for axis in axes.flat[len(subtasks) :]:
        axis.set_visible(False)
    for place, ((subtask, kind), part) in enumerate(subtasks):
        axis = axes.flat[place]
        values = np.full((n_blocks, n_heads), np.nan)
        values[part["block"] - 1, part["head"]] = part["effect"]
        labels = [block if (block - 1) % every == 0 else "" for block in range(1, n_blocks + 1)]
        matrix(axis, values, labels, range(n_heads), scale, upwards=True)
        axis.set_title(f"{subtask}: {kind}")
        if place % _COLUMNS == 0:
            axis.set_ylabel("block")
        if place + _COLUMNS >= len(subtasks):
            axis.set_xlabel("head")
    colour_bar(figure, scale, "E, share of KL recovered", of=axes, values=table["effect"])
    return figure
