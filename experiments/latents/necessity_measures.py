"""What `codi necessity` measures: answers after 0..n latents, and with latents replaced.

The functions that make its trial tables, with their columns; necessity.py says what is concluded from them. Knows
nothing about tables of effects, claims or figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import torch

from experiments.statistics.effects import Selector
from experiments.study.answers import answer_table, set_of, trial_schema
from experiments.study.modes import evaluate
from experiments.study.parts import Workbench
from experiments.study.thoughts import derivation_means, evaluation_thoughts
from steering.directions import generator, patch_coordinate, patch_norm, patch_scalar
from steering.replacements import replace_embeddings

if TYPE_CHECKING:
    from steering.means import LatentMeans

__all__ = [
    "COUNTS", "KINDS", "MODE", "ON_ALL_SUBSETS", "REPLACED", "REPLACEMENTS", "UNEDITED", "after", "counts", "replaced",
    "replacements", "subsets",
]  # fmt: skip

KINDS = ("mean", "zero", "coordinate", "scalar", "norm")
FIXED = ("mean", "zero")
"""Kinds without draws."""
ON_ALL_SUBSETS = ("mean", "coordinate")

COUNTS = trial_schema(mode=pa.string(), n_latents=pa.int16())
"""mode as in `lm.terms.AnswerMode`; n_latents is -1 outside mode "latent"."""
REPLACEMENTS = trial_schema(kind=pa.string(), replaced=pa.int32(), draw=pa.int32(), applied_norm=pa.float64())
"""kind: one of KINDS, or "none" for the unedited run; replaced: the set of latents."""
MODE = ("mode", "n_latents")
REPLACED = ("kind", "replaced")
UNEDITED: Selector = {"kind": "none", "replaced": 0}


def after(k: int) -> Selector:
    """Answers after k latents."""
    return {"mode": "latent", "n_latents": k}


def replaced(kind: str, chosen: Sequence[int]) -> Selector:
    """Answers with these latents replaced."""
    return {"kind": kind, "replaced": set_of(chosen)} if chosen else UNEDITED


def counts(bench: Workbench, *, batch_size: int, seed: int) -> pd.DataFrame:
    """Answers after 0..n latents, direct, and after a written chain."""
    problems = bench.prompts.evaluation
    frame = evaluate(bench.model, problems, max_new_tokens=None, seed=seed, batch_size=batch_size)
    where = {problem.prompt_id: i for i, problem in enumerate(problems)}
    return answer_table(
        problems,
        [where[name] for name in frame["prompt_id"]],
        frame["text"].tolist(),
        mode=frame["mode"].to_numpy(),
        n_latents=frame["n_latents"].to_numpy(),
    )


def subsets(n: int) -> list[tuple[int, ...]]:
    """Every non-empty subset of latents 1..n, small ones first."""
    return [chosen for size in range(1, n + 1) for chosen in itertools.combinations(range(1, n + 1), size)]


def _vectors(means: LatentMeans, n: int, draws: int, seed: int) -> tuple[torch.Tensor, dict[tuple[str, int, int], int]]:
    """Table of replacing vectors and where (kind, latent, draw) is in it."""
    rows: list[torch.Tensor] = []
    place: dict[tuple[str, int, int], int] = {}
    forms = {"scalar": patch_scalar, "coordinate": patch_coordinate, "norm": patch_norm}
    for latent in range(1, n + 1):
        fixed = {"mean": means.embeddings[latent - 1], "zero": torch.zeros_like(means.embeddings[0])}
        for kind, vector in fixed.items():
            place[kind, latent, 0] = len(rows)
            rows.append(vector)
        for kind, form in forms.items():
            for draw in range(draws):
                place[kind, latent, draw] = len(rows)
                drawn = form(means, latent, "embedding", generator(seed, "necessity", kind, latent, draw)).vector
                assert drawn is not None
                rows.append(drawn)
    return torch.stack(rows), place


def _tried(n: int, draws: int, all_subsets: bool) -> list[tuple[str, tuple[int, ...], int]]:
    """(kind, latents, draw) of every replacement, the unedited run first; draw is -1 where nothing is drawn."""
    short = [(k,) for k in range(1, n + 1)] + [tuple(range(1, k + 1)) for k in range(2, n + 1)]
    short += [(n - 1, n)] if n > 2 else []
    tried: list[tuple[str, tuple[int, ...], int]] = [("none", (), -1)]
    for kind in KINDS:
        for chosen in subsets(n) if all_subsets and kind in ON_ALL_SUBSETS else short:
            tried += [(kind, chosen, draw) for draw in ([-1] if kind in FIXED else range(draws))]
    return tried


def replacements(
    bench: Workbench, *, draws: int, all_subsets: bool, max_new_tokens: int | None, batch_size: int, seed: int
) -> pd.DataFrame:
    """Answers after every replacement, prompt by prompt."""
    model, n = bench.model, bench.model.n_latents
    means = bench.once(derivation_means)
    thoughts = bench.once(evaluation_thoughts, ("embeddings", "cache"))
    run = thoughts.run
    assert run.embeddings is not None
    table, place = _vectors(means, n, draws, seed)
    norms = run.embeddings.float().norm(dim=-1).cpu()  # (prompt, latent)
    tried = _tried(n, draws, all_subsets)
    direction = torch.full((len(tried), n), -1)
    own_norm = torch.zeros(len(tried), n, dtype=torch.bool)
    for row, (kind, chosen, draw) in enumerate(tried):
        for latent in chosen:
            direction[row, latent - 1] = place[kind, latent, max(draw, 0)]
            own_norm[row, latent - 1] = kind == "norm"
    prompts, m = len(thoughts), len(tried)
    directions = direction.repeat(prompts, 1)
    coefficient = torch.where(own_norm.repeat(prompts, 1), norms.repeat_interleave(m, 0), torch.ones(()))
    rows = torch.arange(prompts).repeat_interleave(m)
    answers = replace_embeddings(
        model,
        run,
        table,
        rows,
        torch.arange(1, n + 1).expand(len(rows), n),
        directions,
        coefficient,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    return answer_table(
        thoughts.problems,
        rows,
        answers.texts,
        kind=[kind for kind, _, _ in tried] * prompts,
        replaced=[set_of(chosen) for _, chosen, _ in tried] * prompts,
        draw=[draw for _, _, draw in tried] * prompts,
        applied_norm=answers.applied_norm.numpy(),
    )
