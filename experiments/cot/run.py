"""`codi cot run`: derive, grid and eval in one go, each in a folder of its own inside the run folder.

The model is loaded once, the questions are the same in all three, and each can be asked for again alone (`codi cot
derive --out OUT/derive` …). An interrupted run goes on where it was. The result joins the three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from experiments.cot import derive, eval, grid  # noqa: A004 (named after its command)
from experiments.cot.options import CotRunOptions, DeriveOptions, EvalOptions, GridOptions
from experiments.study.folder import open_run
from experiments.study.options import RunOptions, command_line
from experiments.study.result import FigureFiles, Result, Section
from experiments.study.run import language_identity, to_stderr
from lm.model import LanguageModel

__all__ = ["main", "run"]

O = TypeVar("O", bound=RunOptions)  # noqa: E741


def _as(kind: type[O], options: CotRunOptions, **own: Any) -> O:
    """The options of one of the commands, with what was given for all of them."""
    shared = {field.name for field in dataclasses.fields(kind)} & {field.name for field in dataclasses.fields(options)}
    return kind(**{name: getattr(options, name) for name in shared - {"out"}}, **own)


def run(
    options: CotRunOptions, model: LanguageModel | None = None, say: Callable[[str], None] = lambda line: None
) -> Result:
    """Run all three, or go on with them.

    Args:
        options: of the command.
        model: loaded as they say; None: it is loaded.
        say: called with lines for a person.

    Raises:
        ValueError: as the three commands do.
    """
    model = options.load() if model is None else model
    out = options.out
    folders = {"vectors": out / "derive"}
    steps = {
        "derive": (derive.STUDY, _as(DeriveOptions, options, out=out / "derive")),
        "grid": (grid.STUDY, _as(GridOptions, options, out=out / "grid", **folders)),
        "eval": (eval.STUDY, _as(EvalOptions, options, out=out / "eval", grid=out / "grid", **folders)),
    }
    prompts = options.load_splits(options.seed, model.tokenizer)
    identity = language_identity(options, model, prompts)
    found: dict[str, Result] = {}
    with open_run(out, identity, model=options.model, about=prompts.about(), say=say) as folder:
        for name, (study, own) in steps.items():
            found[name] = study.run(own, model, prompts, say)  # type: ignore[attr-defined]
        result = _joined(found, options, model.name)
        assert result.claims is not None
        result.claims.write(folder.write)
        result.write(folder.write)
    return result


def _joined(found: dict[str, Result], options: CotRunOptions, model: str) -> Result:
    """One result of the three; tables and figures stay where they are."""
    sections: list[Section] = []
    for name, result in found.items():
        first, *others = result.sections
        heading = {"derive": "The vector", "grid": "Where and how much", "eval": "What it does"}[name]
        sections += [dataclasses.replace(first, heading=heading), *others]
    return Result(
        study=options.COMMAND,
        title="Chain-of-thought vector",
        command=command_line(options),
        model=model,
        path=options.out,
        sections=tuple(sections),
        tables={f"{name}/{table}": rows for name, result in found.items() for table, rows in result.tables.items()},
        figures=tuple(
            FigureFiles(f"{name}-{one.name}", tuple(f"{name}/{file}" for file in one.files), one.caption)
            for name, result in found.items()
            for one in result.figures
        ),
        claims=found["eval"].claims,
    )


def main(options: CotRunOptions) -> None:
    """Load, run all, print the summary."""
    print(run(options, say=to_stderr).markdown())
