"""The page that compares models: every claim on every model, where they agree, and what is found in one alone.

    models        what they are and how they were trained, with their own pages
    steering      does it ever help, on each model (claims of the sweep)
    in one alone  held in one model, not held in every other that decides
    agreement     of every two models, over the claims that both decide
    claims        study × claim × model: verdict, number, interval

Everything comes from the results that the models' own pages show, nothing is computed anew. Verdicts are compared as
they stand: intervals are corrected within a study on one model, not over models. Knows nothing about what a study does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.page.markdown import NOT_RUN, VERDICT_WORDS, Found, counts, row, write_below
from experiments.page.options import COMPARISON, MARKER
from experiments.study.claims import Claim
from experiments.study.folder import write_whole

__all__ = ["Column", "Line", "agreement", "alone", "holds_comparison", "lines_of", "move_words", "write_comparison"]

STEERING = "sweep"
"""Command of the study whose claims say whether steering helps."""
DECIDED = ("held", "not held")


@dataclass(frozen=True)
class Column:
    """One model of a comparison.

    Attributes:
        model: folder or hub id.
        page: its own page.
        known: of every study, in the order of the page.
        told: how it was trained, in words; "": not said.
    """

    model: str
    page: Path
    known: tuple[Found, ...]
    told: str = ""

    @property
    def label(self) -> str:
        """Its name in tables."""
        return Path(self.model).name


@dataclass(frozen=True)
class Line:
    """One claim on all models.

    Attributes:
        study: command, as it is printed.
        command: the whole command: the same study with other options is another one.
        name, statement: of the claim.
        claims: label of a model -> the claim there, where it was judged.
        cells: label -> what the table says, one for every model.
    """

    study: str
    command: tuple[str, ...]
    name: str
    statement: str
    claims: Mapping[str, Claim]
    cells: Mapping[str, str]

    def verdict(self, label: str) -> str:
        """What is decided on a model, held or not held; "": nothing is."""
        claim = self.claims.get(label)
        return claim.verdict if claim is not None and claim.verdict in DECIDED else ""


def lines_of(columns: Sequence[Column]) -> list[Line]:
    """Every claim that any model has, in the order of the studies."""
    found: dict[tuple[tuple[str, ...], str], dict[str, Claim]] = {}
    commands = list(dict.fromkeys(one.entry.command for column in columns for one in column.known))
    studies = {(column.label, one.entry.command): one for column in columns for one in column.known}
    for command in commands:
        for column in columns:
            one = studies.get((column.label, command))
            for claim in (one.result.claims if one and one.result else None) or ():
                found.setdefault((command, claim.name), {})[column.label] = claim
    return [
        Line(
            next(one.entry.words for (_, asked), one in studies.items() if asked == command),
            command,
            name,
            next(iter(claims.values())).statement,
            claims,
            {c.label: _cell(claims.get(c.label), studies.get((c.label, command))) for c in columns},
        )
        for (command, name), claims in found.items()
    ]


def _cell(claim: Claim | None, study: Found | None) -> str:
    if claim is None:
        refused = study is not None and study.lacking.startswith(NOT_RUN)
        return "**not testable** (not run)" if refused else "–"
    if claim.verdict == "not testable":
        return f"**{claim.answer}**"
    return f"**{claim.answer}** {claim.number}"


# --- What the verdicts have in common ---------------------------------------------------------------------------------


def agreement(line: Line) -> str:
    """Whether the models that decide a claim agree, in words; "–": fewer than two decide it."""
    verdicts = {label: line.verdict(label) for label in line.cells if line.verdict(label)}
    if len(verdicts) < 2:
        return "–"
    if len(set(verdicts.values())) == 1:
        return f"agree: {next(iter(verdicts.values()))} ({len(verdicts)} of {len(line.cells)})"
    sides = (", ".join(label for label, verdict in verdicts.items() if verdict == side) for side in DECIDED)
    return "differ: held in {}; not held in {}".format(*sides)


def alone(lines: Sequence[Line], label: str) -> list[Line]:
    """Claims that are held on one model and not held on every other model that decides them, at least one."""
    chosen = []
    for line in lines:
        others = [line.verdict(other) for other in line.cells if other != label and line.verdict(other)]
        if line.verdict(label) == "held" and others and set(others) == {"not held"}:
            chosen.append(line)
    return chosen


def _pairs(lines: Sequence[Line], labels: Sequence[str]) -> Iterator[str]:
    """Agreement of every two models, over the claims that both decide."""
    for one, other in itertools.combinations(labels, 2):
        both = [line for line in lines if line.verdict(one) and line.verdict(other)]
        same = sum(line.verdict(one) == line.verdict(other) for line in both)
        yield row(one, other, str(len(both)), f"{same} ({100 * same / len(both):.0f} %)" if both else "–")


# --- The page ---------------------------------------------------------------------------------------------------------

_CELLS = (
    "A cell without a number: **not testable** says that model or data cannot answer (why stands on the model's page),",
    "**not testable** (not run) that the study cannot be made on the model (why stands below the table), – that the",
    "study ran without such a claim or was not run yet. Intervals are corrected within a study on one model, not over",
    "models: among so many claims some differ by chance alone.",
)


def write_comparison(page: Path, columns: Sequence[Column], above: Sequence[str] = ()) -> str:
    """Write the page that compares models.

    Args:
        page: its file; what stands above the marker line is kept.
        columns: the models.
        above: lines of Markdown that come first.

    Returns:
        The page.

    Raises:
        ValueError, OSError: as `write_below`.
    """
    lines = lines_of(columns)
    labels = [column.label for column in columns]
    parts = [COMPARISON, "", *above, *_models(page, columns), *_steering(lines, columns), *_alone(lines, columns)]
    parts += ["## Agreement", "", "Of every two models, over the claims that both decide (held or not held).", ""]
    parts += ["| model | model | decided by both | agree |", "|---|---|---|---|", *_pairs(lines, labels), ""]
    parts += ["## Claims by model", "", *VERDICT_WORDS, "", *_CELLS, ""]
    if lines:
        parts += [row("study", "claim", "statement", *labels, "agreement"), "|---" * (len(labels) + 4) + "|"]
        for line in lines:
            cells = (line.cells[label] for label in labels)
            parts.append(row(f"`{line.study}`", line.name, line.statement, *cells, agreement(line)))
    else:
        parts.append("No study has judged a claim yet.")
    parts += ["", *_refused(columns)]
    return write_below(page, parts, f"What the studies show: {', '.join(labels)}")


def _models(page: Path, columns: Sequence[Column]) -> list[str]:
    rows = []
    for column in columns:
        ran = sum(one.result is not None for one in column.known)
        rows.append(row(
            f"[{column.label}]({_link(page, column.page)})", f"`{column.model}`", column.told or "not said",
            f"{ran} of {len(column.known)}", counts(column.known).rstrip("."),
        ))  # fmt: skip
    head = ["| model | checkpoint | trained on; guided | studies | claims |", "|---|---|---|---|---|"]
    words = (
        "A model that was trained on a task of its own is asked problems of that task: its verdicts are about other",
        "prompts as well as another model.",
    )
    return ["## Models", "", *words, "", *head, *rows, ""]


def _link(page: Path, other: Path) -> str:
    return other.name if other.parent == page.parent else str(other)


def _steering(lines: Sequence[Line], columns: Sequence[Column]) -> list[str]:
    """The claims of the sweep, model by model, with what could have been found."""
    own = [line for line in lines if line.study == STEERING]
    if not own:
        return []
    parts = [
        "## Does steering ever help?", "",
        "Adding differences of mean latents, every pair, latent and coefficient of the sweep at once, beside random",
        "directions of the same norm. The number is the largest gain of any edit, with the interval of that largest",
        "gain.", "",
        "| model | claim | verdict | gain of the best edit | what this sweep could see |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for column in columns:
        for line in own:
            claim = line.claims.get(column.label)
            if claim is None:
                parts.append(row(column.label, f"{line.name}: {line.statement}", line.cells[column.label], "–", "–"))
                continue
            parts.append(row(
                column.label, f"{line.name}: {line.statement}", f"**{claim.answer}**", claim.number, claim.note
            ))  # fmt: skip
    return [*parts, ""]


def _alone(lines: Sequence[Line], columns: Sequence[Column]) -> list[str]:
    """Findings of one model, model by model."""
    parts = [
        "## Found in one model alone", "",
        "Held on this model, and not held on every other model that decides the claim (at least one). What the others",
        "leave undecided is not counted as absent there.", "",
    ]  # fmt: skip
    for column in columns:
        own = alone(lines, column.label)
        number = f"{len(own)} claim" + ("" if len(own) == 1 else "s")
        parts += [f"**{column.label}**" + (f" ({column.told})" if column.told else "") + f": {number}."]
        parts += ["", *(f"- `{line.study}`, {line.name}: {line.statement} ({_numbers(line)})" for line in own)]
        parts += [""] if own else []
    return parts


def _numbers(line: Line) -> str:
    return "; ".join(
        f"{label} {claim.verdict}, {claim.number}" for label, claim in line.claims.items() if line.verdict(label)
    )


def _refused(columns: Sequence[Column]) -> list[str]:
    """Studies that could not be made, a line each."""
    said = [
        f"- `codi {one.entry.words}` on {column.label}: {one.lacking.removeprefix(NOT_RUN)}"
        for column in columns
        for one in column.known
        if one.lacking
    ]
    return ["## Studies that are missing", "", *said, ""] if said else []


# --- Pages of before --------------------------------------------------------------------------------------------------


def holds_comparison(page: Path) -> bool:
    """Whether a page is one that compares models."""
    return page.is_file() and COMPARISON in page.read_text(encoding="utf-8")


def move_words(page: Path, pages: Mapping[str, Path]) -> list[str]:
    """Where the page of a comparison is the page of one of the models so far: make it that model's own page.

    What a person wrote above the marker line is about that model and goes with it. Pictures stay where they are. A page
    that is there already is left alone, and so is one about several models.

    Args:
        page: of the comparison.
        pages: model -> its own page.

    Returns:
        What was done, a line each.
    """
    if not page.is_file() or holds_comparison(page):
        return []
    text = page.read_text(encoding="utf-8")
    about = {Path(name).name for name in re.findall(r"^### .+: (\S+)$", text.partition(MARKER)[2], flags=re.M)}
    own = [place for model, place in pages.items() if {Path(model).name} == about]
    if not own or own[0].exists():
        return []
    write_whole(own[0], text.encode())
    page.unlink()
    return [f"{page} was the page of {about.pop()}: it is {own[0]} now, with its words"]
