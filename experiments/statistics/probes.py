"""Linear probes: what a linear map can read from features, scored on clusters that it has not seen.

A linear classifier is fitted to each target and scored on held-out clusters (number triples):

    accuracy      share of prompts whose class is predicted; cross-validated, no triple in both parts
    shuffled      the same with labels exchanged between (triple, label) groups: what this probe gets from nothing
    selectivity   accuracy − shuffled (Hewitt and Liang 2019, arXiv 1909.03368), with an interval over triples
    reachable     share of prompts whose class occurs in the training part at all; no probe can score more
    r2            of numeric targets, also a ridge regression: 1 − squared error / squared error of the training mean

The ridge penalty is chosen per target inside the training part, again by triple. The row "intermediate−final" is the
mean selectivity of the steps before the last minus that of the answer: which of the two the features hold.

The classifier is penalised discriminant analysis (Hastie, Buja and Tibshirani 1995): ridge regression on one column per
class, then the rule of linear discriminant analysis in the space of the fitted columns. Taking the largest column
instead would hide every class that lies between others, and numbers lie on a line. One ridge fit serves all targets
and shuffles, so a place costs a fraction of a second.

Knows nothing about models, problems, files or figures: features and labels are arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from experiments.statistics.clusters import bootstrap_interval, cluster_codes, cluster_weights

__all__ = ["CONTRAST", "MOST_CLASSES", "Design", "ProbeScores", "Target", "probe", "probe_table"]

PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties to choose from, on standardised features."""
SHRINKAGE = 1e-3
"""Share of the mean within-class variance added to each fitted column."""
CONTRAST = "intermediate−final"
MOST_CLASSES = 400
"""Targets with more values than this are read by regression only."""


# --- Targets and folds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a probe has to read: one label per prompt.

    Attributes:
        name: "operation", "operand1", …, "step1", …, "answer".
        labels: (prompt,) class index into `classes`.
        classes: sorted distinct values.
        numbers: (prompt,) float64 values of a numeric target, else None.
    """

    name: str
    labels: np.ndarray
    classes: tuple[Any, ...]
    numbers: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> Target:
        """From one value per prompt; numbers are numeric targets."""
        classes = tuple(sorted(set(values)))
        index = {value: i for i, value in enumerate(classes)}
        numeric = all(isinstance(value, int | float) for value in values)
        labels = np.array([index[value] for value in values])
        return cls(name, labels, classes, np.array(values, float) if numeric else None)


def _shuffled(labels: np.ndarray, units: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels exchanged between units (rows of a unit share a label and keep sharing one)."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    return labels[first][rng.permutation(len(first))][inverse]


@dataclass(frozen=True)
class Design:
    """Targets, folds and shuffles, the same for every space, latent and layer.

    Attributes:
        targets: what is read.
        clusters: (prompt,) number triple of each prompt.
        folds: (prompt,) part of the cross-validation in which a prompt is held out.
        columns: per target, (1 + shuffle, prompt) class labels; row 0 holds the true ones.
    """

    targets: tuple[Target, ...]
    clusters: np.ndarray
    folds: np.ndarray
    columns: tuple[np.ndarray, ...]

    @classmethod
    def of(
        cls, targets: Sequence[Target], clusters: Sequence[str], folds: int = 5, shuffles: int = 4, seed: int = 0
    ) -> Design:
        """Draw folds and shuffles.

        Args:
            targets: at least one.
            clusters: number triple of each prompt.
            folds: at least 3 (one is held out, one chooses the penalty), at most the number of clusters.
            shuffles: at least 1.
            seed: of both.

        Raises:
            ValueError: a number outside its range, lengths that differ.
        """
        names = np.asarray(clusters)
        if not targets or any(len(target.labels) != len(names) for target in targets):
            raise ValueError("every target needs one label per prompt, and there must be one target at least")
        if not 3 <= folds <= len(np.unique(names)):
            raise ValueError(f"folds must be in 3..{len(np.unique(names))} (number of clusters), got {folds}")
        if shuffles < 1:
            raise ValueError(f"shuffles must be at least 1, got {shuffles}")
        part = np.zeros(len(names), int)
        splitter = GroupKFold(n_splits=folds, shuffle=True, random_state=seed)
        for i, (_, held_out) in enumerate(splitter.split(names, groups=names)):
            part[held_out] = i
        rng = np.random.default_rng([seed, 7])
        columns = []
        for target in targets:
            units = np.array([f"{name}\t{label}" for name, label in zip(names, target.labels, strict=True)])
            shuffled = [_shuffled(target.labels, units, rng) for _ in range(shuffles)]
            columns.append(np.stack([target.labels, *shuffled]))
        return cls(tuple(targets), names, part, tuple(columns))


# --- One probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScores:
    """Held-out results of one place, per target name.

    Attributes:
        correct: (prompt,) 0 or 1; NaN for a target with too many classes.
        shuffled: (prompt,) mean over the shuffles of the same.
        r2: of numeric targets; NaN otherwise.
    """

    correct: dict[str, np.ndarray]
    shuffled: dict[str, np.ndarray]
    r2: dict[str, float]


def probe(features: np.ndarray, design: Design) -> ProbeScores:
    """Fit and score the probes of every target on one place.

    Args:
        features: (prompt, feature).
        design: targets, folds and shuffles.

    Returns:
        Held-out correctness per prompt, with true and with shuffled labels, and r2.

    Raises:
        ValueError: features that are not (prompt, feature) or not finite.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) != len(design.clusters):
        raise ValueError(f"features must be ({len(design.clusters)} prompts, feature), got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features must be finite")
    n = len(x)
    targets = design.targets
    # what is fitted: classes (False) and the number itself (True) of every target, each with a penalty of its own
    jobs = [(i, False) for i, target in enumerate(targets) if len(target.classes) <= MOST_CLASSES]
    jobs += [(i, True) for i, target in enumerate(targets) if target.numbers is not None]
    correct = {target.name: np.full(n, np.nan) for target in targets}
    shuffled = {target.name: np.full(n, np.nan) for target in targets}
    squares = {target.name: np.zeros(2) for target in targets}

    folds = int(design.folds.max()) + 1
    for fold in range(folds):
        test = design.folds == fold
        train = ~test
        choosing = design.folds == (fold + 1) % folds
        chosen = _choose_penalties(x, train & ~choosing, choosing, design, jobs)
        scaler = StandardScaler().fit(x[train])
        x_train, x_test = scaler.transform(x[train]), scaler.transform(x[test])
        for penalty in PENALTIES:
            mine = [job for job, best in zip(jobs, chosen, strict=True) if best == penalty]
            blocks = [block for job in mine for block in _columns(design, job, train, shuffles=True)]
            if not blocks:
                continue
            fitted, predicted = _ridge(x_train, blocks, penalty, x_train, x_test)
            place = 0
            for i, numeric in mine:
                target = targets[i]
                if numeric:
                    assert target.numbers is not None
                    truth, mean = target.numbers[test], target.numbers[train].mean()
                    squares[target.name] += [((predicted[place][:, 0] - truth) ** 2).sum(), ((truth - mean) ** 2).sum()]
                    place += 1
                    continue
                hits = []
                for labels in design.columns[i]:
                    guess = _discriminate(fitted[place], labels[train], predicted[place])
                    hits.append((guess == labels[test]).astype(float))
                    place += 1
                correct[target.name][test], shuffled[target.name][test] = hits[0], np.mean(hits[1:], axis=0)
    r2 = {
        target.name: float(1 - squares[target.name][0] / squares[target.name][1])
        if target.numbers is not None and squares[target.name][1] > 0
        else float("nan")
        for target in design.targets
    }
    return ProbeScores(correct, shuffled, r2)


