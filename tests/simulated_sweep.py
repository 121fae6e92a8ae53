"""Trial tables of made-up sweeps: known effects, known controls, no model. For the tests of stats, plots and report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd


def simulate_trials(
    *,
    pairs: int = 15,
    latents: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    sizes: tuple[float, ...] = (0.5, 1.0, 2.0),
    signs: tuple[int, ...] = (-1, 1),
    draws: int = 20,
    prompts: int = 150,
    clusters: int = 75,
    baseline: float = 0.7,
    flip: float = 0.05,
    effects: Mapping[tuple[int, int, float, int], float] | None = None,
    structured: bool = False,
    controls: tuple[str, ...] = ("random",),
    patches: tuple[str, ...] = (),
    timing: str = "early-exit",
    space: str = "kv",
    part: str = "both",
    seed: int = 0,
) -> pd.DataFrame:
    """A sweep over unordered pairs (source < target) with both signs.

    An edit of size c changes each answer with probability `flip` * |c|, evenly to right and wrong (so it has no effect
    on average); on top, `effects[source, target, coefficient, latent]` = e > 0 turns wrong answers right with
    probability e, e < 0 right answers wrong with probability -e. `structured` adds effects that look like published
    ones: harm that grows with |c| and depends on pair and position, help at latent 5 for a few pairs.
    """
    rng = np.random.default_rng(seed)
    effects = dict(effects or {})
    unordered = [(a, b) for a in range(1, 7) for b in range(a + 1, 7)][:pairs]
    if structured:
        for number, (source, target) in enumerate(unordered):
            for latent in latents:
                for size in sizes:
                    for sign in signs:
                        harm = 0.03 * size**1.5 * (1 + (number % 4)) * (0.4 + (latent % 2)) * (1 + 0.5 * sign)
                        effects[source, target, sign * size, latent] = -min(harm, 0.9)
            if number % 5 == 1 and 5 in latents:
                for size in sizes:
                    effects[source, target, size, 5] = 0.5
    cluster = np.arange(prompts) % clusters
    ability = np.clip(baseline + 0.2 * rng.standard_normal(clusters), 0.02, 0.98)[cluster]
    ids = np.array([f"p{number:04d}" for number in range(prompts)])
    unsteered = {}
    for latent in latents if timing == "early-exit" else (0,):
        strength = 0.45 + 0.55 * latent / max(latents) if latent else 1.0
        unsteered[latent] = rng.random(prompts) < ability * strength

    conditions: list[dict[str, object]] = []
    answers: list[np.ndarray] = []

    def add(correct: np.ndarray, **condition: object) -> None:
        answers.append(correct)
        conditions.append(condition)

    def noisy(before: np.ndarray, size: float) -> np.ndarray:
        flipped = rng.random(prompts) < flip * size * np.where(
            before, 1.0, before.mean() / max(1 - before.mean(), 0.05)
        )
        return before ^ flipped

    common = {"space": space, "part": part, "timing": timing}
    last = max(latents)
    for latent, before in unsteered.items():
        where = {"latent": latent, "n_latents": latent or last}
        add(before, source=0, target=0, coefficient=0.0, control="none", draw=-1, applied_norm=0.0, **where, **common)
    for latent in latents:
        before = unsteered[latent if timing == "early-exit" else 0]
        where = {"latent": latent, "n_latents": latent if timing == "early-exit" else last} | common
        for source, target in unordered:
            pair = {"source": source, "target": target}
            norm = 3.0 + 0.2 * source + 0.1 * target
            for size in sizes:
                for sign in signs:
                    c = sign * size
                    after = noisy(before, size)
                    effect = effects.get((source, target, c, latent), 0.0)
                    chosen = rng.random(prompts) < abs(effect)
                    after = after | chosen if effect > 0 else after & ~chosen
                    add(after, coefficient=c, control="direction", draw=-1, applied_norm=norm * size, **pair, **where)
                for control in controls:
                    for draw in range(draws):
                        after = noisy(before, size)
                        if structured:
                            after &= rng.random(prompts) >= 0.04 * size
                        condition = {"coefficient": size, "control": control, "draw": draw, "applied_norm": norm * size}
                        add(after, **condition, **pair, **where)
        for control in patches:
            for draw in range(draws):
                condition = {"source": 0, "target": 0, "coefficient": 0.0, "control": control, "draw": draw}
                add(noisy(before, 4.0), applied_norm=5.0, **condition, **where)
    # one column after the other: a table of millions of rows in a second
    columns = {name: np.repeat([condition[name] for condition in conditions], prompts) for name in conditions[0]}
    columns["prompt_id"] = np.tile(ids, len(conditions))
    columns["cluster"] = np.tile(np.array([f"c{number:03d}" for number in cluster]), len(conditions))
    columns["correct"] = np.concatenate(answers)
    trials = pd.DataFrame(columns)
    trials["parsed"] = trials["correct"] | (rng.random(len(trials)) > 0.02)
    trials["template"] = trials["operation"] = "addition"
    return trials
