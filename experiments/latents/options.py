"""Options of the studies of latents, each a class over the groups of experiments/study/options.py. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from experiments.study.options import (
    DrawOptions,
    IntervalOptions,
    ModelOptions,
    RunOptions,
    SplitOptions,
    StudyOptions,
)
from experiments.tasks import is_endless

__all__ = [
    "PROBED_SPACES",
    "AnchorsOptions",
    "EarlyExitOptions",
    "NecessityOptions",
    "PatchOptions",
    "PcaOptions",
    "ProbedSpace",
    "ProbesOptions",
    "TransferOptions",
]


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


ProbedSpace = Literal["h", "z", "keys", "values"]
PROBED_SPACES: tuple[ProbedSpace, ...] = get_args(ProbedSpace)
"""Residual stream, fed embedding, and the two halves of a cache slot."""


@dataclass(frozen=True)
class ProbesOptions(IntervalOptions, RunOptions, SplitOptions, ModelOptions):
    """Linear probes of latents: operation, operands, steps and answer, by space, latent and layer."""

    COMMAND: ClassVar[str] = "probes"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"folds": 3, "shuffles": 1, "control_draws": 1}

    out: Path = Path("runs/probes")
    split: str = "all"
    """Split of the task: all of templates; of arithmetic and polynomial, which have no such split, test is meant."""
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

    @property
    def chosen_split(self) -> str:
        return "test" if self.split == "all" and is_endless(self.task) else self.split


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
