"""Two sets of prompts that share nothing: one to derive directions from, one to try them on.

Sharing is checked, not assumed: no question, no cluster and no tuple of numbers may be in both.
Knows nothing about models or steering.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from experiments.tasks import (
    COMMON,
    Problem,
    Reading,
    generator_of,
    is_endless,
    load_task,
    polynomial,
    split_by_cluster,
    with_suffix,
)

__all__ = ["Split", "check_disjoint", "digest", "load_split"]


@dataclass(frozen=True)
class Split:
    """Prompts to derive from and prompts to evaluate on."""

    derivation: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]

    def read_by(self, reading: Reading) -> Self:
        """The same prompts, whose answers are read from texts in this way."""
        if reading == COMMON:
            return self
        derivation, evaluation = (
            tuple(replace(problem, reading=reading) for problem in side) for side in (self.derivation, self.evaluation)
        )
        return replace(self, derivation=derivation, evaluation=evaluation)

    def record(self) -> dict[str, str | int]:
        """Hashes and sizes, for the manifest."""
        return {
            "derivation": digest(self.derivation),
            "derivation_prompts": len(self.derivation),
            "evaluation": digest(self.evaluation),
            "evaluation_prompts": len(self.evaluation),
            "evaluation_clusters": len({problem.cluster for problem in self.evaluation}),
        }

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per prompt, evaluation prompts first."""
        return [
            {
                "side": side, "id": p.prompt_id, "question": p.question, "answer": p.answer, "steps": list(p.steps),
                "cluster": p.cluster,
            }
            for side, problems in (("evaluation", self.evaluation), ("derivation", self.derivation))
            for p in problems
        ]  # fmt: skip

    def about(self) -> str:
        """Sizes in words; "" where nothing is asked."""
        everyone = self.evaluation or self.derivation
        clusters = {problem.cluster or problem.prompt_id for problem in everyone}
        return f"{len(everyone)} prompts in {len(clusters)} clusters" if everyone else ""


def digest(problems: Sequence[Problem]) -> str:
    """SHA-256 over ids, questions and answers, in order."""
    text = json.dumps([[p.prompt_id, p.question, p.answer, p.cluster] for p in problems])
    return hashlib.sha256(text.encode()).hexdigest()


def _traits(problem: Problem) -> set[tuple[str, object]]:
    """What makes two problems related."""
    traits: set[tuple[str, object]] = {("question", " ".join(problem.question.split()))}
    if problem.cluster:
        traits.add(("cluster", problem.cluster))
    if len(problem.numbers) > 1:
        traits.add(("numbers", tuple(problem.numbers)))
    return traits


def check_disjoint(derivation: Sequence[Problem], evaluation: Sequence[Problem]) -> None:
    """Raise ValueError if any question, cluster or tuple of numbers is in both lists."""
    seen = {trait: problem.prompt_id for problem in evaluation for trait in _traits(problem)}
    for problem in derivation:
        for trait in _traits(problem):
            if trait in seen:
                raise ValueError(
                    f"derivation prompt {problem.prompt_id!r} and evaluation prompt {seen[trait]!r} "
                    f"share their {trait[0]}"
                )


