"""`codi findings`: every study on one model, one after another, and one page with what they found.

    codi findings                                   # the model in the box -> runs/findings, docs/findings.md
    codi findings --model bcywinski/codi_llama1b-answer_only --out runs/llama --page runs/llama/findings.md
    codi findings-language                          # ordinary language models -> docs/language_models.md

Each study runs as its command would, with its defaults, in a run folder of its own under `out`, all of them in this
process: the model is loaded once for each implementation of attention that they need. The page is made from their
results (markdown.py, html.py) and written anew after every study. A study that cannot be made on a model is named on
the page with the reason; the others go on. The same command continues an interrupted run.

Knows nothing about what a study does, and imports none: studies are found by the names of their commands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.commands import COMMANDS, study_of
from experiments.page.html import as_html
from experiments.page.markdown import REFUSED, found, refusals, write_page
from experiments.page.options import FindingsOptions, LanguageFindingsOptions, PageOptions
from experiments.page.studies import LANGUAGE_STUDIES, STUDIES, Entry
from experiments.study.folder import write_whole
from experiments.study.language import LanguageOptions
from experiments.study.options import JudgingOptions, ModelOptions, Options, RunOptions, changed
from experiments.study.result import FILE, Result
from experiments.study.run import Study, run_study, to_stderr
from lm.terms import Attention

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["Models", "main", "options_of", "run"]

SHARED = {one.name for group in (ModelOptions, RunOptions) for one in fields(group)} - {"out"} | {"reach"}
"""Options that are handed on to every study where they are not at their default."""
JUDGING = {one.name for one in fields(JudgingOptions)}
"""Options that are handed on to the studies that judge answers."""


class Models:
    """The model, loaded once for each implementation of attention, when it is first needed."""

    def __init__(self) -> None:
        self._loaded: dict[str, LanguageModel] = {}

    def get(self, options: ModelOptions | LanguageOptions, attention: Attention) -> LanguageModel:
        """The model that the options ask for.

        Raises:
            ValueError: it cannot be loaded.
        """
        key = json.dumps(options.load_arguments(attention), sort_keys=True)
        if key not in self._loaded:
            self._loaded[key] = options.load(attention)
        return self._loaded[key]


def arguments(options: PageOptions, entry: Entry) -> list[str]:
    """The command line of one study after its first word: only what is not its default, and where it writes."""
    given = list(entry.command[1:])
    for name, value in changed(options).items():
        if name in SHARED or (name in JUDGING and issubclass(entry.options, JudgingOptions)):
            given += [f"--{name.replace('_', '-')}", str(value)]
    if entry.model:
        given += ["--model", entry.model]
    for option, study in entry.reads:
        given += [option, str(options.out / study)]
    return [*given, "--out", str(options.out / entry.name)]


def options_of(options: PageOptions, entry: Entry) -> Any:
    """The options of one study.

    Raises:
        ValueError: the study has no such option, or does not allow the value.
    """
    from experiments.cli import parse

    return parse(COMMANDS[entry.command[0]].load_options(), arguments(options, entry), f"codi {entry.command[0]}")


def run(entry: Entry, options: PageOptions, models: Models, say: Callable[[str], None]) -> Result:
    """Run one study, or go on with it.

    Raises:
        ValueError: it is refused: an option, the model or the run folder does not fit.
    """
    study = study_of(entry.words)
    asked: Options = options_of(options, entry)
    asked.check_inputs()
    assert isinstance(asked, ModelOptions | LanguageOptions)
    if isinstance(study, Study):
        return run_study(study, asked, models.get(asked, study.attention), say=say)
    return study(asked, model=models.get(asked, "sdpa"), say=say)


def main(options: FindingsOptions) -> None:
    """Run the studies and write the page.

    Raises:
        ValueError: the model cannot be loaded, `page` is somebody else's file, a run folder holds another run, or no
            study could be made on this model.
    """
    models = Models()
    models.get(options, "sdpa")  # a model that is not there is refused once, and now
    collect(options, STUDIES, models, options.model)


def main_language(options: LanguageFindingsOptions) -> None:
    """The same for ordinary language models, study by study, each on every model.

    Raises:
        ValueError: as `main`.
    """
    pairs = [(entry, model) for entry in LANGUAGE_STUDIES for model in options.models]
    chosen = [entry.on(model).name for entry, model in pairs if not options.only or entry.name in options.only]
    title = ", ".join(Path(model).name for model in options.models)
    collect(options, [entry.on(model) for entry, model in pairs], Models(), title, chosen)


def collect(
    options: PageOptions, entries: Sequence[Entry], models: Models, title: str, only: Sequence[str] = ()
) -> None:
    """Run studies one after another, and write the page anew after each.

    Args:
        options: where results and page go.
        entries: all studies of the page, in its order.
        models: where models are kept.
        title: models of the page, in words.
        only: names of the entries that are run; empty: those of the options, or all.
    """
    wanted = tuple(only) or options.only
    chosen = [entry for entry in entries if not wanted or entry.name in wanted]
    page = ""
    for entry in chosen:
        to_stderr(f"\n=== codi {' '.join([entry.command[0], *arguments(options, entry)])}")
        refused, reason = refusals(options.out), ""
        try:
            run(entry, options, models, to_stderr)
        except ValueError as error:
            reason = re.sub(r"; see codi .* --help$", "", " ".join(str(error).split()))
            if (options.out / entry.name / "manifest.json").exists():  # not the model is refused but folder or option
                raise ValueError(f"codi {entry.words}: {reason}") from error
            to_stderr(f"not run: {reason}")
        if reason or entry.name in refused:
            kept = {name: why for name, why in refused.items() if name != entry.name}
            record = {**kept, entry.name: reason} if reason else kept
            write_whole(options.out / REFUSED, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        page = write_page(options.page, found(options.out, entries), title)
    if options.html is not None:
        write_whole(options.html, as_html(page, options.page.parent).encode())
    refused = refusals(options.out)
    named = [entry.name for entry in chosen if entry.name in refused]
    if len(named) == len(chosen):
        raise ValueError(f"no study could be run on {title}: {refused[named[-1]]}")
    assert all((options.out / entry.name / FILE).exists() for entry in chosen if entry.name not in named)
    where = f"{options.page}" if options.html is None else f"{options.page}, and {options.html}"
    print(f"{len(chosen) - len(named)} studies in {options.out}; the page is {where}")
    if named:
        print(f"not run on {title}, see the page: {', '.join(named)}")


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
