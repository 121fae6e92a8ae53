"""Options of `codi eval`, a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.study.options import AnswerOptions, IntervalOptions, ModelOptions, RunOptions, SplitOptions
from lm.terms import AnswerMode

__all__ = ["EvalOptions"]


@dataclass(frozen=True)
class EvalOptions(IntervalOptions, AnswerOptions, RunOptions, SplitOptions, ModelOptions):
    """Accuracy by number of latents and by mode of answering, with intervals."""

    COMMAND: ClassVar[str] = "eval"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"write_answers"})

    task: str = "arithmetic"
    limit: int | None = None
    out: Path | None = None  # type: ignore[assignment]
    """Run folder, continued if it holds the same run and refused if it holds another one; or a file for the table
    alone: .json (with options and versions) or .csv; None: the table is only printed."""
    batch_size: int = 128
    modes: tuple[AnswerMode, ...] = ("latent", "direct", "verbal")
    """Ways of answering: after latents, directly (no thought), or after a written chain of thought."""
    latents: tuple[int, ...] | None = None
    """Numbers of latents for mode latent, 0 or more; None: 0 to the number the model was trained with."""
    temperature: float = 0.0
    """0: greedy answers; above 0: sampled at this temperature. Every condition uses the same random numbers."""
    write_answers: Path | None = None
    """Write every answer to this .csv file as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modes:
            raise ValueError("modes must name at least one of latent, direct, verbal")
        if self.latents is not None and (not self.latents or min(self.latents) < 0):
            raise ValueError(f"latents must be 0 or more, got {' '.join(map(str, self.latents)) or 'none'}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.is_file and self.out is not None and self.out.suffix not in (".json", ".csv"):
            raise ValueError(f"out must end in .json or .csv, or be a folder, got {self.out}")
        if self.write_answers is not None and self.write_answers.suffix != ".csv":
            raise ValueError(f"write-answers must end in .csv, got {self.write_answers}")

    @property
    def is_file(self) -> bool:
        """Whether `out` is a file: its name ends as names of files do, and there is no folder of that name."""
        return self.out is not None and bool(re.fullmatch(r"\.[A-Za-z]+", self.out.suffix)) and not self.out.is_dir()

    @property
    def folder(self) -> Path | None:
        """The run folder, if one is asked for."""
        return None if self.is_file else self.out

    def check_inputs(self) -> None:
        super().check_inputs()
        for path in (self.out if self.is_file else None, self.write_answers):  # before the work, not after it
            if path is not None:
                _check_writable(path)


def _check_writable(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)
