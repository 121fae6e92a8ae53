"""Interchange: latent k of one prompt becomes that of another one, as a vector, a residual stream or a cache slot.

The donor is another prompt ("other"), the same story with the other operation ("operation"), or a derivation prompt
with the same key ("twin", the control: nothing that the answer depends on changes). What is moved: the vector, the
residual stream at one layer, or the cache slot (keys, values, both; in all layers or in one). Later latents are
computed on the edited past. Read are the donor's answer, a third prompt's (the level of chance) and mixed predictions
(template.py): the answer if one step were the donor's.

Knows nothing about files, tables or claims.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import CodiModel, Intervention
from codi.rope import rotate, unrotate
from experiments.latents.donors import Key, key_of, unlike
from experiments.latents.patch.template import operation_donors, predictions
from experiments.statistics.effects import Selector
from experiments.study.answers import answer_table, set_of, trial_schema
from experiments.study.parts import Workbench
from experiments.study.rows import Edits, answer_rows
from experiments.study.thoughts import Thoughts, evaluation_thoughts, think
from experiments.tasks import Problem
from steering.directions import generator
from steering.replacements import Place, ReplaceRows

__all__ = ["BY", "DONORS", "UNEDITED", "Level", "interchange", "interchange_schema", "levels_of", "mixed_of", "moved"]

DONORS = ("other", "operation", "twin")
WHOLE = ("vector", "slot", "keys", "values")
"""Levels at which all latents can be moved together; slot, keys and values in all layers."""
_LEVELS = ("", *WHOLE, "residual")

Mixed = tuple[int, str]
"""A prediction that is neither prompt's own answer: which step is the donor's, and "local" or "propagated"."""


def mixed_of(steps: Sequence[int], form: bool) -> tuple[Mixed, ...]:
    """Mixed predictions of problems with these steps before the last; form: all are (X±Y)·Z + (X±Y)."""
    return ((1, "local"), (1, "propagated"), (2, "local")) if form else tuple((step, "propagated") for step in steps)


def interchange_schema(mixed: Sequence[Mixed]) -> pa.Schema:
    """Columns of the trial table.

    kind: one of DONORS, or "none" for the unedited run; level: "vector", "slot", "keys", "values" or "residual"; layer:
    of a residual stream or of a slot, -1: all layers; replaced: the set of latents; chance_answer: of a third prompt,
    NaN if there is none; donor, chance: whether the answer is that one; step…: a mixed prediction, NaN where it is not
    known; step…_hit: whether the answer is that prediction and neither prompt's own answer.
    """
    names = [column(one) for one in mixed]
    return trial_schema(
        kind=pa.string(), level=pa.string(), layer=pa.int16(), replaced=pa.int32(), donor_answer=pa.float64(),
        chance_answer=pa.float64(), **{name: pa.float64() for name in names},
        donor=pa.bool_(), chance=pa.bool_(), **{f"{name}_hit": pa.bool_() for name in names},
    )  # fmt: skip


def column(mixed: Mixed) -> str:
    """Name of the column of a mixed prediction."""
    return f"step{mixed[0]}_{mixed[1]}"


BY = ("kind", "level", "layer", "replaced")
UNEDITED: Selector = {"kind": "none", "level": "", "layer": -1, "replaced": 0}

Level = tuple[str, int]
"""Level and layer."""


def moved(kind: str, level: Level, latents: Sequence[int]) -> Selector:
    """Answers with these latents taken from a donor."""
    return {"kind": kind, "level": level[0], "layer": level[1], "replaced": set_of(latents)}


def levels_of(kind: str, n_layers: int) -> list[Level]:
    """Levels that are tried with a kind of donor: single slots with "other" only."""
    found = [(level, -1) for level in WHOLE] + [("residual", layer) for layer in range(1, n_layers)]
    return found + ([("slot", layer) for layer in range(1, n_layers + 1)] if kind == "other" else [])


class _Row(NamedTuple):
    prompt: int
    source: int  # row of the donor
    kind: str
    level: str
    layer: int
    replaced: int
    donor_answer: float
    chance_answer: float
    mixed: tuple[float, ...]


def interchange(
    bench: Workbench, *, task: str, mixed: Sequence[Mixed], max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Trial table of interchange, see `interchange_schema`.

    Args:
        bench: model and prompts.
        task: where prompts with the other operation may be made.
        mixed: predictions that are read.
        max_new_tokens, batch_size: of the decoding.
        seed: of the choice of donors and of third prompts.
    """
    thoughts = bench.once(evaluation_thoughts)
    rng = generator(seed, "patch", "interchange")
    donors, of = _donors(thoughts.problems, operation_donors(thoughts.problems, task), bench.prompts.derivation, rng)
    if not donors:
        raise ValueError("no evaluation prompt has a donor: use more prompts")
    rows = _rows(bench.model, thoughts.problems, donors, of, mixed, rng)
    edits = _edits(bench.model, thoughts, rows, _Given.of(bench.model, donors))
    prompt = [row.prompt for row in rows]
    texts = answer_rows(
        bench.model, thoughts.prefill, prompt, edits, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    columns = {name: [getattr(row, name) for row in rows] for name in _Row._fields[2:-1]}
    columns |= {column(one): [row.mixed[place] for row in rows] for place, one in enumerate(mixed)}
    frame = answer_table(thoughts.problems, prompt, texts, **columns)
    for name in ("donor", "chance"):
        frame[name] = frame["prediction"] == frame[f"{name}_answer"]
    for name in map(column, mixed):
        neither = (frame[name] != frame["answer"]) & (frame[name] != frame["donor_answer"])
        frame[f"{name}_hit"] = (frame["prediction"] == frame[name]) & neither
    return frame


# --- Who gives what ---------------------------------------------------------------------------------------------------


def _donors(
    problems: Sequence[Problem], operations: Sequence[Problem | None], derivation: Sequence[Problem],
    rng: np.random.Generator,
) -> tuple[list[Problem], list[dict[str, int]]]:  # fmt: skip
    """All donors, and for each prompt the rows of its own by kind."""
    twins: dict[Key, list[Problem]] = defaultdict(list)
    for problem in derivation:
        twins[key_of(problem)].append(problem)
    donors: list[Problem] = []
    of: list[dict[str, int]] = []
    for problem, operation in zip(problems, operations, strict=True):
        others = [p for p in problems if unlike(problem, p)]
        same = [p for p in twins.get(key_of(problem), []) if p.prompt_id != problem.prompt_id]
        picks = {
            "other": others[int(rng.integers(len(others)))] if others else None,
            "operation": operation if operation is not None and operation.answer != problem.answer else None,
            "twin": same[int(rng.integers(len(same)))] if same else None,
        }
        mine: dict[str, int] = {}
        for kind, pick in picks.items():
            if pick is not None:
                mine[kind] = len(donors)
                donors.append(pick)
        of.append(mine)
    return donors, of


def _rows(
    model: CodiModel, problems: Sequence[Problem], donors: Sequence[Problem], of: Sequence[Mapping[str, int]],
    mixed: Sequence[Mixed], rng: np.random.Generator,
) -> list[_Row]:  # fmt: skip
    """What is tried, prompt by prompt, the unedited run first."""
    n = model.n_latents
    singles = [(k,) for k in range(1, n + 1)]
    found: list[_Row] = []
    for i, mine in enumerate(of):
        problem = problems[i]
        taken = {problem.answer, *(donors[row].answer for row in mine.values())}
        strangers = [p.answer for p in problems if p.answer not in taken]
        chance = float(strangers[int(rng.integers(len(strangers)))]) if strangers else float("nan")
        choices: list[tuple[str, Level, int]] = [("none", ("", -1), 0)]
        for kind in mine:
            for level in levels_of(kind, model.n_layers):
                together = level[0] in WHOLE and level[1] == -1
                sets = [tuple(range(1, n + 1)), *singles] if together else singles
                choices += [(kind, level, set_of(chosen)) for chosen in sets]
        of_kind = {"none": problem, **{kind: donors[row] for kind, row in mine.items()}}
        known = {kind: tuple(_predicted(problem, donor, one) for one in mixed) for kind, donor in of_kind.items()}
        for kind, level, chosen in choices:
            answer = float(of_kind[kind].answer)
            found.append(_Row(i, mine.get(kind, 0), kind, *level, chosen, answer, chance, known[kind]))
    return found


def _predicted(problem: Problem, donor: Problem, mixed: Mixed) -> float:
    """The answer if a step were the donor's; NaN where one of them has no such step before its last."""
    step, reach = mixed
    if step >= min(len(problem.intermediates), len(donor.intermediates)):
        return math.nan
    return predictions(problem, step, donor.intermediates[step - 1])[reach == "propagated"]


# --- What is moved ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """The latents of all donors; keys as content, turned back to position 0.

    embeddings (donor, latent, d_model), hidden_states (donor, latent, layer, d_model), keys and values
    (donor, latent, layer, kv_head, d_head).
    """

    embeddings: Tensor
    hidden_states: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, model: CodiModel, donors: Sequence[Problem], batch_size: int = 128) -> _Given:
        kept = ("embeddings", "hidden_states", "keys", "values")
        runs = [
            think(model, donors[start : start + batch_size], keep=kept).run
            for start in range(0, len(donors), batch_size)
        ]
        embeddings, hidden_states, keys, values = (torch.cat([getattr(run, name) for run in runs]) for name in kept)
        positions = torch.cat([run.latent_positions for run in runs])
        return cls(embeddings, hidden_states, unrotate(keys, positions[:, :, None, None], model), values)


def _edits(model: CodiModel, thoughts: Thoughts, rows: Sequence[_Row], given: _Given) -> Edits:
    """What is moved, for the rows of a batch."""
    source, prompt, replaced, layer_of = (
        torch.tensor([getattr(row, name) for row in rows]) for name in ("source", "prompt", "replaced", "layer")
    )
    level_of = torch.tensor([_LEVELS.index(row.level) for row in rows])
    first = thoughts.run.first_position

    def edits(here: Tensor) -> Sequence[Intervention]:
        values: dict[Any, tuple[Tensor, Tensor]] = {}
        at, prompts = source[here].to(model.device), prompt[here].to(model.device)

        def put(place: Place, active: Tensor, value: Tensor) -> None:
            if active.any():
                values[place] = (active, value)

        for k in range(1, model.n_latents + 1):
            edited = (replaced[here] >> (k - 1) & 1).bool()

            def hit(level: str, layer: int = -1, edited: Tensor = edited) -> Tensor:
                return edited & (level_of[here] == _LEVELS.index(level)) & (layer_of[here] == layer)

            put(("embedding", k, 0), hit("vector"), given.embeddings[at, k - 1])
            for layer in range(1, model.n_layers):
                put(("layer", k, layer), hit("residual", layer), given.hidden_states[at, k - 1, layer])
            for layer in range(1, model.n_layers + 1):
                slot = hit("slot") | hit("slot", layer)
                keys, contents = slot | hit("keys"), slot | hit("values")
                if keys.any():
                    there = (first[prompts] + k - 1)[:, None]
                    put(("keys", k, layer), keys, rotate(given.keys[at, k - 1, layer - 1], there, model))
                put(("values", k, layer), contents, given.values[at, k - 1, layer - 1])
        return [ReplaceRows(values)]

    return edits
