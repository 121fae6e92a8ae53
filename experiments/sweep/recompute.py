"""`codi stats`: the tables of a run folder, made again from its trials alone.

What it does: reads the trials of a sweep, computes every table with the settings of the folder or with those given,
writes them beside the trials and prints the summary.

What it does not know: how a number is computed (cells.py, structure.py), models.

How to run: `codi stats RUN` or `python -m experiments.sweep.recompute RUN`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from experiments.statistics.clusters import Settings
from experiments.study.folder import RunFolder
from experiments.sweep.analysis import Analysis, analyse
from experiments.sweep.summary import summary
from experiments.sweep.trials import read_trials

__all__ = ["Overrides", "StatsConfig", "load_trials", "main", "settings_of", "write"]


def load_trials(run: Path) -> pd.DataFrame:
    """The trial table of a run folder.

    Raises:
        ValueError: no folder, a folder without trials, a damaged part.
    """
    if not run.is_dir():
        raise ValueError(f"no run folder {str(run)!r}")
    return read_trials(run)


def write(analysis: Analysis, run: Path) -> list[Path]:
    """Writes cells.parquet, cells.csv and statistics/*.csv with settings.json; each file whole or not at all."""
    folder = RunFolder(run)
    written = [
        folder.write("cells.parquet", analysis.cells.to_parquet(index=False)),
        folder.write("cells.csv", analysis.cells.to_csv(index=False).encode()),
        folder.write_json("statistics/settings.json", dataclasses.asdict(analysis.settings)),
    ]
    for name in ("controls", "marginals", "correlations", "consistency", "variance", "symmetry"):
        table: pd.DataFrame = getattr(analysis, name)
        written.append(folder.write(f"statistics/{name}.csv", table.to_csv(index=False).encode()))
    return written


@dataclass(frozen=True)
class Overrides:
    """Settings given on the command line; what is not given stays as it was in the run folder."""

    resamples: int | None = None
    """Bootstrap resamples of clusters behind every interval. None: as before in this folder, else 2000."""
    permutations: int | None = None
    """Sign flips behind the family-wise p, permutations behind rank consistency. None: as before, else 5000."""
    level: float | None = None
    """Coverage of the intervals, a fraction. None: as before, else 0.95."""
    alpha: float | None = None
    """Level at which a corrected p-value counts, a fraction. None: as before, else 0.05."""
    seed: int | None = None
    """Seed of resamples and permutations: same trials and settings, same tables. None: as before, else 0."""


def settings_of(run: Path, given: Overrides | None = None) -> Settings:
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
    changed = {name: value for name, value in vars(given or Overrides()).items() if value is not None}
    return Settings(**(stored | changed))


@dataclass(frozen=True)
class StatsConfig:
    """Recompute the statistics of a run folder from its trials alone, write them there and print a summary."""

    run: tyro.conf.Positional[Path]
    """Run folder of `codi sweep` (it holds trials/part-*.parquet)."""
    settings: Annotated[Overrides, tyro.conf.arg(name="")] = field(default_factory=Overrides)


def main(config: StatsConfig) -> None:
    """Read the trials, write the tables, print the summary."""
    trials = load_trials(config.run)
    analysis = analyse(trials, settings_of(config.run, config.settings))
    write(analysis, config.run)
    print(summary(analysis, run=config.run))


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
