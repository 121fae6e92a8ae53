"""The figure of `codi circuit-latents`: every head, and the loudest ones by source. Knows nothing about models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.figures.heatmap import Scale, colour_bar, matrix
from experiments.figures.style import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_latent_writers"]


@styled
def draw_latent_writers(
    writers: pd.DataFrame, by_source: pd.DataFrame, n_blocks: int, n_heads: int, named: int
) -> Figure:
    """Left: share of the logit by head. Right: the loudest heads by source, on a scale of their own.

    Args:
        writers: block, head, share; the loudest first.
        by_source: block, head, source, latent, share.
        n_blocks, n_heads: of the model.
        named: heads on the right.
    """
    figure, axes = new_figure(1, 2, height=2.6)
    scale = Scale.signed(writers["share"], least=0.001)
    whole = np.full((n_blocks, n_heads), np.nan)
    whole[writers["block"] - 1, writers["head"]] = writers["share"]
    matrix(axes[0, 0], whole, range(1, n_blocks + 1), range(n_heads), scale, upwards=True)
    axes[0, 0].set_xlabel("head")
    axes[0, 0].set_ylabel("block")
    axes[0, 0].set_title("all sources")
    order = by_source[["source", "latent"]].drop_duplicates()
    place = {"question": -1, "latent": 0, "rest": 1000}
    keys = sorted(order.itertuples(index=False, name=None), key=lambda key: place[key[0]] + key[1])
    best = list(writers.head(named)[["block", "head"]].itertuples(index=False, name=None))
    known = by_source.set_index(["block", "head", "source", "latent"])["share"]
    values = np.array([[known[(block, head, *key)] for key in keys] for block, head in best])
    names = ["question" if name == "question" else "rest" if name == "rest" else f"{number}" for name, number in keys]
    own = Scale.signed(values, least=0.001)
    matrix(axes[0, 1], values, [f"{block}.{head}" for block, head in best], names, own)
    axes[0, 1].set_xlabel("question, latent, rest")
    axes[0, 1].set_title("loudest writers by source")
    colour_bar(figure, scale, "share of the answer's logit", of=axes[:, :1])
    colour_bar(figure, own, "share of the answer's logit", of=axes[:, 1:])
    return figure
