"""What is measured at each latent of each prompt, behind the alternation test and the claims about single latents.

`Observations` are what a model does on some prompts, as arrays, read from the trial tables that observe.py fills (a
simulated model fills in the arrays itself). The functions after them turn observations into one number per prompt and
latent:

    detection    is a value among the top-k tokens of the lens, minus how often other prompts' values are
    components   place in the plane of the first two principal components of other prompts' latents
    readability  held-out hits of a linear probe, minus those of the same probe on shuffled labels

Knows nothing about models, predictions, tests or verdicts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics.clusters import cluster_codes, cluster_weights
from experiments.statistics.control_tasks import reachable
from experiments.statistics.probes import ProbeScores, Target, probe
from experiments.study.targets import design_of, independent_groups, targets_of
from experiments.tasks import Problem

__all__ = [
    "DEPTH", "DIRECTION_RESAMPLES", "Observations", "Readability", "Readings", "Reference", "chance_corrected",
    "components", "detection", "end_cosines", "principal_plane", "readability", "steps_of",
]  # fmt: skip

DEPTH = 10
"""Tokens of a lens that are kept; detection can be asked for at any k up to this."""
DIRECTION_RESAMPLES = 40
"""Resamples behind the interval of a principal direction, each of which costs a decomposition."""


@dataclass(frozen=True)
class Readings:
    """What a lens says at every position.

    Attributes:
        tokens: (prompt, latent 0..n, layer, DEPTH) ids of the likeliest tokens, best first; latent 0 is h_0. The plain
            reading has one layer, the last.
        entropy: (prompt, latent 0..n, layer) of the whole distribution, nats.
    """

    tokens: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Latents of the derivation prompts, which share no number triple with the observed ones.

    Attributes:
        clusters: (prompt,).
        places: (prompt, latent 1..n, 2) of h_1..h_n in the plane of their own first two principal components.
        keys, values: the same for the cache slots, all layers joined, rotation undone, in planes of their own.
        cosines: (1 + DIRECTION_RESAMPLES,) of the first component and the end-of-thought embedding, see `end_cosines`.
    """

    clusters: np.ndarray
    places: np.ndarray
    keys: np.ndarray | None = None
    values: np.ndarray | None = None
    cosines: np.ndarray | None = None


@dataclass(frozen=True)
class Readability:
    """Held-out hits of linear probes of one target.

    Attributes:
        correct: (prompt, latent 1..n) with the true labels, 0 or 1.
        shuffled: the same with shuffled labels, mean over shuffles.
        reachable: share of prompts whose value occurs in the training part: no probe can score more.
    """

    correct: np.ndarray
    shuffled: np.ndarray
    reachable: float

    @property
    def gain(self) -> np.ndarray:
        """(prompt, latent 1..n) hits beyond those of shuffled labels."""
        return self.correct - self.shuffled


