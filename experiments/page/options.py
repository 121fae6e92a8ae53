"""Options of `codi findings`, a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.page.studies import STUDIES
from experiments.study.options import JudgingOptions, ModelOptions, RunOptions

__all__ = ["MARKER", "FindingsOptions"]

MARKER = "<!-- What follows is written by `codi findings`; what stands above this line is kept. -->"


@dataclass(frozen=True)
class FindingsOptions(JudgingOptions, RunOptions, ModelOptions):
    """Run every study on one model and collect what they found on one page."""

    COMMAND: ClassVar[str] = "findings"

    out: Path = Path("runs/findings")
    """Folder; each study writes its own run folder in it, which is continued."""
    batch_size: int | None = None  # type: ignore[assignment]
    """Rows computed at once; None: as each study says."""
    reach: int | None = None
    """Only problems in which some value is at least this; None: no bound. Not used for templates."""
    page: Path = Path("docs/findings.md")
    """The page (Markdown); its figures go to a folder of the same name beside it."""
    html: Path | None = None
    """Write the page as one HTML file as well, with its figures inside; None: not."""
    only: tuple[str, ...] = ()
    """Run these studies only; of the others the page shows what `out` holds of earlier runs. Empty: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [entry.name for entry in STUDIES]
        for name in self.only:
            if name not in names:
                raise ValueError(f"only names no study: {name!r}; allowed: {', '.join(names)}")

    def check_inputs(self) -> None:
        super().check_inputs()
        check_page(self.page)


def check_page(page: Path) -> None:
    """Refuse a page that somebody else wrote.

    Raises:
        ValueError: there is such a file, and it has no marker line.
    """
    if page.exists() and MARKER not in page.read_text(encoding="utf-8"):
        raise ValueError(f"{page} is not a page of this command (it has no line {MARKER!r}): choose another --page")
