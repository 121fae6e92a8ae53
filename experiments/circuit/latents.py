"""`codi circuit-latents`: which heads write the answer at the end of a latent thought, and from which latent.

    codi circuit-latents                                   # the shipped model, 64 arithmetic problems
    codi circuit-latents --model bcywinski/codi_llama1b-answer_only --task gsm8k

The counterpart of the writers and sources of `codi circuit` for thoughts that are not written: the same measure, with
the question and each latent as sources. Writes writers.csv, sources.csv, head_sources.csv, pathways.csv, ablation.csv
and a figure. A contribution is direct: what later heads make of it is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.circuit.latent_trials import (
    LATENT_ABLATED,
    LATENT_SOURCES,
    LATENT_WRITERS,
    latent_ablated,
    latent_sources,
    latent_writers,
)
from experiments.circuit.options import LatentCircuitOptions
from experiments.circuit.tables import means_by
from experiments.circuit.tables_traced import LEAST_SHARE
from experiments.circuit.words import with_interval
from experiments.statistics.clusters import Settings
from experiments.study.parts import Part
from experiments.study.result import Section
from experiments.study.run import Findings, Study, Trials
from experiments.tasks.split import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from codi import CodiModel

__all__ = ["STUDY", "Plan", "main", "make_tables"]

LOUDEST = 5
"""Heads that count as the writers, at most a fifth of the model's."""
_HEAD = ["block", "head"]
_SOURCE = ["source", "latent"]


@dataclass(frozen=True)
class Plan:
    """The study with everything resolved."""

    n_prompts: int
    n_latents: int
    n_blocks: int
    n_heads: int
    writers: int
    draws: int
    seed: int
    batch_size: int
    settings: Settings


