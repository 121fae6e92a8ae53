"""Options of the studies of latents, each a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.study.options import DrawOptions, StudyOptions

__all__ = ["NecessityOptions"]


@dataclass(frozen=True)
class NecessityOptions(DrawOptions, StudyOptions):
    """Which latents, and which subsets of them, the answer needs.

    With --legacy: the published prompts (50 number triples), and means over the evaluation prompts themselves.
    """

    COMMAND: ClassVar[str] = "necessity"

    out: Path = Path("runs/necessity")
    all_subsets: bool = True
    """Replace every one of the 2^n subsets of latents; otherwise only single latents and prefixes."""
