"""`codi cot eval`: the chosen steering on test questions, beside the prompts and the controls.

For each way of steering, at the layer and coefficient that the grid chose (or that are given):

    no sentence     the vector; −c; the vector without the question's own family of sets; random directions and shuffled
                    vectors of the same norm; the coefficient that the other way of steering has
    step by step    −c, and random directions

and without steering: no sentence, the sentence that asks for an answer at once, the step-by-step sentence. All of it on
the same questions, none of which the vector was derived from or the cell was chosen on (checked).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.cot.asking import UNSTEERED, Asking, ask, condition
from experiments.cot.claims import CLAIMS_SIZE, claims_of
from experiments.cot.eval_figures import figures
from experiments.cot.eval_words import samples_text, words
from experiments.cot.measures import CONDITION, TRIALS
from experiments.cot.options import EvalOptions
from experiments.cot.places import ITEMS
from experiments.cot.tables import all_levels
from experiments.cot.vectors import Vectors, folder_hash, read_choice, refuse_used, used_by
from experiments.statistics.clusters import Settings
from experiments.statistics.effects import compare
from experiments.study.parts import Part, Workbench
from experiments.study.run import Findings, Study, Trials, language_identity
from experiments.tasks.item_sets import family_of
from experiments.tasks.items import ItemSplits
from lm.model import LanguageModel

__all__ = ["STUDY", "Plan", "conditions_of", "main", "run"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        chosen: way of steering -> layer and coefficient.
        draws: random directions.
        shuffles: shuffled vectors that there are.
        held_out: whether a question can have a vector that has not seen its family.
    """

    chosen: Mapping[str, tuple[int, float]]
    draws: int
    shuffles: int
    held_out: bool
    margin: float
    samples: int
    asking: Asking
    settings: Settings
    used: bytes


def make_plan(options: EvalOptions, model: LanguageModel, prompts: ItemSplits) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: a layer that the vector does not have, a coefficient that is not above 0, no test questions, a
            vector of another model, or questions that were used before.
    """
    chosen = cells_of(options)
    vectors = Vectors.read(options.vectors, model)
    for way, (layer, coefficient) in chosen.items():
        vectors.whole.only([layer])  # refuses a layer that the vector does not have
        if not coefficient > 0:
            raise ValueError(f"the coefficient of {way} steering must be above 0, got {coefficient:g}")
    if not prompts.test:
        raise ValueError("there are no test questions")
    refuse_used(options.vectors, prompts.test, "test")
    if options.continuous is None or options.single is None:
        refuse_used(options.grid, prompts.test, "test")
    return Plan(
        chosen=chosen,
        draws=options.draws,
        shuffles=len(vectors.shuffled),
        held_out=bool(vectors.without) or not _seen(prompts),
        margin=options.margin,
        samples=options.samples,
        asking=Asking.of(options, options.seed, options.batch_size),
        settings=options.statistics(options.seed),
        used=used_by(prompts.test, "test"),
    )


def cells_of(options: EvalOptions) -> dict[str, tuple[int, float]]:
    """Layer and coefficient of each way of steering, given or chosen by the grid."""
    given = {"continuous": options.continuous, "single": options.single}
    read = read_choice(options.grid) if None in given.values() else {}
    return {way: cell if cell is not None else read[way] for way, cell in given.items()}


def _seen(prompts: ItemSplits) -> bool:
    """Whether the vector was derived from a family that is tested."""
    known = {family_of(item.task) for item in prompts.derivation}
    return any(family_of(item.task) in known for item in prompts.test)


def conditions_of(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Name of a part -> its conditions, with draws."""
    found = {prompt: [{**UNSTEERED[prompt], "draw": -1}] for prompt in UNSTEERED}
    for way, (layer, c) in plan.chosen.items():
        other = next(cell[1] for name, cell in plan.chosen.items() if name != way)
        wanted = [("neutral", "all", c, 0), ("neutral", "all", -c, 0), ("neutral", "random", c, plan.draws)]
        wanted += [("neutral", "shuffled", c, plan.shuffles)] if plan.shuffles else []
        wanted += [("neutral", "all", other, 0)] if other != c else []
        asked = [("steps", "all", -c, 0), ("steps", "random", c, plan.draws)]
        held_out = [("neutral", "held-out", c, 0)] if plan.held_out else []
        for name, group in ((way, wanted), (f"{way}-asked", asked), (f"{way}-held-out", held_out)):
            if group:
                found[name] = [
                    {**condition(prompt, way, vector, layer, coefficient), "draw": draw}
                    for prompt, vector, coefficient, draws in group
                    for draw in (range(draws) if draws else (-1,))
                ]
    return found


