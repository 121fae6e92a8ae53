"""The figure of `codi probes`: selectivity of every target by space, layer and latent.

Knows nothing about models, states or how a probe was fitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.figures.heatmap import Scale, colour_bar, matrix, numbers
from experiments.figures.style import CORRELATION, new_figure, note, sample_text, styled
from experiments.latents.options import PROBED_SPACES
from experiments.statistics.probes import CONTRAST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_NAMES = {"h": "h: residual stream", "z": "z: embedding", "keys": "keys", "values": "values"}
_MOST_LAYERS = 10
"""With more there is no room for numbers."""


@styled
def draw(table: pd.DataFrame, title: str = "") -> Figure:
    """Heatmaps of selectivity: one row per target, one column per space, layers upwards, latents to the right.

    Args:
        table: columns space, latent, layer, target, selectivity, n, n_clusters.
        title: above everything.
    """
    spaces = [space for space in PROBED_SPACES if space in set(table["space"])]
    targets = list(dict.fromkeys(table["target"]))
    tallest = max(table.loc[table["space"] == space, "layer"].nunique() for space in spaces)
    height = float(np.clip(0.155 * tallest, 0.55, 2.6))
    widths = [table.loc[table["space"] == space, "latent"].nunique() for space in spaces]
    figure, axes = new_figure(
        len(targets), len(spaces), total=1.1 + (height + 0.14) * len(targets), width_ratios=widths
    )
    contrast = table["target"] == CONTRAST
    scales = {
        False: Scale.magnitude(table.loc[~contrast, "selectivity"], least=0.05),
        True: Scale.signed(table.loc[contrast, "selectivity"], CORRELATION, least=0.05),
    }
    for row, target in enumerate(targets):
        for column, space in enumerate(spaces):
            cells = table[(table["space"] == space) & (table["target"] == target)]
            _panel(axes[row, column], cells, space, scales[target == CONTRAST], last=row == len(targets) - 1)
            if row == 0:
                axes[row, column].set_title(_NAMES[space])
            if column == 0:
                axes[row, column].set_ylabel(target.replace("−", "\n− "))
            if row == len(targets) - 1:
                axes[row, column].set_xlabel("latent")
    labels = {False: "selectivity (accuracy − shuffled labels)", True: "difference"}
    for diverging, scale in scales.items():
        rows = [row for row, target in enumerate(targets) if (target == CONTRAST) == diverging]
        if rows:
            colour_bar(figure, scale, labels[diverging], of=axes[rows], aspect=5 if diverging else 30,
                       ticks=3 if diverging else 6)  # fmt: skip
    figure.supylabel("target, and layer (h: 0..n; keys, values: block)", fontsize=7)
    if title:
        figure.suptitle(title, fontsize=8)
    note(
        figure,
        "Accuracy of linear probes on number triples they have not seen (step 1 and operands: on pairs X, Y they have "
        "not seen), minus that of the same probes on shuffled "
        f"labels. Latent 0: the begin-of-thought token. {sample_text(table)}",
    )
    return figure


def _panel(axes: Axes, cells: pd.DataFrame, space: str, scale: Scale, *, last: bool) -> None:
    grid = cells.pivot(index="layer", columns="latent", values="selectivity")
    values = grid.to_numpy()
    texts = numbers(values, bare=True) if len(grid) <= _MOST_LAYERS else None
    matrix(axes, values, list(grid.index), list(grid.columns), scale, texts=texts, upwards=True)
    if not last:
        axes.set_xticks([])
    if space == "z":
        axes.set_yticks([])
    elif len(grid) > _MOST_LAYERS:
        axes.set_yticks(range(0, len(grid), 4), grid.index[::4])
