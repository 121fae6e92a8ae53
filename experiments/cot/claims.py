"""The published claims about chain-of-thought vectors, judged on the test questions, all in one family.

    C1   steering without the sentence brings chains: more than no steering, than random, than shuffled vectors
    C2   it competes with the step-by-step sentence: accuracy (and chains) not below it by the margin (non-inferiority)
    C3   continuous steering needs a small coefficient, single a large one: each at its own, against the other's
    C4   −c suppresses chains: without a sentence; with the step-by-step one; there, more than random vectors do
    C5   it works on sets that it was not derived from: more chains than no steering, and than random vectors

Each is a paired change over the same questions with an interval that holds for all of them together. Where several
random or shuffled vectors were drawn, the one that comes closest to the vector counts, so "held" means beyond each of
them; with few draws that says little about random vectors in general. What has no room to show is not testable: a loss
of chains where there are none, a gain where every answer has one.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd

from experiments.cot.asking import UNSTEERED, condition
from experiments.cot.measures import CONDITION
from experiments.statistics.clusters import Settings
from experiments.study.claims import ClaimsTable
from experiments.study.verdicts import Question, judged_together, no_room

__all__ = ["CLAIMS_SIZE", "Chosen", "claims_of"]

CLAIMS_SIZE = 0.05
"""A change of the rate of chains that must have room for a claim to be testable, a fraction."""
_BY = (*CONDITION, "draw")


class Chosen(Protocol):
    """What claims need to know of a plan."""

    @property
    def chosen(self) -> Mapping[str, tuple[int, float]]: ...
    @property
    def margin(self) -> float: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def held_out(self) -> bool: ...
    @property
    def shuffles(self) -> int: ...
    @property
    def draws(self) -> int: ...


class _Table:
    """Outcomes of every question in every condition and draw: (question,) arrays, in the order of `clusters`."""

    def __init__(self, trials: pd.DataFrame) -> None:
        questions = trials.drop_duplicates("prompt_id").sort_values(["cluster", "prompt_id"])
        self.clusters = questions["cluster"].astype(str).to_numpy()
        place = {name: i for i, name in enumerate(questions["prompt_id"].astype(str))}
        row = trials["prompt_id"].astype(str).map(place).to_numpy()
        self._values: dict[tuple[Any, ...], dict[str, np.ndarray]] = {}
        for key, index in trials.groupby([*_BY], observed=True).indices.items():
            assert len(index) == len(place), f"{key}: {len(index)} answers to {len(place)} questions"
            order = np.argsort(row[index])
            self._values[tuple(key)] = {  # type: ignore[arg-type]
                name: trials[name].to_numpy(float)[index][order] for name in ("chain", "correct")
            }  # fmt: skip

    def of(self, outcome: str, given: Mapping[str, Any], draw: int = -1) -> np.ndarray:
        """(question,)."""
        return self._values[(*(given[name] for name in CONDITION), draw)][outcome]

    def strongest(self, outcome: str, given: Mapping[str, Any], highest: bool = True) -> np.ndarray:
        """(question,) of the draw with the highest (lowest) mean."""
        own = tuple(given[name] for name in CONDITION)
        found = [values[outcome] for key, values in self._values.items() if key[:-1] == own]
        assert found, f"the trials have no {given}"
        return max(found, key=lambda values: values.mean() if highest else -values.mean())


def claims_of(plan: Chosen, trials: pd.DataFrame) -> ClaimsTable:
    """C1 to C5, for each way of steering.

    Args:
        plan: chosen cells, margin, settings, and which controls there are.
        trials: of `codi cot eval`.
    """
    table = _Table(trials)
    questions: list[Question] = []
    for way in plan.chosen:
        for make in (_brings_chains, _competes, _coefficients, _suppresses, _carries_over):
            questions += make(plan, table, way)
    return ClaimsTable(judged_together(questions, table.clusters, plan.settings))


def _change(name: str, statement: str, measured: str, after: np.ndarray, before: np.ndarray, **how: Any) -> Question:
    """A paired change of a share."""
    level = float(np.mean(before))
    how.setdefault("room", (-level, 1 - level))
    return Question(name, statement, measured, after - before, bounds=(-1.0, 1.0), **how)


def _nothing(name: str, statement: str, measured: str, why: str) -> Question:
    """A claim about which this run can say nothing."""
    return Question(name, statement, measured, np.empty(0), above=0.0, blocked=why)


def _vector(plan: Chosen, way: str, kind: str = "all", sign: float = 1.0, prompt: str = "neutral") -> dict[str, Any]:
    layer, coefficient = plan.chosen[way]
    return condition(prompt, way, kind, layer, sign * coefficient)


def _rise(
    name: str, statement: str, against: str, after: np.ndarray, before: np.ndarray, plain: np.ndarray
) -> Question:  # fmt: skip
    """More chains than before; not testable where the unsteered model (`plain`) leaves no room for more."""
    why = no_room(float(np.mean(plain)), "above", CLAIMS_SIZE)
    measured = f"paired change of the rate of chains against {against} is above 0"
    return _change(name, statement, measured, after, before, above=0.0, blocked=why)


def _fall(
    name: str, statement: str, against: str, after: np.ndarray, before: np.ndarray, plain: np.ndarray
) -> Question:  # fmt: skip
    """Fewer chains than before; not testable where the unsteered model (`plain`) leaves no room for fewer."""
    why = no_room(float(np.mean(plain)), "below", CLAIMS_SIZE)
    measured = f"paired change of the rate of chains against {against} is below 0"
    return _change(name, statement, measured, after, before, below=0.0, blocked=why)


def _of_draws(number: int, what: str) -> str:
    return f"the closest of {number} {what} vectors" if number > 1 else f"a {what} vector"


def _brings_chains(plan: Chosen, table: _Table, way: str) -> list[Question]:
    text = f"{way} steering without the sentence brings chains"
    own, plain = table.of("chain", _vector(plan, way)), table.of("chain", UNSTEERED["neutral"])
    found = [_rise(f"C1 ({way})", text, "no steering", own, plain, plain)]
    for kind, number in (("random", plan.draws), ("shuffled", plan.shuffles)):
        name, what = f"C1 ({way}, {kind})", f"{text}, beyond {kind} vectors"
        if not number:
            found.append(_nothing(name, what, "paired change of the rate of chains is above 0", f"no {kind} vectors"))
            continue
        other = table.strongest("chain", _vector(plan, way, kind))
        found.append(_rise(name, what, _of_draws(number, kind), own, other, plain))
    return found


def _competes(plan: Chosen, table: _Table, way: str) -> list[Question]:
    found = []
    for outcome, name, what in (("correct", "accuracy", "accuracy"), ("chain", "chains", "the rate of chains")):
        own, asked = table.of(outcome, _vector(plan, way)), table.of(outcome, UNSTEERED["steps"])
        plain = table.of(outcome, UNSTEERED["neutral"])
        note = ""
        if asked.mean() <= plain.mean():
            note = (
                f"the sentence itself does not raise {what} here ({100 * asked.mean():.1f} % against "
                f"{100 * plain.mean():.1f} % without it): being as good as it says little"
            )
        found.append(
            _change(
                f"C2 ({way}, {name})", f"{way} steering competes with the step-by-step sentence in {what}",
                f"paired change of {what} against the sentence is above −{plan.margin:g}", own, asked,
                absent=plan.margin, side="below", blocked=no_room(float(asked.mean()), "below", plan.margin), note=note,
            )
        )  # fmt: skip
    return found


def _coefficients(plan: Chosen, table: _Table, way: str) -> list[Question]:
    """Each way at the coefficient that the claim gives it, against the other one, at its own layer."""
    small, large = sorted(cell[1] for cell in plan.chosen.values())
    name, wanted = f"C3 ({way})", small if way == "continuous" else large
    text = f"{way} steering needs a {'small' if way == 'continuous' else 'large'} coefficient"
    measured = "paired change of the rate of chains against the other coefficient is above 0"
    if small == large:
        return [_nothing(name, text, measured, f"both ways of steering were given the same coefficient, {small:g}")]
    layer = plan.chosen[way][0]
    at = {c: table.of("chain", condition("neutral", way, "all", layer, c)) for c in (small, large)}
    other = large if wanted == small else small
    plain = table.of("chain", UNSTEERED["neutral"])
    return [_rise(name, text, f"{other:g} (with {wanted:g}, at layer {layer})", at[wanted], at[other], plain)]


def _suppresses(plan: Chosen, table: _Table, way: str) -> list[Question]:
    text = f"−c of {way} steering suppresses chains"
    plain, asked = (table.of("chain", UNSTEERED[prompt]) for prompt in ("neutral", "steps"))
    own = table.of("chain", _vector(plan, way, sign=-1.0, prompt="steps"))
    other = table.strongest("chain", _vector(plan, way, "random", prompt="steps"), highest=False)
    minus = table.of("chain", _vector(plan, way, sign=-1.0))
    random = f"{_of_draws(plan.draws, 'random')} with the sentence"
    asked_for = f"{text} that are asked for"
    return [
        _fall(f"C4 ({way})", text, "no steering", minus, plain, plain),
        _fall(f"C4 ({way}, asked)", asked_for, "the step-by-step sentence alone", own, asked, asked),
        _fall(f"C4 ({way}, random)", f"{asked_for}, beyond random vectors", random, own, other, asked),
    ]


def _carries_over(plan: Chosen, table: _Table, way: str) -> list[Question]:
    text = f"{way} steering brings chains on sets that the vector was not derived from"
    names = (f"C5 ({way})", f"C5 ({way}, random)")
    if not plan.held_out:
        why = "every tested set is akin to the only one that the vector was derived from"
        return [_nothing(name, text, "paired change of the rate of chains is above 0", why) for name in names]
    own, plain = table.of("chain", _vector(plan, way, "held-out")), table.of("chain", UNSTEERED["neutral"])
    other = table.strongest("chain", _vector(plan, way, "random"))
    return [
        _rise(names[0], text, "no steering", own, plain, plain),
        _rise(names[1], f"{text}, beyond random vectors", _of_draws(plan.draws, "random"), own, other, plain),
    ]
