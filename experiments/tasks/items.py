"""Items of ordinary language models: a question or beginning, its answer in words, and what else may be answered.

Every generator and reader of tasks for language models is turned into these, so that studies know one kind. Items come
in three parts that share nothing (checked): derivation, for vectors; validation, to choose a layer and a coefficient;
test, to report.

Knows nothing about models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from experiments.tasks.answers import COMMON, Reading
from lm.terms import TextForm

__all__ = ["AnswerKind", "Item", "ItemSplits", "items_digest"]

AnswerKind: TypeAlias = Literal["word", "number", "letter"]


@dataclass(frozen=True)
class Item:
    """One thing to be answered.

    Attributes:
        prompt_id: unique within its task.
        task: "indirect-objects-A", "babi-15", "gsm8k", …
        question: the request, without instruction; where `form` is "plain", the text to go on with.
        answer: the right answer as it is written.
        kind: how an answer is judged: a word, a number (number grammar), or the letter of a choice.
        choices: answers that are compared in restricted choice, the right one among them; empty: open.
        cluster: items with the same value are not independent; "": independent.
        chain: sentences of the written chain of thought; empty if unknown.
        form: of the text whatever the model's own form is; None: the model's.
        before: what stands between text and answer, as the model would write it.
        accepted: further answers that are right, where a source gives several.
        texts: of kind "letter": what the lettered choices A, B, … say, as the question has them; empty if unknown.
        reading: of kind "number": how the answer is read from a text.
    """

    prompt_id: str
    task: str
    question: str
    answer: str
    kind: AnswerKind = "word"
    choices: tuple[str, ...] = ()
    cluster: str = ""
    chain: tuple[str, ...] = ()
    form: TextForm | None = None
    before: str = " "
    accepted: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    reading: Reading = field(default=COMMON, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"{self.prompt_id}: the answer {self.answer!r} is none of its choices")


def items_digest(items: Sequence[Item]) -> str:
    """SHA-256 over ids, questions, answers and clusters, in order."""
    text = json.dumps([[i.prompt_id, i.task, i.question, i.answer, i.cluster] for i in items])
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ItemSplits:
    """Items for vectors, for choosing, and for reporting; no question and no cluster is in two of them.

    Raises:
        ValueError: one is.
    """

    derivation: tuple[Item, ...] = ()
    validation: tuple[Item, ...] = ()
    test: tuple[Item, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[tuple[str, str], tuple[str, str]] = {}
        for name, items in self.parts.items():
            for item in items:
                traits = [("question", " ".join(item.question.split()))]
                if item.cluster:
                    traits.append(("cluster", item.cluster))
                for trait in traits:
                    where, other = seen.setdefault(trait, (name, item.prompt_id))
                    if where != name:
                        raise ValueError(
                            f"{name} item {item.prompt_id!r} and {where} item {other!r} share their {trait[0]}"
                        )

    @property
    def parts(self) -> dict[str, tuple[Item, ...]]:
        """The three by name."""
        return {"derivation": self.derivation, "validation": self.validation, "test": self.test}

    def read_by(self, reading: Reading) -> ItemSplits:
        """The same items, whose numbers are read from texts in this way."""
        if reading == COMMON:
            return self
        return ItemSplits(
            **{name: tuple(replace(item, reading=reading) for item in items) for name, items in self.parts.items()}
        )

    def record(self) -> dict[str, str | int]:
        """Hashes and sizes, for the manifest."""
        found: dict[str, str | int] = {}
        for name, items in self.parts.items():
            found[name] = items_digest(items)
            found[f"{name}_items"] = len(items)
        return found

    def records(self) -> list[dict[str, Any]]:
        """One JSON record per item."""
        return [
            {
                "side": side, "id": i.prompt_id, "task": i.task, "question": i.question, "answer": i.answer,
                "steps": list(i.chain), "cluster": i.cluster,
            }
            for side, items in self.parts.items()
            for i in items
        ]  # fmt: skip

    def about(self) -> str:
        """Sizes in words."""
        return ", ".join(f"{len(items)} {name}" for name, items in self.parts.items() if items) + " items"
