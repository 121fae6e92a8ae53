"""Indirect-object sentences: two people, one gives a thing to … the other one.

Sets: "A" names the receiver first ("Mary and Tom …, Tom gave a ring to" -> Mary), "B" turns the two names round, "AL"
and "BL" are the same with a longer story between. "H" and "HL" are harder: a third person is named more often than the
receiver and leaves before the thing is given, and the names stand in any order.

Names, places and things are single tokens of the tokenizer at hand where one is given. A combination of names, place
and thing belongs to one split for all sets and seeds ("derivation", "validation" or "test", by a hash), so no two
splits share one.

Knows nothing about models. All sentences are this project's own; the task is that of Wang et al. 2022 (arXiv
2211.00593), the four sets those of Højer et al. 2025 (arXiv 2504.19483).
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from experiments.tasks.alignment import Tokenizer, single_token_words
from experiments.tasks.restricted import first_tokens

__all__ = [
    "IndirectObject", "Negative", "SPLITS", "SentenceSet", "Words", "contrastive_pair", "generate", "negative_letters",
    "split_of", "words_for",
]  # fmt: skip

SentenceSet: TypeAlias = Literal["A", "B", "AL", "BL", "H", "HL"]
Negative: TypeAlias = Literal["swapped", "letters"]
LETTERS = 75
"""Length of a negative of random letters, as published."""
#: tenths of the combinations given to each split
SPLITS = {"derivation": range(0, 4), "validation": range(4, 6), "test": range(6, 10)}
_PATIENCE = 2000
_FEWEST = {"names": 8, "places": 4, "things": 4}

NAMES = tuple(
    """Mary Tom John Anna James Sarah Paul Laura Mark Emma Peter Kate David Lucy Jack Alice Daniel Rachel Simon Jane
    Robert Helen Steven Julia Kevin Susan Brian Linda Martin Amy Thomas Karen Adam Rose George Maria Henry Diana Victor
    Emily Oliver Sophie Frank Ruth Eric Grace""".split()
)
PLACES = tuple(
    """restaurant office school garden market library station park museum beach hotel church hospital kitchen theater
    farm house store bank airport bridge castle lake river""".split()
)
THINGS = tuple(
    """ring book letter ball bag box key card cup coat watch ticket pen lamp plate basket flower map toy camera hat
    bottle phone gift""".split()
)
_VERBS = ("gave", "handed", "passed", "sold", "showed", "offered", "brought")
_SHORT = (
    "Yesterday {first} and {second} met at the {place}. {giver} {verb} a {thing} to",
    "After lunch {first} and {second} were at the {place}, and {giver} {verb} a {thing} to",
    "{first} and {second} sat down near the {place}. Then {giver} {verb} a {thing} to",
    "When {first} and {second} left the {place}, {giver} {verb} a {thing} to",
)
_LONG = (
    "Early that morning {first} and {second} set out for the {place}, which was much further than they had thought. "
    "It rained all the way. When they were there at last, {giver} {verb} a {thing} to",
    "{first} and {second} had been friends for years and spent every free day at the {place}. This time the weather "
    "was bad and hardly anybody came. Late in the afternoon {giver} {verb} a {thing} to",
    "Nobody knew why {first} and {second} wanted to see the {place} again after so many years. They walked around for "
    "an hour and talked about the old days. Before it became dark, {giver} {verb} a {thing} to",
)
_HARD = (
    "{first}, {second} and {third} met at the {place}. Soon {other} had to go home alone. Later {giver} {verb} a "
    "{thing} to",
    "At the {place} {first} talked with {second} and {third}. As {other} was tired, {other} left early. Then {giver} "
    "{verb} a {thing} to",
)
_HARD_LONG = (
    "Early that morning {first}, {second} and {third} set out for the {place}, which was much further than they had "
    "thought. It rained all the way, and halfway there {other} turned back. When the rest had arrived, {giver} {verb} "
    "a {thing} to",
    "For years {first}, {second} and {third} spent every free day at the {place}. This time {other} was ill and stayed "
    "at home, and hardly anybody else came. Late in the afternoon {giver} {verb} a {thing} to",
)


@dataclass(frozen=True)
class Words:
    """What the sentences are made of: names, places, things."""

    names: tuple[str, ...] = NAMES
    places: tuple[str, ...] = PLACES
    things: tuple[str, ...] = THINGS


@dataclass(frozen=True)
class IndirectObject:
    """One sentence to be completed.

    Attributes:
        prompt_id: unique within its set, split and seed.
        question: the sentence up to "to", without a blank at its end.
        answer: the receiver.
        wrong: the giver.
        choices: every name in the sentence, the answer first.
        sentences: "A", "B", "AL", "BL", "H" or "HL".
        verb, place, thing: its words.
        cluster: names, place and thing; sentences with the same value are not independent.
        split: that owns this combination.
    """

    prompt_id: str
    question: str
    answer: str
    wrong: str
    choices: tuple[str, ...]
    sentences: SentenceSet
    verb: str
    place: str
    thing: str
    cluster: str
    split: str


def words_for(tokenizer: Tokenizer, words: Words | None = None) -> Words:
    """The names, places and things that are one token each after a blank, no two of a kind the same.

    Raises:
        ValueError: fewer than 8 names, 4 places or 4 things are left.
    """
    given = words or Words()
    found = Words(
        *(tuple(single_token_words(part, tokenizer)) for part in (given.names, given.places, given.things))
    )  # fmt: skip
    for what, least in _FEWEST.items():
        left = len(getattr(found, what))
        if left < least:
            raise ValueError(
                f"only {left} of {len(getattr(given, what))} {what} are single tokens of this tokenizer; "
                f"{least} are needed"
            )
    return found


def split_of(names: Sequence[str], place: str, thing: str) -> str:
    """Split that owns a combination, whatever the order of names, the verb and the set; the same on every machine."""
    key = "|".join([*sorted(names), place, thing])
    tenth = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def generate(
    n: int,
    sentences: SentenceSet = "A",
    split: str = "test",
    seed: int | str = 0,
    tokenizer: Tokenizer | None = None,
    words: Words | None = None,
) -> list[IndirectObject]:
    """n sentences with different combinations of names, place and thing.

    Sets "A" and "B" (and "AL" and "BL") of one seed and split are the same stories with the two names turned round.

    Args:
        n: at least 1.
        sentences: set; see this module.
        split: "derivation", "validation" or "test".
        seed: the same seed gives the same sentences.
        tokenizer: take words that are single tokens only (`words_for`); None: all words.
        words: to choose from; None: this module's.

    Raises:
        ValueError: unknown set or split, n < 1, too few words.
    """
    if sentences not in get_args(SentenceSet):
        raise ValueError(f"sentences must be one of {', '.join(get_args(SentenceSet))}, got {sentences!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if n < 1:
        raise ValueError(f"the number of sentences must be at least 1, got {n}")
    given = words or Words()
    given = given if tokenizer is None else words_for(tokenizer, given)
    hard, long = sentences.startswith("H"), sentences.endswith("L")
    stories = (_HARD_LONG if long else _HARD) if hard else (_LONG if long else _SHORT)
    rng = random.Random(f"indirect-objects-{'H' if hard else 'AB'}{long}-{split}-{seed}")
    found: list[IndirectObject] = []
    seen: set[str] = set()
    tries = 0
    while len(found) < n:
        tries += 1
        if tries > _PATIENCE * n:
            raise ValueError(
                f"only {len(found)} different combinations found in split {split!r}; ask for fewer than {n}"
            )
        names = rng.sample(given.names, 3 if hard else 2)
        place, thing, verb = rng.choice(given.places), rng.choice(given.things), rng.choice(_VERBS)
        story = rng.choice(stories)
        cluster = "|".join([*sorted(names), place, thing])
        if cluster in seen or split_of(names, place, thing) != split:
            continue
        seen.add(cluster)
        receiver, giver = names[:2]
        order = list(names)
        if hard:
            rng.shuffle(order)
        elif sentences.startswith("B"):
            order.reverse()
        slots = dict(zip(("first", "second", "third")[: len(order)], order, strict=True))
        if hard:
            slots["other"] = names[2]
        found.append(
            IndirectObject(
                prompt_id=f"indirect-objects-{sentences}-{split}-{seed}-{len(found)}",
                question=story.format(place=place, thing=thing, verb=verb, giver=giver, **slots),
                answer=receiver,
                wrong=giver,
                choices=(receiver, giver, *names[2:]),
                sentences=sentences,
                verb=verb,
                place=place,
                thing=thing,
                cluster=cluster,
                split=split,
            )
        )
    if tokenizer is not None:
        first_tokens(sorted({name for item in found for name in item.choices}), tokenizer)
    return found


def negative_letters(rng: random.Random, length: int = LETTERS) -> str:
    """Random letters, small and capital."""
    return "".join(rng.choices(string.ascii_letters, k=length))


def contrastive_pair(
    item: IndirectObject, negative: Negative = "swapped", letters: Callable[[], str] | None = None
) -> tuple[str, str]:
    """(text with the right name at its end, its negative).

    Args:
        item: a sentence.
        negative: "swapped": the same sentence with the giver's name at its end; "letters": what `letters` returns.
        letters: such as `lambda: negative_letters(rng)`; needed for "letters" only.

    Raises:
        ValueError: an unknown negative, or "letters" without the function.
    """
    positive = f"{item.question} {item.answer}"
    if negative == "swapped":
        return positive, f"{item.question} {item.wrong}"
    if negative != "letters":
        raise ValueError(f"negative must be one of {', '.join(get_args(Negative))}, got {negative!r}")
    if letters is None:
        raise ValueError("negative 'letters' needs the function that makes them, such as negative_letters")
    return positive, letters()
