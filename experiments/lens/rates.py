"""Tables of `codi lens detect` from what lenses read: rates with chance levels, entropy, words, answers.

Every rate has an interval by bootstrap over clusters. Knows nothing about models, files or figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.lens.detection import CHANCES, Detection
from experiments.lens.options import TOP
from experiments.statistics.clusters import Settings, mean_intervals
from experiments.statistics.equivalence import family_level, judge_presence
from experiments.study.claims import Claim, ClaimsTable, effect_claim

__all__ = ["answers", "claims_of", "rates", "readings_of_targets", "summaries", "word_rates"]


def rates(found: Detection, settings: Settings | None = None) -> pd.DataFrame:
    """Detection rates: one row per lens × latent × layer × target × answered × k.

    Columns: rate, lower, upper, chance, lift (rate − chance, paired) with lift_lower and lift_upper, n, n_clusters,
    multi_token (share of the targets). answered: "all", or prompts that the model answered "right" / "wrong".
    """
    groups = {"all": np.ones(len(found.right), bool), "right": found.right, "wrong": ~found.right}
    frames = []
    for answered, chosen in groups.items():
        if not chosen.any() or (answered != "all" and chosen.all()):
            continue
        several = np.where(found.rank[0, :, 0, 0] > 0, found.multi_token, np.nan)[chosen]
        share = dict(zip(found.targets, _column_means(several), strict=True))
        for i, lens in enumerate(found.lenses):
            frame = _rates_of(found, i, chosen, settings)
            frame.insert(0, "lens", lens)
            frame.insert(4, "answered", answered)
            frame["multi_token"] = frame["target"].map(share)
            frames.append(frame[frame["n"] > 0])
    return pd.concat(frames, ignore_index=True)


def _rates_of(found: Detection, lens: int, chosen: np.ndarray, settings: Settings | None) -> pd.DataFrame:
    """Rates of one lens on some prompts."""
    rank = found.rank[lens][chosen]  # prompt, position, layer, target
    known = rank > 0
    hits = np.stack([np.where(known, rank <= k, np.nan) for k in range(1, TOP + 1)], axis=-1)
    chance = np.where(known[..., None], found.chance[lens][chosen], np.nan)
    clusters = found.clusters[chosen]
    level = mean_intervals(hits.reshape(len(hits), -1), clusters, settings)
    lift = mean_intervals((hits - chance).reshape(len(hits), -1), clusters, settings, bounds=(-1.0, 1.0))
    frame = _grid(latent=found.positions, layer=range(rank.shape[2]), target=found.targets, k=range(1, TOP + 1))
    frame["rate"], frame["lower"], frame["upper"] = level["mean"], level["lower"], level["upper"]
    frame["chance"] = (level["mean"] - lift["mean"]).to_numpy()
    frame["lift"], frame["lift_lower"], frame["lift_upper"] = lift["mean"], lift["lower"], lift["upper"]
    frame["n"], frame["n_clusters"] = level["n"], level["n_clusters"]
    return frame


def _grid(**axes: Iterable[Any]) -> pd.DataFrame:
    """Every combination of the axes, the last one running fastest."""
    return pd.MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)


def _column_means(values: np.ndarray) -> list[float]:
    return [float(np.nanmean(column)) if not np.isnan(column).all() else float("nan") for column in values.T]


def word_rates(found: Detection, settings: Settings | None = None) -> pd.DataFrame:
    """Word families: one row per lens × latent × layer × word × k, with rate, lower, upper, n, n_clusters.

    A spelling of several tokens counts only if all of them are among the k; single_token_spellings says how many of
    the (up to four) spellings are one token: with 0 a family is hardly readable in this vocabulary at all.
    """
    frames = []
    single = dict(zip(found.words, found.single_token_spellings, strict=True))
    for i, lens in enumerate(found.lenses):
        hits = np.stack([found.word_rank[i] <= k for k in range(1, TOP + 1)], axis=-1).astype(float)
        frame = _grid(latent=found.positions, layer=range(hits.shape[2]), word=found.words, k=range(1, TOP + 1))
        frame.insert(0, "lens", lens)
        level = mean_intervals(hits.reshape(len(hits), -1), found.clusters, settings)
        frame["rate"], frame["lower"], frame["upper"] = level["mean"], level["lower"], level["upper"]
        frame["n"], frame["n_clusters"] = level["n"], level["n_clusters"]
        frame["single_token_spellings"] = frame["word"].map(single)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def summaries(found: Detection, settings: Settings | None = None) -> pd.DataFrame:
    """Entropy and divergence (nats) and share of number tokens: one row per lens × latent × layer × measure."""
    measures = {
        "entropy": (found.entropy, np.inf),
        "divergence": (found.divergence, np.inf),
        "number_first": (found.number_first.astype(float), 1.0),
    }
    frames = []
    for measure, (values, highest) in measures.items():
        for i, lens in enumerate(found.lenses):
            frame = _grid(latent=found.positions, layer=range(values.shape[3]))
            frame.insert(0, "lens", lens)
            frame.insert(1, "measure", measure)
            flat = values[i].reshape(len(found.right), -1).astype(float)
            level = mean_intervals(flat, found.clusters, settings, bounds=(0.0, highest))
            frames.append(pd.concat([frame, level], axis=1))
    return pd.concat(frames, ignore_index=True)


def answers(found: Detection, trained: Mapping[float, tuple[int, int]]) -> pd.DataFrame:
    """Every answer beside its frequency in the questions that trained the lens.

    Args:
        found: what was read.
        trained: value -> (training questions with this answer, training questions with it as an earlier step).

    Returns:
        One row per lens × value that is the answer of some prompt: trained_answers, trained_steps, n (prompts with
        this answer), read_when_true and read_when_not (mean share of latents × layers that read the value, on prompts
        with this answer, and on prompts of which it is no value at all), n_not.
    """
    rows = []
    for j, value in enumerate(found.values):
        true, foreign = found.is_answer[:, j], ~found.is_own[:, j]
        counts = trained.get(float(value), (0, 0))
        for i, lens in enumerate(found.lenses):
            rows.append(
                {
                    "lens": lens,
                    "value": value,
                    "trained_answers": counts[0],
                    "trained_steps": counts[1],
                    "n": int(true.sum()),
                    "read_when_true": float(found.reads[i, true, j].mean()),
                    "n_not": int(foreign.sum()),
                    "read_when_not": float(found.reads[i, foreign, j].mean()) if foreign.any() else float("nan"),
                }
            )
    return pd.DataFrame(rows).sort_values(["lens", "value"], ignore_index=True)


def readings_of_targets(readings: pd.DataFrame) -> pd.DataFrame:
    """The trial table `readings` without targets that a prompt does not have; rank 0: not among the TOP."""
    columns = ["lens", "prompt_id", "cluster", "right", "latent", "layer", "target", "rank", *CHANCES]
    return readings.loc[readings["rank"] >= 0, columns].reset_index(drop=True)


# --- Claims -----------------------------------------------------------------------------------------------------------


def claims_of(found: Detection, settings: Settings | None = None) -> ClaimsTable:
    """S1 by every tuned lens: means over the layers below the last, latents 2 and 4 (3 and 5) against the others.

    `codi alternation` judges S1 by the model's own head, that is by the last layer. All claims here are one family:
    each interval is at the level at which all of them hold together.
    """
    claims, settings = ClaimsTable(), settings or Settings()
    latents = [k for k in found.positions if k > 0]
    if not {2, 3, 4, 5} <= set(latents):
        return claims
    tuned = [i for i, lens in enumerate(found.lenses) if lens != "plain"]
    for i in tuned:
        for claim in _claims_of_lens(found, i, latents, settings, 2 * len(tuned)):
            claims.add(claim)
    return claims


def _claims_of_lens(found: Detection, i: int, latents: list[int], settings: Settings, family: int) -> Iterator[Claim]:
    """Both claims S1 by one lens, as two of a family."""
    together = dataclasses.replace(settings, level=family_level(settings.level, family))
    answer = found.targets.index("answer")
    places = [found.positions.index(k) for k in latents]
    hits = np.stack([found.rank[i, :, places, :-1, answer] <= k for k in range(1, TOP + 1)], axis=-1)
    over = (hits.mean(axis=(2, 3)) - found.chance[i][:, places, :-1, answer].mean(axis=(2, 3))).T
    entropy = found.entropy[i][:, places, :-1].mean(axis=2)
    for name, statement, values, chosen, unit in (
        ("S1 detection", "the final answer is detected most at latents 2 and 4", over, (2, 4), "rate above chance"),
        ("S1 entropy", "entropy is highest at latents 3 and 5", entropy, (3, 5), "nats"),
    ):
        most = np.inf if unit == "nats" else 2.0  # a rate above chance lies in -1..1

        mine = values[:, [k in chosen for k in latents]].mean(axis=1, keepdims=True)
        lead = mine - values[:, [k not in chosen for k in latents]]  # over each of the other latents
        table = mean_intervals(lead, found.clusters, together, bounds=(-most, most))
        row = table.iloc[int(table["mean"].to_numpy().argmin())]  # the strongest of the other latents
        yield effect_claim(
            f"{name}, lens {found.lenses[i]}",
            statement,
            f"lead over the strongest other latent, {unit}, mean over layers below the last"
            + (" and k = 1..10" if chosen == (2, 4) else "")
            + "; above 0",
            judge_presence(float(row["lower"]), float(row["upper"]), above=0.0, family=family),
            row,
            f"latents {latents[0]}..{latents[-1]}: " + ", ".join(f"{v:.3f}" for v in np.nanmean(values, axis=0)),
            of="mean",
            corrected=f"Bonferroni, together at {100 * settings.level:g} %" if family > 1 else "",
        )
