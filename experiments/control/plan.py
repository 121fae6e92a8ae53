"""From the options of a sweep to its plan and its parts: plain values, impossible ones refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa

from experiments.control.measures import compared_answers, judged_length
from experiments.control.options import (
    CONTRASTS,
    SteeringOptions,
    SweepOptions,
    VectorOptions,
    parse_alphas,
    parse_layers,
    parse_methods,
)
from experiments.control.trials import TRIALS, Setup, Split, steered_trials
from experiments.control.vectors import Made, Making, made_vectors, read_vectors
from experiments.statistics.clusters import Settings
from experiments.study.folder import TEXT
from experiments.study.item_texts import Reader
from experiments.study.parts import Part
from experiments.tasks.items import Item, ItemSplits
from steering.control_vectors import middle_layer

if TYPE_CHECKING:
    from experiments.study.parts import Workbench
    from lm.model import LanguageModel

__all__ = ["NORMS", "Plan", "answer_limit", "make_plan", "making_of", "norms", "parts", "setup_of", "task_answers"]

PART_ITEMS = 10
"""Items in one part: how much an interruption can cost."""
WORD_TOKENS, NUMBER_TOKENS = 10, 512
"""Longest answers, as published."""
NORMS = pa.schema(
    {
        "method": TEXT, "layer": pa.int16(), "norm": pa.float64(), "explained": pa.float64(), "n_pairs": pa.int32(),
    }.items()
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A sweep with everything resolved.

    Attributes:
        setup: what is steered.
        layers: in ascending order.
        middle: the layer that is published as the choice.
        n_layers: of the model.
        n_validation, n_test: items of both parts.
        contrasts: methods that have vectors of shuffled pairs.
        settings: of the statistics.
        asked, negatives: in words, for the summary.
        compares: restricted choice compares answers.
    """

    setup: Setup
    layers: tuple[int, ...]
    middle: int
    n_layers: int
    n_validation: int
    n_test: int
    contrasts: tuple[str, ...]
    settings: Settings
    asked: str
    negatives: str
    compares: bool

    @property
    def methods(self) -> tuple[str, ...]:
        """Of the vectors."""
        return self.setup.making.methods


def making_of(options: VectorOptions, seed: int, batch_size: int, shuffled: int = 0, files: str = "") -> Making:
    """How the options want their vectors made."""
    return Making(
        methods=parse_methods(options.methods),
        negatives=options.negatives,
        pairs="" if options.pairs is None else str(options.pairs),
        centred=options.centred,
        examples=options.examples,
        instruction=options.instruction,
        shuffled=shuffled,
        files=files,
        seed=seed,
        batch_size=batch_size,
    )


def answer_limit(given: int | None, items: Sequence[Item]) -> int:
    """Most tokens of an answer: as given, else what was published for words and for numbers."""
    if given is not None:
        return given
    return NUMBER_TOKENS if any(item.kind == "number" for item in items) else WORD_TOKENS


def task_answers(splits: ItemSplits) -> tuple[str, ...]:
    """Every different answer of a task, in the order of its items."""
    return tuple(dict.fromkeys(item.answer for items in splits.parts.values() for item in items))


def setup_of(
    options: SteeringOptions, making: Making, model: LanguageModel, splits: ItemSplits, scale: Any, batch_size: int
) -> tuple[Setup, bool]:
    """What is steered, and whether answers are compared; the answers of every item are checked.

    Raises:
        ValueError: answers that share their first token, or prompts that the model is too short for.
    """
    items = (*splits.validation, *splits.test)
    everyone = task_answers(splits) if options.choices == "task" else ()
    reader = Reader.of(model, items, splits.derivation[: making.examples], making.instruction)
    compared = compared_answers(reader, items, everyone)
    limit = answer_limit(options.max_new_tokens, items)
    model.check_length(int(reader.encode(items).lengths.max()) + limit)
    setup = Setup(
        making=making,
        alphas=parse_alphas(options.alphas),
        draws=options.draws,
        positions=options.positions,
        normalise=options.normalise,
        scale=scale,
        everyone=everyone,
        limit=limit,
        judged=judged_length(reader, items, limit),
        batch_size=batch_size,
        seed=making.seed,
    )
    return setup, compared.tokens.shape[1] > 1


def make_plan(options: SweepOptions, model: LanguageModel, prompts: ItemSplits) -> Plan:
    """The plan of a sweep.

    Raises:
        ValueError: layers that the model or the vectors do not have, vectors of another model, answers that share their
            first token, or items that are too long.
    """
    files = "" if options.vectors is None else str(options.vectors)
    making = making_of(options, options.seed, min(options.batch_size, 64), options.shuffled, files)
    middle = middle_layer(model.n_layers)
    layers = parse_layers(options.layers, model.n_layers, middle)
    if files:
        found = read_vectors(files, model)
        for name, vector in found.items():
            vector.only(layers)  # says which layer is missing
            assert name
        making = Making(methods=tuple(found), examples=options.examples, instruction=options.instruction, files=files,
                        seed=options.seed, batch_size=making.batch_size)  # fmt: skip
    setup, compares = setup_of(options, making, model, prompts, options.scale, options.batch_size)
    return Plan(
        setup=setup,
        layers=layers,
        middle=middle,
        n_layers=model.n_layers,
        n_validation=len(prompts.validation),
        n_test=len(prompts.test),
        contrasts=() if files else tuple(name for name in making.methods if name in CONTRASTS),
        settings=options.statistics(options.seed),
        asked=options.task,
        negatives=options.negatives,
        compares=compares,
    )


def norms(bench: Workbench, *, seed: int, making: Making) -> pd.DataFrame:
    """Length of every vector at every layer, and what its principal component explains."""
    made: Made = bench.once(made_vectors, making)
    return pd.DataFrame(
        [
            {
                "method": method, "layer": layer, "norm": norm, "explained": vector.origin.explained.get(layer),
                "n_pairs": vector.origin.n or made.n_pairs,
            }
            for method, vector in made.vectors.items()
            for layer, norm in vector.norms().items()
        ],
        columns=NORMS.names,
    )  # fmt: skip


def parts(plan: Plan) -> list[Part]:
    """Norms, and the trial table in blocks of items and layers, validation first."""
    found = [Part("norms", norms, {"making": plan.setup.making}, plan.setup.seed, NORMS)]
    sizes: dict[Split, int] = {"validation": plan.n_validation, "test": plan.n_test}
    for split, number in sizes.items():
        for place, layer in enumerate(plan.layers):
            for block, start in enumerate(range(0, number, PART_ITEMS)):
                arguments = {
                    "setup": plan.setup, "split": split, "start": start, "stop": min(start + PART_ITEMS, number),
                    "layer": layer, "unsteered": place == 0,
                }  # fmt: skip
                name = f"{split}-layer-{layer:02d}-{block:03d}"
                found.append(Part(name, steered_trials, arguments, plan.setup.seed, TRIALS, split))
    return found
