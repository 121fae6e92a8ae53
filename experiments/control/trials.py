"""The trial table of steering: one row per item and cell; and the parts that it is computed in.

A *cell* is a vector at one layer with one coefficient. `kind` says which vector:

    none      the unsteered model: method "", layer −1, alpha 0
    vector    of a method; alpha 0 is the unsteered model too, bit for bit
    random    a random direction of the method's norm; alpha above 0, standing for −alpha as well
    shuffled  a vector of shuffled pairs at the method's norm; likewise

`alpha` is the nominal coefficient, `coefficient` what was multiplied by (another number only where vectors are compared
at equal KL), `norm` the length of what was added. A part is one block of items at one layer. Validation items meet the
vectors only. Knows nothing about statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from experiments.control.measures import Compared, compared_answers, distribution, text_measures
from experiments.control.vectors import Made, Making, made_vectors, splits_of
from experiments.study.folder import TEXT
from experiments.study.item_texts import Reader
from experiments.tasks.items import Item
from lm.steered import Cell, Steered, steer_cells
from lm.terms import EditPositions
from steering.control_vectors import ControlVector
from steering.vector_controls import equal_kl, random_vector

if TYPE_CHECKING:
    from experiments.study.parts import Workbench

__all__ = ["BY", "OUTCOMES", "TRIALS", "UNSTEERED", "Condition", "Setup", "conditions", "steered_trials"]

BY = ("kind", "method", "layer", "alpha")
"""Columns that name a condition."""
UNSTEERED = {"kind": "none"}
OUTCOMES = (
    "correct", "choice_correct", "kl", "entropy", "p_right", "p_wrong", "p_answers", "share_right", "repetition",
)  # fmt: skip
"""Columns that are averaged and compared."""
TRIALS = pa.schema(
    {
        "source": TEXT, "target": TEXT, "kind": TEXT, "method": TEXT, "layer": pa.int16(), "alpha": pa.float64(),
        "draw": pa.int32(), "coefficient": pa.float64(), "norm": pa.float64(), "task": TEXT, "split": TEXT,
        "prompt_id": pa.string(), "cluster": pa.string(), "answer": TEXT, "text": pa.string(),
        "prediction": pa.string(), "parsed": pa.bool_(), "correct": pa.bool_(), "choice": TEXT,
        "choice_correct": pa.float64(), "kl": pa.float64(), "entropy": pa.float64(), "p_right": pa.float64(),
        "p_wrong": pa.float64(), "p_answers": pa.float64(), "share_right": pa.float64(), "n_tokens": pa.int32(),
        "repetition": pa.float64(),
    }.items()
)  # fmt: skip
"""choice_correct, p_wrong and what rests on it are null where no answers are compared, repetition for controls and on
validation items. source is the task that the vector is from, target the one that is steered; "" where there is one
task only."""

Split = Literal["validation", "test"]
PILOT = 12
"""Validation items on which divergences are measured where vectors are compared at equal KL."""
MULTIPLES = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the largest alpha, at which they are measured."""


@dataclass(frozen=True)
class Setup:
    """What is steered and how, plain values that the parts get.

    Attributes:
        making: the vectors.
        alphas: ascending, 0 among them.
        draws: random directions per method, layer and |alpha|.
        positions, normalise: see `lm.steered.steer_cells`.
        scale: see `SweepOptions`.
        everyone: answers that restricted choice compares for every item; empty: each item's own.
        limit, judged: most tokens that are written after a vector, and how many of them are read.
        batch_size, seed: rows at once, and of the draws.
    """

    making: Making
    alphas: tuple[float, ...]
    draws: int
    positions: EditPositions
    normalise: bool
    scale: Literal["as-is", "equal-norm", "equal-kl"]
    everyone: tuple[str, ...]
    limit: int
    judged: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Condition:
    """One vector with its nominal and its real coefficient."""

    kind: Literal["vector", "random", "shuffled"]
    method: str
    draw: int
    alpha: float
    coefficient: float


def conditions(
    setup: Setup, vectors: dict[tuple[str, str, int], ControlVector], layer: int, bench: Workbench, controls: bool
) -> list[Condition]:
    """What is done to every item at one layer: the vectors at every alpha, the controls at every |alpha|."""
    sizes = sorted({abs(alpha) for alpha in setup.alphas if alpha})
    found = []
    for kind, method, draw in vectors:
        if kind == "vector":
            wanted: Sequence[float] = setup.alphas
        else:
            wanted = sizes if controls else ()
        for alpha in wanted:
            coefficient = alpha
            if setup.scale == "equal-kl" and alpha:
                coefficient = bench.once(equal_coefficients, setup, layer)[kind, method, draw, alpha]
            if not math.isnan(coefficient):
                found.append(Condition(kind, method, draw, alpha, coefficient))  # type: ignore[arg-type]
    return found


