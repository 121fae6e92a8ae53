"""Training problems: those of each step as a pure function of seed and step, dealt out to processes and micro-batches.

Knows nothing about models but the sentence that a checkpoint expects after a question.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from codi.model import CodiModel
from experiments.tasks import STEPS_HELP, Reading, endless, is_endless, load_task, most_steps
from experiments.tasks.problem import Problem
from experiments.train.options import Resolved
from lm.errors import UserError

__all__ = ["Text", "load_data", "micro_batches", "problems_of_step", "text_of"]


@dataclass(frozen=True)
class Text:
    """A training problem as codi.batches reads it."""

    question: str
    chain: str
    answer_text: str


def text_of(problem: Problem, style: str, last_step: bool = True) -> Text:
    """A problem as it is trained on; the last equation of the chain can be left out."""
    problem = problem if last_step else replace(problem, steps=problem.steps[:-1])
    answer = format(Decimal(str(problem.answer)), "f")  # never 1e+06
    return Text(problem.question, problem.chain, answer if style == "number" else f"The answer is: {answer}")


def load_data(config: Resolved, model: CodiModel) -> tuple[list[Problem] | None, list[Problem], int]:
    """Training problems (None: an endless generator), held-out problems and the number of distillation steps."""
    if is_endless(config.data):
        most = most_steps(config.data)
        lengths = [n for n, weight in enumerate(config.last_weights, 1) if weight > 0 and n <= most]
        if not lengths:
            raise UserError(f"last-weights ask for no problems of 1..{most} steps, the ones that {config.data} has")
        long = [n for n in lengths if 2 * n > most] or lengths[-1:]
        held_out = load_task(config.data, "test", config.eval_problems, 1, min_steps=min(long), max_steps=max(long))
        if not config.problems:
            return None, held_out, config.steps
        pool = list(itertools.islice(endless(config.data, config.seed, "train", config.last_weights), config.problems))
        if len(pool) < config.batch_size:
            raise UserError(f"problems must be at least one batch of {config.batch_size}, got {config.problems}")
        return pool, held_out, _n_steps(config, pool)
    reading = Reading(config.answers, config.decimal_comma)
    suffix = model.protocol.question_suffix
    loaded = load_task(config.data, "train", None, config.seed, suffix, decimal_comma=config.decimal_comma)
    problems = [replace(problem, reading=reading) for problem in loaded if problem.steps]
    if len(problems) <= config.eval_problems + config.batch_size:
        raise UserError(
            f"{config.data} has {len(problems)} problems with written chains, "
            f"{config.eval_problems + config.batch_size + 1} are needed (see --eval-problems, --batch-size)"
            + ("" if problems else f"; {STEPS_HELP}")
        )
    random.Random(config.seed).shuffle(problems)
    held_out, problems = problems[: config.eval_problems], problems[config.eval_problems :]
    return problems, held_out, _n_steps(config, problems)


def _n_steps(config: Resolved, problems: Sequence[Problem]) -> int:
    """Distillation steps on a finite number of problems."""
    return round(config.epochs * (len(problems) // config.batch_size)) or 1 if config.epochs else config.steps


def problems_of_step(
    config: Resolved, data: Sequence[Problem] | None, stage: str, step: int, n_steps: int
) -> list[Problem]:
    """The batch of one step: a pure function of its arguments."""
    if data is None:
        share = min(1.0, step / max(1, n_steps // 2))
        weights = [a + share * (b - a) for a, b in zip(config.first_weights, config.last_weights, strict=True)]
        stream = endless(config.data, f"{config.seed}-{stage}-{step}", "train", weights)
        return [next(stream) for _ in range(config.batch_size)]
    per_epoch = max(1, len(data) // config.batch_size)
    epoch, index = divmod(step, per_epoch)
    seed, size = f"{config.seed}-{stage}-{epoch}", config.batch_size
    block, place = divmod(index, config.length_window)
    first = block * config.length_window
    last = min(first + config.length_window, per_epoch)
    drawn = [data[i] for i in _order(seed, len(data))[first * size : last * size]]
    if config.length_window > 1:  # batches of problems alike in length, in an order of their own
        drawn.sort(key=lambda problem: len(problem.question) + len(problem.chain))
        place = random.Random(f"{seed}-{block}").sample(range(last - first), last - first)[place]
    return drawn[place * size : (place + 1) * size]


@functools.lru_cache(maxsize=1)
def _order(seed: str, n: int) -> list[int]:
    """Order of the problems in one pass; shuffled once per pass, not at every step."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def micro_batches(problems: Sequence[Problem], micro_batch: int, rank: int, n_ranks: int) -> Iterator[list[Problem]]:
    """This process's share of a batch, cut into micro-batches of similar length (less padding).

    Every process gets the same number of micro-batches of the same size, and every problem is in one of them.
    """
    order = sorted(problems, key=lambda p: len(p.question) + len(p.chain))
    for i in range(0, len(order), micro_batch * n_ranks):
        part = order[i : i + micro_batch * n_ranks][rank::n_ranks]
        # The direct-answer term sees the first problems of each micro-batch: any length, not the shortest.
        yield random.Random(len(part) + i).sample(part, len(part))
