"""experiments.circuit.claims: every verdict on trials made so that it comes out one way, and the other way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from experiments.circuit.claims import Setting, make_claims
from experiments.statistics.clusters import Settings

ITEMS, BLOCKS, HEADS, KEPT = 60, 8, 20, 72
SETTING = Setting(n_blocks=BLOCKS, published=KEPT, last=9, demonstrations=6, settings=Settings(resamples=2000))
SUBTASKS = {0: "decision", 1: "copy", 5: "induction", 9: "induction"}
RNG = np.random.default_rng


def kept(agreement: dict[str, float], seed: int = 0) -> pd.DataFrame:
    """Circuits that agree with the whole model so often."""
    rng = RNG(seed)
    rows = [
        {"set": "held-out", "item": item, "subtask": subtask, "kind": kind, "circuit": circuit, "complement": False,
         "kept": KEPT, "draw": -1, "agrees": bool(rng.random() < share), "right": True, "probability": 0.5}
        for circuit, share in agreement.items() for item in range(ITEMS) for subtask, kind in SUBTASKS.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def heads(loud: Callable[[int], bool], columns: tuple[str, ...], subtasks: dict[int, str], seed: int = 0):
    """Every head of every item with a number that is large where `loud(block)`, small elsewhere."""
    rng = RNG(seed)
    rows = []
    for item in range(ITEMS):
        for subtask, kind in subtasks.items():
            for block in range(1, BLOCKS + 1):
                for head in range(HEADS):
                    value = rng.random() * (1.0 if loud(block) else 0.1)
                    rows.append((item, subtask, kind, block, head, *([value] * len(columns))))
    return pd.DataFrame(rows, columns=["item", "subtask", "kind", "block", "head", *columns])


def writers(loud: Callable[[int], bool]) -> pd.DataFrame:
    return heads(loud, ("contribution", "alone"), {9: "induction"}).assign(total=20.0)


def movers(loud: Callable[[int], bool]) -> pd.DataFrame:
    table = heads(loud, ("attention",), {0: ""}).assign(control=0.0)
    return table.drop(columns=["subtask", "kind"])


def sources(shares: dict[int, tuple[float, float, float]], seed: int = 0) -> pd.DataFrame:
    """What one loud head writes from demonstrations, question and chain, by subtask, with some noise."""
    rng = RNG(seed)
    rows = [
        {"item": item, "subtask": subtask, "kind": SUBTASKS[subtask], "block": 8, "head": 0, "part": part,
         "attention": 0.25, "written": value + 0.01 * rng.random()}
        for item in range(ITEMS) for subtask, values in shares.items()
        for part, value in zip(("demonstrations", "question", "chain", "rest"), (*values, 0.0), strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def loud_writer() -> pd.DataFrame:
    return pd.DataFrame(
        [{"item": item, "subtask": 9, "kind": "induction", "block": 8, "head": 0, "contribution": 1.0, "alone": 0.9,
          "total": 2.0} for item in range(ITEMS)]
    )  # fmt: skip


def rift(crossing: float, seed: int = 0) -> pd.DataFrame:
    """The context overtakes pretraining at so much of the depth."""
    rng = RNG(seed)
    rows = [
        {"item": item, "position": 5, "part": "chain", "kind": "copy", "layer": layer,
         "pretraining": 0.5 - 0.4 * layer / BLOCKS,
         "context": 0.5 - 0.4 * layer / BLOCKS + 0.3 * (layer / BLOCKS - crossing) + 0.01 * rng.normal()}
        for item in range(ITEMS) for layer in range(BLOCKS + 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def mixing(accuracy: Callable[[int], float], seed: int = 0) -> pd.DataFrame:
    rng = RNG(seed)
    rows = [
        {"layer": layer, "probe": "mlp", "labels": "true", "text": text, "pair": pair, "f1": 0.5, "chance": 1 / 3,
         "correct": bool(rng.random() < accuracy(layer))}
        for layer in range(BLOCKS + 1) for text in range(ITEMS) for pair in range(12)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def verdict(name: str, trials: dict[str, pd.DataFrame], setting: Setting = SETTING) -> str:
    found = {claim.name.split()[0]: claim for claim in make_claims(trials, setting)}
    assert len(found) == 8
    return found[name].verdict


def test_reasoning_heads_keep_agreement_in_every_subtask():
    assert verdict("K1", {"kept": kept({"reasoning": 1.0})}) == "held"
    assert verdict("K1", {"kept": kept({"reasoning": 0.6})}) == "not held"
    assert verdict("K1", {"kept": kept({"reasoning": 0.9})}) == "undecided"
    bad = kept({"reasoning": 1.0})
    bad.loc[bad["subtask"] == 5, "agrees"] = False  # one subtask is enough
    assert verdict("K1", {"kept": bad}) == "not held"
    assert verdict("K1", {"kept": kept({"copy": 1.0})}) == "not testable"


def test_other_rankings_do_not_prune():
    assert verdict("K2", {"kept": kept({"copy": 0.4, "decision": 0.5})}) == "held"
    assert verdict("K2", {"kept": kept({"copy": 0.99, "decision": 0.5})}) == "not held"
    assert verdict("K2", {"kept": kept({"copy": 0.9, "decision": 0.5})}) == "undecided"
    assert verdict("K2", {"kept": kept({"copy": 0.4})}) == "not testable"


def test_writers_stand_in_the_later_half():
    assert verdict("W1", {"writers": writers(lambda block: block > 4)}) == "held"
    assert verdict("W1", {"writers": writers(lambda block: block <= 4)}) == "not held"
    assert verdict("W1", {"writers": writers(lambda block: True)}) == "undecided"


def test_movers_stand_in_the_first_half():
    assert verdict("W2", {"movers": movers(lambda block: block <= 4)}) == "held"
    assert verdict("W2", {"movers": movers(lambda block: block > 4)}) == "not held"
    assert verdict("W2", {"movers": movers(lambda block: True)}) == "undecided"


def test_several_pathways_write_at_once():
    both = {"writers": loud_writer(), "sources": sources({5: (0.0, 0.5, 0.5), 9: (0.0, 0.5, 0.5)})}
    one = {"writers": loud_writer(), "sources": sources({5: (0.0, 1.0, 0.0), 9: (0.0, 0.0, 1.0)})}
    half = {"writers": loud_writer(), "sources": sources({5: (0.0, 0.5, 0.5), 9: (0.0, 0.0, 1.0)})}
    assert verdict("F1", both) == "held" and verdict("F1", one) == "not held"
    assert verdict("F1", half) == "undecided"


def test_the_rift_lies_at_half_depth():
    assert verdict("R1", {"rift": rift(0.5)}) == "held"
    assert verdict("R1", {"rift": rift(0.85)}) == "not held"
    assert verdict("R1", {"rift": rift(1.5)}) == "not testable"  # pretraining leads to the end
    assert verdict("R1", {"rift": rift(-0.5)}) == "not testable"  # it never leads


def test_mixing_peaks_in_the_middle():
    assert verdict("M1", {"mixing": mixing(lambda layer: 0.8 if 3 <= layer <= 5 else 0.4)}) == "held"
    assert verdict("M1", {"mixing": mixing(lambda layer: 0.3 + 0.06 * layer)}) == "not held"
    assert verdict("M1", {"mixing": mixing(lambda layer: 0.5)}) == "undecided"


def test_demonstrations_lose_influence():
    def of(first: float, last: float) -> dict[str, pd.DataFrame]:
        shares = {0: (first, 1 - first, 0.0), 9: (last, 1 - last, 0.0)}
        return {"writers": loud_writer(), "sources": sources(shares)}

    assert verdict("F2", of(0.6, 0.2)) == "held" and verdict("F2", of(0.2, 0.6)) == "not held"
    assert verdict("F2", of(0.4, 0.4)) == "undecided"
    without = Setting(BLOCKS, KEPT, 9, 0, Settings(resamples=200))
    assert verdict("F2", of(0.6, 0.2), without) == "not testable"


def test_claims_of_one_run_are_corrected_together_and_need_more():
    """The same trials alone and among seven others: the interval is wider, the family is said."""
    alone = {"writers": writers(lambda block: True)}
    among = alone | {"kept": kept({"reasoning": 1.0, "copy": 0.4, "decision": 0.4}), "rift": rift(0.5)}
    first, second = (make_claims(trials, SETTING)["W1 (writers)"] for trials in (alone, among))
    assert first.family == 1 and second.family == 4 and "Bonferroni" in second.corrected
    assert second.upper - second.lower > first.upper - first.lower and first.estimate == second.estimate


@pytest.mark.parametrize("items", [1, 2])
def test_few_items_decide_nothing(items: int):
    table = writers(lambda block: block > 4)
    found = make_claims({"writers": table[table["item"] < items]}, SETTING)["W1 (writers)"]
    assert found.verdict == "undecided"
