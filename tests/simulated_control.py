"""Trial tables of steering without a model, in which it is known what every claim should come out as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

Effect = Callable[[str, int, float, int], dict[str, float]]
"""(kind, layer, alpha, draw) -> accuracy, p_right, entropy and kl to be expected, as changes from the unsteered model
(kl as it is)."""


def trials(
    effect: Effect, n: int = 200, alphas: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0), layers: Sequence[int] = (2,),
    draws: int = 20, accuracy: float = 0.5, seed: int = 0, split: str = "test", method: str = "contrastive",
) -> pd.DataFrame:  # fmt: skip
    """One row per item and cell. Items are right by a uniform number of their own, so conditions are paired."""
    rng = np.random.default_rng(seed)
    luck, own_p = rng.random(n), rng.uniform(0.2, 0.6, n)
    names = np.array([f"{split}-{i}" for i in range(n)], dtype=object)
    rows: list[dict[str, Any]] = []

    def add(kind: str, layer: int, alpha: float, draw: int) -> None:
        change = {"correct": 0.0, "p_right": 0.0, "entropy": 0.0, "kl": 0.0}
        if kind != "none" and alpha:
            change |= effect(kind, layer, alpha, draw)
        noise = np.random.default_rng([seed, layer + 1, int(1000 * (alpha + 5)), draw + 1])
        moved = 0 if kind == "none" or not alpha else 1
        jitter = moved * noise.normal(0, 0.02, n)
        correct = luck < accuracy + change["correct"]
        p_right = np.clip(own_p + change["p_right"] + jitter / 4, 0, 1)
        rows.append({
            "kind": kind, "method": "" if kind == "none" else method, "layer": layer, "alpha": alpha, "draw": draw,
            "coefficient": alpha, "norm": abs(alpha) * 10, "prompt_id": names, "cluster": names, "correct": correct,
            "choice_correct": correct.astype(float), "kl": moved * np.abs(change["kl"] + jitter / 10),
            "entropy": 3 + change["entropy"] + jitter, "p_right": p_right, "p_wrong": 0.1, "p_answers": p_right + 0.1,
            "share_right": p_right / (p_right + 0.1),
            "repetition": 0.0 if kind in ("none", "vector") else np.nan,
        })  # fmt: skip

    add("none", -1, 0.0, -1)
    for layer in layers:
        for alpha in alphas:
            add("vector", layer, alpha, -1)
        for alpha in sorted({abs(a) for a in alphas if a}) if split == "test" else ():
            for draw in range(draws):
                add("random", layer, alpha, draw)
            add("shuffled", layer, alpha, 0)
    columns = {name: np.concatenate([np.broadcast_to(row[name], n) for row in rows]) for name in rows[0]}
    constant = {"source": "", "target": "", "split": split, "task": "simulated", "answer": "x", "text": "x",
                "prediction": "x", "parsed": True,
                "choice": "x", "n_tokens": 3}  # fmt: skip
    return pd.DataFrame(columns).assign(**constant)


def both(effect: Effect, **options: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Validation and test trials of one effect."""
    return (
        trials(effect, split="validation", seed=1, **options),  # type: ignore[arg-type]
        trials(effect, split="test", seed=2, **options),  # type: ignore[arg-type]
    )
