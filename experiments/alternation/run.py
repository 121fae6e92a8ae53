"""`codi alternation`: do even latents store and odd latents compute? One test with one verdict.

    hypothesis.py   what is measured, what is predicted and by which rules, before the numbers
    observe.py      the model on the prompts, as trial tables
    measures.py     from the tables to one number per prompt and latent
    profiles.py     the measures of the test
    verdict.py      the rule
    claims.py       published claims about single latents, on the same observations

Runs as `codi alternation` or `python -m experiments.alternation`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.alternation import observe
from experiments.alternation.claims import published_claims
from experiments.alternation.figures import draw, draw_states
from experiments.alternation.hypothesis import MEASURES, RULES, TUNED_MEASURES
from experiments.alternation.measures import Observations
from experiments.alternation.options import AlternationOptions
from experiments.alternation.profiles import profiles_of
from experiments.alternation.verdict import analyse, contrast_weights, labellings, summary
from experiments.statistics.clusters import Settings
from experiments.study.lens_files import lens_digest
from experiments.study.parts import Part
from experiments.study.result import Result, Section
from experiments.study.run import Findings, Study, Trials, run_study, study_identity, to_stderr
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "main", "run"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved.

    Attributes:
        therefore: token ids of the forms of "therefore" that are one token.
        lens: folder of tuned lenses, "" for none.
    """

    n_latents: int
    d_model: int
    therefore: tuple[int, ...]
    lens: str
    lens_name: str
    seed: int
    batch_size: int
    max_new_tokens: int | None
    settings: Settings
    asked: str


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
    return Plan(
        n_latents=model.n_latents,
        d_model=model.d_model,
        therefore=_therefore_tokens(model),
        lens="" if options.lens is None else str(options.lens),
        lens_name=options.lens_name,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        settings=dataclasses.replace(options.statistics(options.seed), alpha=options.alpha),
        asked=options.asked,
    )


def _therefore_tokens(model: CodiModel) -> tuple[int, ...]:
    forms = ("therefore", " therefore", "Therefore", " Therefore")
    ids = [model.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    return tuple(sorted({found[0] for found in ids if len(found) == 1}))


def identity(options: AlternationOptions, model: CodiModel, prompts: Split) -> dict[str, Any]:
    """What decides the trials: as of every study, and the weights of the lenses that are read."""
    return {**study_identity(options, model, prompts), "lens": lens_digest(options.lens)}


def parts(plan: Plan) -> list[Part]:
    """One part per table."""
    size: dict[str, Any] = {"batch_size": plan.batch_size}
    arguments: dict[str, dict[str, Any]] = {
        "prompts": {},
        "forms": {},
        "positions": {**size, "lens": plan.lens, "lens_name": plan.lens_name},
        "answers": {**size, "max_new_tokens": plan.max_new_tokens},
    }
    names = ("prompts", "forms", "positions", "reference", "places", "direction", "probes", "attention", "answers")
    return [
        Part(name, getattr(observe, name), arguments.get(name, size), plan.seed, observe.SCHEMAS[name])
        for name in names
    ]


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Verdict, tables, figures and claims."""
    observations = Observations.of(trials)
    assert observations.correct_after is not None
    accuracy = float(observations.correct_after[:, -1].mean())
    result = analyse(profiles_of(observations), plan.settings, accuracy)
    claims = published_claims(observations, result, therefore=plan.therefore, d_model=plan.d_model)
    rules = {
        "rules": RULES,
        "measures": [asdict(measure) for measure in (*MEASURES, *TUNED_MEASURES)],
        "splits": ["".join(map(str, side)) for side in labellings(plan.n_latents)[0]],
        "settings": asdict(plan.settings),
    }
    return Findings(
        [Section(f"{plan.asked}, accuracy {accuracy:.3f}."), Section(summary(result))],
        {"tests": result.tests, "latents": result.levels},
        lambda: {"alternation": draw(result), "states": draw_states(observations, plan.seed)},
        {
            "alternation": "Every measure at every latent, even and odd apart, with its verdict.",
            "states": "Latents in the plane of their first two components, and attention among latents.",
        },
        claims,
        {"rules.json": (json.dumps(rules, indent=2, ensure_ascii=False) + "\n").encode()},
    )


STUDY = Study(
    options=AlternationOptions,
    title="Alternation of latents",
    prompts=lambda options, suffix: options.load_split(options.seed, suffix, known_steps=1),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    attention="eager",
    identity=identity,
)


def run(
    options: AlternationOptions, model: CodiModel, prompts: Split, say: Callable[[str], None] | None = None
) -> Result:
    """The study on a loaded model."""
    return run_study(STUDY, options, model, prompts, say)


def main(options: AlternationOptions) -> None:
    """Load, run, print the summary."""
    print(run_study(STUDY, options, say=to_stderr).markdown())


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
