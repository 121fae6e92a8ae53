"""Options of the studies of latents, each a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.study.options import DrawOptions, StudyOptions
from experiments.tasks import TASK_NAMES

__all__ = ["NecessityOptions", "PatchOptions", "PcaOptions"]


@dataclass(frozen=True)
class NecessityOptions(DrawOptions, StudyOptions):
    """Which latents, and which subsets of them, the answer needs.

    With --legacy: the published prompts (50 number triples), and means over the evaluation prompts themselves.
    """

    COMMAND: ClassVar[str] = "necessity"

    out: Path = Path("runs/necessity")
    all_subsets: bool = True
    """Replace every one of the 2^n subsets of latents; otherwise only single latents and prefixes."""


# --- Patching and components ------------------------------------------------------------------------------------------

PATCH_FAMILIES = ("means", "values", "interchange")


@dataclass(frozen=True)
class PatchOptions(DrawOptions, StudyOptions):
    """Replace latents by means, values, other prompts' latents or noise.

    With --legacy: the published prompts (50 number triples), means over the evaluation prompts themselves (so a prompt
    is part of its own mean) and step-2 patching at latent 5 only.
    """

    COMMAND: ClassVar[str] = "patch"

    out: Path = Path("runs/patch")
    families: tuple[str, ...] = PATCH_FAMILIES
    """Which edits: means, values, interchange."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.families) - set(PATCH_FAMILIES))
        if unknown or not self.families:
            raise ValueError(f"families must be among {', '.join(PATCH_FAMILIES)}, got {' '.join(unknown) or 'none'}")

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.task in TASK_NAMES and self.task != "templates" and not self.legacy:
            raise ValueError(
                f"patching needs prompts of the form (X±Y)·Z + (X±Y), as in the task 'templates' or prompts.json, "
                f"got the task {self.task!r}"
            )


@dataclass(frozen=True)
class PcaOptions(DrawOptions, StudyOptions):
    """Principal components of latents and cache entries; where each edit's effect goes.

    With --legacy: the published prompts (50 number triples), and means over these prompts themselves.
    """

    COMMAND: ClassVar[str] = "pca"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"top": 1, "steered": 1, "where_pairs": 1, "where_prompts": 1}

    out: Path = Path("runs/pca")
    task: str = "arithmetic"
    min_steps: int | None = 3
    max_steps: int | None = 5
    limit: int | None = 48
    derivation: int = 280
    draws: int = 20
    top: int = 10
    """Components in the tables."""
    steered: int = 3
    """Components that are steered along."""
    where_pairs: int = 3
    """Pairs A−B (a seeded choice) whose effect is followed through the model."""
    where_prompts: int = 32
    """Evaluation prompts on which it is followed."""