def load_split(
    task: str,
    *,
    limit: int | None,
    derivation: int,
    seed: int,
    suffix: str,
    min_steps: int | None = None,
    max_steps: int | None = None,
    reach: int | None = None,
    legacy: bool = False,
    derivation_task: str | None = None,
    decimal_comma: bool = False,
    donors: bool = False,
) -> Split:
    """Load a task and split it, or take the derivation prompts from another task.

    A generated task has a derivation split of its own; from it whatever shares its numbers with an evaluation prompt
    is left out. A file or data set is divided by clusters, at most half of them for derivation.

    Args:
        task: name, file or hub id (see `experiments.tasks.load_task`).
        limit: evaluation prompts (a seeded choice, in the order of the task); None: all.
        derivation: derivation prompts, at least 2, at most this many.
        seed: of generator, division and choice.
        suffix: appended to every question.
        min_steps, max_steps, reach: see `load_task`; of another derivation task they are not asked.
        legacy: as the seed study did, derive from the evaluation set itself.
        derivation_task: another task to derive from, so that every prompt of `task` can be evaluated: of a generated
            one its derivation split, of a data set with splits "train", of a file all of it; prompts that share
            question, cluster or numbers with an evaluated one are left out. None, or the name of `task`: `task` itself.
        decimal_comma: see `load_task`.
        donors: of the task "polynomial", whose prompts hardly ever have all values in common: up to half of the
            derivation prompts are made to have those of an evaluation prompt, from other numbers.

    Raises:
        ValueError: no such task, no prompts, prompts without answers, too few of them to split.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 prompt, got {limit}")
    if derivation < 2:
        raise ValueError(f"derivation must be at least 2 prompts, got {derivation}")

    def load(split: str, number: int | None) -> list[Problem]:
        return load_task(task, split, number, seed, suffix, min_steps, max_steps, reach, decimal_comma)

    other = derivation_task is not None and derivation_task != task
    if legacy:
        if other:
            raise ValueError(f"legacy derives from the evaluated prompts: leave derivation_task out, got {task!r}")
        evaluation = load("test", limit)
        return Split(tuple(evaluation), tuple(evaluation))
    if derivation_task is not None and other:
        evaluation = load("test", limit)
        candidates = _from_another(derivation_task, evaluation, derivation, seed, suffix, decimal_comma)
    elif generator_of(task):
        evaluation = load("test", limit)
        found = load("derivation", derivation)
        if donors:
            found = _with_donors(found, task, evaluation, seed, suffix)
        candidates = _apart(found, evaluation)
    else:
        problems = load("test", None)
        fraction = min(0.5, derivation / len(problems))
        try:
            candidates, evaluation = split_by_cluster(problems, fraction, seed)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from None
        evaluation = _chosen(evaluation, limit, seed)
        candidates = _chosen(_apart(candidates, evaluation), derivation, seed)
    if len(candidates) < 2:
        source = derivation_task if other else task
        advice = "another one" if other else "give --derivation-task, another task to derive them from"
        raise ValueError(
            f"{source}: {len(candidates)} prompts are left to derive directions from, at least 2 are needed: {advice}, "
            "or a file with more prompts"
        )
    check_disjoint(candidates, evaluation)
    return Split(tuple(candidates), tuple(evaluation))


def _apart(problems: Sequence[Problem], evaluation: Sequence[Problem]) -> list[Problem]:
    """Those that share nothing with an evaluated one."""
    taken = {trait for problem in evaluation for trait in _traits(problem)}
    return [problem for problem in problems if not taken & _traits(problem)]


def _with_donors(
    found: list[Problem], task: str, evaluation: Sequence[Problem], seed: int, suffix: str
) -> list[Problem]:
    """As many derivation prompts, up to half of them with the values of an evaluation prompt, if the task can do so."""
    kind = polynomial.parse(task)
    if kind is None:
        return found
    made = with_suffix(polynomial.twins(evaluation[: len(found) // 2], kind, "derivation", seed), suffix)
    return list({problem.question: problem for problem in (*made, *found)}.values())[: len(found)]


def _from_another(
    task: str, evaluation: Sequence[Problem], number: int, seed: int, suffix: str, decimal_comma: bool
) -> list[Problem]:
    """At most `number` prompts of a task that share nothing with the evaluated ones (a seeded choice)."""
    split = "derivation" if generator_of(task) else "train"
    ids = {problem.prompt_id for problem in evaluation}
    # Of an endless task more than asked for, because some of its prompts may share numbers with evaluated ones.
    limit = 2 * number if is_endless(task) else None
    found = [
        replace(problem, prompt_id=f"derivation-{problem.prompt_id}") if problem.prompt_id in ids else problem
        for problem in _apart(load_task(task, split, limit, seed, suffix, decimal_comma=decimal_comma), evaluation)
    ]
    return _chosen(found, number, seed)


def _chosen(problems: list[Problem], number: int | None, seed: int) -> list[Problem]:
    if number is None or number >= len(problems):
        return problems
    return [problems[i] for i in sorted(random.Random(f"limit-{seed}").sample(range(len(problems)), number))]
