"""From a generated text to a letter, a number or a text, by the rules of lm-evaluation-harness 0.4.9.

    function            task of the harness and its filter
    flexible_letter     mmlu_flan_cot_zeroshot, "flexible-extract"
    strict_letter       mmlu_flan_cot_zeroshot, "strict-match"
    generated_letter    mmlu_generative (whole first line), arc_challenge_chat (whole text up to the first full stop)
    flexible_number     gsm8k, gsm8k_cot_zeroshot, "flexible-extract"
    strict_number       gsm8k, "strict-match" ("####")
    exact_text          bigbench_*_generate_until (exact match without punctuation)

Same answers on the same texts is the aim: oddities are kept and named. A generation must have been stopped as the
harness stops it ("Q:" after chains, a line end for mmlu_generative, "." for arc_challenge_chat) where that matters. No
answer is None, which is wrong, where the harness writes "[invalid]".

`likelihood_choice` is its accuracy for multiple_choice tasks (acc and acc_norm).

Knows nothing about models. Source of the rules: github.com/EleutherAI/lm-evaluation-harness (MIT), task definitions and
lm_eval/filters; the code is this project's own.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np

from experiments.tasks.choices import ChoiceProblem

__all__ = [
    "exact_text", "flexible_letter", "flexible_number", "generated_letter", "is_right", "is_right_number",
    "likelihood_choice", "strict_letter", "strict_number",
]  # fmt: skip

_BRACKETED = re.compile(r"\([A-Z]\)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_LEADS = ("The answer is ", "answer is ", "The answer: ", "The final answer: ")


def flexible_letter(text: str, problem: ChoiceProblem) -> str | None:
    """The last "(X)" of the text; without one the last choice that is quoted word for word (case and punctuation do not
    count); without that the last letter after a colon.

    As in the harness a bracketed letter counts although it labels no choice (then it is wrong), and where several
    choices begin at one place the first of the question counts, also if a later one is longer.

    Returns:
        The letter, or None.
    """
    bracketed = _BRACKETED.findall(text)
    if bracketed:
        return str(bracketed[-1][1])
    plain = _plain(text)
    quoted = [(_plain(choice.strip()), letter) for letter, choice in zip(problem.letters, problem.choices, strict=True)]
    found = re.findall("|".join(re.escape(choice) for choice, _ in quoted), plain)
    if found and found[-1]:
        return dict(quoted).get(found[-1].strip())  # of choices that read the same the last label counts
    after = re.findall(rf":\s*([{problem.letters}])", text)
    return str(after[-1]) if after else None


def strict_letter(text: str, problem: ChoiceProblem) -> str | None:
    """The first thing after "answer is ", "The answer: " or "The final answer: ", up to the line's last character.

    The harness leaves out the last character of the line (the full stop) and compares without case and punctuation with
    "(A)", so that "the answer is (B)." is B and "the answer is B, I think." is nothing.
    """
    for place in sorted({found.end() for lead in _LEADS for found in re.finditer(re.escape(lead), text)}):
        rest = text[place:].split("\n", 1)[0]
        if rest:
            return _letter(rest[:-1], problem)
    return None


def generated_letter(
    text: str, problem: ChoiceProblem, task: Literal["mmlu_generative", "arc_challenge_chat"] = "mmlu_generative"
) -> str | None:
    """The whole answer, if it is a letter and nothing else.

    Args:
        text: generated after "Answer:" (mmlu_generative: its first line counts) or after "The best answer is"
            (arc_challenge_chat: what stands before the first full stop or blank line counts).
        problem: with choices.
        task: of the harness.
    """
    if task == "mmlu_generative":
        return _letter(text.split("\n", 1)[0], problem)
    if task != "arc_challenge_chat":
        raise ValueError(f"task must be mmlu_generative or arc_challenge_chat, got {task!r}")
    return _letter(re.split(r"\n\n|\.", text, maxsplit=1)[0], problem)


def flexible_number(text: str) -> str | None:
    """The last number as the harness compares it: without commas, dollar signs and a full stop at its end.

    Two or more of the signs 0-9 $ . , in a row count as a number, also if there is no figure among them ("...").
    """
    found = _NUMBER.findall(text)
    return _compared(found[-1].strip()) if found else None


def strict_number(text: str) -> str | None:
    """The number after the first "#### ", as the harness compares it."""
    found = _MARKED.findall(text)
    return _compared(found[0].strip()) if found else None


def exact_text(text: str, answers: Sequence[str]) -> bool:
    """Whether a text equals one of the answers without punctuation (ASCII, as in the harness); case counts."""
    table = str.maketrans("", "", string.punctuation)
    return any(text.translate(table) == answer.translate(table) for answer in answers)


def is_right_number(found: str | None, answer: str | int | float) -> bool:
    """Whether a number, as `flexible_number` or `strict_number` gives it, is the answer, sign by sign ("18.0" is not
    "18"); of a GSM8K answer text what follows "#### " counts."""
    return found is not None and found == _compared(str(answer).rsplit("#### ", 1)[-1])


def is_right(letter: str | None, problem: ChoiceProblem) -> bool:
    """Whether a letter is one of the right labels; None is wrong."""
    return letter is not None and letter in problem.labels


def likelihood_choice(logprobs: Sequence[float], choices: Sequence[str], normalised: bool = False) -> int:
    """Position of the choice that a model finds most likely.

    Args:
        logprobs: sum of the log-probabilities (nats) of each choice's tokens after the prompt.
        choices: the texts that were scored, with the same length.
        normalised: divide by the number of characters (acc_norm) instead of not (acc).

    Raises:
        ValueError: another number of values than of choices, or none.
    """
    if len(logprobs) != len(choices) or not choices:
        raise ValueError(f"one log-probability for each choice is needed, got {len(logprobs)} and {len(choices)}")
    values = np.asarray(logprobs, dtype=np.float64)
    if normalised:
        values = values / np.array([float(len(choice)) for choice in choices])
    return int(np.argmax(values))


def _plain(text: str) -> str:
    """Small letters, no punctuation (any that Unicode calls so)."""
    return "".join(sign for sign in text.lower() if not unicodedata.category(sign).startswith("P"))


def _letter(text: str, problem: ChoiceProblem) -> str | None:
    """The letter that is left when blanks around, then ASCII punctuation are taken away ("( A )" keeps its blanks)."""
    left = text.strip().translate(str.maketrans("", "", string.punctuation)).upper()
    return left if len(left) == 1 and left in problem.letters else None


def _compared(number: str) -> str:
    return re.sub(r"\.$", "", number.replace(",", "").replace("$", "")).lower()
