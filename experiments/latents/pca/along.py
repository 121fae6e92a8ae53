"""Steering along principal components: one standard deviation of their scores, both signs, early exit.

In embedding and kv space, beside random directions of the same norm. Knows nothing about files, tables or claims.
"""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from codi.branches import decode_branches
from experiments.latents.pca.components import Components, pooled_components
from experiments.statistics.effects import Selector
from experiments.study.answers import answer_table, trial_schema
from experiments.study.parts import Workbench
from experiments.study.thoughts import evaluation_thoughts
from lm.terms import Space
from steering.directions import Direction, generator
from steering.interventions import Edit, branches, edit_table

__all__ = ["ALONG", "BY", "SPACES", "along", "along_components"]

SPACES: tuple[tuple[Space, str], ...] = (("embedding", "z"), ("kv", "kv"))
"""Space that is steered in, and the quantity whose components are taken."""

ALONG = trial_schema(
    space=pa.string(), latent=pa.int16(), kind=pa.string(), component=pa.int32(), sign=pa.int16(), draw=pa.int32(),
    applied_norm=pa.float64(),
)  # fmt: skip
"""kind: "component", "random" (a direction with the norm of that component's edit) or "none" (the unedited exit at that
latent: component and sign 0); draw: of the random ones."""
BY = ("space", "latent", "kind", "component", "sign")


def along(space: str, latent: int, kind: str = "none", component: int = 0, sign: int = 0) -> Selector:
    """Answers at an exit, steered along a component or a random direction."""
    return {"space": space, "latent": latent, "kind": kind, "component": component, "sign": sign}


def along_components(
    bench: Workbench, *, steered: int, draws: int, top: int, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Trial table of steering along components, see `ALONG`."""
    model = bench.model
    pooled = bench.once(pooled_components, top, batch_size)
    thoughts = bench.once(evaluation_thoughts, ("embeddings", "keys", "values", "cache"))
    shape = (model.n_layers, model.n_kv_heads, model.d_head)
    frames = []
    for space, quantity in SPACES:
        table, names = _directions(pooled[quantity], space, shape, steered, draws, seed)
        edits: list[Edit] = []
        labels: list[tuple[int, str, int, int, int]] = []  # latent, kind, component, sign, draw
        for latent in range(1, model.n_latents + 1):
            edits.append(Edit(latent))
            labels.append((latent, "none", 0, 0, -1))
            for row, (kind, component, draw) in enumerate(names):
                for sign in (1, -1):
                    edits.append(Edit(latent, row, float(sign)))
                    labels.append((latent, kind, component, sign, draw))
        answers = decode_branches(
            model,
            thoughts.run,
            edit_table(table, model.device) if table else None,
            branches(edits, thoughts.run, space),
            timing="early-exit",
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        size = len(thoughts)
        columns = dict(zip(("latent", "kind", "component", "sign", "draw"), zip(*labels, strict=True), strict=True))
        frames.append(
            answer_table(
                thoughts.problems,
                torch.arange(size).repeat_interleave(len(edits)),
                answers.texts,
                space=space,
                **{name: list(values) * size for name, values in columns.items()},
                applied_norm=answers.applied_norm.numpy(),
            )
        )
    return pd.concat(frames, ignore_index=True)


def _directions(
    components: Components, space: Space, shape: tuple[int, int, int], steered: int, draws: int, seed: int
) -> tuple[list[Direction], list[tuple[str, int, int]]]:
    """The directions that are steered along, and kind, component and draw of each; none along what does not vary."""
    table: list[Direction] = []
    names: list[tuple[str, int, int]] = []
    for i in range(min(steered, len(components.vectors))):
        vector = components.vectors[i] * components.variances[i].sqrt()
        if float(vector.norm()) == 0:
            continue
        table.append(_as_direction(vector, space, shape))
        names.append(("component", i + 1, -1))
        for draw in range(draws):
            rng = generator(seed, "pca", space, i, draw)
            noise = torch.from_numpy(rng.standard_normal(len(vector)))
            table.append(_as_direction(noise * vector.norm() / noise.norm(), space, shape))
            names.append(("random", i + 1, draw))
    return table, names


def _as_direction(vector: Tensor, space: Space, shape: tuple[int, int, int]) -> Direction:
    if space == "embedding":
        return Direction("embedding", vector=vector.double())
    keys, values = vector.double().chunk(2)
    return Direction("kv", keys=keys.reshape(shape), values=values.reshape(shape))
