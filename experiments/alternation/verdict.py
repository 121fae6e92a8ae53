"""The verdict of the alternation test on the observations of a task, and over tasks; in tables and in words.

What is predicted and by which rule it is judged stands in hypothesis.py, the statistics in
experiments/statistics/alternation.py. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from experiments.alternation.hypothesis import LEAST_ACCURACY, LEAST_MEASURES, POOLED
from experiments.alternation.measures import Observations
from experiments.alternation.profiles import Size, profiles_of, size_of
from experiments.statistics.alternation import Profile, alternation, pooled, verdict_of
from experiments.statistics.clusters import Settings, mean_intervals

__all__ = ["Result", "analyse", "judged", "overall", "summary"]


@dataclass(frozen=True)
class Result:
    """What the test found on one task.

    Attributes:
        task: its name.
        tests: one row per measure and, last, one for the pooled measure: the columns of
            `statistics.alternation.alternation`, and size_from and reason in words.
        levels: one row per measure × latent: mean with interval.
        sizes: smallest size that matters, by measure.
        accuracy: after all latents, a fraction; NaN: not observed.
        settings: level, α, resamples and seed.
    """

    task: str
    tests: pd.DataFrame
    levels: pd.DataFrame
    sizes: Mapping[str, Size]
    accuracy: float
    settings: Settings

    def row(self, measure: str = POOLED.name) -> pd.Series:
        """The row of one measure."""
        return self.tests[self.tests["measure"] == measure].iloc[0]

    def answer(self, measure: str = POOLED.name) -> str:
        """What the rule says, in full."""
        return str(self.row(measure)["answer"])

    def verdict(self, measure: str = POOLED.name) -> str:
        """Supported, opposite phase, contradicted, undecided or not testable."""
        return str(self.row(measure)["verdict"])


# --- The test ---------------------------------------------------------------------------------------------------------


def analyse(
    observations: Observations,
    settings: Settings | None = None,
    *,
    task: str = "",
    vocabulary: int = 0,
    borrowed: Mapping[str, Size] | None = None,
) -> Result:
    """Test every measure and the pooled one on the observations of one task.

    Args:
        observations: of a model, or simulated.
        settings: resamples, level, alpha and seed.
        task: its name.
        vocabulary: number of tokens, for the highest entropy; 0: not known.
        borrowed: sizes of another task in the same run, for prompts without several wordings.

    Raises:
        ValueError: fewer than two clusters.
    """
    after = observations.correct_after
    accuracy = float("nan") if after is None else float(after[:, -1].mean())
    lent = borrowed or {}
    profiles, sizes = [], {}
    for profile in profiles_of(observations, vocabulary):
        sizes[profile.name] = size_of(profile, observations, lent.get(profile.name))
        profiles.append(replace(profile, smallest=sizes[profile.name].size))
    found = judged(profiles, observations, settings, accuracy=accuracy, sizes=sizes, borrowed=lent.get(POOLED.name))
    return replace(found, task=task)


def judged(
    profiles: Sequence[Profile],
    observations: Observations,
    settings: Settings | None = None,
    *,
    accuracy: float = float("nan"),
    sizes: Mapping[str, Size] | None = None,
    borrowed: Size | None = None,
) -> Result:
    """The test on measures that have their sizes already.

    Args:
        profiles: over the prompts of the observations.
        observations: for clusters and wordings.
        settings: resamples, level, alpha and seed.
        accuracy: of the model, a fraction; NaN: not known, so not asked for.
        sizes: where the sizes of the measures come from; None: not known.
        borrowed: size of the pooled contrast in another task.
    """
    settings, clusters = settings or Settings(), observations.clusters
    if len(np.unique(clusters)) < 2:
        raise ValueError("the unit of the test is the cluster of prompts that share their numbers: 2 are needed, got 1")
    # which measures are at a floor or ceiling does not depend on the number of resamples
    first = alternation(profiles, clusters, replace(settings, resamples=100))
    verdicts = first["verdict"].iloc[:-1]
    usable = [one for one, says in zip(profiles, verdicts, strict=True) if one.enters and says != "not testable"]
    together = pooled(usable)
    known = dict(sizes or {})
    if together is not None:
        known[POOLED.name] = size_of(together, observations, borrowed, together.smallest)
    tests = alternation(
        profiles,
        clusters,
        settings,
        least_measures=LEAST_MEASURES,
        pooled_smallest=known[POOLED.name].size if together is not None else None,
    )
    if accuracy < LEAST_ACCURACY:
        last = tests.index[-1]
        tests.loc[last, ["answer", "phase_free"]] = "not testable: accuracy", ""
        tests.loc[last, "verdict"] = verdict_of("not testable: accuracy")
    tests["size_from"] = [known[name].words if name in known else "" for name in tests["measure"]]
    tests["reason"] = [_reason(row, settings, accuracy, len(usable)) for row in tests.to_dict("records")]
    return Result("", tests, _levels([*profiles, together], clusters, settings), known, accuracy, settings)


def _levels(profiles: Sequence[Profile | None], clusters: np.ndarray, settings: Settings) -> pd.DataFrame:
    """Mean of every measure at every latent, along its direction, with its interval."""
    frames = []
    for profile in profiles:
        if profile is not None and profile.values is not None:
            means = mean_intervals(profile.along(), clusters, settings, bounds=profile.bounds or (-np.inf, np.inf))
            means.insert(0, "latent", range(1, len(means) + 1))
            means.insert(0, "measure", profile.name)
            frames.append(means.dropna(subset="mean"))
    return pd.concat(frames, ignore_index=True)


def _reason(row: Mapping[Any, Any], settings: Settings, accuracy: float, usable: int) -> str:
    """Why the answer is what it is, in words."""
    answer, smallest = row["answer"], f"{row['smallest']:.3g}"
    higher = "even" if row["even_minus_odd"] > 0 else "odd"
    if answer == "not testable: accuracy":
        return f"the model answers {accuracy:.1%} of the prompts right, {LEAST_ACCURACY:.0%} are needed"
    if answer.startswith("not testable"):
        kind = answer.removeprefix("not testable: ")
        end = f"every latent lies within {smallest} of the {'lowest' if kind == 'floor' else 'highest'} possible value"
        if row["measure"] == POOLED.name:
            return f"{usable} measures can be tested, {LEAST_MEASURES} are needed"
        return end if kind in ("floor", "ceiling") else kind
    split = ", ".join(row["best_split"])
    reasons = {
        "supported": f"{higher} latents higher, as predicted, and no other split explains as much",
        "alternates, opposite phase": f"{higher} latents higher, not as predicted, and no split explains as much",
        "another split explains more": f"latents {split} against the rest do, in {_percent(row['beats'])} of resamples",
        "below the size that matters": f"the whole interval lies within ±{smallest}",
        "not in the predicted phase": f"less than {smallest} in the predicted sign; the opposite one stays open",
    }
    if answer in reasons:
        return reasons[answer]
    lacking = []
    if row["lower"] <= 0 <= row["upper"]:
        lacking.append("the contrast could be 0")
    elif abs(row["contrast"]) < row["smallest"]:
        lacking.append(f"the contrast is smaller than {smallest}, but could be larger")
    if row["first"] < 1 - settings.alpha:
        lacking.append(f"even/odd explains most in {_percent(row['first'])} of the resamples only")
    return "; ".join(lacking)


def overall(results: Sequence[Result]) -> tuple[str, str]:
    """The verdict over tasks and its reason: what every testable task says; undecided if they disagree."""
    says = {result.task: result.verdict() for result in results}
    testable = {task: verdict for task, verdict in says.items() if verdict != "not testable"}
    if not testable:
        return "not testable", "; ".join(f"{result.task}: {result.row()['reason']}" for result in results)
    every = " and ".join(testable)
    if len(set(testable.values())) == 1:
        rest = [f"{task} cannot be tested" for task in says if task not in testable]
        return next(iter(testable.values())), "; ".join([f"so says {every}", *rest])
    return "undecided", "the tasks disagree: " + ", ".join(f"{task} {verdict}" for task, verdict in testable.items())


# --- Words ------------------------------------------------------------------------------------------------------------


def summary(result: Result) -> str:
    """The verdict on one task as markdown: the pooled measure first, then a row per measure."""
    tests, last = result.tests, result.tests.iloc[-1]
    level = f"{100 * result.settings.level:g} %"
    prompts, clusters = int(tests["n"].max()), int(tests["n_clusters"].max())
    head = (
        f"**{last['answer']}**: {last['reason']} ({prompts} prompts in {clusters} clusters, accuracy "
        f"{result.accuracy:.3f})."
    )
    if last["n"]:
        size = result.sizes[POOLED.name]
        head += (
            f" Pooled contrast {_number(last)} SD in the predicted sign, smallest that matters {size.size:.3f} "
            f"({size.words}); even/odd is number {last['split_rank']} of the splits and first in "
            f"{_percent(last['first'])} of the resamples, latents {', '.join(last['best_split'])} against the rest "
            f"explain most. Even and odd latents, in either phase: {last['phase_free'] or 'not compared'}."
        )
    lines = [
        head, "",
        f"| measure | predicted higher | contrast [{level}] | smallest that matters | best split | even/odd first in "
        "| n | answer |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for _, row in tests.iloc[:-1].iterrows():
        numbers = "– | – | – | –"
        if row["n"]:
            interval = _number(row) if np.isfinite(row["lower"]) else f"{row['contrast']:+.3f}"
            best = ", ".join(row["best_split"]) or "–"
            numbers = f"{interval} | {row['smallest']:.3f} | {best} | {_percent(row['first'])}"
        answer = f"**{row['answer']}**: {row['reason']}"
        lines.append(
            f"| {row['measure']} | {row['predicted']} | {numbers} | {row['n']} ({row['n_clusters']}) | {answer} |"
        )
    lines += [
        "",
        "contrast: even against odd latents beside a linear trend, positive as predicted; its intervals hold together "
        "over all measures. smallest that matters: the stated size, or what the contrast differs by between wordings "
        "of the same numbers where that is larger. "
        "best split: one half of the split of the latents that explains most; first in: share of resamples of clusters "
        "in which even/odd does. n: prompts (clusters).",
    ]
    return "\n".join(lines)


def _number(row: pd.Series) -> str:
    return f"{row['contrast']:+.3f} [{row['lower']:+.3f}, {row['upper']:+.3f}]"


def _percent(share: float) -> str:
    """A share as whole per cent; not rounded to 100 or 0 where it is neither."""
    percent = 100 * share
    return "< 1 %" if 0 < percent < 0.5 else "> 99 %" if 99.5 <= percent < 100 else f"{percent:.0f} %"
