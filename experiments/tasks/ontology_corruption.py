"""Corruptions of an ontology's text: exchanged words, everything else untouched, aligned token by token.

At a cut point the target word is exchanged where it was mentioned before, for another word of its kind that occurs
nowhere in the text (where none is left or aligned: in demonstrations only), in the same form (plural, capital):

    "last"      the last earlier mention in the gold chain; where there is none, the last one in the question
    "question"  the last one in the question only
    "chain"     the last earlier one in the chain only
    "both"      both of these
    (`every`: all mentions in that part before the cut point instead of the last one)

At the answer (number 4h + 2) the word that decides it is exchanged: the property of the conclusion in the chain, of the
query in the question; for the other one of these two where they differ, else for one of the same family, so that a
single exchange turns the answer (with "not" in only one of them the property stays what it is and the answer does not
turn: such items are refused).

A 1-hop item has three more (`corrupt_hop`), which isolate the induction "Sam is jompus. Jompus is fast. Sam is ->
fast": the concept or the subject of the fact, or the property of the rule.

With a tokenizer the corrupted text has the same number of tokens, differs in those of the exchanged words only, and the
new word begins with another token; where no word of the lexicon does that, the corruption is refused.

Knows nothing about models. Source: Dutta et al. 2024, arXiv 2402.18312 (last earlier mention; three 1-hop corruptions);
the split into question and chain is this project's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from experiments.tasks.alignment import Span, Tokenizer, check_aligned, encode
from experiments.tasks.ontology import Word
from experiments.tasks.ontology_text import Mention, OntologyItem, surface
from experiments.tasks.ontology_words import Lexicon

__all__ = ["Corruption", "Exchange", "HopPart", "Where", "corrupt", "corrupt_hop", "corruptible", "exchange"]

Where: TypeAlias = Literal["last", "question", "chain", "both"]
HopPart: TypeAlias = Literal["concept", "subject", "property"]


@dataclass(frozen=True)
class Exchange:
    """One exchanged mention: its characters in the clean and in the corrupted text, its words as written."""

    clean: Span
    corrupted: Span
    old: str
    new: str


@dataclass(frozen=True)
class Corruption:
    """A corrupted text.

    Attributes:
        item_id: of the clean item.
        text: the whole corrupted text; what follows the cut point is as in the clean one.
        number: cut point that it is meant for.
        where: "last", "question", "chain", "both", or the part of the 1-hop item.
        exchanges: what was exchanged, in order of the text.
        old, new: the words, in their dictionary form.
        target: clean and corrupted characters of the word to be predicted.
    """

    item_id: str
    text: str
    number: int
    where: str
    exchanges: tuple[Exchange, ...]
    old: Word
    new: Word
    target: tuple[Span, Span]

    @property
    def prefix(self) -> str:
        """Corrupted text before the cut point, without the blank before the word to be predicted."""
        return self.text[: self.target[1][0]].rstrip(" ")


def corruptible(item: OntologyItem, number: int, where: Where) -> bool:
    """Whether a corruption has a mention to exchange (whether a word for it is found depends on lexicon and
    tokenizer)."""
    return not isinstance(_mentions(item, number, where, every=False), str)


def corrupt(
    item: OntologyItem,
    number: int,
    where: Where,
    lexicon: Lexicon,
    seed: int | str = 0,
    tokenizer: Tokenizer | None = None,
    every: bool = False,
) -> Corruption:
    """One corruption of an item at a cut point.

    Args:
        item: clean item.
        number: cut point, 0..4h + 2.
        where: which mention; see this module.
        lexicon: where the other word is taken from.
        seed: of the choice of that word, together with item, cut point and `where`.
        tokenizer: see `experiments.tasks.alignment`; None: alignment is not looked at.
        every: exchange all mentions before the cut point in that part, not only the last one.

    Raises:
        ValueError: no such cut point, no mention to exchange, no word that is aligned.
    """
    found = _mentions(item, number, where, every)
    if isinstance(found, str):
        raise ValueError(f"{item.item_id}, cut point {number}, {where!r}: {found}")
    cut = item.cut(number)
    rng = random.Random(f"{item.item_id}-{number}-{where}-{seed}")
    candidates = _others(item, found[0].word, lexicon, rng)
    if cut.word is None:
        candidates = _deciding(item, found[0].word, lexicon, rng)
    return exchange(item, found, candidates, number, where, tokenizer)


def corrupt_hop(
    item: OntologyItem,
    part: HopPart,
    lexicon: Lexicon,
    where: Literal["question", "chain", "both"] = "both",
    seed: int | str = 0,
    tokenizer: Tokenizer | None = None,
) -> Corruption:
    """One of the three corruptions of a 1-hop item, for its last induction (cut point 5).

    Args:
        item: of one hop.
        part: "concept" or "subject": of the fact, so that the rule no longer applies; "property": of the rule, so that
            it gives another one.
        lexicon, seed, tokenizer: see `corrupt`.
        where: exchange it in the question, in the chain, or in both.

    Raises:
        ValueError: more than one hop, an unknown part, no word that is aligned.
    """
    if item.ontology.hops != 1:
        raise ValueError(f"{item.item_id}: these corruptions are for items of 1 hop, got {item.ontology.hops}")
    if part not in get_args(HopPart):
        raise ValueError(f"part must be one of {', '.join(get_args(HopPart))}, got {part!r}")
    fact, rule = item.ontology.chain[:2]
    sentence, role = (rule, "object") if part == "property" else (fact, "object" if part == "concept" else "subject")
    numbers = {"question": item.ontology.statements.index(sentence), "chain": item.ontology.chain.index(sentence)}
    parts = ("question", "chain") if where == "both" else (where,)
    chosen = [
        m for m in item.mentions
        if m.part in parts and not m.query and m.role == role and m.sentence == numbers[m.part]
    ]  # fmt: skip
    rng = random.Random(f"{item.item_id}-{part}-{where}-{seed}")
    candidates = _others(item, chosen[0].word, lexicon, rng)
    return exchange(item, chosen, candidates, 5, f"{part} in {where}", tokenizer)


def exchange(
    item: OntologyItem,
    mentions: Sequence[Mention],
    candidates: Iterable[Word],
    number: int,
    where: str,
    tokenizer: Tokenizer | None = None,
) -> Corruption:
    """Exchange given mentions of one word for the first candidate that is aligned.

    Raises:
        ValueError: none of the candidates is.
    """
    old = mentions[0].word
    target = item.cut(number).span
    clean = None if tokenizer is None else encode(tokenizer, item.text)
    reason = "the lexicon has no other word of its kind"
    for new in candidates:
        text, exchanges = _exchanged(item.text, mentions, new)
        shift = sum(len(e.new) - len(e.old) for e in exchanges if e.clean[1] <= target[0])
        moved = (target[0] + shift, target[1] + shift)
        if clean is not None:
            other = encode(tokenizer, text)
            try:
                check_aligned(clean, other, [(e.clean, e.corrupted) for e in exchanges])
                if any(clean.ids[clean.first(e.clean)] == other.ids[other.first(e.corrupted)] for e in exchanges):
                    raise ValueError(f"{old.text!r} and {new.text!r} begin with the same token")
                assert clean.predicted(target) == other.predicted(moved), "the target moved"
            except ValueError as error:
                reason = str(error)
                continue
        return Corruption(item.item_id, text, number, where, exchanges, old, new, (target, moved))
    raise ValueError(f"{item.item_id}, cut point {number}: no word can be put for {old.text!r}; the last try: {reason}")


def _exchanged(text: str, mentions: Sequence[Mention], new: Word) -> tuple[str, tuple[Exchange, ...]]:
    pieces, exchanges, done, length = [], [], 0, 0
    for m in sorted(mentions, key=lambda mention: mention.start):
        written = surface(new, m.plural, m.capital)
        pieces += [text[done : m.start], written]
        length += m.start - done
        exchanges.append(Exchange(m.span, (length, length + len(written)), text[m.start : m.end], written))
        length += len(written)
        done = m.end
    return "".join([*pieces, text[done:]]), tuple(exchanges)


def _mentions(item: OntologyItem, number: int, where: Where, every: bool) -> list[Mention] | str:
    """Mentions that a corruption exchanges, or why there are none."""
    if where not in get_args(Where):
        raise ValueError(f"where must be one of {', '.join(get_args(Where))}, got {where!r}")
    cut = item.cut(number)
    if cut.word is None:
        return _deciding_mentions(item, where)
    chain = list(item.mentions_of(cut.word, "chain", cut.start))
    question = list(item.mentions_of(cut.word, "question"))
    if not every:
        chain, question = chain[-1:], question[-1:]
    if where == "last":
        return chain or question or "the word is mentioned nowhere before"
    if where == "question":
        return question or "the word is not mentioned in the question"
    if not chain:
        return "the word is not mentioned in the chain before"
    return chain if where == "chain" else [*question, *chain] if question else "the word is not in the question"


def _deciding_mentions(item: OntologyItem, where: Where) -> list[Mention] | str:
    """The properties that are compared at the answer: of the query and of the conclusion."""
    query, conclusion = item.ontology.query, item.ontology.conclusion
    if query.negated != conclusion.negated:
        return "the answer turns on 'not', which is no word to exchange"
    asked = next(m for m in item.mentions if m.query and m.part == "question" and m.role == "object")
    found = next(m for m in reversed(item.mentions) if m.part == "chain" and m.role == "object")
    if where == "both":
        if asked.word != found.word:
            return "query and conclusion have different words: they are not one word to exchange in both"
        return [asked, found]
    return [asked] if where == "question" else [found]


def _others(item: OntologyItem, word: Word, lexicon: Lexicon, rng: random.Random) -> list[Word]:
    """Words of a kind that occur nowhere in the text, shuffled; after them those that demonstrations have."""
    shown = {m.word.text for m in item.mentions if m.part == "demonstration"}
    taken = {m.word.text for m in item.mentions if m.part != "demonstration"}
    texts = {"entity": lexicon.entities, "concept": lexicon.concepts, "property": lexicon.properties}[word.kind]
    found = [Word(text, word.kind) for text in texts if text not in taken]
    rng.shuffle(found)
    return sorted(found, key=lambda new: new.text in shown)


def _deciding(item: OntologyItem, word: Word, lexicon: Lexicon, rng: random.Random) -> list[Word]:
    """What turns the answer: the other one of the two properties, or one that contradicts both."""
    asked, found = item.ontology.query.object, item.ontology.conclusion.object
    if asked != found:
        return [found if word == asked else asked]
    others = [Word(text, "property") for text in lexicon.family_of(word.text) if text != word.text]
    rng.shuffle(others)
    return others
