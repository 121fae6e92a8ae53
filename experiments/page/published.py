"""`codi published`: everything on the published checkpoints, in one command (`make published`).

    checkpoints, base models and data sets are fetched, or found in --local
      -> accuracy on four data sets with both masks, the seed study's grids, every study, on each checkpoint
      -> a page for each, and one that opens with the accuracies beside the reported ones and compares the models

Runs, resumes and writes as `codi findings` with several models does; only what is fetched, and the table of accuracies,
is its own. Without a connection it ends at once, with one line. Knows nothing about what a study does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from codi.known import KNOWN, known_checkpoint
from codi.places import locate
from experiments.page.comparison import Column
from experiments.page.findings import compare
from experiments.page.markdown import NOT_RUN, Found, row
from experiments.page.published_options import PublishedOptions
from experiments.page.reported import LEFT_OUT, REPORTED, SAME, Reported
from experiments.page.studies import DATA_SETS, PUBLISHED_STUDIES, Entry
from experiments.statistics.equivalence import judge_absence
from experiments.statistics.words import interval
from experiments.study.run import to_stderr
from experiments.tasks import TASK_NAMES, load_task

__all__ = ["accuracies", "entries_of", "fetch", "main_published"]


def main_published(options: PublishedOptions) -> None:
    """Fetch what is needed, run everything, write the pages.

    Raises:
        ValueError: a checkpoint or data set is neither here nor can it be fetched, or as `findings.compare`.
    """
    each = [_options_of(options, model) for model in options.models]
    entries = entries_of(options)
    if options.run:
        fetch(each, entries, options.only)
        _warn_without_gpu(options)
    compare(options, each, entries, accuracies)


def _options_of(options: PublishedOptions, model: str) -> PublishedOptions:
    """The options of one checkpoint: its copy and that of its base model, where there are any."""
    known = known_checkpoint(model)
    copy = None if known is None else options.place(known.base)
    base = copy if options.base is None and known is not None and copy != known.base else options.base
    return dataclasses.replace(options.on(model), model=options.place(model), base=base)


def entries_of(options: PublishedOptions) -> list[Entry]:
    """The studies, with the copies of data sets in the place of their hub ids."""
    return [
        dataclasses.replace(entry, command=tuple(options.place(word) if "/" in word else word for word in words))
        for entry in PUBLISHED_STUDIES
        for words in [entry.command]
    ]


def fetch(each: Sequence[PublishedOptions], entries: Sequence[Entry], only: Sequence[str] = ()) -> None:
    """Have every checkpoint, base model and data set here, before anything is computed.

    Args:
        each: options of every checkpoint.
        entries: the studies.
        only: those that are run; empty: all.

    Raises:
        ValueError: one of them is not here and cannot be fetched.
    """
    for one in each:
        to_stderr(f"looking for {one.models[0]}")
        locate(one.models[0], one.base)
    asked = [entry.command for entry in entries if not only or entry.name in only]
    for task in dict.fromkeys(task for command in asked for task in _tasks(command)):
        to_stderr(f"looking for {task}")
        load_task(task, "published", limit=1)


def _tasks(command: Sequence[str]) -> Iterator[str]:
    """Data sets that a command names."""
    for option, value in pairwise(command):
        if option in ("--task", "--derivation-task") and value not in TASK_NAMES:
            yield value


def _warn_without_gpu(options: PublishedOptions) -> None:
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        to_stderr("no GPU here: published checkpoints take days on a processor; Ctrl-C loses nothing that is finished")


# --- The table of accuracies ------------------------------------------------------------------------------------------


def accuracies(columns: Sequence[Column]) -> list[str]:
    """Accuracy of every checkpoint beside what was reported, in Markdown.

    Args:
        columns: the checkpoints, with what is known of each.
    """
    parts = [
        "## Accuracy", "",
        "With six latents, on the test sets that the published evaluation reads, answers read by its rule (the last",
        f"number). Brackets: 95 % interval. **As reported**: the whole interval lies within {100 * SAME:g} points of",
        "the reported figure; **not as reported**: wholly beyond; **undecided**: it reaches across.", "",
        "| model | data | mask | right | n | reported | difference | |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    sources: dict[str, int] = {}
    for column in columns:
        known = {one.entry.name.removeprefix(f"{column.label}-"): one for one in column.known}
        for data in DATA_SETS:
            for mask in ("carried", "published"):
                parts += _rows(column, data, mask, known.get(f"{data}-{mask}"), sources)
    notes = [f"- [{number}] {source}" for source, number in sources.items()]
    return [*parts, "", "Sources and what is missing:", "", *notes, *(f"- {text}" for text in LEFT_OUT), ""]


def _rows(column: Column, data: str, mask: str, one: Found | None, sources: dict[str, int]) -> list[str]:
    """One line per reported figure, or one where none is."""
    head = (column.label, data, mask)
    if one is None or one.result is None:
        why = "not run yet" if one is None or not one.lacking else one.lacking.removeprefix(NOT_RUN)
        return [row(*head, "–", "–", "–", "–", why)]
    found = _accuracy(one)
    shown = (f"{interval(found, 'accuracy')} %", f"{int(found['n']):,}")
    lines = []
    for reported in _reported(column.label, data):
        number = sources.setdefault(reported.source, len(sources) + 1)
        kind = "" if reported.paper else ", another run"
        away = float(found["accuracy"]) - reported.accuracy
        lines.append(row(
            *head, *shown, f"{100 * reported.accuracy:.1f} % [{number}]{kind}", f"{100 * away:+.1f}",
            f"**{_verdict(found, reported)}**",
        ))  # fmt: skip
    return lines or [row(*head, *shown, "–", "–", "nothing to compare with")]


def _accuracy(one: Found) -> Mapping[str, Any]:
    """The row over all problems of a table of accuracies."""
    assert one.result is not None
    table = one.result.tables["accuracy"]
    return {str(name): value for name, value in table[table["n_steps"] == -1].iloc[0].items()}


def _reported(label: str, data: str) -> list[Reported]:
    ids = [hub_id for hub_id in KNOWN if Path(hub_id).name == label]
    return [one for one in REPORTED if one.model in ids and one.data == data]


def _verdict(found: Mapping[str, Any], reported: Reported) -> str:
    lower, upper = found["lower"] - reported.accuracy, found["upper"] - reported.accuracy
    verdict = judge_absence(lower, upper, SAME).verdict
    return {"held": "as reported", "not held": "not as reported"}.get(verdict, verdict)


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
