"""What studies that are not yet data share (see run.py): old names of options, folder and rows; and, until their rooms
are there, row-wise interventions, forced answers, paired tables and figures.

Its trial tables have one row per prompt, `condition` and `draw`. New studies use options.py, parts.py, run.py,
answers.py, thoughts.py, experiments/statistics and experiments/figures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from torch import Tensor

from experiments.figures.heatmap import MARKS, draw_matrix, marked
from experiments.figures.series import draw_series
from experiments.figures.style import PALETTE, in_style, new_figure, note, save
from experiments.statistics import effects
from experiments.statistics.clusters import Settings
from experiments.statistics.words import interval, markdown, p_text
from experiments.study import answers, options
from experiments.study.claims import ClaimsTable, effect_claim
from experiments.study.folder import RunFolder, open_run
from experiments.study.rows import answer_rows
from experiments.study.thoughts import Bank, Thoughts, think
from experiments.tasks import Problem
from experiments.tasks.split import Split
from lm.terms import Attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from codi import CodiModel

__all__ = [
    "PALETTE",
    "Bank",
    "Result",
    "StudyFolder",
    "StudyOptions",
    "Thoughts",
    "answer_rows",
    "answer_table",
    "compare",
    "draw_matrix",
    "draw_series",
    "effect_claim",
    "interval",
    "levels",
    "load_model",
    "load_prompts",
    "markdown",
    "new_figure",
    "open_study",
    "p_text",
    "row_of",
    "rows_of",
    "stderr",
    "think",
]

FORMAT = 1


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyOptions(options.StudyOptions):
    """Options of the studies that are not yet data (see run.py)."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"draws": 1}

    @property
    def settings(self) -> Settings:
        """How the statistics are computed."""
        return self.statistics(self.seed)


def load_model(config: StudyOptions, attention: Attention = "sdpa") -> CodiModel:
    """The model that the options name."""
    return config.load(attention)


def load_prompts(config: StudyOptions, suffix: str = "", known_steps: int = 0) -> Split:
    """Evaluation and derivation prompts."""
    return config.load_split(config.seed, suffix, known_steps)


# --- Run folder -------------------------------------------------------------------------------------------------------


class StudyFolder:
    """The open run folder of one study: parts that are computed once, tables, figures, summary.

    Args:
        folder: opened by `open_study`.
        say: called with lines for a person.
        sample: what a figure rests on, for its caption.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None], sample: str = "") -> None:
        self.folder, self.say, self.sample = folder, say, sample
        self.parts: list[str] = []

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder.path

    def part(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A part of the trial table: read if this run has made it already, else computed and written.

        Args:
            name: of the part; the file is trials/part-{name}.parquet.
            compute: makes it.
        """
        self.parts.append(name)
        if not self.folder.has_part(name, None):
            began = time.time()
            frame = compute().reset_index(drop=True)
            self.folder.write_part(name, frame)
            self.say(f"  {name}: {len(frame):,} rows in {time.time() - began:.0f} s")
        return self.folder.read_parts([name])

    def table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Write a table as {name}.csv and give it back."""
        self.folder.write(f"{name}.csv", frame.to_csv(index=False).encode())
        return frame

    def draw(self, make: Callable[[], Mapping[str, Figure]]) -> None:
        """Make figures in the one style, say below each what it rests on, write it as figures/{name}.png and .pdf."""
        with in_style():
            for name, figure in make().items():
                note(figure, " ".join([self.sample, MARKS] if marked(figure) else [self.sample]))
                save(figure, f"figures/{name}", self.folder.write)

    def finish(self, title: str, paragraphs: Sequence[str], claims: ClaimsTable | None = None) -> str:
        """Write the claims and summary.md; the text is what a study prints."""
        text = "\n\n".join([f"# {title}", *paragraphs])
        if claims is not None:
            claims.write(self.folder.write)
            text += "\n\n## Published claims\n\n" + claims.markdown()
        figures = sorted(path.name for path in (self.path / "figures").glob("*.png"))
        text += f"\n\nTables and trials: {self.path}; figures (PNG and PDF): {', '.join(figures) or 'none'}."
        self.folder.write("summary.md", (text + "\n").encode())
        return text


@contextmanager
def open_study(
    name: str, config: StudyOptions, model: CodiModel, split: Split, say: Callable[[str], None] | None = None
) -> Iterator[StudyFolder]:
    """Begin or go on with the run folder of a study.

    Args:
        name: of the study.
        config: its options; where and how fast it runs is no part of the run's identity.
        model: the model.
        split: the prompts.
        say: called with lines for a person; None: they are dropped.

    Raises:
        ValueError: the folder holds a run with other options, or something else.
    """
    identity = {
        "study": name,
        "format": FORMAT,
        "options": options.identity_of(config),
        "split": split.record(),
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": model.device.type,
    }
    say = say or (lambda line: None)
    about = f"{len(split.evaluation)} prompts in {len({p.cluster for p in split.evaluation})} clusters"
    with open_run(config.out, identity, model=config.model, about=about, say=say) as folder:
        sample = (
            f"{len(split.evaluation):,} prompts in {len({p.cluster for p in split.evaluation}):,} clusters. "
            f"Intervals: 95 % over clusters. Model: {Path(config.model).name}."
        )
        yield StudyFolder(folder, say, sample)


@dataclass(frozen=True)
class Result:
    """What a study found.

    Attributes:
        path: its run folder.
        tables: the tables it wrote, by name.
        claims: published claims, if any are in its scope.
        text: the summary that is printed.
    """

    path: Path
    tables: dict[str, pd.DataFrame]
    claims: ClaimsTable | None
    text: str


def stderr(line: str) -> None:
    """A line for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


# --- Rows -------------------------------------------------------------------------------------------------------------


def answer_table(
    problems: Sequence[Problem], prompt: Sequence[int] | Tensor, texts: Sequence[str], **columns: Any
) -> pd.DataFrame:
    """`answers.answer_table` of a study whose conditions are words; `draw` is 0 if it is not given."""
    assert "condition" in columns, "every row of a trial table belongs to a condition"
    return answers.answer_table(problems, prompt, texts, **{"draw": 0, **columns})


# --- Statistics -------------------------------------------------------------------------------------------------------


def levels(trials: pd.DataFrame, outcome: str = "correct", settings: Settings | None = None) -> pd.DataFrame:
    """Mean of an outcome in every condition that a word names: `effects.levels` by the column condition."""
    return effects.levels(trials, ["condition"], outcome, settings)


def compare(
    trials: pd.DataFrame,
    contrasts: Sequence[tuple[str, str]],
    outcome: str = "correct",
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Paired differences between conditions that a word names: `effects.compare` by the column condition."""
    chosen = [({"condition": a}, {"condition": b}) for a, b in contrasts]
    found = effects.compare(trials, chosen, ["condition"], outcome, settings)
    return found.rename(columns={"reference_condition": "reference"})


# --- Words ------------------------------------------------------------------------------------------------------------


def row_of(table: pd.DataFrame, condition: str, reference: str | None = None) -> dict[str, Any]:
    """The one row of a table with this condition (and reference)."""
    chosen = {"condition": condition} | ({} if reference is None else {"reference": reference})
    return effects.row_of(table, chosen)


def rows_of(table: pd.DataFrame, conditions: Sequence[str], **chosen: Any) -> pd.DataFrame:
    """The rows with these conditions, in that order, where the other columns have the chosen values."""
    return effects.rows_of(table, [{"condition": name, **chosen} for name in conditions])
