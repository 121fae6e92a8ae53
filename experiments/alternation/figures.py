"""Figures of the alternation test: every measure by latent, and where the latents lie and look.

Even latents are blue discs, odd ones red squares; the linear trend beside which they are compared is grey.

Knows nothing about models or how a number was computed; what a measure is called stands with the measure.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.alternation.hypothesis import MEASURES, POOLED, TUNED_MEASURES, Measure
from experiments.alternation.measures import Observations
from experiments.alternation.verdict import Result
from experiments.figures.heatmap import Scale, colour_bar, matrix, numbers
from experiments.figures.series import draw_points, spread
from experiments.figures.style import FAINT, SERIES, SMALL, legend, new_figure, note, sample_text, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_states"]

EVEN: dict[str, Any] = {"color": SERIES[0], "marker": "o", "markerfacecolor": SERIES[0]}
ODD: dict[str, Any] = {"color": SERIES[1], "marker": "s", "markerfacecolor": "white"}
"""Shapes differ too."""


@styled
def draw(result: Result) -> Figure:
    """One panel per measure: mean at every latent with its interval, even and odd apart, the verdict above it."""
    labels = {measure.name: measure for measure in (*MEASURES, *TUNED_MEASURES, POOLED)}
    names = list(result.tests["measure"])
    columns = 3
    rows = -(-len(names) // columns)
    figure, axes = new_figure(rows, columns, total=1.75 * rows + 0.6)
    tests = result.tests.set_index("measure")
    for ax, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            ax.set_axis_off()
            continue
        _panel(ax, labels[name], result.levels[result.levels["measure"] == name], tests.loc[name])
    for ax in axes[-1]:
        ax.set_xlabel("latent")
    legend(figure, axes)
    level = f"{100 * result.settings.level:g} %"
    note(
        figure,
        f"{result.task.capitalize()}. Mean at each latent with its {level} interval over clusters; the answer of the "
        f"rule stands above each panel. {sample_text(tests.drop(index=POOLED.name))}",
    )
    return figure


def _panel(ax: Axes, measure: Measure, levels: pd.DataFrame, test: pd.Series) -> None:
    ax.set_title(measure.label, pad=11, fontweight="bold")
    higher = "even" if measure.predicted > 0 else "odd"
    ax.text(
        0.5, 1.03, f"predicted: {higher}. {test['answer']}", transform=ax.transAxes, ha="center", va="bottom",
        fontsize=SMALL,
    )  # fmt: skip
    ax.set_ylabel(measure.unit, fontsize=6.5)
    if levels.empty:
        ax.text(0.5, 0.5, "not observed", transform=ax.transAxes, ha="center", va="center", color=FAINT)
        ax.set_xticks([])
        ax.set_yticks([])
        return
    latents, means = levels["latent"].to_numpy(), levels["mean"].to_numpy()
    ax.plot(latents, means, color=FAINT, linewidth=0.8, zorder=1)
    slope, start = np.polyfit(latents, means, 1)
    ax.plot(latents, start + slope * latents, color=FAINT, linewidth=0.8, linestyle=":", zorder=1, label="linear trend")
    for parity, look, label in ((0, EVEN, "even latents"), (1, ODD, "odd latents")):
        mine = levels[levels["latent"] % 2 == parity]
        draw_points(ax, mine["latent"].tolist(), mine["mean"].tolist(), label, parity, up=spread(mine), **look)
    ax.set_xticks(latents)
    ax.margins(x=0.08, y=0.12)


@styled
def draw_states(observations: Observations, seed: int = 0, shown: int = 60) -> Figure:
    """Latents in the plane of the first two components, and attention among latents, as one figure."""
    points = observations.places
    n = observations.n_latents
    figure, axes = new_figure(1, 2, total=3.2, width_ratios=(1, 1.15))
    left, right = axes[0]
    rows = np.random.default_rng(seed).permutation(len(points))[:shown]
    for k in range(n):
        look = ODD if k % 2 == 0 else EVEN
        face = "none" if k % 2 == 0 else look["color"]
        left.scatter(
            *points[rows, k].T, s=7, marker=look["marker"], edgecolors=look["color"], facecolors=face, alpha=0.35,
            linewidths=0.6,
        )  # fmt: skip
    centres = points.mean(0)
    left.plot(*centres.T, color=FAINT, linewidth=0.8, zorder=3)
    for k, centre in enumerate(centres, start=1):
        colour = (ODD if k % 2 else EVEN)["color"]
        left.annotate(
            str(k), centre, ha="center", va="center", fontsize=7, fontweight="bold", zorder=4, color=colour,
            bbox={"boxstyle": "circle,pad=0.2", "fc": "white", "ec": colour, "lw": 0.8},
        )  # fmt: skip
    left.set_xlabel("first component of h (SD)")
    left.set_ylabel("second component of h (SD)")
    left.set_title(f"h_1..h_{n}: even (blue, discs) and odd (red, squares)")
    caption = (
        f"Left: latents of {len(rows)} of {len(points):,} prompts in the plane of the first two principal components, "
        "numbered: their means over all prompts."
    )
    if observations.attention is None:
        right.set_axis_off()
    else:
        _attention(figure, right, observations.attention.mean(0))
        caption += " Right: attention of each latent and of the end of thought, mean over prompts, layers and heads."
    note(figure, caption)
    return figure


def _attention(figure: Figure, axes: Axes, mass: np.ndarray) -> None:
    """How much each latent and the end of thought attend to numbers, to the rest of the prompt and to each latent."""
    latents = [*map(str, range(1, len(mass)))]
    seen = np.where(np.arange(mass.shape[1])[None] - 2 > np.arange(len(mass))[:, None], np.nan, mass)
    scale = Scale.magnitude(np.delete(seen, 1, axis=1))  # the rest of the prompt takes most of the mass
    keys = ["num-\nbers", "rest of\nprompt", *latents]
    matrix(axes, seen, [*latents, "end"], keys, scale, texts=numbers(seen, bare=True))
    axes.set_xlabel("attends to")
    axes.set_ylabel("latent, end of thought")
    axes.set_title("attention mass")
    colour_bar(figure, scale, "share of the attention", of=axes, values=seen)
