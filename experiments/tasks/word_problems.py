"""Seeded generator of word problems in many wordings, one to three steps, with their equations as a written chain.

A story is about a number of things that somebody has: given, or computed from two numbers (sum, equal groups, more or
fewer or times as many as somebody else, a share); then things are added, taken away or multiplied; and at last they may
be shared, packed, sold or compared. The question stands at the end or comes first, a sentence with a number that has
nothing to do with it may stand between, and small numbers may be words. Values are whole and within 1..MAX_VALUE.

Combinations of operations and numbers are split once and for all by a hash, as in arithmetic.py. The wordings are
wider than there and are meant for pretrained models. Knows nothing about tokenizers or models.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.tasks.problem import Problem
from experiments.tasks.streams import checked_lengths, distinct
from experiments.tasks.word_problem_texts import (
    ASIDES,
    BOXES,
    CLAUSES,
    FINALS,
    LEADS,
    LEFT,
    NAMES,
    PLACES,
    PRONOUNS,
    QUESTIONS,
    STARTS,
    THINGS,
    WORDS,
)

__all__ = ["MAX_STEPS", "MAX_VALUE", "NAME", "SPLITS", "generate", "split_of", "stream"]

NAME = "word-problems"
MAX_VALUE = 400
MAX_STEPS = 3
#: tenths of the number combinations given to each split
SPLITS = {"train": range(0, 8), "derivation": range(8, 9), "test": range(9, 10)}
SIGNS = {
    "sum": "+", "groups": "*", "more": "+", "fewer": "-", "times": "*", "share": "/", "add": "+", "subtract": "-",
    "multiply": "*", "boxes": "/", "price": "*", "difference": "-", "together": "+",
}  # fmt: skip
"""What each operation does to the number at hand."""
ASIDE, AS_WORD, PRONOUN = 0.3, 0.25, 0.5
"""Shares: of problems with a number that does not matter, of small numbers that are words, of sentences about the
person that do not repeat the name."""
_PATIENCE = 100_000


@dataclass(frozen=True)
class _Sum:
    """One story in numbers: operations, the numbers that they use, equations and values."""

    operations: tuple[str, ...]
    numbers: tuple[int, ...]
    steps: tuple[str, ...]
    values: tuple[int, ...]


def split_of(operations: Sequence[str], numbers: Sequence[int]) -> str:
    """Split ("train", "derivation" or "test") that owns a combination; the same on every machine.

    Args:
        operations: in order, the start included.
        numbers: that they use, in order.
    """
    key = f"word problem {','.join(operations)}|{','.join(map(str, numbers))}"
    tenth = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _operand(rng: random.Random, operation: str, value: int) -> int:
    """The second number of an operation on a value; 0: there is none that keeps to the bounds."""
    sign = SIGNS[operation]
    if sign == "+":
        return rng.randint(2, min(rng.choice((12, 60)), MAX_VALUE - value)) if value < MAX_VALUE - 1 else 0
    if sign == "-":
        return rng.randint(2, min(rng.choice((15, 80)), value - 1)) if value > 2 else 0
    if sign == "*":
        most = min(12 if operation in ("groups", "price") else 5, MAX_VALUE // value)
        return rng.randint(2, most) if most >= 2 else 0
    divisors = [k for k in range(2, 13) if value % k == 0 and value > k]
    return rng.choice(divisors) if divisors else 0


def _result(sign: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]


def _draw(rng: random.Random, n_steps: int) -> _Sum | None:
    """A story of exactly n_steps equations; None: this draw came to nothing."""
    start = rng.choice(["plain", *STARTS])  # a plain start is the most common one
    final = rng.choice(["", "", *FINALS])
    between = n_steps - (start != "plain") - (final != "")
    if between < 0:
        return None
    operations = [start, *rng.choices(("add", "subtract", "multiply"), (4, 4, 1), k=between), *([final] * bool(final))]
    value = rng.randint(2, rng.choice((12, 30, 90)))
    if SIGNS.get(start) == "/":
        value *= rng.randint(2, 6)
    numbers, steps, values = [value], [], []
    for operation in operations[start == "plain" :]:
        sign, operand = SIGNS[operation], _operand(rng, operation, value)
        if not operand:
            return None
        numbers.append(operand)
        result = _result(sign, value, operand)
        steps.append(f"{value}{sign}{operand}={result}")
        values.append(result)
        value = result
    return _Sum(tuple(operations), tuple(numbers), tuple(steps), tuple(values))


# --- Words ------------------------------------------------------------------------------------------------------------


class _Teller:
    """Fills wordings for one story."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        kind, other, third = (rng.choice(list(NAMES)) for _ in range(3))
        self.words = {"name": rng.choice(NAMES[kind])}
        for word, of in (("Other", other), ("Third", third)):
            self.words[word] = rng.choice([one for one in NAMES[of] if one not in self.words.values()])
        self.pronoun, self.words["her"], self.words["hers"] = PRONOUNS[kind]
        self.words["Hers"] = self.words["hers"].capitalize()
        self.words["theirs"] = PRONOUNS[third][2]
        self.words["items"], self.words["item"] = rng.choice(THINGS)
        self.words["boxes"], self.words["box"] = rng.choice(BOXES)
        self.words["place"] = rng.choice(PLACES)
        self.clear = False
        """Whether a pronoun means the person: somebody has been named, and nobody else since."""
        self.as_words = rng.random() < 2 * AS_WORD

    def say(self, wording: str, numbers: Sequence[int] = ()) -> tuple[str, list[int]]:
        """A sentence, and its numbers in the order of the text; `numbers` are {a} and {b}, or {y}, or {z}."""
        names = "ab" if "{a}" in wording else "z" if "{z}" in wording else "y"
        given = dict(zip(names, numbers, strict=False))
        who = self.pronoun if self.clear and self.rng.random() < PRONOUN else self.words["name"]
        spoken = {name: self._number(value) for name, value in given.items()}
        text = wording.format(**self.words, **spoken, S=who[0].upper() + who[1:], s=who)
        others = "{Other}" in wording or "{Third}" in wording
        self.clear = not others and (self.clear or self.words["name"] in text)
        return text[0].upper() + text[1:], [given[name] for name in re.findall(r"\{(\w+)\}", wording) if name in given]

    def _number(self, value: int) -> str:
        return WORDS[value] if self.as_words and value < len(WORDS) and self.rng.random() < 0.5 else str(value)


