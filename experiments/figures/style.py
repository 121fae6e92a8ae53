"""What every figure looks like and how it becomes a file: one page width, one font, one palette with fixed roles.

Roles of the colours (`SERIES`, `BASELINE`, …). What is asked about is drawn in the colours of Okabe and Ito, which
every common colour blindness can tell apart, each with a marker of its own. What it is compared with is never
coloured: the baseline is black, controls are grey, single random draws a light grey band. Differences are blue where
they are better or higher and red where they are worse or lower, white in between; magnitudes go from dark to bright.

Sizes: a figure is as wide as a page (`WIDTH`), text is 7 points, and none is smaller than `SMALL`. The legend stands
above the panels, the caption (what the figure shows, how many prompts, which intervals) below them. `drawn_as` changes
width and caption of every figure that is made inside: panels grow with the width, letters do not.

Files: `encode` leaves out dates and versions, so that the same tables give the same bytes, in any process.

What it does not know: tables, studies, run folders. matplotlib and seaborn are imported by the functions that draw, so
that a module may take names from here without waiting for them.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = [
    "BAND", "BASELINE", "CONTROL", "CONTROLS", "CORRELATION", "DIVERGING", "DPI", "EMPTY", "FAINT", "FORMATS", "Form",
    "GUIDE", "HIGHLIGHT", "INK", "LOWER_IS_BETTER", "MARKERS", "PALETTE", "Page", "SEQUENTIAL", "SERIES", "SMALL",
    "STYLE", "WIDTH", "WIDTHS", "caption_lines", "check_formats", "colour_map", "drawn_as", "encode", "in_style",
    "legend", "look", "new_figure",
    "note", "number_text", "ordered", "sample_text", "save", "styled",
]  # fmt: skip

WIDTH = 7.2
"""Inches: a figure over a whole page. Places inside a figure are said in these inches, whatever its width is."""
WIDTHS = (WIDTH, 20.0)
"""Inches: the narrowest and the widest figure; in a narrower one labels would be cut off."""
DPI = 200
"""Dots per inch of PNG files."""
FORMATS = ("png", "pdf")
SMALL = 6.0
"""Points: captions and numbers in cells; nothing is smaller."""

# --- Colours by role --------------------------------------------------------------------------------------------------

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""What is asked about (Okabe and Ito 2008)."""
BASELINE = "#000000"
"""The model as it is: unedited, unsteered."""
CONTROL = "#6E6E6E"
"""What it is compared with: random directions, shuffled labels, the plain lens."""
CONTROLS = ("#6E6E6E", "#9C9C9C", "#474747")
"""Where a figure has several controls."""
BAND = "#D9D9D9"
"""Where single random draws lie."""
FAINT = "#8A8A8A"
"""Trends, and the many lines of which only some are named."""
GUIDE = "#DDDDDD"
"""Lines that lead the eye."""
HIGHLIGHT = "#EEF3F8"
"""A region of a panel that the caption speaks of."""
EMPTY = "#E4E4E4"
"""A cell of a heat map that was not computed."""
INK = "#333333"
"""Captions."""
PALETTE = (*SERIES, CONTROL)
"""Colours of series by place; the last is the control's."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One per colour of `PALETTE`."""

