"""Published claims as a checklist: what was claimed, what was measured here, and whether it held for this model.

A study makes one `Claim` per statement, with the number that decides it, its interval and how much data is behind it,
and collects them in a `ClaimsTable` that prints as markdown and is written, as CSV and JSON, through the run folder.
`judge` turns an interval into a verdict by one rule for every study: a claim is held only if the whole interval lies on
the claimed side.

Knows nothing about models, prompts or particular claims. Not a command: the studies write these tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd

__all__ = ["VERDICTS", "Claim", "ClaimsTable", "Verdict", "effect_claim", "judge"]

Verdict = Literal["held", "not held", "undecided", "not testable"]
VERDICTS: tuple[Verdict, ...] = ("held", "not held", "undecided", "not testable")


@dataclass(frozen=True)
class Claim:
    """One published claim and what became of it.

    Attributes:
        name: short name, such as "C1" or "S7 (KV)"; unique in its table.
        statement: what was claimed, in this project's notation.
        measured: what the number is, and the rule by which it decides.
        verdict: "held", "not held", "undecided" (at this power) or "not testable" (for the model and data at hand).
        estimate, lower, upper: the number and its interval; NaN where there is none.
        n, n_clusters: prompts and independent clusters behind the number.
        note: why it could not be tested, or what else a reader should know.
    """

    name: str
    statement: str
    measured: str
    verdict: Verdict
    estimate: float = math.nan
    lower: float = math.nan
    upper: float = math.nan
    n: int = 0
    n_clusters: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")
        if not self.name or not self.statement:
            raise ValueError("a claim needs a name and a statement")
        if self.verdict == "not testable" and not self.note:
            raise ValueError(f"claim {self.name}: say in note why it is not testable")
        if self.verdict != "not testable" and math.isnan(self.estimate):
            raise ValueError(f"claim {self.name}: a verdict of {self.verdict!r} needs the number it rests on")

    @property
    def number(self) -> str:
        """Estimate with interval and n, as text; "–" where nothing was measured."""
        if math.isnan(self.estimate):
            return "–"
        interval = "" if math.isnan(self.lower) else f" [{self.lower:.3f}, {self.upper:.3f}]"
        clusters = f" in {self.n_clusters} clusters" if self.n_clusters else ""
        return f"{self.estimate:.3f}{interval}, n = {self.n}{clusters}"


def judge(lower: float, upper: float, *, above: float | None = None, below: float | None = None) -> Verdict:
    """The verdict on "the number is above (below) a bound".

    Args:
        lower, upper: interval of the number; NaN: nothing was measured.
        above: held only if lower > above.
        below: held only if upper < below. With both given, both must be true.

    Returns:
        "held" if the whole interval lies on the claimed side, "not testable" if there is no interval, else "not held"
        (which includes an interval that crosses the bound: the claim was not confirmed).

    Raises:
        ValueError: neither bound given, or lower > upper.
    """
    if above is None and below is None:
        raise ValueError("judge needs a bound: above=, below= or both")
    if math.isnan(lower) or math.isnan(upper):
        return "not testable"
    if lower > upper:
        raise ValueError(f"lower must not exceed upper, got {lower} and {upper}")
    held = (above is None or lower > above) and (below is None or upper < below)
    return "held" if held else "not held"


def effect_claim(
    name: str,
    statement: str,
    rule: str,
    verdict: Verdict,
    row: Mapping[str, Any] | pd.Series,
    note: str = "",
    of: str = "difference",
) -> Claim:
    """A claim that rests on one row of a table of levels (`of` "mean") or of paired differences.

    Args:
        name, statement, rule, verdict, note: see `Claim`; the rule is its `measured`.
        row: with the columns `of`, lower, upper, n and n_clusters.
        of: column of the estimate.
    """
    return Claim(
        name,
        statement,
        rule,
        verdict,
        float(row[of]),
        float(row["lower"]),
        float(row["upper"]),
        int(row["n"]),
        int(row["n_clusters"]),
        note,
    )


class ClaimsTable:
    """Claims in the order in which they were added; names are unique."""

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        self._claims: dict[str, Claim] = {}
        for claim in claims:
            self.add(claim)

    def add(self, claim: Claim) -> None:
        """Append a claim.

        Raises:
            ValueError: the name is taken.
        """
        if claim.name in self._claims:
            raise ValueError(f"claim {claim.name} is in the table already")
        self._claims[claim.name] = claim

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._claims.values())

    def __len__(self) -> int:
        return len(self._claims)

    def __getitem__(self, name: str) -> Claim:
        return self._claims[name]

    def frame(self) -> pd.DataFrame:
        """One row per claim, one column per field."""
        return pd.DataFrame([asdict(claim) for claim in self], columns=[field.name for field in fields(Claim)])

    def markdown(self) -> str:
        """A markdown table: claim, what was measured, number, verdict; notes below it."""
        lines = ["| claim | statement | measured | number | verdict |", "|---|---|---|---|---|"]
        for claim in self:
            cells = (claim.name, claim.statement, claim.measured, claim.number, f"**{claim.verdict}**")
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        notes = [f"- {claim.name}: {claim.note}" for claim in self if claim.note]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per claim; NaN as null."""
        return [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
            for row in map(asdict, self)
        ]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> ClaimsTable:
        """The table whose `records` these are."""
        names = [field.name for field in fields(Claim) if field.type == "float"]
        return cls(
            Claim(**{key: math.nan if value is None and key in names else value for key, value in record.items()})
            for record in records
        )

    def write(self, write: Callable[[str, bytes], Path], name: str = "claims") -> list[Path]:
        """Write `name`.csv, `name`.json (NaN as null) and `name`.md.

        Args:
            write: takes a name and the content and gives the path; a run folder's `write`.
            name: of the files, without an ending.
        """
        texts = {
            "csv": self.frame().to_csv(index=False),
            "json": json.dumps(self.records(), indent=2, ensure_ascii=False) + "\n",
            "md": self.markdown() + "\n",
        }
        return [write(f"{name}.{ending}", text.encode()) for ending, text in texts.items()]
