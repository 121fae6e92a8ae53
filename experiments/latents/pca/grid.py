"""The steering of the published study, small: all pairs A−B, |c| 0.5 and 1, beside random directions of their norms.

In kv, embedding and hidden space with early exit, and in kv space pushed through one more latent. The trial table is
that of `codi sweep`. Knows nothing about files or claims.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd

from codi.decode import default_new_tokens
from experiments.study.edits.grid import Grid, directions
from experiments.study.edits.run import EditPart, run_part
from experiments.study.edits.trials import TRIAL_SCHEMA
from experiments.study.parts import Workbench
from experiments.study.thoughts import derivation_means
from lm.terms import Space, Timing
from steering.interventions import edit_table

__all__ = ["BY", "GRID", "SPACES", "grid_trials", "rates_of"]

GRID = TRIAL_SCHEMA
"""With timing "continue" n_latents is the edited latent + 1."""
SPACES: tuple[Space, ...] = ("kv", "embedding", "hidden")
BY = ("space", "timing", "control", "latent")
"""Of `rates_of`."""
_AT_ONCE = 16  # prompts


def grid_trials(bench: Workbench, *, draws: int, max_new_tokens: int | None, seed: int) -> pd.DataFrame:
    """Every edit of the grid on every evaluation prompt, see `GRID`."""
    model, problems = bench.model, bench.prompts.evaluation
    means = bench.once(derivation_means)
    n = model.n_latents
    tokens = default_new_tokens(model) if max_new_tokens is None else max_new_tokens
    jobs: list[tuple[Space, Timing, tuple[int, ...], int]] = [
        (space, "early-exit", tuple(range(1, n + 1)), n) for space in SPACES
    ]
    jobs += [("kv", "continue", (k,), k + 1) for k in range(1, n)]
    frames = []
    for space, timing, latents, longest in jobs:
        grid = Grid(
            spaces=(space,),
            timings=(timing,),
            pairs=tuple(itertools.permutations(range(1, n + 1), 2)),
            latents=latents,
            coefficients=(-1.0, -0.5, 0.5, 1.0),
            controls=("random",),
            draws=draws,
            draw_norm="pooled",
            n_latents=longest,
            seed=seed,
        )
        table = edit_table(directions(grid, space, means), model.device)
        whole = EditPart(grid, space, "both", timing, problems, tokens)
        with bench.bar(whole.rows, "answer", f"edits ({space}, {timing}, from latent {latents[0]})") as advance:
            for start in range(0, len(problems), _AT_ONCE):
                part = dataclasses.replace(whole, problems=problems[start : start + _AT_ONCE])
                frames.append(pd.DataFrame(run_part(model, table, part, advance)))
    return pd.concat(frames, ignore_index=True)


def rates_of(trials: pd.DataFrame) -> pd.DataFrame:
    """The edited trials, each beside the unsteered answer of its prompt at the same exit.

    Returns:
        The edited rows with `changed`, the answer is not the unsteered one; and `gain`, right minus unsteered right.
    """
    words = [name for name in trials if isinstance(trials[name].dtype, pd.CategoricalDtype)]
    trials = trials.astype(dict.fromkeys(words, object))
    trials = trials.assign(exit=np.where(trials["timing"] == "early-exit", trials["latent"], trials["n_latents"]))
    keys = ["space", "timing", "exit", "prompt_id"]
    base = trials[trials["control"] == "none"].drop_duplicates(keys).set_index(keys)[["text", "correct"]]
    base.columns = pd.Index(["text_base", "correct_base"])
    edited = trials[trials["control"] != "none"].join(base, on=keys)
    edited["changed"] = edited["text"] != edited["text_base"]
    edited["gain"] = edited["correct"].astype(float) - edited["correct_base"].astype(float)
    return edited
