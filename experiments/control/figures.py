"""Figures of the control commands: curves against alpha, maps over layers and alphas, norms, cosines, transfer.

Tables in, figures out; what a number means is said in cells.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.figures.heatmap import CORRECTED, FAMILY_WISE, Scale, draw_matrix, frame
from experiments.figures.series import band, baseline, draw_series
from experiments.figures.style import CORRELATION, legend, look, new_figure, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PANELS", "cosine_figure", "curves_figure", "levels_of_mark", "map_figure", "norm_figure", "transfer_figure"]

PANELS: dict[str, tuple[str, float]] = {
    "correct": ("Exact match (%)", 100),
    "choice_correct": ("Restricted choice (%)", 100),
    "kl": ("KL from unsteered (nats)", 1),
    "entropy": ("Entropy (nats)", 1),
    "p_right": ("p(right answer) (%)", 100),
    "p_wrong": ("p(wrong answers) (%)", 100),
    "p_answers": ("Mass on the answers (%)", 100),
    "share_right": ("Right answer's share of it (%)", 100),
}
"""Outcome -> title and factor of a panel of curves."""
MARKS = (
    "○: differs from the unsteered model after correction over all cells (q < {alpha:g}); ●: family-wise "
    "(p < {alpha:g}); frame: also first of its random directions (p ≤ {alpha:g}, not corrected over cells)."
)


def curves_figure(found: pd.DataFrame, methods: Sequence[str], layer: int, level: float, sample: str) -> Figure:
    """Every outcome against alpha at one layer, with intervals and the band of random directions.

    Args:
        found: `cells.effects`.
        methods: one line each; the band is that of the first one's norm.
        layer: which.
        level: of the intervals.
        sample: how many items, in words.
    """
    here = found[found["layer"] == layer]
    shown = [name for name in PANELS if (here["outcome"] == name).any()]
    rows = -(-len(shown) // 4)
    figure, axes = new_figure(rows, 4, 1.75)
    panels: list[Axes] = list(axes.ravel())
    for panel, outcome in zip(panels[: len(shown)], shown, strict=True):
        title, factor = PANELS[outcome]
        part = here[here["outcome"] == outcome]
        _curves(panel, part, methods, factor)
        panel.set_title(title)
        panel.set_xlabel("alpha")
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    legend(figure, panels[: len(shown)])
    note(
        figure,
        f"Layer {layer}. {sample} Points: means; bars: {100 * level:g} % intervals of their paired change from the "
        f"unsteered model (black line). Band: central {100 * level:g} % of single random directions of the norm of the "
        f"{methods[0]} vector at the same |alpha| (one set for both signs).",
    )
    return figure


def _curves(panel: Axes, part: pd.DataFrame, methods: Sequence[str], factor: float) -> None:
    first = part[part["method"] == methods[0]].sort_values("alpha")
    drawn = first.dropna(subset=["random_mean"])
    # at alpha 0 every direction is the unsteered model
    for side in (drawn[drawn["alpha"] < 0], drawn[drawn["alpha"] > 0]):
        if len(side):
            plain = float(side["reference_mean"].iloc[0])
            ends = side[["alpha", "random_lower", "random_upper", "random_mean"]].to_numpy()
            ends = np.vstack([ends, [0.0, plain, plain, plain]])
            ends = ends[np.argsort(ends[:, 0])]
            named = side is not None and side["alpha"].iloc[0] < 0
            band(
                panel, ends[:, 0], factor * ends[:, 1], factor * ends[:, 2], "random directions" if named else None,
                factor * ends[:, 3], "their mean" if named else None,
            )  # fmt: skip
    baseline(panel, factor * float(first["reference_mean"].iloc[0]), "unsteered")
    width = float(np.ptp(part["alpha"])) or 1.0
    for place, method in enumerate(methods):
        own = part[part["method"] == method].sort_values("alpha")
        own = own.assign(**{end: own["reference_mean"] + own[end] for end in ("lower", "upper")})
        step = 0.0 if len(methods) == 1 else 0.006 * width
        draw_series(panel, own["alpha"], own, method, place, scale=factor, step=step, markersize=2.2, capsize=0.8)


def levels_of_mark(table: pd.DataFrame, alpha: float) -> np.ndarray:
    """(row,) level of the mark of each effect."""
    fwer, q = table["fwer_p"].to_numpy(float) < alpha, table["q"].to_numpy(float) < alpha
    return np.where(fwer, FAMILY_WISE, np.where(q, CORRECTED, 0))


def _framed(table: pd.DataFrame, alpha: float) -> np.ndarray:
    """(row,) whether an effect is beyond the baseline and first of its draws, on its own side."""
    rank = np.where(table["difference"] > 0, table["p_above"], table["p_below"])
    return (table["q"].to_numpy(float) < alpha) & (rank <= alpha + 1e-12)


def map_figure(found: pd.DataFrame, method: str, alpha: float, sample: str) -> Figure:
    """Layer × alpha: change of accuracy, change of p(right), KL.

    Args:
        found: `cells.effects`, of several layers.
        method: which.
        alpha: level of the marks.
        sample: how many items, in words.
    """
    figure, axes = new_figure(1, 3, height=1.2 + 0.13 * found["layer"].nunique())
    panels = {"correct": "Change of exact match (points)", "p_right": "Change of p(right) (points)", "kl": "KL (nats)"}
    for panel, (outcome, title) in zip(axes.ravel(), panels.items(), strict=True):
        part = found[(found["outcome"] == outcome) & (found["method"] == method)]
        layers, alphas = sorted(part["layer"].unique()), sorted(part["alpha"].unique())
        place = [(layers.index(a), alphas.index(b)) for a, b in zip(part["layer"], part["alpha"], strict=True)]
        value, marks = np.full((len(layers), len(alphas)), np.nan), np.zeros((len(layers), len(alphas)), int)
        signed = outcome != "kl"
        numbers = 100 * part["difference"] if signed else part["mean"]
        level, framed = levels_of_mark(part, alpha), _framed(part, alpha)
        for (row, column), number, one in zip(place, numbers, level, strict=True):
            value[row, column] = number
            marks[row, column] = one if signed else 0
        names = [f"{a:g}".replace("-", "−") for a in alphas]
        draw_matrix(
            panel, value, [str(layer) for layer in layers], names, title, signed=signed,
            form=".0f" if signed else ".1f", significant=marks if signed else None, upwards=True,
        )  # fmt: skip
        if signed:
            for (row, column), one in zip(place, framed, strict=True):
                if one:
                    frame(panel, row, column, 0.7)
        panel.set_xlabel("alpha")
        panel.set_ylabel("layer")
    note(figure, f"Method {method}. {sample} {MARKS.format(alpha=alpha)}")
    return figure


def norm_figure(table: pd.DataFrame, explained: bool = False) -> Figure:
    """Norm of every vector per layer; with `explained`, also the share that principal components explain.

    Args:
        table: method, layer, norm, explained.
    """
    shown = explained and bool(table["explained"].notna().any())
    figure, axes = new_figure(1, 2 if shown else 1, 2.2)
    for place, (method, own) in enumerate(table.groupby("method", observed=True, sort=False)):
        style = {**look(place), "markersize": 2.5, "linewidth": 1.0}
        axes[0, 0].plot(own["layer"], own["norm"], label=str(method), **style)
        if shown and own["explained"].notna().any():
            axes[0, 1].plot(own["layer"], 100 * own["explained"], label=str(method), **style)
    axes[0, 0].set_title("Norm of the vector")
    axes[0, 0].set_ylim(bottom=0)
    if shown:
        axes[0, 1].set_title("Explained by the first component (%)")
    for panel in axes.ravel():
        panel.set_xlabel("layer (output of block)")
    legend(figure, axes)
    if table["method"].astype(str).str.startswith("pca").any():
        note(figure, "Principal components have the length of the mean that they stand for: their lines coincide.")
    return figure


def cosine_figure(layers: Mapping[str, np.ndarray], methods: pd.DataFrame, first_layer: int) -> Figure:
    """Cosines between the layers of each vector, and between methods at each layer.

    Args:
        layers: method -> (layer, layer) cosines.
        methods: layer, first, second, cosine.
        first_layer: number of the first row.
    """
    pairs = not methods.empty
    number = len(layers) + pairs
    columns = min(3, number)
    figure, axes = new_figure(-(-number // columns), columns, 2.3)
    panels = list(axes.ravel())
    scale = Scale(-1.0, 1.0, CORRELATION)
    for panel, (method, table) in zip(panels[: len(layers)], layers.items(), strict=True):
        names = [str(first_layer + i) for i in range(len(table))]
        draw_matrix(panel, table, names, names, f"{method}: between layers", ".1f", scale=scale, upwards=True)
    if pairs:
        panel = panels[len(layers)]
        for place, ((first, second), own) in enumerate(methods.groupby(["first", "second"], sort=False)):
            style = {**look(place), "markersize": 2.2, "linewidth": 0.9}
            panel.plot(own["layer"], own["cosine"], label=f"{first} – {second}", **style)
        baseline(panel)
        panel.set_ylim(-1.05, 1.05)
        panel.set_title("Between methods")
        panel.set_xlabel("layer")
        panel.legend(fontsize=5.5)
    for panel in panels[number:]:
        panel.set_visible(False)
    return figure


def transfer_figure(table: pd.DataFrame, tasks: Sequence[str], alpha: float, sample: str) -> Figure:
    """Vector of the row's task on the column's items: change of accuracy and of p(right).

    Args:
        table: source, target, outcome and the columns of `cells.effects`.
        tasks: order of rows and columns.
        alpha: level of the marks.
        sample: how many items, in words.
    """
    figure, axes = new_figure(1, 2, height=1.3 + 0.3 * len(tasks))
    titles = {"correct": "Change of exact match (points)", "p_right": "Change of p(right) (points)"}
    short = [task.rsplit("/", 1)[-1].replace("indirect-objects-", "IO-") for task in tasks]
    for panel, (outcome, title) in zip(axes.ravel(), titles.items(), strict=True):
        part = table[table["outcome"] == outcome]
        size = (len(tasks), len(tasks))
        value, marks, frames = np.full(size, np.nan), np.zeros(size, int), []
        for (_, row), level, framed in zip(
            part.iterrows(), levels_of_mark(part, alpha), _framed(part, alpha), strict=True
        ):
            at = tasks.index(row["source"]), tasks.index(row["target"])
            value[at], marks[at] = 100 * row["difference"], level
            if framed:
                frames.append(at)
        draw_matrix(panel, value, short, short, title, "+.1f", signed=True, significant=marks)
        for place in frames:
            frame(panel, *place)
        panel.set_xlabel("steered task")
        panel.set_ylabel("vector from")
    note(figure, f"{sample} {MARKS.format(alpha=alpha)}")
    return figure
