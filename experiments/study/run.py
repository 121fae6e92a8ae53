"""A study from its options to its result: the one road that every study takes.

    options  ->  plan     plain values, impossible ones refused; nobody below sees the options
             ->  parts    data; those that the run folder lacks are computed by an executor and written
             ->  trials   tables with typed columns, read from the folder
             ->  findings tables, figures, claims and words, from the trials alone
             ->  result   written as result.json

A `Study` is data: which options it takes, and the functions of the steps. `run_study` walks the road, from the command
line or in a process that has the model already. Knows nothing about any particular study.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pandas as pd

from experiments.study.claims import ClaimsTable
from experiments.study.folder import RunFolder, open_run
from experiments.study.language import LanguageOptions
from experiments.study.options import ModelOptions, RunOptions, command_line, identity_of
from experiments.study.parts import Executor, Part, Prompts, Recipe, Workbench, run_here
from experiments.study.progress import no_bar, progress
from experiments.study.prompts_file import write_prompts
from experiments.study.result import FigureFiles, Result, Section
from lm.terms import Attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from codi import CodiModel
    from lm.model import LanguageModel

__all__ = [
    "Findings",
    "Study",
    "fill",
    "language_identity",
    "read_trials",
    "run_study",
    "study_identity",
    "to_stderr",
    "write_result",
]

FORMAT = 1
"""Of a study's run folder; part of a run's identity."""


O = TypeVar("O", bound=RunOptions)  # noqa: E741
P = TypeVar("P")

Trials = Mapping[str, pd.DataFrame]
"""Trial tables by name."""


@dataclass(frozen=True)
class Findings:
    """What a study concludes from its trials.

    Attributes:
        sections: the summary in words.
        tables: by name; written as {name}.csv.
        figures: makes figures by name; None: there are none. Called once, while matplotlib has the project's style.
        captions: of the figures, by name.
        claims: published claims; None: none is in the scope of the study.
        files: anything else that is written, by name.
    """

    sections: Sequence[Section]
    tables: Mapping[str, pd.DataFrame]
    figures: Callable[[], Mapping[str, Figure]] | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    claims: ClaimsTable | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Study(Generic[O, P]):
    """A study as data.

    Attributes:
        options: class of its options; its COMMAND is the study's name.
        title: "Necessity of latents"; the model's name is added.
        prompts: the prompts (`Split`) or items (`ItemSplits`) that the options ask for; gets the model.
        plan: resolves and checks options against model and prompts; gives plain values, the study's own frozen class.
        parts: the parts of the trial tables, from the plan.
        conclude: findings from plan and trials; sees no model.
        attention: implementation of attention that the model must be loaded with.
        identity: what decides the result; None: `study_identity`, of language models `language_identity`.

    The options have the group `ModelOptions` (then the model is a `CodiModel`) or `LanguageOptions` (`LanguageModel`).
    """

    options: type[O]
    title: str
    prompts: Callable[[O, Any], Any]
    plan: Callable[[O, Any, Any], P]
    parts: Callable[[P], Sequence[Part]]
    conclude: Callable[[P, Trials], Findings]
    attention: Attention = "sdpa"
    identity: Callable[[O, Any, Any], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """Its command, without `codi`."""
        return self.options.COMMAND

    def run(
        self, options: O, model: LanguageModel | None = None, prompts: Prompts | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Result:  # fmt: skip
        """`run_study` of this study: what a process calls that has the model already."""
        return run_study(self, options, model, prompts, say)

    def main(self, options: O) -> None:
        """Load, run, print the summary: what a command calls."""
        print(run_study(self, options, say=to_stderr).markdown())


def to_stderr(line: str) -> None:
    """A line for a person."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # leaves progress bars whole
    sys.stderr.flush()


def study_identity(options: RunOptions, model: CodiModel, prompts: Prompts) -> dict[str, Any]:
    """Everything that decides the result of a study."""
    return {
        "study": options.COMMAND,
        "format": FORMAT,
        "options": identity_of(options),
        "split": prompts.record(),
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": model.device.type,
    }


def language_identity(options: RunOptions, model: LanguageModel, prompts: Prompts) -> dict[str, Any]:
    """Everything that decides the result of a study of an ordinary language model."""
    return {
        "study": options.COMMAND,
        "format": FORMAT,
        "options": identity_of(options),
        "items": prompts.record(),
        "weights_hash": model.weights_hash,
        "form": model.form,
        "device": model.device.type,
    }


