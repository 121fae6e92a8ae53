"""Heat maps: a number or words in every cell, marks of corrected significance, colours that several panels share.

    Scale         which colour a value has; one scale for all panels that are compared
    matrix        the heat map itself; a cell without a value is grey
    colour_bar    what the colours mean
    draw_matrix   a whole panel in one call: numbers, marks, scale and bar

Marks, the same in every study: an open dot where a value differs after correction by false discovery rate, a filled
one where it also does family-wise, a frame where it is beyond the baseline and beyond its random controls.

What it does not know: what a row or a column is, or how a number was computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.figures.style import DIVERGING, EMPTY, SEQUENTIAL, SMALL, colour_map, number_text, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CORRECTED", "FAMILY_WISE", "MARKS", "Scale", "colour_bar", "draw_matrix", "frame", "mark", "marked",
    "marks_legend", "matrix", "numbers",
]  # fmt: skip

CORRECTED, FAMILY_WISE = 1, 2
"""Levels of a mark: q below alpha alone; family-wise p below alpha, whatever q is (the procedures differ)."""
MARKS = "○: differs after correction (q < 0.05)."
"""For the caption of a figure whose cells bear marks of the first level."""


# --- Colours ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _dark(colours: str) -> np.ndarray:
    """Which colours of a colour map are so dark that only white can be read on them."""
    scale = colour_map(colours)
    red, green, blue, _ = scale(np.arange(scale.N)).T
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


@dataclass(frozen=True)
class Scale:
    """Which colour a value has; values beyond the ends have the colours of the ends.

    Attributes:
        low: value of the first colour.
        high: value of the last colour, above `low`.
        colours: name of a colour map, see `style.colour_map`.
    """

    low: float = 0.0
    high: float = 1.0
    colours: str = SEQUENTIAL

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a scale must go up between finite ends, got {self.low}..{self.high}")

    @classmethod
    def magnitude(cls, values: Any, colours: str = SEQUENTIAL, *, least: float = 0.0, quantile: float = 1.0) -> Scale:
        """From 0 to the largest value.

        Args:
            values: any shape; those that are not finite do not count. Nothing above 0: the scale ends at 1.
            colours: name of a colour map.
            least: the scale ends here at the least.
            quantile: end at this quantile, so that a few large values do not take all the colours.
        """
        return cls(0.0, _end(values, least, quantile), colours)

    @classmethod
    def signed(cls, values: Any, colours: str = DIVERGING, *, least: float = 0.0, quantile: float = 1.0) -> Scale:
        """As far below 0 as above it, to the largest absolute value; arguments as for `magnitude`."""
        end = _end(np.abs(np.asarray(values, float)), least, quantile)
        return cls(-end, end, colours)

    def ink(self, value: float) -> str:
        """Black or white, whichever can be read on the colour of this value."""
        if value != value:
            return "black"
        dark = _dark(self.colours)
        place = int(min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) * len(dark))
        return "white" if dark[min(place, len(dark) - 1)] else "black"

    def beyond(self, values: Any) -> Literal["neither", "min", "max", "both"]:
        """At which ends values lie outside."""
        values, slack = np.asarray(values, float), 1e-9 * (self.high - self.low)
        below, above = bool((values < self.low - slack).any()), bool((values > self.high + slack).any())
        return "both" if below and above else "min" if below else "max" if above else "neither"


def _end(values: Any, least: float, quantile: float) -> float:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    largest = float(np.quantile(finite, quantile)) if finite.size else 0.0
    return max(largest, least) if max(largest, least) > 0 else 1.0


# --- Cells ------------------------------------------------------------------------------------------------------------


def numbers(values: np.ndarray, form: str = ".2f", *, bare: bool = False) -> list[list[str]]:
    """Every value as text, "" where there is none; `bare` leaves out the zero before the point."""
    texts = [["" if value != value else number_text(value, form) for value in line] for line in values]
    return [[text.replace("0.", ".", 1) if bare and text.lstrip("+−").startswith("0.") else text for text in line]
            for line in texts]  # fmt: skip


def mark(axes: Axes, x: float, y: float, level: int, ink: str, size: float = 2.2) -> None:
    """A dot at a place of a cell: open for `CORRECTED`, filled for `FAMILY_WISE`, nothing for 0."""
    if level:
        face = ink if level == FAMILY_WISE else "none"
        axes.plot(x, y, "o", ms=size, mfc=face, mec=ink, mew=0.6, clip_on=False, zorder=4, gid="mark")


def marked(figure: Figure) -> bool:
    """Whether any cell of a figure bears a mark."""
    return any(line.get_gid() == "mark" for axes in figure.axes for line in axes.lines)


def frame(axes: Axes, row: int, column: int, line: float = 1.1) -> None:
    """A frame around a cell, black on white so that it is seen on every colour."""
    from matplotlib.patches import Rectangle

    for colour, width in (("white", line + 1.3), ("black", line)):
        place = (column - 0.5, row - 0.5)
        axes.add_patch(Rectangle(place, 1, 1, fill=False, ec=colour, lw=width, zorder=3, clip_on=False))


@styled
def marks_legend(alpha: float, frames: bool = True) -> list[Any]:
    """Handles that say what dots and frames mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    style: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 3.6, "mec": "black", "mew": 0.7}
    handles: list[Any] = [
        Line2D([], [], mfc="none", label=f"differs from the baseline, q < {alpha:g}", **style),
        Line2D([], [], mfc="black", label=f"family-wise p < {alpha:g}, whatever its q", **style),
    ]
    if frames:
        handles.append(Patch(fc="none", ec="black", lw=1.1, label="beyond baseline and random directions, corrected"))
    return handles


