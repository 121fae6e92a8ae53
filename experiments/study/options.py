"""Options that commands share: one definition, one help text and one check of each, in groups that a command inherits.

    @dataclass(frozen=True)
    class NecessityOptions(StudyOptions):
        \"\"\"Which latents, and which subsets of them, the answer needs.\"\"\"

        COMMAND: ClassVar[str] = "necessity"

        out: Path = Path("runs/necessity")    # another default, the same help text
        all_subsets: bool = True
        \"\"\"An option of its own, with its help text.\"\"\"

The fields are flat, so that every option is one word on the command line. tyro shows the fields of the last base first:
bases are therefore named from the last to be shown to the first (`StatisticsOptions, RunOptions, …, ModelOptions`).

What belongs to an option beside its type and text is said once, in three sets on the class that defines the option:
`AT_LEAST` (smallest values), `NOT_IDENTITY` (where and how fast, not what: no part of a run's identity) and `LATER` (it
came to some commands after runs had been written: part of the identity only where it differs from its default).

Imports neither torch nor pandas, and nothing that does until `load` is called: help and refusals are quick.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

import tyro

from experiments.study.option_class import Options, changed, command_line, identity_of
from experiments.tasks import Reading, generator_of
from lm.terms import AnswerRule, Attention, ControlText, Device, DrawNorm, Dtype, Mask, ProtocolName, Rope

if TYPE_CHECKING:
    from codi import CodiModel
    from experiments.statistics.clusters import Settings
    from experiments.tasks.split import Split

__all__ = [
    "AnswerOptions",
    "Bounds",
    "ControlOptions",
    "DrawOptions",
    "IntervalOptions",
    "JudgingOptions",
    "ModelOptions",
    "Options",
    "PromptOptions",
    "PublishedPromptOptions",
    "QuestionOptions",
    "RunOptions",
    "SplitOptions",
    "StatisticsOptions",
    "StudyOptions",
    "TaskOptions",
    "ThreadOptions",
    "changed",
    "command_line",
    "identity_of",
    "load_model",
]


# --- Groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which CODI model, and how it runs. A run's identity has the hash of the weights and the device that was used."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"model", "device"})
    LATER: ClassVar[frozenset[str]] = frozenset({"control_text"})

    model: str = "checkpoints/tiny"
    """Checkpoint: a folder or a hub id such as bcywinski/codi_llama1b-answer_only."""
    base: str | None = None
    """Base model, a folder or hub id; None: what the checkpoint says or is known to be trained on."""
    protocol: ProtocolName | None = None
    """Token order; None: what the checkpoint says or looks like."""
    lora_alpha: float | None = None
    """LoRA scale times rank; None: what the checkpoint says, or the published ratio."""
    mask: Mask = "carried"
    """Attention mask after the prompt: carried on, or dropped as in the published evaluation."""
    rope: Rope = "float32"
    """Rotary frequencies: kept in float32, or rounded as published runs in bfloat16 do."""
    device: Device = "auto"
    """Where to compute; auto: CUDA if there is any."""
    dtype: Dtype = "float32"
    """Number format of the model's weights."""
    control_text: ControlText = "plain"
    """What the text of a control token (<|eocot|>) means in a question: plain text, or the token itself (published)."""

    def load_arguments(self, attention: Attention = "sdpa") -> dict[str, Any]:
        """Arguments of `codi.load_codi`, plain values: a model can be loaded from them in another process."""
        return {
            "path": self.model,
            "base": self.base,
            "protocol": self.protocol,
            "device": None if self.device == "auto" else self.device,
            "dtype": self.dtype,
            "mask": self.mask,
            "rope": self.rope,
            "lora_alpha": self.lora_alpha,
            "attention": attention,
            "control_text": self.control_text,
        }

    def recipe(self, attention: Attention = "sdpa") -> tuple[Callable[..., CodiModel], dict[str, Any]]:
        """Function of a module and its arguments that load the model in any process."""
        return load_model, self.load_arguments(attention)

    def load(self, attention: Attention = "sdpa") -> CodiModel:
        """The model; what loading left out or found otherwise is said on standard error."""
        return load_model(**self.load_arguments(attention))

    def check_inputs(self) -> None:
        super().check_inputs()
        if "/" not in self.model and not Path(self.model).expanduser().exists():  # a hub id is owner/name
            raise ValueError(f"no checkpoint {self.model!r}: no such folder, and a hub id has the form owner/name")

    def recorded(self, name: str) -> Any:
        """An entry of the codi.json in the model's folder, without loading it; None: the folder does not say."""
        file = Path(self.model).expanduser() / "codi.json"
        try:
            return json.loads(file.read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError):  # no folder of ours, or a damaged one: loading it says so
            return None

    def known_latents(self) -> int | None:
        """Latents of the model, read from its folder without loading it; None: the folder does not say."""
        number = self.recorded("n_latents")
        return number if isinstance(number, int) else None


