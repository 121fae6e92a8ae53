"""Options of the chain-of-thought commands, each a class over the groups of experiments/study. Free of torch.

Layers are numbered from 1: layer l is the output of block l. The published layers count blocks from 0; published 13 is
14 here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from experiments.study.language import LanguageOptions
from experiments.study.options import Options, RunOptions, StatisticsOptions
from experiments.tasks.reasoner import DIRECT, STEPS
from lm.terms import RunTokens

if TYPE_CHECKING:
    from experiments.tasks.items import ItemSplits

__all__ = [
    "OPTIONS",
    "SETS",
    "ChooseBy",
    "ContinuousTokens",
    "CotRunOptions",
    "DeriveOptions",
    "EvalOptions",
    "GridOptions",
    "Scoring",
    "SetOptions",
    "ShowOptions",
    "SingleTokens",
    "SteeringOptions",
    "SuffixOptions",
]

SETS = ("ontology-1", "ontology-2", "ontology-3", "babi-15", "babi-16", "arithmetic")
ContinuousTokens = Literal["answer", "generated", "all"]
SingleTokens = Literal["prompt", "last"]
Scoring = Literal["text", "letters", "choices"]
ChooseBy = Literal["chains", "accuracy"]


# --- Groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetOptions(Options):
    """Which sets of questions, and how many of each."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"derivation": 1, "validation": 1, "test": 1}

    sets: tuple[str, ...] = SETS
    """Sets that the vector is derived from, the layer is chosen on and results are reported on, on different questions:
    ontology-1 to -3, babi-15, babi-16 (babi-15:unseen: other words), arithmetic, gsm8k, multiarith, svamp, mmlu:PLACE,
    arc:PLACE, agieval:PLACE, bigbench:PLACE (a file or a hub id), or any file, folder or hub id with questions."""
    derivation_sets: tuple[str, ...] | None = None
    """Sets that the vector is derived from; None: those of --sets."""
    test_sets: tuple[str, ...] | None = None
    """Sets that results are reported on; None: those of --sets. One that the vector was not derived from shows whether
    it carries over."""
    derivation: int = 8
    """Most questions of each set that the vector is derived from."""
    validation: int = 4
    """Most questions of each set that layer and coefficient are chosen on."""
    test: int = 8
    """Most questions of each set that results are reported on."""

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Part -> its sets."""
        return {
            "derivation": self.derivation_sets or self.sets,
            "validation": self.sets,
            "test": self.test_sets or self.sets,
        }

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.tasks.item_sources import check_item_task

        for task in dict.fromkeys(task for tasks in self.parts.values() for task in tasks):
            check_item_task(task)

    def load_splits(self, seed: int, tokenizer: Any) -> ItemSplits:
        """Questions in three parts that share nothing.

        Args:
            seed: of generators, division and choice.
            tokenizer: of the model.

        Raises:
            ValueError: no such set, or too few questions.
        """
        from experiments.tasks.item_sets import load_sets
        from experiments.tasks.item_sources import Sizes

        sizes = Sizes(self.derivation, self.validation, self.test)
        return load_sets(**self.parts, sizes=sizes, seed=seed, tokenizer=tokenizer)


@dataclass(frozen=True)
class SuffixOptions(Options):
    """What is written behind a question, and how long the answer may be."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"max_new_tokens": 2}

    steps_text: str = STEPS
    """Sentence that asks for steps (the published one)."""
    direct_text: str = DIRECT
    """Sentence that asks for the answer at once (the published one)."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps_text", "direct_text"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name.replace('_', '-')} must hold at least one word, got an empty text")
        if self.steps_text.strip() == self.direct_text.strip():
            raise ValueError("steps-text and direct-text must differ")


@dataclass(frozen=True)
class SteeringOptions(StatisticsOptions, SuffixOptions):
    """How the vector is added, and how answers are judged."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"vectors"})  # a hash of the vector is in the identity

    vectors: Path = Path("runs/cot-derive")
    """Folder of `codi cot derive`."""
    continuous_tokens: ContinuousTokens = "answer"
    """Tokens that continuous steering edits: answer: the last of the prompt, which predicts the first word, and every
    one that is generated; generated: without that one; all: the whole prompt too."""
    single_tokens: SingleTokens = "prompt"
    """Tokens that single steering edits, once, while the prompt is read: all of the prompt, or its last one."""
    score: Scoring = "text"
    """How multiple choice is judged: by the letter in the text that was written, or by which letter, or which choice
    per character of it, is most likely after the prompt (as the harness does without generation)."""

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.cot.places import VECTOR

        if not (self.vectors / VECTOR).is_file():
            raise ValueError(f"there is no vector at {self.vectors / VECTOR}: run codi cot derive, or give --vectors")


# --- Commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeriveOptions(StatisticsOptions, RunOptions, SuffixOptions, SetOptions, LanguageOptions):
    """Make the vector: the model answers every question twice, step by step and at once; the vector is the mean
    difference of its residual stream, over tokens first, then over questions."""

    COMMAND: ClassVar[str] = "cot derive"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"temperature": 0, "shuffles": 0, "derivation": 2}

    out: Path = Path("runs/cot-derive")
    batch_size: int = 32
    tokens: RunTokens = "generated"
    """Tokens that the mean is taken over: those that the model wrote, these and the prompt (all), or the last one of
    the prompt."""
    temperature: float = 1.0
    """Of the model's own answers, drawn with --seed; 0: greedy."""
    shuffles: int = 2
    """Shuffled vectors: in every pair a coin decides which of the two answers counts as the step-by-step one."""


