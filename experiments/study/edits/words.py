"""What a family of cells shows, in sentences that several summaries share: all cells together, and what cannot be seen.

Reads the records of verdicts.py. Knows nothing about trials, models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.statistics.words import p_number

__all__ = ["hidden", "singles", "together"]


def together(row: Mapping[Any, Any] | pd.Series) -> str:
    """How many cells rank last (harm) or first (gain) among their draws; `row` is a record of the evidence."""
    place = "last" if row["tail"] == "harm" else "first"
    return (
        f"{row['last']} rank {place} among their draws, {row['last_expected']:.1f} expected, "
        f"{row['last_families_lower']} to {row['last_families_upper']} in families of random draws, "
        f"p {p_number(row['last_p'])}"
    )


def singles(row: Mapping[Any, Any] | pd.Series, alpha: float) -> str:
    """Why no single cell can have a verdict, in words; "": there are draws enough."""
    if row["least_p"] <= alpha + 1e-12:
        return ""
    shared = f", shared by {row['shared']} directions," if row["shared"] > 1 else ""
    return (
        f"no single cell can be judged: {row['draws']} draws{shared} allow no family-wise p below "
        f"{min(1.0, row['least_p']):.2g}, {row['needed_draws']} are needed for {alpha:g}"
    )


def hidden(baselines: pd.DataFrame) -> list[str]:
    """What floors and ceilings hide, a sentence for all latents alike; `baselines` are those of one family."""
    sentences = []
    for text, alike in baselines[baselines["words"] != ""].groupby("words", sort=False) if len(baselines) else ():
        latents = sorted({int(latent) for one in alike["latents"] for latent in str(one).split()})
        noun = "Latent" if len(latents) == 1 else "Latents"
        where = f"{noun} {', '.join(map(str, latents))}: " if len(alike) < len(baselines) else ""
        sentences.append(f"{where}{text}")
    return sentences
