"""Problems to be answered: the `Problem` record, and `load_task`, which finds them by name, by file or by hub id.

Generated tasks ("arithmetic", "polynomial", "templates", "word-problems") need no files; data sets are read by
experiments/tasks/readers. Knows nothing about models: the sentence that a checkpoint expects after a question is passed
in as `suffix` (`model.protocol.question_suffix`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from experiments.tasks.answers import COMMON, Reading, extract_answer, is_correct
from experiments.tasks.problem import Problem

__all__ = [
    "COMMON",
    "Problem",
    "Reading",
    "STEPS_HELP",
    "TASK_NAMES",
    "check_split",
    "endless",
    "extract_answer",
    "generator_of",
    "is_correct",
    "is_endless",
    "load_task",
    "most_steps",
    "split_by_cluster",
    "with_suffix",
]

TASK_NAMES = ("arithmetic", "polynomial", "templates", "word-problems")
"""The generated tasks (polynomial also with constants, "polynomial:m=97,b=3"); all else is a path or a hub id."""
GENERATED_SPLITS = {
    "arithmetic": ("train", "derivation", "test"),
    "polynomial": ("train", "derivation", "test"),
    "templates": ("test", "derivation", "all"),
    "word-problems": ("train", "derivation", "test"),
}
"""Splits that the generators make."""
ENDLESS_COUNT = 1000
"""Problems of an endless task when no limit is given."""

STEPS_HELP = (
    'give every record a field \'steps\' with its equations in order, such as ["7+5=12", "12*3=36"], or one text '
    '"<<7+5=12>> <<12*3=36>>" (in a .txt: question||<<7+5=12>> <<12*3=36>> #### 36)'
)
"""How a file of one's own says what its intermediate values are: for messages of studies that need them."""