@dataclass(frozen=True)
class Observations:
    """A model's latents on some prompts. A field that is None was not observed.

    Attributes:
        problems: the prompts (their questions are not kept).
        readings: of the model's own head on h_0..h_n.
        forms: value -> token ids that show it (its first token, with and without a space before it).
        places: (prompt, latent 1..n, 2) of h_1..h_n in the plane of the reference.
        reference: latents of other prompts.
        readable: target ("step1", …, "answer") -> what `readability` found.
        correct_after: (prompt, number of latents 0..n) whether the answer after so many latents is right.
        correct_ablated: what is replaced by its mean ("embedding", "slot") -> (prompt, latent 1..n) whether the answer
            is then right.
        attention: (prompt, query: latent 1..n then end of thought, key: number tokens, rest of the prompt, latent 1..n)
            attention mass, mean over layers and heads.
        tuned: readings of a tuned lens, layers below the last; None if there is no lens.
    """

    problems: tuple[Problem, ...]
    readings: Readings
    forms: Mapping[Any, tuple[int, ...]]
    places: np.ndarray
    reference: Reference
    readable: Mapping[str, Readability] = field(default_factory=dict)
    correct_after: np.ndarray | None = None
    correct_ablated: Mapping[str, np.ndarray] = field(default_factory=dict)
    attention: np.ndarray | None = None
    tuned: Readings | None = None

    @property
    def n_latents(self) -> int:
        """Latents per prompt."""
        return self.readings.entropy.shape[1] - 1

    @property
    def clusters(self) -> np.ndarray:
        """(prompt,) names of the number triples."""
        return np.array([problem.cluster or problem.prompt_id for problem in self.problems])

    @classmethod
    def of(cls, trials: Mapping[str, pd.DataFrame]) -> Observations:
        """From the trial tables of observe.py."""
        prompts = trials["prompts"]
        problems = tuple(_problem(row) for row in prompts.to_dict("records"))
        ids = prompts["prompt_id"].tolist()
        positions, answers, attention = trials["positions"], trials["answers"], trials["attention"]
        forms: dict[Any, tuple[int, ...]] = {}
        for value, tokens in trials["forms"].groupby("value")["token"]:
            forms[value] = tuple(sorted(tokens))
        masses = np.concatenate(
            [attention[["numbers", "rest"]].to_numpy(), np.stack(attention["latents"].tolist())], axis=1
        )
        probes, tuned = trials["probes"], positions[positions["lens"] == "tuned"]
        return cls(
            problems=problems,
            readings=_readings(positions[positions["lens"] == "own"], ids),
            forms=forms,
            places=_places(trials["places"], "states", ids),
            reference=_reference(trials),
            readable={name: _readability(probes[probes["target"] == name], ids) for name in probes["target"].unique()},
            correct_after=_wide(answers[answers["kind"] == "after"], ids, "correct"),
            correct_ablated={
                kind: _wide(answers[answers["kind"] == kind], ids, "correct") for kind in ("embedding", "slot")
            },
            attention=_ordered(attention, ids, "query", masses),
            tuned=_readings(tuned, ids) if len(tuned) else None,
        )


def _problem(row: Mapping[Hashable, Any]) -> Problem:
    """A prompt from its row, without its question."""
    return Problem(
        prompt_id=row["prompt_id"],
        question="",
        answer=row["answer"],
        cluster=row["cluster"],
        template=row["template"],
        operation=row["operation"],
        numbers=tuple(row["numbers"].tolist()),
        intermediates=tuple(row["intermediates"].tolist()),
    )


def _ordered(table: pd.DataFrame, ids: Sequence[str], by: str | list[str], values: np.ndarray) -> np.ndarray:
    """(prompt, …) values of a table with the same places for every prompt, prompts in the given order.

    Args:
        table: with a column prompt_id.
        ids: the prompts.
        by: columns that say the place.
        values: (row, …).
    """
    place = {name: i for i, name in enumerate(ids)}
    numbered = table.assign(prompt=table["prompt_id"].map(place), row=range(len(table)))
    numbered = numbered.sort_values(["prompt", *([by] if isinstance(by, str) else by)], kind="stable")
    order = numbered["row"].to_numpy()
    return values[order].reshape(len(ids), -1, *values.shape[1:])


def _wide(table: pd.DataFrame, ids: Sequence[str], column: str) -> np.ndarray:
    """(prompt, latent) values of a column."""
    return _ordered(table, ids, "latent", table[column].to_numpy())


def _readability(table: pd.DataFrame, ids: Sequence[str]) -> Readability:
    correct, shuffled = (_wide(table, ids, column) for column in ("correct", "shuffled"))
    return Readability(correct, shuffled, float(table["reachable"].iloc[0]))


def _places(table: pd.DataFrame, space: str, ids: Sequence[str]) -> np.ndarray:
    mine = table[table["space"] == space]
    return _ordered(mine, ids, "latent", mine[["first", "second"]].to_numpy())


def _readings(table: pd.DataFrame, ids: Sequence[str]) -> Readings:
    layers = table["layer"].nunique()
    tokens = _ordered(table, ids, ["latent", "layer"], np.stack(table["tokens"].tolist()))
    entropy = _ordered(table, ids, ["latent", "layer"], table["entropy"].to_numpy())
    return Readings(tokens.reshape(len(ids), -1, layers, tokens.shape[-1]), entropy.reshape(len(ids), -1, layers))


