"""Words of fictional and of false ontologies, and their fitting to a tokenizer.

Three lexicons: "training" and "unseen" have invented concepts and share no word with each other; "false" has real nouns
in categories, so that relations between them can be chosen to be wrong. The invented words were made for this project
from syllables; none is from a published list. Properties come in families of which only one can hold (fast, slow), so
that "Sam is slow" is contradicted by "Sam is fast".

`fit` keeps the words that one tokenizer treats alike, which makes every exchange of words aligned by position.
Knows nothing about sentences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.tasks.alignment import Tokenizer, ids_of

__all__ = ["FALSE", "LEXICONS", "Lexicon", "TRAINING", "UNSEEN", "fit", "plural_of"]


@dataclass(frozen=True)
class Lexicon:
    """Words of one vocabulary.

    Attributes:
        name: "training", "unseen", "false"; a fitted lexicon keeps it.
        concepts: nouns in the singular, lower case.
        entities: names.
        families: properties in groups that exclude one another; at least two in each.
        category: concept -> category, for real words only; an edge within a category could be true.
        suits: property -> categories for which it could be true, for real words only.
    """

    name: str
    concepts: tuple[str, ...]
    entities: tuple[str, ...]
    families: tuple[tuple[str, ...], ...]
    category: Mapping[str, str] = field(default_factory=dict)
    suits: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def properties(self) -> tuple[str, ...]:
        """Every property, family by family."""
        return tuple(word for family in self.families for word in family)

    def family_of(self, word: str) -> tuple[str, ...]:
        """The family of a property; every property for a word that has none here."""
        return next((family for family in self.families if word in family), self.properties)

    def may_be(self, concept: str, other: str) -> bool:
        """Whether "CONCEPT is OTHER" (concept or property) is allowed in an ontology: always for invented words, only
        where it is wrong for real ones."""
        if concept not in self.category:
            return True
        if other in self.category:
            return self.category[concept] != self.category[other]
        return self.category[concept] not in self.suits.get(other, frozenset())


def plural_of(noun: str) -> str:
    """Regular plural: -es after a hissing sound, -ies for -y after a consonant, else -s."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


TRAINING = Lexicon(
    name="training",
    concepts=tuple(
        """grandek noron gradal panod plezer globral ridar teber rubral dubral prurer kanod grebar labun volul birin
        gemer floron mildak podit flavog fedak winod fenar balim moldim bubim folkod razer wedot privul glebon lazut
        tamim flelin lodrub bedan bondel stamul yinig pezer tombin slazer lobig gevar munul pronel pondot vinin kinod
        bomim spinod gonit yinal dobin boldut linul pubak debak donin temig dodot pilop warog melin virin bendut norer
        survun ledim boglog tunon tulom plaver rumog funel pedog budrop triner welon flaglog pandek stemig gazal
        snumber sundul garin bobrer genon relkin sidut ladrub gibrub gamot sendot sonut selod mulul skerer belker
        remom bezer purver galar fulim brandel gelig livul valot kelul govar tenon fibek thriber gladut forak gridal
        rebrel gramim liglog sabun tedrer pelig nobog gider revig spendot lenom predrer ramom drurop bandin solon
        marom""".split()
    ),
    entities=tuple(
        """Sam Max Tom Anna Ben Eva Leo Mia Paul Ruth Carl Hugo Jack Lucy Mark Rosa Adam Clara Emma Fred Ivan Jane
        Karl Mary Nick Peter""".split()
    ),
    families=(
        ("fast", "slow"),
        ("loud", "quiet"),
        ("hot", "cold", "warm", "cool"),
        ("wet", "dry"),
        ("red", "blue", "green", "yellow"),
        ("round", "square", "flat"),
        ("large", "small", "tiny", "huge"),
        ("happy", "sad", "angry"),
        ("rough", "smooth"),
        ("clean", "dirty"),
        ("rich", "poor"),
        ("sweet", "sour", "bitter"),
        ("bright", "dark"),
        ("tame", "wild"),
    ),
)
UNSEEN = Lexicon(
    name="unseen",
    concepts=tuple(
        """probim faban delod gorak nomul falar padod dadim binig varver tanel febit tilul zurer spanak gobran famal
        razut prebit radog bodrub gunog nonot pirar spirbot medrun yogler tribim sunun stimun savog sebop kindot verbom
        sorver silin navod pulod filek vimal surel badig romot pavon dilom tendek bolot suldog draber glaver lanit
        piver pendit kilog warek spaver danot mudek babrub skazer vonot goldot sedrel""".split()
    ),
    entities=tuple("Sarah Victor Alex Rex Oscar Martin Laura Kate Jim Helen Frank Dan Alice Bill David Eric".split()),
    families=(
        ("young", "old"),
        ("brave", "shy"),
        ("kind", "mean"),
        ("heavy", "light"),
        ("tall", "short"),
        ("strong", "weak"),
        ("deep", "shallow"),
        ("wide", "narrow"),
        ("hard", "soft"),
        ("thick", "thin"),
        ("orange", "purple", "brown"),
        ("calm", "nervous"),
    ),
)