@dataclass(frozen=True)
class GridOptions(RunOptions, SteeringOptions, SetOptions, LanguageOptions):
    """Steer at every layer with every coefficient, continuously and once, on validation questions; choose."""

    COMMAND: ClassVar[str] = "cot grid"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"parse_loss": 0}

    out: Path = Path("runs/cot-grid")
    batch_size: int = 32
    layers: tuple[int, ...] | None = None
    """Layers from 1; None: three, at a third, half and two thirds of the depth."""
    coefficients: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Multiples of the vector, the same for both ways of steering."""
    choose: ChooseBy = "chains"
    """What decides: the rate of chains, or accuracy. Ties: the other one, then the smaller coefficient, then the lower
    layer."""
    parse_loss: float = 0.1
    """Only cells count in which at most this share of answers less can be read than without steering (if any does)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_numbers("coefficients", self.coefficients)
        if any(c <= 0 for c in self.coefficients):
            raise ValueError(f"coefficients must be above 0, got {min(self.coefficients):g}")
        if self.layers is not None:
            _check_numbers("layers", self.layers)


@dataclass(frozen=True)
class EvalOptions(RunOptions, SteeringOptions, SetOptions, LanguageOptions):
    """Report on test questions: the chosen steering beside the three prompts, −c, random and shuffled vectors."""

    COMMAND: ClassVar[str] = "cot eval"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"draws": 1}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"grid"})  # what was chosen is in the identity

    out: Path = Path("runs/cot-eval")
    batch_size: int = 32
    grid: Path = Path("runs/cot-grid")
    """Folder of `codi cot grid`, which says what was chosen."""
    continuous: tuple[int, float] | None = None
    """Layer and coefficient of continuous steering; None: what the grid chose."""
    single: tuple[int, float] | None = None
    """Layer and coefficient of single steering; None: what the grid chose."""
    draws: int = 5
    """Random directions of the vector's norm beside it (the shuffled vectors are those of the derivation)."""
    margin: float = 0.1
    """Non-inferiority: steering competes with the step-by-step prompt if it loses less than this, a fraction."""
    samples: int = 3
    """Questions whose texts are shown side by side in the summary; samples.md has all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.margin < 1:
            raise ValueError(f"margin must lie between 0 and 1, got {self.margin}")

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.cot.places import CHOICE

        if (self.continuous is None or self.single is None) and not (self.grid / CHOICE).is_file():
            raise ValueError(
                f"there is no choice at {self.grid / CHOICE}: run codi cot grid, or give --continuous LAYER C and "
                "--single LAYER C"
            )


@dataclass(frozen=True)
class ShowOptions(RunOptions, LanguageOptions):
    """Look at a vector: norms, cosines between layers and sets, and the tokens that it stands for (logit lens)."""

    COMMAND: ClassVar[str] = "cot show"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"top": 1}

    vectors: Path = Path("runs/cot-derive")
    """Folder of `codi cot derive`."""
    texts: Path = Path("runs/cot-eval")
    """Folder of `codi cot eval` whose texts are shown side by side; none are shown where there is none."""
    out: Path = Path("runs/cot-show")
    top: int = 8
    """Tokens per layer and direction."""
    samples: int = 3
    """Questions whose texts are shown."""


@dataclass(frozen=True)
class CotRunOptions(StatisticsOptions, RunOptions, SuffixOptions, SetOptions, LanguageOptions):
    """derive, grid and eval in one go: a folder of each inside --out. What is not named here has its default."""

    COMMAND: ClassVar[str] = "cot run"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"draws": 1, "derivation": 2, "temperature": 0, "shuffles": 0}

    out: Path = Path("runs/cot")
    batch_size: int = 32
    tokens: RunTokens = "generated"
    """As in `codi cot derive`."""
    temperature: float = 1.0
    """As in `codi cot derive`."""
    shuffles: int = 2
    """As in `codi cot derive`."""
    layers: tuple[int, ...] | None = None
    """As in `codi cot grid`."""
    coefficients: tuple[float, ...] = GridOptions.coefficients
    """As in `codi cot grid`."""
    choose: ChooseBy = "chains"
    """As in `codi cot grid`."""
    continuous_tokens: ContinuousTokens = "answer"
    """As in `codi cot grid`."""
    single_tokens: SingleTokens = "prompt"
    """As in `codi cot grid`."""
    score: Scoring = "text"
    """As in `codi cot grid`."""
    draws: int = 5
    """As in `codi cot eval`."""
    margin: float = 0.1
    """As in `codi cot eval`."""


def _check_numbers(name: str, values: tuple[float, ...]) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} must be one or more finite numbers, got {', '.join(map(str, values)) or 'none'}")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} names one twice: {', '.join(f'{value:g}' for value in values)}")


OPTIONS = (
    Annotated[DeriveOptions, tyro.conf.subcommand("derive")]
    | Annotated[GridOptions, tyro.conf.subcommand("grid")]
    | Annotated[EvalOptions, tyro.conf.subcommand("eval")]
    | Annotated[ShowOptions, tyro.conf.subcommand("show")]
    | Annotated[CotRunOptions, tyro.conf.subcommand("run")]
)