def _tell(rng: random.Random, story: _Sum) -> tuple[str, tuple[int, ...]]:
    """Question text, and its numbers in order."""
    teller, (start, *rest) = _Teller(rng), story.operations
    taken = 1 if start == "plain" else 2
    wordings = [(rng.choice(STARTS[start]), story.numbers[:taken])]
    question = rng.choice(LEFT if rest and rest[-1] == "subtract" else QUESTIONS)
    for operation, number in zip(rest, story.numbers[taken:], strict=True):
        if operation in FINALS:
            clause, question = rng.choice(FINALS[operation])
        else:
            clause = rng.choice(CLAUSES[operation])
        wordings.append((clause, (number,)))
    if rng.random() < ASIDE:
        wordings.insert(rng.randrange(len(wordings) + 1), (rng.choice(ASIDES), (rng.randint(2, 40),)))
    lead = rng.choices(LEADS, (1, 5, 1, 1))[0]
    said = [teller.say(*each) for each in wordings]
    if lead is LEADS[0]:
        teller.clear = False  # nobody has been named yet
    asked, _ = teller.say(question)
    text = lead.format(story=" ".join(sentence for sentence, _ in said), question=asked)
    return text, tuple(number for _, numbers in said for number in numbers)


# --- Problems ---------------------------------------------------------------------------------------------------------


def stream(
    seed: int | str,
    split: str = "train",
    min_steps: int = 1,
    max_steps: int = MAX_STEPS,
    weights: Sequence[float] | None = None,
    reach: int = 1,
) -> Iterator[Problem]:
    """Endless seeded stream of problems of one split.

    Args:
        seed: of this stream; the same seed gives the same problems.
        split: "train", "derivation" or "test".
        min_steps, max_steps: number of equations, 1..3, drawn uniformly unless `weights` is given.
        weights: relative frequency of min_steps, min_steps + 1, …, max_steps.
        reach: some value of every problem is at least this large.

    Yields:
        Problem with prompt_id "word-problems-{split}-{seed}-{i}"; cluster = operations and numbers.

    Raises:
        ValueError: unknown split, steps outside 1..3, or so many problems in a row that do not reach `reach` that there
            may be none.
    """
    lengths = checked_lengths(split, SPLITS, (min_steps, max_steps), (1, MAX_STEPS), weights)
    rng = random.Random(f"{NAME}-{split}-{seed}")
    index = 0
    while True:
        n_steps = rng.choices(lengths, weights)[0] if weights is not None else rng.choice(lengths)
        story = _found(rng, n_steps, split, reach)
        question, numbers = _tell(rng, story)
        operations = "+".join(story.operations)
        yield Problem(
            prompt_id=f"{NAME}-{split}-{seed}-{index}",
            question=question,
            answer=story.values[-1],
            steps=story.steps,
            cluster=f"{operations}:{','.join(map(str, story.numbers))}",
            template=story.operations[0],
            operation=operations,
            numbers=numbers,
            intermediates=story.values,
        )
        index += 1


def _found(rng: random.Random, n_steps: int, split: str, reach: int) -> _Sum:
    for _ in range(_PATIENCE):
        story = _draw(rng, n_steps)
        if story and max(story.values) >= reach and split_of(story.operations, story.numbers) == split:
            return story
    raise ValueError(f"no problem of {n_steps} steps was found that reaches {reach}")


def generate(
    n: int, seed: int = 0, split: str = "test", min_steps: int = 1, max_steps: int = MAX_STEPS, reach: int = 1
) -> list[Problem]:
    """The first `n` problems of `stream` with distinct number combinations.

    Args:
        n: number of problems, at least 1.
        seed, split, min_steps, max_steps, reach: see `stream`.

    Raises:
        ValueError: n < 1, or so many that distinct combinations run out.
    """
    found = stream(seed, split, min_steps, max_steps, reach=reach)
    what = f"distinct number combinations found for {min_steps}..{max_steps} steps in split {split!r}"
    return distinct(found, n, what)
