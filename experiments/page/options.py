"""Options of `codi findings` and `codi findings-language`, over the groups of experiments/study/options.py. Free of
torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.page.studies import LANGUAGE_STUDIES, STUDIES, Entry
from experiments.study.options import JudgingOptions, ModelOptions, RunOptions
from lm.places import refuse_missing
from lm.terms import Device, Dtype

__all__ = ["MARKER", "FindingsOptions", "LanguageFindingsOptions", "PageOptions"]

MARKER = "<!-- What follows is written by `codi findings`; what stands above this line is kept. -->"


@dataclass(frozen=True)
class PageOptions(RunOptions):
    """Several studies, and one page with what they found."""

    ENTRIES: ClassVar[tuple[Entry, ...]] = ()
    """The studies that can be run."""

    batch_size: int | None = None  # type: ignore[assignment]
    """Rows computed at once; None: as each study says."""
    page: Path = Path("docs/findings.md")
    """The page (Markdown); its figures go to a folder of the same name beside it."""
    html: Path | None = None
    """Write the page as one HTML file as well, with its figures inside; None: not."""
    only: tuple[str, ...] = ()
    """Run these studies only; of the others the page shows what `out` holds of earlier runs. Empty: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [entry.name for entry in self.ENTRIES]
        for name in self.only:
            if name not in names:
                raise ValueError(f"only names no study: {name!r}; allowed: {', '.join(names)}")

    def check_inputs(self) -> None:
        super().check_inputs()
        check_page(self.page)


@dataclass(frozen=True)
class FindingsOptions(JudgingOptions, PageOptions, ModelOptions):
    """Run every study on one model and collect what they found on one page."""

    COMMAND: ClassVar[str] = "findings"
    ENTRIES: ClassVar[tuple[Entry, ...]] = STUDIES

    out: Path = Path("runs/findings")
    """Folder; each study writes its own run folder in it, which is continued."""
    reach: int | None = None
    """Only problems in which some value is at least this; None: no bound. Not used for templates."""


@dataclass(frozen=True)
class LanguageFindingsOptions(PageOptions):
    """Run every study of ordinary language models on some of them and collect what they found on one page."""

    COMMAND: ClassVar[str] = "findings-language"
    ENTRIES: ClassVar[tuple[Entry, ...]] = LANGUAGE_STUDIES

    out: Path = Path("runs/findings-language")
    """Folder; each study writes a run folder in it for each model, which is continued."""
    models: tuple[str, ...] = ("checkpoints/smollm2", "checkpoints/smollm2-reasoner")
    """Language models: folders, hub ids, .gguf files or folders of adapters; their last names differ."""
    device: Device = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Dtype = "float32"
    """Number format of the models' weights."""
    page: Path = Path("docs/language_models.md")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [Path(model).name for model in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"models must be one or more with different last names, got {', '.join(self.models)}")

    def check_inputs(self) -> None:
        super().check_inputs()
        for model in self.models:
            refuse_missing(model, Path(model).expanduser())


def check_page(page: Path) -> None:
    """Refuse a page that somebody else wrote.

    Raises:
        ValueError: there is such a file, and it has no marker line.
    """
    if page.exists() and MARKER not in page.read_text(encoding="utf-8"):
        raise ValueError(f"{page} is not a page of this command (it has no line {MARKER!r}): choose another --page")
