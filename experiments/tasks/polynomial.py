"""Polynomial iteration: a state that every hop multiplies by an input and moves by a constant, modulo m.

    s_t = s_(t-1) · x_t + b   (mod m),   t = 1..h

Every state from s_1 to the answer s_h is known (those before the answer are the "bridge states"), and no hop can be
left out: the task is strictly sequential. With a prime modulus every input but 0 keeps the whole history; with a
composite one the multiples of its factors forget a part of what came before, which makes shortcuts.

The task is named `polynomial`, or with other constants `polynomial:m=97,b=3`. A sequence (start and inputs) belongs to
one split whatever the seed, by a hash, so training, derivation and test never share one.

Knows nothing about models. Source of the task: Liang and Pan 2026, arXiv 2602.00449; their m, b and numbers of problems
are not at hand: m = 50 (composite) and b = 7 are this project's choice.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.tasks.problem import Problem
from experiments.tasks.streams import checked_lengths, distinct

__all__ = [
    "CHAIN_PIECES", "HOPS", "MAX_HOPS", "MIN_HOPS", "NAME", "Polynomial", "corpus_sentences", "generate", "parse",
    "split_of", "stream", "twins",
]  # fmt: skip

NAME = "polynomial"
MIN_HOPS, MAX_HOPS = 1, 5
HOPS = (2, 5)
"""Hops of the problems that are asked unless others are: one hop alone has no bridge state."""
#: tenths of the sequences given to each split
SPLITS = {"train": range(0, 8), "derivation": range(8, 9), "test": range(9, 10)}
_LARGEST = 199
"""Moduli go up to here, as the values of the other generated tasks do."""
_PATIENCE = 100_000  # draws in a row without a problem, after which there is taken to be none
_WORDS = ("Start at {s}.", "Times {x} plus {b}.", "Modulo {m}.", "Result?")
CHAIN_PIECES = (">><<(a", ")%a", "a>>", "<<(a")
"""What stands around the numbers of a written chain: for a tokenizer that is trained on it."""


@dataclass(frozen=True)
class Polynomial:
    """Constants of the task.

    Attributes:
        m: modulus, 2..199.
        b: constant, 0..m - 1.

    Raises:
        ValueError: values outside these ranges.
    """

    m: int = 50
    b: int = 7

    def __post_init__(self) -> None:
        if not 2 <= self.m <= _LARGEST:
            raise ValueError(f"the modulus m must be in 2..{_LARGEST}, got {self.m}")
        if not 0 <= self.b < self.m:
            raise ValueError(f"the constant b must be in 0..{self.m - 1} (below the modulus {self.m}), got {self.b}")

    @property
    def prime(self) -> bool:
        """Whether the modulus is a prime number."""
        return all(self.m % divisor for divisor in range(2, self.m))

    def hop(self, state: int, x: int) -> int:
        """The next state."""
        return (state * x + self.b) % self.m


def parse(task: str) -> Polynomial | None:
    """Constants that the name of a task asks for; None if it is another task.

    Raises:
        ValueError: a name that begins like this task and goes on otherwise, or constants out of range.
    """
    if task == NAME:
        return Polynomial()
    if not task.startswith(f"{NAME}:"):
        return None
    given = task.removeprefix(f"{NAME}:")
    if not re.fullmatch(r"[mb]=\d{1,4}(,[mb]=\d{1,4})?", given):
        raise ValueError(f"constants of the task {NAME!r} are given as {NAME}:m=97,b=3, got {task!r}")
    values = dict(part.split("=") for part in given.split(","))
    if len(values) != len(given.split(",")):
        raise ValueError(f"the task {task!r} gives one constant twice")
    return Polynomial(**{name: int(value) for name, value in values.items()})


def split_of(kind: Polynomial, start: int, inputs: Sequence[int]) -> str:
    """Split that owns a sequence; the same on every machine."""
    key = f"{kind.m},{kind.b}|{start}|" + ",".join(map(str, inputs))
    tenth = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def stream(
    seed: int | str,
    split: str = "train",
    min_steps: int = HOPS[0],
    max_steps: int = HOPS[1],
    weights: Sequence[float] | None = None,
    reach: int = 0,
    kind: Polynomial | None = None,
) -> Iterator[Problem]:
    """Endless seeded stream of problems of one split. Start and inputs are drawn uniformly from 0..m - 1.

    Args:
        seed: the same seed gives the same problems.
        split: "train", "derivation" or "test".
        min_steps, max_steps: number of hops, 1..5, drawn uniformly unless `weights` is given.
        weights: relative frequency of min_steps, min_steps + 1, …, max_steps hops.
        reach: some state of every problem is at least this large.
        kind: constants; None: the defaults.

    Yields:
        Problem with steps "(s*x+b)%m=t", all states as intermediates (the answer last), numbers = start and inputs,
        cluster = the sequence.

    Raises:
        ValueError: unknown split, hops outside 1..5, or so many draws in a row without a problem that there may be
            none.
    """
    lengths = checked_lengths(split, SPLITS, (min_steps, max_steps), (MIN_HOPS, MAX_HOPS), weights, "hops")
    kind = kind or Polynomial()
    rng = random.Random(f"{NAME}-{kind.m}-{kind.b}-{split}-{seed}")
    index = tries = 0
    while True:
        tries += 1
        if tries > _PATIENCE:
            raise ValueError(
                f"no problem of {min_steps}..{max_steps} hops modulo {kind.m} that reaches {reach} was found in split "
                f"{split!r}"
            )
        hops = rng.choice(lengths) if weights is None else rng.choices(lengths, weights)[0]
        start, *inputs = (rng.randrange(kind.m) for _ in range(hops + 1))
        if split_of(kind, start, inputs) != split:
            continue
        problem = _problem(kind, start, inputs, f"{NAME}-{split}-{seed}-{index}")
        if max(problem.intermediates) < reach:
            continue
        tries = 0
        yield problem
        index += 1


def generate(
    n: int,
    seed: int = 0,
    split: str = "test",
    min_steps: int = HOPS[0],
    max_steps: int = HOPS[1],
    reach: int = 0,
    kind: Polynomial | None = None,
) -> list[Problem]:
    """The first n problems of `stream` with different sequences; every problem is a cluster of its own.

    Args:
        n: number of problems, at least 1.
        seed, split, min_steps, max_steps, reach, kind: see `stream`.

    Raises:
        ValueError: n < 1, or so many that different sequences run out.
    """
    found = stream(seed, split, min_steps, max_steps, None, reach, kind)
    return distinct(found, n, f"different sequences found for {min_steps}..{max_steps} hops in split {split!r}")


def twins(problems: Sequence[Problem], kind: Polynomial, split: str, seed: int = 0) -> list[Problem]:
    """For every problem another one of a split with the same states, from another start: the first input is another one
    too, the later inputs are the same. Problems without one (few, unless the modulus is small) are left out.

    Args:
        problems: with these constants.
        kind: constants.
        split: of the twins.
        seed: of the choice among several.
    """
    rng = random.Random(f"{NAME}-twins-{kind.m}-{kind.b}-{split}-{seed}")
    found = []
    for index, problem in enumerate(problems):
        own, first, *later = problem.numbers
        starts, inputs = list(range(kind.m)), list(range(kind.m))
        rng.shuffle(starts)
        rng.shuffle(inputs)
        found += [
            _problem(kind, start, (x, *later), f"{NAME}-{split}-twin-{seed}-{index}")
            for start, x in _first(
                (start, x)
                for start in starts
                for x in inputs
                if start != own and x != first and kind.hop(start, x) == problem.intermediates[0]
                and split_of(kind, start, (x, *later)) == split
            )
        ]  # fmt: skip
    return found


def _first(pairs: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first pair, if there is any."""
    pair = next(pairs, None)
    return [] if pair is None else [pair]


def _problem(kind: Polynomial, start: int, inputs: Sequence[int], prompt_id: str) -> Problem:
    states, steps = [start], []
    for x in inputs:
        states.append(kind.hop(states[-1], x))
        steps.append(f"({states[-2]}*{x}+{kind.b})%{kind.m}={states[-1]}")
    first, hop, modulo, asked = _WORDS
    told = [first.format(s=start), *(hop.format(x=x, b=kind.b) for x in inputs), modulo.format(m=kind.m), asked]
    return Problem(
        prompt_id=prompt_id,
        question=" ".join(told),
        answer=states[-1],
        steps=tuple(steps),
        cluster=f"{kind.m},{kind.b}:{start}:" + ",".join(map(str, inputs)),
        operation=NAME,
        numbers=(start, *inputs),
        intermediates=tuple(states[1:]),
        uses=tuple((hop, 0, 0, 0) for hop in range(len(inputs))),
    )


def corpus_sentences() -> list[str]:
    """Every wording with its numbers left out: what a tokenizer for this task is trained on, with CHAIN_PIECES."""
    return [" " + word.format(s="", x="", b="", m="") for word in _WORDS]
