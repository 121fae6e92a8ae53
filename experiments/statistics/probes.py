"""Linear probes: what a linear map can read from features, scored on clusters that it has not seen.

A linear classifier is fitted to each target and scored on held-out clusters (number triples):

    accuracy      share of prompts whose class is predicted; cross-validated, no triple in both parts, and no type
                  either where one is given: step 1 is a function of (X, Y), which recurs in other triples
    shuffled      the same with labels exchanged between (triple, label) groups: what this probe gets from nothing
    selectivity   accuracy − shuffled, with an interval over triples
    reachable     share of prompts whose class occurs in the training part at all; no probe can score more
    control       the same probe on a control task: every type (such as a pair X, Y) has a random label once and for
                  all (Hewitt and Liang 2019, arXiv 1909.03368); `over_control` is accuracy − control, with an interval
    memory        share of prompts whose type occurs in the training part: the most that memory of types can reach
    r2            of numeric targets, also a ridge regression: 1 − squared error / squared error of the training mean

The ridge penalty is chosen per target inside the training part, again by fold. The row "intermediate−final" is the
mean selectivity of the steps before the last minus that of the answer: which of the two the features hold.

The classifier is penalised discriminant analysis (Hastie, Buja and Tibshirani 1995): ridge regression on one column per
class, then the rule of linear discriminant analysis in the space of the fitted columns. Taking the largest column
instead would hide every class that lies between others, and numbers lie on a line. One ridge fit serves all targets
and shuffles, so a place costs a fraction of a second.

Knows nothing about models, problems, files or figures: features and labels are arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from experiments.statistics.clusters import cluster_codes, cluster_interval, cluster_weights
from experiments.statistics.control_tasks import control_labels, folds_by, joined, reachable

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
    """Targets, folds, shuffles and control tasks, the same for every space, latent and layer.

    Attributes:
        targets: what is read.
        clusters: (prompt,) number triple of each prompt.
        folds: (target, prompt) part of the cross-validation in which a prompt is held out.
        columns: per target, (1 + shuffle + control draw, prompt) class labels; row 0 holds the true ones.
        shuffles: how many of the rows are shuffles.
        types: per target, (prompt,) types of its control task; None: it has none.
    """

    targets: tuple[Target, ...]
    clusters: np.ndarray
    folds: np.ndarray
    columns: tuple[np.ndarray, ...]
    shuffles: int = 0
    types: tuple[np.ndarray | None, ...] = ()

    @classmethod
    def of(
        cls,
        targets: Sequence[Target],
        clusters: Sequence[str],
        folds: int = 5,
        shuffles: int = 4,
        seed: int = 0,
        *,
        whole: Mapping[str, np.ndarray] | None = None,
        types: Mapping[str, np.ndarray] | None = None,
        draws: int = 0,
    ) -> Design:
        """Draw folds, shuffles and control tasks.

        Args:
            targets: at least one.
            clusters: number triple of each prompt.
            folds: at least 3 (one is held out, one chooses the penalty), at most the number of clusters.
            shuffles: at least 1.
            seed: of all of them.
            whole: target -> (prompt,) types that must lie in one fold, beside clusters; a target that is not named has
                folds by cluster.
            types: target -> (prompt,) types of its control task.
            draws: control tasks of each target that has types.

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
        columns, parts, kept = [], [], []
        for target in targets:
            units = np.array([f"{name}\t{label}" for name, label in zip(names, target.labels, strict=True)])
            rows = [target.labels, *(_shuffled(target.labels, units, rng) for _ in range(shuffles))]
            own = None if types is None else types.get(target.name)
            if own is not None and draws:
                rows += list(control_labels(own, target.labels, draws=draws, seed=seed))
            groups = None if whole is None else whole.get(target.name)
            parts.append(part if groups is None else folds_by(joined(groups, names), folds, seed=seed))
            columns.append(np.stack(rows))
            kept.append(own)
        return cls(tuple(targets), names, np.stack(parts), tuple(columns), shuffles, tuple(kept))


# --- One probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeScores:
    """Held-out results of one place, per target name.

    Attributes:
        correct: (prompt,) 0 or 1; NaN for a target with too many classes.
        shuffled: (prompt,) mean over the shuffles of the same.
        r2: of numeric targets; NaN otherwise.
        control: (prompt,) mean over the control tasks; NaN for a target without any.
    """

    correct: dict[str, np.ndarray]
    shuffled: dict[str, np.ndarray]
    r2: dict[str, float]
    control: dict[str, np.ndarray] = field(default_factory=dict)