def vectors_at(bench: Workbench, setup: Setup, layer: int) -> dict[tuple[str, str, int], ControlVector]:
    """(kind, method, draw) -> vector with this one layer, controls at the norm of their method's; for `bench.once`."""
    made: Made = bench.once(made_vectors, setup.making)
    found: dict[tuple[str, str, int], ControlVector] = {}
    first = next(iter(made.vectors.values()))
    for method, vector in made.vectors.items():
        own = vector.only([layer])
        own = own if setup.scale == "as-is" else own.scaled(first.only([layer]))
        found["vector", method, -1] = own
        for draw in range(setup.draws):
            found["random", method, draw] = random_vector(own, draw, setup.seed)
        for draw in range(setup.making.shuffled):
            if (method, draw) in made.shuffled:
                found["shuffled", method, draw] = made.shuffled[method, draw].only([layer]).scaled(own)
    return found


# --- Equal disturbance ------------------------------------------------------------------------------------------------


def equal_coefficients(bench: Workbench, setup: Setup, layer: int) -> dict[tuple[str, str, int, float], float]:
    """The coefficient of every vector at which it moves the next token as far as alpha of the first method does: mean
    KL over some validation items, for controls the mean of both signs. NaN where a vector never does."""
    vectors = bench.once(vectors_at, setup, layer)
    items = splits_of(bench, setup.making.task).validation[:PILOT]
    reader = reader_of(bench, setup, items, setup.making.task)
    largest = max(map(abs, setup.alphas))
    reference, others = next(iter(vectors)), list(vectors)[1:]
    asked = [(reference, alpha) for alpha in setup.alphas if alpha]
    for key in others:
        signs = (1, -1) if key[0] == "vector" else (1,)
        asked += [(key, sign * size * largest) for sign in signs for size in MULTIPLES if size]
    measured = _mean_kl(bench, setup, layer, reader, items, vectors, asked)
    found = {(*reference, alpha): alpha for alpha in setup.alphas if alpha}
    for key in others:
        for alpha in setup.alphas if key[0] == "vector" else {abs(alpha) for alpha in setup.alphas}:
            if not alpha:
                continue
            mirror = [measured[reference, a] for a in (alpha, -alpha) if (reference, a) in measured]
            target = float(np.mean(mirror)) if key[0] != "vector" else measured[reference, alpha]
            sign = math.copysign(1, alpha)
            grid = [sign * size * largest for size in MULTIPLES]
            try:
                found[*key, alpha] = equal_kl(grid, [0.0] + [measured[key, c] for c in grid[1:]], target)
            except ValueError:  # it never moves the model as far, or falls before: there is no such coefficient
                found[*key, alpha] = math.nan
    return found


def _mean_kl(
    bench: Workbench, setup: Setup, layer: int, reader: Reader, items: Sequence[Item],
    vectors: dict[tuple[str, str, int], ControlVector], asked: Sequence[tuple[tuple[str, str, int], float]],
) -> dict[tuple[tuple[str, str, int], float], float]:  # fmt: skip
    """Mean KL(unsteered ‖ steered) in nats of each vector and coefficient."""
    names = list(vectors)
    cells = [Cell(layer, names.index(key), coefficient) for key, coefficient in asked]
    total = np.zeros(len(cells))
    answers = torch.zeros(setup.batch_size, 1, dtype=torch.long)
    for rows in steer_cells(
        reader.model, reader.encode(items), stacked(bench, vectors, layer), cells, setup.positions,
        normalise=setup.normalise, batch_size=setup.batch_size,
    ):  # fmt: skip
        assert rows.first_logits is not None and rows.reference is not None
        kl = distribution(rows.first_logits, rows.reference, answers[: len(rows)])["kl"]
        np.add.at(total, rows.cells.numpy(), kl / len(items))
    return {one: float(value) for one, value in zip(asked, total, strict=True)}


def stacked(bench: Workbench, vectors: dict[tuple[str, str, int], ControlVector], layer: int) -> torch.Tensor:
    """(vector, n_layers + 1, d_model), zero but for one layer."""
    first = next(iter(vectors.values()))
    table = torch.zeros(len(vectors), bench.model.n_layers + 1, first.d_model)
    for place, vector in enumerate(vectors.values()):
        table[place, layer] = vector[layer]
    return table


