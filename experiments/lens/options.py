"""Options of the lens commands, each a class over the groups of experiments/study/options.py. Free of torch.

A run of today has the size of its batches and the number of resamples in its identity, and says its options as they
were before --rope, --level and the bounds on problems came to these commands (`LensRunOptions`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from experiments.study.options import (
    IntervalOptions,
    JudgingOptions,
    ModelOptions,
    PromptOptions,
    QuestionOptions,
    RunOptions,
    SplitOptions,
    ThreadOptions,
)
from experiments.tasks import check_split, generator_of

__all__ = [
    "OPTIONS",
    "TOP",
    "AskOptions",
    "CausalOptions",
    "DetectOptions",
    "DifferenceOptions",
    "LensRunOptions",
    "ReadOptions",
    "ReadingOptions",
    "Rule",
    "ShowOptions",
    "TrainOptions",
    "TransferOptions",
]

TOP = 10
"""Detection is computed for k = 1..TOP; a difference shows as many tokens."""
Rule = Literal["first", "all"]
"""How a number of several tokens counts."""


@dataclass(frozen=True)
class LensRunOptions(RunOptions):
    """Where a run is written, its seed, and how much is computed at once: all of it part of a lens run's identity."""

    IDENTITY: ClassVar[frozenset[str]] = frozenset({"batch_size", "resamples", "level"})
    LATER: ClassVar[frozenset[str]] = frozenset({"rope", "min_steps", "max_steps", "level"})

    batch_size: int = 64


@dataclass(frozen=True)
class ReadOptions(LensRunOptions):
    """Which lenses are read."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"lens"})  # a hash of the lenses is in the identity

    lens: Path = Path("runs/lens")
    """Folder of `codi lens train`, or a folder in tuned_lens's format."""
    read: tuple[str, ...] = ("plain", "each", "all")
    """Lenses: plain, each (at every position its own; of a difference A − B that of A), or a name that was trained.
    "plain" alone needs no folder. `codi lens transfer` takes none for every one that was trained, `codi lens causal`
    exactly one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [" ".join(name.lower().split()) for name in self.read]
        if len(set(names)) < len(names):
            raise ValueError(f"read names a lens twice: {', '.join(self.read)}")

    def check_inputs(self) -> None:
        super().check_inputs()
        if set(self.read) != {"plain"} and not self.lens.exists():
            raise ValueError(f"there are no lenses at {self.lens}: run codi lens train, or give --read plain")


@dataclass(frozen=True)
class ReadingOptions(ReadOptions, IntervalOptions, SplitOptions, ModelOptions):
    """What is asked for by commands that read lenses on many prompts."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 2}

    limit: int | None = 500