def make_plan(options: LatentCircuitOptions, model: CodiModel, prompts: Split) -> Plan:
    """The plan that the options ask for.

    Raises:
        ValueError: a model that gives no attention weights, or has no latents.
    """
    if model.attention != "eager":
        raise ValueError(f"sources need a model loaded with attention='eager', got {model.attention!r}")
    if model.n_latents < 1:
        raise ValueError("the model has no latents")
    writers = max(1, min(LOUDEST, model.n_layers * model.n_heads // 5))
    return Plan(
        len(prompts.evaluation), model.n_latents, model.n_layers, model.n_heads, writers, options.draws, options.seed,
        options.batch_size, options.statistics(options.seed),
    )  # fmt: skip


def parts(plan: Plan) -> list[Part]:
    """Three tables of one part each."""
    how = {"batch_size": plan.batch_size}
    more = {**how, "n": plan.writers, "draws": plan.draws}
    return [
        Part("writers", latent_writers, how, schema=LATENT_WRITERS),
        Part("sources", latent_sources, how, schema=LATENT_SOURCES),
        Part("ablated", latent_ablated, more, plan.seed, LATENT_ABLATED),
    ]


# --- Tables -----------------------------------------------------------------------------------------------------------


def make_tables(trials: Trials, writers: int, settings: Settings) -> dict[str, pd.DataFrame]:
    """Tables of writers, of sources (of the writers together, and head by head), of pathways, and of the ablation."""
    said = trials["writers"]
    rows = said.assign(share=said["contribution"] / said["total"])
    table = means_by(rows, _HEAD, "share", settings, cluster="cluster", bounds=(-np.inf, np.inf))
    table = table.rename(columns={"mean": "share"})
    table = table.assign(alone=said.groupby(_HEAD, sort=True)["alone"].mean().to_numpy())
    table = table.sort_values("share", ascending=False, ignore_index=True)
    whole = said.drop_duplicates("item")[["item", "total"]]
    shares = trials["sources"].merge(whole, on="item")
    shares = shares.assign(share=shares["written"] / shares["total"])
    by_head = means_by(
        shares, [*_HEAD, *_SOURCE], "share", settings, cluster="cluster", bounds=(-np.inf, np.inf)
    ).rename(columns={"mean": "share"})
    mine = trials["sources"].merge(table.head(writers)[_HEAD], on=_HEAD)
    summed = mine.groupby(["item", "cluster", *_SOURCE], observed=True, sort=True)["written"].sum()
    together = summed.clip(lower=0).reset_index()
    total = together.groupby("item")["written"].transform("sum")
    together = together.assign(share=together["written"] / total.where(total > 0)).dropna(subset=["share"])
    counted = together[together["source"] != "rest"]
    at_once = (counted["share"] >= LEAST_SHARE).groupby([counted["item"], counted["cluster"]]).sum()
    several = at_once.rename("pathways").reset_index().assign(of="writers")
    silenced = trials["ablated"]
    right = silenced.groupby("silenced", observed=True, sort=True)["right"].mean().to_numpy()
    ablation = means_by(silenced, ["silenced"], "probability", settings, cluster="cluster")
    return {
        "writers": table,
        "sources": means_by(together, _SOURCE, "share", settings, cluster="cluster"),
        "head_sources": by_head,
        "pathways": means_by(several, ["of"], "pathways", settings, cluster="cluster", bounds=(0.0, np.inf)),
        "ablation": ablation.assign(accuracy=right),
    }


def conclude(plan: Plan, trials: Trials) -> Findings:
    """Tables, figure and summary."""
    n = trials["writers"]["item"].nunique()
    about = (
        f"{n} of {plan.n_prompts} prompts are answered rightly and count. After {plan.n_latents} latents, where the "
        "first digit of the answer is predicted: what each head adds to its logit (less the mean over the vocabulary), "
        "as a share of the whole logit, and from what: the question, a latent, or the rest (first token, tokens after "
        "the latents). MLPs and embeddings write the remainder. Direct contributions only."
    )
    if not n:
        return Findings([Section(about), Section("No prompt is answered rightly: there is nothing to read.")], {})
    tables = make_tables(trials, plan.writers, plan.settings)
    captions = {
        "latent_writers": "Left: share of the answer's logit that every head writes. Right: the loudest writers by "
        "source, on a scale of their own."
    }

    def figures() -> dict[str, Figure]:
        from experiments.circuit.figures_latents import draw_latent_writers

        drawn = draw_latent_writers(
            tables["writers"], tables["head_sources"], plan.n_blocks, plan.n_heads, plan.writers
        )
        return {"latent_writers": drawn}

    return Findings([Section(about), *_words(plan, tables)], tables, figures, captions)


def _words(plan: Plan, tables: dict[str, pd.DataFrame]) -> list[Section]:
    best = tables["writers"].head(plan.writers)
    later = int((best["block"] > plan.n_blocks / 2).sum())
    named = "; ".join(f"{int(one['block'])}.{int(one['head'])} {with_interval(one, 'share', digits=3)}"
                      for _, one in best.iterrows())  # fmt: skip
    whole = tables["writers"]["share"].sum()
    text = (
        f"{named} (block.head); all heads together {100 * whole:.1f} % of the logit. {later} of these {len(best)} "
        f"stand in the later half of {plan.n_blocks} blocks."
    )
    here = tables["ablation"].set_index("silenced")
    if len(here):
        said = {name: with_interval(here.loc[name], "mean") for name in ("none", "writers", "random", "all")}
        text += (
            f" Chosen on every other prompt and silenced on the others, where the answer is predicted: probability "
            f"{said['none']} becomes {said['writers']}; with as many random heads of the same blocks "
            f"{said['random']}; with all heads of the model {said['all']}."
        )
    lines = [f"Of what these {len(best)} heads write towards the answer:", ""]
    for _, row in tables["sources"].iterrows():
        name = f"latent {row['latent']}" if row["source"] == "latent" else row["source"]
        lines.append(f"- {name}: {with_interval(row, 'mean', 100, 1)} %")
    several = tables["pathways"].iloc[0]
    lines += ["", f"{with_interval(several, 'mean', 1, 1)} sources at once (question and latents, {LEAST_SHARE:g} of "
                  "it each)."]  # fmt: skip
    return [Section(text, "Writers"), Section("\n".join(lines), "Sources")]


STUDY: Study[LatentCircuitOptions, Plan] = Study(
    options=LatentCircuitOptions,
    title="Circuits of a latent thought",
    prompts=lambda options, model: options.load_problems(options.seed, model.protocol.question_suffix),
    plan=make_plan,
    parts=parts,
    conclude=conclude,
    attention="eager",
)

main = STUDY.main


if __name__ == "__main__":
    from experiments.cli import run_module

    run_module(__name__)
