"""Ontologies as they are patched: items fitted to a tokenizer, and a pair of clean and corrupted tokens per subtask.

Knows nothing about models beyond their tokenizers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from circuits.patching import Probe
from experiments.circuit.options import CircuitOptions
from experiments.tasks.alignment import Tokenizer, encode, ids_of
from experiments.tasks.ontology_corruption import Corruption, Where, corrupt
from experiments.tasks.ontology_text import Cut, OntologyItem, generate, sentence_text, surface
from experiments.tasks.ontology_words import LEXICONS, Lexicon, fit

__all__ = ["Ontologies", "Subtask", "make_ontologies", "subtasks"]


@dataclass(frozen=True)
class Ontologies:
    """The items of a run and the words that corruptions are taken from."""

    items: tuple[OntologyItem, ...]
    lexicon: Lexicon

    def record(self) -> dict[str, str | int]:
        """Hash and size, for the manifest."""
        text = json.dumps([item.text for item in self.items])
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
    """The items that the options ask for, of words that the tokenizer treats alike."""
    lexicon = fit(LEXICONS[options.lexicon], tokenizer)
    items = generate(
        options.limit, lexicon, options.hops, options.seed, options.order, options.distractors,
        demonstrations=options.demonstrations,
    )  # fmt: skip
    return Ontologies(tuple(items), lexicon)


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


def _other_word(item: OntologyItem, cut: Cut, corruption: Corruption) -> str:
    """What the corrupted text asks for at the cut point, as it would be written there."""
    if cut.word is None:
        return str(not item.ontology.answer)
    there = next(mention for mention in item.mentions if mention.span == cut.span)
    return surface(corruption.new, there.plural, there.capital)