_REAL: dict[str, str] = {
    "animal": "cat dog horse cow goat duck hen bear lion tiger frog owl eagle snake whale shark bee spider",
    "plant": "tree rose tulip oak pine fern cactus bush lily",
    "vehicle": "car truck train boat plane bike ship tank bus",
    "tool": "hammer saw drill spoon fork pen lamp clock rope",
    "food": "cake pie soup apple lemon onion cheese carrot pizza",
    "place": "bridge castle tower school church river island hill lake",
}
_SUITS: dict[str, str] = {
    "furry": "animal",
    "leafy": "plant food",
    "edible": "food plant animal",
    "electric": "vehicle tool",
    "wooden": "plant tool vehicle place",
    "metal": "tool vehicle place",
    "alive": "animal plant",
    "sweet": "food plant",
    "salty": "food",
    "ancient": "place tool plant",
    "hungry": "animal",
    "noisy": "animal vehicle tool place",
}
FALSE = Lexicon(
    name="false",
    concepts=tuple(noun for nouns in _REAL.values() for noun in nouns.split()),
    entities=TRAINING.entities + UNSEEN.entities,
    families=(
        ("furry", "leafy"),
        ("edible", "electric"),
        ("wooden", "metal"),
        ("sweet", "salty"),
        ("alive", "ancient"),
        ("hungry", "noisy"),
    ),
    category={noun: category for category, nouns in _REAL.items() for noun in nouns.split()},
    suits={word: frozenset(categories.split()) for word, categories in _SUITS.items()},
)
LEXICONS: dict[str, Lexicon] = {lexicon.name: lexicon for lexicon in (TRAINING, UNSEEN, FALSE)}

NEEDED = {"concepts": 12, "entities": 4, "families": 4}
"""Words below which a lexicon gives too little to choose from."""


def fit(lexicon: Lexicon, tokenizer: Tokenizer, needed: Mapping[str, int] = NEEDED) -> Lexicon:
    """The part of a lexicon that one tokenizer treats alike, so that every exchange of words is aligned by position.

    Kept are the concepts with the most frequent token counts of their four forms (" noun", " Noun", " nouns",
    " Nouns"), the names and the properties with the most frequent token count; among them no two words share the first
    token of a form, so that the first token tells the word.

    Args:
        lexicon: any.
        tokenizer: see `experiments.tasks.alignment`.
        needed: least number of concepts, entities and families to be left.

    Raises:
        ValueError: fewer are left (their number, and what is needed).
    """
    ids = ids_of(tokenizer)

    def forms(noun: str) -> list[list[int]]:
        many = plural_of(noun)
        return [ids(" " + form) for form in (noun, noun.capitalize(), many, many.capitalize())]

    concepts = _alike(lexicon.concepts, {noun: forms(noun) for noun in lexicon.concepts})
    entities = _alike(lexicon.entities, {name: [ids(" " + name)] for name in lexicon.entities})
    properties = set(_alike(lexicon.properties, {word: [ids(" " + word)] for word in lexicon.properties}))
    families = tuple(tuple(word for word in family if word in properties) for family in lexicon.families)
    families = tuple(family for family in families if len(family) > 1)
    for what, found in (("concepts", concepts), ("entities", entities), ("families", families)):
        if len(found) < needed[what]:
            raise ValueError(
                f"lexicon {lexicon.name!r}: only {len(found)} {what} have equal token counts and first tokens of "
                f"their own with this tokenizer; {needed[what]} are needed"
            )
    return replace(lexicon, concepts=concepts, entities=entities, families=families)


def _alike(words: Sequence[str], forms: Mapping[str, list[list[int]]]) -> tuple[str, ...]:
    """The largest group of words with equal token counts in all forms and first tokens of their own."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    seen: dict[tuple[int, ...], set[tuple[int, int]]] = defaultdict(set)
    for word in words:
        counts = tuple(len(form) for form in forms[word])
        firsts = {(which, form[0]) for which, form in enumerate(forms[word])}
        if not firsts & seen[counts]:
            seen[counts] |= firsts
            groups[counts].append(word)
    return tuple(sorted(groups.values(), key=len)[-1]) if groups else ()