def load_model(**arguments: Any) -> CodiModel:
    """The model that `ModelOptions.load_arguments` describes; its notes are said on standard error."""
    from codi import load_codi

    model = load_codi(**arguments)
    for note in model.notes:
        print(f"{model.name}: {note}", file=sys.stderr)
    return model


class Bounds(TypedDict):
    """Which problems of a task: arguments of `load_task` and `load_split`."""

    min_steps: int | None
    max_steps: int | None
    reach: int | None


@dataclass(frozen=True)
class QuestionOptions(Options):
    """Where questions come from."""

    LATER: ClassVar[frozenset[str]] = frozenset({"reach", "decimal_comma"})

    task: str = "templates"
    """Task of the prompts: templates, arithmetic, word-problems, polynomial (with other constants than m=50,b=7 such as
    polynomial:m=97,b=3), a file (prompts.json, GSM8K .jsonl, …), a folder or a hub id."""
    min_steps: int | None = None
    """Only problems of at least this many steps (polynomial: hops, 2 or more left alone); None: no bound. Not used for
    templates."""
    max_steps: int | None = None
    """Only problems of at most this many steps (polynomial: hops); None: no bound. Not used for templates."""
    reach: int | None = None
    """Only problems in which some value is at least this; None: no bound. Not used for templates."""
    suffix: bool = True
    """Append the sentence that ended the checkpoint's training questions, if it had one."""
    decimal_comma: bool = False
    """Commas are decimal in the task's answers and steps and in the model's texts: 3,5 is 3.5, and 1.234 is 1234."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_steps is not None and self.max_steps is not None and self.min_steps > self.max_steps:
            raise ValueError(f"min-steps must not exceed max-steps, got {self.min_steps} and {self.max_steps}")
        _ = self.reading  # refused here if it contradicts itself

    @property
    def asked(self) -> str:
        """What the prompts are called in a summary."""
        return self.task

    @property
    def reading(self) -> Reading:
        """How answers are read, from the fields of the task and from texts; by a command that judges none, fields."""
        rule = self.answers if isinstance(self, JudgingOptions) else "common"
        if rule == "published" and self.decimal_comma:
            raise ValueError("the published rule knows no decimal commas: leave out --answers or --decimal-comma")
        return Reading(rule, self.decimal_comma)

    @property
    def chosen_task(self) -> str:
        """The task that is loaded; a command may have a default of its own where none is named."""
        return self.task

    @property
    def bounds(self) -> Bounds:
        """The bounds on steps and values; none for templates."""
        if self.task == "templates":  # one set of three steps each
            return {"min_steps": None, "max_steps": None, "reach": None}
        return {"min_steps": self.min_steps, "max_steps": self.max_steps, "reach": self.reach}

    def check_inputs(self) -> None:
        super().check_inputs()
        _check_task(self.chosen_task)


def _check_task(task: str) -> None:
    """Refuse a task that is no name, file, folder or hub id."""
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", task)
    if not generator_of(task) and not hub_id and not Path(task).expanduser().exists():
        from experiments.tasks.readers import TASK_HELP

        raise ValueError(f"unknown task {task!r}: no such file or folder; {TASK_HELP}")


@dataclass(frozen=True)
class TaskOptions(QuestionOptions):
    """Which prompts are asked, and how many."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 1}

    limit: int | None = 160
    """Number of evaluation prompts (a seeded choice); None: all."""


