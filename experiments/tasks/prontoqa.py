"""Reader of PrOntoQA's JSON, and of single sentences of its language.

The published files hold an object: "example1", "example2", … each with "in_context_example0", … and "test_example",
each of which has question, query ("True or false: Sam is not loud."), chain_of_thought (a list of sentences) and answer
("True" or "False"). Articles and "every" are left out of what is read ("Every tumpus is a jompus." becomes "Tumpus is
jompus."), as the circuits studies have it; order, number and negation of every sentence stay.

Knows nothing about models. Source of the format: github.com/asaparov/prontoqa (Saparov and He 2023, arXiv 2210.01240).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.tasks.ontology import Ontology, Sentence, Word
from experiments.tasks.ontology_text import INSTRUCTION, OntologyItem, compose
from experiments.tasks.ontology_words import plural_of

__all__ = ["parse_sentences", "read_prontoqa", "split_sentences"]

_QUERY = "true or false:"
_LEFT_OUT = {"a", "an", "the", "every", "each", "all"}
_SENTENCE = re.compile(r"(?P<subject>[\w-]+) (?P<verb>is|are) (?P<negated>not )?(?P<object>[\w-]+)")


def read_prontoqa(path: str | Path, instruction: str = INSTRUCTION) -> list[OntologyItem]:
    """Items of a file in PrOntoQA's format, with the demonstrations that it gives.

    Args:
        path: JSON file.
        instruction: sentence after every query.

    Returns:
        One item per example; hops are counted from its chain of thought; lexicon "file".

    Raises:
        ValueError: not such a file, or a sentence that is not of the language (which one).
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg} at line {error.lineno})") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object of examples, each with test_example")
    items = []
    for name, example in content.items():
        if not isinstance(example, Mapping) or "test_example" not in example:
            raise ValueError(f"{path}: {name} has no test_example")
        shown = sorted((key for key in example if key.startswith("in_context_example")), key=_number)
        demonstrations = [_ontology(example[key], f"{path}: {name}, {key}") for key in shown]
        question = _ontology(example["test_example"], f"{path}: {name}, test_example")
        items.append(compose(question, demonstrations, instruction, f"{path.stem}-{name}"))
    return items


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, without their full stops."""
    return [part.strip() for part in re.split(r"\.(?:\s+|$)", text) if part.strip()]


def parse_sentences(texts: Iterable[str]) -> list[Sentence | None]:
    """Sentences of one question and its chain, read together because a word is known by its other forms.

    A subject of "are" and a subject that is written with a small letter anywhere else is a concept; a concept in the
    plural is reduced to the singular that occurs elsewhere, or to the regular one.

    Returns:
        One sentence per text; None where it is not of the language.
    """
    parts = [_SENTENCE.fullmatch(" ".join(_stripped(text))) for text in texts]
    nouns = _nouns([part for part in parts if part])
    found: list[Sentence | None] = []
    for part in parts:
        if part is None:
            found.append(None)
            continue
        plural = part["verb"] == "are"
        subject, thing = part["subject"], part["object"].lower()
        noun = nouns.get((subject.lower(), plural))
        first = Word(subject, "entity") if noun is None else Word(noun, "concept")
        noun = nouns.get((thing, plural))
        second = Word(thing, "property") if noun is None else Word(noun, "concept")
        found.append(Sentence(first, second, part["negated"] is not None, plural))
    return found


def _stripped(text: str) -> list[str]:
    words = text.strip().rstrip(".").split()
    if not words:
        return []
    article = words[0].lower() in _LEFT_OUT
    kept = [word for word in words if word.lower() not in _LEFT_OUT]
    # without its article a noun would look like a name: mark it by a small letter
    return [kept[0].lower(), *kept[1:]] if article and kept else kept


def _nouns(parts: Sequence[re.Match[str]]) -> dict[tuple[str, bool], str]:
    """(written form in small letters, plural) -> singular, of every concept."""
    singular: set[str] = set()
    plural: set[str] = set()
    small = {part["object"].lower() for part in parts} | {p["subject"] for p in parts if p["subject"].islower()}
    many = {part["subject"].lower() for part in parts if part["verb"] == "are"}
    for part in parts:
        subject = part["subject"].lower()
        if part["verb"] == "are":
            plural.add(subject)
        elif subject in small or plural_of(subject) in small | many:
            singular.add(subject)
    stems = {form: _singular(form, small | singular) for form in plural}
    singular |= set(stems.values())
    nouns = {(noun, False): noun for noun in singular}
    nouns |= {(plural_of(noun), True): noun for noun in singular}
    nouns |= {(form, True): noun for form, noun in stems.items()}
    return nouns


def _singular(form: str, known: set[str]) -> str:
    tries = [form[:-3] + "y"] if form.endswith("ies") else []
    tries += [form[:-2]] if form.endswith("es") else []
    tries += [form[:-1]] if form.endswith("s") else []
    fitting = [noun for noun in tries if plural_of(noun) == form]
    return next((noun for noun in fitting if noun in known), fitting[0] if fitting else form)


def _number(key: str) -> int:
    digits = re.sub(r"\D", "", key)
    return int(digits) if digits else 0


def _ontology(record: Any, where: str) -> Ontology:
    try:
        question, query, chain, answer = (record[f] for f in ("question", "query", "chain_of_thought", "answer"))
    except (KeyError, TypeError):
        raise ValueError(f"{where}: question, query, chain_of_thought and answer are needed") from None
    if str(answer) not in ("True", "False"):
        raise ValueError(f"{where}: the answer must be True or False, got {answer!r}")
    asked = query.strip()
    asked = asked[len(_QUERY) :] if asked.lower().startswith(_QUERY) else asked
    statements = split_sentences(question)
    texts = [*statements, asked, *chain]
    parsed = parse_sentences(texts)
    for text, sentence in zip(texts, parsed, strict=True):
        if sentence is None:
            raise ValueError(f"{where}: not a sentence of the language: {text!r}")
    sentences = [sentence for sentence in parsed if sentence is not None]
    n = len(statements)
    gold = tuple(sentences[n + 1 :])
    if len(gold) < 3 or len(gold) % 2 == 0:
        raise ValueError(f"{where}: the chain must be a fact, then rules and inferences, got {len(gold)} sentences")
    return Ontology(
        statements=tuple(sentences[:n]),
        query=sentences[n],
        answer=str(answer) == "True",
        chain=gold,
        hops=len(gold) // 2,
        order="ordered",
        distractors="none" if n == len(gold) // 2 + 1 else "irrelevant",
        lexicon="file",
    )
