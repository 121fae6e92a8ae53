"""`codi lens train`: tuned lenses on every latent × layer, trained in one pass over streamed rollouts.

    lenses/NAME/        one folder per lens, in tuned_lens's format
    history.csv         loss and validation KL of every look
    training_values.csv how often each number was an answer or a step of the training questions
    held_out.csv        KL to the model's output on held-out questions
    state.pt            while it trains: from where the same command goes on

How lenses are trained is in lenses/training.py; here is which questions they see, and the run folder.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from codi import CodiModel
from experiments.lens.held_out import held_out_figures, held_out_table, held_out_text
from experiments.lens.options import TrainOptions
from experiments.lens.prompts import per_cent, printed
from experiments.lens.saved import lens_identity
from experiments.study.folder import RunFolder, open_run
from experiments.study.progress import no_bar, progress
from experiments.study.result import FILE, Result, Section
from experiments.study.run import Findings, to_stderr, write_result
from experiments.tasks import Problem, generator_of, is_endless, load_task, split_by_cluster, with_suffix
from lenses.latent_lens import lens_positions, save_lens, slug
from lenses.training import LensTraining, TrainingOptions

__all__ = [
    "batch_of_step",
    "main",
    "named_lenses",
    "run",
    "training_options",
    "training_split",
    "value_frequencies",
]

TITLE = "Tuned lenses of latents"
DIGITS_AS_TEXT = {"lens": str}


# --- What is trained on what ------------------------------------------------------------------------------------------


def training_split(options: TrainOptions, suffix: str) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Training, validation and test questions that share no cluster and no numbers."""
    counts = {"train": options.prompts, "derivation": options.validation, "test": options.test}
    if is_endless(options.task):
        parts = [load_task(options.task, split, n, options.seed, **options.bounds) for split, n in counts.items()]
    else:
        if generator_of(options.task):
            rest, test = (load_task(options.task, split, None, options.seed) for split in ("derivation", "test"))
        else:
            comma = options.decimal_comma
            problems = load_task(options.task, options.split, None, options.seed, decimal_comma=comma, **options.bounds)
            rest, test = split_by_cluster(problems, 0.85, options.seed)
        training, validation = split_by_cluster(rest, 0.85, options.seed)
        chosen = zip((training, validation, test), counts.values(), strict=True)
        parts = [_choice(problems, number, options.seed) for problems, number in chosen]
    train, validation, test = (with_suffix(part, suffix) for part in parts)
    return train, validation, test


def _choice(problems: list[Problem], number: int | None, seed: int) -> list[Problem]:
    if number is None or number >= len(problems):
        return problems
    return [problems[i] for i in sorted(random.Random(f"lens-{seed}").sample(range(len(problems)), number))]


