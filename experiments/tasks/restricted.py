"""Restricted choice: what is compared when only a few answers are allowed.

A model's choice is the answer whose first token has the largest logit after the prompt. Where two answers share their
first token that comparison says nothing: it is refused, or, on request, each answer is known by its shortest beginning
that no other answer has (the choice is then the largest sum of log-probabilities of these beginnings, which needs a
forward pass for each; a single differing token is compared as before).

Knows nothing about models: token ids in, token ids out.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.tasks.alignment import Tokenizer, ids_of

__all__ = ["beginnings", "first_tokens"]


def first_tokens(answers: Sequence[str], tokenizer: Tokenizer, before: str = " ") -> dict[str, int]:
    """First token of every distinct answer.

    Args:
        answers: texts; repeated ones count once.
        tokenizer: see `experiments.tasks.alignment.ids_of`.
        before: what stands between prompt and answer, as the model would write it: a blank after "gave a ring to",
            nothing after "\\n".

    Returns:
        answer -> token id, in the order of `answers`.

    Raises:
        ValueError: fewer than two answers, one without tokens, or two that share their first token (which two).
    """
    found = {answer: tokens[0] for answer, tokens in _tokens(answers, tokenizer, before).items()}
    owner: dict[int, str] = {}
    for answer, token in found.items():
        if token in owner:
            raise ValueError(
                f"answers {owner[token]!r} and {answer!r} share their first token with this tokenizer: choose other "
                "answers, or compare their shortest distinct beginnings (beginnings)"
            )
        owner[token] = answer
    return found


def beginnings(answers: Sequence[str], tokenizer: Tokenizer, before: str = " ") -> dict[str, tuple[int, ...]]:
    """Shortest beginning of every distinct answer that no other answer has.

    Returns:
        answer -> token ids, one id each where all first tokens differ.

    Raises:
        ValueError: fewer than two answers, one without tokens, or one whose tokens begin another answer.
    """
    tokens = _tokens(answers, tokenizer, before)
    found: dict[str, tuple[int, ...]] = {}
    for answer, own in tokens.items():
        others = [other for name, other in tokens.items() if name != answer]
        length = next((k for k in range(1, len(own) + 1) if all(o[:k] != own[:k] for o in others)), None)
        if length is None:
            longer = next(name for name, other in tokens.items() if name != answer and other[: len(own)] == own)
            raise ValueError(f"the tokens of answer {answer!r} begin answer {longer!r}: no beginning tells them apart")
        found[answer] = own[:length]
    return found


def _tokens(answers: Sequence[str], tokenizer: Tokenizer, before: str) -> dict[str, tuple[int, ...]]:
    distinct = dict.fromkeys(answers)
    if len(distinct) < 2:
        raise ValueError(f"a choice needs at least two different answers, got {len(distinct)}")
    ids = ids_of(tokenizer)
    tokens = {answer: tuple(ids(before + answer)) for answer in distinct}
    empty = next((answer for answer, own in tokens.items() if not answer or not own), None)
    if empty is not None:
        raise ValueError(f"answer {empty!r} has no tokens")
    return tokens
