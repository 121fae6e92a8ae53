"""Options of `codi alternation`. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.study.options import AnswerOptions, ModelOptions, PromptOptions, RunOptions, StatisticsOptions

__all__ = ["AlternationOptions"]


@dataclass(frozen=True)
class AlternationOptions(StatisticsOptions, AnswerOptions, RunOptions, PromptOptions, ModelOptions):
    """Do even latents store and odd latents compute? One test over all measures, one verdict."""

    COMMAND: ClassVar[str] = "alternation"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 2}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"alpha", "lens"})  # the lens enters by its weights

    out: Path = Path("runs/alternation")
    limit: int | None = 1120
    derivation: int = 560
    batch_size: int = 128
    permutations: int = 10_000
    lens: Path | None = None
    """Folder of tuned lenses (codi lens train): adds three measures read with it, and the correction covers them."""
    lens_name: str = "all"
    """Which of them: "all", "each" (every latent its own), or the name of one."""
    alpha: float = 0.05
    """Level of the tests, a fraction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.lens is not None and not self.lens.is_dir():
            raise ValueError(f"{self.lens} is no folder of lenses: run codi lens train first")
