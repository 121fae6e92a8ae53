"""Value patching: z_k becomes the mean latent of derivation prompts of which a step is a target t.

The derivation prompts have as many steps, and are of the same template or (where there are several) of other ones; what
is put in is the vector alone, or the residual stream of every layer with it. Success is that the answer becomes the
predicted one (template.py). Control: the mean of a third value, which predicts another answer, in the same place, read
against the same prediction. Later latents are computed on the edited past.

Knows nothing about files, tables or claims.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi import CodiModel, Intervention
from experiments.latents.patch.template import predictions
from experiments.statistics.effects import Selector
from experiments.study.answers import answer_table, trial_schema
from experiments.study.parts import Workbench
from experiments.study.rows import Edits, answer_rows
from experiments.study.thoughts import Bank, derivation_bank, evaluation_thoughts
from experiments.tasks import Problem
from steering.directions import generator
from steering.replacements import Place, ReplaceRows

__all__ = ["BY", "SCOPES", "STATES", "VALUES", "patched", "patched_latents", "patched_steps", "scopes_of",
           "value_patching"]  # fmt: skip

SCOPES = ("same template", "other templates")
STATES = ("vector", "residual")

VALUES = trial_schema(
    kind=pa.string(), step=pa.int16(), scope=pa.string(), state=pa.string(), latent=pa.int16(), value=pa.float64(),
    local_prediction=pa.float64(), propagated_prediction=pa.float64(), local=pa.bool_(), propagated=pa.bool_(),
    hit=pa.bool_(),
)  # fmt: skip
"""kind: "target", "control" (a third value) or "none" (unedited: no state and no latent); step: one before the last;
scope: one of SCOPES; state: one of STATES; value: whose mean is put in (of "none": the prompt's own); local and
propagated: whether the answer is that prediction for the target (predictions are NaN where there is none); hit: one of
the two."""
BY = ("kind", "step", "scope", "state", "latent")


def patched(kind: str, step: int, scope: str, state: str, latent: int) -> Selector:
    """Answers with the mean of a value (kind "target" or "control") put in at a latent."""
    return {"kind": kind, "step": step, "scope": scope, "state": state, "latent": latent}


def patched_latents(n: int, legacy: bool) -> tuple[int, ...]:
    """Latents that are patched: all, or the published one."""
    return (min(5, n),) if legacy else tuple(range(1, n + 1))


def patched_steps(problems: Sequence[Problem], legacy: bool) -> tuple[int, ...]:
    """Steps that are patched: all before the last one of the longest problem, or the published one."""
    return (2,) if legacy else tuple(range(1, max(len(problem.intermediates) for problem in problems)))


def scopes_of(derivation: Sequence[Problem]) -> tuple[str, ...]:
    """Scopes that there are: one alone where all prompts are worded alike."""
    return SCOPES if len({problem.template for problem in derivation}) > 1 else SCOPES[:1]


class _Row(NamedTuple):
    prompt: int
    group: int  # whose mean is put in; -1: none
    kind: str
    step: int
    scope: str
    state: str
    latent: int
    value: float
    local_prediction: float
    propagated_prediction: float


def value_patching(
    bench: Workbench, *, legacy: bool, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Trial table of value patching, see `VALUES`.

    Args:
        bench: model and prompts.
        legacy: step 2 at the published latent only.
        max_new_tokens, batch_size: of the decoding.
        seed: of the choice of target and third value.
    """
    thoughts, bank = bench.once(evaluation_thoughts), bench.once(derivation_bank)
    latents = patched_latents(bench.model.n_latents, legacy)
    groups = _Groups()
    steps = patched_steps(thoughts.problems, legacy)
    rows = _rows(thoughts.problems, bank, steps, latents, groups, generator(seed, "patch", "values"))
    if not rows:
        raise ValueError(
            "no prompt has among the derivation prompts two other values of a step that predict other answers: use "
            "more of them, and problems whose steps tell how they hang together"
        )
    edits = _edits(bench.model, rows, latents, bank, groups.members)
    prompt = [row.prompt for row in rows]
    texts = answer_rows(
        bench.model, thoughts.prefill, prompt, edits, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    names = _Row._fields[2:]
    frame = answer_table(
        thoughts.problems, prompt, texts, **{name: [getattr(row, name) for row in rows] for name in names}
    )
    frame["local"] = frame["prediction"] == frame["local_prediction"]
    frame["propagated"] = frame["prediction"] == frame["propagated_prediction"]
    return frame.assign(hit=frame["local"] | frame["propagated"])


class _Groups:
    """Sets of derivation prompts, each with a number."""

    def __init__(self) -> None:
        self.members: list[list[int]] = []
        self._number: dict[tuple[int, ...], int] = {}

    def number(self, members: Sequence[int]) -> int:
        """Of this set."""
        key = tuple(sorted(members))
        if key not in self._number:
            self._number[key] = len(self.members)
            self.members.append(list(key))
        return self._number[key]


def _rows(
    problems: Sequence[Problem], bank: Bank, steps: Sequence[int], latents: Sequence[int], groups: _Groups,
    rng: np.random.Generator,
) -> list[_Row]:  # fmt: skip
    """What is tried, prompt by prompt: for every step before the last that has two other values in every scope."""
    pools = {step: _pools(bank.problems, step) for step in steps}
    scopes = scopes_of(bank.problems)
    found: list[_Row] = []
    for i, problem in enumerate(problems):
        form = _form(problem)
        for step in steps:
            if step >= len(problem.intermediates):
                continue
            own = problem.intermediates[step - 1]
            sources = (pools[step].get(form, {}), _elsewhere(pools[step], form))[: len(scopes)]
            shared = sorted(set.intersection(*map(set, sources)))
            values = _telling(problem, step, [v for v in shared if v not in (own, 0)])
            if len(values) < 2:
                continue
            target, third = (float(v) for v in rng.choice(values, size=2, replace=False))
            local, propagated = predictions(problem, step, target)
            for scope, pool in zip(scopes, sources, strict=True):
                for kind, value in (("target", target), ("control", third)):
                    group = groups.number(pool[value])
                    for state in STATES:
                        for k in latents:
                            found.append(_Row(i, group, kind, step, scope, state, k, value, local, propagated))
                found.append(_Row(i, -1, "none", step, scope, "", 0, own, local, propagated))
    return found


_Pool = Mapping[float, Sequence[int]]


_Form = tuple[str, int]
"""Template and number of steps."""


def _form(problem: Problem) -> _Form:
    return problem.template, len(problem.intermediates)


def _telling(problem: Problem, step: int, values: Sequence[float]) -> list[float]:
    """The values that predict an answer, another one than the prompt's own and than those before them."""
    seen, found = {float(problem.answer)}, []
    for value in values:
        _, answer = predictions(problem, step, float(value))
        if not math.isnan(answer) and answer not in seen:
            seen.add(answer)
            found.append(value)
    return found


def _pools(problems: Sequence[Problem], step: int) -> dict[_Form, _Pool]:
    """form -> value of the step -> rows of the prompts that have it before their last step."""
    found: dict[_Form, dict[float, list[int]]] = {}
    for form in sorted({_form(problem) for problem in problems if step < len(problem.intermediates)}):
        found[form] = defaultdict(list)
        for row, problem in enumerate(problems):
            if _form(problem) == form:
                found[form][problem.intermediates[step - 1]].append(row)
    return {form: dict(pool) for form, pool in found.items()}


def _elsewhere(pools: Mapping[_Form, _Pool], form: _Form) -> _Pool:
    """value -> rows of the prompts of all other templates with as many steps."""
    found: dict[float, list[int]] = defaultdict(list)
    for other, pool in pools.items():
        if other != form and other[1] == form[1]:
            for value, rows in pool.items():
                found[value] += rows
    return dict(found)


def _edits(
    model: CodiModel, rows: Sequence[_Row], latents: Sequence[int], bank: Bank, groups: Sequence[Sequence[int]]
) -> Edits:
    """What is put in, for the rows of a batch."""
    means = [bank.mean(members) for members in groups]
    z_means, h_means, layer_means = (torch.stack(part) for part in zip(*means, strict=True))
    member = torch.tensor([row.group for row in rows])
    latent = torch.tensor([row.latent for row in rows])
    residual = torch.tensor([row.state == "residual" for row in rows])

    def edits(here: Tensor) -> Sequence[Intervention]:
        values: dict[Place, tuple[Tensor, Tensor]] = {}
        m = member[here].clamp(min=0)
        for k in latents:
            at_k = (latent[here] == k) & (member[here] >= 0)
            whole = _state_edits(
                model, k, at_k & residual[here], z_means[m, k - 1], h_means[m, k], layer_means[m, k - 1]
            )
            whole["embedding", k, 0] = (at_k, z_means[m, k - 1])
            if k == model.n_latents:
                whole.pop(("hidden", k + 1, 0))
            assert not whole.keys() & values.keys()  # h_k and z_{k+1} of different rows are different places
            values |= whole
        return [ReplaceRows(values)]

    return edits


def _state_edits(
    model: CodiModel, k: int, active: Tensor, z: Tensor, h: Tensor, layers: Tensor
) -> dict[Place, tuple[Tensor, Tensor]]:
    """Replacements that make everything at latent k that of given means: z_k, the residual stream, and h_k after the
    final norm. z (row, d_model), h (row, d_model) = h_k, layers (row, layer 0..n_layers, d_model)."""
    values: dict[Place, tuple[Tensor, Tensor]] = {("embedding", k, 0): (active, z)}
    for layer in range(1, model.n_layers):
        values["layer", k, layer] = (active, layers[:, layer])
    values["hidden", k + 1, 0] = (active, h)
    return values
