"""Curves, ranks, shares and points of a steering sweep, read from a `View` alone.

    coefficient_curves  effect against coefficient, with the band of single random directions
    rank_figure         do the same pairs come out best at every position?
    marginal_figure     mean effect of A and of B, over all positions and at each
    variance_figure     what the effects depend on: pair, position, both, or which prompts were drawn
    sign_figure         effect at +c against effect at -c

What it does not know: trials, models, how a number was computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from experiments.figures.heatmap import Scale, matrix, numbers
from experiments.figures.series import DASHES, band, baseline, in_points, spread
from experiments.figures.style import (
    BAND,
    BASELINE,
    CONTROL,
    CORRELATION,
    FAINT,
    HIGHLIGHT,
    MARKERS,
    SERIES,
    SMALL,
    WIDTH,
    Page,
    look,
    ordered,
    styled,
)
from experiments.sweep.summary import number
from experiments.sweep.views import View, pair_name

__all__ = ["coefficient_curves", "marginal_figure", "rank_figure", "sign_figure", "variance_figure"]

# of the shares of variance; noise is grey, as all that comes by chance
_TERMS = {"pair": SERIES[0], "position": SERIES[4], "interaction": SERIES[2], "noise": BAND}

# --- Against the coefficient ------------------------------------------------------------------------------------------


def _notable_pairs(cells: pd.DataFrame, best: int = 3, worst: int = 2) -> list[tuple[int, int]]:
    """Unordered pairs with the highest and the lowest single differences."""
    grouped = cells.groupby(["source", "target"])["difference"]
    ranked = [*grouped.max().sort_values(ascending=False, kind="stable").index[:best]]
    ranked += [pair for pair in grouped.min().sort_values(kind="stable").index if pair not in ranked][:worst]
    return [(int(a), int(b)) for a, b in ranked]


def _with_zero(curve: pd.DataFrame) -> pd.DataFrame:
    """The curve with the baseline at c = 0 in it."""
    zero = pd.DataFrame({"coefficient": [0.0], "difference": [0.0], "lower": [0.0], "upper": [0.0]})
    columns = list(zero.columns)
    return pd.concat([curve[columns], zero], ignore_index=True).sort_values("coefficient", ignore_index=True)


def _thin_ticks(axes: Axes, ticks: list[float]) -> None:
    """Keeps only tick labels that stand apart, zero first, then the largest coefficients."""
    span = max(ticks) - min(ticks) or 1.0
    kept: list[float] = []
    for tick in [0.0, *sorted(ticks, key=lambda value: (-abs(value), value))]:
        if all(abs(tick - other) > span / 9 for other in kept):
            kept.append(tick)
    axes.set_xticks(sorted(kept))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _random_band(axes: Axes, view: View, latent: int) -> None:
    """Where single random directions lie at this latent, mirrored: their sign means nothing."""
    base = float(view.baseline(latent)["accuracy"])
    random = view.controls[(view.controls["control"] == "random") & (view.controls["latent"] == latent)]
    random = random[random["coefficient"].isin(view.sizes)].sort_values("coefficient")
    if random.empty:
        return
    sizes = random["coefficient"].to_numpy()
    sides = []
    for column in ("draw_lower", "draw_upper", "accuracy"):
        values = random[column].to_numpy() - base
        sides.append(np.concatenate([values[::-1], [0.0], values]))
    x = np.concatenate([-sizes[::-1], [0.0], sizes])
    lower, upper, middle = (side.tolist() for side in sides)
    band(axes, x.tolist(), lower, upper, mean=middle)


def _draw_curves(axes: Axes, view: View, cells: pd.DataFrame, chosen: list[tuple[int, int]]) -> None:
    """The pairs at one latent: the chosen ones with intervals, the others thin, their mean black."""
    baseline(axes, linewidth=0.6)
    for pair, rows in cells.groupby(["source", "target"]):
        if tuple(pair) not in chosen:
            curve = _with_zero(rows)
            axes.plot(curve["coefficient"], curve["difference"], color=FAINT, lw=0.45, alpha=0.7, zorder=2)
    mean = _with_zero(cells.groupby("coefficient", as_index=False)[["difference", "lower", "upper"]].mean())
    axes.plot(mean["coefficient"], mean["difference"], color=BASELINE, lw=1.6, zorder=5)
    for place, pair in enumerate(chosen):
        curve = _with_zero(cells[(cells["source"] == pair[0]) & (cells["target"] == pair[1])])
        axes.errorbar(
            curve["coefficient"] + 0.012 * (place - 2) * max(view.sizes), curve["difference"],
            yerr=spread(curve, "difference"), ms=2.8, lw=0.9, elinewidth=0.5, zorder=4, **look(place),
        )  # fmt: skip
    _thin_ticks(axes, [float(value) for value in sorted({0.0, *cells["coefficient"]})])


@styled
def coefficient_curves(view: View) -> Figure:
    """Difference against signed coefficient for every pair A < B, one panel per position, random band behind."""
    cells = view.cells[~view.cells["mirrored"].astype(bool)]
    latents = view.latents
    columns = 3
    rows = -(-len(latents) // columns)
    chosen = _notable_pairs(cells)
    pairs = len(cells[["source", "target"]].drop_duplicates())
    caption = view.caption(
        f"Difference from the baseline in points against the coefficient of A−B (A < B; c < 0 is B−A). Thin lines: "
        f"all {pairs} pairs; coloured, with intervals: the pairs with the highest and lowest single cells; black: mean "
        f"over the pairs. Band: {100 * view.settings.level:g} % of single random directions over all pairs; dashed: "
        f"their mean."
    )
    page = Page(rows * 1.98 + 0.4, f"Effect against coefficient: {view.title}", caption)
    limits: tuple[float, float] = (0.0, 0.0)
    drawn = list(page.panels(len(latents), columns, 1.5, down=1.98))
    for latent, axes in zip(latents, drawn, strict=True):
        _random_band(axes, view, latent)
        _draw_curves(axes, view, cells[cells["latent"] == latent], chosen)
        axes.set_title(f"latent {latent} (baseline {100 * float(view.baseline(latent)['accuracy']):.1f} %)", pad=3)
        low, high = axes.get_ylim()
        limits = (min(limits[0], low), max(limits[1], high))
    for panel, axes in enumerate(drawn):
        axes.set_ylim(*limits)
        in_points(axes.yaxis)
        if panel % columns == 0:
            axes.set_ylabel("difference, points", labelpad=2)
        else:
            axes.set_yticklabels([])
        if panel + columns >= len(latents):
            axes.set_xlabel("coefficient c of A−B", labelpad=2)
    handles: list[Any] = [
        Line2D([], [], ms=3.2, lw=0.9, label=pair_name(*pair), **look(place)) for place, pair in enumerate(chosen)
    ]
    handles += [Line2D([], [], color=BASELINE, lw=1.6, label="mean of pairs")]
    if pairs > len(chosen):
        handles += [Line2D([], [], color=FAINT, lw=0.6, label="other pairs")]
    if "random" in set(view.controls["control"]):
        handles += [Line2D([], [], color=CONTROL, lw=0.9, ls=DASHES, label="random, mean")]
        handles += [Patch(fc=BAND, label="random, single draws")]
    page.legend(handles, rows * 1.98 + 0.1, min(9, len(handles)))
    return page.figure


# --- The same pairs at every position? --------------------------------------------------------------------------------


def _correlations(axes: Axes, view: View, size: float) -> None:
    """Matrix of correlations between positions at one |c|, and what it amounts to as a title."""
    table = view.correlations[view.correlations["coefficient"] == size]
    wide = table.pivot(index="latent_a", columns="latent_b", values="spearman")
    values = wide.to_numpy(copy=True)
    np.fill_diagonal(values, np.nan)
    matrix(axes, values, list(wide.index), list(wide.columns), Scale(-1, 1, CORRELATION), texts=numbers(values))
    summary = view.consistency[view.consistency["coefficient"] == size].iloc[0]
    title = f"c = ±{number(size)}"
    if pd.notna(summary["kendall_w"]):
        p = "p < 0.001" if summary["p"] < 0.001 else f"p = {summary['p']:.3f}"
        title += f":  W = {summary['kendall_w']:.2f}, {p}"
    axes.set_title(title, pad=3)
    axes.set_xlabel("edited latent", labelpad=1)


def _rank_lines(axes: Axes, view: View, size: float) -> None:
    wide = view.at(size).pivot(index=["source", "target"], columns="latent", values="difference").dropna()
    ranks = wide.rank(ascending=False, axis=0)
    order = ranks.mean(axis=1).sort_values(kind="stable").index
    chosen = [*order[:3], *[pair for pair in order[-2:] if pair not in order[:3]]]
    for pair in order:
        if pair not in chosen:
            axes.plot(ranks.columns, ranks.loc[pair], color=FAINT, lw=0.4, alpha=0.6)
    for place, pair in enumerate(chosen):
        axes.plot(ranks.columns, ranks.loc[pair], label=pair_name(*pair), ms=2.6, lw=1.1, **look(place))
    axes.invert_yaxis()
    axes.set_xticks(list(ranks.columns))
    axes.set_yticks(sorted({1, len(ranks) // 3, 2 * len(ranks) // 3, len(ranks)} - {0}))
    axes.set_xlabel("edited latent", labelpad=1)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=5, fontsize=SMALL, handlelength=0.9, handletextpad=0.25,
        columnspacing=0.55, borderpad=0.1,
    )  # fmt: skip


@styled
def rank_figure(view: View) -> Figure | None:
    """Spearman correlation of the pairs' order between positions, and the ranks themselves, for each |c|."""
    sizes = [size for size in view.sizes if (view.correlations["coefficient"] == size).any()]
    if not sizes or len(view.latents) < 2:
        return None
    columns, down = 3, 4.0
    rows = -(-len(sizes) // columns)
    pairs = int(view.correlations["n_pairs"].max())
    caption = view.caption(
        f"Upper: Spearman correlation, between two edited latents, of the order of the {pairs} ordered pairs by their "
        "difference from the baseline. W: Kendall's coefficient of concordance over all positions (1: the same order "
        "everywhere), p by relabelling the latents that name a pair independently at each position. Lower: rank of "
        "each pair (1: highest accuracy); coloured: the pairs with the three best and two worst mean ranks.",
        controls=False,
        intervals=False,
    )
    page = Page(rows * down, f"Do the same pairs work at every position? {view.title}", caption)
    upper = page.panels(len(sizes), columns, 1.62, left=0.5, gap=0.42, top=0.2, down=down)
    lower = page.panels(len(sizes), columns, 1.3, left=0.5, gap=0.42, top=2.32, down=down)
    for panel, (size, above, below) in enumerate(zip(sizes, upper, lower, strict=True)):
        _correlations(above, view, size)
        _rank_lines(below, view, size)
        if panel % columns == 0:
            above.set_ylabel("edited latent", labelpad=2)
            below.set_ylabel("rank of the pair", labelpad=2)
    return page.figure


# --- What the effect depends on ---------------------------------------------------------------------------------------


def _draw_marginal(axes: Axes, table: pd.DataFrame, latents: list[int]) -> None:
    """Effects by label: over all positions (black), and at each latent."""
    labels = sorted(table["label"].unique())
    baseline(axes, linewidth=0.6)
    colours = ordered(len(latents))
    for place, latent in enumerate(latents):
        some = table[table["latent"] == latent].set_index("label").reindex(labels)
        offset = -0.2 + 0.56 * (place + 0.5) / len(latents)
        axes.errorbar(
            np.arange(len(labels)) + offset, some["difference"], yerr=spread(some, "difference"), ls="none",
            color=colours[place], marker=MARKERS[place % len(MARKERS)], ms=2.6, elinewidth=0.5,
        )  # fmt: skip
    overall = table[table["latent"] == 0].set_index("label").reindex(labels)
    axes.errorbar(
        np.arange(len(labels)) - 0.3, overall["difference"], yerr=spread(overall, "difference"), ls="none",
        color=BASELINE, marker="_", ms=7, mew=1.6, elinewidth=1.2,
    )  # fmt: skip
    axes.set_xticks(range(len(labels)), [str(label) for label in labels])
    axes.set_xlim(-0.6, len(labels) - 0.4)


def _latent_handles(latents: list[int]) -> list[Any]:
    colours = ordered(len(latents))
    return [
        Line2D(
            [], [], color=colours[at], marker=MARKERS[at % len(MARKERS)], ms=3.5, ls="none", label=f"latent {latent}"
        )
        for at, latent in enumerate(latents)
    ]


@styled
def marginal_figure(view: View) -> Figure | None:
    """Mean difference over the pairs that share A (left) or B (right), over all positions and at each."""
    sizes = [size for size in view.sizes if (view.marginals["coefficient"] == size).any()]
    if not sizes:
        return None
    down = 1.72
    caption = view.caption(
        "Mean difference from the baseline in points over the pairs that share the added latent A (left) or the "
        "subtracted latent B (right). Black: mean over all positions with its interval; coloured: at each edited "
        "latent. The effect of A at −c is the effect of B at +c.",
        controls=False,
    )
    page = Page(len(sizes) * down + 0.4, f"Marginal effects of A and of B: {view.title}", caption)
    panels = list(page.panels(2 * len(sizes), 2, 1.22, top=0.22, down=down))
    for row, size in enumerate(sizes):
        here = view.marginals[view.marginals["coefficient"] == size]
        low = high = 0.0
        pair_of = panels[2 * row : 2 * row + 2]
        for axes, role in zip(pair_of, ("A", "B"), strict=True):
            _draw_marginal(axes, here[here["role"] == role], view.latents)
            axes.set_title(f"c = +{number(size)}", pad=2, loc="left")
            if row == len(sizes) - 1:
                what = "A, the latent that is added" if role == "A" else "B, the latent that is subtracted"
                axes.set_xlabel(what, labelpad=2)
            limits = axes.get_ylim()
            low, high = min(low, limits[0]), max(high, limits[1])
        for place, axes in enumerate(pair_of):
            axes.set_ylim(low, high)
            in_points(axes.yaxis)
            if place == 0:
                axes.set_ylabel("difference, points", labelpad=2)
            else:
                axes.set_yticklabels([])
    whole = Line2D([], [], color=BASELINE, marker="_", ms=7, mew=1.6, ls="none", label="all positions")
    handles = [whole, *_latent_handles(view.latents)]
    page.legend(handles, len(sizes) * down + 0.12, len(handles))
    return page.figure


@styled
def variance_figure(view: View) -> Figure | None:
    """Shares of the variance of the differences: pair, position, their combination, noise from the prompts drawn."""
    sizes = sorted(view.variance["coefficient"].unique())
    if not sizes:
        return None
    step = 0.34
    first = view.variance.iloc[0]
    caption = view.caption(
        f"Two-way sums of squares of the differences of {first['n_pairs']} ordered pairs at {first['n_positions']} "
        "positions. Noise: what resampling the clusters alone would give, taken off the other three terms. "
        "sd: standard deviation of the differences over the cells.",
        controls=False,
        intervals=False,
    )
    page = Page(step * len(sizes) + 0.85, f"What the effect depends on: {view.title}", caption)
    axes = page.axes(0.72, 0.06, WIDTH - 0.72 - 1.15, step * len(sizes))
    for row, size in enumerate(sizes):
        table = view.variance[view.variance["coefficient"] == size].set_index("term")
        start = 0.0
        for term, colour in _TERMS.items():
            share = float(table.loc[term, "share"])
            axes.barh(row, share, left=start, height=0.62, color=colour, ec="white", lw=0.5)
            if share >= 0.045:
                ink = "white" if term in ("pair", "interaction") else "black"
                axes.text(start + share / 2, row, f"{100 * share:.0f} %", ha="center", va="center", color=ink)
            start += share
        sd = 100 * float(table["sd"].iloc[0])
        words = f"sd {sd:.1f} points" if start > 0 else "no cell differs"
        axes.text(1.015 if start > 0 else 0.015, row, words, va="center", ha="left")
    axes.set_yticks(range(len(sizes)), [f"c = ±{number(size)}" for size in sizes])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    axes.set_xlabel("share of the variance of the effects, %", labelpad=2)
    handles = [Patch(fc=colour, label=term) for term, colour in _TERMS.items()]
    handles[2].set_label("pair × position")
    handles[3].set_label("noise (prompts drawn)")
    page.legend(handles, step * len(sizes) + 0.52, 4)
    return page.figure


# --- Both signs -------------------------------------------------------------------------------------------------------


def _draw_signs(axes: Axes, here: pd.DataFrame, latents: list[int]) -> None:
    values = here[["plus", "minus"]].to_numpy()
    margin = 0.08 * max(0.04, float(np.ptp(np.append(values, 0.0))))
    low, high = min(0.0, float(values.min())) - margin, max(0.0, float(values.max())) + margin
    axes.add_patch(Rectangle((0, 0), high, high, fc=HIGHLIGHT, ec="none", zorder=0))
    baseline(axes, linewidth=0.5)
    axes.axvline(0, color=BASELINE, lw=0.5)
    axes.plot([low, high], [low, high], color=FAINT, lw=0.5, ls=":")
    colours = ordered(len(latents))
    for place, latent in enumerate(latents):
        some = here[here["latent"] == latent]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(some["plus"], some["minus"], marker, color=colours[place], ms=3.2, mec=CONTROL, mew=0.25)
    won = here[(here["plus_verdict"] == "improvement") | (here["minus_verdict"] == "improvement")]
    axes.plot(won["plus"], won["minus"], "o", ms=6.5, mfc="none", mec=BASELINE, mew=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    in_points(axes.xaxis)
    in_points(axes.yaxis)
    axes.set_xlabel("difference at +c, points", labelpad=1)


@styled
def sign_figure(view: View) -> Figure | None:
    """Difference at +c against difference at -c, a point per pair A < B and position."""
    table = view.symmetry
    sizes = sorted(table["coefficient"].unique()) if len(table) else []
    if not sizes:
        return None
    columns, height = 3, 2.05
    rows, down = -(-len(sizes) // columns), height + 0.5
    both = int(table["both_improve"].sum())
    caption = view.caption(
        "A point per pair A < B and edited latent: difference from the baseline in points at +c (across) and at −c "
        "(up). Shaded: both signs above the baseline; its number of points is given. Ringed: an improvement at one "
        f"sign at least, beyond baseline and random directions after correction; at both signs: {both or 'none'}.",
        controls=False,
        intervals=False,
    )
    page = Page(rows * down + 0.26, f"Does a pair help with both signs? {view.title}", caption)
    panels = page.panels(len(sizes), columns, height, down=down)
    for panel, (size, axes) in enumerate(zip(sizes, panels, strict=True)):
        here = table[table["coefficient"] == size]
        _draw_signs(axes, here, view.latents)
        axes.set_title(f"c = ±{number(size)}: both above in {int(here['both_above'].sum())} of {len(here)}", pad=3)
        if panel % columns == 0:
            axes.set_ylabel("difference at −c, points", labelpad=2)
    handles = _latent_handles(view.latents)
    handles.append(Line2D([], [], marker="o", ms=6, mfc="none", mec=BASELINE, mew=0.8, ls="none", label="improvement"))
    page.legend(handles, rows * down + 0.02, len(handles))
    return page.figure
