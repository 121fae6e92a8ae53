"""Heat maps of a steering sweep, read from a `View` alone.

    accuracy_heatmap    pair x position: accuracy and its interval in every cell, baseline and controls below
    difference_heatmap  the same as difference from the baseline, corrected significance marked
    pair_grids          A x B grid of the differences, one per position

Blue is better, red worse than the baseline of that position, white equal. Only c > 0 is shown: (A, B, -c) is the same
edit as (B, A, c), so every edit is there. What it does not know: trials, models, how a number was computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.heatmap import (
    CORRECTED,
    FAMILY_WISE,
    Scale,
    colour_bar,
    marks_legend,
    matrix,
)
from experiments.figures.style import WIDTH, Page, number_text, styled
from experiments.sweep.summary import CONTROL_NAMES, number
from experiments.sweep.views import View, pair_name
from lm.terms import PAIR_CONTROLS, PATCH_CONTROLS

__all__ = ["accuracy_heatmap", "difference_heatmap", "pair_grids"]

_ROW, _LABELS, _CELL = 0.19, 1.14, 0.9  # inches: height of a row, width of the row labels, widest cell
_TOP, _GAP = 0.22, 0.14  # inches: above the cells, between pairs and controls


def _points(value: float) -> str:
    """A difference in percentage points."""
    return number_text(100 * value, "+.1f")


def _whole(value: float) -> str:
    return number_text(100 * value, ".0f")


def _with_interval(text: str, low: float, high: float) -> str:
    return f"{text} [{_whole(low)}, {_whole(high)}]"


def _level(cell: Any, alpha: float) -> int:
    """Mark of a cell: its q is that of the gains or of the losses."""
    if cell["fwer_p"] < alpha:
        return FAMILY_WISE
    return CORRECTED if min(cell["gain_q"], cell["loss_q"]) < alpha else 0


def _bar(page: Page, scale: Scale, left: float, top: float, height: float, cells: pd.DataFrame) -> None:
    tall = height > 2
    place = page.axes(left, top, 0.1, height)
    colour_bar(
        page.figure, scale, place=place, values=cells["difference"].to_numpy(), form="+.0f", factor=100,
        ticks=6 if tall else 4,
    )  # fmt: skip
    label = "difference from the baseline, points" if tall else "difference, points"
    page.text(left + 0.42, top + height / 2, label, fontsize=6.0, rotation=90, ha="center", va="center")


# --- Pair x position --------------------------------------------------------------------------------------------------


def _control_rows(view: View, size: float) -> list[tuple[str, str, pd.DataFrame]]:
    """(control, label, rows by latent) of the rows below a heatmap: baseline, controls of this |c|, patches."""
    rows = []
    for control in ("none", *PAIR_CONTROLS, *PATCH_CONTROLS):
        found = view.controls[view.controls["control"] == control]
        if control in PAIR_CONTROLS:
            found = found[np.isclose(found["coefficient"], size)]
        if len(found):
            rows.append((control, CONTROL_NAMES[control], found.set_index("latent")))
    return rows


def _caption(view: View, size: float, differences: bool) -> str:
    shown, c = "difference from the baseline" if differences else "accuracy", number(size)
    text = (
        f"Rows: the edit +{c}·(mean of latent A − mean of latent B), named A−B; −{c}·(A−B) is the row B−A. "
        f"Columns: the latent that is edited. In each cell the {shown} in "
    )
    if differences:
        text += "points, its interval, and marks for corrected significance over all cells of this space and timing "
        text += "(q: false discovery rate, gains and losses apart). "
        text += "Below: baseline accuracy in %; controls: mean difference and range of 95 % of single draws."
    else:
        text += "%, its interval; colour: difference from the baseline of that column. "
        text += "Below: baseline with its interval; controls: mean and range of 95 % of single draws."
    return view.caption(text.replace("95 %", f"{100 * view.settings.level:g} %"))


def _draw_pairs(axes: Axes, view: View, size: float, pairs: list[tuple[int, int]], differences: bool) -> None:
    place = {pair: row for row, pair in enumerate(pairs)}
    column = {latent: at for at, latent in enumerate(view.latents)}
    shape = (len(pairs), len(column))
    values, marks, frames = np.full(shape, np.nan), np.zeros(shape, int), np.zeros(shape, bool)
    texts = [[""] * shape[1] for _ in pairs]
    for cell in view.at(size).to_dict("records"):
        i, j = place[int(cell["source"]), int(cell["target"])], column[int(cell["latent"])]
        values[i, j] = cell["difference"]
        if differences:
            texts[i][j] = _with_interval(_points(cell["difference"]), cell["lower"], cell["upper"])
            marks[i, j], frames[i, j] = _level(cell, view.settings.alpha), cell["verdict"] != "none"
        else:
            low, high = cell["accuracy_lower"], cell["accuracy_upper"]
            texts[i][j] = _with_interval(f"{100 * cell['accuracy']:.1f}", low, high)
    matrix(
        axes, values, [pair_name(*pair) for pair in pairs], [f"latent {latent}" for latent in column], view.scale(size),
        texts=texts, shift=(0.05 if differences else 0.0, 0.0), marks=marks, mark_at=(-0.445, 0.0), mark_size=2.6,
        frames=frames,
    )  # fmt: skip
    axes.xaxis.tick_top()
    axes.tick_params(axis="y", pad=3)
    for i in range(1, len(pairs)):  # a wider line where A changes
        if pairs[i][0] != pairs[i - 1][0]:
            axes.axhline(i - 0.5, color="white", lw=1.8, zorder=2)


def _draw_controls(
    axes: Axes, view: View, scale: Scale, below: list[tuple[str, str, pd.DataFrame]], differences: bool
) -> None:
    latents = view.latents
    values = np.full((len(below), len(latents)), np.nan)
    texts = [[""] * len(latents) for _ in below]
    for i, (control, _, rows) in enumerate(below):
        for j, latent in enumerate(latents):
            if latent not in rows.index:
                continue
            row: Any = rows.loc[latent]
            base = float(view.baseline(latent)["accuracy"])
            values[i, j] = row["accuracy"] - base
            interval = ("accuracy_lower", "accuracy_upper") if control == "none" else ("draw_lower", "draw_upper")
            low, high = float(row[interval[0]]), float(row[interval[1]])
            if differences and control != "none":
                texts[i][j] = _with_interval(_points(values[i, j]), low - base, high - base)
            else:
                texts[i][j] = _with_interval(f"{100 * row['accuracy']:.1f}", low, high)
    matrix(
        axes, values, [label for _, label, _ in below], [""] * len(latents), scale, texts=texts,
        shift=(0.05 if differences else 0.0, 0.0), bold=[i for i, row in enumerate(below) if row[0] == "none"],
    )  # fmt: skip
    axes.set_xticks([])
    axes.tick_params(axis="y", pad=3)


def _heatmap(view: View, size: float, *, differences: bool) -> Figure:
    cells = view.at(size)
    pairs = sorted({(int(a), int(b)) for a, b in zip(cells["source"], cells["target"], strict=True)})
    below = _control_rows(view, size)
    tall = _ROW * (len(pairs) + len(below)) + _GAP
    body = _TOP + max(tall, 1.2) + 0.16 + (0.2 if differences else 0.0)
    what = "Difference from the baseline" if differences else "Accuracy"
    title = f"{what} by pair and edited latent, c = +{number(size)}: {view.title}"
    page = Page(body, title, _caption(view, size, differences))
    width = min(_CELL, (WIDTH - _LABELS - 0.68) / len(view.latents)) * len(view.latents)
    axes = page.axes(_LABELS, _TOP, width, _ROW * len(pairs))
    _draw_pairs(axes, view, size, pairs, differences)
    lower = page.axes(_LABELS, _TOP + _ROW * len(pairs) + _GAP, width, _ROW * len(below))
    _draw_controls(lower, view, view.scale(size), below, differences)
    page.text(_LABELS - 0.05, 0.2, "pair A−B", ha="right", va="bottom", fontsize=6.5)
    _bar(page, view.scale(size), _LABELS + width + 0.12, _TOP, max(tall, 1.2), cells)
    if differences:
        page.legend(marks_legend(view.settings.alpha), _TOP + max(tall, 1.2) + 0.1, 3)
    return page.figure


@styled
def accuracy_heatmap(view: View, size: float) -> Figure:
    """Pair x position: accuracy with interval at c = +size; baseline and controls in rows of their own below."""
    return _heatmap(view, size, differences=False)


@styled
def difference_heatmap(view: View, size: float) -> Figure:
    """Pair x position: difference from the baseline with interval at c = +size, corrected significance marked."""
    return _heatmap(view, size, differences=True)


# --- A x B ------------------------------------------------------------------------------------------------------------


def _draw_grid(axes: Axes, view: View, scale: Scale, cells: pd.DataFrame, labels: list[int]) -> None:
    place = {label: number for number, label in enumerate(labels)}
    written = _points if len(labels) <= 6 else _whole  # without decimals where cells are narrow
    shape = (len(labels), len(labels))
    values, marks, frames = np.full(shape, np.nan), np.zeros(shape, int), np.zeros(shape, bool)
    texts = [[""] * len(labels) for _ in labels]
    for cell in cells.to_dict("records"):
        i, j = place[cell["source"]], place[cell["target"]]
        values[i, j], texts[i][j] = cell["difference"], written(cell["difference"])
        marks[i, j], frames[i, j] = _level(cell, view.settings.alpha), cell["verdict"] != "none"
    matrix(
        axes, values, labels, labels, scale, texts=texts, shift=(0.0, 0.08), marks=marks, mark_at=(0.33, -0.33),
        mark_size=2.0, frames=frames, aspect="equal",
    )  # fmt: skip


@styled
def pair_grids(view: View, size: float) -> Figure:
    """A x B grid of differences at c = +size, one panel per position."""
    cells = view.at(size)
    labels = sorted({int(label) for label in (*cells["source"], *cells["target"])})
    latents = view.latents
    columns = min(3, len(latents))
    rows = -(-len(latents) // columns)
    side, across, down = 1.8, 2.12, 2.16
    caption = view.caption(
        f"One grid per edited latent; row A is the mean that is added, column B the mean that is subtracted, "
        f"c = +{number(size)}. Numbers: difference from the baseline of that latent in points.",
        intervals=False,
    )
    page = Page(rows * down + 0.44, f"A × B at each edited latent, c = +{number(size)}: {view.title}", caption)
    for panel, latent in enumerate(latents):
        left, top = 0.38 + across * (panel % columns), 0.18 + down * (panel // columns)
        axes = page.axes(left, top, side, side)
        _draw_grid(axes, view, view.scale(size), cells[cells["latent"] == latent], labels)
        base = 100 * float(view.baseline(latent)["accuracy"])
        axes.set_title(f"latent {latent} (baseline {base:.1f} %)", pad=3)
        if panel % columns == 0:
            axes.set_ylabel("A (added)", labelpad=2)
        if panel + columns >= len(latents):
            axes.set_xlabel("B (subtracted)", labelpad=2)
    right = 0.38 + across * (columns - 1) + side + 0.1
    _bar(page, view.scale(size), right, 0.18, side + down * (rows - 1), cells)
    page.legend(marks_legend(view.settings.alpha), rows * down + 0.25, 3)
    return page.figure