def batch_of_step(items: Sequence[str], size: int, seed: int, step: int) -> list[str]:
    """The batch of a step: passes over a seeded shuffle, a pure function of its arguments."""
    per_pass = max(1, len(items) // size)
    turn, index = divmod(step, per_pass)
    order = list(range(len(items)))
    random.Random(f"lens-{seed}-{turn}").shuffle(order)
    return [items[i] for i in order[index * size : (index + 1) * size]]


def value_frequencies(problems: Iterable[Problem]) -> dict[float, tuple[int, int]]:
    """Value -> (problems with this answer, problems with it as an earlier step)."""
    as_answer: Counter[float] = Counter()
    as_step: Counter[float] = Counter()
    for problem in problems:
        as_answer[float(problem.answer)] += 1
        as_step.update({float(value) for value in problem.intermediates[:-1]})
    return {value: (as_answer[value], as_step[value]) for value in sorted(as_answer.keys() | as_step.keys())}


def named_lenses(names: Sequence[str], n_latents: int) -> dict[str, tuple[int, ...]]:
    """Name -> positions, "each" spelled out.

    Raises:
        ValueError: an unknown name, a latent that the model does not have, or no name.
    """
    if not names:
        raise ValueError("lenses must name at least one lens, got none")
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name == "each":
            found |= {str(position): (position,) for position in range(n_latents + 1)}
        else:
            found[" ".join(name.lower().split())] = lens_positions(name, n_latents)
    return found


def training_options(options: TrainOptions) -> TrainingOptions:
    """How the lenses are trained; checked.

    Raises:
        ValueError: an option outside its range.
    """
    common: dict[str, Any] = {"text_tokens": options.text_tokens, "seed": options.seed, "steps": options.steps}
    if options.legacy:
        return TrainingOptions(
            lr=1e-3,
            weight_decay=0.0,
            clip=float("inf"),
            evaluate_every=100,
            target="published",
            schedule="constant",
            early_stopping=False,
            **common,
        )
    return TrainingOptions(
        optimizer=options.optimizer,
        lr=options.lr,
        weight_decay=options.weight_decay,
        patience=options.patience,
        evaluate_every=options.evaluate_every,
        **common,
    )


def _passages(options: TrainOptions) -> list[str] | None:
    """Lines of the text file, if there is one."""
    if options.text is None:
        return None
    passages = [line for line in options.text.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not passages:
        raise ValueError(f"{options.text} holds no text")
    return passages


# --- The run ----------------------------------------------------------------------------------------------------------


def run(
    options: TrainOptions,
    model: CodiModel,
    say: Callable[[str], None] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Result:
    """Train, save and judge lenses in a run folder, or go on with it.

    Args:
        options: of the command.
        model: loaded as they say.
        say: called with lines for a person; None: they are dropped, and no progress bar is shown.
        tell: called with what a person must know about what was there already.

    Raises:
        ValueError: options that do not fit the model or the questions, or a folder that holds another run.
    """
    given, options = options, options.resolved()
    problems, validation, test = training_split(options, model.protocol.question_suffix if options.suffix else "")
    passages = _passages(options)
    training = LensTraining(
        model,
        named_lenses(options.lenses, model.n_latents),
        training_options(options),
        None if passages is None else lambda step: batch_of_step(passages, options.batch_size, options.seed + 1, step),
    )
    identity = lens_identity(options, model)
    with open_run(options.out, identity, model=options.model, say=say or (lambda line: None)) as folder:
        if not folder.manifest().get("finished"):
            _fit(training, folder, problems, validation, given, progress if say else no_bar, tell)
            _save(training, folder, min(len(problems), training.step * options.batch_size))
            frequency = [(value, *counts) for value, counts in value_frequencies(problems).items()]
            columns = ["value", "questions_with_this_answer", "questions_with_this_step"]
            settings = options.statistics(options.seed)
            tables = {
                "history": pd.DataFrame(training.history),
                "training_values": pd.DataFrame(frequency, columns=columns),
                "held_out": held_out_table(training, test, options.text_tokens, given.batch_size, settings),
            }
            result = _conclude(folder, tables, training.step, given, model)
            folder.add_to_manifest(finished=True, steps=training.step)
            (options.out / "state.pt").unlink(missing_ok=True)
            return result
        tell(f"{options.out} holds this run, finished")
        if (options.out / FILE).exists():
            return Result.read(options.out)
        names = ("history", "training_values", "held_out")  # a folder from before there were results
        return _conclude(folder, _read(folder, names), int(folder.manifest()["steps"]), given, model)


def _fit(
    training: LensTraining,
    folder: RunFolder,
    problems: Sequence[Problem],
    validation: Sequence[Problem],
    given: TrainOptions,
    bar: Callable[..., Any],
    tell: Callable[[str], object],
) -> None:
    """Train to the end, from wherever the folder stands."""
    options, how, state = given.resolved(), training.options, folder.path / "state.pt"
    questions, held_out = [problem.question for problem in problems], [problem.question for problem in validation]
    chunks = [held_out[i : i + given.batch_size] for i in range(0, len(held_out), given.batch_size)]
    if state.exists():
        training.load(state)
        tell(f"continuing at step {training.step}")
    what = f"training {len(training.lenses)} lenses × {training.model.n_layers} layers"
    with bar(how.steps, "step", what) as advance:
        advance(training.step)

        def after(training: LensTraining) -> None:
            advance(1)
            if training.step % how.evaluate_every == 0 and not training.finished:
                training.save(state)

        training.fit(lambda step: batch_of_step(questions, options.batch_size, options.seed, step), chunks, after)


def _save(training: LensTraining, folder: RunFolder, seen: int) -> None:
    """Write every lens; `seen` is the number of questions it has been trained on."""
    model = training.model
    for name, lens in training.lenses.items():
        save_lens(
            lens,
            folder.path / "lenses" / slug(name),
            name,
            training.positions[name],
            numbering="positions: 0 = begin of thought, 1..n = latents, -1 = text",
            model=model.name,
            checkpoint_hash=model.checkpoint_hash,
            steps=training.step,
            training_questions=seen,
            best_steps=[item.best_step for item in training.translators if item.name == name],
        )


def _read(folder: RunFolder, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Tables of a finished training, to the last digit."""
    return {name: pd.read_csv(folder.path / f"{name}.csv", dtype=DIGITS_AS_TEXT) for name in names}


def _conclude(
    folder: RunFolder, tables: dict[str, pd.DataFrame], steps: int, given: TrainOptions, model: CodiModel
) -> Result:
    """Write tables, figure and result."""
    table = tables["held_out"]
    caption = (
        "KL of each lens to the model's own output on held-out questions, nats, by position and layer, beside the "
        f"logit lens; {per_cent(given.level)} intervals over clusters."
    )
    findings = Findings(
        [Section(held_out_text(table, steps, given.resolved().batch_size, given.level), form="plain")],
        tables,
        lambda: held_out_figures(table, given.level),
        {"held_out": caption},
    )
    return write_result(folder, findings, given, TITLE, model.name)


def main(options: TrainOptions) -> None:
    """Load, train, print the summary."""
    training_options(options.resolved())
    number = options.known_latents()
    if number is not None:
        named_lenses(options.lenses, number)  # a wrong name is told before a large model is loaded
    result = run(options, options.load(), to_stderr, print)
    print(printed(result, f"Lenses: {options.out}/lenses; tables and figure: "))
