"""Lines, points and bars with intervals, drawn beside what they are compared with.

    draw_series   a line with an interval at every point, shifted a little so that none hides another
    draw_points   points with an interval across, up, or both, such as accuracy against length
    draw_bars     bars with intervals, side by side
    band          where single random draws lie, and their mean
    baseline      the level of the model as it is
    in_points     ticks of a fraction in percentage points
    from_zero     an axis that begins at 0 and cuts no marker

Tables have an estimate and its bounds in the columns `mean` (or another name), `lower`, `upper`. What it does not
know: what was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.figures.style import BAND, BASELINE, CONTROL, look, number_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

__all__ = ["DASHES", "band", "baseline", "draw_bars", "draw_points", "draw_series", "from_zero", "in_points", "spread"]

DASHES = (0, (4, 2))
"""Line of the mean of a control."""
_LINE: dict[str, Any] = {"markersize": 3.2, "linewidth": 1.1, "elinewidth": 0.8, "capsize": 1.5}


def spread(table: pd.DataFrame, name: str = "mean", scale: float = 1.0) -> np.ndarray:
    """(2, point): how far the bounds lie from the estimate, below and above, as error bars want it; a bound that is not
    finite is not drawn."""
    values = table[name].to_numpy(float)
    reach = np.abs(np.stack([values - table["lower"].to_numpy(float), table["upper"].to_numpy(float) - values]))
    return scale * np.where(np.isfinite(reach), reach, 0.0)


def draw_series(
    axis: Axes,
    x: ArrayLike,
    table: pd.DataFrame,
    label: str,
    place: int,
    name: str = "mean",
    scale: float = 100,
    joined: int | None = None,
    *,
    control: bool = False,
    step: float = 0.07,
    **options: Any,
) -> None:
    """One series with intervals.

    Args:
        axis: panel.
        x: of the points.
        table: a row per point, with `name`, `lower` and `upper`.
        label: for the legend.
        place: of the series in the figure: colour, marker and shift.
        name: column of the estimate.
        scale: what numbers are drawn times; 100: fractions in per cent.
        joined: how many of the first points a line joins; None: all.
        control: it is what others are compared with: grey and dashed.
        step: shift from series to series, in units of x.
        options: of matplotlib's errorbar.
    """
    line = DASHES if control else "-"
    style: dict[str, Any] = {**_LINE, **look(place, control), "linestyle": line, **options}
    at = np.asarray(x, float) + step * (place % 7 - 2)
    values = scale * table[name].to_numpy(float)
    whole = style if joined is None else {**style, "linestyle": "none"}
    axis.errorbar(at, values, yerr=spread(table, name, scale), label=label, **whole)
    if joined is not None:
        axis.plot(at[:joined], values[:joined], **{key: style[key] for key in ("color", "linewidth", "linestyle")})


def draw_points(
    axis: Axes,
    x: ArrayLike,
    y: ArrayLike,
    label: str,
    place: int,
    *,
    across: np.ndarray | None = None,
    up: np.ndarray | None = None,
    control: bool = False,
    joined: bool = False,
    **options: Any,
) -> None:
    """Points with intervals.

    Args:
        axis: panel.
        x: of the points.
        y: of the points.
        label: for the legend.
        place: of the series in the figure: colour and marker.
        across: (2, point) from `spread`, of x.
        up: (2, point), of y.
        control: it is what others are compared with: grey.
        joined: a line joins the points, in order.
        options: of matplotlib's errorbar.
    """
    style = {**_LINE, "markersize": 4, **look(place, control), "linestyle": "-" if joined else "none", **options}
    axis.errorbar(np.asarray(x, float), np.asarray(y, float), xerr=across, yerr=up, label=label, **style)


def draw_bars(
    axis: Axes,
    x: ArrayLike,
    table: pd.DataFrame,
    label: str,
    place: int,
    of: int,
    name: str = "mean",
    scale: float = 100,
    *,
    control: bool = False,
) -> None:
    """Bars with intervals, `of` series side by side at every x (1 apart); other arguments as for `draw_series`."""
    width = 0.8 / of
    at = np.asarray(x, float) + width * (place - (of - 1) / 2)
    axis.bar(
        at, scale * table[name].to_numpy(float), width, yerr=spread(table, name, scale), label=label,
        color=look(place, control)["color"], edgecolor="white", linewidth=0.4, error_kw={"elinewidth": 0.8},
    )  # fmt: skip


def band(
    axis: Axes,
    x: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    label: str | None = None,
    mean: ArrayLike | None = None,
    mean_label: str | None = None,
) -> None:
    """Where single random draws lie, behind everything else; their mean as a dashed line."""
    axis.fill_between(
        np.asarray(x, float),
        np.asarray(lower, float),
        np.asarray(upper, float),
        color=BAND,
        lw=0,
        zorder=1,
        label=label,
    )
    if mean is not None:
        axis.plot(
            np.asarray(x, float), np.asarray(mean, float), color=CONTROL, lw=0.9, ls=DASHES, zorder=2, label=mean_label
        )


def baseline(axis: Axes, level: float = 0.0, label: str | None = None, **options: Any) -> None:
    """The level of the model as it is, from side to side."""
    axis.axhline(level, **{"color": BASELINE, "linewidth": 0.8, "zorder": 2, **options}, label=label)


def in_points(axis: Any, factor: float = 100.0) -> None:
    """Ticks of an x- or y-axis, signed, times `factor`: a fraction in percentage points."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number_text(round(factor * value, 9), "+g")))


def from_zero(axis: Axes, top: float | None = None) -> None:
    """The y-axis begins at 0, with so much room below that a marker at 0 is seen whole."""
    high = axis.get_ylim()[1] if top is None else top
    axis.set_ylim(-0.035 * high, high)
