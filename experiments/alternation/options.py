"""Options of `codi alternation`. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from experiments.study.options import AnswerOptions, Bounds, IntervalOptions, ModelOptions, PromptOptions, RunOptions

if TYPE_CHECKING:
    from experiments.tasks.split import Split

__all__ = ["BOTH", "STEPS", "AlternationOptions"]

BOTH = "both"
STEPS = 5
"""Steps of the arithmetic problems that are asked beside templates: as many as leave one latent to spare, where three
steps of a template leave three."""


@dataclass(frozen=True)
class AlternationOptions(IntervalOptions, AnswerOptions, RunOptions, PromptOptions, ModelOptions):
    """Do even latents store and odd latents compute? One test over all measures, one verdict."""

    COMMAND: ClassVar[str] = "alternation"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 2}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"alpha", "lens"})  # the lens enters by its weights

    out: Path = Path("runs/alternation")
    task: str = BOTH
    """Evaluation prompts: both (templates, and arithmetic problems of five steps if no other number is asked for), or
    one task: templates, arithmetic, polynomial, a file with known steps, a folder or a hub id."""
    limit: int | None = 1120
    derivation: int = 560
    batch_size: int = 128
    lens: Path | None = None
    """Folder of tuned lenses (codi lens train): adds three measures read with it."""
    lens_name: str = "all"
    """Which of them: "all", "each" (every latent its own), or the name of one."""
    alpha: float = 0.05
    """Level of the test, a fraction: a split comes first only if it does in 1 − alpha of the resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    @property
    def chosen_task(self) -> str:
        return "templates" if self.task == BOTH else self.task

    @property
    def asked(self) -> str:
        return "templates and arithmetic" if self.task == BOTH else self.task

    @property
    def bounds(self) -> Bounds:
        """As of every command; the arithmetic problems of "both" have five steps unless other bounds are given."""
        if self.task == BOTH and self.min_steps is None and self.max_steps is None:
            return {"min_steps": STEPS, "max_steps": STEPS, "reach": self.reach}
        return super().bounds

    def load_split(self, seed: int, question_suffix: str = "", known_steps: int = 0, donors: bool = False) -> Split:
        """As `PromptOptions.load_split`, of every task."""
        from experiments.study.prompts import joined_split, two_splits

        if self.task != BOTH:
            return joined_split({self.task: super().load_split(seed, question_suffix, known_steps, donors)})
        suffix = question_suffix if self.suffix else ""
        low, high, reach = self.bounds["min_steps"], self.bounds["max_steps"], self.bounds["reach"]
        ask = partial(
            two_splits, limit=self.limit, derivation=self.derivation, seed=seed, suffix=suffix,
            derivation_task=self.derivation_task, reading=self.reading, donors=donors,
        )  # fmt: skip
        arithmetic = ask("arithmetic", known_steps=known_steps, min_steps=low, max_steps=high, reach=reach)
        return joined_split({"templates": ask("templates", known_steps=known_steps), "arithmetic": arithmetic})

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.lens is not None and not self.lens.is_dir():
            raise ValueError(f"{self.lens} is no folder of lenses: run codi lens train first")
