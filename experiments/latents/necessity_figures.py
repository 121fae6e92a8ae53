"""Figures of `codi necessity`, drawn from its tables: how many latents, which one, which set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.heatmap import draw_matrix
from experiments.figures.series import baseline, draw_series
from experiments.figures.style import CONTROL, SERIES, legend, new_figure
from experiments.latents.necessity_measures import KINDS, ON_ALL_SUBSETS, UNEDITED, after, replaced, subsets
from experiments.statistics.effects import row_of, rows_of

__all__ = ["figures"]


def figures(tables: Mapping[str, pd.DataFrame], n: int) -> dict[str, Any]:
    """Figures by file name."""
    count, level = tables["counts"], tables["levels"]
    figure, axes = new_figure(1, 3, height=2.5)
    left, middle, right = axes[0]
    draw_series(left, range(n + 1), rows_of(count, [after(k) for k in range(n + 1)]), "after k latents", 2)
    for mode, label, colour, style in (
        ("direct", "direct", CONTROL, ":"),
        ("verbal", "written chain", SERIES[3], "--"),
    ):
        line = 100 * row_of(count, {"mode": mode})["mean"]
        left.axhline(line, color=colour, linestyle=style, linewidth=1.1, label=label)
    left.set(xlabel="number of latents", ylabel="accuracy (%)", title="How many latents", xticks=range(n + 1))
    left.legend(loc="best")
    for axis, title, chosen in (
        (middle, "One latent replaced", [(k,) for k in range(1, n + 1)]),
        (right, "Latents 1..k replaced", [tuple(range(1, k + 1)) for k in range(1, n + 1)]),
    ):
        baseline(axis, 100 * row_of(level, UNEDITED)["mean"], "unedited")
        for place, kind in enumerate(KINDS):
            draw_series(axis, range(1, n + 1), rows_of(level, [replaced(kind, one) for one in chosen]), kind, place)
        axis.set(xlabel="latent k", title=title, xticks=range(1, n + 1))
    legend(figure, (middle, right))
    top = max(100 * float(table["upper"].max()) for table in (count, level))
    for axis in (left, middle, right):
        axis.set_ylim(-2, min(102, top + 4))
    return {"necessity": figure} | ({"subsets": _subsets_figure(tables, n)} if "shapley" in tables else {})


def _subsets_figure(tables: Mapping[str, pd.DataFrame], n: int) -> Any:
    """Accuracy by subset, latents of the first half against those of the second, and the shares of the loss."""
    level = tables["levels"]
    figure, axes = new_figure(1, 1 + len(ON_ALL_SUBSETS), height=2.7, width_ratios=[1.25, 1.25, 1])
    half = n // 2
    first = [(), *subsets(half)]
    second = [tuple(k + half for k in one) for one in [(), *subsets(n - half)]]
    for axis, kind in zip(axes[0, :-1], ON_ALL_SUBSETS, strict=True):
        values = [[100 * row_of(level, replaced(kind, (*a, *b)))["mean"] for b in second] for a in first]
        labels = [["".join(map(str, one)) or "–" for one in group] for group in (first, second)]
        draw_matrix(axis, np.array(values), labels[0], labels[1], f"Accuracy (%), {kind}", bar=False)
        axis.set(ylabel=f"replaced among 1..{half}", xlabel=f"replaced among {half + 1}..{n}")
        axis.tick_params(labelsize=6.5)
    last = axes[0, -1]
    baseline(last)
    for place, kind in enumerate(ON_ALL_SUBSETS):
        part = tables["shapley"][tables["shapley"]["kind"] == kind]
        draw_series(last, part["latent"].tolist(), part, kind, place, name="value")
    last.set(xlabel="latent", ylabel="points of accuracy", title="Share of the loss", xticks=range(1, n + 1))
    last.legend(loc="best")
    return figure
