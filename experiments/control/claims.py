"""The claims of the paper on control vectors, judged on the test items at what the validation items chose.

    R1 (beyond random)  some alpha raises accuracy beyond random directions of the same norm
    R2 (coherent)       accuracy and p(right) rise and entropy falls
    R3 (KL)             KL to the unsteered model is 0 at alpha 0 and grows to both sides
    R4 (middle layer)   the middle layer is as good as the best one
    R5 (both signs)     +alpha and −alpha both raise accuracy (the published Pythia row shows it, a sign that the
                        direction is not what helps)

Each is held, not held, undecided or not testable (experiments/study/claims.py); one of several parts is held if all
are, not held if one is not. A rise counts from MARGIN on, so that a vector without effect ends as "not held" where
there are items enough. Transfer between tasks (R6) is judged by `codi control transfer`.

Source of the claims: Højer, Jarvis, Heinrich 2025, arXiv 2504.19483. Knows nothing about models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.control.cells import Choice, choose, choose_both, validation_table
from experiments.control.trials import BY, UNSTEERED
from experiments.statistics.beyond import Beyond, beyond_draws, judge_beyond
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import per_prompt
from experiments.study.claims import Claim, ClaimsTable, effect_claim
from experiments.study.verdicts import Question, judged_together, no_room

__all__ = ["LAYER_SIZE", "MARGIN", "NATS", "all_of", "beyond_random", "claims_of", "draws_of"]

MARGIN = 0.02
"""A rise of accuracy or probability by less than this (two points) counts as none."""
NATS = 0.02
"""A fall of entropy by less than this counts as none."""
LAYER_SIZE = 0.05
"""The middle layer is as good as the best one if it loses less than this (five points of accuracy)."""
ORDER = ("not testable", "not held", "undecided", "held")
STEPS = 3
"""Steps of |alpha| at which KL has to grow, on each side."""


def all_of(name: str, statement: str, measured: str, parts: Sequence[Claim], note: str = "") -> Claim:
    """One claim of several parts: the verdict, number and interval are those of the weakest part."""
    weakest = min(parts, key=lambda part: ORDER.index(part.verdict))
    others = [f"{part.name}: {part.number}, {part.answer}" for part in parts] if len(parts) > 1 else []
    reason = weakest.note if weakest.verdict == "not testable" else ""
    text = "; ".join(one for one in (reason, *others, note) if one)
    return dataclasses.replace(weakest, name=name, statement=statement, measured=measured, note=text)


def draws_of(trials: pd.DataFrame, choice: Choice, outcome: str = "correct") -> pd.DataFrame:
    """(prompt × draw) values of the random directions of a cell, with the index (cluster, prompt_id)."""
    same = (trials["method"] == choice.method) & (trials["layer"] == choice.layer)
    chosen = trials[(trials["kind"] == "random") & same & np.isclose(trials["alpha"], abs(choice.alpha))]
    return chosen.pivot_table(
        index=["cluster", "prompt_id"], columns="draw", values=outcome, aggfunc="mean", observed=True
    ).astype(float)  # fmt: skip


def beyond_random(trials: pd.DataFrame, choice: Choice, settings: Settings, outcome: str = "correct") -> Beyond | None:
    """A chosen cell beside its random directions; None where there are none."""
    draws = draws_of(trials, choice, outcome)
    if draws.empty:
        return None
    own = per_prompt(trials[trials["kind"] != "random"], [choice.selector], BY, outcome)[0].reindex(draws.index)
    clusters = draws.index.get_level_values("cluster").to_numpy()
    return beyond_draws(own.to_numpy(), draws.to_numpy(), clusters, settings)


def claims_of(
    validation: pd.DataFrame, test: pd.DataFrame, layers: Sequence[int], middle: int, settings: Settings
) -> ClaimsTable:
    """R1 to R5.

    Args:
        validation, test: trials of both parts.
        layers: that were steered.
        middle: the published choice of layer.
        settings: resamples, level, seed.
    """
    table = validation_table(validation)
    choice, both = choose(table), choose_both(table)
    asked = [
        *_rises(test, choice), *_both(test, both), *_grows(test, choice), *_middle(test, table, layers, middle),
    ]  # fmt: skip
    plain = per_prompt(test, [UNSTEERED], BY)
    clusters = plain.index.get_level_values("cluster").to_numpy()
    judged = {claim.name: claim for claim in judged_together(asked, clusters, settings)}
    cell = f"{choice.method}, layer {choice.layer}, alpha {choice.alpha:g}, chosen on validation items"
    rule = f"accuracy({choice.alpha:g}) − accuracy(0), and − that of random directions, above {MARGIN}"
    found = [
        all_of(
            "R1 (beyond random)", "some alpha raises accuracy beyond random directions", f"{rule}; first of them",
            [judged["gain"], _beyond_claim(test, choice, settings)], cell,
        ),
        all_of(
            "R2 (coherent)", "accuracy and p(right) rise while entropy falls",
            f"changes above {MARGIN}, above {MARGIN}, below −{NATS} nats", [judged[one] for one in RISES], cell,
        ),
        _kl_claim(test, choice, [claim for name, claim in judged.items() if name.startswith("KL")]),
        dataclasses.replace(judged["middle"], name="R4 (middle layer)"),
        all_of(
            "R5 (both signs)", "both signs of alpha raise accuracy",
            "accuracy − accuracy(0) at +alpha and at −alpha above " + f"{MARGIN}", [judged["plus"], judged["minus"]],
            "" if both is None else f"{both.method}, layer {both.layer}, |alpha| {both.alpha:g}, chosen on validation",
        ),
    ]  # fmt: skip
    return ClaimsTable(found)


# --- Parts of claims --------------------------------------------------------------------------------------------------

RISES = ("gain", "p(right)", "entropy")


def _change(test: pd.DataFrame, selector: Mapping[str, object], outcome: str) -> tuple[np.ndarray, float]:
    """(prompt,) change from the unsteered model, and the mean of that."""
    values = per_prompt(test[test["kind"].isin(("none", "vector"))], [selector, UNSTEERED], BY, outcome)
    return (values[0] - values[1]).to_numpy(), float(values[1].mean())


def _gain(name: str, test: pd.DataFrame, selector: Mapping[str, object], outcome: str = "correct") -> Question:
    change, before = _change(test, selector, outcome)
    return Question(
        name, "a share rises", "", change, above=MARGIN, bounds=(-1, 1), room=(-before, 1 - before),
        blocked=no_room(before, "above", MARGIN),
    )  # fmt: skip


def _rises(test: pd.DataFrame, choice: Choice) -> list[Question]:
    change, before = _change(test, choice.selector, "entropy")
    low = f"the unsteered entropy is {before:.3f} nats: it cannot fall by {NATS}" if before < NATS else ""
    return [
        _gain("gain", test, choice.selector),
        _gain("p(right)", test, choice.selector, "p_right"),
        Question("entropy", "entropy falls", "", change, below=-NATS, blocked=low),
    ]


def _both(test: pd.DataFrame, both: Choice | None) -> list[Question]:
    if both is None:
        why = "no alpha was tried with both signs"
        return [Question(name, "both", "", np.empty(0), above=MARGIN, blocked=why) for name in ("plus", "minus")]
    return [_gain("plus", test, both.selector), _gain("minus", test, both.mirror)]


def _grows(test: pd.DataFrame, choice: Choice) -> list[Question]:
    """KL from step to step away from 0, on both sides."""
    own = test[(test["kind"] == "vector") & (test["method"] == choice.method) & (test["layer"] == choice.layer)]
    questions = []
    for sign in (-1, 1):
        sizes = sorted({abs(alpha) for alpha in own["alpha"] if alpha * sign > 0})
        if len(sizes) < 2:
            why = f"fewer than two alphas {'above' if sign > 0 else 'below'} 0 were tried"
            questions.append(Question(f"KL {sign:+d}", "KL grows", "", np.empty(0), above=0.0, blocked=why))
            continue
        places = sorted({round((len(sizes) - 1) * step / (STEPS - 1)) for step in range(STEPS)})
        alphas = [0.0, *(sign * sizes[place] for place in places)]
        values = per_prompt(own, [{**choice.selector, "alpha": alpha} for alpha in alphas], BY, "kl").to_numpy()
        for step in range(1, len(alphas)):
            name = f"KL({alphas[step]:g}) − KL({alphas[step - 1]:g})"
            questions.append(Question(name, "KL grows", "", values[:, step] - values[:, step - 1], above=0.0))
    return questions


def _middle(test: pd.DataFrame, table: pd.DataFrame, layers: Sequence[int], middle: int) -> list[Question]:
    """The middle layer at its own best alpha against the best other layer at its own."""
    statement, why = "the middle layer is a good choice", ""
    others = [layer for layer in layers if layer != middle]
    if middle not in layers or len(others) < 2:
        why = f"it takes the middle layer ({middle}) and at least two others, {len(layers)} of all layers were steered"
    elif (table["correct"] <= table["baseline"]).all():
        why = "no layer raises accuracy on the validation items: there is nothing to choose between"
    if why:
        return [Question("middle", statement, "", np.empty(0), absent=LAYER_SIZE, side="below", blocked=why)]
    own, best = choose(table, layers=[middle]), choose(table, layers=others)
    values = per_prompt(test[test["kind"] == "vector"], [own.selector, best.selector], BY)
    rule = (
        f"accuracy at layer {middle} (alpha {own.alpha:g}) − at the best other layer, {best.layer} (alpha "
        f"{best.alpha:g}), above −{LAYER_SIZE}"
    )
    change = (values[0] - values[1]).to_numpy()
    return [Question("middle", statement, rule, change, absent=LAYER_SIZE, side="below", bounds=(-1, 1))]


def _beyond_claim(test: pd.DataFrame, choice: Choice, settings: Settings) -> Claim:
    """Accuracy against random directions of the same norm."""
    name = "beyond random"
    found = beyond_random(test, choice, settings)
    if found is None:
        return Claim(name, name, "", "not testable", note="there are no random directions to compare with")
    row = {"estimate": found.estimate, "n": found.n, "n_clusters": found.n_clusters}
    return effect_claim(name, name, "", judge_beyond(found, MARGIN, settings.alpha), row, of="estimate")


def _kl_claim(test: pd.DataFrame, choice: Choice, steps: Sequence[Claim]) -> Claim:
    statement = "KL to the unsteered model is 0 at alpha 0 and grows to both sides"
    zero = test[(test["kind"] == "vector") & (test["alpha"] == 0)]["kl"].abs().max()
    rule = "mean KL in nats grows from step to step of |alpha|; the step that is least certain is shown"
    if zero > 0:
        return Claim("R3 (KL)", statement, "largest KL at alpha 0", "not held", float(zero))
    return all_of("R3 (KL)", statement, rule, steps, f"{choice.method}, layer {choice.layer}; KL at 0 is exactly 0")
