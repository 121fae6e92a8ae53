"""What a run can see, said before any number: by hand, at both ends of the scale, and with too few clusters."""

from __future__ import annotations

import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.study.limits import least_flips, limits


def unedited(right: int, n: int, parsed: bool = True) -> pd.DataFrame:
    return pd.DataFrame({"correct": [i < right for i in range(n)], "cluster": range(n), "parsed": parsed})


def test_the_smallest_change_by_hand() -> None:
    """One of 10 comparisons needs 0.5 ** k <= 0.025 / 10: 9 clusters, of 200."""
    text = limits(unedited(100, 200), 10, Settings())
    assert "one of 10 comparisons" in text and "a gain of 4.5 or a loss of 4.5 points" in text
    assert "the comparison could have told" in limits(unedited(100, 200), 1, Settings())
    flips = least_flips(unedited(150, 200), 10, Settings())
    assert flips.startswith("75.0 % of the unedited answers are right.") and flips.endswith("flips of 4.5 points.")


def test_ends_of_the_scale_and_too_few_clusters() -> None:
    top, bottom, silent = (limits(unedited(*case), 10, Settings()) for case in ((200, 200), (0, 200), (0, 200, False)))
    assert "improvement cannot be seen" in top and "a loss of 4.5 points" in top and "a gain" not in top
    assert "harm cannot be seen" in bottom and "a gain of 4.5 points" in bottom and "a loss" not in bottom
    assert "No unsteered answer has a number" in silent
    few = limits(unedited(196, 200), 10, Settings())
    assert "Only 4 clusters" in few and "no improvement can be found here" in few and "a gain of" not in few
    assert "none: there are too few clusters" in least_flips(unedited(3, 6), 10, Settings())
