"""`codi eval`: how often a model is right, by number of latents and by mode of answering, with intervals.

The prompt and the longest thought are computed once per problem; an answer after k latents starts from that run cut
after latent k. Intervals are bootstrap intervals over clusters (problems that share their numbers are not independent).
Text without a number is wrong and counted apart.

With a folder as `--out` it is a study like any other: one part of the table `answers` per mode, the table `accuracy`,
result.json. Otherwise the same parts are computed in memory, and the table is printed (and written to one file).
Runs as `codi eval` or `python -m experiments.evaluate`. Knows nothing about steering.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from experiments.evaluate.accuracy import accuracy_table, markdown
from experiments.evaluate.options import EvalOptions
from experiments.statistics.clusters import Settings
from experiments.study.folder import RunFolder, write_whole
from experiments.study.modes import evaluate
from experiments.study.parts import Part, Workbench, run_here
from experiments.study.progress import progress
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials, run_study, to_stderr
from experiments.tasks.split import Split
from lm.terms import AnswerMode

if TYPE_CHECKING:
    from codi import CodiModel

__all__ = ["STUDY", "Plan", "main"]

ANSWERS = pa.schema({
    "mode": pa.string(), "n_latents": pa.int64(), "prompt_id": pa.string(), "cluster": pa.string(),
    "operation": pa.string(), "n_steps": pa.int64(), "answer": pa.float64(), "text": pa.string(),
    "prediction": pa.float64(), "correct": pa.bool_(), "parsed": pa.bool_(),
})  # fmt: skip
"""One row per problem and condition; n_latents is -1 outside mode "latent"."""


@dataclass(frozen=True)
class Plan:
    """What is answered, and what is said about it."""

    modes: tuple[AnswerMode, ...]
    counts: tuple[int, ...]
    """Numbers of latents for mode "latent"."""
    max_new_tokens: int | None
    temperature: float
    seed: int
    batch_size: int
    settings: Settings
    asked: str
    """The problems, in words."""


def make_plan(options: EvalOptions, model: CodiModel, prompts: Split) -> Plan:
    """Options resolved against model and prompts."""
    problems = prompts.evaluation
    clusters = {problem.cluster or problem.prompt_id for problem in problems}
    counts = range(model.n_latents + 1) if options.latents is None else options.latents
    return Plan(
        modes=tuple(dict.fromkeys(options.modes)),
        counts=tuple(sorted(set(counts))),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        settings=options.statistics(options.seed),
        asked=f"{options.task}, split {options.split}, {len(problems)} problems in {len(clusters)} clusters",
    )


def parts(plan: Plan) -> list[Part]:
    """One part per mode."""
    return [
        Part(
            f"answers-{mode}",
            answers,
            {
                "mode": mode,
                "counts": plan.counts,
                "max_new_tokens": plan.max_new_tokens,
                "temperature": plan.temperature,
                "batch_size": plan.batch_size,
            },
            plan.seed,
            ANSWERS,
            table="answers",
        )
        for mode in plan.modes
    ]


def answers(
    bench: Workbench,
    *,
    mode: AnswerMode,
    counts: tuple[int, ...],
    max_new_tokens: int | None,
    temperature: float,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """The answers of one mode to every problem."""
    problems = bench.prompts.evaluation
    total = len(problems) * (len(counts) if mode == "latent" else 1)
    with bench.bar(total, "answer", f"answering ({mode})") as advance:
        return evaluate(
            bench.model,
            problems,
            modes=(mode,),
            latents=counts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            advance=advance,
        )


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Accuracies with intervals."""
    table = accuracy_table(trials["answers"], plan.settings)
    words = (
        f"Fraction right [{100 * plan.settings.level:g} % bootstrap interval over clusters]; "
        "answers without a number are wrong."
    )
    return Findings([Section(f"{plan.asked}."), Section(words), Section(markdown(table))], {"accuracy": table})


STUDY = Study(
    options=EvalOptions,
    title="Accuracy",
    prompts=lambda options, model: options.load_problems(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
)


def main(options: EvalOptions) -> None:
    """Load, answer, print the table, write what was asked for."""
    if options.folder is not None:
        result = run_study(STUDY, options, say=to_stderr)
        print(result.markdown())
        if options.write_answers is not None:
            names = [f"answers-{mode}" for mode in dict.fromkeys(options.modes)]
            trials = RunFolder(result.path).read_parts(names)
            if (trials["answer"] % 1 == 0).all():  # a file of whole numbers, as they were asked
                trials["answer"] = trials["answer"].astype("int64")
            _write_answers(options.write_answers, trials)
        return
    model = options.load(STUDY.attention)
    prompts = STUDY.prompts(options, model)
    plan = make_plan(options, model, prompts)
    bench = Workbench(model, prompts, bar=progress)
    trials = pd.concat([pd.DataFrame(rows) for _, rows in run_here(parts(plan), bench)], ignore_index=True)
    found = conclude(plan, {"answers": trials})
    title = f"# {STUDY.title}: {model.name}"
    print("\n\n".join([title, *(section.markdown() for section in found.sections)]))
    if options.out is not None:
        table = found.tables["accuracy"]
        csv_wanted = options.out.suffix == ".csv"
        write_whole(options.out, (table.to_csv(index=False) if csv_wanted else _report(options, model, table)).encode())
    if options.write_answers is not None:
        _write_answers(options.write_answers, trials)


def _write_answers(path: Path, trials: pd.DataFrame) -> None:
    """One row per answer, columns as in the trial table."""
    write_whole(
        path, trials[ANSWERS.names].to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC).encode()
    )  # texts may hold line ends


def _report(options: EvalOptions, model: CodiModel, table: pd.DataFrame) -> str:
    given: dict[str, Any] = dataclasses.asdict(options)
    content = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "checkpoint_hash": model.checkpoint_hash,
        "protocol": model.protocol.to_dict(),
        "device": str(model.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "accuracy": table.to_dict(orient="records"),
    }
    return json.dumps(content, indent=2) + "\n"


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
