"""Options of the control commands, each a class over the groups of experiments/study. Free of torch and pandas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import tyro

from experiments.study.language import ItemOptions, LanguageOptions
from experiments.study.options import AnswerOptions, DrawOptions, RunOptions, StatisticsOptions
from lm.terms import VECTOR_METHODS, EditPositions

__all__ = [
    "CONTRASTS",
    "OPTIONS",
    "DeriveOptions",
    "Negatives",
    "ShowOptions",
    "SteeringOptions",
    "SweepOptions",
    "TransferOptions",
    "VectorOptions",
    "parse_alphas",
    "parse_layers",
    "parse_methods",
]

Negatives = Literal["swapped", "letters", "failures", "given"]
"""What a question with its right answer is held against."""
ChoiceSet = Literal["item", "task"]
Scale = Literal["as-is", "equal-norm", "equal-kl"]
CONTRASTS = ("contrastive", "pca-contrast")
"""Methods that need a negative for every positive text."""
_Words = tuple[str, ...]
Word = TypeVar("Word", bound=str)


def _listed(words: Sequence[str]) -> list[str]:
    return [item.strip() for word in words for item in word.split(",") if item.strip()]


def parse_methods(words: Sequence[str]) -> tuple[str, ...]:
    """Names of methods, each once; "all" is every one.

    Raises:
        ValueError: an unknown name, one given twice, or none.
    """
    given = _listed(words)
    if given == ["all"]:
        return VECTOR_METHODS
    wrong = next((word for word in given if word not in VECTOR_METHODS), None)
    if wrong is not None or not given:
        raise ValueError(f"methods must be among {', '.join(VECTOR_METHODS)}, or all, got {wrong or 'none'!r}")
    if len(set(given)) < len(given):
        raise ValueError(f"methods names one twice: {', '.join(given)}")
    return tuple(given)


def parse_alphas(words: Sequence[str]) -> tuple[float, ...]:
    """Coefficients in ascending order, each once, 0 among them: numbers, or ranges low:high:step with both ends.

    Raises:
        ValueError: what is no finite number or no range, or nothing but 0.
    """
    found = {0.0}
    for word in _listed(words):
        try:
            numbers = [float(part) for part in word.split(":")]
        except ValueError:
            raise ValueError(f"alphas must be numbers such as 0.5 or ranges such as -1:1:0.1, got {word!r}") from None
        if not all(map(math.isfinite, numbers)) or len(numbers) not in (1, 3):
            raise ValueError(f"alphas must be finite numbers or ranges low:high:step, got {word!r}")
        if len(numbers) == 3:
            low, high, step = numbers
            if step <= 0 or high < low:
                raise ValueError(f"a range of alphas goes up, low:high:step with a step above 0, got {word!r}")
            numbers = [low + i * step for i in range(round((high - low) / step + 0.25) + 1)]
            numbers = [number for number in numbers if number <= high + 1e-9 * step]
        found |= {round(number, 9) + 0.0 for number in numbers}
    if found == {0.0}:
        raise ValueError("alphas must hold a number other than 0 (0 is the unsteered model, which is always computed)")
    return tuple(sorted(found))


def parse_layers(words: Sequence[str], n_layers: int | None = None, middle: int = 1) -> tuple[int, ...]:
    """Layers in ascending order, each once: numbers from 1, ranges such as 5-10, "middle" or "all".

    Args:
        words: as given.
        n_layers: of the model; None: not known yet, only the form is checked.
        middle: what "middle" stands for.

    Raises:
        ValueError: no layer of this model.
    """
    found: set[int] = set()
    allowed = f"1..{n_layers}" if n_layers else "numbers from 1"
    for word in _listed(words):
        first, dash, last = word.partition("-")
        if word == "middle":
            found.add(middle)
        elif word == "all":
            found |= set(range(1, (n_layers or 0) + 1))
        elif first.isdecimal() and (last.isdecimal() or not dash):
            low, high = int(first), int(last or first)
            if not 1 <= low <= high or (n_layers is not None and high > n_layers):
                raise ValueError(f"layers must be in {allowed}, middle or all, got {word!r}")
            found |= set(range(low, high + 1))
        else:
            raise ValueError(f"layers must be {allowed}, ranges such as 5-10, middle or all, got {word!r}")
    if not _listed(words):
        raise ValueError(f"layers must name at least one of {allowed}, got none")
    return tuple(sorted(found))


# --- Groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VectorOptions(ItemOptions):
    """How vectors are made."""

    methods: Annotated[_Words, tyro.conf.arg(metavar="|".join((*VECTOR_METHODS, "all")))] = ("contrastive",)
    """Methods: mean of the states (reading), mean of the paired differences (contrastive), or the first principal
    component of either; all."""
    negatives: Negatives = "swapped"
    """Against what: the question with another answer, 75 random letters, the model's own wrong answers (items that it
    fails on), or given pairs (--pairs)."""
    pairs: Path | None = None
    """JSONL file with the texts positive and negative; with --negatives given."""
    centred: bool = True
    """Take the mean away before a principal component (published)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_methods(self.methods)
        if (self.pairs is not None) != (self.negatives == "given"):
            raise ValueError("--pairs FILE and --negatives given go together")

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.pairs is not None and not self.pairs.is_file():
            raise ValueError(f"there is no file of pairs {self.pairs}")


