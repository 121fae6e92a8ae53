"""`codi findings`: every study on one model, or on several, one after another, and pages with what they found.

    codi findings                                   # the model in the box -> runs/findings, docs/findings.md
    codi findings --model bcywinski/codi_llama1b-answer_only --out runs/llama --page runs/llama/findings.md
    codi findings --model checkpoints/tiny checkpoints/plain    # docs/findings-tiny.md, …; docs/findings.md compares
    codi findings-language                          # ordinary language models -> docs/language_models.md

Each study runs as its command would, with its defaults, in a run folder of its own under `out`, all of them in this
process: the model is loaded once for each implementation of attention that they need. The page is made from their
results (markdown.py, html.py; comparison.py for several models) and written anew after every study. A study that cannot
be made on a model is named on the page with the reason; the others go on. The same command continues an interrupted
run.

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
from experiments.page.comparison import Column, holds_comparison, move_words, write_comparison
from experiments.page.html import as_html
from experiments.page.markdown import REFUSED, found, refusals, write_page
from experiments.page.options import FindingsOptions, LanguageFindingsOptions, PageOptions
from experiments.page.studies import LANGUAGE_STUDIES, STUDIES, Entry
from experiments.study.folder import write_whole
from experiments.study.language import LanguageOptions
from experiments.study.manifest import read_manifest
from experiments.study.options import JudgingOptions, ModelOptions, Options, RunOptions, changed
from experiments.study.result import FILE, Result
from experiments.study.run import Study, run_study, to_stderr
from experiments.tasks import TASK_NAMES
from lm.terms import Attention

if TYPE_CHECKING:
    from lm.model import LanguageModel

__all__ = ["Models", "compare", "main", "options_of", "run"]

SHARED = {one.name for group in (ModelOptions, RunOptions) for one in fields(group)} - {"out"} | {"reach"}
"""Options that are handed on to every study where they are not at their default."""
JUDGING = {one.name for one in fields(JudgingOptions)}
"""Options that are handed on to the studies that judge answers."""
GUIDES = {"step_weight": "step term", "decoder_weight": "decoder of steps"}
"""Weights of a training record that guide single latents, with what they weigh."""
DEFAULT_DATA = "arithmetic"
"""Training data of models that every study has its default task for."""


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
    of_page = {one.name: getattr(options, one.name, one.default) for one in fields(ModelOptions)}
    other = {one.name: of_page[one.name] for one in fields(ModelOptions) if of_page[one.name] != one.default}
    for name, value in (changed(options) | other).items():  # a page's default may be another than that of studies
        option = f"--{name.replace('_', '-')}"
        if option in given or (name == "model" and entry.model):  # the entry says it
            continue
        if name in SHARED or (name in JUDGING and issubclass(entry.options, JudgingOptions)):
            given += [option, str(value)]
    if isinstance(options, FindingsOptions):
        own = {one.name for one in fields(entry.options)}
        if options.limit is not None and "limit" in own:
            given = _with(given, "--limit", str(options.limit))
        task = trained_on(options)
        if task and "task" in own and "--task" not in given:
            given += ["--task", task]
    if entry.model:
        given += ["--model", entry.model]
    for option, study in entry.reads:
        given += [option, str(options.out / study)]
    return [*given, "--out", str(options.out / entry.name)]


def _with(given: list[str], option: str, value: str) -> list[str]:
    """A command line with an option of one value, in the place of that which it had."""
    if option in given:
        at = given.index(option)
        return [*given[: at + 1], value, *given[at + 2 :]]
    return [*given, option, value]


def trained_on(options: FindingsOptions) -> str:
    """The generated task that the model was trained on, by the codi.json in its folder; "": the default one, or none
    that could be generated."""
    training = options.recorded("training")
    task = training.get("data") if isinstance(training, dict) else None
    known = isinstance(task, str) and task.split(":")[0] in TASK_NAMES
    return str(task) if known and task != DEFAULT_DATA else ""


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
    """Run the studies and write the page, or the pages.

    Raises:
        ValueError: the model cannot be loaded, `page` is somebody else's file, a run folder holds another run, or no
            study could be made on this model.
    """
    if len(options.models) > 1:
        compare(options, [options.on(model) for model in options.models], STUDIES)
        return
    models = Models()
    if options.run:
        models.get(options, "sdpa")  # a model that is not there is refused once, and now
    if holds_comparison(options.page):
        to_stderr(f"{options.page} compares several models and is left as it is")
        options = options.on(options.models[0])
        options.check_inputs()
    entries = [entry for entry in fitting(options, STUDIES) if not entry.compared or entry.name in options.only]
    collect(options, entries, models, options.models[0])


def compare(
    options: FindingsOptions,
    each: Sequence[FindingsOptions],
    entries: Sequence[Entry],
    above: Callable[[Sequence[Column]], list[str]] = lambda columns: [],
) -> None:
    """Run the studies on several models, one after another; a page for each, and one that compares them.

    Args:
        options: of all of them; where the comparison goes.
        each: options of every model, with a page of its own.
        entries: the studies.
        above: makes lines of Markdown that open the comparison, before the claims.

    Raises:
        ValueError: a model cannot be loaded, a page is somebody else's file, or a run folder holds another run.
    """
    if options.run:
        for one in each:
            Models().get(one, "sdpa")  # what cannot be loaded is refused before anything is computed
    for words in move_words(options.page, {one.models[0]: one.page for one in each}):
        to_stderr(words)
    text = ""
    for one in each:
        model = one.models[0]
        mine = fitting(one, entries)
        own = _entries(one, mine)
        asked = [on.name for entry, on in zip(mine, own, strict=True) if not one.only or entry.name in one.only]
        collect(one, own, Models(), model, asked, alone=False)
        columns = [
            Column(o.models[0], o.page, tuple(found(o.out, _entries(o, fitting(o, entries)))), told(o)) for o in each
        ]
        text = write_comparison(options.page, columns, above(columns))
    if options.html is not None:
        write_whole(options.html, as_html(text, options.page.parent).encode())
    print(f"the comparison of {', '.join(Path(one.models[0]).name for one in each)} is {options.page}")


def fitting(options: FindingsOptions, entries: Sequence[Entry]) -> list[Entry]:
    """The studies but for those of a task that this model was not trained on, unless they are asked for."""
    task = trained_on(options).split(":")[0]
    return [entry for entry in entries if entry.of_task in ("", task) or entry.name in options.only]


def _entries(options: FindingsOptions, entries: Sequence[Entry]) -> list[Entry]:
    """The studies on one of several models, each in the folder that holds it already if there is one."""
    model = options.models[0]
    plain = {
        entry.name
        for entry in entries
        if not (options.out / entry.on(model).name).exists() and _is_about(options.out / entry.name, model)
    }
    return [entry.on(model, plain) for entry in entries]


def _is_about(folder: Path, model: str) -> bool:
    """Whether a run folder is that of a study of this model."""
    if not (folder / "manifest.json").exists():
        return False
    said = str(read_manifest(folder).get("model", ""))
    return Path(said).expanduser().resolve() == Path(model).expanduser().resolve()


def told(options: FindingsOptions) -> str:
    """How a model was trained, by the codi.json in its folder, in words; "": it does not say."""
    training = options.recorded("training")
    if not isinstance(training, dict):
        return ""
    guided = {name: value for name, value in training.items() if name in GUIDES and value}
    how = ", ".join(f"{GUIDES[name]} ({value:g})" for name, value in guided.items())
    data = [str(training["data"])] if training.get("data") else []
    return "; ".join([*data, f"guided by: {how}" if how else "no guidance of single latents"])


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
    options: PageOptions,
    entries: Sequence[Entry],
    models: Models,
    title: str,
    only: Sequence[str] = (),
    alone: bool = True,
) -> None:
    """Run studies one after another, and write the page anew after each.

    Args:
        options: where results and page go.
        entries: all studies of the page, in its order.
        models: where models are kept.
        title: models of the page, in words.
        only: names of the entries that are run; empty: those of the options, or all.
        alone: the page is all there is: it is an error if no study could be run.
    """
    wanted = tuple(only) or options.only
    chosen = [entry for entry in entries if not wanted or entry.name in wanted] if options.run else []
    page = ""
    for entry in chosen:
        to_stderr(f"\n=== codi {' '.join([entry.command[0], *arguments(options, entry)])}")
        refused, reason = refusals(options.out), ""
        try:
            run(entry, options, models, to_stderr)
        except ValueError as error:
            reason = re.sub(r"; see codi .* --help$", "", " ".join(str(error).split()))
            if (options.out / entry.name / ("manifest.json" if alone else FILE)).exists():  # not the model
                raise ValueError(f"codi {entry.words}: {reason}") from error
            to_stderr(f"not run: {reason}")
        if reason or entry.name in refused:
            kept = {name: why for name, why in refused.items() if name != entry.name}
            record = {**kept, entry.name: reason} if reason else kept
            write_whole(options.out / REFUSED, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        page = write_page(options.page, found(options.out, entries), title)
    if not chosen:
        page = write_page(options.page, found(options.out, entries), title)
    if options.html is not None:
        write_whole(options.html, as_html(page, options.page.parent).encode())
    refused = refusals(options.out)
    named = [entry.name for entry in chosen if entry.name in refused]
    if alone and chosen and len(named) == len(chosen):
        raise ValueError(f"no study could be run on {title}: {refused[named[-1]]}")
    assert all((options.out / entry.name / FILE).exists() for entry in chosen if entry.name not in named)
    where = f"{options.page}" if options.html is None else f"{options.page}, and {options.html}"
    ran = f"{len(chosen) - len(named)} studies in {options.out}; " if options.run else ""
    print(f"{ran}the page is {where}")
    if named:
        print(f"not run on {title}, see the page: {', '.join(named)}")


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