@styled
def matrix(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[object],
    columns: Sequence[object],
    scale: Scale,
    *,
    texts: Sequence[Sequence[str]] | None = None,
    size: float = SMALL,
    shift: tuple[float, float] = (0.0, 0.0),
    bold: Collection[int] = (),
    marks: np.ndarray | None = None,
    mark_at: tuple[float, float] = (0.38, -0.3),
    mark_size: float = 2.2,
    frames: np.ndarray | None = None,
    upwards: bool = False,
    aspect: Literal["auto", "equal"] = "auto",
) -> None:
    """Draw a heat map.

    Args:
        axes: where.
        values: (row, column); a cell that is not finite stays grey, or white if it has a text.
        rows: labels from the first row on.
        columns: labels.
        scale: colours.
        texts: what is written in the cells, line by line; None: nothing.
        size: of the text, points.
        shift: of the text from the middle of the cell, in cells to the right and down.
        bold: rows whose text is bold.
        marks: (row, column), 0, `CORRECTED` or `FAMILY_WISE`.
        mark_at: place of a mark, in cells to the right and down from the middle.
        mark_size: points.
        frames: (row, column), whether a cell is framed.
        upwards: the first row is drawn at the bottom, as layers are.
        aspect: "equal": cells are squares.
    """
    down = -1.0 if upwards else 1.0
    axes.set_facecolor(EMPTY)
    axes.imshow(
        np.ma.masked_invalid(np.asarray(values, float)), cmap=colour_map(scale.colours), aspect=aspect,
        vmin=scale.low, vmax=scale.high, interpolation="nearest", origin="lower" if upwards else "upper",
    )  # fmt: skip
    for i, line in enumerate(texts or ()):
        for j, text in enumerate(line):
            if text:
                axes.text(
                    j + shift[0], i + down * shift[1], text, ha="center", va="center", fontsize=size,
                    color=scale.ink(values[i, j]), weight="bold" if i in bold else "normal", parse_math=False,
                )  # fmt: skip
    for i, j in np.argwhere(marks) if marks is not None else ():
        ink = scale.ink(values[i, j])
        assert marks is not None
        mark(axes, j + mark_at[0], i + down * mark_at[1], int(marks[i, j]), ink, mark_size)
    for i, j in np.argwhere(frames) if frames is not None else ():
        frame(axes, i, j)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), [str(row) for row in rows])
    axes.tick_params(length=0, pad=2)
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color="white", lw=0.4, zorder=2)
    for edge in range(1, len(columns)):
        axes.axvline(edge - 0.5, color="white", lw=0.5, zorder=2)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.4)


