"""Options of `codi findings` and `codi findings-language`, over the groups of experiments/study/options.py. Free of
torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

import tyro

from experiments.page.studies import LANGUAGE_STUDIES, STUDIES, Entry
from experiments.study.options import JudgingOptions, ModelOptions, RunOptions
from lm.places import refuse_missing
from lm.terms import Device, Dtype

__all__ = ["COMPARISON", "MARKER", "FindingsOptions", "LanguageFindingsOptions", "PageOptions", "check_page"]

MARKER = "<!-- What follows is written by `codi findings`; what stands above this line is kept. -->"
COMPARISON = "<!-- A comparison of several models. -->"
"""Stands below the marker line of a page that compares models."""


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
    run: bool = True
    """Run what is missing; --no-run: only write the pages of what `out` holds."""

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
    """Run every study on one model, or on several beside each other, and write down what they found.

    One model (--model A): one page, docs/findings.md. Several (--model A B C): a page for each beside it
    (docs/findings-A.md), and --page itself compares them: every claim on every model with number and interval, where
    they agree, what is found in one alone, and whether steering ever helps. Run folders of several models are
    OUT/MODEL-STUDY; folders OUT/STUDY of earlier runs on one of them are found and continued. A study that cannot be
    made on a model is named with the reason, and its claims are not testable there. A model that was trained on a
    generated task of its own (codi.json says which) is asked problems of that task.
    """

    COMMAND: ClassVar[str] = "findings"
    ENTRIES: ClassVar[tuple[Entry, ...]] = STUDIES
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 1}

    model: Annotated[str | tuple[str, ...], tyro.conf.arg(metavar="MODEL …")] = "checkpoints/tiny"  # type: ignore[assignment]
    """One checkpoint or several: folders or hub ids such as bcywinski/codi_llama1b-answer_only; their last names
    differ."""
    out: Path = Path("runs/findings")
    """Folder; each study writes its own run folder in it, which is continued."""
    reach: int | None = None
    """Only problems in which some value is at least this; None: no bound. Not used for templates."""
    limit: int | None = None
    """Number of evaluation prompts of every study, for a quick look or a large model; None: as each study says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.model, str):
            if len(self.model) == 1:
                object.__setattr__(self, "model", self.model[0])
            else:
                _check_names("model", self.model)

    @property
    def models(self) -> tuple[str, ...]:
        """The models, one or several."""
        return (self.model,) if isinstance(self.model, str) else self.model

    def on(self, model: str) -> Self:
        """The options of one of several models, with a page of its own."""
        return dataclasses.replace(self, model=model, page=self.page_of(model), html=_beside(self.html, model))

    def page_of(self, model: str) -> Path:
        """The page of one of several models: docs/findings.md -> docs/findings-tiny.md."""
        page = _beside(self.page, model)
        assert page is not None
        return page

    def check_inputs(self) -> None:
        if isinstance(self.model, str):
            super().check_inputs()
            return
        check_page(self.page)
        for model in self.models:
            self.on(model).check_inputs()


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
        _check_names("models", self.models)

    def check_inputs(self) -> None:
        super().check_inputs()
        for model in self.models:
            refuse_missing(model, Path(model).expanduser())


def _check_names(option: str, models: Sequence[str]) -> None:
    names = [Path(model).name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{option} must be one or more with different last names, got {', '.join(models) or 'none'}")


def _beside(path: Path | None, model: str) -> Path | None:
    """A file of the same kind beside it, named after a model as well."""
    return None if path is None else path.with_name(f"{path.stem}-{Path(model).name}{path.suffix}")


def check_page(page: Path) -> None:
    """Refuse a page that somebody else wrote.

    Raises:
        ValueError: there is such a file, and it has no marker line.
    """
    if page.exists() and MARKER not in page.read_text(encoding="utf-8"):
        raise ValueError(f"{page} is not a page of this command (it has no line {MARKER!r}): choose another --page")
