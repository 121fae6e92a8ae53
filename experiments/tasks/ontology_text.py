"""Ontologies as text: `### Input:` / `### Response:`, demonstrations, every mention of every word, cut points.

    ### Input: Tumpuses are jompuses. Jompus is fast. Sam is tumpus. True or false: Sam is loud. Let us think step by
    step.
    ### Response: Sam is tumpus. Tumpuses are jompuses. Sam is jompus. Jompus is fast. Sam is fast. False

(one line each), solved demonstrations of the same form before it, a blank line between. Every word of an ontology has a
blank before it, also the first one after a heading: a tokenizer then sees one form of a word everywhere.

Cut points. The gold chain of h hops has sentences 0..2h; sentence k gives two cut points,

    2k      its subject                           decision (what to go on with)
    2k + 1  its object (after "is", "is not")     copy for the fact (k = 0) and the rules (k odd), induction for what is
                                                  inferred (k = 2, 4, …)
    4h + 2  True or False                         answer

For h = 2: decision 0 2 4 6 8, copy 1 3 7, induction 5 9, answer 10. At a cut point the model reads the text up to the
word, without the blank before it, and the word is to be predicted.

Knows nothing about tokens (see experiments/tasks/alignment.py) or models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from experiments.tasks.ontology import Distractors, Negation, Ontology, Order, Sentence, Word, answers, draw
from experiments.tasks.ontology_words import Lexicon, plural_of

__all__ = [
    "Cut", "CutKind", "DEMONSTRATIONS", "INSTRUCTION", "Mention", "OntologyItem", "Part", "compose", "generate",
    "sentence_text", "surface",
]  # fmt: skip

Part: TypeAlias = Literal["demonstration", "question", "chain"]
CutKind: TypeAlias = Literal["decision", "copy", "induction", "answer"]
INSTRUCTION = "Let us think step by step."
DEMONSTRATIONS = 6
_PATIENCE = 1000


@dataclass(frozen=True)
class Mention:
    """One occurrence of a word.

    Attributes:
        word: which word, in its dictionary form.
        start, end: its characters in the text.
        part: "demonstration" (question or chain of one), "question" (statements and query) or "chain".
        demonstration: 0-based; -1 outside demonstrations.
        sentence: number of the sentence within its question or chain, from 0.
        role: "subject" or "object" of its sentence.
        query: it stands in the sentence after "True or false:".
        plural, capital: the form in which it is written.
    """

    word: Word
    start: int
    end: int
    part: Part
    demonstration: int
    sentence: int
    role: Literal["subject", "object"]
    query: bool
    plural: bool
    capital: bool

    @property
    def span(self) -> tuple[int, int]:
        """(start, end)."""
        return self.start, self.end


@dataclass(frozen=True)
class Cut:
    """A cut point of the gold chain.

    Attributes:
        number: 0..4h + 2; see this module.
        kind: "decision", "copy", "induction" or "answer".
        start, end: characters of the word to be predicted.
        target: that word as it is written.
        word: the word in its dictionary form; None for the answer.
    """

    number: int
    kind: CutKind
    start: int
    end: int
    target: str
    word: Word | None

    @property
    def span(self) -> tuple[int, int]:
        """(start, end) of the word to be predicted."""
        return self.start, self.end


@dataclass(frozen=True)
class OntologyItem:
    """An ontology with its demonstrations as one text.

    Attributes:
        item_id: unique within its set.
        ontology: the question.
        demonstrations: the solved ones before it.
        instruction: sentence after the query; may be empty.
        text: everything, gold chain and answer included.
        prompt_end: characters of the prompt, which ends in "### Response:".
        mentions: every occurrence of every word of an ontology, in order of the text.
        cuts: every cut point, by number.
    """

    item_id: str
    ontology: Ontology
    demonstrations: tuple[Ontology, ...]
    instruction: str
    text: str
    prompt_end: int
    mentions: tuple[Mention, ...]
    cuts: tuple[Cut, ...]

    @property
    def prompt(self) -> str:
        """What the model reads before it writes the chain."""
        return self.text[: self.prompt_end]

    @property
    def completion(self) -> str:
        """Gold chain and answer, with the blank before them."""
        return self.text[self.prompt_end :]

    @property
    def answer(self) -> str:
        """Written answer, "True" or "False"."""
        return str(self.ontology.answer)

    @property
    def sources(self) -> dict[Part, tuple[tuple[int, int], ...]]:
        """Character spans of every mention by part."""
        parts: tuple[Part, ...] = ("demonstration", "question", "chain")
        return {part: tuple(m.span for m in self.mentions if m.part == part) for part in parts}

    def prefix(self, number: int) -> str:
        """Text before a cut point, without the blank before the word to be predicted."""
        return self.text[: self.cut(number).start].rstrip(" ")

    def cut(self, number: int) -> Cut:
        """Cut point by number.

        Raises:
            ValueError: no such number.
        """
        if not 0 <= number < len(self.cuts):
            raise ValueError(f"cut points of {self.ontology.hops} hops are 0..{len(self.cuts) - 1}, got {number}")
        return self.cuts[number]

    def mentions_of(self, word: Word, part: Part | None = None, before: int | None = None) -> tuple[Mention, ...]:
        """Mentions of a word in order of the text, in one part, before a character."""
        return tuple(
            m for m in self.mentions
            if m.word == word and (part is None or m.part == part) and (before is None or m.end <= before)
        )  # fmt: skip


def surface(word: Word, plural: bool = False, capital: bool = False) -> str:
    """A word as it is written."""
    text = plural_of(word.text) if plural and word.kind == "concept" else word.text
    return text[0].upper() + text[1:] if capital else text


def sentence_text(sentence: Sentence) -> str:
    """A sentence as it is written, with its full stop."""
    return "".join(piece for piece, _, _ in _pieces(sentence))


def _pieces(sentence: Sentence) -> tuple[tuple[str, Word | None, Literal["subject", "object"]], ...]:
    """Pieces of a sentence: (text, word if the piece is one, its role)."""
    verb = (" are" if sentence.plural else " is") + (" not " if sentence.negated else " ")
    return (
        (surface(sentence.subject, sentence.plural, capital=True), sentence.subject, "subject"),
        (verb, None, "subject"),
        (surface(sentence.object, sentence.plural), sentence.object, "object"),
        (".", None, "object"),
    )


class _Writer:
    """A text that grows, and the words in it."""

    def __init__(self) -> None:
        self.text = ""
        self.mentions: list[Mention] = []

    def sentence(self, sentence: Sentence, part: Part, demonstration: int, number: int, query: bool = False) -> None:
        self.text += " "
        for piece, word, role in _pieces(sentence):
            start = len(self.text)
            self.text += piece
            if word is not None:
                plural = sentence.plural and word.kind == "concept"
                capital = piece[0].isupper()
                self.mentions.append(
                    Mention(word, start, start + len(piece), part, demonstration, number, role, query, plural, capital)
                )

    def question(self, ontology: Ontology, instruction: str, part: Part, demonstration: int) -> None:
        self.text += "### Input:"
        for number, statement in enumerate(ontology.statements):
            self.sentence(statement, part, demonstration, number)
        self.text += " True or false:"
        self.sentence(ontology.query, part, demonstration, len(ontology.statements), query=True)
        self.text += (" " + instruction if instruction else "") + "\n### Response:"

    def chain(self, ontology: Ontology, part: Part, demonstration: int) -> None:
        for number, sentence in enumerate(ontology.chain):
            self.sentence(sentence, part, demonstration, number)
        self.text += f" {ontology.answer}"


def compose(
    ontology: Ontology,
    demonstrations: Sequence[Ontology] = (),
    instruction: str = INSTRUCTION,
    item_id: str = "ontology",
) -> OntologyItem:
    """An ontology and solved demonstrations as one text."""
    writer = _Writer()
    for number, shown in enumerate(demonstrations):
        writer.question(shown, instruction, "demonstration", number)
        writer.chain(shown, "demonstration", number)
        writer.text += "\n\n"
    writer.question(ontology, instruction, "question", -1)
    prompt_end = len(writer.text)
    writer.chain(ontology, "chain", -1)
    chain = [mention for mention in writer.mentions if mention.part == "chain"]
    cuts = [_cut(number, mention, writer.text) for number, mention in enumerate(chain)]
    answer = str(ontology.answer)
    cuts.append(Cut(len(cuts), "answer", len(writer.text) - len(answer), len(writer.text), answer, None))
    return OntologyItem(
        item_id=item_id,
        ontology=ontology,
        demonstrations=tuple(demonstrations),
        instruction=instruction,
        text=writer.text,
        prompt_end=prompt_end,
        mentions=tuple(writer.mentions),
        cuts=tuple(cuts),
    )


def _cut(number: int, mention: Mention, text: str) -> Cut:
    inferred = mention.sentence > 0 and mention.sentence % 2 == 0
    kind: CutKind = "decision" if mention.role == "subject" else "induction" if inferred else "copy"
    return Cut(number, kind, mention.start, mention.end, text[mention.start : mention.end], mention.word)


def generate(
    n: int,
    lexicon: Lexicon,
    hops: int = 2,
    seed: int | str = 0,
    order: Order = "ordered",
    distractors: Distractors = "irrelevant",
    negation: Negation = "none",
    demonstrations: int = DEMONSTRATIONS,
    instruction: str = INSTRUCTION,
    shown: Lexicon | None = None,
) -> list[OntologyItem]:
    """n different items of one shape; half of the answers True (one more or less where n is odd).

    Demonstrations have the same shape and the question's words never occur in them; their answers are as balanced.

    Args:
        n: number of items, at least 1.
        lexicon: words of the question; fit it to the tokenizer (`ontology_words.fit`) where positions matter.
        hops, order, distractors, negation: see `experiments.tasks.ontology.draw`.
        seed: the same seed gives the same items.
        demonstrations: solved ones before each question; 0 or more.
        instruction: sentence after every query; may be empty.
        shown: words of the demonstrations; None: of the same lexicon.

    Raises:
        ValueError: n or demonstrations too small, an unknown setting, too few words for n different items.
    """
    if n < 1:
        raise ValueError(f"the number of items must be at least 1, got {n}")
    if demonstrations < 0:
        raise ValueError(f"the number of demonstrations must be 0 or more, got {demonstrations}")
    name = f"ontology-{lexicon.name}-{hops}-{order}-{distractors}-{negation}-{seed}"
    rng = random.Random(f"{name}-{demonstrations}")
    seen: set[Ontology] = set()
    items = []
    for i, answer in enumerate(answers(n, rng)):
        for _ in range(_PATIENCE):
            ontology = draw(rng, lexicon, hops, answer, order, distractors, negation)
            if ontology not in seen:
                break
        else:
            raise ValueError(f"lexicon {lexicon.name!r} gives only {len(seen)} different items; ask for fewer than {n}")
        seen.add(ontology)
        solved = [
            draw(rng, shown or lexicon, hops, solution, order, distractors, negation, avoid=_taken(ontology, lexicon))
            for solution in answers(demonstrations, rng)
        ]
        items.append(compose(ontology, solved, instruction, f"{name}-{i}"))
    return items


def _taken(ontology: Ontology, lexicon: Lexicon) -> list[Word]:
    """Words that demonstrations leave out: those of the question (with small lexicons, its properties may recur)."""
    scarce = len(lexicon.families) < 8
    return [word for word in ontology.words if not (scarce and word.kind == "property")]
