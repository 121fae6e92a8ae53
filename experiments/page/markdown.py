"""The page of findings in Markdown, from what the run folders of the studies hold: result.json and nothing else.

On top stand the claims of all studies in one table, then a section per study, its headings two levels lower, its
figures copied beside the page with their captions. A study that was refused is named with the reason; a folder without
a result says which command has to be run again. Knows nothing about models, nor about what a study does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from experiments.page.options import MARKER, check_page
from experiments.page.studies import Entry
from experiments.study.claims import VERDICTS
from experiments.study.folder import write_whole
from experiments.study.result import FILE, FigureFiles, Result, Section

__all__ = [
    "NOT_RUN", "REFUSED", "VERDICT_WORDS", "Found", "claims_table", "counts", "demoted", "found", "pictures_of",
    "refusals", "row", "section", "write_below", "write_page",
]  # fmt: skip

REFUSED = "refused.json"
"""In the folder of all studies: name of a study -> why it could not be made on this model."""
NOT_RUN = "Not run on this model: "
"""Begins what is said of a study that was refused."""


@dataclass(frozen=True)
class Found:
    """What is known of one study.

    Attributes:
        entry: which.
        result: what it found; None: nothing to be shown.
        lacking: why there is no result, in a sentence; "": it was not asked for yet, or there is one.
    """

    entry: Entry
    result: Result | None = None
    lacking: str = ""


def refusals(out: Path) -> dict[str, str]:
    """Studies that could not be made, with the reasons."""
    file = out / REFUSED
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def found(out: Path, entries: Sequence[Entry]) -> list[Found]:
    """What the run folders under `out` hold."""
    known, refused = [], refusals(out)
    for entry in entries:
        folder = out / entry.name
        if (folder / FILE).exists():
            try:
                known.append(Found(entry, Result.read(folder)))
            except ValueError as error:
                known.append(Found(entry, lacking=f"{error}."))
        elif entry.name in refused:
            known.append(Found(entry, lacking=f"{NOT_RUN}{refused[entry.name]}"))
        elif (folder / "manifest.json").exists() or (folder / "printed.md").exists():
            again = f"run `codi {entry.words}` (or `codi findings --only {entry.name}`) again"
            known.append(
                Found(entry, lacking=f"The run folder has no {FILE}, its run was not finished or is old: {again}.")
            )
        else:
            known.append(Found(entry))
    return known


def demoted(text: str) -> str:
    """Markdown as part of a page: headings two levels lower, fenced text as it is."""
    lines, fenced = [], False
    for line in text.strip().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        lines.append(line if fenced else re.sub(r"^(?=#{1,4} )", "##", line))
    return "\n".join(lines)


def shown(section: Section) -> str:
    """One section of a result, as part of a page."""
    if section.form == "plain":
        head = f"**{section.heading}.**\n\n" if section.heading else ""
        return f"{head}```text\n{section.text.strip(chr(10))}\n```"
    return demoted(section.markdown())


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def claims_table(known: Sequence[Found]) -> list[str]:
    """The claims of all studies in one Markdown table; no lines if there are none."""
    rows = []
    for one in known:
        for claim in (one.result.claims if one.result else None) or ():
            number = "–" if claim.verdict == "not testable" else claim.number
            rows.append(row(one.entry.called(), claim.name, claim.statement, number, f"**{claim.answer}**"))
    return ["| study | claim | statement | number | verdict |", "|---|---|---|---|---|", *rows] if rows else []


VERDICT_WORDS = (
    "**Held**: the whole interval lies on the claimed side; of a claim that something is absent, within the size that",
    "its rule states. **Not held**: the whole interval lies on the other side, or beyond that size. **Undecided**: it",
    "reaches across, so that this run is too small to say. **Not testable**: model or data cannot answer at all. Where",
    "claims of one study rest on the same prompts, their intervals are corrected to hold all at once; which these are,",
    "how they are corrected, the rule and the notes of each claim stand in the section of its study.",
)


def counts(known: Sequence[Found]) -> str:
    """How many claims got which verdict."""
    verdicts = [claim.verdict for one in known for claim in (one.result.claims if one.result else None) or ()]
    return f"{len(verdicts)} claims: " + ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS) + "."


def section(one: Found, figures: Mapping[str, str]) -> list[str]:
    """The part of the page about one study; no lines if nothing is known of it.

    Args:
        one: the study.
        figures: name of a figure -> where the page finds its picture.
    """
    head = [f"## {one.entry.called('codi ')}", "", one.entry.question, ""]
    if one.lacking:
        return [*head, one.lacking, ""]
    if one.result is None:
        return []
    parts = [f"### {one.result.title}: {one.result.model}", *map(shown, one.result.sections)]
    if one.result.claims is not None:
        parts += ["#### Published claims", one.result.claims.markdown()]
    captions = {figure.name: figure.caption for figure in one.result.figures}
    for name, place in figures.items():
        parts.append(f"![{one.entry.name}: {name.replace('_', ' ')}]({place})")
        if captions.get(name):
            parts.append(f"*{captions[name]}*")
    return [*head, *(line for part in parts for line in (part, ""))]


def pictures(one: Found) -> list[FigureFiles]:
    """The figures of a study that the page shows."""
    there = one.result.figures if one.result else ()
    return [figure for name in one.entry.figures for figure in there if fnmatchcase(figure.name, name)]


def pictures_of(page: Path, one: Found) -> dict[str, str]:
    """Copy the figures of a study beside the page: name of each -> where the page finds it."""
    places = {}
    for figure in pictures(one):
        assert one.result is not None
        picture = next(file for file in figure.files if file.endswith(".png"))
        target = page.with_suffix("") / f"{one.entry.name}-{figure.name}.png"
        write_whole(target, (one.result.path / picture).read_bytes())
        places[figure.name] = f"{page.stem}/{target.name}"
    return places


def write_below(page: Path, lines: Sequence[str], title: str) -> str:
    """Write a page anew below its marker line.

    Args:
        page: its file; what stands above the marker line is kept.
        lines: what stands below it.
        title: of a new page.

    Returns:
        The page.

    Raises:
        ValueError: the file is somebody else's.
        OSError: it cannot be written.
    """
    check_page(page)
    before = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n\n{MARKER}\n"
    text = "\n".join([before.split(MARKER)[0].rstrip(), "", MARKER, "", *lines]).rstrip() + "\n"
    write_whole(page, text.encode())
    return text


def write_page(page: Path, known: Sequence[Found], model: str) -> str:
    """Write the page of one model (or of ordinary language models) and copy its figures.

    Args:
        page: its file; what stands above the marker line is kept.
        known: of every study, in the order of the page.
        model: for the title of a new page.

    Returns:
        The page.

    Raises:
        ValueError, OSError: as `write_below`.
    """
    check_page(page)
    parts: list[str] = []
    claims = claims_table(known)
    if claims:
        parts += ["## Published claims", "", *VERDICT_WORDS, "", counts(known), "", *claims, ""]
    for one in known:
        parts += section(one, pictures_of(page, one))
    return write_below(page, parts, f"What the studies show: {model}")
