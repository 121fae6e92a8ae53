"""Ontologies: statements, a query, and the gold chain that decides it. Seeded; as words, not yet as text.

An ontology of h hops has h rules on its path, h − 1 from concept to concept and the last one to a property:

    tumpuses are jompuses, jompus is fast, sam is tumpus; query: sam is loud (h = 2, False)

Its gold chain has 2h + 1 sentences: the fact, then each rule and what it gives. The query states either the property
that the chain ends in (True) or one that contradicts it (False): another of the same family (fast, slow) or, with
negations, the same property with the other sign. So the answer is right in the open world as in the closed one.

Distractors. With "irrelevant" ones a second entity has a path of its own of the same length; with "relevant" ones a
branch leaves the path (true of the entity, of no use) and a sub-concept joins it (not true of the entity). Either way
the statement that the wrong answer is made of stands in the text as often as the right one, so that neither can be told
by looking whether a property is mentioned. With "none" it can.

Knows nothing about texts, tokens or models. Source of the form: Saparov and He 2023 (PrOntoQA, arXiv 2210.01240), with
articles left out as in Dutta et al. 2024 (arXiv 2402.18312); words and code are this project's own.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from experiments.tasks.ontology_words import Lexicon

__all__ = [
    "Distractors", "Kind", "MAX_HOPS", "Negation", "Ontology", "Order", "Sentence", "Word", "answers", "draw",
]  # fmt: skip

Kind: TypeAlias = Literal["entity", "concept", "property"]
Order: TypeAlias = Literal["ordered", "shuffled"]
Distractors: TypeAlias = Literal["none", "relevant", "irrelevant"]
Negation: TypeAlias = Literal["none", "some"]
MAX_HOPS = 4


@dataclass(frozen=True)
class Word:
    """A word in its dictionary form: names with a capital, nouns in the singular."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Sentence:
    """SUBJECT is (not) OBJECT.

    Attributes:
        subject: entity or concept.
        object: concept or property.
        negated: with "not".
        plural: written "subjects are objects"; a property has no plural.
    """

    subject: Word
    object: Word
    negated: bool = False
    plural: bool = False

    @property
    def is_rule(self) -> bool:
        """About all of a concept, not about one entity."""
        return self.subject.kind == "concept"

    @property
    def meaning(self) -> tuple[Word, Word, bool]:
        """What it says, however it is written."""
        return self.subject, self.object, self.negated


@dataclass(frozen=True)
class Ontology:
    """A question and its gold chain.

    Attributes:
        statements: in the order of the text.
        query: the sentence to be judged.
        answer: whether it is true.
        chain: fact, rule, inference, rule, inference, …; 2 * hops + 1 sentences.
        hops: rules on the path, 1..4.
        order: "ordered": the rules of the path in the order of the chain, the fact last.
        distractors: what else is stated.
        lexicon: name of the lexicon.
    """

    statements: tuple[Sentence, ...]
    query: Sentence
    answer: bool
    chain: tuple[Sentence, ...]
    hops: int
    order: Order
    distractors: Distractors
    lexicon: str

    @property
    def words(self) -> frozenset[Word]:
        """Every word of statements and query."""
        return frozenset(word for s in (*self.statements, self.query) for word in (s.subject, s.object))

    @property
    def entity(self) -> Word:
        """Whom the query is about."""
        return self.query.subject

    @property
    def conclusion(self) -> Sentence:
        """Last sentence of the chain."""
        return self.chain[-1]


def answers(n: int, rng: random.Random) -> list[bool]:
    """n answers in random order, half of them True (one more or less where n is odd)."""
    few = n // 2 + (n % 2 and rng.random() < 0.5)
    found = [i < few for i in range(n)]
    rng.shuffle(found)
    return found


def draw(
    rng: random.Random,
    lexicon: Lexicon,
    hops: int,
    answer: bool,
    order: Order = "ordered",
    distractors: Distractors = "irrelevant",
    negation: Negation = "none",
    avoid: Collection[Word] = (),
) -> Ontology:
    """One ontology.

    Args:
        rng: decides everything.
        lexicon: words to draw from.
        hops: rules on the path, 1..4.
        answer: of the query.
        order: "ordered" or "shuffled".
        distractors: "none", "relevant" or "irrelevant"; see this module.
        negation: "some": every property is stated with "not" half of the time.
        avoid: words that must not occur.

    Raises:
        ValueError: an unknown setting, or too few words.
    """
    if not 1 <= hops <= MAX_HOPS:
        raise ValueError(f"hops must be in 1..{MAX_HOPS}, got {hops}")
    for name, value, allowed in (
        ("order", order, Order), ("distractors", distractors, Distractors), ("negation", negation, Negation)
    ):  # fmt: skip
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")
    supply = _Supply(rng, lexicon, {word.text for word in avoid})
    entity = supply.entity()
    path = supply.path(hops)
    end, wrong = supply.contradicting(path[-1], negation)
    fact = Sentence(entity, path[0])
    rules = [*_edges(path), Sentence(path[-1], *end)]
    chain = [fact]
    for rule in rules:
        chain += [rule, Sentence(entity, rule.object, rule.negated)]
    others: list[Sentence] = []
    if distractors == "irrelevant":
        second = supply.path(hops, unlike=wrong[0])
        others = [*_edges(second), Sentence(second[-1], *wrong), Sentence(supply.entity(), second[0])]
    elif distractors == "relevant":
        others = _relevant(rng, supply, path, wrong, negation)
    return Ontology(
        statements=tuple(_arrange(rng, rules, fact, others, order)),
        query=Sentence(entity, *(end if answer else wrong)),
        answer=answer,
        chain=tuple(chain),
        hops=hops,
        order=order,
        distractors=distractors,
        lexicon=lexicon.name,
    )


