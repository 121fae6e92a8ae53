"""From an item to what a language model reads: instruction, solved examples before it, its form of text.

    reader = Reader(model, examples, instruction)
    reader.text(item)                                   # the prompt
    reader.answered(item, "Mary")                       # the prompt with an answer behind it

The form is the item's own where it has one, else the model's (lm/chat.py). In the chat template the answer follows
without a blank, otherwise as the item says. An instruction stands behind the question, except where the text is one to
be gone on with (form "plain" of the item itself). Knows nothing about vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.tasks.items import Item
from experiments.tasks.restricted import first_tokens

if TYPE_CHECKING:
    from lm.model import LanguageModel
    from lm.terms import TextForm
    from lm.text import EncodedBatch

__all__ = ["Reader", "answer_tokens", "in_form"]


def in_form(model: LanguageModel, form: TextForm | None) -> LanguageModel:
    """The same model, whose requests become texts in another form; None: the model itself."""
    if form is None or form == model.form:
        return model
    other = copy.copy(model)
    other.form = form
    return other


@dataclass(frozen=True)
class Reader:
    """How the items of one task are put to a model.

    Attributes:
        model: in the form of the items (`Reader.of`).
        examples: solved items before every one.
        instruction: stands behind every question, after a blank; "": nothing.
    """

    model: LanguageModel
    examples: tuple[Item, ...] = ()
    instruction: str = ""

    @classmethod
    def of(
        cls, model: LanguageModel, items: Sequence[Item], examples: Sequence[Item] = (), instruction: str = ""
    ) -> Reader:
        """For items that all have one form.

        Raises:
            ValueError: items of several forms, or none.
        """
        forms = {item.form for item in (*items, *examples)}
        if len(forms) != 1:
            raise ValueError(f"items of one form are needed, got {len(forms)}")
        (form,) = forms
        return cls(in_form(model, form), tuple(examples), "" if form == "plain" else instruction.strip())

    @property
    def form(self) -> TextForm:
        """In which texts are written."""
        return self.model.form

    def before(self, item: Item) -> str:
        """What stands between a prompt and its answer."""
        return "" if self.form == "chat" else item.before

    def text(self, item: Item) -> str:
        """The prompt."""
        solved = [f"{self._asked(one)}{one.before}{one.answer}" for one in self.examples]
        return self.model.text_of("\n\n".join([*solved, self._asked(item)]))

    def answered(self, item: Item, answer: str) -> str:
        """The prompt with an answer, whose last token is the text's last."""
        return f"{self.text(item)}{self.before(item)}{answer}"

    def encode(self, items: Sequence[Item]) -> EncodedBatch:
        """The prompts as a left-padded batch.

        Raises:
            ValueError: a prompt that is longer than the model has positions.
        """
        batch = self.model.encode([self.text(item) for item in items])
        self.model.check_length(int(batch.lengths.max()))
        return batch

    def _asked(self, item: Item) -> str:
        return f"{item.question} {self.instruction}" if self.instruction else item.question


def answer_tokens(reader: Reader, item: Item, answers: Sequence[str]) -> dict[str, int]:
    """First token of every answer that is compared, behind this item's prompt.

    Args:
        reader: of the item.
        item: whose answer is among them.
        answers: at least two.

    Raises:
        ValueError: two answers share their first token with this tokenizer (which two, and of which item).
    """
    try:
        return first_tokens(answers, reader.model.tokenizer, reader.before(item))
    except ValueError as error:
        raise ValueError(f"{item.prompt_id}: {error}") from None
