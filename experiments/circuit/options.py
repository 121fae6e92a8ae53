"""Options of `codi circuit` and `codi circuit-latents`. Imports neither torch nor pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, get_args

from experiments.study.language import LanguageOptions
from experiments.study.options import IntervalOptions, ModelOptions, RunOptions, SplitOptions, StatisticsOptions

__all__ = ["CircuitOptions", "LatentCircuitOptions", "What"]

What: TypeAlias = Literal["effects", "knockout", "writers", "flow", "mixing", "rift"]
REASONER = "checkpoints/smollm2-reasoner"


@dataclass(frozen=True)
class CircuitOptions(StatisticsOptions, RunOptions, LanguageOptions):
    """Which heads make each word of a written chain of thought, from where, and what is left without the others."""

    COMMAND: ClassVar[str] = "circuit"
    AT_LEAST: ClassVar[Mapping[str, float]] = {
        "limit": 2, "demonstrations": 0, "step": 1, "held_out": 2, "traced": 2, "draws": 1, "mixing_texts": 4,
    }  # fmt: skip

    model: str = REASONER
    """Language model: a folder, a hub id such as EleutherAI/pythia-410m, a .gguf file, or the folder of a LoRA adapter.
    The default is the adapter that writes chains; checkpoints/smollm2 is its base without training."""
    what: tuple[What, ...] = get_args(What)
    """Parts of the study. effects: heads patched one at a time; knockout: heads silenced, the best ones kept (ranks
    heads by patching, so it takes as long as effects too); writers: heads that write the word, and what silencing them
    does; flow: from where they write; mixing: whether pairs of words tell their relation; rift: pretraining against
    context."""
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
    positions: Literal["all", "last"] = "last"
    """Where a head's clean output is put: at the last token, which finds the heads that act where the word is
    predicted; or at every token (published), which also finds those that prepare it and takes many times as long."""
    step: int = 1
    """Patch every so many blocks only, from the first one on."""
    held_out: int = 6
    """Ontologies that circuits and writers are tried on, of the same words; and as many of words from the other
    lexicon. None of them was used to choose heads."""
    draws: int = 3
    """Random sets of heads of each size."""
    traced: int = 6
    """Of the ontologies, how many are traced: writers, sources, priors."""
    mixing_texts: int = 48
    """Texts whose pairs of words the probes of token mixing learn from; they are tried on half as many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hops <= 4:
            raise ValueError(f"--hops must be in 1..4, got {self.hops}")
        if not self.what or len(set(self.what)) < len(self.what):
            raise ValueError(f"--what takes different parts of {', '.join(get_args(What))}, got {self.what or 'none'}")


@dataclass(frozen=True)
class LatentCircuitOptions(IntervalOptions, RunOptions, SplitOptions, ModelOptions):
    """Which heads write the answer at the end of a latent thought, and from which latent or question token."""

    COMMAND: ClassVar[str] = "circuit-latents"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 2, "draws": 1}

    out: Path = Path("runs/circuit-latents")
    limit: int | None = 64
    batch_size: int = 16
    draws: int = 5
    """Random sets of heads that the writers are compared with."""
