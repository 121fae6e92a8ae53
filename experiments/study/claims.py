"""Published claims as a checklist: what was claimed, what was measured here, and whether it held for this model.

A study makes one `Claim` per statement, with the number that decides it, its interval and how much data is behind it,
and collects them in a `ClaimsTable` that prints as markdown and is written, as CSV and JSON, through the run folder.

A verdict has four values. "held": the whole interval lies on the claimed side (of a claim of absence: within the stated
size). "not held": the whole interval lies on the other side (beyond the size). "undecided": it reaches across, this run
is too small to say. "not testable": the model or the data cannot answer at all. The rules are
`experiments.statistics.equivalence.judge_presence` and `judge_absence`; `effect_claim` takes what they give. Claims of
one table that rest on the same prompts are judged together by `experiments.study.verdicts`.

Knows nothing about models, prompts or particular claims. Not a command: the studies write these tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from experiments.statistics.equivalence import UNDECIDED, Judgement, ThreeWay

__all__ = ["VERDICTS", "Claim", "ClaimsTable", "Verdict", "effect_claim"]

Verdict = ThreeWay
VERDICTS: tuple[Verdict, ...] = get_args(ThreeWay)


@dataclass(frozen=True)
class Claim:
    """One published claim and what became of it.

    Attributes:
        name: short name, such as "C1" or "S7 (KV)"; unique in its table.
        statement: what was claimed, in this project's notation.
        measured: what the number is, and the rule by which it decides.
        verdict: "held", "not held", "undecided" or "not testable" (for the model and data at hand).
        estimate, lower, upper: the number and its interval; NaN where there is none.
        n, n_clusters: prompts and independent clusters behind the number.
        note: why it could not be tested, or what else a reader should know.
        mark: "ceiling", "floor", … if the verdict rests on one: the scale ends there, whatever the mechanism.
        size: bound, or smallest size that matters, that the interval was judged against; NaN: not said.
        family: number of claims that the interval is corrected for; 1: it stands alone.
        corrected: how, such as "max-t, together at 95 %"; "" if it stands alone.
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
    mark: str = ""
    size: float = math.nan
    family: int = 1
    corrected: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")
        if not self.name or not self.statement:
            raise ValueError("a claim needs a name and a statement")
        if self.verdict == "not testable" and not self.note:
            raise ValueError(f"claim {self.name}: say in note why it is not testable")
        if self.verdict != "not testable" and math.isnan(self.estimate):
            raise ValueError(f"claim {self.name}: a verdict of {self.verdict!r} needs the number it rests on")
        if self.family < 1 or (self.family > 1) != bool(self.corrected):
            raise ValueError(f"claim {self.name}: say how it is corrected if and only if its family has several claims")

    @property
    def number(self) -> str:
        """Estimate with interval and n, as text; "–" where nothing was measured."""
        if math.isnan(self.estimate):
            return "–"
        # plus 0.0: no minus before a zero
        estimate, lower, upper = (f"{round(x, 3) + 0.0:.3f}" for x in (self.estimate, self.lower, self.upper))
        interval = "" if math.isnan(self.lower) else f" [{lower}, {upper}]"
        clusters = f" in {self.n_clusters} clusters" if self.n_clusters else ""
        return f"{estimate}{interval}, n = {self.n}{clusters}"

    @property
    def answer(self) -> str:
        """The verdict as it is printed: "undecided at this power", "held (rests on a ceiling)"."""
        name = UNDECIDED if self.verdict == "undecided" else self.verdict
        return f"{name} (rests on a {self.mark})" if self.mark and self.verdict != "not testable" else name

    @property
    def visible(self) -> float:
        """The smallest effect that this run could have told from none: how far its interval reaches from the estimate,
        on the wider side. Infinite or NaN: none."""
        return max(self.estimate - self.lower, self.upper - self.estimate)


def effect_claim(
    name: str,
    statement: str,
    rule: str,
    verdict: Verdict | Judgement,
    row: Mapping[str, Any] | pd.Series,
    note: str = "",
    of: str = "difference",
    corrected: str = "",
) -> Claim:
    """A claim that rests on one row of a table of levels (`of` "mean") or of paired differences.

    Args:
        name, statement, rule, note: see `Claim`; the rule is its `measured`.
        verdict: a word; or what `judge_presence` or `judge_absence` gave: interval, mark, size and family are then the
            judgement's, and the reason of a claim that is not testable is its note.
        row: with the columns `of`, n and n_clusters, and lower and upper unless the verdict is a judgement.
        of: column of the estimate.
        corrected: how the family of the judgement was corrected, see `Claim`.
    """
    estimate, n, n_clusters = float(row[of]), int(row["n"]), int(row["n_clusters"])
    if not isinstance(verdict, Judgement):
        lower, upper = float(row["lower"]), float(row["upper"])
        return Claim(name, statement, rule, verdict, estimate, lower, upper, n, n_clusters, note)
    if verdict.verdict == "not testable":
        note = "; ".join(text for text in (verdict.reason, note) if text)
    return Claim(
        name, statement, rule, verdict.verdict, estimate, verdict.lower, verdict.upper, n, n_clusters, note,
        verdict.mark, verdict.size, verdict.family, corrected,
    )  # fmt: skip


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
        """A markdown table: claim, what was measured, number, smallest effect that could have been seen, verdict; below
        it which claims are corrected together, and notes."""
        lines = ["| claim | statement | measured | number | could be seen | verdict |", "|---|---|---|---|---|---|"]
        for claim in self:
            seen = f"{claim.visible:.3f}" if math.isfinite(claim.visible) else "–"
            cells = (claim.name, claim.statement, claim.measured, claim.number, seen, f"**{claim.answer}**")
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        notes = [*self._families(), *(f"- {claim.name}: {claim.note}" for claim in self if claim.note)]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def _families(self) -> list[str]:
        """One line per family of claims that were corrected together."""
        members: dict[tuple[int, str], list[str]] = {}
        for claim in self:
            if claim.family > 1:
                members.setdefault((claim.family, claim.corrected), []).append(claim.name)
        return [
            f"- Intervals of {', '.join(names)}: {family} claims, {corrected}."
            for (family, corrected), names in members.items()
        ]

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per claim; a number that is not finite is null."""
        return [
            {key: None if value in (math.inf, -math.inf) or value != value else value for key, value in row.items()}
            for row in map(asdict, self)
        ]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> ClaimsTable:
        """The table whose `records` these are."""
        names = [field.name for field in fields(Claim) if field.type == "float"]
        filled: list[dict[str, Any]] = [
            {key: math.nan if value is None and key in names else value for key, value in record.items()}
            for record in records
        ]
        return cls(Claim(**record) for record in filled)

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