@dataclass(frozen=True)
class TrainOptions(LensRunOptions, IntervalOptions, QuestionOptions, ModelOptions):
    """Train tuned lenses, every latent × layer in one pass over streamed rollouts.

    With --legacy: the published recipe, which replaces the options of training: 500 questions, 3 passes, batches of
    one, Adam 1e-3 without decay, clipping or early stopping, target normed twice; the lenses keep the names given (the
    published ones are read with "published …"). The held-out KL is to the model's true output all the same. Published
    runs were in bfloat16.
    """

    COMMAND: ClassVar[str] = "lens train"
    AT_LEAST: ClassVar[Mapping[str, float]] = {
        "prompts": 1, "validation": 2, "test": 2, "steps": 1, "evaluate_every": 1, "patience": 1, "text_tokens": 1,
        "weight_decay": 0,
    }  # fmt: skip

    out: Path = Path("runs/lens")
    lenses: tuple[str, ...] = ("each", "all", "odd", "even", "text")
    """Lenses to train: each (one per position: begin of thought and every latent), all, odd, even, a latent ("3"),
    several ("3 and 5"), text (tokens of the questions), and "published …" for the 0-based reading of a name."""
    task: str = "arithmetic"
    split: str = "train"
    """Split of a folder or hub data set that the questions are taken from; the generated tasks have a split of their
    own for training, validation and test each."""
    prompts: int | None = 4096
    """Training questions, a seeded choice (published: 500); passes over them go on until the steps are done."""
    validation: int = 128
    """Questions for early stopping; they share no numbers with the others."""
    test: int = 256
    """Questions for the reported KL; they share no numbers with the others."""
    text: Path | None = None
    """Text file, one passage a line, for the lens "text"; None: the tokens of the training questions."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd: the recipe of the tuned-lens paper (Nesterov momentum 0.9, clip 1, linear decay)."""
    lr: float | None = None
    """Highest learning rate; None: 1e-3 for adamw (as published for CODI), 0.1 for sgd."""
    weight_decay: float = 1e-3
    """Weight decay, towards the identity."""
    steps: int = 300
    """Most steps, one batch each; the rate decays linearly to zero over them."""
    evaluate_every: int = 25
    """Steps between looks at the validation questions; the state is saved as often."""
    patience: int = 6
    """A translator (one lens at one layer) stops after so many looks in a row without a better validation KL."""
    text_tokens: int = 8
    """Text tokens taken from each question or passage."""
    legacy: bool = False
    """The published recipe; what it replaces is said above."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if generator_of(self.task) and self.split != "train":
            raise ValueError(f"split is for a folder or data set, task {self.task!r} has its own: got {self.split!r}")

    def resolved(self) -> TrainOptions:
        """The options with what --legacy replaces; they are the identity of the run."""
        return dataclasses.replace(self, prompts=500, batch_size=1, steps=1500) if self.legacy else self

    def check_inputs(self) -> None:
        if self.resolved() != self:
            self.resolved().check_inputs()
            return
        super().check_inputs()
        if not generator_of(self.task):
            check_split(self.task, self.split)
        if self.text is not None and not self.text.is_file():
            raise ValueError(f"there is no text file {self.text}")


@dataclass(frozen=True)
class ShowOptions(ReadOptions, SplitOptions, ModelOptions):
    """Heatmap of the most probable tokens of one prompt, at every position and layer."""

    COMMAND: ClassVar[str] = "lens show"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"top": 1}
    LATER: ClassVar[frozenset[str]] = frozenset({"task", "limit", "split"})

    out: Path | None = None  # type: ignore[assignment]
    """Folder; None: runs/lens-show-… with a hash of prompt and lenses."""
    limit: int | None = None
    read: tuple[str, ...] = ("plain", "each")
    text: str | None = None
    """The prompt, any text; None: the first problem of the task."""
    top: int = 5
    """Tokens per position and layer in the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is not None and not self.text.strip():
            raise ValueError("text must hold at least one word, got an empty one")
        if self.text is not None:
            for name in ("task", "split", "limit", "min_steps", "max_steps", "reach"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"give either a text or a problem of a task: --text goes without --{_typed(name)}")


