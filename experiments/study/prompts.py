"""The prompts of a study, from plain values: one split, two disjoint ones, or the published choice.

Knows nothing about options or models; what a task is and how it is divided is in experiments/tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.tasks import COMMON, STEPS_HELP, Reading, generator_of, load_task, with_suffix
from experiments.tasks.split import Split, load_split

__all__ = ["LEGACY_TRIPLES", "Asked", "JoinedSplit", "joined_split", "one_split", "published_split", "two_splits"]

LEGACY_TRIPLES = 50
"""Number triples of the published prompt set: 50 × 10 scenes × 2 operations = 1,000 prompts."""


@dataclass(frozen=True)
class Asked:
    """The prompts of one task among those of several: ranges into the two sides of a split. Plain values.

    Attributes:
        task: its name.
        derivation, evaluation: first prompt and last + 1.
    """

    task: str
    derivation: tuple[int, int]
    evaluation: tuple[int, int]


@dataclass(frozen=True)
class JoinedSplit(Split):
    """The prompts of several tasks, one after another. Within a task the two sides share nothing."""

    tasks: tuple[Asked, ...] = ()


def joined_split(splits: Mapping[str, Split]) -> JoinedSplit:
    """One split from those of several tasks, by name."""
    tasks, derivation, evaluation = [], 0, 0
    for name, split in splits.items():
        ends = derivation + len(split.derivation), evaluation + len(split.evaluation)
        tasks.append(Asked(name, (derivation, ends[0]), (evaluation, ends[1])))
        derivation, evaluation = ends
    return JoinedSplit(
        tuple(problem for split in splits.values() for problem in split.derivation),
        tuple(problem for split in splits.values() for problem in split.evaluation),
        tuple(tasks),
    )


def one_split(
    task: str,
    split: str,
    limit: int | None,
    seed: int,
    suffix: str,
    *,
    known_steps: int = 0,
    min_steps: int | None = None,
    max_steps: int | None = None,
    reach: int | None = None,
    reading: Reading = COMMON,
) -> Split:
    """Prompts of one split of a task as the evaluation side; the derivation side is empty.

    Args:
        task, split, limit, seed, suffix, min_steps, max_steps, reach: see `experiments.tasks.load_task`.
        known_steps: number of intermediate values that every prompt must have.
        reading: how answers are read; its decimal comma counts for the fields of the task as well.

    Raises:
        ValueError: as `load_task`, or a prompt without so many intermediate values.
    """
    problems = load_task(task, split, limit, seed, suffix, min_steps, max_steps, reach, reading.decimal_comma)
    return _known(Split((), tuple(problems)), known_steps, task).read_by(reading)


def two_splits(
    task: str,
    limit: int | None,
    derivation: int,
    seed: int,
    suffix: str,
    *,
    known_steps: int = 0,
    legacy: bool = False,
    min_steps: int | None = None,
    max_steps: int | None = None,
    reach: int | None = None,
    derivation_task: str | None = None,
    reading: Reading = COMMON,
    donors: bool = False,
) -> Split:
    """Evaluation and derivation prompts that share nothing (with `legacy`: that are the same).

    Args:
        task, limit, derivation, seed, suffix, legacy, min_steps, max_steps, reach, derivation_task, donors: see
            `experiments.tasks.split.load_split`.
        known_steps: number of intermediate values that every prompt must have.
        reading: as for `one_split`.

    Raises:
        ValueError: as `load_split`, or a prompt without so many intermediate values.
    """
    split = load_split(
        task,
        limit=limit,
        derivation=derivation,
        seed=seed,
        suffix=suffix,
        min_steps=min_steps,
        max_steps=max_steps,
        reach=reach,
        legacy=legacy,
        derivation_task=derivation_task,
        decimal_comma=reading.decimal_comma,
        donors=donors,
    )
    return _known(split, known_steps, task, derivation_task).read_by(reading)


def published_split(
    limit: int | None, seed: int, suffix: str, known_steps: int = 0, reading: Reading = COMMON
) -> Split:
    """The template prompts of the first 50 number triples, all of them or a seeded choice, on both sides.

    Args:
        limit: number of prompts; None: all 1,000.
        seed: of the choice.
        suffix: appended to every question.
        known_steps: number of intermediate values that every prompt must have.
        reading: how answers are read.
    """
    import numpy as np

    from experiments.tasks import templates
    from steering.directions import generator

    chosen = {f"{x},{y},{z}" for x, y, z in templates.triples()[:LEGACY_TRIPLES]}
    problems = [problem for problem in templates.generate(split="all") if problem.cluster in chosen]
    if limit is not None and limit < len(problems):
        keep = np.sort(generator(seed, "legacy-limit").permutation(len(problems))[:limit])
        problems = [problems[i] for i in keep]
    both = tuple(with_suffix(problems, suffix))
    return _known(Split(both, both), known_steps, "templates").read_by(reading)


def _known(split: Split, steps: int, task: str, derivation_task: str | None = None) -> Split:
    """The split, if all its prompts have so many intermediate values."""
    for source, side in ((task, split.evaluation), (derivation_task or task, split.derivation)):
        short = [problem for problem in side if len(problem.intermediates) < steps]
        if short:
            advice = f"{STEPS_HELP}; or use the task 'templates'"
            if any(problem.steps for problem in short) or generator_of(source):
                advice = f"give --min-steps {steps}, or use the task 'templates'"
            raise ValueError(
                f"{source}: this study needs prompts with at least {steps} known intermediate "
                f"value{'s' if steps > 1 else ''}; {len(short)} of {len(side)} have fewer, {short[0].prompt_id!r} has "
                f"{len(short[0].intermediates)}: {advice}"
            )
    return split