# --- Trials -----------------------------------------------------------------------------------------------------------


def reader_of(bench: Workbench, setup: Setup, items: Sequence[Item], task: str) -> Reader:
    """How these items are put to the model."""
    examples = splits_of(bench, task).derivation[: setup.making.examples]
    return Reader.of(bench.model, items, examples, setup.making.instruction)


def steered_trials(
    bench: Workbench, *, seed: int, setup: Setup, split: Split, start: int, stop: int, layer: int, unsteered: bool,
    task: str = "",
) -> pd.DataFrame:  # fmt: skip
    """Rows of some items at one layer.

    Args:
        bench: model and items.
        seed: of the part; the draws have that of the setup, so that every part has the same ones.
        setup: what is steered.
        split: whose items; controls are run on "test" alone.
        start, stop: which of its items.
        layer: of the edit.
        unsteered: give the rows of the unsteered model too.
        task: that is steered, where there are several; "": the only one.
    """
    items = splits_of(bench, task).parts[split][start:stop]
    reader = reader_of(bench, setup, items, task)
    compared = compared_answers(reader, items, setup.everyone)
    vectors = bench.once(vectors_at, setup, layer)
    done = conditions(setup, vectors, layer, bench, controls=split == "test")
    frames = []
    for whole in (True, False):
        chosen = [one for one in done if (one.kind == "vector") == whole]
        if not chosen:
            continue
        limit = setup.limit if whole and split == "test" else setup.judged
        for rows in _rows(bench, setup, reader, items, vectors, chosen, layer, limit):
            frames.append(
                _frame(setup, reader, items, compared, vectors, chosen, layer, rows, whole and split == "test")
            )
            bench.advance(len(rows))
    table = pd.concat(frames, ignore_index=True)
    if unsteered:
        first = setup.making.methods[0]
        plain = table[(table["kind"] == "vector") & (table["method"] == first) & (table["alpha"] == 0)]
        table = pd.concat([plain.assign(kind="none", method="", layer=-1), table], ignore_index=True)
    return table.assign(split=split, source=setup.making.task, target=task)


def _rows(
    bench: Workbench, setup: Setup, reader: Reader, items: Sequence[Item],
    vectors: dict[tuple[str, str, int], ControlVector], chosen: Sequence[Condition], layer: int, limit: int,
) -> Iterator[Steered]:  # fmt: skip
    """Steered rows of some conditions; controls and validation items write no more than is read."""
    names = list(vectors)
    cells = [Cell(layer, names.index((one.kind, one.method, one.draw)), one.coefficient) for one in chosen]
    yield from steer_cells(
        reader.model, reader.encode(items), stacked(bench, vectors, layer), cells, setup.positions,
        normalise=setup.normalise, max_new_tokens=limit, batch_size=setup.batch_size,
    )  # fmt: skip


def _frame(
    setup: Setup, reader: Reader, items: Sequence[Item], compared: Compared,
    vectors: dict[tuple[str, str, int], ControlVector], chosen: Sequence[Condition], layer: int, rows: Steered,
    whole: bool,
) -> pd.DataFrame:  # fmt: skip
    assert rows.first_logits is not None and rows.reference is not None
    place, cell = rows.rows.numpy(), [chosen[i] for i in rows.cells.tolist()]
    measured: dict[str, Any] = distribution(rows.first_logits, rows.reference, compared.tokens[rows.rows])
    index = measured.pop("chosen")
    several = [len(compared.names[row]) > 1 for row in place]
    lengths = {key: vector.norms()[layer] for key, vector in vectors.items()}
    return pd.DataFrame(
        {
            "kind": [one.kind for one in cell],
            "method": [one.method for one in cell],
            "layer": layer,
            "alpha": [one.alpha for one in cell],
            "draw": [one.draw for one in cell],
            "coefficient": [one.coefficient for one in cell],
            "norm": [abs(one.coefficient) * lengths[one.kind, one.method, one.draw] for one in cell],
            "task": [items[row].task for row in place],
            "prompt_id": [items[row].prompt_id for row in place],
            "cluster": [items[row].cluster or items[row].prompt_id for row in place],
            "answer": [items[row].answer for row in place],
            "choice": [
                compared.names[row][i] if many else "" for row, i, many in zip(place, index, several, strict=True)
            ],
            "choice_correct": np.where(several, index == 0, np.nan),
            **measured,
            **text_measures(reader, items, place.tolist(), rows.tokens, setup.judged, whole),
        }
    )
