"""Floors, ceilings and ties: what cannot be seen is said, and nothing is named best among equals."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.statistics.floors import best_places, mark_of, visibility

CLUSTERS = np.arange(20)


def test_ceiling_floor_and_unparsed_name_the_side_that_is_blind() -> None:
    top = visibility(np.ones(20, bool), CLUSTERS)
    assert (top.mark, top.gain, top.harm) == ("ceiling", False, True) and "improvement cannot be seen" in top.words
    bottom = visibility(np.zeros(20, bool), CLUSTERS, np.ones(20, bool))
    assert (bottom.mark, bottom.gain, bottom.harm) == ("floor", True, False) and "harm cannot be seen" in bottom.words
    silent = visibility(np.zeros(20, bool), CLUSTERS, np.zeros(20, bool))
    assert silent.mark == "unparsed" and not silent.harm
    middle = visibility(CLUSTERS < 10, CLUSTERS)
    assert (middle.mark, middle.gain, middle.harm, middle.words) == ("", True, True, "")


def test_too_few_clusters_with_room_is_said_and_counts_clusters_not_prompts() -> None:
    correct = np.r_[np.zeros(4, bool), np.ones(16, bool)]
    few = visibility(correct, CLUSTERS)
    assert (few.gain_clusters, few.gain, few.harm) == (4, False, True)  # 0.5 ** 4 = 0.0625
    assert "Only 4 clusters hold an answer that is wrong" in few.words and "no improvement" in few.words
    assert "Only 1 cluster holds an answer" in visibility(np.r_[np.zeros(1, bool), np.ones(19, bool)], CLUSTERS).words
    assert visibility(np.r_[np.zeros(5, bool), np.ones(15, bool)], CLUSTERS).gain  # 0.5 ** 5 = 0.031
    assert not visibility(np.r_[np.zeros(5, bool), np.ones(15, bool)], CLUSTERS, tests=10).gain
    shared = np.r_[np.zeros(5, int), np.arange(1, 16)]  # the five wrong prompts are one cluster
    assert visibility(np.r_[np.zeros(5, bool), np.ones(15, bool)], shared).gain_clusters == 1
    with pytest.raises(ValueError, match="one length"):
        visibility(np.zeros(3), CLUSTERS)


def test_marks_of_levels() -> None:
    assert mark_of(np.array([0.97, 1.0, 0.99]), (0, 1), 0.05) == "ceiling"
    assert mark_of(np.array([0.94, 1.0, 0.99]), (0, 1), 0.05) == ""
    assert mark_of(np.array([0.0, 0.01]), (0, 1), 0.05) == "floor"
    assert mark_of(np.array([0.5, 0.5]), (0, 1), 0.05) == "constant"
    assert mark_of(np.array([0.01, 0.02]), (0, np.inf), 0.05) == "floor"
    assert mark_of(np.array([3.0, 4.0]), None, 0.05) == ""


def test_no_best_among_ties() -> None:
    assert best_places(np.array([0.2, 0.9, 0.5, 0.1])).tolist() == [1, 2, 0]
    assert best_places(np.ones(7)).size == 0
    assert best_places(np.array([1.0, 1.0, 1.0, 1.0, 0.5])).size == 0  # four share the first place, three may be named
    assert best_places(np.array([0.9, 0.5, 0.5, 0.5, 0.1])).tolist() == [0]
    assert best_places(np.array([0.9, 0.5, np.nan]), highest=False).tolist() == [1]
