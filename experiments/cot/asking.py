"""Rows of a trial table: questions under conditions, asked in common batches, and what came of them.

A condition says which sentence stands behind the question, which vector is added, how, where and how much
(measures.CONDITION). Every question is asked once per condition and draw, greedily.

Knows nothing about which conditions a study wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.cot.answers import choice_problem
from experiments.cot.measures import request, trial_rows
from experiments.cot.options import ContinuousTokens, Scoring, SingleTokens, SteeringOptions
from experiments.cot.vectors import Vectors, vectors_of
from experiments.cot.writing import Steering, likelihoods, write
from experiments.study.parts import Workbench
from experiments.tasks.alignment import ids_of
from experiments.tasks.item_sets import family_of
from experiments.tasks.items import Item
from experiments.tasks.letters import is_right, likelihood_choice

__all__ = ["UNSTEERED", "Asking", "ask", "condition"]


def condition(
    prompt: str, way: str = "", vector: str = "", layer: int = -1, coefficient: float = 0.0
) -> dict[str, Any]:
    """A condition with every column of CONDITION, for selecting as well."""
    return {"prompt": prompt, "way": way, "vector": vector, "layer": layer, "coefficient": coefficient}


UNSTEERED = {prompt: condition(prompt) for prompt in ("neutral", "direct", "steps")}


@dataclass(frozen=True)
class Asking:
    """How questions are asked: plain values, the same for all conditions of a study.

    Attributes:
        folder: of the vectors; "" where nothing is steered.
        seed: of random vectors.
    Others as in the options.
    """

    steps_text: str
    direct_text: str
    max_new_tokens: int
    continuous_tokens: ContinuousTokens
    single_tokens: SingleTokens
    score: Scoring
    folder: str
    seed: int
    batch_size: int

    @classmethod
    def of(cls, options: SteeringOptions, seed: int, batch_size: int) -> Asking:
        """As the options say."""
        return cls(
            options.steps_text, options.direct_text, options.max_new_tokens, options.continuous_tokens,
            options.single_tokens, options.score, str(options.vectors), seed, batch_size,
        )  # fmt: skip

    def sentence(self, prompt: str) -> str:
        """What stands behind the question."""
        return {"neutral": "", "steps": self.steps_text, "direct": self.direct_text}[prompt]

    def steering(self, given: Mapping[str, Any], item: Item, vectors: Vectors) -> Steering:
        """How a condition steers a question."""
        if not given["way"]:
            return Steering()
        layer = given["layer"]
        vector = vectors.of(given["vector"], given["draw"], family_of(item.task), self.seed)[layer]
        if given["way"] == "continuous":
            return Steering.continuous(layer, vector, given["coefficient"], self.continuous_tokens)
        return Steering.single(layer, vector, given["coefficient"], self.single_tokens)


def ask(
    bench: Workbench,
    items: Sequence[Item],
    conditions: Sequence[Mapping[str, Any]],
    asking: Asking,
    what: str = "asking",
) -> pd.DataFrame:
    """Every question under every condition.

    Args:
        bench: with the model.
        items: questions.
        conditions: of `condition`, with draw (-1: none).
        asking: how.
        what: for the progress bar.
    """
    model = bench.model
    steered = any(one["way"] for one in conditions)
    vectors = bench.once(vectors_of, asking.folder) if steered else None
    pairs = [(item, given) for given in conditions for item in items]
    texts = [model.text_of(request(item, asking.sentence(given["prompt"]))) for item, given in pairs]
    rows = [Steering() if vectors is None else asking.steering(given, item, vectors) for item, given in pairs]

    with bench.bar(len(pairs), "answer", what) as advance:
        found = write(
            model, texts, rows, asking.max_new_tokens, batch_size=asking.batch_size, seen=_both(advance, bench.advance)
        )
    table = trial_rows(
        [item for item, _ in pairs], found.texts, list(map(len, found.tokens)), found.finished,
        [given for _, given in pairs],
    )  # fmt: skip
    if asking.score != "text":
        _by_likelihood(bench, [item for item, _ in pairs], texts, rows, asking, table)
    return table


def _both(*functions: Callable[[int], object]) -> Callable[[int], object]:
    def call(number: int) -> None:
        for function in functions:
            function(number)

    return call


def _by_likelihood(
    bench: Workbench, items: Sequence[Item], texts: Sequence[str], rows: Sequence[Steering], asking: Asking,
    table: pd.DataFrame,
) -> None:  # fmt: skip
    """Put the likeliest choice in place of the one in the text, for questions with lettered choices.

    Letters are compared as in the harness's mmlu, choices per character of their text as in arc_challenge (acc_norm).
    """
    model = bench.model
    ids = ids_of(model.tokenizer)
    of_texts = asking.score == "choices"
    asked = [i for i, item in enumerate(items) if item.kind == "letter" and (item.texts or not of_texts)]
    options = {i: items[i].texts if of_texts else items[i].choices for i in asked}
    places = [(i, option) for i in asked for option in options[i]]
    continued = [list(ids(items[i].before + option)) for i, option in places]
    found = likelihoods(
        model, [texts[i] for i, _ in places], continued, [rows[i] for i, _ in places], batch_size=asking.batch_size
    )
    scores: dict[int, list[float]] = {}
    for (i, _), value in zip(places, found, strict=True):
        scores.setdefault(i, []).append(value)
    for i, values in scores.items():
        item = items[i]
        letter = item.choices[likelihood_choice(values, options[i], normalised=of_texts)]
        right = is_right(letter, choice_problem(item)) if item.texts else letter in (item.answer, *item.accepted)
        table.loc[i, ["prediction", "parsed", "correct"]] = [letter, True, right]
