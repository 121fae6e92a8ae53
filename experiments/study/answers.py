"""Judged answers: the columns that every row of a trial table has, and the schema of such a table.

A trial table has one row per prompt, condition and draw. What was done is said in typed columns (`kind`, `latent`,
`layer`, `step`, `draw`, …), which the study adds; labels are made in words and figures only. What does not apply is 0
for a latent, source or target, -1 for a draw, layer or step, and "" for a word. A set of latents is a whole number,
bit k - 1 for latent k.

Knows nothing about how an answer came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from torch import Tensor

from experiments.tasks import COMMON, Problem, Reading

__all__ = ["ANSWER_COLUMNS", "answer_table", "judged", "latents_in", "reading_of", "set_of", "trial_schema"]

ANSWER_COLUMNS: dict[str, pa.DataType] = {
    "prompt_id": pa.string(), "cluster": pa.string(), "template": pa.string(), "operation": pa.string(),
    "answer": pa.float64(), "text": pa.string(), "prediction": pa.float64(), "parsed": pa.bool_(),
    "correct": pa.bool_(),
}  # fmt: skip
"""Columns of `answer_table`. prediction is null where the text holds no number."""


def trial_schema(**columns: pa.DataType) -> pa.Schema:
    """Schema of a trial table: the study's own columns, then those of `answer_table`."""
    return pa.schema([*columns.items(), *ANSWER_COLUMNS.items()])


def judged(
    texts: Sequence[str], answers: Sequence[float] | np.ndarray, reading: Reading = COMMON
) -> dict[str, np.ndarray]:
    """Columns text, prediction (NaN: no number), parsed and correct; a text without a number is wrong.

    Every distinct text is read once, every distinct pair of text and answer judged once.

    Args:
        texts: (row,) what was generated.
        answers: (row,) what is right.
        reading: how answers are read.
    """
    codes, found = pd.factorize(np.array(texts, dtype=object))
    answer_codes, wanted = pd.factorize(np.asarray(answers))
    numbers = [reading.number(text) for text in found]
    pairs, place = np.unique(codes * len(wanted) + answer_codes, return_inverse=True)
    right = [reading.agrees(found[pair // len(wanted)], wanted[pair % len(wanted)]) for pair in pairs]
    return {
        "text": found[codes],
        "prediction": np.array([np.nan if number is None else float(number) for number in numbers])[codes],
        "parsed": np.array([number is not None for number in numbers], dtype=bool)[codes],
        "correct": np.array(right, dtype=bool)[place],
    }


def reading_of(problems: Iterable[Problem]) -> Reading:
    """How the answers to these problems are read: one way for all of them."""
    found = {problem.reading for problem in problems} or {COMMON}
    assert len(found) == 1, "the prompts of one study are read in one way"
    return found.pop()


def answer_table(
    problems: Sequence[Problem], prompt: Sequence[int] | Tensor, texts: Sequence[str], **columns: Any
) -> pd.DataFrame:
    """Rows of a trial table.

    Args:
        problems: the prompts.
        prompt: (row,) index into them.
        texts: (row,) answers.
        **columns: the study's own, scalars or (row,) values.
    """
    asked = [problems[int(i)] for i in prompt]
    answers = np.array([float(problem.answer) for problem in asked])
    frame = {
        "prompt_id": [problem.prompt_id for problem in asked],
        "cluster": [problem.cluster or problem.prompt_id for problem in asked],
        "template": [problem.template for problem in asked],
        "operation": [problem.operation for problem in asked],
        "answer": answers,
        **judged(texts, answers, reading_of(problems)),
    }
    return pd.DataFrame({**columns, **frame}, index=range(len(asked)))


def set_of(latents: Iterable[int]) -> int:
    """A set of latents as a whole number, bit k - 1 for latent k."""
    return sum(1 << (latent - 1) for latent in set(latents))


def latents_in(number: int) -> tuple[int, ...]:
    """The latents of a set, in order; the inverse of `set_of`."""
    return tuple(bit + 1 for bit in range(int(number).bit_length()) if int(number) >> bit & 1)
