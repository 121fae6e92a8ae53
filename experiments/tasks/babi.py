"""bAbI 15 (basic deduction) and 16 (basic induction): generators with the invariants of the published files, readers.

15: every story has eight facts, "Wolves are afraid of mice." for each of four animals (of another one of the four) and
"Winona is a wolf." for each of four names (any animals), in any order, then four questions "What is winona afraid
of?" about names drawn with replacement. The answer is the feared animal in the singular; it rests on two facts, the
name's and then the animal's.

16: every story has nine facts: five names are animals, and four of them have a colour, said after what they are; the
question is the colour of the fifth. At least one other is the same animal. It rests on three facts: what the asked one
is, what another is, that one's colour; where there are several others of that animal, the one whose kind was told last
(true of all 1,000 published stories; in 86 of them the others have different colours, so only this rule decides). The
generator makes stories in which they agree; `conflicts` makes them as published.

The published vocabulary is a fact of the task; two of this project's own ("training", "unseen") share no name and no
animal with each other. The generated texts are new. Each question is one item: the facts before it, and the question.

Source of format and invariants: Weston et al. 2015 (arXiv 1502.05698), files qa15 and qa16 (en).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Babi",
    "TRAINING",
    "PUBLISHED",
    "UNSEEN",
    "VOCABULARIES",
    "Vocabulary",
    "generate",
    "read_file",
    "read_rows",
]


@dataclass(frozen=True)
class Vocabulary:
    """Closed vocabulary of both tasks.

    Attributes:
        name: "published", "training" or "unseen".
        deducing: names of task 15, four at a time.
        fearing: animals of task 15, singular and plural, four at a time.
        inducing: names of task 16, five at a time.
        kinds: animals of task 16.
        colours: of task 16.
    """

    name: str
    deducing: tuple[str, ...]
    fearing: tuple[tuple[str, str], ...]
    inducing: tuple[str, ...]
    kinds: tuple[str, ...]
    colours: tuple[str, ...]


PUBLISHED = Vocabulary(
    name="published",
    deducing=("Gertrude", "Winona", "Emily", "Jessica"),
    fearing=(("mouse", "mice"), ("cat", "cats"), ("wolf", "wolves"), ("sheep", "sheep")),
    inducing=("Lily", "Bernhard", "Brian", "Julius", "Greg"),
    kinds=("frog", "lion", "swan", "rhino"),
    colours=("green", "white", "gray", "yellow"),
)
TRAINING = Vocabulary(
    name="training",
    deducing=("Anna", "Ben", "Clara", "Daniel", "Eva", "Frank", "Grace", "Henry"),
    fearing=tuple((s, s + "s") for s in ("dog", "cow", "bear", "owl", "duck", "tiger", "rabbit", "snake")),
    inducing=("Adam", "Betty", "Carl", "Diana", "Ella", "Fred", "Helen", "Jack", "Kate", "Leo"),
    kinds=("horse", "goat", "lion", "crow", "pig", "hen"),
    colours=("white", "black", "brown", "gray", "red"),
)
UNSEEN = Vocabulary(
    name="unseen",
    deducing=("Maria", "Nick", "Olivia", "Peter", "Rosa", "Simon"),
    fearing=tuple((s, s + "s") for s in ("spider", "camel", "eagle", "monkey", "shark", "turtle")),
    inducing=("Laura", "Martin", "Nora", "Oscar", "Paul", "Ruth", "Tom"),
    kinds=("zebra", "parrot", "beaver", "whale", "seal"),
    colours=("green", "yellow", "blue", "pink", "orange"),
)
VOCABULARIES = {vocabulary.name: vocabulary for vocabulary in (PUBLISHED, TRAINING, UNSEEN)}

_QUESTION = re.compile(r"What (?:is (?P<afraid>\w+) afraid of|color is (?P<colour>\w+))\?", re.IGNORECASE)


@dataclass(frozen=True)
class Babi:
    """One question with the facts before it.

    Attributes:
        prompt_id: unique within its source.
        task: 15 or 16; of read files, the number given.
        facts: sentences, in order.
        question: the question alone.
        answer: one word.
        support: numbers of the facts that it rests on, from 0, in the order of the argument.
        choices: every answer that the story leaves open: its animals (15) or its colours (16), sorted.
        cluster: the story; its questions are not independent.
    """

    prompt_id: str
    task: int
    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]
    choices: tuple[str, ...]
    cluster: str

    @property
    def story(self) -> str:
        """Facts as one text."""
        return " ".join(self.facts)

    @property
    def text(self) -> str:
        """Facts and question as one text."""
        return f"{self.story} {self.question}"

    @property
    def chain(self) -> tuple[str, ...]:
        """The argument: the facts it rests on and what follows from them."""
        asked = _QUESTION.fullmatch(self.question)
        if asked is None:
            raise ValueError(f"{self.prompt_id}: no chain is known for the question {self.question!r}")
        facts = [self.facts[i] for i in self.support]
        if asked["afraid"]:
            feared = self.facts[self.support[-1]].rstrip(".").rsplit(" ", 1)[-1]
            return (*facts, f"{facts[0].split()[0]} is afraid of {feared}.")
        return (*facts, f"{facts[0].split()[0]} is {self.answer}.")


def generate(
    n: int,
    task: int,
    seed: int | str = 0,
    vocabulary: Vocabulary = PUBLISHED,
    conflicts: bool = False,
) -> list[Babi]:
    """n questions: four per story of task 15 (the last story may give fewer), one per story of task 16.

    Args:
        n: at least 1.
        task: 15 or 16.
        seed: the same seed gives the same stories.
        vocabulary: see this module.
        conflicts: let several animals of the asked kind have different colours (task 16 only).

    Raises:
        ValueError: another task, n < 1.
    """
    if task not in (15, 16):
        raise ValueError(f"task must be 15 or 16, got {task}")
    if n < 1:
        raise ValueError(f"the number of questions must be at least 1, got {n}")
    rng = random.Random(f"babi-{task}-{vocabulary.name}-{seed}-{conflicts}")
    found: list[Babi] = []
    story = 0
    while len(found) < n:
        name = f"babi{task}-{vocabulary.name}-{seed}-{story}"
        found += _deduction(rng, vocabulary, name) if task == 15 else [_induction(rng, vocabulary, name, conflicts)]
        story += 1
    return found[:n]


def _deduction(rng: random.Random, vocabulary: Vocabulary, name: str) -> list[Babi]:
    animals = rng.sample(vocabulary.fearing, 4)
    people = rng.sample(vocabulary.deducing, 4)
    feared = {animal: rng.choice([other for other in animals if other != animal]) for animal in animals}
    kind = {person: rng.choice(animals) for person in people}
    fears = {animal: f"{animal[1].capitalize()} are afraid of {feared[animal][1]}." for animal in animals}
    are = {person: f"{person} is {_a(kind[person][0])}." for person in people}
    facts = [*fears.values(), *are.values()]
    rng.shuffle(facts)
    return [
        Babi(
            prompt_id=f"{name}-{i}",
            task=15,
            facts=tuple(facts),
            question=f"What is {person.lower()} afraid of?",
            answer=feared[kind[person]][0],
            support=(facts.index(are[person]), facts.index(fears[kind[person]])),
            choices=tuple(sorted(animal[0] for animal in animals)),
            cluster=name,
        )
        for i, person in enumerate(rng.choices(people, k=4))
    ]


def _induction(rng: random.Random, vocabulary: Vocabulary, name: str, conflicts: bool) -> Babi:
    people = rng.sample(vocabulary.inducing, 5)
    asked, others = people[0], people[1:]
    kind = {asked: rng.choice(vocabulary.kinds)}
    # so many others of the asked kind as in the published stories
    same = others[: rng.choices((1, 3, 4), (881, 104, 15))[0]]
    unlike = [other for other in vocabulary.kinds if other != kind[asked]]
    kind |= {person: kind[asked] if person in same else rng.choice(unlike) for person in others}
    agreed = rng.choice(vocabulary.colours)
    colour = {
        person: agreed if person in same and not conflicts else rng.choice(vocabulary.colours) for person in others
    }
    are = {person: f"{person} is {_a(kind[person])}." for person in people}
    look = {person: f"{person} is {colour[person]}." for person in others}
    facts = [*are.values(), *look.values()]
    rng.shuffle(facts)
    for person in others:  # what one is comes before its colour
        i, j = facts.index(are[person]), facts.index(look[person])
        if i > j:
            facts[i], facts[j] = facts[j], facts[i]
    last = max(same, key=lambda person: facts.index(are[person]))
    return Babi(
        prompt_id=f"{name}-0",
        task=16,
        facts=tuple(facts),
        question=f"What color is {asked}?",
        answer=colour[last],
        support=(facts.index(are[asked]), facts.index(are[last]), facts.index(look[last])),
        choices=tuple(sorted(set(colour.values()))),
        cluster=name,
    )


def read_file(path: str | Path, task: int | None = None) -> list[Babi]:
    """Questions of a published file: numbered lines, a new story at number 1, answer and support after tabs.

    Args:
        path: such as qa15_basic-deduction_train.txt.
        task: its number; None: from the file's name.

    Raises:
        ValueError: a line that is not of this format, a question without story, no number in the name.
    """
    path = Path(path)
    number = re.match(r"qa(\d+)", path.name)
    if task is None and number is None:
        raise ValueError(f"{path}: the name does not begin with qa and the number of the task: give the task")
    found: list[Babi] = []
    lines: list[tuple[int, list[str]]] = []
    story = -1
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        head, _, rest = line.partition(" ")
        if not head.isdigit():
            raise ValueError(f"{path}, line {i}: expected a number and a sentence, got {line[:60]!r}")
        if head == "1":
            lines, story = [], story + 1
        parts = [part.strip() for part in rest.split("\t")]
        if len(parts) == 3:
            which = task if task is not None else int(number[1]) if number else 0
            name = f"{path.stem}-{story}"
            found.append(_read(f"{name}-{head}", which, lines, parts[0], parts[1], parts[2].split(), name))
        elif len(parts) != 1:
            raise ValueError(
                f"{path}, line {i}: a question has an answer and its support after tabs, got {line[:60]!r}"
            )
        lines.append((int(head), parts))
    if not found:
        raise ValueError(f"{path}: no question found")
    return found


def read_rows(rows: Iterable[Mapping[str, Any]], task: int, name: str = "babi_qa") -> list[Babi]:
    """Questions of rows of the hub's facebook/babi_qa.

    Args:
        rows: each with "story": {"id", "type" (0 fact, 1 question), "text", "supporting_ids", "answer"}, lists of equal
            length.
        task: number of the task.
        name: begins the prompt ids.

    Raises:
        ValueError: a row of another form.
    """
    found: list[Babi] = []
    for i, row in enumerate(rows):
        story = row.get("story")
        fields = ("id", "type", "text", "supporting_ids", "answer")
        if not isinstance(story, Mapping) or any(field not in story for field in fields):
            raise ValueError(f"{name}, row {i}: a story with {', '.join(fields)} is needed")
        lines: list[tuple[int, list[str]]] = []
        for number, kind, text, support, answer in zip(*(story[field] for field in fields), strict=True):
            if int(kind) == 1:
                cluster = f"{name}-{i}"
                found.append(_read(f"{cluster}-{number}", task, lines, text, answer, support, cluster))
            lines.append((int(number), [text, answer] if int(kind) == 1 else [text]))
    return found


def _read(
    prompt_id: str,
    task: int,
    lines: Sequence[tuple[int, list[str]]],
    question: str,
    answer: str,
    support: Iterable[str],
    cluster: str,
) -> Babi:
    facts = [(number, parts[0]) for number, parts in lines if len(parts) == 1]
    place = {number: i for i, (number, _) in enumerate(facts)}
    try:
        resting = tuple(place[int(number)] for number in support)
    except (KeyError, ValueError):
        raise ValueError(f"{prompt_id}: its support {list(support)} is not among the facts before it") from None
    texts = tuple(text for _, text in facts)
    return Babi(prompt_id, task, texts, question, answer, resting, _choices(task, texts, answer), cluster)


def _choices(task: int, facts: Sequence[str], answer: str) -> tuple[str, ...]:
    """Animals that are feared (15) or colours (16) of a story; the answer alone for other tasks."""
    if task == 16:
        return tuple(sorted({fact.rstrip(".").split()[-1] for fact in facts if not re.search(r" is an? ", fact)}))
    if task == 15:
        plurals = {fact.split()[0].lower() for fact in facts if " afraid of " in fact}
        known = {plural: singular for words in VOCABULARIES.values() for singular, plural in words.fearing}
        return tuple(sorted(known.get(plural, plural) for plural in plurals))
    return (answer,)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