def run_study(
    study: Study[O, P],
    options: O,
    model: LanguageModel | None = None,
    prompts: Prompts | None = None,
    say: Callable[[str], None] | None = None,
    executor: Executor = run_here,
) -> Result:
    """Run a study or go on with it.

    Args:
        study: which.
        options: its options.
        model: already loaded as the options say, with the study's attention; None: it is loaded.
        prompts: already loaded; None: they are loaded.
        say: called with lines for a person; None: they are dropped, and no progress bar is shown.
        executor: computes the parts that are missing.

    Raises:
        ValueError: options that do not fit the model or the prompts, or a folder that holds another run.
        OSError: the folder cannot be written.
    """
    assert isinstance(options, ModelOptions | LanguageOptions), f"codi {study.name}: its options name no model"
    bar = no_bar if say is None else progress
    say = say or (lambda line: None)
    handed_over = model is not None
    if model is None:
        model = options.load(study.attention)
    if prompts is None:
        prompts = study.prompts(options, model)
    plan = study.plan(options, model, prompts)
    parts = study.parts(plan)
    recipe = None if handed_over else Recipe(*options.recipe(study.attention), prompts)
    bench = Workbench(model, prompts, recipe, bar=bar)
    own = language_identity if isinstance(options, LanguageOptions) else study_identity
    identity = (study.identity or own)(options, model, prompts)
    with open_run(options.out, identity, model=options.model, about=prompts.about(), say=say) as folder:
        write_prompts(folder, prompts)
        try:
            fill(folder, parts, bench, say, executor)
        except KeyboardInterrupt:
            say(f"\ninterrupted; finished parts are in {options.out}, the same command goes on from them")
            raise
        findings = study.conclude(plan, read_trials(folder, parts))
        return write_result(folder, findings, options, study.title, model.name)


def fill(
    folder: RunFolder,
    parts: Sequence[Part],
    bench: Workbench,
    say: Callable[[str], None] = lambda line: None,
    executor: Executor = run_here,
) -> None:
    """Compute the parts that an open folder lacks and write each as soon as it is there.

    Args:
        folder: open.
        parts: all of them, names unique.
        bench: what they work with.
        say: called with a line per part.
        executor: computes them.
    """
    names = [part.name for part in parts]
    assert len(set(names)) == len(names), "two parts of a study have the same name"
    missing = [part for part in parts if not folder.has_part(part.name, part.schema, part.rows)]
    for part in parts if missing else ():
        if part.shared is not None and part not in missing:
            function, arguments = part.shared
            bench.put(folder.read_parts([part.name]), function, *arguments)
    began = time.time()
    bar = bench.bar if len(missing) > 1 else no_bar
    with bar(len(missing), "part", "parts") as advance:
        for part, rows in executor(missing, bench):
            folder.write_part(part.name, rows, part.schema)
            n_rows = len(rows) if isinstance(rows, pd.DataFrame) else len(next(iter(rows.values())))
            say(f"  {part.name}: {n_rows:,} rows in {time.time() - began:.0f} s")
            advance(1)
            began = time.time()


def read_trials(folder: RunFolder, parts: Sequence[Part]) -> dict[str, pd.DataFrame]:
    """The trial tables of a folder by name, each from its parts in their order."""
    tables: dict[str, list[str]] = {}
    for part in parts:
        tables.setdefault(part.belongs_to, []).append(part.name)
    return {name: folder.read_parts(members) for name, members in tables.items()}


def write_result(folder: RunFolder, findings: Findings, options: RunOptions, title: str, model: str) -> Result:
    """Write what was found into an open run folder, result.json last.

    Args:
        folder: open.
        findings: tables, figures, claims and words.
        options: of the command.
        title: of the result, without the model's name.
        model: its name.
    """
    result = Result(
        study=options.COMMAND,
        title=title,
        command=command_line(options),
        model=model,
        path=folder.path,
        sections=tuple(findings.sections),
        tables=dict(findings.tables),
        figures=_write(folder, findings),
        claims=findings.claims,
    )
    result.write(folder.write)
    return result


def _write(folder: RunFolder, findings: Findings) -> tuple[FigureFiles, ...]:
    """Tables, figures, claims and other files of a study."""
    for name, table in findings.tables.items():
        folder.write_table(name, table)
    for name, content in findings.files.items():
        folder.write(name, content)
    if findings.claims is not None:
        findings.claims.write(folder.write)
    if findings.figures is None:
        return ()
    from experiments.figures.style import in_style, save

    with in_style():
        drawn = findings.figures()
        odd = findings.captions.keys() - drawn.keys()
        assert not odd, f"captions of figures that are not there: {', '.join(sorted(odd))}"
        return tuple(
            FigureFiles(
                name,
                tuple(str(path.relative_to(folder.path)) for path in save(figure, f"figures/{name}", folder.write)),
                findings.captions.get(name, ""),
            )
            for name, figure in drawn.items()
        )