DIVERGING = "lower-red"
"""Differences: red lower, grey-white equal, blue higher; made by seaborn."""
LOWER_IS_BETTER = "lower-blue"
"""The same turned round: blue lower, red higher."""
_RED, _BLUE = 12, 250  # hues in degrees
_ENDS = {DIVERGING: (_RED, _BLUE), LOWER_IS_BETTER: (_BLUE, _RED)}
SEQUENTIAL = "cividis"
"""Magnitudes: dark none, bright much."""
CORRELATION = "PuOr_r"
"""Correlations and contrasts that are neither better nor worse: purple negative, orange positive."""
_ORDERED = "viridis"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.0,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
"""Settings of matplotlib under which every figure is made and saved."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """What figures are made like.

    Attributes:
        width: inches.
        caption: whether they have one.
    """

    width: float = WIDTH
    caption: bool = True


_FORM: ContextVar[Form] = ContextVar("form of figures", default=Form())  # noqa: B039  # frozen


@contextmanager
def drawn_as(form: Form) -> Iterator[None]:
    """Figures that are made inside have this form.

    Raises:
        ValueError: a width outside `WIDTHS`.
    """
    if not WIDTHS[0] <= form.width <= WIDTHS[1]:
        raise ValueError(f"width must be in {WIDTHS[0]:g}..{WIDTHS[1]:g} inches, got {form.width:g}")
    before = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(before)


def look(place: int, control: bool = False) -> dict[str, Any]:
    """Colour and marker of the series at this place; those of controls are grey."""
    colours = CONTROLS if control else PALETTE
    return {"color": colours[place % len(colours)], "marker": MARKERS[place % len(MARKERS)]}


@functools.lru_cache(maxsize=16)
def colour_map(name: str) -> Colormap:
    """A colour map by its name.

    Those of differences are made by seaborn: from a neutral middle both sides get darker and more coloured at one pace,
    so that equal sizes look alike; all others are matplotlib's.
    """
    import matplotlib

    if name not in _ENDS:
        return matplotlib.colormaps[name]
    import seaborn

    made = seaborn.diverging_palette(*_ENDS[name], s=95, l=36, as_cmap=True)
    made.name = name
    return made


def ordered(number: int) -> list[Any]:
    """Colours of so many things that have an order, such as latents or layers: dark first, none too bright to see."""
    import numpy as np

    return list(colour_map(_ORDERED)(np.linspace(0.05, 0.88, number)))


def number_text(value: float, form: str = ".2f") -> str:
    """A number as it is drawn: a real minus sign, no sign at zero, a dash where there is none.

    Args:
        value: to write.
        form: format specification, such as "+.1f".
    """
    if value != value:
        return "–"
    text = format(value, form)
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def sample_text(table: Any) -> str:
    """How many prompts a table rests on, for a caption: from its columns n and n_clusters; 0 does not count."""
    counts = []
    for name in ("n", "n_clusters"):
        known = table[name].dropna()
        known = known[known > 0]
        low, high = (int(known.min()), int(known.max())) if len(known) else (0, 0)
        counts.append(f"{low:,}" if low == high else f"{low:,} to {high:,}")
    return f"{counts[0]} prompts in {counts[1]} clusters."


# --- Under which settings ---------------------------------------------------------------------------------------------


@contextmanager
def in_style() -> Iterator[None]:
    """matplotlib's settings are `STYLE` inside, and what they were afterwards."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function draw under `STYLE`, whatever the settings of the process are."""

    @functools.wraps(function)
    def inside(*arguments: P.args, **options: P.kwargs) -> T:
        with in_style():
            return function(*arguments, **options)

    return inside


# --- Figures that lay themselves out ----------------------------------------------------------------------------------


