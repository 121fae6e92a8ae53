"""What a run can see at all, said before any number: floors and ceilings, and the smallest change it could have found.

From the unedited answers alone, so that it stands whatever the edits did. Knows nothing about models or edits.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.statistics.clusters import Settings
from experiments.statistics.floors import visibility
from experiments.statistics.power import Design, against_baseline

__all__ = ["least_flips", "limits"]


def limits(unedited: pd.DataFrame, comparisons: int, settings: Settings) -> str:
    """Sentences for the top of a summary.

    Args:
        unedited: one row per prompt: correct, cluster, parsed.
        comparisons: paired comparisons with these answers that are corrected together.
        settings: of their tests; the level is two-sided.
    """
    clusters = unedited["cluster"].to_numpy()
    correct = unedited["correct"].to_numpy(bool)
    alpha = settings.alpha / 2
    seen = visibility(correct, clusters, unedited["parsed"].to_numpy(bool), alpha=alpha, tests=comparisons)
    design = Design.of(correct, clusters, alpha=alpha, tests=comparisons)
    gain, harm = against_baseline(design, "gain"), against_baseline(design, "harm")
    texts = [seen.words] if seen.words else []
    found = []
    if gain is not None and seen.mark != "ceiling":
        found.append(f"a gain of {100 * gain / design.n:.1f}")
    if harm is not None and seen.mark not in ("floor", "unparsed"):
        found.append(f"a loss of {100 * harm / design.n:.1f}")
    if found:
        among = f"one of {comparisons} comparisons" if comparisons > 1 else "the comparison"
        texts.append(
            f"The smallest change of accuracy that {among} could have told from none (all that changes goes one way, "
            f"p < {settings.alpha:g} after correction): {' or '.join(found)} points."
        )
    return " ".join(texts)


def least_flips(unedited: pd.DataFrame, comparisons: int, settings: Settings) -> str:
    """The same where any change of an answer counts, right or wrong; arguments as for `limits`."""
    clusters, n = unedited["cluster"].to_numpy(), len(unedited)
    design = Design.of(np.ones(n, bool), clusters, alpha=settings.alpha / 2, tests=comparisons)
    number = against_baseline(design, "harm")
    told = f"flips of {100 * number / n:.1f} points" if number is not None else "none: there are too few clusters"
    return (
        f"{100 * unedited['correct'].mean():.1f} % of the unedited answers are right. The smallest share of changed "
        f"answers that one of {comparisons} comparisons could have told from none (p < {settings.alpha:g} after "
        f"correction): {told}."
    )
