"""Options of `codi polynomial`. Imports neither torch nor pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from experiments.study.manifest import command_of, read_manifest
from experiments.study.options import AnswerOptions, IntervalOptions, ModelOptions, RunOptions, TaskOptions
from experiments.tasks import generator_of, polynomial

if TYPE_CHECKING:
    from experiments.tasks.split import Split

__all__ = ["PolynomialOptions", "named_apart"]


@dataclass(frozen=True)
class PolynomialOptions(IntervalOptions, AnswerOptions, RunOptions, TaskOptions, ModelOptions):
    """Polynomial iteration: where its states are read, which way its inputs go, where the answer comes about.

    For a model that is trained on the task (codi train --data polynomial); each number of hops is asked apart.
    """

    COMMAND: ClassVar[str] = "polynomial"
    AT_LEAST: ClassVar[Mapping[str, float]] = {"limit": 20, "choosing": 20, "folds": 3, "hidden": 2}
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"against"})

    out: Path = Path("runs/polynomial")
    task: str = polynomial.NAME
    """polynomial, or with the constants that the model was trained with polynomial:m=97,b=3."""
    min_steps: int | None = polynomial.HOPS[0]
    """Fewest hops that are asked, 2 or more."""
    max_steps: int | None = polynomial.HOPS[1]
    """Most hops that are asked, up to 5."""
    limit: int = 800  # type: ignore[assignment]
    """Evaluation prompts of each number of hops."""
    choosing: int = 800
    """Other prompts of each number of hops, on which the place is chosen where a state is read best."""
    hidden: int = 200
    """Of the evaluation prompts of each number of hops, on how many inputs are hidden."""
    batch_size: int = 128
    folds: int = 5
    """Parts of the cross-validation of probes."""
    against: Path | None = None
    """Run folder of this study on another model, of a prime modulus where this one's is composite or the other way
    round: decides the claim that prime moduli are worse. None: not testable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, hops in (("min-steps", self.min_steps), ("max-steps", self.max_steps)):
            if hops is None or not polynomial.HOPS[0] <= hops <= polynomial.HOPS[1]:
                raise ValueError(f"{name} must be in {polynomial.HOPS[0]}..{polynomial.HOPS[1]} hops, got {hops}")

    @property
    def hops(self) -> tuple[int, ...]:
        """Numbers of hops that are asked."""
        assert self.min_steps is not None and self.max_steps is not None
        return tuple(range(self.min_steps, self.max_steps + 1))

    def check_inputs(self) -> None:
        super().check_inputs()
        if generator_of(self.task) != polynomial.NAME:
            raise ValueError(
                f"this study asks the task {polynomial.NAME!r}, or such as '{polynomial.NAME}:m=97,b=3', got "
                f"{self.task!r}; codi probes, patch and anchors take any problems with known steps"
            )
        if self.against is not None:
            other = command_of(read_manifest(self.against)["identity"])
            if other != self.COMMAND:
                raise ValueError(f"{self.against} is a run of `codi {other}`, not of `codi {self.COMMAND}`")

    def load_split(self, seed: int, question_suffix: str = "") -> Split:
        """Evaluation and derivation prompts, one number of hops after the other.

        Args:
            seed: of the prompts.
            question_suffix: text that the checkpoint expects after every question; not used with --no-suffix.
        """
        from experiments.study.prompts import joined_split, two_splits

        suffix = question_suffix if self.suffix else ""
        return joined_split({
            f"{hops} hops": named_apart(
                two_splits(
                    self.task, self.limit, self.choosing, seed, suffix, known_steps=hops, min_steps=hops,
                    max_steps=hops, reach=self.reach, reading=self.reading,
                ),
                hops,
            )
            for hops in self.hops
        })  # fmt: skip


def named_apart(split: Split, hops: int) -> Split:
    """The same prompts with the number of hops in their ids."""
    derivation, evaluation = (
        tuple(replace(problem, prompt_id=f"{hops}-{problem.prompt_id}") for problem in side)
        for side in (split.derivation, split.evaluation)
    )
    return replace(split, derivation=derivation, evaluation=evaluation)
