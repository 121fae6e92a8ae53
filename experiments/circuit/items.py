"""Ontologies as they are patched: items fitted to a tokenizer, and a pair of clean and corrupted tokens per subtask.

Knows nothing about models beyond their tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, get_args

from circuits.patching import Probe
from experiments.circuit.options import CircuitOptions
from experiments.tasks.alignment import Tokenizer, encode, ids_of
from experiments.tasks.ontology_corruption import Corruption, HopPart, Where, corrupt, corrupt_hop
from experiments.tasks.ontology_pairs import MixingText, mixing_texts
from experiments.tasks.ontology_text import Cut, OntologyItem, generate, sentence_text, surface
from experiments.tasks.ontology_words import LEXICONS, Lexicon, fit

__all__ = ["HOP_PARTS", "Ontologies", "Subtask", "hop_probe", "make_ontologies", "subtasks"]

HOP_PARTS: tuple[HopPart, ...] = get_args(HopPart)
REFERENCE_TEXTS = 8
"""Texts of false ontologies that silenced heads take their means from."""
HOP = 5
"""Cut point of a 1-hop item at which its only rule is applied."""


@dataclass(frozen=True)
class Ontologies:
    """The items of a run and the words that corruptions are taken from.

    Attributes:
        items: that heads are chosen on and texts are traced on.
        lexicon: of their words.
        held_out: others of the same words, on which chosen heads are tried.
        unseen: of the words of another lexicon.
        reference: of real words in wrong relations: what silenced heads say is their mean over these.
        one_hop: as many as `items` of one hop, which isolate the step of inference.
        mixing: texts whose pairs of words probes learn from, and those that they are tried on.
    """

    items: tuple[OntologyItem, ...]
    lexicon: Lexicon
    held_out: tuple[OntologyItem, ...] = ()
    unseen: tuple[OntologyItem, ...] = ()
    reference: tuple[OntologyItem, ...] = ()
    one_hop: tuple[OntologyItem, ...] = ()
    mixing: tuple[tuple[MixingText, ...], tuple[MixingText, ...]] = ((), ())

    def record(self) -> dict[str, str | int]:
        """Hash and size, for the manifest."""
        others = (self.held_out, self.unseen, self.reference, self.one_hop)
        text = json.dumps(
            [[item.text for item in part] for part in (self.items, *others)]
            + [[one.text for one in part] for part in self.mixing]
        )
        return {"items": hashlib.sha256(text.encode()).hexdigest(), "n_items": len(self.items)}

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per item."""
        return [
            {
                "side": "evaluation", "id": item.item_id, "question": item.prompt, "answer": item.answer,
                "steps": [sentence_text(sentence) for sentence in item.ontology.chain], "cluster": "",
            }
            for item in self.items
        ]  # fmt: skip

    def about(self) -> str:
        """Their number in words."""
        return f"{len(self.items)} ontologies"


@dataclass(frozen=True)
class Subtask:
    """The prediction of one word of the gold chain.

    Attributes:
        number: of the cut point.
        kind: "decision", "copy", "induction" or "answer".
        probe: clean and corrupted tokens up to the word, and the first tokens of both words.
    """

    number: int
    kind: str
    probe: Probe


def make_ontologies(options: CircuitOptions, tokenizer: Tokenizer) -> Ontologies:
    """The items that the options ask for, of words that the tokenizer treats alike; those of parts that are not asked
    for are not made."""
    what = set(options.what)
    lexicon = fit(LEXICONS[options.lexicon], tokenizer)

    def made(n: int, words: Lexicon, seed: int | str, hops: int = options.hops) -> tuple[OntologyItem, ...]:
        return tuple(
            generate(
                n, words, hops, seed, options.order, options.distractors, demonstrations=options.demonstrations
            )
        )  # fmt: skip

    def fitted(name: str) -> Lexicon:
        return lexicon if name == options.lexicon else fit(LEXICONS[name], tokenizer)

    silenced = bool(what & {"knockout", "writers"})
    other = "training" if options.lexicon == "unseen" else "unseen"
    texts: tuple[tuple[MixingText, ...], tuple[MixingText, ...]] = ((), ())
    if "mixing" in what:
        first, second = (fitted(name) for name in ("training", "unseen"))
        n = options.mixing_texts
        texts = (tuple(mixing_texts(n, first, options.seed)), tuple(mixing_texts(n // 2, second, options.seed)))
    return Ontologies(
        items=made(options.limit, lexicon, options.seed),
        lexicon=lexicon,
        held_out=made(options.held_out, lexicon, f"{options.seed}-held-out") if silenced else (),
        unseen=made(options.held_out, fitted(other), f"{options.seed}-unseen") if "knockout" in what else (),
        reference=made(REFERENCE_TEXTS, fitted("false"), f"{options.seed}-reference") if silenced else (),
        one_hop=made(options.limit, lexicon, f"{options.seed}-one-hop", 1) if "knockout" in what else (),
        mixing=texts,
    )


def subtasks(item: OntologyItem, lexicon: Lexicon, tokenizer: Tokenizer, where: Where) -> list[Subtask]:
    """The subtasks of an item that have an aligned corruption; the others are left out."""
    clean = encode(tokenizer, item.text, special_tokens=True)
    found = []
    for cut in item.cuts:
        try:
            corruption = corrupt(item, cut.number, where, lexicon, tokenizer=tokenizer)
        except ValueError:  # no mention there, or no word that is aligned: the table says how many are left
            continue
        corrupted = encode(tokenizer, corruption.text, special_tokens=True)
        before, target = clean.predicted(cut.span)
        other = ids_of(tokenizer)(" " + _other_word(item, cut, corruption))[0]
        probe = Probe(clean.ids[: before + 1], corrupted.ids[: before + 1], target, other)
        found.append(Subtask(cut.number, cut.kind, probe))
    return found


def hop_probe(item: OntologyItem, part: HopPart, lexicon: Lexicon, tokenizer: Tokenizer) -> Probe:
    """The step of inference of a 1-hop item, and the same where one of its premises is another one.

    Raises:
        ValueError: no word that is aligned.
    """
    corruption = corrupt_hop(item, part, lexicon, tokenizer=tokenizer)
    clean = encode(tokenizer, item.text, special_tokens=True)
    corrupted = encode(tokenizer, corruption.text, special_tokens=True)
    before, target = clean.predicted(item.cut(HOP).span)
    other = ids_of(tokenizer)(" " + surface(corruption.new))[0]
    return Probe(clean.ids[: before + 1], corrupted.ids[: before + 1], target, other)


def _other_word(item: OntologyItem, cut: Cut, corruption: Corruption) -> str:
    """What the corrupted text asks for at the cut point, as it would be written there."""
    if cut.word is None:
        return str(not item.ontology.answer)
    there = next(mention for mention in item.mentions if mention.span == cut.span)
    return surface(corruption.new, there.plural, there.capital)