@styled
def colour_bar(
    figure: Figure,
    scale: Scale,
    label: str = "",
    *,
    of: Any = None,
    place: Axes | None = None,
    values: Any = (),
    form: str = "",
    factor: float = 1.0,
    ticks: int = 6,
    aspect: float = 30,
) -> None:
    """What the colours mean.

    Args:
        figure: where.
        scale: the colours.
        label: written beside it.
        of: the panels that it belongs to, any shape: it takes its room from them.
        place: axes made for it, in place of `of`.
        values: what is drawn; the bar ends in a point where they go beyond the scale.
        form: of the numbers, a format specification; "": as short as they can be.
        factor: numbers are written times this (100: fractions in per cent).
        ticks: at most about so many.
        aspect: length over width, with `of`.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    where: dict[str, Any] = {"cax": place, "extendfrac": 0.04}
    if place is None:
        where = {"ax": list(np.ravel(of)), "fraction": 0.03, "pad": 0.01, "aspect": aspect}
    mappable = ScalarMappable(Normalize(scale.low, scale.high), colour_map(scale.colours))
    bar = figure.colorbar(mappable, extend=scale.beyond(values), **where)
    bar.outline.set_linewidth(0.4)  # type: ignore[operator]
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10]))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(factor * value, form or "g")))
    bar.ax.tick_params(labelsize=SMALL, length=2, pad=1.5, width=0.4)
    if label:
        bar.set_label(label, fontsize=SMALL)


# --- A whole panel ----------------------------------------------------------------------------------------------------


def draw_matrix(
    axis: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    form: str = ".0f",
    signed: bool = False,
    significant: np.ndarray | None = None,
    bar: bool = True,
    scale: Scale | None = None,
    upwards: bool = False,
) -> None:
    """A panel of its own: numbers in the cells as far as they fit, marks, colours and what they mean.

    Args:
        axis: the panel, of `new_figure`.
        values: (row, column); a cell that is not finite stays grey.
        rows: labels from the first row on; where they are many, some are left out.
        columns: labels.
        title: above it.
        form: of the numbers, a format specification.
        signed: differences, blue above 0 and red below; else magnitudes from 0.
        significant: (row, column), whether a cell is marked, or its level (`CORRECTED`, `FAMILY_WISE`).
        bar: draw the colour bar.
        scale: None: that of these values alone.
        upwards: the first row is drawn at the bottom, as layers are.
    """
    values = np.asarray(values, float)
    if scale is None:
        scale = Scale.signed(values) if signed else Scale.magnitude(values)
    texts = numbers(values, form)
    figure = axis.get_figure(root=True)
    assert figure is not None
    box, page = axis.get_position(), figure.get_size_inches()  # before the layout: about right
    wide, tall = box.width * page[0] / max(1, len(columns)), box.height * page[1] / max(1, len(rows))
    longest = max((len(text) for line in texts for text in line), default=0)
    fits = 0.0085 * SMALL * longest < wide and 0.0165 * SMALL < tall
    matrix(
        axis, values, rows, columns, scale, texts=texts if fits else None, upwards=upwards,
        marks=None if significant is None else np.asarray(significant).astype(int),
        shift=(0.0, 0.0 if significant is None else 0.08),
        mark_size=2.2 if min(wide, tall) > 0.15 else 1.4,
        mark_at=(0.36, -0.32) if fits else (0.0, 0.0),
    )  # fmt: skip
    # the layout will use more of the page than the grid it starts from
    _thin_labels(axis, [str(row) for row in rows], [str(column) for column in columns], 1.12 * wide, 1.12 * tall)
    axis.set_title(title)
    if bar:
        colour_bar(figure, scale, of=axis, aspect=20)


def _thin_labels(axis: Axes, rows: Sequence[str], columns: Sequence[str], wide: float, tall: float) -> None:
    """Every second, third, … label where all would lie on top of each other; cells are `wide` and `tall` inches."""
    high = [0.11] * len(rows)
    broad = [0.04 + 0.055 * max(map(len, column.split("\n"))) for column in columns]
    for labels, sizes, cell, ticks in ((rows, high, tall, axis.set_yticks), (columns, broad, wide, axis.set_xticks)):
        step = 1
        while step < len(labels) and any(
            (sizes[at] + sizes[at + step]) / 2 > step * cell for at in range(0, len(labels) - step, step)
        ):
            step += 1
        if step > 1:
            ticks(list(range(0, len(labels), step)), labels[::step])
