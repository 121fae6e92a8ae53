"""What a training run leaves behind while it goes on: the state that it continues from, and the log of its losses.

Knows nothing about models, losses or data.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["StepLog", "load_state", "save_state"]


def load_state(path: Path, weights: Mapping[str, nn.Parameter], optimizer: Any) -> int:
    """Put back what a state file holds; the number of steps that are done, 0 without one."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def save_state(path: Path, step: int, weights: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Write a state file whole or not at all; straight to disk, it may be as large as the model."""
    raw = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    partial = path.with_name(f"{path.name}.partial")
    torch.save(
        {
            "step": step,
            "weights": {k: v.detach().cpu() for k, v in weights.items()},
            "optimizer": raw.state_dict(),
        },
        partial,
    )
    partial.replace(path)


class StepLog:
    """log.csv: one row per step and loss term; rows after the state that a run goes on from are dropped, because those
    steps come again.

    Args:
        path: of the file.
        stage: of the training; rows of other stages are kept.
        first: steps of this stage that are done.
    """

    def __init__(self, path: Path, stage: str, first: int) -> None:
        head = ["stage", "step", "term", "value", "gradient_norm", "seconds"]
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(head)]
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([head, *(row for row in rows if row[0] != stage or int(row[1]) <= first)])
        partial.replace(path)
        self.file = path.open("a", newline="")
        self.writer = csv.writer(self.file)

    def write(self, stage: str, step: int, terms: Mapping[str, float], norm: float, seconds: float) -> None:
        """Add the rows of one step."""
        for term, value in terms.items():
            self.writer.writerow([stage, step, term, f"{value:.6g}", f"{norm:.4g}", f"{seconds:.3f}"])
        self.file.flush()
