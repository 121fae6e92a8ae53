"""Control tasks: consistent within a type, learnt by memory with triple folds and not with folds by (X, Y)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments.statistics.control_tasks import control_labels, folds_by, joined, reachable, type_codes

TRIPLES = np.array(list(itertools.product(range(6), range(6), range(4))))
X, Y, Z = TRIPLES.T
PAIRS, WHOLE = type_codes(X, Y), type_codes(X, Y, Z)


def remembered(types: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> float:
    """Accuracy of a reader that only remembers the label of a type and guesses the commonest otherwise."""
    right = 0
    for fold in np.unique(folds):
        train = folds != fold
        memory = dict(zip(types[train], labels[train], strict=True))
        common = np.bincount(labels[train]).argmax()
        right += sum(memory.get(t, common) == label for t, label in zip(types[~train], labels[~train], strict=True))
    return right / len(types)


def test_labels_are_a_fixed_function_of_the_type_with_the_classes_of_the_task() -> None:
    step = X + Y
    labels = control_labels(PAIRS, step, draws=50)
    assert labels.shape == (50, len(step))
    for draw in labels:
        assert all(len(set(draw[PAIRS == pair])) == 1 for pair in range(36))
    assert set(labels.ravel()) <= set(step)
    shares, true = np.bincount(labels.ravel(), minlength=11) / labels.size, np.bincount(step) / len(step)
    assert np.abs(shares - true).max() < 0.05
    assert (labels[0] != labels[1]).any() and (control_labels(PAIRS, step, draws=50) == labels).all()
    with pytest.raises(ValueError, match="one type and one label"):
        control_labels(PAIRS[:5], step)


def test_with_triple_folds_memory_solves_the_control_task_and_with_pair_folds_it_cannot() -> None:
    control = control_labels(PAIRS, X + Y)[0]
    by_triple, by_pair = folds_by(WHOLE, 5), folds_by(PAIRS, 5)
    assert remembered(PAIRS, control, by_triple) > 0.95  # the leak that issue 12 describes
    assert remembered(PAIRS, control, by_pair) < 0.4
    assert reachable(PAIRS, by_triple) > 0.95 and reachable(PAIRS, by_pair) == 0.0
    assert reachable(X + Y, by_pair) < 1.0 == reachable(X, by_pair)  # 0 + 0 occurs in one pair only


def test_folds_keep_types_whole_and_even() -> None:
    folds = folds_by(PAIRS, 5, seed=3)
    assert all(len(set(folds[PAIRS == pair])) == 1 for pair in range(36))
    assert np.ptp(np.bincount(folds)) <= 4
    assert (folds_by(PAIRS, 5, seed=4) != folds).any()
    with pytest.raises(ValueError, match="folds must be in 2..36"):
        folds_by(PAIRS, 37)


def test_reachable_by_hand() -> None:
    assert reachable(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 0, 0, 0, 1])) == pytest.approx(5 / 6)
    assert type_codes(["b", "a", "b"], [1, 1, 1]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="one length"):
        type_codes([1, 2], [1])


def test_joined_groups_keep_every_type_whole() -> None:
    pairs, clusters = np.array([0, 0, 1, 2, 2, 3]), np.array(["a", "b", "b", "c", "d", "e"])
    groups = joined(pairs, clusters)
    assert groups[0] == groups[1] == groups[2] and groups[3] == groups[4]  # cluster b links pairs 0 and 1
    assert len(set(groups)) == 3
    assert len(set(joined(np.arange(6), np.arange(6)))) == 6
