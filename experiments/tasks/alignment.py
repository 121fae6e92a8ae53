"""Where words of a text stand in its tokens: the contract between texts and the studies that patch positions.

A tokenizer is either a fast Hugging Face tokenizer or a function from a text to (ids, offsets), offsets being the
(start, end) characters of every token. Words may have several tokens. A word is found by its *first token*, which may
hold the blank before the word but no other character before it; two texts are aligned if they have the same number of
tokens and differ only in the tokens of the words that were exchanged.

Knows nothing about models, ontologies or batches: positions are those of the tokens that `encode` returns, from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Encoded", "Span", "Tokenizer", "check_aligned", "encode", "ids_of", "single_token_words"]

Span: TypeAlias = tuple[int, int]
"""First character and the character after the last."""
Tokenizer: TypeAlias = Any
"""A fast Hugging Face tokenizer, or a function: text -> (ids, offsets)."""


@dataclass(frozen=True)
class Encoded:
    """A text and its tokens.

    Attributes:
        text: the text.
        ids: token ids.
        spans: characters of each token; (0, 0) or any other empty span for tokens that stand for no character.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self, span: Span) -> range:
        """Positions of the tokens that hold a character of a word.

        Raises:
            ValueError: an empty span or one outside the text; no token; a first token that begins before the word by
                more than blanks, or a last one that reaches into the next word.
        """
        start, end = span
        if not 0 <= start < end <= len(self.text):
            raise ValueError(f"a word must lie within the {len(self.text)} characters of the text, got {start}..{end}")
        found = [i for i, (s, e) in enumerate(self.spans) if s < end and e > start]
        if not found:
            raise ValueError(f"no token holds {self.text[start:end]!r} at character {start}")
        if self.text[self.spans[found[0]][0] : start].strip():
            token = self.text[slice(*self.spans[found[0]])]
            raise ValueError(f"the first token of {self.text[start:end]!r} is {token!r}, which begins in another word")
        if self.text[end : self.spans[found[-1]][1]].strip():
            token = self.text[slice(*self.spans[found[-1]])]
            raise ValueError(f"the last token of {self.text[start:end]!r} is {token!r}, which reaches beyond the word")
        return range(found[0], found[-1] + 1)

    def first(self, span: Span) -> int:
        """Position of the first token of a word."""
        return self.positions(span)[0]

    def last(self, span: Span) -> int:
        """Position of the last token of a word."""
        return self.positions(span)[-1]

    def predicted(self, span: Span) -> tuple[int, int]:
        """Where a word is predicted, and what: (position of the token before the word, id of its first token).

        Raises:
            ValueError: see `positions`; or the word is the first token of all, which nothing predicts.
        """
        first = self.first(span)
        if first == 0:
            raise ValueError(f"{self.text[slice(*span)]!r} is the first token of the text: nothing predicts it")
        return first - 1, self.ids[first]

    def prefix(self, span: Span) -> tuple[int, ...]:
        """Ids of the tokens before a word."""
        return self.ids[: self.first(span)]


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool = False) -> Encoded:
    """Tokens of a text with the characters that each of them holds.

    Args:
        tokenizer: fast Hugging Face tokenizer, or a function from a text to (ids, offsets).
        text: not empty.
        special_tokens: let a Hugging Face tokenizer add its own (begin of text); a function decides that itself.

    Raises:
        ValueError: no text; a tokenizer that gives no offsets.
    """
    if not text:
        raise ValueError("the text to be tokenized is empty")
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("the tokenizer gives no character offsets: a fast Hugging Face tokenizer is needed")
        batch = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
        ids, spans = batch["input_ids"], batch["offset_mapping"]
    else:
        answer = tokenizer(text)
        if not (isinstance(answer, tuple) and len(answer) == 2 and len(answer[0]) == len(answer[1])):
            raise ValueError("a tokenizing function must return (ids, offsets) of equal length, got something else")
        ids, spans = answer
    return Encoded(text, tuple(int(i) for i in ids), tuple((int(s), int(e)) for s, e in spans))


def ids_of(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The function from a text to its ids without special tokens.

    Args:
        tokenizer: as in `encode`; a function may also return the ids alone (a list), as nothing here needs offsets.
    """
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return lambda text: [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def ids(text: str) -> list[int]:
        answer = tokenizer(text)
        return [int(i) for i in (answer[0] if isinstance(answer, tuple) else answer)]

    return ids


def single_token_words(words: Iterable[str], tokenizer: Tokenizer, before: str = " ") -> list[str]:
    """The words that are one token of their own when they follow `before`, in order; no two share a token."""
    ids, seen, kept = ids_of(tokenizer), set(), []
    for word in words:
        found = ids(before + word)
        if len(found) == 1 and found[0] not in seen:
            seen.add(found[0])
            kept.append(word)
    return kept


def check_aligned(clean: Encoded, other: Encoded, changed: Sequence[tuple[Span, Span]]) -> None:
    """Refuse two texts that are not aligned token by token.

    Args:
        clean, other: the two texts.
        changed: words that were exchanged: (characters in `clean`, characters in `other`).

    Raises:
        ValueError: another number of tokens, an exchanged word at other positions, or a difference outside the
            exchanged words.
    """
    if len(clean) != len(other):
        raise ValueError(f"the texts have {len(clean)} and {len(other)} tokens: they cannot be aligned by position")
    inside: set[int] = set()
    for before, after in changed:
        here, there = clean.positions(before), other.positions(after)
        if here != there:
            words = f"{clean.text[slice(*before)]!r} and {other.text[slice(*after)]!r}"
            tokens = f"{here.start}..{here.stop - 1} and {there.start}..{there.stop - 1}"
            raise ValueError(f"{words} stand at tokens {tokens}")
        inside.update(here)
    for position, (a, b) in enumerate(zip(clean.ids, other.ids, strict=True)):
        if a != b and position not in inside:
            raise ValueError(f"the texts differ at token {position}, outside the exchanged words")