@dataclass(frozen=True)
class DetectOptions(JudgingOptions, ReadingOptions):
    """Detection rates of intermediate and final values for k = 1..10, chance level, entropy, word families."""

    COMMAND: ClassVar[str] = "lens detect"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"donors": 1}

    out: Path = Path("runs/lens-detect")
    numbers: Rule = "first"
    """How a number of several tokens counts: by its first token, or only if all its tokens are among the k."""
    donors: int = 20
    """Other prompts per prompt behind the chance level."""
    words: tuple[str, ...] = ("therefore", "however", "because")
    """Word families, lower case; each is looked for with and without leading space and capital."""
    k: int = 5
    """k of the figures, of the answer table and of the summary, 1..10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= TOP:
            raise ValueError(f"k must be in 1..{TOP}, got {self.k}")
        if len(set(self.words)) < len(self.words):
            raise ValueError(f"words names a family twice: {', '.join(self.words)}")
        if not all(word.strip() for word in self.words):
            raise ValueError("words must hold at least one letter each, got an empty one")


@dataclass(frozen=True)
class DifferenceOptions(ReadingOptions):
    """Difference lens: the lens on mean_A − mean_B for all pairs and layers."""

    COMMAND: ClassVar[str] = "lens difference"

    out: Path = Path("runs/lens-difference")
    split: str = "derivation"
    read: tuple[str, ...] = ("plain", "all")
    bias: Literal["linear", "published"] = "linear"
    """linear: the translator's bias is left out (it cancels in a difference); published: the difference is read as if
    it were a state."""
    figure_layers: tuple[int, ...] | None = None
    """Layers that get a figure; None: all of a model with up to 8 blocks, else five."""


@dataclass(frozen=True)
class TransferOptions(ReadingOptions):
    """Every lens at every position, its own or not: latents ↔ text."""

    COMMAND: ClassVar[str] = "lens transfer"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"text_tokens": 1}

    out: Path = Path("runs/lens-transfer")
    limit: int | None = 300
    read: tuple[str, ...] = ()
    text_tokens: int = 8
    """Text tokens taken from each question."""


@dataclass(frozen=True)
class CausalOptions(ReadOptions, IntervalOptions, PromptOptions, ModelOptions):
    """Ablate what the lens reads, inside the model, beside random directions (causal basis extraction)."""

    COMMAND: ClassVar[str] = "lens causal"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 2, "directions": 1}

    out: Path = Path("runs/lens-causal")
    limit: int | None = 64
    derivation: int = 256
    read: tuple[str, ...] = ("each",)
    batch_size: int = 512
    split: str = "test"
    """Effects are measured on prompts of this split of the task; no other can be asked for, because means and
    directions are taken from what is left."""
    directions: int = 4
    """Directions of each kind per latent and layer."""
    latents: tuple[int, ...] | None = None
    """Latents; None: all."""
    layers: tuple[int, ...] | None = None
    """Layers, 0 (the embedding) to n_layers − 1; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.read) != 1:
            raise ValueError(f"causal takes one lens, got {', '.join(self.read) or 'none'}")
        if self.split != "test":
            raise ValueError(f"split must be test, got {self.split!r}")
        for name in ("latents", "layers"):
            given = getattr(self, name) or ()
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names one twice: {', '.join(map(str, given))}")

    def check_inputs(self) -> None:
        super().check_inputs()
        number = self.known_latents()
        wrong = [k for k in self.latents or () if k < 1 or (number is not None and k > number)]
        if wrong:
            raise ValueError(f"latents must be in 1..{'n' if number is None else number}, got {wrong[0]}")
        wrong = [layer for layer in self.layers or () if layer < 0]
        if wrong:
            raise ValueError(f"layers must be 0 or more, got {wrong[0]}")


@dataclass(frozen=True, kw_only=True)
class AskOptions(ThreadOptions, ModelOptions):
    """One question: the model's answer, and what a lens reads at each latent of the thought before it."""

    COMMAND: ClassVar[str] = "ask"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"top": 1}

    question: tyro.conf.Positional[str]
    """The question, in quotes."""
    lens: Path | None = None
    """Folder of tuned lenses (codi lens train); None: the logit lens."""
    read: str = "each"
    """Which of them: each (at every latent its own), or the name of one. Not used without --lens."""
    layers: tuple[int, ...] | None = None
    """Layers that are read, 0 (the embedding) to the model's last, which is its own next-token distribution; None: the
    last two."""
    top: int = 5
    """Most probable tokens that are shown."""
    direct: bool = False
    """Also the answer without any thought."""
    chain: bool = False
    """Also the answer after a written chain of thought."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question.strip():
            raise ValueError("the question must hold at least one word, got an empty one")
        given = self.layers or ()
        if self.layers == () or len(set(given)) < len(given) or any(layer < 0 for layer in given):
            words = " ".join(map(str, given)) or "none"
            raise ValueError(f"layers must be different, from 0, and at least one: got {words}")

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.lens is not None and not self.lens.exists():
            raise ValueError(f"there are no lenses at {self.lens}: run codi lens train, or leave --lens out")


def _typed(name: str) -> str:
    return name.replace("_", "-")


OPTIONS = (
    Annotated[TrainOptions, tyro.conf.subcommand("train")]
    | Annotated[ShowOptions, tyro.conf.subcommand("show")]
    | Annotated[DetectOptions, tyro.conf.subcommand("detect")]
    | Annotated[DifferenceOptions, tyro.conf.subcommand("difference")]
    | Annotated[TransferOptions, tyro.conf.subcommand("transfer")]
    | Annotated[CausalOptions, tyro.conf.subcommand("causal")]
)
