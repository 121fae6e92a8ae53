"""Texts as token ids: batches that are padded on the left, so that the last column is every row's last token.

Knows tokenizers and nothing about models. Axes and units are those of `lm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm.characters import half_character
from lm.errors import UserError

__all__ = ["EncodedBatch", "Rows", "encode", "left_padded", "to_text"]

Rows = Tensor | Sequence[int]


@dataclass(frozen=True)
class EncodedBatch:
    """Texts as token ids, left padded.

    Attributes:
        input_ids: (batch, position) int64.
        attention_mask: (batch, position) bool, True at real tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """(batch,) number of real tokens."""
        return self.attention_mask.sum(dim=1)

    @property
    def positions(self) -> Tensor:
        """(batch, position) position ids: 0, 1, … from the first real token on, 0 at padding."""
        return (self.attention_mask.bool().cumsum(dim=1) - 1).clamp(min=0)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Rows) -> EncodedBatch:
        """The given rows, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.input_ids.device)
        return EncodedBatch(self.input_ids[index], self.attention_mask[index])

    def to(self, device: str | torch.device) -> EncodedBatch:
        """The batch on another device."""
        return EncodedBatch(self.input_ids.to(device), self.attention_mask.to(device))

    def parts(self, batch_size: int) -> Iterator[tuple[Tensor, EncodedBatch]]:
        """Smaller batches of rows of similar length, no wider than they need to be, shortest first.

        Yields:
            (row,) rows of this batch; these rows as a batch.

        Raises:
            ValueError: batch_size below 1.
        """
        if isinstance(batch_size, bool) or batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        order = self.lengths.sort(stable=True).indices
        for start in range(0, len(self), batch_size):
            rows = order[start : start + batch_size]
            part = self.select(rows)
            width = int(part.lengths.max())
            yield rows, EncodedBatch(part.input_ids[:, -width:], part.attention_mask[:, -width:])


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> EncodedBatch:
    """Rows of token ids as a batch on the CPU."""
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        if len(row):
            input_ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = True
    return EncodedBatch(input_ids, mask)


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    pad_id: int,
    after: Sequence[int] = (),
    what: str = "text",
    control: Mapping[str, int] | None = None,
    special: bool = True,
) -> EncodedBatch:
    """Texts as a left-padded batch on the CPU.

    Args:
        tokenizer: of Hugging Face.
        texts: used as they are.
        pad_id: what stands at padding; never seen.
        after: token ids that follow every text.
        what: what a text is called in messages.
        control: texts of tokens (with their ids) that are plain text where a person has written them; None: the
            tokenizer reads them as the tokens.
        special: whether the tokenizer adds its own special tokens, as it is configured to.

    Raises:
        ValueError: no texts, a text that is not a string or holds half a character, one without any token, or one with
            the text of a control token that the tokenizer cannot read as plain text.
    """
    if isinstance(texts, str):
        raise UserError(f"encode takes a list of {what}s, got one string: put it in a list")
    if not texts:
        raise UserError(f"encode needs at least one {what}, got none")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"a {what} must be a string, got {type(text).__name__}")
        if half := half_character(text):
            raise UserError(
                f"{what} {number} holds half a character ({half}, a lone surrogate): write the whole character, or "
                "leave it out"
            )
    rows = [[*ids, *after] for ids in tokenizer(list(texts), add_special_tokens=special)["input_ids"]]
    for index, text in enumerate(texts):
        if control and any(name in text for name in control):
            rows[index] = [*_as_plain_text(tokenizer, text, control, f"{what} {index + 1}"), *after]
    if any(len(row) == 0 for row in rows):
        raise UserError(f"a {what} must have at least one token, got an empty one")
    return left_padded(rows, pad_id)


def _as_plain_text(tokenizer: Any, text: str, control: Mapping[str, int], what: str) -> list[int]:
    """Token ids of a text in which control tokens are written out, read as the characters that they are."""
    bare = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    left = [name for name, i in control.items() if i in bare]
    if left:
        raise UserError(
            f"{what} holds {left[0]!r}, which this tokenizer can only read as the control token: leave it out, or load "
            "the model with control_text='published'"
        )
    return list(tokenizer(text, split_special_tokens=True)["input_ids"])


def to_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of token ids; special tokens and ids that the tokenizer does not know are left out."""
    known = [token for token in tokens if token < len(tokenizer)]
    return str(tokenizer.decode(known, skip_special_tokens=True))
