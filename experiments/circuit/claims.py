"""The published claims about written chains of thought, judged from the trial tables of `codi circuit`.

    K1 reasoning heads alone keep .9 agreement in all subtasks         F1 several pathways write at once
    K2 the copy and decision rankings do not prune                     R1 the rift lies at half depth
    W1 answer-writing heads stand in the later half                    M1 token mixing peaks in the middle
    W2 movers stand in the first half                                  F2 demonstrations lose influence

Every number is a mean over items (texts, for M1), judged by its interval; the claims rest on different items, so each
interval is made at the Bonferroni level of those that were measured. Knows nothing about models.

Source: Dutta et al. 2024, arXiv 2402.18312.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from experiments.circuit.tables_traced import crossings, pathway_rows, source_rows, top_heads, writer_table
from experiments.statistics.clusters import Settings, cluster_codes, cluster_sums, interval_of
from experiments.statistics.equivalence import Judgement, family_level, judge_absence, judge_presence, widened
from experiments.statistics.exact import never_zero_width
from experiments.statistics.families import family_intervals
from experiments.study.claims import Claim, ClaimsTable

__all__ = ["AGREEMENT", "HALF_WITHIN", "Setting", "make_claims"]

AGREEMENT = 0.9
"""Agreement that the published circuit keeps."""
HALF_WITHIN = 0.1
"""Of the depth: a crossing this close to the middle counts as half depth."""
Trials = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Setting:
    """What the claims need to know of a run.

    Attributes:
        n_blocks: of the model.
        published: heads kept in a circuit of the published share.
        last: number of the last induction subtask.
        demonstrations: before each question.
        settings: resamples, level, seed.
    """

    n_blocks: int
    published: int
    last: int
    demonstrations: int
    settings: Settings


@dataclass(frozen=True)
class _Measured:
    """One claim before the family is known.

    Attributes:
        judge: from settings at the family's level and the number of claims to estimate and judgement.
        why: why it cannot be tested; "" if it can.
        n: items (texts) behind it.
    """

    name: str
    statement: str
    measured: str
    judge: Callable[[Settings, int], tuple[float, Judgement]] | None = None
    why: str = ""
    n: int = 0
    note: str = ""


def make_claims(trials: Trials, setting: Setting) -> ClaimsTable:
    """All claims in the order above; those whose trials are not there are not testable."""
    found = [make(trials, setting) for make in (_k1, _k2, _w1, _w2, _f1, _r1, _m1, _f2)]
    family = sum(one.judge is not None for one in found)
    level = family_level(setting.settings.level, max(family, 1))
    settings = replace(setting.settings, level=level)
    together = f"Bonferroni, together at {100 * setting.settings.level:g} %"
    table = ClaimsTable()
    for one in found:
        if one.judge is None:
            table.add(Claim(one.name, one.statement, one.measured, "not testable", note=one.why))
            continue
        estimate, judged = one.judge(settings, family)
        verdict, notes = judged.verdict, [one.note]
        if verdict == "not testable":
            notes = [judged.reason, one.note]
        table.add(
            Claim(
                one.name, one.statement, one.measured, verdict, estimate, judged.lower, judged.upper, one.n, one.n,
                "; ".join(text for text in notes if text), judged.mark, judged.size, family,
                together if family > 1 else "",
            )
        )  # fmt: skip
    return table


def _lacks(trials: Trials, name: str, part: str) -> str:
    """Why a claim is not testable; "" if its trials are there."""
    if name not in trials:
        return f"this run has no {part}"
    return "no word was predicted" if trials[name].empty else ""


def _mean(values: pd.Series, settings: Settings, bounds: tuple[float, float]) -> tuple[float, float, float]:
    """Mean over items with its interval, exact where all items agree; the whole range with fewer than two items."""
    sums = values.to_numpy(float)[None]
    n = sums.shape[1]
    resampled = settings.weights(n) @ sums.T / n
    lower, upper = widened(sums.mean(1), resampled, n, settings.level, bounds)
    ends = (np.array([bounds[0]]), np.array([bounds[1]]))
    lower, upper, _ = never_zero_width(lower, upper, sums, np.ones_like(sums), level=settings.level, bounds=ends)
    return float(sums.mean()), float(lower[0]), float(upper[0])


# --- Knock-out --------------------------------------------------------------------------------------------------------


def _at_published(trials: pd.DataFrame, circuit: str, kept: int) -> pd.DataFrame:
    return trials[
        (trials["set"] == "held-out") & (trials["circuit"] == circuit) & ~trials["complement"]
        & (trials["kept"] == kept)
    ]  # fmt: skip


def _k1(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "K1 (reasoning heads)", "the best reasoning heads alone keep agreement in all subtasks"
    measured = f"agreement in the worst subtask, {setting.published} heads kept, held-out items, is above {AGREEMENT}"
    lacks = _lacks(trials, "kept", "knock-out")
    part = pd.DataFrame() if lacks else _at_published(trials["kept"], "reasoning", setting.published)
    if lacks or part.empty:
        return _Measured(name, statement, measured, why=lacks or "no reasoning score: no one-hop inference was right")
    wide = part.pivot(index="item", columns="subtask", values="agrees").astype(float)
    drawn = _at_published(trials["kept"], "random", setting.published)
    control = drawn.groupby("subtask")["agrees"].mean().min() if len(drawn) else math.nan

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        table = family_intervals(wide.to_numpy(), wide.index, [(0.0, 1.0)] * wide.shape[1], settings)
        lower, upper = float(table["lower"].min()), float(table["upper"].min())
        return float(table["estimate"].min()), judge_presence(lower, upper, above=AGREEMENT, family=family)

    note = f"as many random heads: {control:.2f} in their worst subtask" if not math.isnan(control) else ""
    return _Measured(name, statement, measured, judge, n=len(wide), note=note)


def _k2(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "K2 (other rankings)", "the best heads by the copy or the decision score do not keep agreement"
    measured = (
        f"the larger mean agreement of the two, {setting.published} heads kept, held-out items, is below {AGREEMENT}"
    )
    lacks = _lacks(trials, "kept", "knock-out")
    columns = {}
    for circuit in () if lacks else ("copy", "decision"):
        part = _at_published(trials["kept"], circuit, setting.published)
        if len(part):
            columns[circuit] = part.groupby("item")["agrees"].mean()
    if lacks or len(columns) < 2:
        return _Measured(name, statement, measured, why=lacks or "a score is missing: no such word was predicted")
    wide = pd.DataFrame(columns).astype(float)

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        table = family_intervals(wide.to_numpy(), wide.index, [(0.0, 1.0)] * 2, settings)
        lower, upper = float(table["lower"].max()), float(table["upper"].max())
        return float(table["estimate"].max()), judge_presence(lower, upper, below=AGREEMENT, family=family)

    return _Measured(name, statement, measured, judge, n=len(wide))


# --- Where heads stand ------------------------------------------------------------------------------------------------


def _half_claim(
    name: str, statement: str, measured: str, best: pd.DataFrame, half: Callable[[pd.Series], pd.Series]
) -> _Measured:
    """Share of each item's best heads that stand in a half of the model, above one half."""
    values = half(best["block"]).groupby(best["item"]).mean()

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        estimate, lower, upper = _mean(values, settings, (0.0, 1.0))
        return estimate, judge_presence(lower, upper, above=0.5, family=family)

    median = best["block"].median()
    return _Measured(name, statement, measured, judge, n=len(values), note=f"median block {median:g}")


