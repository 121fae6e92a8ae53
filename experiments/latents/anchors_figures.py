"""Figures of `codi anchors`, drawn from its tables: importance of latents, dependencies, receiver heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.figures.heatmap import draw_matrix
from experiments.figures.series import baseline, draw_series, from_zero
from experiments.figures.style import legend, new_figure
from experiments.latents.anchors_measures import edge, hidden_latent, receivers, resampled_at
from experiments.statistics.effects import row_of, rows_of

__all__ = ["figures"]

MOST_HEADS = 32
"""Heads that are shown, those with the most attention to latents."""
_SERIES = (
    ("vector", "unmatched", "vector, other key"),
    ("vector", "matched", "vector, same key"),
    ("vector", "noise", "vector, noise"),
    ("slot", "unmatched", "slot, other key"),
    ("slot", "matched", "slot, same key"),
)


def figures(tables: Mapping[str, pd.DataFrame], n: int) -> dict[str, Any]:
    """Figures by file name."""
    return {
        "importance": _importance(tables, n),
        "dependencies": _dependencies(tables, n),
        "heads": _heads(tables["heads"], n),
    }


def _importance(tables: Mapping[str, pd.DataFrame], n: int) -> Any:
    """What resampling each latent does to the answer, and what of it is not the wording's."""
    latents = list(range(1, n + 1))
    figure, axes = new_figure(1, 3, height=2.6)
    for axis, outcome, scale, text in ((axes[0, 0], "kl", 1, "KL (nats)"), (axes[0, 1], "flip", 100, "flips (%)")):
        for place, (level, kind, name) in enumerate(_SERIES):
            rows = rows_of(tables[f"resampled_{outcome}"], [resampled_at(level, kind, k) for k in latents])
            draw_series(axis, latents, rows, name, place, scale=scale, control=kind != "unmatched")
        axis.set(xlabel="resampled latent", ylabel=text, title=f"Effect on the answer: {text}", xticks=latents)
        from_zero(axis)
    legend(figure, axes[0, :1])
    baseline(axes[0, 2])
    for place, level in ((0, "vector"), (3, "slot")):
        rows = rows_of(tables["importance_kl"], [resampled_at(level, "unmatched", k) for k in latents])
        draw_series(axes[0, 2], latents, rows, level, place, name="difference", scale=1)
    axes[0, 2].set(xlabel="resampled latent", ylabel="KL (nats)", title="Importance: other − same key", xticks=latents)
    return figure


def _dependencies(tables: Mapping[str, pd.DataFrame], n: int) -> Any:
    """What hiding each source from each reader does, at the answer and at the reader."""
    figure, axes = new_figure(1, 2, height=2.9)
    sources: list[str | int] = ["prompt", "question", *range(1, n + 1)]
    readers: list[str | int] = [*range(1, n + 1), "answer"]
    for axis, name, scale, form, title in (
        (axes[0, 0], "edges_kl", 1, ".2f", "KL of the answer (nats)"),
        (axes[0, 1], "edges_change", 100, ".0f", "Change of the reader's state (% of spread)"),
    ):
        used = readers if name == "edges_kl" else readers[:-1]
        values = np.full((len(sources), len(used)), np.nan)
        strong = np.zeros(values.shape, bool)
        for i, source in enumerate(sources):
            for j, reader in enumerate(used):
                if isinstance(source, int) and isinstance(reader, int) and source >= reader:
                    continue
                chosen = hidden_latent(source, reader) if isinstance(source, int) else edge(source, reader)
                row = row_of(tables[name], chosen)
                values[i, j] = scale * row["mean"]
                strong[i, j] = row["matters"] and row["difference"] > 0
        draw_matrix(axis, values, list(map(str, sources)), list(map(str, used)), title, form=form, significant=strong)
        axis.set(xlabel="reader", ylabel="hidden from it")
    return figure


def _heads(heads: pd.DataFrame, n: int) -> Any:
    """Which latents each head looks at."""
    latents = list(range(1, n + 1))
    shares = heads[[f"share_{k}" for k in latents]].to_numpy() * 100
    names = [f"{row['layer']:.0f}.{row['head']:.0f} ({row['mass']:.2f})" for _, row in heads.iterrows()]
    keep = np.sort(np.argsort(-heads["mass"].to_numpy())[:MOST_HEADS])
    figure, axes = new_figure(1, 1, height=0.9 + 0.19 * len(keep))
    strong = np.repeat(receivers(heads).to_numpy()[keep, None], n, axis=1)
    strong &= shares[keep] == shares[keep].max(1, keepdims=True)
    draw_matrix(
        axes[0, 0], shares[keep], [names[i] for i in keep], list(map(str, latents)),
        "Attention of the end-of-thought token: share of each latent (%)", significant=strong,
    )  # fmt: skip
    axes[0, 0].set(xlabel="latent", ylabel="layer.head (attention to latents)")
    return figure