def _reference(trials: Mapping[str, pd.DataFrame]) -> Reference:
    table = trials["reference"]
    ids = table["prompt_id"].unique().tolist()
    clusters = np.array(table.drop_duplicates("prompt_id")["cluster"].tolist())
    cosines = trials["direction"].sort_values("resample")["cosine"].to_numpy()  # -1, the plain one, comes first
    states, keys, values = (_places(table, space, ids) for space in ("states", "keys", "values"))
    return Reference(clusters, states, keys, values, cosines)


# --- Values and detection ---------------------------------------------------------------------------------------------


def steps_of(problem: Problem) -> tuple[int | float, ...]:
    """Values of the steps before the last one."""
    return tuple(problem.intermediates[:-1])


def chance_corrected(
    tokens: np.ndarray,
    values: Sequence[int | float | None],
    forms: Mapping[Any, tuple[int, ...]],
    clusters: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each prompt's value is among its top-k tokens, and how often other prompts' values are.

    Args:
        tokens: (prompt, position, depth) best first.
        values: one per prompt; None: this prompt has none and gets NaN.
        forms: value -> its token ids.
        clusters: (prompt,); the chance level takes values of prompts of other clusters only.
        k: 1..depth.

    Returns:
        hit, chance: (prompt, position) each; hit is 0 or 1, chance the share of other clusters' prompts (with a value)
        whose value is among this prompt's top-k. hit − chance is 0 on average for a lens that knows nothing about the
        prompt, however frequent its favourite numbers are.

    Raises:
        ValueError: k outside 1..depth.
    """
    if not 1 <= k <= tokens.shape[-1]:
        raise ValueError(f"k must be in 1..{tokens.shape[-1]}, got {k}")
    hit = np.full(tokens.shape[:2], np.nan)
    chance = hit.copy()
    names = sorted({value for value in values if value is not None})
    if not names:
        return hit, chance
    shown = np.stack([np.isin(tokens[..., :k], forms[name]).any(-1) for name in names], axis=-1)
    column = {name: i for i, name in enumerate(names)}
    own = np.array([-1 if value is None else column[value] for value in values])
    codes = np.unique(clusters, return_inverse=True)[1]
    counts = np.zeros((codes.max() + 1, len(names)))
    np.add.at(counts, (codes[own >= 0], own[own >= 0]), 1)
    others = counts.sum(0) - counts
    weights = others / np.maximum(others.sum(1, keepdims=True), 1)
    rows = np.flatnonzero(own >= 0)
    hit[rows] = shown[rows, :, own[rows]]
    chance[rows] = np.einsum("ptv,pv->pt", shown[rows], weights[codes[rows]])
    return hit, chance


def detection(
    observations: Observations, which: int | str, k: int = 5, tuned: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Detection of one kind of value, prompt by prompt.

    A value that stands in the question, or is also another step's or the answer's, shows nothing about reasoning: it is
    left out for that prompt (NaN).

    Args:
        observations: of the model.
        which: step number 1.. (before the last), "intermediate" (mean over those steps) or "final" (the answer).
        k: how many of the likeliest tokens count.
        tuned: read the tuned lens (mean over its layers) instead of the model's head.

    Returns:
        hit, chance: (prompt, latent 0..n).
    """
    problems = observations.problems
    if which == "intermediate":
        numbers = range(1, 1 + max(len(steps_of(problem)) for problem in problems))
        pairs = [detection(observations, number, k, tuned) for number in numbers]
        empty = np.full(observations.readings.entropy.shape[:2], np.nan)
        return tuple(_nanmean([pair[i] for pair in pairs] or [empty]) for i in (0, 1))  # type: ignore[return-value]
    values: list[int | float | None] = []
    for problem in problems:
        parts = [*steps_of(problem), problem.answer]
        index = len(parts) - 1 if which == "final" else int(which) - 1
        known = index < len(parts) - (which != "final")
        clear = known and parts.count(parts[index]) == 1 and parts[index] not in problem.numbers
        values.append(parts[index] if clear else None)
    readings = observations.tuned if tuned else observations.readings
    assert readings is not None, "there is no tuned lens"
    layers = range(readings.tokens.shape[2])
    found = [
        chance_corrected(readings.tokens[:, :, layer], values, observations.forms, observations.clusters, k)
        for layer in layers
    ]
    return np.mean([hit for hit, _ in found], axis=0), np.mean([chance for _, chance in found], axis=0)


def _nanmean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    stacked = np.stack(arrays)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


# --- Components and probes --------------------------------------------------------------------------------------------


def principal_plane(latents: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """First two principal components of latents pooled over prompts and positions.

    Args:
        latents: (prompt, latent, feature).
        seed: of the randomised solver, used for wide features.

    Returns:
        mean (feature,), axes (2, feature) orthonormal, and the standard deviation in the plane (root mean square over
        the two axes).
    """
    from sklearn.decomposition import PCA

    rows = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    wide = rows.shape[1] > 1024
    fitted = PCA(2, svd_solver="randomized" if wide else "full", random_state=seed).fit(rows)
    return fitted.mean_, fitted.components_, float(np.sqrt(fitted.explained_variance_.mean()))


def components(latents: np.ndarray, plane: tuple[np.ndarray, np.ndarray, float]) -> np.ndarray:
    """(prompt, latent, 2) coordinates in a principal plane, in units of its standard deviation."""
    mean, axes, scale = plane
    return (latents - mean) @ axes.T / (scale or 1.0)


def readability(
    states: np.ndarray, problems: Sequence[Problem], folds: int = 5, shuffles: int = 4, seed: int = 0
) -> dict[str, Readability]:
    """How well ridge probes read steps and answer from every latent.

    Args:
        states: (prompt, latent, feature).
        problems: with known steps.
        folds, shuffles, seed: see `experiments.study.targets.design_of`; folds are reduced to what the problems allow.

    Returns:
        target ("step1", …, "answer") -> held-out hits. Targets with too many values for a classifier are left out.
    """
    targets: list[Target] = [t for t in targets_of(problems) if t.name == "answer" or t.name.startswith("step")]
    folds = min(folds, independent_groups(problems))
    if not targets or folds < 3:
        return {}
    design = design_of(problems, folds, shuffles, seed, targets=targets)
    scores: list[ProbeScores] = [probe(states[:, k], design) for k in range(states.shape[1])]
    found = {}
    for target, folds_of in zip(targets, design.folds, strict=True):
        correct, shuffled = (
            np.stack([getattr(score, kind)[target.name] for score in scores], axis=1)
            for kind in ("correct", "shuffled")
        )
        if np.isfinite(correct).all():
            found[target.name] = Readability(correct, shuffled, reachable(target.labels, folds_of))
    return found


def end_cosines(
    states: np.ndarray, clusters: np.ndarray, embedding: np.ndarray, seed: int = 0, resamples: int = DIRECTION_RESAMPLES
) -> np.ndarray:
    """|cosine| of the first principal component of latents and one embedding.

    Args:
        states: (prompt, latent, d_model).
        clusters: (prompt,), resampled whole.
        embedding: (d_model,).
        seed: of the resamples and of the components.

    Returns:
        (1 + resamples,) first the one of all prompts, then those of the resamples.
    """
    codes, names = cluster_codes(clusters)

    def cosine(rows: np.ndarray) -> float:
        first = principal_plane(states[rows], seed)[1][0]
        return float(abs(first @ embedding) / (np.linalg.norm(embedding) or 1.0))

    members = [np.flatnonzero(codes == cluster) for cluster in range(len(names))]
    drawn = [
        np.concatenate([members[cluster] for cluster in np.repeat(np.arange(len(names)), weight.astype(int))])
        for weight in cluster_weights(len(names), resamples, seed)
    ]
    return np.array([cosine(rows) for rows in [np.arange(len(codes)), *drawn]])
