"""The trial table of edits on a grid: its columns, the order of its rows, and where it is read.

One row = one prompt × one condition. Knows nothing about models or statistics.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa

from experiments.study.folder import TEXT, RunFolder

__all__ = ["SORT_COLUMNS", "TRIAL_SCHEMA", "read_trials"]

TRIAL_SCHEMA = pa.schema([
    ("space", TEXT), ("part", TEXT), ("timing", TEXT),
    ("source", pa.int16()), ("target", pa.int16()), ("coefficient", pa.float64()),
    ("control", TEXT), ("draw", pa.int32()), ("latent", pa.int16()), ("n_latents", pa.int16()),
    ("prompt_id", TEXT), ("cluster", TEXT), ("template", TEXT), ("operation", TEXT),
    ("answer", pa.float64()), ("prediction", pa.float64()), ("text", TEXT),
    ("correct", pa.bool_()), ("parsed", pa.bool_()), ("applied_norm", pa.float64()), ("first_token", pa.int32()),
])  # fmt: skip
"""Columns of the trial table. prediction is null where no number was found; source and target are 0, draw is -1 where
they do not apply."""

SORT_COLUMNS = (
    "space", "part", "timing", "control", "source", "target", "coefficient", "draw", "latent", "n_latents", "prompt_id",
)  # fmt: skip


def read_trials(run: str | Path | RunFolder) -> pd.DataFrame:
    """The whole trial table of a run folder, sorted.

    Raises:
        ValueError: no parts, or one that cannot be read.
    """
    return (run if isinstance(run, RunFolder) else RunFolder(run)).trials(SORT_COLUMNS)
