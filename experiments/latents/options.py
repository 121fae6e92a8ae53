"""Options of the studies of latents, each a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from experiments.study.options import (
    DrawOptions,
    ModelOptions,
    ResampleOptions,
    RunOptions,
    SplitOptions,
    StudyOptions,
)

__all__ = ["PROBED_SPACES", "NecessityOptions", "ProbedSpace", "ProbesOptions"]


@dataclass(frozen=True)
class NecessityOptions(DrawOptions, StudyOptions):
    """Which latents, and which subsets of them, the answer needs.

    With --legacy: the published prompts (50 number triples), and means over the evaluation prompts themselves.
    """

    COMMAND: ClassVar[str] = "necessity"

    out: Path = Path("runs/necessity")
    all_subsets: bool = True
    """Replace every one of the 2^n subsets of latents; otherwise only single latents and prefixes."""


ProbedSpace = Literal["h", "z", "keys", "values"]
PROBED_SPACES: tuple[ProbedSpace, ...] = get_args(ProbedSpace)
"""Residual stream, fed embedding, and the two halves of a cache slot."""


@dataclass(frozen=True)
class ProbesOptions(ResampleOptions, RunOptions, SplitOptions, ModelOptions):
    """Linear probes of latents: operation, operands, steps and answer, by space, latent and layer."""

    COMMAND: ClassVar[str] = "probes"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"folds": 3, "shuffles": 1, "control_draws": 1}

    out: Path = Path("runs/probes")
    split: str = "all"
    limit: int | None = 1344
    batch_size: int = 128
    spaces: tuple[ProbedSpace, ...] = PROBED_SPACES
    """What is read: h (residual stream, all layers), z (embedding fed), keys (rotation undone), values (per block)."""
    layers: tuple[int, ...] | None = None
    """Layers of h (0..n_layers) and blocks of keys and values (1..n_layers); None: all."""
    folds: int = 5
    """Parts of the cross-validation: by number triple, for step 1 and operands by their pair (X, Y)."""
    shuffles: int = 4
    """Label shuffles behind the baseline."""
    control_draws: int = 2
    """Control tasks of every target: random labels that are the same wherever a pair, number or triple recurs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.spaces:
            raise ValueError(f"spaces must name at least one of {', '.join(PROBED_SPACES)}")