@dataclass(frozen=True)
class SteeringOptions(StatisticsOptions, AnswerOptions, DrawOptions, VectorOptions):
    """What is added, where, and what stands beside it."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"shuffled": 0}

    alphas: Annotated[_Words, tyro.conf.arg(metavar="LOW:HIGH:STEP|A …")] = ("-1:1:0.1",)
    """Multiples of the vector; 0, the unsteered model, is always computed."""
    layers: Annotated[_Words, tyro.conf.arg(metavar="middle|all|L|L-L …")] = ("middle",)
    """Layers: the output of block 1, 2, …; each is steered alone."""
    positions: EditPositions = "all"
    """Tokens that are edited: prompt and generated ones (published), either, the last prompt token, or once: the first
    generated token."""
    normalise: bool = False
    """Bring edited states back to the norm they had."""
    draws: int = 20
    """Random directions of the vector's norm per layer and alpha; +alpha and −alpha share them (a random direction is
    as good as its opposite). 19 are the fewest that can tell a vector from random ones."""
    shuffled: int = 2
    """Vectors of shuffled pairs: the two texts of each pair swapped by the toss of a coin, at the vector's norm."""
    choices: ChoiceSet = "item"
    """Answers that restricted choice compares: those of the item, or every different answer of the task (published)."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None: 10, and 512 where the answer is a number at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_alphas(self.alphas)
        parse_layers(self.layers)


# --- Commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeriveOptions(RunOptions, VectorOptions, LanguageOptions):
    """Make control vectors and write them as files (safetensors; GGUF for llama.cpp)."""

    COMMAND: ClassVar[str] = "control derive"

    out: Path = Path("runs/control-derive")
    methods: Annotated[_Words, tyro.conf.arg(metavar="|".join((*VECTOR_METHODS, "all")))] = ("all",)
    llama_cpp: bool = True
    """Also write every vector as a .gguf file, which llama.cpp reads."""


@dataclass(frozen=True)
class SweepOptions(SteeringOptions, RunOptions, LanguageOptions):
    """Steer with every vector, layer and coefficient, beside random directions; choose on some items, report on
    others."""

    COMMAND: ClassVar[str] = "control sweep"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"vectors"})

    out: Path = Path("runs/control-sweep")
    vectors: Path | None = None
    """Folder of `codi control derive`, or a file of a vector; None: they are made here, from the derivation items."""
    scale: Scale = "as-is"
    """What alpha means: a multiple of each vector as it is; of each vector at the norm of the first method's; or as
    much of each as moves the next-token distribution (KL) as far as alpha of the first method does."""

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.vectors is not None and not self.vectors.exists():
            raise ValueError(f"there are no vectors at {self.vectors}: make them with codi control derive")


@dataclass(frozen=True)
class ShowOptions(RunOptions, LanguageOptions):
    """Norms, cosines between layers and methods, and what the vectors say through the unembedding."""

    COMMAND: ClassVar[str] = "control show"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"top": 1}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"vectors"})

    out: Path = Path("runs/control-show")
    vectors: Path = Path("runs/control-derive")
    """Folder of `codi control derive`, or a file of a vector (.safetensors, .gguf)."""
    top: int = 8
    """Tokens per layer and direction."""

    def check_inputs(self) -> None:
        super().check_inputs()
        if not self.vectors.exists():
            raise ValueError(f"there are no vectors at {self.vectors}: make them with codi control derive")


@dataclass(frozen=True)
class TransferOptions(SteeringOptions, RunOptions, LanguageOptions):
    """Steer every task with the vector of every other one."""

    COMMAND: ClassVar[str] = "control transfer"

    out: Path = Path("runs/control-transfer")
    task: tyro.conf.Suppress[str] = "indirect-objects-A"
    tasks: tuple[str, ...] = ("indirect-objects-A", "indirect-objects-B", "indirect-objects-AL", "indirect-objects-BL")
    """Tasks that vectors are taken from and that are steered; see --task of codi control sweep."""
    alphas: Annotated[_Words, tyro.conf.arg(metavar="LOW:HIGH:STEP|A …")] = ("-1", "-0.5", "0.5", "1")
    """Multiples of the vector; which one is reported is chosen on the validation items of its own task."""
    shuffled: int = 0
    limit: int = 30
    validation: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.tasks)) < len(self.tasks) or len(self.tasks) < 2:
            raise ValueError(f"tasks must name two or more different ones, got {', '.join(self.tasks) or 'none'}")
        if len(parse_methods(self.methods)) != 1:
            raise ValueError(f"transfer takes one method, got {', '.join(self.methods)}")
        if _listed(self.layers) in (["all"],) or len(_listed(self.layers)) != 1 or "-" in self.layers[0]:
            raise ValueError(f"transfer takes one layer, got {' '.join(self.layers)}")
        if self.negatives == "given":
            raise ValueError("transfer makes the pairs of every task itself: negatives cannot be given")

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.tasks.item_sources import check_item_task

        for task in self.tasks:
            check_item_task(task)


OPTIONS = (
    Annotated[DeriveOptions, tyro.conf.subcommand("derive")]
    | Annotated[SweepOptions, tyro.conf.subcommand("sweep")]
    | Annotated[ShowOptions, tyro.conf.subcommand("show")]
    | Annotated[TransferOptions, tyro.conf.subcommand("transfer")]
)
