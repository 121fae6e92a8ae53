"""Seeded generator of arithmetic word problems with their equations as a written chain of thought.

A problem follows one quantity through a story: it starts at a number and every clause adds, takes away, multiplies or
makes "each one bring k others" (two equations: the product, then the sum). Values stay whole and within 1..MAX_VALUE.
Number combinations are split once and for all by a hash of the operations and numbers, so a problem of the test split
never shares its number combination with a problem of the training split, whatever the seeds.

Knows nothing about tokenizers, models or files. All sentences are this project's own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

from experiments.tasks.problem import Problem
from experiments.tasks.streams import checked_lengths, distinct

__all__ = ["MAX_STEPS", "MAX_VALUE", "OPERATIONS", "SPLITS", "corpus_sentences", "generate", "split_of", "stream"]

MAX_VALUE = 199
MAX_STEPS = 5
OPERATIONS = ("add", "subtract", "multiply", "bring")
_PATIENCE = 100_000  # draws in a row without a problem, after which there is taken to be none
#: tenths of the number combinations given to each split; derivation and test never meet, nor does either meet training
SPLITS = {"train": range(0, 8), "derivation": range(8, 9), "test": range(9, 10)}
#: number combinations of the template set (templates.py): no split of this generator holds them
RESERVED = "templates"

# scene: (place with preposition, plural item, singular item)
_SCENES = (
    ("in the garden", "birds", "bird"),
    ("at the market", "boxes", "box"),
    ("on the farm", "hens", "hen"),
    ("in the library", "books", "book"),
    ("at the harbour", "boats", "boat"),
    ("in the shop", "lamps", "lamp"),
    ("at the school", "pupils", "pupil"),
    ("in the forest", "deer", "deer"),
    ("at the station", "trains", "train"),
    ("in the kitchen", "cups", "cup"),
    ("at the theatre", "guests", "guest"),
    ("in the valley", "sheep", "sheep"),
)
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")

_START = (
    "There are {x} {items} {place}.",
    "{Place} we count {x} {items}.",
    "{name} keeps {x} {items} {place}.",
)
_CLAUSES = {
    "add": (
        "Then {y} more arrive.",
        "{y} new {items} are added.",
        "{name} adds {y} more.",
    ),
    "subtract": (
        "Then {y} leave.",
        "{y} {items} are taken away.",
        "{name} removes {y} of them.",
    ),
    "multiply": (
        "Then there are {y} times as many.",
        "The number grows {y} times.",
        "{name} makes it {y} times as many.",
    ),
    "bring": (
        "Then each {item} brings {y} others.",
        "Each one is joined by {y} more.",
        "Every {item} now brings {y} new {items}.",
    ),
}
_QUESTION = (
    "How many {items} are there now?",
    "How many {items} in the end?",
    "What is the number of {items} now?",
)


def split_of(operations: Sequence[str], numbers: Sequence[int]) -> str:
    """Split ("train", "derivation" or "test") that owns a combination of operations and numbers.

    Args:
        operations: names from OPERATIONS, in order.
        numbers: start value, then one operand per operation.

    Returns:
        The split's name, or RESERVED for a combination of the template set; a pure function of the arguments, the same
        on every machine.
    """
    if tuple(operations) in (("add", "bring"), ("subtract", "bring")):
        x, y, z = numbers
        if y < x <= 8 and z <= 8:
            return RESERVED
    key = ",".join(operations) + "|" + ",".join(map(str, numbers))
    tenth = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


_Drawn = tuple[list[str], list[int], list[str], list[int], list[tuple[int, int]]]


def _draw(rng: random.Random, n_steps: int) -> _Drawn:
    """Operations, numbers, equations, values and what the equations use, of one story with exactly `n_steps` equations
    (may fail: empty lists)."""
    value = rng.randint(2, 20)
    operations: list[str] = []
    numbers = [value]
    steps: list[str] = []
    values: list[int] = []
    uses: list[tuple[int, int]] = []
    while len(steps) < n_steps:
        left = n_steps - len(steps)
        allowed = ["add"] * 3
        if value > 1:
            allowed += ["subtract"] * 3
        if value * 2 <= MAX_VALUE:
            allowed += ["multiply"] * 2
            if left >= 2:
                allowed += ["bring"] * 3
        operation = rng.choice(allowed)
        if operation == "add":
            operand = rng.randint(1, min(15, MAX_VALUE - value)) if value < MAX_VALUE else 0
            if operand == 0:
                return [], [], [], [], []
            results = [(f"{value}+{operand}", value + operand)]
        elif operation == "subtract":
            operand = rng.randint(1, min(15, value - 1))
            results = [(f"{value}-{operand}", value - operand)]
        elif operation == "multiply":
            operand = rng.randint(2, min(4, MAX_VALUE // value))
            results = [(f"{value}*{operand}", value * operand)]
        else:
            operand = rng.randint(1, min(8, MAX_VALUE // value - 1))
            results = [(f"{value}*{operand}", value * operand), (f"{value}+{value * operand}", value * (operand + 1))]
        operations.append(operation)
        numbers.append(operand)
        at = len(steps)  # the step whose result the story is at; 0: its beginning
        uses += [(at, 0), (at, at + 1)][: len(results)]
        for expression, value in results:
            steps.append(f"{expression}={value}")
            values.append(value)
    return operations, numbers, steps, values, uses


def _tell(rng: random.Random, operations: Sequence[str], numbers: Sequence[int]) -> tuple[str, str]:
    """Question text and the name of its scene."""
    scene = rng.randrange(len(_SCENES))
    place, items, item = _SCENES[scene]
    words = {
        "place": place,
        "Place": place[0].upper() + place[1:],
        "items": items,
        "item": item,
        "name": rng.choice(_NAMES),
    }
    sentences = [rng.choice(_START).format(x=numbers[0], **words)]
    for operation, operand in zip(operations, numbers[1:], strict=True):
        sentences.append(rng.choice(_CLAUSES[operation]).format(y=operand, **words))
    sentences.append(rng.choice(_QUESTION).format(**words))
    return " ".join(sentences), items


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
        min_steps, max_steps: number of equations, 1..5, drawn uniformly unless `weights` is given.
        weights: relative frequency of min_steps, min_steps + 1, …, max_steps.
        reach: some value of every problem is at least this large.

    Yields:
        Problem with prompt_id "arithmetic-{split}-{seed}-{i}"; cluster = operations and numbers.

    Raises:
        ValueError: unknown split, steps outside 1..5, or so many problems in a row that do not reach `reach` that there
            may be none.
    """
    lengths = checked_lengths(split, SPLITS, (min_steps, max_steps), (1, MAX_STEPS), weights)
    rng = random.Random(f"arithmetic-{split}-{seed}")
    index = tries = 0
    while True:
        tries += 1
        if tries > _PATIENCE:
            raise ValueError(f"no problem of {min_steps}..{max_steps} steps was found that reaches {reach}")
        n_steps = rng.choices(lengths, weights)[0] if weights is not None else rng.choice(lengths)
        operations, numbers, steps, values, uses = _draw(rng, n_steps)
        if not operations or max(values) < reach or split_of(operations, numbers) != split:
            continue
        tries = 0
        question, items = _tell(rng, operations, numbers)
        yield Problem(
            prompt_id=f"arithmetic-{split}-{seed}-{index}",
            question=question,
            answer=values[-1],
            steps=tuple(steps),
            cluster=",".join(operations) + ":" + ",".join(map(str, numbers)),
            template=items,
            operation="+".join(operations),
            numbers=tuple(numbers),
            intermediates=tuple(values),
            uses=tuple(uses),
        )
        index += 1


def generate(
    n: int, seed: int = 0, split: str = "test", min_steps: int = 1, max_steps: int = MAX_STEPS, reach: int = 1
) -> list[Problem]:
    """The first `n` problems of `stream` with distinct number combinations.

    Args:
        n: number of problems, at least 1.
        seed, split, min_steps, max_steps, reach: see `stream`.

    Returns:
        n problems; every problem is a cluster of its own.

    Raises:
        ValueError: n < 1, or so many that distinct combinations run out.
    """
    found = stream(seed, split, min_steps, max_steps, reach=reach)
    what = f"distinct number combinations found for {min_steps}..{max_steps} steps in split {split!r}"
    return distinct(found, n, what)


def corpus_sentences() -> list[str]:
    """Every wording of this generator with every scene, numbers left out: what the shipped tokenizer is trained on."""
    lines = []
    for place, items, item in _SCENES:
        for name in _NAMES:
            words = {
                "place": place,
                "Place": place[0].upper() + place[1:],
                "items": items,
                "item": item,
                "name": name,
                "x": "",
                "y": "",
            }
            for group in (_START, *_CLAUSES.values(), _QUESTION):
                lines += [" " + sentence.format(**words) for sentence in group]
    return lines
