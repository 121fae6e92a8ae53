"""Options of the studies of latents, each a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments.study.options import DrawOptions, StudyOptions

__all__ = ["AnchorsOptions", "EarlyExitOptions", "NecessityOptions", "TransferOptions"]


@dataclass(frozen=True)
class NecessityOptions(DrawOptions, StudyOptions):
    """Which latents, and which subsets of them, the answer needs.

    With --legacy: the published prompts (50 number triples), and means over the evaluation prompts themselves.
    """

    COMMAND: ClassVar[str] = "necessity"

    out: Path = Path("runs/necessity")
    all_subsets: bool = True
    """Replace every one of the 2^n subsets of latents; otherwise only single latents and prefixes."""


@dataclass(frozen=True)
class TransferOptions(DrawOptions, StudyOptions):
    """Ablate the prompt, carry latents from one prompt to another.

    With --legacy: the leaky ablation throughout, the published prompts (50 number triples), and means over these
    prompts themselves. Of the evaluation prompts, those without a donor of the same value drop out. --draws: donors per
    prompt, and draws of noise.
    """

    COMMAND: ClassVar[str] = "transfer"

    out: Path = Path("runs/transfer")
    limit: int | None = 300


@dataclass(frozen=True)
class AnchorsOptions(DrawOptions, StudyOptions):
    """Thought anchors: resample a latent, suppress attention, see what changes.

    --draws: donors per prompt and latent, and draws of noise and of random prompt positions. No numbers were published
    on latents, so --legacy only changes prompts.
    """

    COMMAND: ClassVar[str] = "anchors"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"shuffles": 20}

    out: Path = Path("runs/anchors")
    limit: int | None = 160
    shuffles: int = 1000
    """Shuffles behind the p-values of receiver heads."""


@dataclass(frozen=True)
class EarlyExitOptions(DrawOptions, StudyOptions):
    """Answer after each latent: agreement, calibration, latents saved.

    The threshold is chosen on the derivation prompts, which share no question and no numbers with the evaluation
    prompts. --draws: of the shuffled control. No published numbers, so --legacy only changes prompts.
    """

    COMMAND: ClassVar[str] = "early-exit"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"patience": 1}

    out: Path = Path("runs/early-exit")
    task: str = "arithmetic"
    limit: int | None = 400
    derivation: int = 400
    draws: int = 20
    allowed_loss: float = 0.01
    """Largest loss of accuracy, a fraction, that the threshold may cost on the derivation prompts."""
    patience: int = 1
    """Policy "stable": so many further latents must give the same answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.allowed_loss < 1:
            raise ValueError(f"allowed-loss must be in 0..1, got {self.allowed_loss}")