def load_task(
    task: str,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    suffix: str = "",
    min_steps: int | None = None,
    max_steps: int | None = None,
    reach: int | None = None,
    decimal_comma: bool = False,
) -> list[Problem]:
    """Problems of a task.

    Args:
        task: "arithmetic", "polynomial" (or with other constants "polynomial:m=97,b=3"), "templates" or "word-problems"
            (generated), or a path to a file or folder, or a hub id such as "openai/gsm8k". A hub id may carry a
            configuration after a colon: "openai/gsm8k:main".
        split: split of the generator ("train", "derivation", "test"; see there) or of the data set; "published" is the
            one that the published CODI evaluation of a hub data set reads. A single local file has no splits and is
            read whole (`split_by_cluster` makes two parts of it); a split that no command asks for is refused.
        limit: number of problems; None: all (1,000 of an endless task). Of a data set a random choice is taken (seeded,
            in file order), because the first records of some files share one template.
        seed: of the generator, or of that choice.
        suffix: text the checkpoint expects after every question (`model.protocol.question_suffix`); not added twice.
        min_steps, max_steps: keep problems of that many steps (hops) only; None: no bound, but "polynomial" then has 2
            hops or more. Problems whose steps are unknown are dropped if a bound is given.
        reach: keep problems in which some value (an intermediate result or the answer) is at least this; None: all.
        decimal_comma: read "3,5" in the fields of a file or data set as 3.5, and "1.234" as 1234.

    Raises:
        ValueError: unknown task (the allowed ones are listed), an empty or broken file, records without answers,
            no problem left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if min_steps is not None and max_steps is not None and min_steps > max_steps:
        raise ValueError(f"min_steps must not exceed max_steps, got {min_steps} and {max_steps}")
    if not isinstance(suffix, str):
        raise ValueError(f"suffix must be the text itself, such as model.protocol.question_suffix, got {suffix!r}")
    if generator_of(task):
        problems = _generate(task, split, limit, seed, min_steps, max_steps, reach)
    else:
        from experiments.tasks.readers import read_problems

        problems = read_problems(task, split, decimal_comma)
        if min_steps is not None or max_steps is not None:
            low, high = min_steps or 1, max_steps if max_steps is not None else float("inf")
            known = any(problem.steps for problem in problems)
            problems = [problem for problem in problems if low <= len(problem.steps) <= high]
            if not problems:
                hint = "" if known else f", their steps are not known: {STEPS_HELP}"
                raise ValueError(f"{task}: no problem has between {low} and {high} steps{hint}")
        if reach is not None:
            problems = [p for p in problems if max((p.answer, *p.intermediates)) >= reach]
            if not problems:
                raise ValueError(f"{task}: no problem has a value of {reach} or more")
        if limit is not None and limit < len(problems):
            problems = [problems[i] for i in sorted(random.Random(seed).sample(range(len(problems)), limit))]
    return with_suffix(problems, suffix)


def generator_of(task: str) -> str:
    """Which of TASK_NAMES makes the problems of a task; "" for a file, folder or hub id.

    Raises:
        ValueError: constants of "polynomial" that cannot be.
    """
    from experiments.tasks import polynomial

    if polynomial.parse(task) is not None:
        return polynomial.NAME
    return task if task in TASK_NAMES else ""


def is_endless(task: str) -> bool:
    """Whether a task is generated without an end, so that training never sees a problem of its test split.

    Raises:
        ValueError: see `generator_of`.
    """
    return generator_of(task) in ("arithmetic", "polynomial", "word-problems")


def most_steps(task: str) -> int:
    """Steps (hops) of the longest problems of an endless task."""
    from experiments.tasks import arithmetic, polynomial, word_problems

    if task == word_problems.NAME:
        return word_problems.MAX_STEPS
    return arithmetic.MAX_STEPS if task == "arithmetic" else polynomial.MAX_HOPS


def endless(task: str, seed: int | str, split: str, weights: Sequence[float]) -> Iterator[Problem]:
    """Stream of problems of an endless task.

    Args:
        task: for which `is_endless` holds.
        seed: the same seed gives the same problems.
        split: "train", "derivation" or "test".
        weights: relative frequency of problems of 1, 2, 3, 4 and 5 steps (hops); those that the task does not have are
            left out.
    """
    from experiments.tasks import arithmetic, polynomial, word_problems

    if task == word_problems.NAME:
        return word_problems.stream(seed, split, weights=weights[: word_problems.MAX_STEPS])
    kind = polynomial.parse(task)
    if kind is None:
        return arithmetic.stream(seed, split, weights=weights)
    return polynomial.stream(seed, split, 1, weights=weights, kind=kind)


def check_split(task: str, split: str) -> None:
    """Refuse a split that can be seen not to be there, before anything is read.

    Args:
        task: as `load_task` takes it; of a hub data set, and of a folder that holds one, only reading tells.
        split: that is asked for.

    Raises:
        ValueError: the task has no such split.
    """
    if name := generator_of(task):
        if split not in GENERATED_SPLITS[name]:
            allowed = ", ".join(GENERATED_SPLITS[name])
            raise ValueError(f"split must be one of {allowed} for the task {task!r}, got {split!r}")
        return
    from experiments.tasks.readers import check_file_split

    check_file_split(task, split)


def with_suffix(problems: list[Problem], suffix: str) -> list[Problem]:
    """The problems with a text after every question, except where the question ends in it already."""
    if not suffix.strip():
        return problems
    return [
        problem
        if problem.question.rstrip().endswith(suffix.strip())
        else replace(problem, question=problem.question + suffix)
        for problem in problems
    ]


def split_by_cluster(
    problems: list[Problem], fraction: float = 0.5, seed: int = 0
) -> tuple[list[Problem], list[Problem]]:
    """Two disjoint lists that share no cluster and no question: (derivation, evaluation).

    Args:
        problems: at least two clusters.
        fraction: share of the clusters, between 0 and 1 (exclusive), that goes to the first list.
        seed: of the shuffle of clusters.

    Raises:
        ValueError: fraction outside (0, 1), or fewer than two groups.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1 (exclusive), got {fraction}")
    # A cluster and every other cluster that has one of its questions belong together.
    group: dict[str, str] = {}

    def root(key: str) -> str:
        group.setdefault(key, key)
        while group[key] != key:
            key = group[key]
        return key

    for problem in problems:
        group[root("cluster:" + problem.cluster)] = root("question:" + problem.question)
    groups = sorted({root("question:" + problem.question) for problem in problems})
    if len(groups) < 2:
        raise ValueError(
            f"cannot split {len(problems)} problems that all belong to one cluster (they share their numbers or their "
            "question): give --derivation-task, another task to derive directions from, or a file with more of them"
        )
    random.Random(seed).shuffle(groups)
    first = set(groups[: min(max(round(fraction * len(groups)), 1), len(groups) - 1)])
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[root("question:" + problem.question) not in first].append(problem)
    return sides


def _generate(
    task: str,
    split: str,
    limit: int | None,
    seed: int,
    min_steps: int | None,
    max_steps: int | None,
    reach: int | None,
) -> list[Problem]:
    from experiments.tasks import arithmetic, polynomial, templates, word_problems

    count = ENDLESS_COUNT if limit is None else limit
    if task == "arithmetic":
        low = 1 if min_steps is None else min_steps
        high = arithmetic.MAX_STEPS if max_steps is None else max_steps
        return arithmetic.generate(count, seed, split, low, high, 1 if reach is None else reach)
    if task == word_problems.NAME:
        most = word_problems.MAX_STEPS if max_steps is None else max_steps
        return word_problems.generate(count, seed, split, min_steps or 1, most, reach or 1)
    if (kind := polynomial.parse(task)) is not None:
        high = polynomial.HOPS[1] if max_steps is None else max_steps
        low = min(polynomial.HOPS[0], high) if min_steps is None else min_steps
        return polynomial.generate(count, seed, split, low, high, reach or 0, kind)

    if min_steps is not None or max_steps is not None or reach is not None:
        raise ValueError("the problems of task 'templates' are one set: leave min_steps, max_steps and reach out")
    return templates.generate(limit, seed, split)