def _edges(path: Sequence[Word]) -> list[Sentence]:
    return [Sentence(a, b, plural=True) for a, b in zip(path, path[1:], strict=False)]


def _relevant(
    rng: random.Random, supply: _Supply, path: Sequence[Word], wrong: tuple[Word, bool], negation: Negation
) -> list[Sentence]:
    """A branch that leaves the path and a sub-concept that joins it, which has the property of the wrong answer."""
    leaves = rng.choice(path)
    branch = supply.concept(after=leaves)
    idle = supply.property_for(branch)
    joins = rng.choice(path)
    below = supply.concept(before=joins, unlike=wrong[0])
    return [
        Sentence(leaves, branch, plural=True),
        Sentence(branch, idle, negation == "some" and rng.random() < 0.5),
        Sentence(below, joins, plural=True),
        Sentence(below, *wrong),
    ]


def _arrange(
    rng: random.Random, rules: list[Sentence], fact: Sentence, others: list[Sentence], order: Order
) -> list[Sentence]:
    """Statements in the order of the text: the path's own order kept ("ordered") or everything shuffled."""
    if order == "shuffled":
        every = [*rules, fact, *others]
        rng.shuffle(every)
        return every
    slots = sorted(rng.randint(0, len(rules)) for _ in others)
    found: list[Sentence] = []
    rest = list(others)
    for i in range(len(rules) + 1):
        while slots and slots[0] == i:
            slots.pop(0)
            found.append(rest.pop(0))
        if i < len(rules):
            found.append(rules[i])
    return [*found, fact]


class _Supply:
    """Words of a lexicon, each given out once."""

    def __init__(self, rng: random.Random, lexicon: Lexicon, avoid: Collection[str]) -> None:
        self.rng, self.lexicon = rng, lexicon
        self.entities = [word for word in lexicon.entities if word not in avoid]
        self.concepts = [word for word in lexicon.concepts if word not in avoid]
        self.families = [family for family in lexicon.families if not set(family) & set(avoid)]
        rng.shuffle(self.entities)
        rng.shuffle(self.concepts)
        rng.shuffle(self.families)

    def _short(self, what: str) -> ValueError:
        return ValueError(f"lexicon {self.lexicon.name!r} has too few {what} for this ontology; fit a larger one")

    def entity(self) -> Word:
        if not self.entities:
            raise self._short("names")
        return Word(self.entities.pop(), "entity")

    def concept(self, after: Word | None = None, before: Word | None = None, unlike: Word | None = None) -> Word:
        """A concept that may stand after or before another one (see `Lexicon.may_be`), and have a property."""
        for i in reversed(range(len(self.concepts))):
            found, may_be = self.concepts[i], self.lexicon.may_be
            if after is not None and not may_be(after.text, found):
                continue
            if before is not None and not may_be(found, before.text):
                continue
            if unlike is not None and not may_be(found, unlike.text):
                continue
            del self.concepts[i]
            return Word(found, "concept")
        raise self._short("concepts")

    def path(self, length: int, unlike: Word | None = None) -> list[Word]:
        """Concepts in a row; the last one may have the property `unlike`."""
        found = [self.concept(unlike=unlike)]
        while len(found) < length:
            found.insert(0, self.concept(before=found[0]))
        return found

    def contradicting(self, concept: Word, negation: Negation) -> tuple[tuple[Word, bool], tuple[Word, bool]]:
        """Two (property, negated) for the end of a path, of which the second contradicts the first."""
        for i in reversed(range(len(self.families))):
            fitting = [word for word in self.families[i] if self.lexicon.may_be(concept.text, word)]
            if fitting:
                family = self.families.pop(i)
                word = self.rng.choice(fitting)
                other = self.rng.choice([w for w in family if w != word])
                negated = negation == "some" and self.rng.random() < 0.5
                end = (Word(word, "property"), negated)
                if negated or (negation == "some" and self.rng.random() < 0.5):
                    return end, (end[0], not negated)
                return end, (Word(other, "property"), False)
        raise self._short("properties")

    def property_for(self, concept: Word) -> Word:
        """A property of an unused family that a concept may have."""
        for i in reversed(range(len(self.families))):
            fitting = [word for word in self.families[i] if self.lexicon.may_be(concept.text, word)]
            if fitting:
                self.families.pop(i)
                return Word(self.rng.choice(fitting), "property")
        raise self._short("properties")
