"""Figures of a steering sweep, read from the tables of `stats.analyse` alone.

What it does: for each space, part and timing, and where it says so for each |c|
    accuracy-c*       pair x position heatmap: accuracy and its interval in every cell, baseline and controls below
    difference-c*     the same as difference from the baseline, corrected significance marked
    grids-c*          A x B grid of the differences, one per position
    coefficients      effect against coefficient, with the band of single random directions
    rank-consistency  do the same pairs come out best at every position?
    marginals         mean effect of A and of B, over all positions and at each
    variance          what the effects depend on: pair, position, both, or which prompts were drawn
    signs             effect at +c against effect at -c

What it does not know: trials, models, how a number was computed (`stats.py`).

How to run: `codi plot RUN` draws every figure of a run folder, PNG and PDF, into RUN/figures. Heatmaps show coefficients c > 0 only: (A, B, -c) is the same edit as (B, A, c), so every edit is there.

Colours: blue better, red worse than the baseline of that position, white equal (ColorBrewer RdBu, safe for colour-blind
readers); lines are the Okabe-Ito colours with a marker each. Widths are those of a page (7.2 inches), text is 6 points
or more.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.statistics.clusters import Settings
from experiments.study.folder import RunFolder
from experiments.sweep.analysis import Analysis, analyse
from experiments.sweep.pairing import FAMILY
from experiments.sweep.recompute import Overrides, load_trials, settings_of
from experiments.sweep.summary import CONTROL_NAMES, family_name, number
from lm.terms import PAIR_CONTROLS, PATCH_CONTROLS

__all__ = ["FORMATS", "PlotConfig", "View", "draw", "figures", "main", "render", "views"]

FORMATS = ("png", "pdf")
DPI = 200
WIDTH = 7.2  # inches, a page

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.0,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "pdf.fonttype": 42,
}
P = ParamSpec("P")
T = TypeVar("T")
SMALL = 6.0  # points; the smallest text of any figure

_DIVERGING = matplotlib.colormaps["RdBu"]
# Okabe and Ito 2008: distinct for colour-blind readers; each with a marker of its own
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#8a8a8a"
_TERMS = {"pair": "#0072B2", "position": "#E69F00", "interaction": "#009E73", "noise": "#c8c8c8"}


@dataclass(frozen=True)
class View:
    """What the figures of one (space, part, timing) are drawn from."""

    space: str
    part: str
    timing: str
    cells: pd.DataFrame  # both names of every edit
    controls: pd.DataFrame
    marginals: pd.DataFrame
    correlations: pd.DataFrame
    consistency: pd.DataFrame
    variance: pd.DataFrame
    symmetry: pd.DataFrame
    settings: Settings
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return family_name(self.space, self.part, self.timing)

    @property
    def slug(self) -> str:
        return f"{self.space}-{self.part}-{self.timing}"

    @property
    def sizes(self) -> list[float]:
        """|c| of the run, ascending."""
        return sorted(self.cells["coefficient"].abs().unique())

    @property
    def latents(self) -> list[int]:
        return sorted(int(latent) for latent in self.cells["latent"].unique())

    @property
    def limit(self) -> float:
        """Half the range of the diverging colours: the 98th percentile of |difference|, at least 10 points."""
        return max(0.1, float(np.ceil(20 * self.cells["difference"].abs().quantile(0.98)) / 20))

    def at(self, size: float) -> pd.DataFrame:
        """Ordered pairs at c = +size."""
        return self.cells[self.cells["coefficient"] == size]

    def baseline(self, latent: int) -> pd.Series:
        rows = self.controls[(self.controls["control"] == "none") & (self.controls["latent"] == latent)]
        return rows.iloc[0]

    def caption(self, text: str, *, controls: bool = True, intervals: bool = True) -> str:
        base = self.controls[self.controls["control"] == "none"]
        level = f"{100 * self.settings.level:g} %"
        who = f"{int(base['n'].max())} prompts in {int(base['n_clusters'].max())} clusters."
        how = f"Intervals: {level} bootstrap over clusters." if intervals else ""
        draws = self.controls[self.controls["control"] == "random"]
        what = ""
        if controls and len(draws):
            per_pair = int(self.cells["random_draws"].max())
            what = f"Random control: {per_pair} Gaussian directions of equal norm per pair, position and |c|."
        elif controls:
            what = "No random directions were run."
        when = {
            "early-exit": "Early exit: the baseline at latent k is the unsteered answer after k latents.",
            "continue": "Continue: later latents are computed on the edited past.",
            "cached": "Cached: the edit is made after all latents.",
        }.get(self.timing, "")
        return " ".join(part for part in (text, who, how, what, when, *self.notes) if part)


def _styled(function: Callable[P, T]) -> Callable[P, T]:
    """Draws in this module's style and leaves the settings of the process as they were."""

    @functools.wraps(function)
    def styled(*arguments: P.args, **options: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return function(*arguments, **options)

    return styled


def views(analysis: Analysis, notes: Sequence[str] = ()) -> list[View]:
    """One `View` per (space, part, timing) that has direction cells."""
    found: list[View] = []
    if analysis.cells.empty:
        return found
    names = ("cells", "controls", "marginals", "correlations", "consistency", "variance", "symmetry")
    for space, part, timing in analysis.cells[list(FAMILY)].drop_duplicates().itertuples(index=False):
        tables: dict[str, Any] = {}
        for name in names:
            table: pd.DataFrame = getattr(analysis, name)
            here = (table["space"] == space) & (table["part"] == part) & (table["timing"] == timing)
            tables[name] = table[here].reset_index(drop=True)
        found.append(View(space, part, timing, **tables, settings=analysis.settings, notes=tuple(notes)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A page: title above, caption below, axes placed in inches in between
# ---------------------------------------------------------------------------------------------------------------------


class _Page:
    """A figure of page width; `axes` places axes in inches from the upper left corner of the body."""

    def __init__(self, body: float, title: str, caption: str) -> None:
        lines = textwrap.wrap(caption, 152)
        self.top, self.bottom = 0.36, 0.12 + 0.118 * len(lines)
        self.height = self.top + body + self.bottom
        self.figure = Figure(figsize=(WIDTH, self.height))
        self.figure.text(0.1 / WIDTH, 1 - 0.1 / self.height, title, fontsize=8.5, weight="bold", va="top")
        self.figure.text(
            0.1 / WIDTH,
            0.07 / self.height,
            "\n".join(lines),
            fontsize=SMALL,
            color="#333333",
            va="bottom",
            linespacing=1.3,
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        lower = self.height - self.top - top - height
        return self.figure.add_axes((left / WIDTH, lower / self.height, width / WIDTH, height / self.height))

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        self.figure.text(left / WIDTH, 1 - (self.top + top) / self.height, text, **style)

    def legend(self, handles: Sequence[Any], top: float, columns: int) -> None:
        self.figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 1 - (self.top + top) / self.height),
            ncol=columns,
            frameon=False,
            handletextpad=0.5,
            columnspacing=1.4,
            borderpad=0.0,
        )


def _points(value: float) -> str:
    """A difference in percentage points, signed, with a real minus sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _whole(value: float) -> str:
    return f"{100 * value:.0f}".replace("-0", "0") if abs(value) < 0.005 else f"{100 * value:.0f}".replace("-", "−")


def _ink(value: float, limit: float) -> str:
    """Black or white, whichever can be read on the colour of this difference."""
    red, green, blue, _ = _DIVERGING(Normalize(-limit, limit, clip=True)(value))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _in_points(axis: Any) -> None:
    """Ticks of a fraction in percentage points."""
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+g}".replace("-", "−").replace("+0", "0")))


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _pair(source: int, target: int) -> str:
    return f"{source}−{target}"


def _colour_bar(page: _Page, view: View, left: float, top: float, height: float, cells: pd.DataFrame) -> None:
    axes = page.axes(left, top, 0.1, height)
    values = cells["difference"]
    beyond = ["neither", "min", "max", "both"][
        int((values < -view.limit - 1e-9).any()) + 2 * int((values > view.limit + 1e-9).any())
    ]
    bar = page.figure.colorbar(
        ScalarMappable(Normalize(-view.limit, view.limit), _DIVERGING), cax=axes, extend=beyond, extendfrac=0.04
    )
    bar.outline.set_linewidth(0.4)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=6 if height > 2 else 4, steps=[1, 2, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: ("+" if value > 0 else "") + _whole(value)))
    bar.ax.tick_params(labelsize=SMALL, length=2, pad=1.5)
    label = "difference from the baseline, points" if height > 2 else "difference, points"
    page.text(left + 0.42, top + height / 2, label, fontsize=SMALL, rotation=90, ha="center", va="center")


def _mark(axes: Axes, cell: pd.Series, x: float, y: float, view: View, size: float = 2.6) -> None:
    """Open dot: q under alpha; filled dot: family-wise p under alpha."""
    alpha = view.settings.alpha
    if not (cell["q"] < alpha or cell["fwer_p"] < alpha):
        return
    ink = _ink(cell["difference"], view.limit)
    filled = cell["fwer_p"] < alpha
    axes.plot(x, y, "o", ms=size, mfc=ink if filled else "none", mec=ink, mew=0.6, clip_on=False, zorder=4)


def _frame(axes: Axes, x: float, y: float, line: float = 1.1) -> None:
    """A frame around a cell that beats (or is beaten by) both the baseline and its random directions."""
    for colour, width in (("white", line + 1.3), ("black", line)):
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, ec=colour, lw=width, zorder=3, clip_on=False))


def _marks_legend(view: View, frames: bool = True) -> list[Any]:
    alpha = f"{view.settings.alpha:g}"
    style: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 3.6, "mec": "black", "mew": 0.7}
    handles: list[Any] = [
        Line2D([], [], mfc="none", label=f"differs from the baseline, q < {alpha}", **style),
        Line2D([], [], mfc="black", label=f"also family-wise p < {alpha}", **style),
    ]
    if frames:
        handles.append(Patch(fc="none", ec="black", lw=1.1, label="beyond baseline and random directions, corrected"))
    return handles


# ---------------------------------------------------------------------------------------------------------------------
# Heatmaps
# ---------------------------------------------------------------------------------------------------------------------

_ROW, _LABELS, _CELL = 0.19, 1.14, 0.9  # inches: height of a row, width of the row labels, widest cell


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


def _heatmap(view: View, size: float, *, differences: bool) -> Figure:
    cells = [cell for _, cell in view.at(size).iterrows()]
    known = {(int(cell["source"]), int(cell["target"]), int(cell["latent"])): cell for cell in cells}
    pairs = sorted({(source, target) for source, target, _ in known})
    below = _control_rows(view, size)
    latents = view.latents
    gap = 0.14
    tall = _ROW * (len(pairs) + len(below)) + gap
    body = 0.22 + max(tall, 1.2) + 0.16 + (0.2 if differences else 0.0)
    shown = "difference from the baseline" if differences else "accuracy"
    c = number(size)
    text = (
        f"Rows: the edit +{c}·(mean of latent A − mean of latent B), named A−B; −{c}·(A−B) is the row B−A. "
        f"Columns: the latent that is edited. In each cell the {shown} in "
    )
    if differences:
        text += "points, its interval, and marks for corrected significance over all cells of this space and timing. "
        text += "Below: baseline accuracy in %; controls: mean difference and range of 95 % of single draws."
    else:
        text += "%, its interval; colour: difference from the baseline of that column. "
        text += "Below: baseline with its interval; controls: mean and range of 95 % of single draws."
    text = text.replace("95 %", f"{100 * view.settings.level:g} %")
    what = "Difference from the baseline" if differences else "Accuracy"
    page = _Page(body, f"{what} by pair and edited latent, c = +{c}: {view.title}", view.caption(text))
    width = min(_CELL, (WIDTH - _LABELS - 0.68) / len(latents)) * len(latents)
    axes = page.axes(_LABELS, 0.22, width, _ROW * len(pairs))
    lower = page.axes(_LABELS, 0.22 + _ROW * len(pairs) + gap, width, _ROW * len(below))
    image = np.full((len(pairs), len(latents)), np.nan)
    for i, pair in enumerate(pairs):
        for j, latent in enumerate(latents):
            cell = known.get((*pair, latent))
            if cell is None:
                continue
            image[i, j] = cell["difference"]
            if differences:
                text = f"{_points(cell['difference'])} [{_whole(cell['lower'])}, {_whole(cell['upper'])}]"
                _mark(axes, cell, j - 0.445, i, view)
                if cell["verdict"] != "none":
                    _frame(axes, j - 0.5, i - 0.5)
            else:
                low, high = cell["accuracy_lower"], cell["accuracy_upper"]
                text = f"{100 * cell['accuracy']:.1f} [{_whole(low)}, {_whole(high)}]"
            axes.text(
                j + (0.05 if differences else 0.0),
                i,
                text,
                ha="center",
                va="center",
                fontsize=SMALL,
                color=_ink(image[i, j], view.limit),
            )
    under = np.full((len(below), len(latents)), np.nan)
    for i, (control, _, rows) in enumerate(below):
        for j, latent in enumerate(latents):
            if latent not in rows.index:
                continue
            row: Any = rows.loc[latent]
            base = float(view.baseline(latent)["accuracy"])
            under[i, j] = row["accuracy"] - base
            interval = ("accuracy_lower", "accuracy_upper") if control == "none" else ("draw_lower", "draw_upper")
            low, high = float(row[interval[0]]), float(row[interval[1]])
            if differences and control != "none":
                text = f"{_points(under[i, j])} [{_whole(low - base)}, {_whole(high - base)}]"
            else:
                text = f"{100 * row['accuracy']:.1f} [{_whole(low)}, {_whole(high)}]"
            weight = "bold" if control == "none" else "normal"
            ink = _ink(under[i, j], view.limit)
            lower.text(
                j + (0.05 if differences else 0.0),
                i,
                text,
                ha="center",
                va="center",
                fontsize=SMALL,
                color=ink,
                weight=weight,
            )
    for here, values, labels in (
        (axes, image, [_pair(*pair) for pair in pairs]),
        (lower, under, [label for _, label, _ in below]),
    ):
        here.set_facecolor("#e4e4e4")  # a cell that was not run
        here.imshow(values, cmap=_DIVERGING, vmin=-view.limit, vmax=view.limit, aspect="auto", interpolation="nearest")
        here.set_yticks(range(len(labels)), labels)
        here.set_xticks([])
        here.tick_params(length=0, pad=3)
        for edge in np.arange(0.5, len(latents) - 1):
            here.axvline(edge, color="white", lw=0.6, zorder=2)
        for spine in here.spines.values():
            spine.set_linewidth(0.4)
    for i in range(1, len(pairs)):  # a line between rows, a wider one where A changes
        axes.axhline(i - 0.5, color="white", lw=1.8 if pairs[i][0] != pairs[i - 1][0] else 0.4, zorder=2)
    for i in range(1, len(below)):
        lower.axhline(i - 0.5, color="white", lw=0.4, zorder=2)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(latents)), [f"latent {latent}" for latent in latents])
    axes.tick_params(axis="x", length=0, pad=2)
    page.text(_LABELS - 0.05, 0.2, "pair A−B", ha="right", va="bottom", fontsize=6.5)
    _colour_bar(page, view, _LABELS + width + 0.12, 0.22, max(tall, 1.2), view.at(size))
    if differences:
        page.legend(_marks_legend(view), 0.22 + max(tall, 1.2) + 0.1, 3)
    return page.figure


@_styled
def accuracy_heatmap(view: View, size: float) -> Figure:
    """Pair x position: accuracy with interval at c = +size; baseline and controls in rows of their own below."""
    return _heatmap(view, size, differences=False)


@_styled
def difference_heatmap(view: View, size: float) -> Figure:
    """Pair x position: difference from the baseline with interval at c = +size, corrected significance marked."""
    return _heatmap(view, size, differences=True)


@_styled
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
    page = _Page(rows * down + 0.44, f"A × B at each edited latent, c = +{number(size)}: {view.title}", caption)
    place = {label: number for number, label in enumerate(labels)}
    written = _points if len(labels) <= 6 else _whole  # without decimals where cells are narrow
    for panel, latent in enumerate(latents):
        left, top = 0.38 + across * (panel % columns), 0.18 + down * (panel // columns)
        axes = page.axes(left, top, side, side)
        image = np.full((len(labels), len(labels)), np.nan)
        for _, cell in cells[cells["latent"] == latent].iterrows():
            i, j = place[cell["source"]], place[cell["target"]]
            image[i, j] = cell["difference"]
            axes.text(
                j, i + 0.08, written(cell["difference"]), ha="center", va="center",
                fontsize=SMALL, color=_ink(cell["difference"], view.limit),
            )  # fmt: skip
            _mark(axes, cell, j + 0.33, i - 0.33, view, size=2.0)
            if cell["verdict"] != "none":
                _frame(axes, j - 0.5, i - 0.5, line=0.9)
        axes.set_facecolor("#e4e4e4")
        axes.imshow(image, cmap=_DIVERGING, vmin=-view.limit, vmax=view.limit, interpolation="nearest")
        axes.set_xticks(range(len(labels)), [str(label) for label in labels])
        axes.set_yticks(range(len(labels)), [str(label) for label in labels])
        axes.tick_params(length=0, pad=2)
        base = 100 * float(view.baseline(latent)["accuracy"])
        axes.set_title(f"latent {latent} (baseline {base:.1f} %)", pad=3)
        if panel % columns == 0:
            axes.set_ylabel("A (added)", labelpad=2)
        if panel + columns >= len(latents):
            axes.set_xlabel("B (subtracted)", labelpad=2)
        for edge in np.arange(0.5, len(labels) - 1):
            axes.axvline(edge, color="white", lw=0.5, zorder=2)
            axes.axhline(edge, color="white", lw=0.5, zorder=2)
        for spine in axes.spines.values():
            spine.set_linewidth(0.4)
    right = 0.38 + across * (columns - 1) + side + 0.1
    _colour_bar(page, view, right, 0.18, side + down * (rows - 1), cells)
    page.legend(_marks_legend(view), rows * down + 0.25, 3)
    return page.figure


# ---------------------------------------------------------------------------------------------------------------------
# Curves, ranks, shares
# ---------------------------------------------------------------------------------------------------------------------


def _panels(page: _Page, number_of: int, columns: int, height: float, *, left: float = 0.52, gap: float = 0.3,
            top: float = 0.2, down: float | None = None) -> Iterator[Axes]:  # fmt: skip
    """Axes of a grid of panels, row by row, over the whole width."""
    width = (WIDTH - left - 0.2 - gap * (columns - 1)) / columns
    for panel in range(number_of):
        across, row = panel % columns, panel // columns
        yield page.axes(left + across * (width + gap), top + row * (down or height + 0.42), width, height)


def _notable_pairs(cells: pd.DataFrame, best: int = 3, worst: int = 2) -> list[tuple[int, int]]:
    """Unordered pairs with the highest and the lowest single differences."""
    grouped = cells.groupby(["source", "target"])["difference"]
    ranked = [*grouped.max().sort_values(ascending=False, kind="stable").index[:best]]
    ranked += [pair for pair in grouped.min().sort_values(kind="stable").index if pair not in ranked][:worst]
    return [(int(a), int(b)) for a, b in ranked]


@_styled
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
    body = rows * 1.98 + 0.4
    page = _Page(body, f"Effect against coefficient: {view.title}", caption)
    limits: tuple[float, float] = (0.0, 0.0)
    drawn = []
    for latent, axes in zip(latents, _panels(page, len(latents), columns, 1.5, down=1.98), strict=True):
        here = cells[cells["latent"] == latent]
        base = float(view.baseline(latent)["accuracy"])
        random = view.controls[(view.controls["control"] == "random") & (view.controls["latent"] == latent)]
        random = random[random["coefficient"].isin(view.sizes)].sort_values("coefficient")
        if len(random):
            x = np.concatenate([-random["coefficient"].to_numpy()[::-1], [0.0], random["coefficient"].to_numpy()])
            sides = []
            for column in ("draw_lower", "draw_upper", "accuracy"):
                values = random[column].to_numpy() - base
                sides.append(np.concatenate([values[::-1], [0.0], values]))
            axes.fill_between(x, sides[0], sides[1], color="#d9d9d9", lw=0, zorder=1)
            axes.plot(x, sides[2], color="#555555", lw=0.9, ls=(0, (4, 2)), zorder=2)
        axes.axhline(0, color="black", lw=0.6, zorder=2)
        for pair, rows_of in here.groupby(["source", "target"]):
            if tuple(pair) in chosen:
                continue
            curve = _with_zero(rows_of)
            axes.plot(curve["coefficient"], curve["difference"], color=_GREY, lw=0.45, alpha=0.7, zorder=2)
        mean = _with_zero(here.groupby("coefficient", as_index=False)[["difference", "lower", "upper"]].mean())
        axes.plot(mean["coefficient"], mean["difference"], color="black", lw=1.6, zorder=5)
        for place, pair in enumerate(chosen):
            curve = _with_zero(here[(here["source"] == pair[0]) & (here["target"] == pair[1])])
            errors = np.abs(curve[["lower", "upper"]].to_numpy().T - curve["difference"].to_numpy())
            axes.errorbar(
                curve["coefficient"] + 0.012 * (place - 2) * max(view.sizes), curve["difference"], yerr=errors,
                color=_LINES[place], marker=_MARKERS[place], ms=2.8, lw=0.9, elinewidth=0.5, zorder=4,
            )  # fmt: skip
        axes.set_title(f"latent {latent} (baseline {100 * base:.1f} %)", pad=3)
        axes.set_xticks(sorted({0.0, *here["coefficient"]}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        _thin_ticks(axes, [float(value) for value in sorted({0.0, *here["coefficient"]})])
        _bare(axes)
        low, high = axes.get_ylim()
        limits = (min(limits[0], low), max(limits[1], high))
        drawn.append(axes)
    for panel, axes in enumerate(drawn):
        axes.set_ylim(*limits)
        _in_points(axes.yaxis)
        if panel % columns == 0:
            axes.set_ylabel("difference, points", labelpad=2)
        else:
            axes.set_yticklabels([])
        if panel + columns >= len(latents):
            axes.set_xlabel("coefficient c of A−B", labelpad=2)
    handles: list[Any] = [
        Line2D([], [], color=_LINES[place], marker=_MARKERS[place], ms=3.2, lw=0.9, label=_pair(*pair))
        for place, pair in enumerate(chosen)
    ]
    handles += [Line2D([], [], color="black", lw=1.6, label="mean of pairs")]
    if pairs > len(chosen):
        handles += [Line2D([], [], color=_GREY, lw=0.6, label="other pairs")]
    if "random" in set(view.controls["control"]):
        handles += [Line2D([], [], color="#555555", lw=0.9, ls=(0, (4, 2)), label="random, mean")]
        handles += [Patch(fc="#d9d9d9", label="random, single draws")]
    page.legend(handles, rows * 1.98 + 0.1, min(9, len(handles)))
    return page.figure


def _thin_ticks(axes: Axes, ticks: list[float]) -> None:
    """Keeps only tick labels that stand apart, zero first, then the largest coefficients."""
    span = max(ticks) - min(ticks) or 1.0
    kept: list[float] = []
    for tick in [0.0, *sorted(ticks, key=lambda value: (-abs(value), value))]:
        if all(abs(tick - other) > span / 9 for other in kept):
            kept.append(tick)
    axes.set_xticks(sorted(kept))


def _with_zero(curve: pd.DataFrame) -> pd.DataFrame:
    """The curve with the baseline at c = 0 in it."""
    zero = pd.DataFrame({"coefficient": [0.0], "difference": [0.0], "lower": [0.0], "upper": [0.0]})
    columns = list(zero.columns)
    return pd.concat([curve[columns], zero], ignore_index=True).sort_values("coefficient", ignore_index=True)


@_styled
def rank_figure(view: View) -> Figure | None:
    """Spearman correlation of the pairs' order between positions, and the ranks themselves, for each |c|."""
    sizes = [size for size in view.sizes if (view.correlations["coefficient"] == size).any()]
    if not sizes or len(view.latents) < 2:
        return None
    columns = 3
    rows = -(-len(sizes) // columns)
    down = 4.0
    pairs = int(view.correlations["n_pairs"].max())
    caption = view.caption(
        f"Upper: Spearman correlation, between two edited latents, of the order of the {pairs} ordered pairs by their "
        "difference from the baseline. W: Kendall's coefficient of concordance over all positions (1: the same order "
        "everywhere), p by relabelling the latents that name a pair independently at each position. Lower: rank of "
        "each pair (1: highest accuracy); coloured: the pairs with the three best and two worst mean ranks.",
        controls=False,
        intervals=False,
    )
    page = _Page(rows * down, f"Do the same pairs work at every position? {view.title}", caption)
    upper = _panels(page, len(sizes), columns, 1.62, left=0.5, gap=0.42, top=0.2, down=down)
    lower = _panels(page, len(sizes), columns, 1.3, left=0.5, gap=0.42, top=2.32, down=down)
    for panel, (size, matrix, lines) in enumerate(zip(sizes, upper, lower, strict=True)):
        table = view.correlations[view.correlations["coefficient"] == size]
        wide = table.pivot(index="latent_a", columns="latent_b", values="spearman")
        values = wide.to_numpy(copy=True)
        np.fill_diagonal(values, np.nan)
        matrix.set_facecolor("#e4e4e4")
        matrix.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        for i in range(len(wide)):
            for j in range(len(wide)):
                if np.isnan(values[i, j]):
                    continue
                ink = "white" if abs(values[i, j]) > 0.72 else "black"
                text = f"{values[i, j]:.2f}".replace("-", "−")
                matrix.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=ink)
        matrix.set_xticks(range(len(wide)), wide.columns)
        matrix.set_yticks(range(len(wide)), wide.index)
        matrix.tick_params(length=0, pad=2)
        summary = view.consistency[view.consistency["coefficient"] == size].iloc[0]
        title = f"c = ±{number(size)}"
        if pd.notna(summary["kendall_w"]):
            p = "p < 0.001" if summary["p"] < 0.001 else f"p = {summary['p']:.3f}"
            title += f":  W = {summary['kendall_w']:.2f}, {p}"
        matrix.set_title(title, pad=3)
        matrix.set_xlabel("edited latent", labelpad=1)
        if panel % columns == 0:
            matrix.set_ylabel("edited latent", labelpad=2)
        _rank_lines(view, size, lines, first=panel % columns == 0)
    return page.figure


def _rank_lines(view: View, size: float, axes: Axes, *, first: bool) -> None:
    wide = view.at(size).pivot(index=["source", "target"], columns="latent", values="difference").dropna()
    ranks = wide.rank(ascending=False, axis=0)
    order = ranks.mean(axis=1).sort_values(kind="stable").index
    chosen = [*order[:3], *[pair for pair in order[-2:] if pair not in order[:3]]]
    for pair in order:
        if pair not in chosen:
            axes.plot(ranks.columns, ranks.loc[pair], color=_GREY, lw=0.4, alpha=0.6)
    for place, pair in enumerate(chosen):
        style: dict[str, Any] = {"color": _LINES[place], "marker": _MARKERS[place], "ms": 2.6, "lw": 1.1}
        axes.plot(ranks.columns, ranks.loc[pair], label=_pair(*pair), **style)
    axes.invert_yaxis()
    axes.set_xticks(list(ranks.columns))
    axes.set_yticks(sorted({1, len(ranks) // 3, 2 * len(ranks) // 3, len(ranks)} - {0}))
    axes.set_xlabel("edited latent", labelpad=1)
    if first:
        axes.set_ylabel("rank of the pair", labelpad=2)
    _bare(axes)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncol=5, frameon=False, fontsize=SMALL, handlelength=0.9,
        handletextpad=0.25, columnspacing=0.55, borderpad=0.1,
    )  # fmt: skip


@_styled
def marginal_figure(view: View) -> Figure | None:
    """Mean difference over the pairs that share A (left) or B (right), over all positions and at each."""
    sizes = [size for size in view.sizes if (view.marginals["coefficient"] == size).any()]
    if not sizes:
        return None
    latents = view.latents
    down = 1.72
    caption = view.caption(
        "Mean difference from the baseline in points over the pairs that share the added latent A (left) or the "
        "subtracted latent B (right). Black: mean over all positions with its interval; coloured: at each edited "
        "latent. The effect of A at −c is the effect of B at +c.",
        controls=False,
    )
    page = _Page(len(sizes) * down + 0.4, f"Marginal effects of A and of B: {view.title}", caption)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, len(latents)))
    panels = list(_panels(page, 2 * len(sizes), 2, 1.22, top=0.22, down=down))
    for row, size in enumerate(sizes):
        here = view.marginals[view.marginals["coefficient"] == size]
        low = high = 0.0
        pair_of = panels[2 * row : 2 * row + 2]
        for axes, role in zip(pair_of, ("A", "B"), strict=True):
            table = here[here["role"] == role]
            labels = sorted(table["label"].unique())
            axes.axhline(0, color="black", lw=0.6)
            for place, latent in enumerate(latents):
                some = table[table["latent"] == latent].set_index("label").reindex(labels)
                offset = -0.2 + 0.56 * (place + 0.5) / len(latents)
                errors = np.abs(some[["lower", "upper"]].to_numpy().T - some["difference"].to_numpy())
                axes.errorbar(
                    np.arange(len(labels)) + offset, some["difference"], yerr=errors, ls="none", color=colours[place],
                    marker=_MARKERS[place % len(_MARKERS)], ms=2.6, elinewidth=0.5,
                )  # fmt: skip
            overall = table[table["latent"] == 0].set_index("label").reindex(labels)
            errors = np.abs(overall[["lower", "upper"]].to_numpy().T - overall["difference"].to_numpy())
            axes.errorbar(
                np.arange(len(labels)) - 0.3, overall["difference"], yerr=errors, ls="none", color="black", marker="_",
                ms=7, mew=1.6, elinewidth=1.2,
            )  # fmt: skip
            axes.set_xticks(range(len(labels)), [str(label) for label in labels])
            axes.set_xlim(-0.6, len(labels) - 0.4)
            what = "A, the latent that is added" if role == "A" else "B, the latent that is subtracted"
            axes.set_title(f"c = +{number(size)}", pad=2, loc="left")
            if row == len(sizes) - 1:
                axes.set_xlabel(what, labelpad=2)
            _bare(axes)
            limits = axes.get_ylim()
            low, high = min(low, limits[0]), max(high, limits[1])
        for place, axes in enumerate(pair_of):
            axes.set_ylim(low, high)
            _in_points(axes.yaxis)
            if place == 0:
                axes.set_ylabel("difference, points", labelpad=2)
            else:
                axes.set_yticklabels([])
    handles: list[Any] = [Line2D([], [], color="black", marker="_", ms=7, mew=1.6, ls="none", label="all positions")]
    for place, latent in enumerate(latents):
        marker = _MARKERS[place % len(_MARKERS)]
        handles.append(Line2D([], [], color=colours[place], marker=marker, ms=3.4, ls="none", label=f"latent {latent}"))
    page.legend(handles, len(sizes) * down + 0.12, len(handles))
    return page.figure


@_styled
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
    page = _Page(step * len(sizes) + 0.85, f"What the effect depends on: {view.title}", caption)
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
        note = f"sd {sd:.1f} points" if start > 0 else "no cell differs"
        axes.text(1.015 if start > 0 else 0.015, row, note, va="center", ha="left")
    axes.set_yticks(range(len(sizes)), [f"c = ±{number(size)}" for size in sizes])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    axes.set_xlabel("share of the variance of the effects, %", labelpad=2)
    _bare(axes)
    handles = [Patch(fc=colour, label=term) for term, colour in _TERMS.items()]
    handles[2].set_label("pair × position")
    handles[3].set_label("noise (prompts drawn)")
    page.legend(handles, step * len(sizes) + 0.52, 4)
    return page.figure


@_styled
def sign_figure(view: View) -> Figure | None:
    """Difference at +c against difference at -c, a point per pair A < B and position."""
    table = view.symmetry
    sizes = sorted(table["coefficient"].unique()) if len(table) else []
    if not sizes:
        return None
    columns = 3
    rows = -(-len(sizes) // columns)
    height = 2.05
    down = height + 0.5
    both = int(table["both_improve"].sum())
    caption = view.caption(
        "A point per pair A < B and edited latent: difference from the baseline in points at +c (across) and at −c "
        "(up). Shaded: both signs above the baseline; its number of points is given. Ringed: an improvement at one "
        f"sign at least, beyond baseline and random directions after correction; at both signs: {both or 'none'}.",
        controls=False,
        intervals=False,
    )
    page = _Page(rows * down + 0.26, f"Does a pair help with both signs? {view.title}", caption)
    latents = view.latents
    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, len(latents)))
    panels = _panels(page, len(sizes), columns, height, down=down)
    for panel, (size, axes) in enumerate(zip(sizes, panels, strict=True)):
        here = table[table["coefficient"] == size]
        values = here[["plus", "minus"]].to_numpy()
        margin = 0.08 * max(0.04, float(np.ptp(np.append(values, 0.0))))
        low, high = min(0.0, float(values.min())) - margin, max(0.0, float(values.max())) + margin
        axes.add_patch(Rectangle((0, 0), high, high, fc="#eef3f8", ec="none", zorder=0))
        axes.axhline(0, color="black", lw=0.5)
        axes.axvline(0, color="black", lw=0.5)
        axes.plot([low, high], [low, high], color=_GREY, lw=0.5, ls=":")
        for place, latent in enumerate(latents):
            some = here[here["latent"] == latent]
            marker = _MARKERS[place % len(_MARKERS)]
            axes.plot(some["plus"], some["minus"], marker, color=colours[place], ms=3.2, mec="#444444", mew=0.25)
        won = here[(here["plus_verdict"] == "improvement") | (here["minus_verdict"] == "improvement")]
        axes.plot(won["plus"], won["minus"], "o", ms=6.5, mfc="none", mec="black", mew=0.8)
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        _in_points(axes.xaxis)
        _in_points(axes.yaxis)
        axes.set_title(f"c = ±{number(size)}: both above in {int(here['both_above'].sum())} of {len(here)}", pad=3)
        axes.set_xlabel("difference at +c, points", labelpad=1)
        if panel % columns == 0:
            axes.set_ylabel("difference at −c, points", labelpad=2)
        _bare(axes)
    handles: list[Any] = []
    for place, latent in enumerate(latents):
        marker = _MARKERS[place % len(_MARKERS)]
        handles.append(Line2D([], [], color=colours[place], marker=marker, ms=3.6, ls="none", label=f"latent {latent}"))
    handles.append(Line2D([], [], marker="o", ms=6, mfc="none", mec="black", mew=0.8, ls="none", label="improvement"))
    page.legend(handles, rows * down + 0.02, len(handles))
    return page.figure


# ---------------------------------------------------------------------------------------------------------------------
# A run folder
# ---------------------------------------------------------------------------------------------------------------------


def figures(view: View) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every figure of a view, drawn one at a time; a figure with nothing to show is left out."""
    for size in view.sizes:
        if len(view.at(size)):
            yield f"{view.slug}-accuracy-c{size:g}", accuracy_heatmap(view, size)
            yield f"{view.slug}-difference-c{size:g}", difference_heatmap(view, size)
            yield f"{view.slug}-grids-c{size:g}", pair_grids(view, size)
    yield f"{view.slug}-coefficients", coefficient_curves(view)
    for name, function in (
        ("rank-consistency", rank_figure),
        ("marginals", marginal_figure),
        ("variance", variance_figure),
        ("signs", sign_figure),
    ):
        figure = function(view)
        if figure is not None:
            yield f"{view.slug}-{name}", figure


@_styled
def render(figure: Figure, form: str = "png", dpi: int = DPI) -> bytes:
    """A figure as the content of a file; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi, metadata={"CreationDate": None} if form == "pdf" else None)
    return content.getvalue()


