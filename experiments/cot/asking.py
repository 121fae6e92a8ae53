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
from experiments.cot.vectors import vectors_of
from experiments.cot.writing import Steering, likelihoods, positions_of, write
from experiments.study.parts import Workbench
from experiments.tasks.alignment import ids_of
from experiments.tasks.item_sets import family_of
from experiments.tasks.items import Item
from experiments.tasks.letters import is_right, likelihood_choice
from lm.terms import EditPositions

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
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for given in conditions:
        for family in dict.fromkeys(family_of(item.task) for item in items) if given["vector"] == "held-out" else ("",):
            groups.setdefault((given["prompt"], given["way"], family), []).append(given)
    frames = []
    with bench.bar(len(items) * len(conditions), "answer", what) as advance:
        for (prompt, way, family), chosen in groups.items():
            own = [item for item in items if family in ("", family_of(item.task))]
            frames.append(_asked(bench, own, prompt, way, family, chosen, asking, advance))
    return pd.concat(frames, ignore_index=True)


def _asked(
    bench: Workbench, items: Sequence[Item], prompt: str, way: str, family: str,
    conditions: Sequence[Mapping[str, Any]], asking: Asking, advance: Callable[[int], object],
) -> pd.DataFrame:  # fmt: skip
    """Questions under conditions with one sentence, one way of steering and (held-out vectors) one family."""
    model = bench.model
    texts = [model.text_of(request(item, asking.sentence(prompt))) for item in items]
    positions = positions_of(way, asking.continuous_tokens, asking.single_tokens)
    steerings = [_steering(bench, given, family, asking) for given in conditions]

    def seen(number: int) -> None:
        advance(number)
        bench.advance(number)

    written = write(model, texts, steerings, positions, asking.max_new_tokens, batch_size=asking.batch_size, seen=seen)
    frames = []
    for given, steering, answers in zip(conditions, steerings, written, strict=True):
        table = trial_rows(
            items, [one.text for one in answers], [one.tokens for one in answers], [one.finished for one in answers],
            [given] * len(items),
        )  # fmt: skip
        if asking.score != "text":
            _by_likelihood(bench, items, texts, steering, positions, asking, table)
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def _steering(bench: Workbench, given: Mapping[str, Any], family: str, asking: Asking) -> Steering:
    """What a condition adds."""
    if not given["way"]:
        return Steering()
    vectors = bench.once(vectors_of, asking.folder)
    vector = vectors.of(given["vector"], given["draw"], family, asking.seed)
    return Steering(given["layer"], vector, given["coefficient"])


def _by_likelihood(
    bench: Workbench, items: Sequence[Item], texts: Sequence[str], steering: Steering, positions: EditPositions,
    asking: Asking, table: pd.DataFrame,
) -> None:  # fmt: skip
    """Put the likeliest choice in place of the one in the text, for questions with lettered choices.

    Letters are compared as in the harness's mmlu, choices per character of their text as in arc_challenge (acc_norm).
    """
    model = bench.model
    ids = ids_of(model.tokenizer)
    of_texts = asking.score == "choices"
    asked = [i for i, item in enumerate(items) if item.kind == "letter" and (item.texts or not of_texts)]
    if not asked:
        return
    options = {i: items[i].texts if of_texts else items[i].choices for i in asked}
    places = [(i, option) for i in asked for option in options[i]]
    continued = [list(ids(items[i].before + option)) for i, option in places]
    found = likelihoods(
        model, [texts[i] for i, _ in places], continued, steering, positions, batch_size=asking.batch_size
    )
    scores: dict[int, list[float]] = {}
    for (i, _), value in zip(places, found, strict=True):
        scores.setdefault(i, []).append(value)
    for i, values in scores.items():
        item = items[i]
        letter = item.choices[likelihood_choice(values, options[i], normalised=of_texts)]
        right = is_right(letter, choice_problem(item)) if item.texts else letter in (item.answer, *item.accepted)
        table.loc[i, "prediction"] = letter
        table.loc[i, ["parsed", "correct"]] = True, right
