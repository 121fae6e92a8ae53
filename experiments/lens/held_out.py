"""How far trained lenses are from the model's own output on questions that they were not trained on.

`held_out_table` runs the model; words and figure are made from the table alone, so that the folder of a finished
training says later what it said when it ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from experiments.lens.prompts import batches, clusters_of, per_cent, sizes
from experiments.statistics.clusters import Settings, mean_intervals
from experiments.tasks import Problem
from lenses.latent_lens import LatentLens, States
from lenses.training import LensTraining, collect_states, divergence_to_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["held_out_figures", "held_out_table", "held_out_text"]


def held_out_table(
    training: LensTraining, problems: Sequence[Problem], text_tokens: int, batch_size: int, settings: Settings
) -> pd.DataFrame:
    """KL of every lens at its own positions on held-out questions, beside the plain lens.

    Args:
        training: done.
        problems: held out.
        text_tokens: tokens of every question for lenses on text.
        batch_size: questions at once.
        settings: of the intervals; its seed is that of the choice of text tokens too.

    Returns:
        One row per lens × position × layer: divergence with lower and upper, plain with plain_lower and plain_upper,
        change (divergence − plain, paired) with change_lower and change_upper, n, n_clusters; nats.
    """
    model = training.model
    positions = list(training.all_positions)
    plain = LatentLens(training.unembed, model.n_layers)
    wanted = [(name, position) for name, own in training.positions.items() for position in own]
    found = np.full((len(wanted), len(problems), model.n_layers), np.nan)
    base = np.full((len(positions), len(problems), model.n_layers), np.nan)
    generator = torch.Generator().manual_seed(settings.seed)
    for rows in batches(problems, batch_size):
        states = collect_states(model, [problems[i].question for i in rows], positions, text_tokens, generator)
        for position in positions:
            part = states.at([position])
            base[positions.index(position), rows] = _per_prompt(plain, part, len(rows))
            for i, (name, own) in enumerate(wanted):
                if own == position:
                    found[i, rows] = _per_prompt(training.lens(name), part, len(rows))
    clusters = clusters_of(problems)
    frames = []
    for i, (name, position) in enumerate(wanted):
        before = base[positions.index(position)]
        level = mean_intervals(found[i], clusters, settings, bounds=(0.0, np.inf))
        start = mean_intervals(before, clusters, settings, bounds=(0.0, np.inf))
        change = mean_intervals(found[i] - before, clusters, settings, bounds=(-np.inf, np.inf))
        columns = {"lens": name, "position": position, "layer": range(model.n_layers)}
        for word, table in (("divergence", level), ("plain", start), ("change", change)):
            before_bound = "" if word == "divergence" else f"{word}_"
            columns |= {word: table["mean"]}
            columns |= {f"{before_bound}{bound}": table[bound] for bound in ("lower", "upper")}
        frames.append(pd.DataFrame({**columns, "n": level["n"], "n_clusters": level["n_clusters"]}))
    return pd.concat(frames, ignore_index=True)


def _per_prompt(lens: LatentLens, states: States, prompts: int) -> np.ndarray:
    """(prompt, layer 0..n_layers − 1) divergence from the model's output, nats, mean over the prompt's states."""
    where = states.prompt.cpu()
    n = torch.bincount(where, minlength=prompts)[:, None]
    values = divergence_to_output(lens, states)[:, :-1]
    return (torch.zeros(prompts, values.shape[1]).index_add_(0, where, values) / n).numpy()


def held_out_text(table: pd.DataFrame, steps: int, batch_size: int, level: float = 0.95) -> str:
    """Held-out KL per lens, averaged over its positions and layers, and where it does not help.

    Args:
        table: of `held_out_table`.
        steps: that were done.
        batch_size: questions of a step.
        level: coverage of the intervals.
    """
    sample = sizes(int(table["n"].max()), int(table["n_clusters"].max()))
    lines = [f"{steps} steps of {batch_size} questions; held-out KL to the model's output, nats, {sample}:"]
    for name in dict.fromkeys(table["lens"]):
        mine = table[table["lens"] == name]
        better = int((mine["change_upper"] < 0).sum())
        lines.append(
            f"  {name:<8} {mine['plain'].mean():7.3f} plain -> {mine['divergence'].mean():7.3f} tuned, mean over "
            f"{len(mine)} position × layer; below plain ({per_cent(level)} interval) at {better} of {len(mine)}"
        )
    return "\n".join(lines)


def held_out_figures(table: pd.DataFrame, level: float = 0.95) -> dict[str, Figure]:
    """The one figure; every position's own lens is drawn as one series, "each"."""
    from experiments.lens.figures import held_out_figure

    own = table["lens"] == table["position"].astype(str)
    shown = table.assign(lens=table["lens"].where(~own, "each"))
    names = [name for name in ("each", "all", "odd", "even", "text") if (shown["lens"] == name).any()]
    names += [name for name in dict.fromkeys(shown["lens"]) if name not in names]
    return {"held_out": held_out_figure(shown, names[:7], level)}