def draw(analysis: Analysis, run: Path, *, formats: Sequence[str] = FORMATS, dpi: int = DPI) -> list[Path]:
    """Draws every figure into RUN/figures.

    Args:
        analysis: from `stats.analyse`.
        run: the run folder; its manifest, if there is one, gives the model's name.
        formats: file types.
        dpi: dots per inch of the PNG files.

    Returns:
        The files written, in order.

    Raises:
        ValueError: an unknown format.
        OSError: the folder cannot be written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats must be among {', '.join(FORMATS)}, got {', '.join(map(str, formats)) or 'none'}")
    folder = RunFolder(run)
    notes = _notes(folder.manifest()) if folder.manifest_path.exists() else ()
    written = []
    for view in views(analysis, notes):
        for name, figure in figures(view):
            for form in formats:
                written.append(folder.write(f"figures/{name}.{form}", render(figure, form, dpi)))
    return written


def _notes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What a caption should add: the model, the task, and the legacy sign."""
    notes = []
    identity = manifest.get("identity", {})
    if manifest.get("model"):
        notes.append(f"Model: {Path(str(manifest['model'])).name}.")
    if isinstance(identity.get("options"), Mapping) and identity["options"].get("legacy"):
        notes.append("Legacy labels: the direction of a pair A−B is the mean of B minus the mean of A.")
    return tuple(notes)


@dataclass(frozen=True)
class PlotConfig:
    """Draw the figures of a run folder from its trials, as PNG and PDF in RUN/figures."""

    run: tyro.conf.Positional[Path]
    """Run folder of `codi sweep` (it holds trials/part-*.parquet)."""
    dpi: int = DPI
    """Dots per inch of the PNG files."""
    settings: Annotated[Overrides, tyro.conf.arg(name="")] = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        if not 50 <= self.dpi <= 1200:
            raise ValueError(f"dpi must be in 50..1200, got {self.dpi}")


def main(config: PlotConfig) -> None:
    trials = load_trials(config.run)
    analysis = analyse(trials, settings_of(config.run, config.settings))
    written = draw(analysis, config.run, dpi=config.dpi)
    if not written:
        print(f"nothing to draw: {config.run} holds no direction cells")
    for path in written:
        print(path)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
