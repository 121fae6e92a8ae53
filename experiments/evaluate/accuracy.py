"""From judged answers to accuracies: by condition and number of steps, with intervals over clusters, and as a table.

Knows nothing about models or files.
"""

from __future__ import annotations

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from experiments.statistics.clusters import Settings, accuracy_interval

__all__ = ["accuracy_table", "markdown"]


def accuracy_table(answers: pd.DataFrame, settings: Settings | None = None) -> pd.DataFrame:
    """Accuracy of every condition, over all problems and by number of steps.

    Args:
        answers: from `experiments.study.modes.evaluate`.
        settings: resamples, level and seed of the bootstrap.

    Returns:
        One row per mode x n_latents x n_steps (-1: all problems), with accuracy, lower, upper (clustered bootstrap;
        fractions), n, n_clusters and unparsed (answers without a number; they count as wrong). Where all are right or
        all wrong a bootstrap has no width: there the interval is Clopper-Pearson over clusters.
    """
    settings = settings or Settings()
    rows = []
    for mode, count in _conditions(answers):
        condition = answers[(answers["mode"] == mode) & (answers["n_latents"] == count)]
        found = sorted(condition["n_steps"].unique())
        for steps in [-1, *(found if len(found) > 1 else [])]:
            group = condition if steps == -1 else condition[condition["n_steps"] == steps]
            estimate = accuracy_interval(
                group["correct"].to_numpy(),
                group["cluster"].to_numpy(),
                resamples=settings.resamples,
                level=settings.level,
                seed=settings.seed,
            )
            lower, upper = estimate.lower, estimate.upper
            if estimate.estimate in (0.0, 1.0):
                right = int(estimate.estimate) * estimate.n_clusters
                alpha = round(1 - settings.level, 12)
                lower, upper = map(float, proportion_confint(right, estimate.n_clusters, alpha=alpha, method="beta"))
            rows.append(
                {
                    "mode": mode,
                    "n_latents": count,
                    "n_steps": steps,
                    "accuracy": estimate.estimate,
                    "lower": lower,
                    "upper": upper,
                    "n": estimate.n,
                    "n_clusters": estimate.n_clusters,
                    "unparsed": int((~group["parsed"]).sum()),
                }
            )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The accuracy table as a markdown table: one line per condition, one column per number of steps."""
    steps = sorted(table["n_steps"].astype(int).unique().tolist())
    sizes = dict(zip(table["n_steps"], table["n"], strict=True))
    names = {-1: "all", 0: "steps unknown", 1: "1 step"}
    heads = [f"{names.get(k, f'{k} steps')} (n={sizes[k]})" for k in steps]
    lines = [
        "| mode | latents | " + " | ".join(heads) + " | no number |",
        "|---|---|" + "---|" * len(heads) + "---|",
    ]
    for mode, count in _conditions(table):
        rows = table[(table["mode"] == mode) & (table["n_latents"] == count)].to_dict(orient="records")
        cells = {row["n_steps"]: row for row in rows}
        values = [f"{cells[k]['accuracy']:.3f} [{cells[k]['lower']:.3f}, {cells[k]['upper']:.3f}]" for k in steps]
        shown = "–" if count < 0 else str(count)
        lines.append(f"| {mode} | {shown} | " + " | ".join(values) + f" | {cells[-1]['unparsed']} |")
    return "\n".join(lines)


def _conditions(table: pd.DataFrame) -> list[tuple[str, int]]:
    """(mode, n_latents) in the order in which they come."""
    return list(dict.fromkeys(zip(table["mode"], table["n_latents"].astype(int), strict=True)))
