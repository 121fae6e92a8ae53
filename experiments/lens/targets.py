"""Which values are looked for in a prompt's latents, and whose values stand beside them as the chance level.

Targets: step1, step2, … = values of the written chain before the last; "steps" = any of them; "answer"; "question" =
any number that the question itself holds (what a lens reads by copying). Chance level: the same reading for the values
of `donors` other prompts (same step of the story; a donor's value that is one of the prompt's own values is left out).

Knows nothing about models or tokens: values are numbers here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.lens.options import TOP
from experiments.study.spellings import NEVER
from experiments.tasks import Problem

__all__ = ["Targets", "donor_rates"]


@dataclass(frozen=True)
class Targets:
    """Values of prompts and of their donors.

    Attributes:
        values: (value,) every number that occurs, ascending.
        where: (prompt, column) index into `values` of each step before the last, the answer and each number of the
            question; −1 where a prompt has no such thing.
        foreign: (prompt, donor, column) the same of its donors, −1 also where the value is one of the prompt's own.
        n_steps, n_numbers: columns before and after the one of the answer.
    """

    values: np.ndarray
    where: np.ndarray
    foreign: np.ndarray
    n_steps: int
    n_numbers: int

    @classmethod
    def of(cls, problems: Sequence[Problem], donors: int, seed: int) -> Targets:
        """Values of the prompts, donors drawn with a seed."""
        steps = [tuple(problem.intermediates[:-1]) for problem in problems]
        n_steps = max(map(len, steps), default=0)
        n_numbers = max((len(problem.numbers) for problem in problems), default=0)
        given = [
            [*own, *[None] * (n_steps - len(own)), p.answer, *p.numbers, *[None] * (n_numbers - len(p.numbers))]
            for own, p in zip(steps, problems, strict=True)
        ]
        values = np.array(sorted({float(v) for row in given for v in row if v is not None}))
        place = {value: i for i, value in enumerate(values)}
        where = np.array([[-1 if v is None else place[float(v)] for v in row] for row in given])
        rng = np.random.default_rng(seed)
        n_donors = min(donors, len(problems) - 1)
        donor = np.stack([_others(rng, i, len(problems), n_donors) for i in range(len(problems))])
        foreign = where[donor]  # prompt, donor, column
        for part in (slice(0, n_steps + 1), slice(n_steps + 1, None)):  # the thought, the question
            taken = (foreign[:, :, part, None] == where[:, part][:, None, None, :]).any(-1)
            foreign[:, :, part] = np.where(taken, -1, foreign[:, :, part])
        return cls(values, where, foreign, n_steps, n_numbers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the targets."""
        steps = [f"step{i + 1}" for i in range(self.n_steps)] + (["steps"] if self.n_steps > 1 else [])
        return (*steps, "answer", *(["question"] if self.n_numbers else []))

    @property
    def answers(self) -> np.ndarray:
        """Indices into `values` of those that are the answer of some prompt, ascending."""
        return np.unique(self.where[:, self.n_steps])

    def ranks(self, place: np.ndarray, absent: np.ndarray) -> np.ndarray:
        """Ranks of columns (…, column) as ranks of targets (…, target); NEVER + 1: there is no such target."""
        place = np.where(absent, NEVER + 1, place.astype(np.int16))
        return self._joined(place, lambda columns: np.asarray(columns.min(-1)))

    def all_of(self, true: np.ndarray) -> np.ndarray:
        """Something that is true or not of every value (value,), as (prompt, target): whether of all its columns."""
        here = np.where(self.where >= 0, true[self.where], True)
        return self._joined(here, lambda columns: np.asarray(columns.all(-1)))

    def _joined(self, columns: np.ndarray, join: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        n = self.n_steps
        parts = [columns[..., i] for i in range(n)]
        parts += [join(columns[..., :n])] if n > 1 else []
        parts += [columns[..., n]]
        parts += [join(columns[..., n + 1 :])] if self.n_numbers else []
        return np.stack(parts, axis=-1)


def _others(rng: np.random.Generator, index: int, n: int, number: int) -> np.ndarray:
    chosen = rng.choice(n - 1, size=number, replace=False)
    return np.where(chosen >= index, chosen + 1, chosen)


def donor_rates(place: np.ndarray) -> np.ndarray:
    """(prompt, donor, target) ranks -> (prompt, target, k) share of the donors that have a value; NaN without any."""
    known = place <= NEVER
    n = known.sum(axis=1)
    hits = np.stack([(known & (place <= k)).sum(axis=1) for k in range(1, TOP + 1)], axis=-1)
    return np.where(n[..., None] > 0, hits / np.maximum(n[..., None], 1), np.nan)