def parts(plan: Plan) -> list[Part]:
    """One trial table, a part for each prompt, way of steering and group of conditions that share their prompts."""
    found = []
    for name, given in conditions_of(plan).items():
        asked = {"conditions": tuple(tuple(one.items()) for one in given), "asking": plan.asking, "what": name}
        found.append(Part(name, answers, asked, plan.asking.seed, TRIALS, "answers"))
    return found


def answers(
    bench: Workbench, *, seed: int, conditions: tuple[tuple[tuple[str, Any], ...], ...], asking: Asking, what: str
) -> pd.DataFrame:
    """Answers to the test questions under some conditions."""
    return ask(bench, bench.prompts.test, [dict(one) for one in conditions], asking, what)


# --- Findings ---------------------------------------------------------------------------------------------------------


def contrasts_of(plan: Plan) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every condition against its own prompt without steering, and the prompts against none."""
    plain = [(UNSTEERED[prompt], UNSTEERED["neutral"]) for prompt in ("direct", "steps")]
    steered = {
        tuple((name, one[name]) for name in CONDITION)
        for given in conditions_of(plan).values()
        for one in given
        if one["way"]
    }
    ordered = [dict(one) for one in sorted(steered, key=str)]
    return [*plain, *((one, UNSTEERED[one["prompt"]]) for one in ordered)]


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figures, claims and words."""
    found = trials["answers"]
    tables = {"levels": all_levels(found, plan.settings)}
    tables["by_set"] = all_levels(found, plan.settings, ("set", *CONDITION), ("chain", "correct"))
    contrasts = contrasts_of(plan)
    for outcome in ("chain", "correct", "words", "repetition"):
        tables[f"effects_{outcome}"] = compare(found, contrasts, CONDITION, outcome, plan.settings)
    claims = claims_of(plan, found)
    over = f"{100 * plan.settings.level:g} % intervals over clusters"
    captions = {
        "rates": f"Rate of chains and accuracy on test questions under every condition; {over}. Draws of random and "
        "shuffled vectors are averaged. Lines: no sentence (solid), step by step (dashed).",
        "pareto": f"Accuracy, and rate of chains, against the length of the answer; {over}.",
        "sets": "Rate of chains and accuracy (per cent) by set.",
    }
    files = {"samples.md": samples_text(plan, found).encode(), ITEMS: plan.used}
    return Findings(words(plan, found, tables), tables, lambda: figures(plan.chosen, tables), captions, claims, files)


# --- Command ----------------------------------------------------------------------------------------------------------


def identity(options: EvalOptions, model: LanguageModel, prompts: ItemSplits) -> dict[str, Any]:
    """What decides the result: also the vectors, and what was chosen."""
    chosen = {way: list(cell) for way, cell in cells_of(options).items()}
    return {
        **language_identity(options, model, prompts), "vectors": folder_hash(options.vectors), "chosen": chosen,
        "size": CLAIMS_SIZE,
    }  # fmt: skip


STUDY = Study(
    options=EvalOptions,
    title="Chain-of-thought vector: what it does",
    prompts=lambda options, model: options.load_splits(options.seed, model.tokenizer),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    identity=identity,
)

run = STUDY.run
main = STUDY.main