@dataclass(frozen=True)
class SplitOptions(TaskOptions):
    """Prompts of one split of a task."""

    split: str = "test"
    """Split of the task: train, derivation or test of a generated task (templates also has all); that of a folder or
    hub data set (published: the one that the published evaluation reads). Not used for a single file."""

    @property
    def chosen_split(self) -> str:
        """The split that is read; a command may have a default of its own for some tasks."""
        return self.split

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.tasks import check_split

        check_split(self.task, self.chosen_split)

    def load_problems(self, seed: int, question_suffix: str = "", known_steps: int = 0) -> Split:
        """The prompts as the evaluation side of a split without a derivation side.

        Args:
            seed: of the choice.
            question_suffix: text that the checkpoint expects after every question; not used with --no-suffix.
            known_steps: number of intermediate values that every prompt must have.

        Raises:
            ValueError: no such task, no prompts, or prompts without the intermediate values that are needed.
        """
        from experiments.study.prompts import one_split

        suffix = question_suffix if self.suffix else ""
        return one_split(
            self.task, self.chosen_split, self.limit, seed, suffix,
            known_steps=known_steps, reading=self.reading, **self.bounds,
        )  # fmt: skip


@dataclass(frozen=True)
class PromptOptions(TaskOptions):
    """Prompts that are asked, and others that means and directions are taken from."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"derivation": 2}
    LATER: ClassVar[frozenset[str]] = frozenset({"derivation_task"})

    derivation: int = 1120
    """Most prompts that means, directions and donors are taken from. They share no question and no numbers with the
    evaluation prompts (checked); of a file at most half of the clusters are taken."""
    derivation_task: str | None = None
    """Take them from this other task (a name, file, folder or hub id), so that every prompt of --task can be evaluated;
    what shares question, cluster or numbers with an evaluated one is left out. None: from --task."""

    def check_inputs(self) -> None:
        super().check_inputs()
        if self.derivation_task is not None:
            _check_task(self.derivation_task)

    def load_split(self, seed: int, question_suffix: str = "", known_steps: int = 0, donors: bool = False) -> Split:
        """Evaluation and derivation prompts.

        Args:
            seed: of generator, division and choice.
            question_suffix: text that the checkpoint expects after every question; not used with --no-suffix.
            known_steps: number of intermediate values that every prompt must have.
            donors: the derivation prompts give latents to evaluation prompts of the same values (see
                `experiments.tasks.split.load_split`).

        Raises:
            ValueError: as `experiments.tasks.split.load_split`, or prompts without the intermediate values that are
                needed.
        """
        from experiments.study.prompts import two_splits

        suffix = question_suffix if self.suffix else ""
        return two_splits(
            self.task, self.limit, self.derivation, seed, suffix, known_steps=known_steps,
            derivation_task=self.derivation_task, reading=self.reading, donors=donors, **self.bounds,
        )  # fmt: skip


@dataclass(frozen=True)
class PublishedPromptOptions(PromptOptions):
    """Prompts as in `PromptOptions`, or the published choice."""

    legacy: bool = False
    """The published protocol where numbers were published with it; what it changes is said in the study's own help."""

    @property
    def asked(self) -> str:
        return "templates (the published choice)" if self.legacy and generator_of(self.task or "") else self.task

    def check_inputs(self) -> None:
        super().check_inputs()
        self.check_legacy()

    def check_legacy(self) -> None:
        """Refuse what contradicts the published protocol.

        Raises:
            ValueError: it does.
        """
        if self.legacy and generator_of(self.task or "") == "polynomial":
            raise ValueError(f"legacy asks the published templates: leave --legacy or --task out, got {self.task!r}")
        if self.legacy and self.derivation_task is not None:
            raise ValueError(
                "legacy takes means from the evaluated prompts: leave --derivation-task out, got "
                f"{self.derivation_task!r}"
            )

    def load_split(self, seed: int, question_suffix: str = "", known_steps: int = 0, donors: bool = False) -> Split:
        """As `PromptOptions.load_split`; with `legacy`, means are taken from the evaluation prompts themselves, and for
        a generated task these are the published choice of templates."""
        from experiments.study.prompts import published_split, two_splits

        suffix = question_suffix if self.suffix else ""
        if self.legacy and generator_of(self.task or ""):
            return published_split(self.limit, seed, suffix, known_steps, self.reading)
        return two_splits(
            self.task, self.limit, self.derivation, seed, suffix, known_steps=known_steps, legacy=self.legacy,
            derivation_task=self.derivation_task, reading=self.reading, donors=donors, **self.bounds,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ThreadOptions(Options):
    """How much of the machine is used."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"threads": 0}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"threads"})

    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""


@dataclass(frozen=True)
class RunOptions(ThreadOptions):
    """Where a run is written, its seed, and how much is computed at once."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"seed": 0, "batch_size": 1}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"out", "batch_size"})

    out: Path = Path("runs/study")
    """Run folder. One that holds the same run is continued; one that holds another run is refused."""
    seed: int = 0
    """Seed of prompts, draws and statistics."""
    batch_size: int = 256
    """Rows computed at once."""

    def check_inputs(self) -> None:
        super().check_inputs()
        from experiments.study.manifest import check_out

        if self.COMMAND:
            check_out(self.out, self.COMMAND, identity_of(self))


@dataclass(frozen=True)
class JudgingOptions(Options):
    """How answers are judged."""

    LATER: ClassVar[frozenset[str]] = frozenset({"answers"})

    answers: AnswerRule = "common"
    """How the number is read from the model's text. common: as numbers in data sets are, so 1/2, 1e3, -$5, a box or
    "#### n" mean what they mean; published: the last digits in it, as the published evaluation has it."""


@dataclass(frozen=True)
class AnswerOptions(JudgingOptions):
    """How an answer is written, and judged."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"max_new_tokens": 1}

    max_new_tokens: int | None = None
    """Longest answer in tokens; None: 16 for models that answer with a number, 64 for a sentence."""


@dataclass(frozen=True)
class IntervalOptions(Options):
    """How intervals are computed from the trials."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"resamples": 100}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"resamples", "level"})  # trials stay the same

    resamples: int = 2000
    """Bootstrap resamples of clusters behind every interval."""
    level: float = 0.95
    """Coverage of the intervals, a fraction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")

    def statistics(self, seed: int) -> Settings:
        """The same for `experiments.statistics`."""
        from experiments.statistics.clusters import Settings

        return Settings(resamples=self.resamples, level=self.level, seed=seed)


@dataclass(frozen=True)
class StatisticsOptions(IntervalOptions):
    """How intervals and p-values are computed from the trials."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"permutations": 100}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"permutations"})

    permutations: int = 5000
    """Random sign flips behind every family-wise p-value."""

    def statistics(self, seed: int) -> Settings:
        return dataclasses.replace(super().statistics(seed), permutations=self.permutations)


@dataclass(frozen=True)
class DrawOptions(Options):
    """How often what is random is drawn."""

    AT_LEAST: ClassVar[Mapping[str, float]] = {"draws": 1}

    draws: int = 3
    """Draws of every random replacement or control, seeded; use 200 for a publication."""


@dataclass(frozen=True)
class ControlOptions(DrawOptions):
    """Random directions and patches that stand beside a direction."""

    controls: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="random|covariance|shuffled|patch-scalar|patch-coordinate|patch-norm|none …"),
    ] = ("random",)
    """Controls beside the directions, seeded: norm-matched random, covariance-matched and shuffled directions, and
    random-latent patching in three forms (embedding and hidden space); none: only the baseline."""
    draw_norm: DrawNorm = "pair"
    """pair: every pair has draws of its own norms; pooled: the pairs share draws of their mean norms, 15 times
    fewer."""


@dataclass(frozen=True)
class StudyOptions(StatisticsOptions, AnswerOptions, RunOptions, PublishedPromptOptions, ModelOptions):
    """What an intervention study of latents asks for: all groups but the draws."""
