"""Claims of codi cot on made-up answers: each comes out held, not held, undecided or not testable where it should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.cot.asking import UNSTEERED, condition
from experiments.cot.claims import claims_of
from experiments.cot.grid import chosen_cells
from experiments.cot.measures import OUTCOMES
from experiments.cot.tables import all_levels, chain_limits, label
from experiments.statistics.clusters import Settings

SETTINGS = Settings(resamples=400, permutations=200)


@dataclass(frozen=True)
class Plan:
    """What claims ask of a plan."""

    chosen: dict[str, tuple[int, float]]
    margin: float = 0.1
    settings: Settings = SETTINGS
    held_out: bool = True
    shuffles: int = 2
    draws: int = 2


CHOSEN = {"continuous": (15, 1.0), "single": (10, 16.0)}
BASE = {
    "neutral": 0.15, "direct": 0.05, "steps": 0.9, "own": 0.88, "minus": 0.02, "held-out": 0.8, "random": 0.1,
    "shuffled": 0.15, "other": 0.1, "asked-minus": 0.3, "asked-random": 0.85,
}  # fmt: skip
"""Rates of chains of a vector that does all that is claimed."""


def trials(
    rates: dict[str, float], n: int, accuracy: dict[str, float] | None = None, chosen: Any = None
) -> pd.DataFrame:  # fmt: skip
    """Answers of `codi cot eval` to n questions in clusters of two, drawn with the given rates of chains; accuracy
    follows chains unless it is given."""
    rng, rates = np.random.default_rng(5), {**BASE, **rates}
    accuracy = accuracy or {}
    conditions: list[tuple[dict[str, Any], str, int]] = [(UNSTEERED[name], name, 0) for name in UNSTEERED]
    chosen = chosen or CHOSEN
    for way, (layer, c) in chosen.items():
        other = next(cell[1] for name, cell in chosen.items() if name != way)
        conditions += [
            (condition("neutral", way, "all", layer, c), "own", 0),
            (condition("neutral", way, "all", layer, -c), "minus", 0),
            (condition("neutral", way, "held-out", layer, c), "held-out", 0),
            (condition("neutral", way, "random", layer, c), "random", 2),
            (condition("neutral", way, "shuffled", layer, c), "shuffled", 2),
            (condition("steps", way, "all", layer, -c), "asked-minus", 0),
            (condition("steps", way, "random", layer, c), "asked-random", 2),
        ]
        if other != c:
            conditions.append((condition("neutral", way, "all", layer, other), "other", 0))
    ease = rng.random(n)  # the same questions are hard throughout, as they are for a model
    rows = []
    for given, name, draws in conditions:
        for draw in range(draws) if draws else (-1,):
            noise = 0.7 * ease + 0.3 * rng.random(n)
            levels = np.quantile(noise, [rates[name], accuracy.get(name, rates[name])])
            for i in range(n):
                rows.append({**given, "draw": draw, "prompt_id": f"p{i:04}", "cluster": f"c{i // 2:04}", "set": "s",
                             "chain": rates[name] > 0 and noise[i] <= levels[0],
                             "correct": accuracy.get(name, rates[name]) > 0 and noise[i] <= levels[1]})  # fmt: skip
    return pd.DataFrame(rows)


def verdicts(rates: dict[str, float], n: int = 400, plan: Plan | None = None, **more: Any) -> dict[str, str]:
    plan = plan or Plan(CHOSEN)
    return {claim.name: claim.verdict for claim in claims_of(plan, trials(rates, n, chosen=plan.chosen, **more))}


def test_a_vector_that_does_all_that_is_claimed() -> None:
    found = verdicts({})
    assert len(found) == 22 and set(found.values()) == {"held"}, found


@pytest.mark.parametrize(
    ("rates", "against", "what"),
    [
        ({"own": 0.02}, "C1 (continuous)", "not held"),
        ({"random": 0.99}, "C1 (continuous, random)", "not held"),
        ({"shuffled": 0.99}, "C1 (single, shuffled)", "not held"),
        ({"own": 0.5}, "C2 (continuous, accuracy)", "not held"),
        ({"own": 0.5}, "C2 (single, chains)", "not held"),
        ({"other": 0.99}, "C3 (continuous)", "not held"),
        ({"other": 0.99}, "C3 (single)", "not held"),
        ({"minus": 0.4}, "C4 (continuous)", "not held"),
        ({"asked-minus": 0.99}, "C4 (single, asked)", "not held"),
        ({"asked-random": 0.1}, "C4 (continuous, random)", "not held"),
        ({"held-out": 0.02}, "C5 (continuous)", "not held"),
        ({"random": 0.95}, "C5 (single, random)", "not held"),
    ],
)
def test_each_claim_can_fail_alone(rates: dict[str, float], against: str, what: str) -> None:
    assert verdicts(rates)[against] == what


def test_few_questions_decide_nothing_small() -> None:
    found = verdicts({"own": 0.15, "held-out": 0.15, "minus": 0.08, "other": 0.14, "random": 0.13}, n=30)
    assert found["C1 (continuous)"] == found["C5 (continuous)"] == found["C3 (single)"] == "undecided"


def test_what_has_no_room_is_not_testable() -> None:
    nothing = verdicts({"neutral": 0.0, "minus": 0.0, "steps": 0.0, "asked-minus": 0.0, "asked-random": 0.0})
    for name in ("C4 (continuous)", "C4 (single, asked)", "C4 (single, random)", "C2 (single, accuracy)"):
        assert nothing[name] == "not testable"
    assert nothing["C1 (continuous)"] == "held"
    assert verdicts({"neutral": 1.0})["C1 (single)"] == "not testable"
    same = verdicts({}, plan=Plan({"continuous": (15, 2.0), "single": (10, 2.0)}))
    assert same["C3 (continuous)"] == same["C3 (single)"] == "not testable"
    alone = verdicts({}, plan=Plan(CHOSEN, held_out=False, shuffles=0))
    assert alone["C5 (continuous)"] == alone["C1 (single, shuffled)"] == "not testable"
    assert alone["C1 (single)"] == "held"


def test_accuracy_is_judged_apart_from_chains() -> None:
    """Chains as many as asked for, answers wrong: competitive in chains alone; and the other way round."""
    found = verdicts({"own": 0.9}, accuracy={"own": 0.4, "steps": 0.9})
    assert found["C2 (continuous, chains)"] == "held" and found["C2 (continuous, accuracy)"] == "not held"
    found = verdicts({"own": 0.3}, accuracy={"own": 0.9, "steps": 0.9})
    assert found["C2 (continuous, chains)"] == "not held" and found["C2 (continuous, accuracy)"] == "held"


def test_a_sentence_that_does_not_help_is_said() -> None:
    claims = claims_of(Plan(CHOSEN), trials({}, 400, accuracy={"steps": 0.3, "neutral": 0.5, "own": 0.5}))
    assert "does not raise accuracy" in claims["C2 (continuous, accuracy)"].note
    assert "does not raise" not in claims["C2 (continuous, chains)"].note


def test_no_effect_at_all_holds_nothing() -> None:
    """The same rate everywhere: a claim of presence that is held is a false one."""
    flat = dict.fromkeys(BASE, 0.3)
    found = verdicts(flat, n=100)
    presence = [name for name, verdict in found.items() if not name.startswith("C2") and verdict == "held"]
    assert presence == []


# --- The choice of the grid -------------------------------------------------------------------------------------------


def grid(cells: dict[tuple[str, int, float], tuple[float, float, float]]) -> pd.DataFrame:
    """Table of levels: (way, layer, c) -> rate of chains, accuracy, share that can be read; unsteered 0, .3, .9."""
    rows = []
    for (way, layer, c), values in {("", -1, 0.0): (0.0, 0.3, 0.9), **cells}.items():
        given = condition("neutral", way, "all" if way else "", layer, c)
        for outcome, mean in zip(("chain", "correct", "parsed"), values, strict=True):
            rows.append({**given, "outcome": outcome, "mean": mean})
    return pd.DataFrame(rows)


def test_the_rule_of_the_choice() -> None:
    single = {("single", 5, 4.0): (0.2, 0.2, 0.9)}
    table = grid({
        ("continuous", 5, 1.0): (0.6, 0.4, 0.85), ("continuous", 5, 2.0): (0.9, 0.5, 0.3),  # not readable
        ("continuous", 9, 1.0): (0.6, 0.5, 0.85), ("continuous", 9, 2.0): (0.6, 0.5, 0.85),
        ("continuous", 7, 1.0): (0.6, 0.5, 0.85), **single,
    })  # fmt: skip
    assert chosen_cells(table)["continuous"] == (7, 1.0)  # chains, then accuracy, then c, then layer
    assert chosen_cells(table, parse_loss=0.7)["continuous"] == (5, 2.0)
    assert chosen_cells(table)["single"] == (5, 4.0)
    table = grid({("continuous", 5, 1.0): (0.9, 0.1, 0.9), ("continuous", 6, 1.0): (0.1, 0.4, 0.9), **single})
    assert chosen_cells(table, "accuracy")["continuous"] == (6, 1.0)
    unreadable = grid({("continuous", 5, 1.0): (0.9, 0.1, 0.0), **single})
    assert chosen_cells(unreadable)["continuous"] == (5, 1.0)  # where none can be read, all count


# --- Tables and words -------------------------------------------------------------------------------------------------


def test_levels_hold_the_accuracy_of_texts_with_a_chain() -> None:
    table = trials({}, 60)
    for name in set(OUTCOMES) - {"chain", "correct"}:
        table[name] = 1.0
    found = all_levels(table, SETTINGS)
    own = found[(found["outcome"] == "correct given a chain") & (found["prompt"] == "direct")].iloc[0]
    direct = table[table["prompt"] == "direct"]
    assert own["mean"] == direct[direct["chain"]]["correct"].mean() and own["n"] == direct["chain"].sum()


def test_conditions_in_words_and_what_could_be_seen() -> None:
    assert label(condition("steps")) == "step by step"
    assert label(condition("neutral", "continuous", "all", 15, -2.0)) == "continuous −2 at layer 15"
    assert label(condition("steps", "single", "random", 9, 4.0)) == "step by step, single +4 at layer 9, random vector"
    plain = pd.DataFrame({"chain": [False] * 40, "cluster": [f"c{i}" for i in range(40)]})
    text = chain_limits(plain, 20, SETTINGS)
    assert "a rise of 25.0 points" in text and "no fall at all" in text  # 0.025 / 20 needs 10 of 40
