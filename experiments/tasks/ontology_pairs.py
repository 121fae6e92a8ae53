"""Pairs of words for token mixing: related by an edge, by a negated edge, or unrelated.

The question of the probe is whether the residual streams of two words tell how they are related. So that it cannot be
answered from anything else, the pairs are restricted: both are mentions in the statements of one text, the first is the
subject of a statement about a concept and the second an object of the same kind (concept or property) in every
relation, the relations are equally frequent in every text for each kind, and the texts that `mixing_texts` makes state
everything once. Statements are independent of one another here: there is no path, query or chain.

An unrelated pair takes subject and object from two different statements, an edge from one: the distance between the two
words is part of each pair, so that it can be held fixed or used as a baseline.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from experiments.tasks.ontology import Sentence, Word
from experiments.tasks.ontology_text import sentence_text, surface
from experiments.tasks.ontology_words import Lexicon

__all__ = ["MixingText", "Relation", "WordPair", "mixing_texts", "pairs_of"]

Relation: TypeAlias = Literal["edge", "negated", "unrelated"]


@dataclass(frozen=True)
class WordPair:
    """Two mentions of one text.

    Attributes:
        first, second: words in their dictionary form; `second` never comes before `first` in an edge.
        first_span, second_span: their characters.
        relation: "edge", "negated" or "unrelated".
        kind: of the second word, "concept" or "property".
        statements: numbers of the statements that they stand in.
    """

    first: Word
    second: Word
    first_span: tuple[int, int]
    second_span: tuple[int, int]
    relation: Relation
    kind: str
    statements: tuple[int, int]

    @property
    def distance(self) -> int:
        """Characters from the end of the earlier word to the beginning of the later one."""
        (_, a), (b, _) = sorted((self.first_span, self.second_span))
        return b - a


@dataclass(frozen=True)
class MixingText:
    """Statements without a path, and pairs of their words.

    Attributes:
        text_id: unique within its set.
        text: begins with a blank, so that every word has one before it.
        statements: in the order of the text.
        pairs: equally many of each relation for each kind.
        lexicon: name of the lexicon.
    """

    text_id: str
    text: str
    statements: tuple[Sentence, ...]
    pairs: tuple[WordPair, ...]
    lexicon: str


def mixing_texts(n: int, lexicon: Lexicon, seed: int | str = 0, per_relation: int = 2) -> list[MixingText]:
    """n texts with their pairs.

    Args:
        n: number of texts, at least 1.
        lexicon: "training" and "unseen" share no word: one for the probe, the other for its test.
        seed: the same seed gives the same texts.
        per_relation: positive and negated statements for each kind of object, so many of each; at least 2, because an
            unrelated pair takes its words from two statements.

    Raises:
        ValueError: n or per_relation too small, or too few words.
    """
    if n < 1 or per_relation < 2:
        raise ValueError(f"at least 1 text and 2 statements per relation are needed, got {n} and {per_relation}")
    rng = random.Random(f"mixing-{lexicon.name}-{seed}-{per_relation}")
    needed = 4 * per_relation + 2 * per_relation
    if len(lexicon.concepts) < needed or len(lexicon.families) < 2 * per_relation:
        raise ValueError(
            f"lexicon {lexicon.name!r} needs {needed} concepts and {2 * per_relation} families, "
            f"got {len(lexicon.concepts)} and {len(lexicon.families)}"
        )
    found = []
    for i in range(n):
        concepts = [Word(text, "concept") for text in rng.sample(lexicon.concepts, needed)]
        families = rng.sample(lexicon.families, 2 * per_relation)
        subjects, rest = concepts[: 4 * per_relation], concepts[4 * per_relation :]
        objects = [*rest, *(Word(rng.choice(family), "property") for family in families)]
        statements = [
            Sentence(subject, thing, negated=k % 2 == 1, plural=thing.kind == "concept")
            for k, (subject, thing) in enumerate(zip(subjects, objects, strict=True))
        ]
        rng.shuffle(statements)
        text = "".join(" " + sentence_text(statement) for statement in statements)
        pairs = pairs_of(statements, rng)
        found.append(MixingText(f"mixing-{lexicon.name}-{seed}-{i}", text, tuple(statements), pairs, lexicon.name))
    return found


def pairs_of(statements: Sequence[Sentence], rng: random.Random) -> tuple[WordPair, ...]:
    """Balanced pairs of a text that consists of these statements, each with a blank before it.

    For each kind of object as many pairs of every relation as the scarcest has; the unrelated ones pair the subject of
    one statement with the object of another about whose words nothing is stated.
    """
    spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
    at = 0
    for statement in statements:
        left = surface(statement.subject, statement.plural, capital=True)
        right = surface(statement.object, statement.plural)
        text = sentence_text(statement)
        begin = at + 1
        end = begin + len(text) - 1
        spans.append(((begin, begin + len(left)), (end - len(right), end)))
        at = begin + len(text)
    stated = {(s.subject, s.object) for s in statements} | {(s.object, s.subject) for s in statements}
    pairs: list[WordPair] = []
    for kind in ("concept", "property"):
        groups: dict[Relation, list[tuple[int, int]]] = {"edge": [], "negated": [], "unrelated": []}
        own = [i for i, s in enumerate(statements) if s.object.kind == kind and s.subject.kind == "concept"]
        for i in own:
            groups["negated" if statements[i].negated else "edge"].append((i, i))
        groups["unrelated"] = [
            (i, j) for i in own for j in own
            if i != j and (statements[i].subject, statements[j].object) not in stated
        ]  # fmt: skip
        number = min(map(len, groups.values()))
        for relation, found in groups.items():
            for i, j in sorted(rng.sample(found, number)):
                first, second = statements[i].subject, statements[j].object
                pairs.append(WordPair(first, second, spans[i][0], spans[j][1], relation, kind, (i, j)))
    return tuple(pairs)
