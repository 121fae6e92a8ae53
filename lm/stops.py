"""Stop strings: texts that end what a model writes as soon as they appear in it.

They are looked for in the decoded text, not among tokens, so it does not matter how a tokenizer cuts them.

Knows tokenizers and nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm.errors import UserError
from lm.text import to_text

__all__ = ["StopStrings"]

_AROUND = 8  # more tokens than a stop string can have: decoders treat the first token of a text specially


class StopStrings:
    """Some texts, any of which ends a row.

    Args:
        tokenizer: of the model.
        strings: the texts.

    Raises:
        ValueError: no tokenizer, one string instead of a list, or an empty text.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(isinstance(text, str) and text for text in strings):
            raise UserError(f"stop must be a list of texts that are not empty, got {strings!r}")
        if tokenizer is None:
            raise UserError("stop strings need a tokenizer, the model was given none")
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        self._reach = max(len(text.encode()) for text in self.strings) + _AROUND  # a token is at least a byte

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the newest of these tokens completes a stop string."""
        tail = to_text(self._tokenizer, tokens[-self._reach :])
        return any(text in tail for text in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((at for stop in self.strings if (at := text.find(stop)) >= 0), default=len(text))]