def _ridge(x: np.ndarray, blocks: list[np.ndarray], penalty: float, *places: np.ndarray) -> list[list[np.ndarray]]:
    """One ridge regression with intercept on all blocks of columns; per place of `places`, predictions per block."""
    model = Ridge(alpha=penalty, solver="cholesky").fit(x, np.concatenate(blocks, 1))
    edges = np.cumsum([block.shape[1] for block in blocks])
    return [np.split(model.predict(place).reshape(len(place), edges[-1]), edges[:-1], axis=1) for place in places]


def _discriminate(fitted: np.ndarray, labels: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Class of every row of `new` by linear discriminant analysis in the space of fitted class columns.

    Args:
        fitted: (row, class) ridge predictions of the training rows.
        labels: (row,) their classes; a class without a row is never predicted.
        new: (row, class) ridge predictions of other rows.
    """
    n_classes = fitted.shape[1]
    counts = np.bincount(labels, minlength=n_classes)
    means = np.eye(n_classes)[labels].T @ fitted / np.maximum(counts, 1)[:, None]
    rest = fitted - means[labels]
    within = rest.T @ rest / len(labels)
    within[np.diag_indices_from(within)] += SHRINKAGE * np.trace(within) / n_classes + 1e-9  # the columns sum to 1
    weights = np.linalg.solve(within, means.T)
    scores = new @ weights - 0.5 * (means.T * weights).sum(0) + np.log(np.maximum(counts, 1) / len(labels))
    return np.where(counts > 0, scores, -np.inf).argmax(1)


def _columns(design: Design, job: tuple[int, bool], rows: np.ndarray, shuffles: bool) -> list[np.ndarray]:
    """Blocks to regress on for one job: the number, or one-hot labels (the true ones, then the shuffled)."""
    target, labels = design.targets[job[0]], design.columns[job[0]]
    if job[1]:
        assert target.numbers is not None
        return [target.numbers[rows, None]]
    identity = np.eye(len(target.classes))
    return [identity[row[rows]] for row in (labels if shuffles else labels[:1])]


def _choose_penalties(
    x: np.ndarray, fit: np.ndarray, held_out: np.ndarray, design: Design, jobs: list[tuple[int, bool]]
) -> list[float]:
    """Per job the penalty that does best on the choosing part; the larger one where two do equally well."""
    scaler = StandardScaler().fit(x[fit])
    x_fit, x_held = scaler.transform(x[fit]), scaler.transform(x[held_out])
    blocks = [block for job in jobs for block in _columns(design, job, fit, shuffles=False)]
    best = [(-np.inf, PENALTIES[-1])] * len(jobs)
    for penalty in reversed(PENALTIES):
        fitted, predicted = _ridge(x_fit, blocks, penalty, x_fit, x_held)
        for place, (i, numeric) in enumerate(jobs):
            target = design.targets[i]
            if numeric:
                assert target.numbers is not None
                score = -float(((predicted[place][:, 0] - target.numbers[held_out]) ** 2).mean())
            else:
                guess = _discriminate(fitted[place], target.labels[fit], predicted[place])
                score = float((guess == target.labels[held_out]).mean())
            if score > best[place][0]:
                best[place] = (score, penalty)
    return [penalty for _, penalty in best]


# --- Tables -----------------------------------------------------------------------------------------------------------


def probe_table(
    places: Sequence[tuple[str, int, int]],
    scores: Sequence[ProbeScores],
    design: Design,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per place × target, with intervals over clusters.

    Args:
        places: (space, latent, layer) of each result; latent 0 is the begin-of-thought token.
        scores: from `probe`, in the same order.
        design: what they were computed with.
        resamples: bootstrap resamples.
        level: coverage of the intervals.
        seed: of the bootstrap.

    Returns:
        Columns space, latent, layer, target, accuracy, lower, upper, shuffled, selectivity, selectivity_lower,
        selectivity_upper, r2, classes, majority, reachable, n, n_clusters. Rows of the target "intermediate−final" have
        selectivity only (it lies between −1 and 1).
    """
    codes, names = cluster_codes(design.clusters)
    weights = cluster_weights(len(names), resamples, seed)
    counts = np.bincount(codes, minlength=len(names))
    steps = [target.name for target in design.targets if target.name.startswith("step")]
    facts = {target.name: _facts(target, design.folds) for target in design.targets}
    rows: list[dict[str, Any]] = []
    sums: list[tuple[np.ndarray, np.ndarray]] = []

    def by_cluster(values: np.ndarray) -> np.ndarray:
        return np.bincount(codes, weights=values, minlength=len(names))

    for (space, latent, layer), score in zip(places, scores, strict=True):
        gains = {name: score.correct[name] - score.shuffled[name] for name in score.correct}
        for target in design.targets:
            rows.append({
                "space": space, "latent": latent, "layer": layer, "target": target.name,
                "accuracy": score.correct[target.name].mean(), "shuffled": score.shuffled[target.name].mean(),
                "selectivity": gains[target.name].mean(), "r2": score.r2[target.name], **facts[target.name],
            })  # fmt: skip
            sums.append((by_cluster(score.correct[target.name]), by_cluster(gains[target.name])))
        if steps and "answer" in gains:
            difference = np.mean([gains[name] for name in steps], axis=0) - gains["answer"]
            rows.append({"space": space, "latent": latent, "layer": layer, "target": CONTRAST,
                         "accuracy": np.nan, "shuffled": np.nan, "selectivity": difference.mean(), "r2": np.nan,
                         "classes": 0, "majority": np.nan, "reachable": np.nan})  # fmt: skip
            sums.append((np.full(len(names), np.nan), by_cluster(difference)))
    table = pd.DataFrame(rows)
    for column, which, prefix in (("accuracy", 0, ""), ("selectivity", 1, "selectivity_")):
        values = np.array([pair[which] for pair in sums])
        known = np.isfinite(values).all(1)
        lower, upper = np.full(len(values), np.nan), np.full(len(values), np.nan)
        bounds = (0.0, 1.0) if column == "accuracy" else (-1.0, 1.0)
        if known.any():
            spread = np.broadcast_to(counts, values[known].shape)
            lower[known], upper[known] = bootstrap_interval(
                values[known], spread, weights=weights, level=level, bounds=bounds
            )
        table[f"{prefix}lower"], table[f"{prefix}upper"] = lower, upper
    table["n"], table["n_clusters"] = len(codes), len(names)
    order = ["space", "latent", "layer", "target", "accuracy", "lower", "upper", "shuffled", "selectivity",
             "selectivity_lower", "selectivity_upper", "r2", "classes", "majority", "reachable", "n",
             "n_clusters"]  # fmt: skip
    return table[order]


def _facts(target: Target, folds: np.ndarray) -> dict[str, float]:
    seen = [
        np.isin(target.labels[folds == fold], target.labels[folds != fold]).sum() for fold in range(folds.max() + 1)
    ]
    majority = np.bincount(target.labels).max() / len(target.labels)
    return {"classes": len(target.classes), "majority": majority, "reachable": sum(seen) / len(target.labels)}
