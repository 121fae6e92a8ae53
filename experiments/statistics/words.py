"""Numbers of tables in words: an estimate with its interval, a p-value, some columns of a table as markdown.

Knows nothing about what the numbers mean, or about where the text goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.statistics.effects import reach

__all__ = ["interval", "markdown", "p_number", "p_text", "visible"]


def interval(row: pd.Series | Mapping[str, Any], name: str = "mean", scale: float = 100, digits: int = 1) -> str:
    """An estimate as "12.3 [10.1, 14.9]", in per cent unless another scale is given; "12.3 (no interval)" where nothing
    bounds it (a number without a range, the same in all clusters or in the only one).

    Args:
        row: with the column `name`, and lower and upper.
        name: column of the estimate; a "difference" carries its sign.
        scale: what the numbers are multiplied by.
        digits: after the point.
    """
    sign = "+" if name == "difference" else ""
    numbers = [f"{scale * row[key]:{sign}.{digits}f}" for key in (name, "lower", "upper")]
    zero = {f"{value:{sign}.{digits}f}" for value in (0.0, -0.0)}
    numbers = [f"{0:.{digits}f}" if text in zero else text.replace("-", "−") for text in numbers]
    if math.isinf(row["lower"]) and math.isinf(row["upper"]):
        return f"{numbers[0]} (no interval)"
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def visible(row: pd.Series | Mapping[str, Any], name: str = "difference", scale: float = 100, digits: int = 1) -> str:
    """The smallest effect that could have been told from none, beside a null; "nothing" if there is none.

    Args:
        row, name, scale, digits: as for `interval`.
    """
    least = scale * reach(row, name)
    return f"{least:.{digits}f}" if math.isfinite(least) else "nothing"


def p_text(p: float) -> str:
    """A p-value for a sentence: "p = 0.031", "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def p_number(p: float) -> str:
    """A p-value where its name stands already: "0.031", "1e−4"; "unknown" for NaN."""
    if pd.isna(p):
        return "unknown"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-").replace("-", "−")


def markdown(table: pd.DataFrame, columns: Mapping[str, str], formats: Mapping[str, str] | None = None) -> str:
    """Some columns of a table as markdown.

    Args:
        table: rows.
        columns: column -> heading.
        formats: column -> format specification.
    """
    formats = formats or {}
    lines = [f"| {' | '.join(columns.values())} |", "|" + "---|" * len(columns)]
    for _, row in table.iterrows():
        cells = [format(row[name], formats[name]) if name in formats else str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
