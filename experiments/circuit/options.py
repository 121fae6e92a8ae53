"""Options of `codi circuit`. Imports neither torch nor pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments.study.language import LanguageOptions
from experiments.study.options import IntervalOptions, RunOptions

__all__ = ["CircuitOptions"]


@dataclass(frozen=True)
class CircuitOptions(IntervalOptions, RunOptions, LanguageOptions):
    """Which heads make each word of a written chain of thought, by patching their outputs into a corrupted text."""

    COMMAND: ClassVar[str] = "circuit"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 2, "demonstrations": 0, "step": 1}

    out: Path = Path("runs/circuit")
    limit: int = 20
    """Number of ontologies; published: 100 or more."""
    hops: int = 2
    """Rules on the way to the answer, 1 to 4; h hops have 4h + 3 subtasks."""
    lexicon: Literal["training", "unseen", "false"] = "training"
    """Words: invented ones (two vocabularies that share none), or real ones in wrong relations."""
    order: Literal["ordered", "shuffled"] = "ordered"
    """Order of the statements."""
    distractors: Literal["none", "relevant", "irrelevant"] = "irrelevant"
    """What else is stated."""
    demonstrations: int = 6
    """Solved ontologies before each question."""
    where: Literal["last", "question", "chain", "both"] = "last"
    """Which earlier mention of the word is exchanged: the last one in the chain, else in the question (published); in
    the question; in the chain; in both. Subtasks without such a mention are left out."""
    positions: Literal["all", "last"] = "all"
    """Where a head's clean output is put: at every token (published), or at the last one, which is several times
    faster."""
    step: int = 1
    """Patch every so many blocks only, from the first one on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hops <= 4:
            raise ValueError(f"--hops must be in 1..4, got {self.hops}")