@styled
def new_figure(
    rows: int = 1, columns: int = 1, height: float = 2.6, *, total: float | None = None, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of page width with a grid of panels, always a 2-d array.

    Args:
        rows: of panels.
        columns: of panels.
        height: inches per row.
        total: inches of the whole figure, in place of `height`.
        options: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    size = (_FORM.get().width, height * rows if total is None else total)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend(figure: Figure, panels: Any, columns: int | None = None, **options: Any) -> None:
    """One legend above all panels: every label of the panels once, in order.

    Args:
        figure: of `new_figure`.
        panels: its axes, in any shape.
        columns: of the legend; None: as many as fit on a page.
        options: of matplotlib's legend.
    """
    import numpy as np

    handles: list[Any] = []
    names: list[str] = []
    for panel in np.ravel(panels):
        known = set(names)  # a label twice in one panel stands for two things
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            if name not in known:
                handles.append(handle)
                names.append(name)
    if not handles:
        return
    if columns is None:
        room = _FORM.get().width - 0.2
        widths = [0.45 + 0.05 * len(name) for name in names]  # inches, about
        rows = 1 if sum(widths) < room else -(-len(names) // max(1, int(room / max(widths))))
        columns = -(-len(names) // rows)
    with in_style():
        figure.legend(
            handles,
            names,
            loc="outside upper center",
            ncols=columns,
            columnspacing=1.4,
            **options,
        )


def caption_lines(text: str, width: int) -> list[str]:
    """A caption in lines of so many characters; a number stays with its per cent sign."""
    lines = textwrap.wrap(text.replace(" %", "\N{NO-BREAK SPACE}%"), width)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def note(figure: Figure, text: str) -> None:
    """The caption below the panels, in lines of page width; a legend below them moves above, out of its way."""
    for one in figure.legends:
        one.set_loc("outside upper center")
    form = _FORM.get()
    if not form.caption:
        return
    figure.supxlabel(
        "\n".join(caption_lines(text, int(158 * form.width / WIDTH))),
        x=0.1 / WIDTH,
        ha="left",
        fontsize=SMALL,
        color=INK,
        linespacing=1.3,
        parse_math=False,
    )


# --- Figures that are placed by hand ----------------------------------------------------------------------------------


class Page:
    """A figure of page width: title above, caption below, axes placed in inches in between.

    Args:
        body: inches between title and caption.
        title: one line.
        caption: any length; broken into lines.
    """

    def __init__(self, body: float, title: str, caption: str) -> None:
        from matplotlib.figure import Figure

        form = _FORM.get()
        lines = caption_lines(caption, int(152 * form.width / WIDTH)) if form.caption else []
        self.top, self.bottom = 0.36, 0.12 + 0.118 * len(lines)
        self.height = self.top + body + self.bottom
        self.figure = Figure(figsize=(form.width, self.height))
        self.figure.text(0.1 / WIDTH, 1 - 0.1 / self.height, title, fontsize=8.5, weight="bold", va="top")
        self.figure.text(
            0.1 / WIDTH, 0.07 / self.height, "\n".join(lines), fontsize=SMALL, color=INK, va="bottom", linespacing=1.3
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at inches from the upper left corner of the body."""
        lower = self.height - self.top - top - height
        return self.figure.add_axes((left / WIDTH, lower / self.height, width / WIDTH, height / self.height))

    def panels(
        self, number: int, columns: int, height: float, *, left: float = 0.52, gap: float = 0.3, top: float = 0.2,
        down: float | None = None,
    ) -> Iterator[Axes]:  # fmt: skip
        """Axes of a grid of panels, row by row, over the whole width; `down` inches from row to row."""
        width = (WIDTH - left - 0.2 - gap * (columns - 1)) / columns
        for panel in range(number):
            across, row = panel % columns, panel // columns
            yield self.axes(left + across * (width + gap), top + row * (down or height + 0.42), width, height)

    def text(self, left: float, top: float, text: str, **options: Any) -> None:
        """Text at inches from the upper left corner of the body."""
        self.figure.text(left / WIDTH, 1 - (self.top + top) / self.height, text, **options)

    def legend(self, handles: Sequence[Any], top: float, columns: int) -> None:
        """A legend in the middle of the page, its upper edge `top` inches below that of the body."""
        self.figure.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1 - (self.top + top) / self.height), ncol=columns,
            handletextpad=0.5, columnspacing=1.4, borderpad=0.0,
        )  # fmt: skip


# --- Files ------------------------------------------------------------------------------------------------------------

# what matplotlib would write beside the drawing: when, and by which version
_LEFT_OUT = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}


def check_formats(formats: Sequence[str]) -> None:
    """Refuse file types that are not written.

    Raises:
        ValueError: no format, or an unknown one.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats must be among {', '.join(FORMATS)}, got {', '.join(map(str, formats)) or 'none'}")


@styled
def encode(figure: Figure, form: str = "png", dpi: int = DPI) -> bytes:
    """A figure as the content of a file, exactly as wide as it is; the same figure gives the same bytes.

    The first call lays the figure out for good: laid out once more, from where things are then, it would differ a bit.

    Args:
        figure: to write.
        form: one of `FORMATS`.
        dpi: dots per inch of a PNG.

    Raises:
        ValueError: an unknown format.
    """
    check_formats([form])
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi, metadata=_LEFT_OUT[form])
    return content.getvalue()


def save(
    figure: Figure, name: str, write: Callable[[str, bytes], Path], formats: Sequence[str] = FORMATS, dpi: int = DPI
) -> list[Path]:
    """Write a figure in every format.

    Args:
        figure: to write.
        name: of the files, with their folder and without an ending, such as "figures/heatmap".
        write: takes a name and the content and gives the path; a run folder's `write`.
        formats: of `FORMATS`.
        dpi: dots per inch of a PNG.

    Returns:
        The files, in order.

    Raises:
        ValueError: an unknown format.
    """
    check_formats(formats)
    return [write(f"{name}.{form}", encode(figure, form, dpi)) for form in formats]