def _w1(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "W1 (writers)", "answer-writing heads stand in the later half of the model"
    measured = "share of the 10 heads that give the word most probability alone, in the later half, is above 0.5"
    lacks = _lacks(trials, "writers", "writers")
    if lacks:
        return _Measured(name, statement, measured, why=lacks)
    best = top_heads(trials["writers"], "alone", ["item", "subtask"])
    return _half_claim(name, statement, measured, best, lambda block: block > setting.n_blocks / 2)


def _w2(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "W2 (movers)", "heads that attend from a word to the one it is related to stand in the first half"
    measured = "share of the 10 heads with most attention from object to subject, in the first half, is above 0.5"
    lacks = _lacks(trials, "movers", "flow")
    if lacks:
        return _Measured(name, statement, measured, why=lacks)
    rows = trials["movers"].assign(contrast=lambda table: table["attention"] - table["control"])
    best = top_heads(rows, "contrast", ["item"])
    return _half_claim(name, statement, measured, best, lambda block: block <= setting.n_blocks / 2)


# --- Flow -------------------------------------------------------------------------------------------------------------


def _f1(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "F1 (pathways)", "several pathways write the word at once"
    measured = "share of words that writers write from two sources or more (0.1 of it each) is above 0.5"
    lacks = _lacks(trials, "sources", "flow")
    if lacks:
        return _Measured(name, statement, measured, why=lacks)
    rows = pathway_rows(trials["sources"], writer_table(trials["writers"], setting.settings))
    values = (rows["pathways"] > 1).groupby(rows["item"]).mean()

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        estimate, lower, upper = _mean(values, settings, (0.0, 1.0))
        return estimate, judge_presence(lower, upper, above=0.5, family=family)

    return _Measured(name, statement, measured, judge, n=len(values), note=_backup(trials))


def _backup(trials: Trials) -> str:
    """What corrupting mentions says beside it."""
    if "mentions" not in trials or trials["mentions"].empty:
        return ""
    p = trials["mentions"].groupby("corruption", observed=True)["probability"].mean()
    return (
        f"probability of inferred words {p['none']:.2f}; with its mention in the question exchanged "
        f"{p['question']:.2f}, in the chain {p['chain']:.2f}, in both {p['both']:.2f}"
    )


def _f2(trials: Trials, setting: Setting) -> _Measured:
    name = "F2 (demonstrations)"
    statement = f"demonstrations lose influence from subtask 0 to {setting.last}"
    measured = f"their share in what writers write, at subtask 0 less at subtask {setting.last}, is above 0"
    lacks = "there are no demonstrations" if not setting.demonstrations else _lacks(trials, "sources", "flow")
    if lacks:
        return _Measured(name, statement, measured, why=lacks)
    rows = source_rows(trials["sources"], writer_table(trials["writers"], setting.settings))
    wide = rows[rows["part"] == "demonstrations"].pivot(index="item", columns="subtask", values="share")
    if not {0, setting.last} <= set(wide.columns) or wide[[0, setting.last]].dropna().empty:
        return _Measured(name, statement, measured, why="no item of which both words were predicted")
    values = (wide[0] - wide[setting.last]).dropna()

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        estimate, lower, upper = _mean(values, settings, (-1.0, 1.0))
        return estimate, judge_presence(lower, upper, above=0.0, family=family)

    return _Measured(name, statement, measured, judge, n=len(values))


# --- Streams ----------------------------------------------------------------------------------------------------------


def _r1(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "R1 (rift)", "the context overtakes pretraining at half depth"
    measured = f"depth of the crossing less 0.5 (of all layers) is within {HALF_WITHIN}"
    lacks = _lacks(trials, "rift", "rift")
    if lacks:
        return _Measured(name, statement, measured, why=lacks)
    depth, resampled, n = crossings(trials["rift"], setting.settings)
    if math.isnan(depth):
        return _Measured(name, statement, measured, why="pretraining leads to the last layer: there is no crossing")
    if not resampled.any():
        return _Measured(name, statement, measured, why="the context leads from the embedding on: nothing is overtaken")

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        lower, upper = widened(np.array([depth]), resampled[:, None], n, settings.level, (0.0, 1.0))
        interval = float(lower[0]) - 0.5, float(upper[0]) - 0.5
        return depth - 0.5, judge_absence(*interval, HALF_WITHIN, family=family)

    return _Measured(name, statement, measured, judge, n=n, note=f"crossing at {depth:.2f} of the depth")


def _m1(trials: Trials, setting: Setting) -> _Measured:
    name, statement = "M1 (mixing)", "what a small network reads of two words' relation peaks in the middle"
    measured = "accuracy in the middle third of layers less that in the first or the last third (the smaller), above 0"
    lacks = _lacks(trials, "mixing", "mixing")
    if lacks:
        return _Measured(name, statement, measured, why=lacks)
    rows = trials["mixing"]
    rows = rows[(rows["probe"] == "mlp") & (rows["labels"] == "true")]
    third = np.minimum(rows["layer"] * 3 // (setting.n_blocks + 1), 2)
    wide = rows["correct"].astype(float).groupby([rows["text"], third]).mean().unstack()
    if wide.shape[1] < 3:
        return _Measured(name, statement, measured, why="the layers of the probes do not reach all thirds")
    values = np.stack([wide[1] - wide[0], wide[1] - wide[2]], axis=1)
    codes, names = cluster_codes(wide.index)
    sums, _ = cluster_sums(values, codes, len(names))

    def judge(settings: Settings, family: int) -> tuple[float, Judgement]:
        def smaller(total: np.ndarray) -> np.ndarray:
            return total.min(1) / len(names)

        estimate, _, _ = interval_of(smaller, sums, weights=settings.weights(len(names)), n_clusters=len(names))
        resampled = smaller(settings.weights(len(names)) @ sums.T)[:, None]
        lower, upper = widened(estimate, resampled, len(names), settings.level, (-1.0, 1.0))
        return float(estimate[0]), judge_presence(float(lower[0]), float(upper[0]), above=0.0, family=family)

    return _Measured(name, statement, measured, judge, n=len(names))