def probe(features: np.ndarray, design: Design) -> ProbeScores:
    """Fit and score the probes of every target on one place.

    Args:
        features: (prompt, feature).
        design: targets, folds, shuffles and control tasks.

    Returns:
        Held-out correctness per prompt, with true, shuffled and control labels, and r2.

    Raises:
        ValueError: features that are not (prompt, feature) or not finite.
    """
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) != len(design.clusters):
        raise ValueError(f"features must be ({len(design.clusters)} prompts, feature), got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("features must be finite")
    targets = design.targets
    # what is fitted: classes (False) and the number itself (True) of every target, each with a penalty of its own
    jobs = [(i, False) for i, target in enumerate(targets) if len(target.classes) <= MOST_CLASSES]
    jobs += [(i, True) for i, target in enumerate(targets) if target.numbers is not None]
    correct, shuffled, control = ({target.name: np.full(len(x), np.nan) for target in targets} for _ in range(3))
    scores = ProbeScores(correct, shuffled, {}, control)
    squares = {target.name: np.zeros(2) for target in targets}
    for folds in np.unique(design.folds, axis=0):
        mine = [job for job in jobs if (design.folds[job[0]] == folds).all()]
        for fold in range(int(folds.max()) + 1):
            _score_fold(x, design, mine, folds, fold, scores, squares)
    for target in targets:
        error, spread = squares[target.name]
        known = target.numbers is not None and spread > 0
        scores.r2[target.name] = float(1 - error / spread) if known else float("nan")
    return scores


def _score_fold(
    x: np.ndarray,
    design: Design,
    jobs: list[tuple[int, bool]],
    folds: np.ndarray,
    fold: int,
    scores: ProbeScores,
    squares: dict[str, np.ndarray],
) -> None:
    """Fit the jobs on all folds but one, enter their hits on it into `scores` and their errors into `squares`."""
    test = folds == fold
    train = ~test
    choosing = folds == (fold + 1) % (int(folds.max()) + 1)
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
            target = design.targets[i]
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
            controls = 1 + design.shuffles
            scores.correct[target.name][test] = hits[0]
            scores.shuffled[target.name][test] = np.mean(hits[1:controls], axis=0)
            if len(hits) > controls:
                scores.control[target.name][test] = np.mean(hits[controls:], axis=0)


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

_ORDER = [
    "space", "latent", "layer", "target", "accuracy", "lower", "upper", "shuffled", "selectivity", "selectivity_lower",
    "selectivity_upper", "control", "over_control", "over_control_lower", "over_control_upper", "r2", "classes",
    "majority", "reachable", "memory", "n", "n_clusters",
]  # fmt: skip


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
        selectivity_upper, control, over_control, over_control_lower, over_control_upper, r2, classes, majority,
        reachable, memory, n, n_clusters. Rows of the target "intermediate−final" have selectivity only (it lies between
        −1 and 1); control and memory are NaN for targets without a control task.
    """
    codes, names = cluster_codes(design.clusters)
    weights = cluster_weights(len(names), resamples, seed)
    counts = np.bincount(codes, minlength=len(names))
    steps = [target.name for target in design.targets if target.name.startswith("step")]
    kinds = design.types or (None,) * len(design.targets)
    facts = {
        target.name: _facts(target, folds, types)
        for target, folds, types in zip(design.targets, design.folds, kinds, strict=True)
    }
    rows: list[dict[str, Any]] = []
    sums: list[tuple[np.ndarray, ...]] = []
    nothing = np.full(len(names), np.nan)

    def by_cluster(values: np.ndarray) -> np.ndarray:
        return np.bincount(codes, weights=values, minlength=len(names))

    for (space, latent, layer), score in zip(places, scores, strict=True):
        place = {"space": space, "latent": latent, "layer": layer}
        gains = {name: score.correct[name] - score.shuffled[name] for name in score.correct}
        for target in design.targets:
            name = target.name
            correct, control = score.correct[name], score.control.get(name, np.full(len(codes), np.nan))
            rows.append({
                **place, "target": name, "accuracy": correct.mean(), "shuffled": score.shuffled[name].mean(),
                "selectivity": gains[name].mean(), "control": control.mean(),
                "over_control": (correct - control).mean(), "r2": score.r2[name], **facts[name],
            })  # fmt: skip
            sums.append((by_cluster(correct), by_cluster(gains[name]), by_cluster(correct - control)))
        if steps and "answer" in gains:
            difference = np.mean([gains[name] for name in steps], axis=0) - gains["answer"]
            rows.append({**place, "target": CONTRAST, "selectivity": difference.mean(), "classes": 0})
            sums.append((nothing, by_cluster(difference), nothing))
    table = pd.DataFrame(rows)
    for which, prefix in enumerate(("", "selectivity_", "over_control_")):
        values = np.array([found[which] for found in sums])
        known = np.isfinite(values).all(1)
        lower, upper = np.full(len(values), np.nan), np.full(len(values), np.nan)
        bounds = (-1.0, 1.0) if prefix else (0.0, 1.0)
        if known.any():
            spread = np.broadcast_to(counts, values[known].shape)
            lower[known], upper[known] = cluster_interval(
                values[known], spread, weights=weights, level=level, bounds=bounds
            )
        table[f"{prefix}lower"], table[f"{prefix}upper"] = lower, upper
    table["n"], table["n_clusters"] = len(codes), len(names)
    return table[_ORDER]


def _facts(target: Target, folds: np.ndarray, types: np.ndarray | None) -> dict[str, float]:
    return {
        "classes": len(target.classes),
        "majority": np.bincount(target.labels).max() / len(target.labels),
        "reachable": reachable(target.labels, folds),
        "memory": float("nan") if types is None else reachable(types, folds),
    }
