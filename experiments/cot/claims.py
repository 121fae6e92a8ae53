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
from experiments.statistics.effects import per_prompt
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
    """Values of every question in a condition, averaged over nothing: draws are told apart."""

    def __init__(self, trials: pd.DataFrame) -> None:
        names = trials.drop_duplicates("prompt_id")[["cluster", "prompt_id"]]
        self.index = pd.MultiIndex.from_frame(names.sort_values(["cluster", "prompt_id"]).astype(str))
        self._trials = trials
        self._known = set(trials[list(_BY)].drop_duplicates().itertuples(index=False, name=None))

    @property
    def clusters(self) -> np.ndarray:
        return self.index.get_level_values("cluster").to_numpy()

    def draws(self, given: Mapping[str, Any]) -> list[int]:
        """Draws that a condition has."""
        own = tuple(given[name] for name in CONDITION)
        return sorted(one[-1] for one in self._known if one[:-1] == own)

    def of(self, outcome: str, given: Mapping[str, Any], draw: int = -1) -> np.ndarray:
        """(question,)."""
        wide = per_prompt(self._trials, [{**given, "draw": draw}], _BY, outcome)
        wide.index = wide.index.set_levels([level.astype(str) for level in wide.index.levels])
        return wide[0].reindex(self.index).to_numpy(float)

    def strongest(self, outcome: str, given: Mapping[str, Any], highest: bool = True) -> np.ndarray:
        """(question,) of the draw with the highest (lowest) mean."""
        found = [self.of(outcome, given, draw) for draw in self.draws(given)]
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


def _change(
    name: str, statement: str, measured: str, after: np.ndarray, before: np.ndarray, **how: Any
) -> Question:
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


def _rise(name: str, statement: str, against: str, after: np.ndarray, before: np.ndarray, note: str = "") -> Question:
    """More chains than before."""
    return _change(
        name, statement, f"paired change of the rate of chains against {against} is above 0", after, before, above=0.0,
        blocked=no_room(float(np.mean(before)), "above", CLAIMS_SIZE), note=note,
    )  # fmt: skip


def _fall(name: str, statement: str, against: str, after: np.ndarray, before: np.ndarray, note: str = "") -> Question:
    """Fewer chains than before."""
    return _change(
        name, statement, f"paired change of the rate of chains against {against} is below 0", after, before, below=0.0,
        blocked=no_room(float(np.mean(before)), "below", CLAIMS_SIZE), note=note,
    )  # fmt: skip


def _of_draws(number: int, what: str) -> str:
    return f"the closest of {number} {what} vectors" if number > 1 else f"a {what} vector"


def _brings_chains(plan: Chosen, table: _Table, way: str) -> list[Question]:
    text = f"{way} steering without the sentence brings chains"
    own = table.of("chain", _vector(plan, way))
    found = [_rise(f"C1 ({way})", text, "no steering", own, table.of("chain", UNSTEERED["neutral"]))]
    for kind, number in (("random", plan.draws), ("shuffled", plan.shuffles)):
        name, what = f"C1 ({way}, {kind})", f"{text}, beyond {kind} vectors"
        if not number:
            found.append(_nothing(name, what, "paired change of the rate of chains is above 0", f"no {kind} vectors"))
            continue
        other = table.strongest("chain", _vector(plan, way, kind))
        found.append(_rise(name, what, _of_draws(number, kind), own, other))
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
    return [_rise(name, text, f"{other:g} (with {wanted:g}, at layer {layer})", at[wanted], at[other])]


def _suppresses(plan: Chosen, table: _Table, way: str) -> list[Question]:
    text = f"−c of {way} steering suppresses chains"
    plain, asked = (table.of("chain", UNSTEERED[prompt]) for prompt in ("neutral", "steps"))
    own = table.of("chain", _vector(plan, way, sign=-1.0, prompt="steps"))
    other = table.strongest("chain", _vector(plan, way, "random", prompt="steps"), highest=False)
    return [
        _fall(f"C4 ({way})", text, "no steering", table.of("chain", _vector(plan, way, sign=-1.0)), plain),
        _fall(f"C4 ({way}, asked)", f"{text} that are asked for", "the step-by-step sentence alone", own, asked),
        _fall(f"C4 ({way}, random)", f"{text} that are asked for, beyond random vectors",
              f"{_of_draws(plan.draws, 'random')} with the sentence", own, other),
    ]  # fmt: skip


def _carries_over(plan: Chosen, table: _Table, way: str) -> list[Question]:
    text = f"{way} steering brings chains on sets that the vector was not derived from"
    names = (f"C5 ({way})", f"C5 ({way}, random)")
    if not plan.held_out:
        why = "every tested set is akin to the only one that the vector was derived from"
        return [_nothing(name, text, "paired change of the rate of chains is above 0", why) for name in names]
    own = table.of("chain", _vector(plan, way, "held-out"))
    other = table.strongest("chain", _vector(plan, way, "random"))
    return [
        _rise(names[0], text, "no steering", own, table.of("chain", UNSTEERED["neutral"])),
        _rise(names[1], f"{text}, beyond random vectors", _of_draws(plan.draws, "random"), own, other),
    ]


