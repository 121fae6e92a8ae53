"""Figure of `codi cot derive`, drawn from its tables: how long the vector is, and how alike from place to place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.heatmap import Scale, draw_matrix
from experiments.figures.series import baseline
from experiments.figures.style import BASELINE, CORRELATION, legend, look, new_figure

__all__ = ["figures"]


def figures(norms: pd.DataFrame, cosines: np.ndarray, layers: Sequence[int]) -> dict[str, Any]:
    """Figures by file name.

    Args:
        norms: set ("all" and each), layer, norm, cosine with that of all sets.
        cosines: (layer, layer) of the vector with itself.
        layers: their numbers.
    """
    figure, axes = new_figure(1, 3, height=2.6)
    left, middle, right = axes[0]
    names = [name for name in norms["set"].unique() if name != "all"]
    for place, name in enumerate(names):
        rows = norms[norms["set"] == name]
        style = {**look(place), "linewidth": 0.9, "markersize": 2.2}
        left.plot(rows["layer"], rows["norm"], label=name, **style)
        middle.plot(rows["layer"], rows["cosine"], label=name, **style)
    whole = norms[norms["set"] == "all"]
    left.plot(whole["layer"], whole["norm"], color=BASELINE, linewidth=1.6, label="all sets")
    left.set(xlabel="layer", ylabel="norm", title="Length of the vector", yscale="log")
    baseline(middle, 0.0)
    middle.set(xlabel="layer", ylabel="cosine", title="Each set's own vector with all", ylim=(-0.35, 1.03))
    legend(figure, (left,))
    labels = [str(layer) for layer in layers]
    draw_matrix(
        right,
        cosines,
        labels,
        labels,
        "Cosine between layers",
        upwards=True,
        scale=Scale(-1, 1, CORRELATION),
        form=".1f",
    )
    right.set(xlabel="layer", ylabel="layer")
    return {"vector": figure}
