"""`codi alternation`: do even latents store and odd latents compute? One test with one verdict.

    hypothesis.py   what is measured, what is predicted and by which rules, before the numbers
    observe.py      the model on the prompts, as trial tables
    measures.py     from the tables to one number per prompt and latent
    profiles.py     the measures of the test, their floors and ceilings, and the sizes that matter
    verdict.py      the verdict on a task and over tasks
    claims.py       published claims about single latents, on the same observations

Runs as `codi alternation` or `python -m experiments.alternation`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.alternation import observe
from experiments.alternation.claims import published_claims
from experiments.alternation.figures import draw, draw_states
from experiments.alternation.hypothesis import MEASURES, POOLED, RULES, TUNED_MEASURES
from experiments.alternation.measures import Observations
from experiments.alternation.options import AlternationOptions
from experiments.alternation.verdict import Result, analyse, overall, summary
from experiments.statistics.alternation import contrast_weights, splits
from experiments.statistics.clusters import Settings
from experiments.study.claims import Claim, ClaimsTable
from experiments.study.lens_files import lens_digest
from experiments.study.parts import Part
from experiments.study.prompts import Asked, JoinedSplit, joined_split
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, study_identity
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "main", "run"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        tasks: which prompts are asked, task by task.
        vocabulary: number of tokens.
        therefore: token ids of the forms of "therefore" that are one token.
        lens: folder of tuned lenses, "" for none.
    """

    tasks: tuple[Asked, ...]
    n_latents: int
    d_model: int
    vocabulary: int
    therefore: tuple[int, ...]
    lens: str
    lens_name: str
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings


def make_plan(options: AlternationOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: no prompts, a model with too few latents or without attention weights.
    """
    if not prompts.derivation or not prompts.evaluation:
        counts = f"{len(prompts.derivation)} and {len(prompts.evaluation)}"
        raise ValueError(f"codi alternation needs prompts of both kinds, got {counts}")
    contrast_weights(model.n_latents)  # refuses a model with too few latents
    if model.attention != "eager":
        raise ValueError(f"attention weights need a model loaded with attention='eager', got {model.attention!r}")
    tasks = prompts.tasks if isinstance(prompts, JoinedSplit) else joined_split({options.asked: prompts}).tasks
    return Plan(
        tasks=tasks,
        n_latents=model.n_latents,
        d_model=model.d_model,
        vocabulary=len(model.tokenizer),
        therefore=_therefore_tokens(model),
        lens="" if options.lens is None else str(options.lens),
        lens_name=options.lens_name,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=dataclasses.replace(options.statistics(options.seed), alpha=options.alpha),
    )


def _therefore_tokens(model: CodiModel) -> tuple[int, ...]:
    forms = ("therefore", " therefore", "Therefore", " Therefore")
    ids = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return tuple(sorted({found[0] for found in ids if len(found) == 1}))


def identity(options: AlternationOptions, model: CodiModel, prompts: Split) -> dict[str, Any]:
    """What decides the trials: as of every study, and the weights of the lenses that are read."""
    return {**study_identity(options, model, prompts), "lens": lens_digest(options.lens)}


def parts(plan: Plan) -> list[Part]:
    """One part per task and table."""
    size: dict[str, Any] = {"batch_size": plan.batch_size}
    arguments: dict[str, dict[str, Any]] = {
        "prompts": {},
        "forms": {},
        "positions": {**size, "lens": plan.lens, "lens_name": plan.lens_name},
        "answers": {**size, "max_new_tokens": plan.max_new_tokens},
    }
    names = ("prompts", "forms", "positions", "reference", "places", "direction", "probes", "attention", "answers")
    return [
        Part(
            f"{name}-{number}",
            getattr(observe, name),
            {"asked": asked, **arguments.get(name, size)},
            plan.seed,
            observe.SCHEMAS[name],
            table=name,
        )
        for number, asked in enumerate(plan.tasks, start=1)
        for name in names
    ]


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Verdicts, tables, figures and claims."""
    results: list[Result] = []
    seen: list[Observations] = []
    claims: list[Claim] = []
    for asked in plan.tasks:
        observations = Observations.of({name: table[table["task"] == asked.task] for name, table in trials.items()})
        borrowed = results[0].sizes if results else None
        result = analyse(
            observations, plan.settings, task=asked.task, vocabulary=plan.vocabulary, borrowed=borrowed
        )  # fmt: skip
        suffix = f" ({asked.task})" if results else ""
        found = published_claims(
            observations, result, therefore=plan.therefore, d_model=plan.d_model, suffix=suffix
        )  # fmt: skip
        said = {claim.note for claim in claims if claim.verdict == "not testable"}
        # what cannot be tested for the same reason on every task is said once
        claims += [claim for claim in found if claim.verdict != "not testable" or claim.note not in said]
        results.append(result)
        seen.append(observations)
    verdict, reason = overall(results)
    sections = [Section(f"**Compute/store alternation: {verdict}** ({reason}).")]
    sections += [Section(summary(result), result.task.capitalize()) for result in results]
    names = ["" if i == 0 else f"-{i + 1}" for i in range(len(results))]
    captions = {f"alternation{name}": f"{r.task}: every measure at every latent, even and odd apart, with its answer."
                for name, r in zip(names, results, strict=True)}  # fmt: skip
    captions |= {f"states{name}": f"{r.task}: latents in the plane of two components, and attention among latents."
                 for name, r in zip(names, results, strict=True)}  # fmt: skip
    rules = {
        "rules": RULES,
        "measures": [asdict(measure) for measure in (*MEASURES, *TUNED_MEASURES, POOLED)],
        "splits": ["".join(map(str, side)) for side in splits(plan.n_latents)[0]],
        "settings": asdict(plan.settings),
    }

    def figures() -> dict[str, Any]:
        drawn = {f"alternation{name}": draw(result) for name, result in zip(names, results, strict=True)}
        return drawn | {f"states{name}": draw_states(one, plan.seed) for name, one in zip(names, seen, strict=True)}

    return Findings(
        sections,
        _tables(results, verdict, reason),
        figures,
        captions,
        ClaimsTable(claims),
        {"rules.json": (json.dumps(rules, indent=2, ensure_ascii=False) + "\n").encode()},
    )


def _tables(results: Sequence[Result], verdict: str, reason: str) -> dict[str, pd.DataFrame]:
    """tests and latents of all tasks, and the verdicts."""
    tests = [result.tests.assign(task=result.task) for result in results]
    levels = [result.levels.assign(task=result.task) for result in results]
    rows = [(result.task, result.verdict(), result.answer(), result.row()["reason"]) for result in results]
    verdicts = pd.DataFrame([*rows, ("overall", verdict, "", reason)], columns=["task", "verdict", "answer", "reason"])
    return {"tests": _first(pd.concat(tests)), "latents": _first(pd.concat(levels)), "verdicts": verdicts}


def _first(table: pd.DataFrame) -> pd.DataFrame:
    """The same with the column `task` first."""
    return table[["task", *(name for name in table.columns if name != "task")]]


STUDY = Study(
    options=AlternationOptions,
    title="Alternation of latents",
    prompts=lambda options, model: options.load_split(options.seed, model.protocol.question_suffix, known_steps=1),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    attention="eager",
    identity=identity,
)

run = STUDY.run
main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
