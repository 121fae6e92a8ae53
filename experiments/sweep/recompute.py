"""`codi stats`: the tables of a run folder, made again from its trials alone.

What it does: reads the trials of a sweep, computes every table with the settings of the folder or with those given,
writes them beside the trials, writes result.json and prints the summary.

What it does not know: how a number is computed (analysis.py, experiments/study/edits), models.

How to run: `codi stats RUN` or `python -m experiments.sweep.recompute RUN`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.study.edits.pairing import families
from experiments.study.edits.trials import read_trials
from experiments.study.folder import RunFolder
from experiments.study.options import command_line
from experiments.study.progress import progress
from experiments.study.result import FigureFiles, Result
from experiments.sweep.analysis import Analysis, analyse
from experiments.sweep.calibrate import calibration, calibration_section
from experiments.sweep.options import SettingOptions, StatsOptions, SweepOptions, check_run
from experiments.sweep.summary import figure_paths, sections, summary
from experiments.sweep.views import captions, views

__all__ = ["load_trials", "main", "report", "settings_of", "write"]

TABLES = (
    "controls", "marginals", "correlations", "consistency", "variance", "symmetry", "evidence", "power", "visibility",
)  # fmt: skip
"""Tables of an analysis beside its cells."""


def load_trials(run: Path) -> pd.DataFrame:
    """The trial table of a run folder.

    Raises:
        ValueError: no folder, a folder of another command or without trials, a damaged part.
    """
    check_run(run)
    return read_trials(run)


def write(analysis: Analysis, run: Path) -> list[Path]:
    """Writes cells.parquet, cells.csv, claims.* and statistics/*.csv with settings.json; each file whole or not at
    all."""
    folder = RunFolder(run)
    written = [
        folder.write("cells.parquet", analysis.cells.to_parquet(index=False)),
        folder.write("cells.csv", analysis.cells.to_csv(index=False).encode()),
        folder.write_json("statistics/settings.json", dataclasses.asdict(analysis.settings)),
    ]
    for name in TABLES:
        table: pd.DataFrame = getattr(analysis, name)
        written.append(folder.write(f"statistics/{name}.csv", table.to_csv(index=False).encode()))
    return [*written, *analysis.claims.write(folder.write)]


def settings_of(run: Path, given: SettingOptions | None = None) -> Settings:
    """The settings of a run folder's statistics (statistics/settings.json, if any) with what is given in their place.

    Raises:
        ValueError: an impossible value, or a damaged settings.json.
    """
    path = run / "statistics" / "settings.json"
    stored: dict[str, Any] = {}
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            Settings(**stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to go back to the defaults") from error
    return Settings(**(stored | (given.given if given is not None else {})))


# --- The result -------------------------------------------------------------------------------------------------------


def report(analysis: Analysis, run: Path) -> tuple[Result, str]:
    """Write result.json and summary.md of a run folder whose tables are written; the text is what is printed."""
    folder = RunFolder(run)
    manifest = folder.manifest() if folder.manifest_path.exists() else {}
    said = {name: caption for view in views(analysis) for name, caption in captions(view).items()}
    figures = [
        FigureFiles(path.stem, (f"figures/{path.name}", f"figures/{path.stem}.pdf"), said[path.stem])
        for path in figure_paths(run)
        if path.stem in said
    ]
    result = Result(
        study="sweep",
        title="Steering sweep",
        command=_command(manifest.get("config", {}), run),
        model=Path(str(manifest.get("model", "unknown"))).name,
        path=run,
        sections=tuple(sections(analysis)),
        tables={"cells": analysis.cells, **{f"statistics/{name}": getattr(analysis, name) for name in TABLES}},
        figures=tuple(figures),
        claims=analysis.claims,
    )
    result.write(folder.write)
    text = summary(analysis, run=run)
    folder.write("summary.md", (text + "\n").encode())
    return result, text


def _command(config: Mapping[str, Any], run: Path) -> str:
    """The command that made a run, from the options in its manifest."""
    names = {field.name: field for field in dataclasses.fields(SweepOptions)}
    given: dict[str, Any] = {}
    for name, value in config.items():
        if name in names and value is not None:
            paths = name in ("out", "prompts")
            given[name] = Path(value) if paths else tuple(value) if isinstance(value, list) else value
    return command_line(SweepOptions(**(given | {"out": run})))


def main(options: StatsOptions) -> None:
    """Read the trials, write the tables, print the summary."""
    trials = load_trials(options.run)
    analysis = analyse(trials, settings_of(options.run, options), progress)
    write(analysis, options.run)
    print(report(analysis, options.run)[1])
    if options.calibrate:
        table = calibration(families(trials), analysis.settings)
        RunFolder(options.run).write_table("statistics/calibration", table)
        section = calibration_section(table, analysis.settings.alpha)
        print(f"\n## {section.heading}\n\n{section.text}")


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
