"""Control tasks of probes: what a probe gets by remembering words, and the most that any probe can reach.

A probe that reads a value from a latent may have learnt the value or may only recognise the prompt. Hewitt and Liang
(2019) compare with a *control task*: every type (a word, a pair of numbers: whatever recurs) gets a label at random,
once and for all, so that only memory of the type can solve it. A shuffle that gives two prompts of one type different
labels cannot be remembered at all and is too easy to beat. Selectivity is accuracy minus that of the control task.

A control task can be solved on held-out prompts only if their type is in the training part. With folds by whole
triples the pair (X, Y), which fixes step 1, recurs in other triples, and the control task can reach 100 %; with folds
by (X, Y) it cannot, and neither can the probe remember: `reachable` gives both limits.

Arrays in, arrays out. Knows nothing about probes, models or problems. Source: Hewitt and Liang 2019, arXiv 1909.03368.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from experiments.statistics.clusters import cluster_codes

__all__ = ["control_labels", "folds_by", "joined", "reachable", "type_codes"]


def type_codes(*columns: Sequence[Any] | np.ndarray) -> np.ndarray:
    """(prompt,) number of each prompt's type: prompts that agree in every column share one.

    Example: type_codes(operand1, operand2) for step 1, type_codes(operation) for the operation.
    """
    if not columns or len({len(column) for column in columns}) != 1:
        raise ValueError(f"columns of one length are needed, got {[len(column) for column in columns]}")
    parts = np.stack([cluster_codes(np.asarray(column))[0] for column in columns], axis=1)
    return np.unique(parts, axis=0, return_inverse=True)[1].reshape(-1)


def joined(*codes: Sequence[Any] | np.ndarray) -> np.ndarray:
    """(prompt,) the smallest groups that keep every type of every argument whole: prompts that are linked by sharing
    one type after another. What folds must be made of so that neither a pair of numbers nor a cluster is on both sides.
    """
    one = [np.unique(np.asarray(column), return_inverse=True)[1] for column in codes]
    sizes = [int(column.max()) + 1 for column in one]
    starts = np.cumsum([0, *sizes])
    nodes = np.stack([column + start for column, start in zip(one, starts[:-1], strict=True)])
    first = np.broadcast_to(nodes[:1], nodes[1:].shape).ravel()
    links = coo_matrix((np.ones(first.size), (first, nodes[1:].ravel())), shape=(starts[-1], starts[-1]))
    return connected_components(links, directed=False)[1][nodes[0]]


def control_labels(types: np.ndarray, labels: np.ndarray, *, draws: int = 1, seed: int = 0) -> np.ndarray:
    """Random labels that are a fixed function of the type.

    Each type draws its label from the labels of the prompts, so that the control task has the same classes about as
    often as the task.

    Args:
        types: (prompt,) from `type_codes`.
        labels: (prompt,) class index of the real task.
        draws: independent control tasks.

    Returns:
        (draw, prompt) class index; equal types have equal labels within a draw.
    """
    types, labels = np.asarray(types), np.asarray(labels)
    if types.shape != labels.shape or types.ndim != 1 or not len(types) or draws < 1:
        raise ValueError(f"one type and one label per prompt and draws >= 1 are needed, got {types.shape}, "
                         f"{labels.shape} and {draws}")  # fmt: skip
    number = len(np.unique(types))
    codes = np.unique(types, return_inverse=True)[1]
    given = np.random.default_rng([seed, 8]).choice(labels, size=(draws, number))
    return given[:, codes]


def folds_by(types: np.ndarray, folds: int, *, seed: int = 0) -> np.ndarray:
    """Folds of a cross-validation that keep every type whole and have about equal numbers of prompts.

    Args:
        types: (prompt,) what must not be on both sides: `type_codes(X, Y)` for step 1.
        folds: 2 or more, at most the number of types.

    Returns:
        (prompt,) fold 0..folds - 1.
    """
    codes = np.unique(np.asarray(types), return_inverse=True)[1]
    sizes = np.bincount(codes)
    if not 2 <= folds <= len(sizes):
        raise ValueError(f"folds must be in 2..{len(sizes)} (number of types), got {folds}")
    shuffled = np.random.default_rng([seed, 9]).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]  # large types first, into the smallest fold
    held, fold_of = np.zeros(folds, int), np.empty(len(sizes), int)
    for kind in order:
        smallest = int(held.argmin())
        fold_of[kind] = smallest
        held[smallest] += sizes[kind]
    return fold_of[codes]


def reachable(keys: np.ndarray, folds: np.ndarray) -> float:
    """Share of prompts whose key also occurs outside their own fold.

    With the classes of the task as keys: the most that any classifier can reach (a class that it never saw cannot be
    named). With types as keys: the most that memory of types can reach beyond chance, in the control task too.

    Args:
        keys: (prompt,) class or type. folds: (prompt,).
    """
    keys = np.unique(np.asarray(keys), return_inverse=True)[1]
    folds = np.unique(np.asarray(folds), return_inverse=True)[1]
    if keys.shape != folds.shape or not len(keys):
        raise ValueError(f"one key and one fold per prompt are needed, got {keys.shape} and {folds.shape}")
    table = np.zeros((keys.max() + 1, folds.max() + 1), int)
    np.add.at(table, (keys, folds), 1)
    return float((table.sum(1)[keys] > table[keys, folds]).mean())
