"""Published claims about polynomial iteration in CODI models, as the trials of this study decide them.

    P1  at two and three hops every bridge state is decodable over the latents (published: about .7)
    P2  the last input takes a near-direct route: the answer reads it past the latents
    P3  the answer comes about late, at the end-of-thought token
    P4  longer hops keep only late intermediates
    P5  prime moduli are worse: about two models, so not testable on one; with --against, the difference of accuracies

P1 to P4 are judged together, over the evaluation prompts. The place where a state is read best (latent, layer, lens or
probe) is chosen on the derivation prompts. Knows nothing about models or how the trials came about.

Source: Liang and Pan 2026, arXiv 2602.00449. The bounds are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd

from experiments.polynomial.measures import READERS
from experiments.polynomial.plan import Other, Plan
from experiments.statistics.effects import Selector
from experiments.statistics.equivalence import Judgement, judge_presence
from experiments.statistics.exact import share_difference
from experiments.study.claims import Claim, ClaimsTable, effect_claim
from experiments.study.run import Trials
from experiments.study.verdicts import Question, judged_together

__all__ = ["ENOUGH", "FUSED", "LATE", "READ", "best_place", "claims_of", "read_at"]

READ = 0.5
"""A state that is read right in more than this share of prompts counts as decodable (published: about .7)."""
FUSED = 0.2
"""By so much more often the answer is read at the end of thought, if it comes about there."""
LATE = 0.1
"""By so much more often the last bridge state is read than the first, if only late ones are kept."""
ENOUGH = 0.2
"""Accuracy below this leaves claims about how a model answers not testable."""
SHORT, LONG = (2, 3), (4, 5)
"""Numbers of hops that the claims are about."""


def best_place(reads: pd.DataFrame, hops: int, state: int, places: range) -> Selector:
    """Method, place and layer at which a state is read best on the derivation prompts.

    Args:
        reads: trial table.
        hops, state: which state.
        places: to choose from.
    """
    mine = reads[
        (reads["side"] == "derivation") & (reads["hops"] == hops) & (reads["state"] == state)
        & reads["place"].between(places[0], places[-1])
    ]  # fmt: skip
    shares = mine.groupby(["method", "place", "layer"], sort=True, observed=True)["read"].mean().reset_index()
    top = shares.iloc[int(shares["read"].to_numpy().argmax())]
    place, layer = int(top["place"]), int(top["layer"])
    return {"hops": hops, "state": state, "method": str(top["method"]), "place": place, "layer": layer}


def read_at(reads: pd.DataFrame, where: Selector) -> pd.Series:
    """prompt_id -> whether the state is read there, of the evaluation prompts."""
    mine = reads[(reads[list(where)] == pd.Series(where)).all(axis=1) & (reads["side"] == "evaluation")]
    return mine.set_index("prompt_id")["read"]


def claims_of(plan: Plan, trials: Trials) -> ClaimsTable:
    """P1 to P5."""
    answered, reads = trials["answers"], trials["reads"]
    plain = answered[answered["number"] == -1].set_index("prompt_id")
    accuracy = plain.groupby("hops")["correct"].mean().to_dict()
    prompts = plain.index

    def blocked(hops: int) -> str:
        if hops not in plan.hops:
            return f"{hops} hops were not asked"
        right = accuracy[hops]
        return f"the model answers {100 * right:.1f} % of {hops} hops right: too little to explain" * (right < ENOUGH)

    def values(make: Callable[[], pd.Series], why: str) -> np.ndarray:
        return np.empty(0) if why else make().reindex(prompts).to_numpy()

    questions = [_decodable(plan, reads, hops, state, blocked(hops), values)
                 for hops in SHORT for state in range(1, hops)]  # fmt: skip
    questions += [_direct(answered, hops, blocked(hops), values) for hops in SHORT]
    questions += _fused(plan, reads, [hops for hops in plan.hops if not blocked(hops)], values)
    questions += [_late(plan, reads, hops, blocked(hops), values) for hops in LONG]
    rows = {hops: plain.loc[plain["hops"] == hops, "correct"] for hops in plan.hops}
    counts = {hops: (int(mine.sum()), len(mine)) for hops, mine in rows.items()}
    together = judged_together(questions, plain["cluster"].to_numpy(), plan.settings)
    return ClaimsTable([*together, _prime(plan, counts)])


_Values = Callable[[Callable[[], pd.Series], str], np.ndarray]


def _decodable(plan: Plan, reads: pd.DataFrame, hops: int, state: int, why: str, values: _Values) -> Question:
    where = {} if why else best_place(reads, hops, state, plan.latents)
    return Question(
        f"P1 ({hops} hops, s{state})",
        "every bridge state is decodable over the latents",
        f"share of prompts in which s{state} is read right at its best latent is above {READ}",
        values(lambda: read_at(reads, where), why),
        above=READ,
        bounds=(0, 1),
        blocked=why,
        note="" if why else f"published: about .7; chance {1 / plan.m:.2f}; read at {place_name(plan, where)}",
    )


def _direct(answered: pd.DataFrame, hops: int, why: str, values: _Values) -> Question:
    def change() -> pd.Series:
        mine = answered[(answered["hops"] == hops) & (answered["number"] == hops)]
        right = {reader: mine[mine["reader"] == reader].set_index("prompt_id")["correct"] for reader in READERS}
        return right["latents"].astype(float) - right["answer"].astype(float)

    return Question(
        f"P2 ({hops} hops)",
        "the last input takes a near-direct route, past the latents",
        f"accuracy with x{hops} hidden from all latents, minus hidden from end of thought and answer, is above 0",
        values(change, why),
        above=0.0,
        bounds=(-1, 1),
        blocked=why,
    )


def _fused(plan: Plan, reads: pd.DataFrame, answerable: list[int], values: _Values) -> list[Question]:
    why = "" if answerable else f"the model answers fewer than {100 * ENOUGH:g} % right at every number of hops"
    end = plan.n_latents + 1

    def answer(place: int, layer: int) -> pd.Series:
        where = {"method": "lens", "place": place, "layer": layer}
        return pd.concat([read_at(reads, {"hops": hops, "state": hops, **where}) for hops in answerable])

    def latents() -> pd.Series:
        return pd.concat([read_at(reads, best_place(reads, hops, hops, plan.latents)) for hops in answerable])

    middle = plan.n_layers // 2
    shallow = why or ("the model has one layer" if middle == 0 else "")
    return [
        Question(
            "P3 (place)",
            "the answer comes about at the end-of-thought token",
            f"share in which it is read there, last layer, minus at the best latent, is above {FUSED}",
            values(lambda: answer(end, plan.n_layers) - latents(), why),
            above=FUSED,
            bounds=(-1, 1),
            blocked=why,
        ),
        Question(
            "P3 (depth)",
            "the answer comes about late in the end-of-thought token",
            f"share in which it is read there at the last layer, minus at layer {middle}, is above {FUSED}",
            values(lambda: answer(end, plan.n_layers) - answer(end, middle), shallow),
            above=FUSED,
            bounds=(-1, 1),
            blocked=shallow,
        ),
    ]


def _late(plan: Plan, reads: pd.DataFrame, hops: int, why: str, values: _Values) -> Question:
    def change() -> pd.Series:
        first, last = (read_at(reads, best_place(reads, hops, state, plan.latents)) for state in (1, hops - 1))
        return last - first

    return Question(
        f"P4 ({hops} hops)",
        "longer hops keep only late intermediates",
        f"share in which s{hops - 1} is read at its best latent, minus s1 at its own, is above {LATE}",
        values(change, why),
        above=LATE,
        bounds=(-1, 1),
        blocked=why,
    )


def _prime(plan: Plan, counts: Mapping[int, tuple[int, int]]) -> Claim:
    """P5, from counts of right answers by hops of this run and of another one."""
    other, shared = plan.other, [hops for hops in counts if plan.other and hops in dict(_by_hops(plan.other))]
    kind = "prime" if plan.prime else "composite"
    why = ""
    if other is None:
        why = f"it compares two models, this one has m = {plan.m} ({kind}): give --against a run of the other kind"
    elif other.prime == plan.prime:
        why = f"both moduli are {kind}: {plan.m} and {other.m}"
    elif not shared:
        why = "the two runs have no number of hops in common"
    statement, measured = (
        "prime moduli are worse",
        "accuracy with the prime minus with the composite modulus is below 0",
    )
    if why or other is None:
        row = {"difference": math.nan, "n": 0, "n_clusters": 0}
        return effect_claim("P5", statement, measured, Judgement("not testable", why, math.nan, math.nan, 0.0, 1), row)
    theirs = dict(_by_hops(other))
    mine, others = (
        (sum(found[hops][0] for hops in shared), sum(found[hops][1] for hops in shared)) for found in (counts, theirs)
    )
    prime, composite = (mine, others) if plan.prime else (others, mine)
    judgement = judge_presence(*share_difference(prime, composite, plan.settings.level), below=0.0)
    row = {"difference": prime[0] / prime[1] - composite[0] / composite[1], "n": mine[1] + others[1]}
    note = f"m = {plan.m} here, {other.m} there; {', '.join(map(str, shared))} hops; every sequence is its own cluster"
    return effect_claim("P5", statement, measured, judgement, {**row, "n_clusters": row["n"]}, note)


def _by_hops(other: Other) -> Iterator[tuple[int, tuple[int, int]]]:
    return ((hops, (right, n)) for hops, right, n in other.answered)


def place_name(plan: Plan, where: Selector) -> str:
    """A place for a person: "h_2, layer 3, by lens"."""
    at = "end of thought" if where["place"] == plan.n_latents + 1 else f"h_{where['place']}"
    layer = "last layer" if where["layer"] in (-1, plan.n_layers) else f"layer {where['layer']}"
    return f"{at}, {layer}, by {where['method']}"
